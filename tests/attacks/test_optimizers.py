"""Adam in the gradient engine: its first steps by hand, and the exact optimum of a linear model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from jaxadv.attacks import ATTACKS, GradientAttack, adam_pgd
from jaxadv.attacks.optimizers import from_data
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


def test_settings_are_checked():
    with pytest.raises(ValueError, match="norm ball linf or l2 for adam_pgd; got l1"):
        adam_pgd(l1(1.0))
    for bad in ({"decay": 1.0}, {"square": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            adam_pgd(linf(0.1), **bad)
