"""Adam in the gradient engine and conjugate directions in AutoPGD: steps by hand, the optimum of a linear model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from jaxadv import core
from jaxadv.attacks import ACG, ATTACKS, GradientAttack, acg, adam_pgd
from jaxadv.attacks.optimizers import conjugate, from_data
from jaxadv.losses import margin
from jaxadv.threats import l1, l2, linf

KEY = jax.random.key(0)


def linear(w, x):
    return x @ w


def curved(w, x):
    return jnp.tanh(3 * x @ w)


def problem():
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(10, 2)).astype(np.float32), rng.uniform(0.3, 0.7, (8, 10)).astype(np.float32)
    return jnp.asarray(w), x, (x @ w).argmax(-1).astype(np.int32)


def test_it_reaches_the_corner_that_is_the_optimum_of_a_linear_model():
    w, x, y = problem()
    found = adam_pgd(linf(0.1), steps=20, loss=margin).run(KEY, Partial(linear, w), x, y)
    toward = np.sign(np.asarray(w[:, 1] - w[:, 0])) * np.where(y == 0, 1, -1)[:, None]
    np.testing.assert_allclose(found.x, x + 0.1 * toward, atol=1e-6)
    assert isinstance(adam_pgd(l2(1.0)), GradientAttack) and ATTACKS["adam_pgd"] is adam_pgd


def test_its_steps_are_those_of_adam():
    w, x, y = problem()
    found = adam_pgd(linf(10.0, bounds=(-50.0, 50.0)), steps=4, step_size=0.02, start="zero", keep="last", loss=margin)
    got = np.asarray(found.run(KEY, Partial(curved, w), x, y).x)
    point, first, second = x.astype(np.float64), 0.0, 0.0
    slope = jax.grad(lambda p: jnp.sum(margin(curved(w, p), jnp.asarray(y))))
    for t in range(1, 5):
        grad = np.asarray(slope(jnp.asarray(point, jnp.float32)), np.float64)
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        point = point - 0.02 * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(got, point, atol=1e-5)


def test_a_state_from_data_has_the_same_values():
    w, *_ = problem()
    for got, want in zip(*(jax.tree.leaves(t.init(w)) for t in (from_data(optax.adam(0.1)), optax.adam(0.1)))):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


def test_conjugate_directions_solve_a_quadratic_in_as_many_steps_as_it_has_dimensions():
    rng = np.random.default_rng(1)
    root = rng.normal(size=(2, 4, 4))
    a, b = root @ root.transpose(0, 2, 1) + np.eye(4), rng.normal(size=(2, 4))
    point, line, before = np.zeros((2, 4)), np.zeros((2, 4)), np.zeros((2, 4))
    for _ in range(4):  # with exact line searches it is the method of conjugate gradients
        grad = np.einsum("bij,bj->bi", a, point) - b
        line = np.asarray(conjugate(*(jnp.asarray(v, jnp.float32) for v in (line, before, grad))), np.float64)
        far = -np.sum(grad * line, -1) / np.einsum("bi,bij,bj->b", line, a, line)
        point, before = point + far[:, None] * line, grad
    np.testing.assert_allclose(point, np.linalg.solve(a, b[..., None])[..., 0], atol=1e-4)


@pytest.mark.slow
def test_acg_steps_along_conjugate_directions_and_returns_to_the_best_one():
    w, x, y = problem()
    w = 0.15 * w
    attack, keys = acg(l2(0.5), steps=12, early=False), core.example_keys(KEY, "acg", jnp.arange(8))
    assert isinstance(attack, ACG) and ATTACKS["acg"] is acg
    model = Partial(curved, w)
    step = jax.jit(lambda s, x: attack.step(s, model, x, y))
    state = jax.jit(lambda x: attack.init(keys, model, x, y))(x)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(curved(w, p)[jnp.arange(8), y] - curved(w, p)[jnp.arange(8), 1 - y])))
    line = best = np.zeros_like(x)
    loss, backs = np.full(8, np.inf), 0
    for i in range(13):
        new = step(state, x)
        asked = np.asarray(new.point)
        if i:
            unit = line / np.linalg.norm(line, axis=-1, keepdims=True)
            asked = np.asarray(l2(0.5).project(state.point + state.length[:, None] * unit, jnp.asarray(x)))
        grad, value = np.asarray(slope(asked)), np.asarray(margin(curved(w, asked), y))
        turned = grad - np.asarray(state.grad)
        scale = np.sum(line * turned, -1)
        beta = np.where(scale != 0, np.sum(grad * turned, -1) / np.where(scale != 0, scale, 1), 0) if i else np.zeros(8)
        line = -grad + beta[:, None] * line
        best = np.where((value < loss)[:, None], line, best)
        loss = np.minimum(loss, value)
        back = np.asarray(new.length < state.length) if i else np.zeros(8, bool)
        line = np.where(back[:, None], best, line)
        backs += back.sum()
        np.testing.assert_allclose(new.memory[0], line, atol=2e-3 * np.abs(line).max())
        np.testing.assert_allclose(new.best_loss, loss, atol=1e-5)
        line, best = (np.asarray(v) for v in new.memory)
        state = new
    assert backs > 0


def test_settings_are_checked():
    with pytest.raises(ValueError, match="norm ball linf or l2 for adam_pgd; got l1"):
        adam_pgd(l1(1.0))
    for bad in ({"decay": 1.0}, {"square": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            adam_pgd(linf(0.1), **bad)
    with pytest.raises(ValueError, match="linf or l2 for acg; got l1"):
        acg(l1(1.0))
    with pytest.raises(ValueError, match="compat must be None"):
        acg(linf(0.1), compat="official")
