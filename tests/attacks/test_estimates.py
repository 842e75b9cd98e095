"""Estimated gradients: bias and error as theory says, exact counts of queries, and the attacks that follow them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxadv import core, models
from jaxadv.attacks import Estimated, apgd_ce, estimated, estimating, fmn, nes, pgd, spsa, zoo
from jaxadv.attacks.estimates import DIRECTIONS, Estimate
from jaxadv.losses import margin
from jaxadv.threats import l2, linf

KEY = jax.random.key(0)
N = 12


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def linear(w, x):
    return (x.reshape(x.shape[0], -1) - 0.5) @ w


def quadratic(form, x):
    w, q = form
    return x @ w + jnp.einsum("bi,kij,bj->bk", x, q, x)


def problem(b=24, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(N, classes)).astype(np.float32)
    x = rng.uniform(0.4, 0.6, (b, N)).astype(np.float32)
    return Partial(linear, jnp.asarray(w)), x, ((x - 0.5) @ w).argmax(-1).astype(np.int32), w


SHARE = {"normal": lambda m: (N + 1) / m, "signs": lambda m: (N - 1) / m, "coordinates": lambda m: N / m - 1}


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_an_estimate_has_the_mean_and_the_squared_error_of_theory(directions):
    """Rows are trials: the same point with keys of its own. A quadratic form adds nothing to the mean."""
    trials, samples = 6000, 4
    rng = np.random.default_rng(3)
    w, q = rng.normal(size=(N, 3)), rng.normal(size=(3, N, N))
    weights = jnp.asarray([1.0, -2.0, 0.5])
    at = rng.uniform(0.3, 0.7, N)
    keys = core.example_keys(KEY, "trials", jnp.arange(trials))

    @jax.jit
    def estimate(form, point):
        model = estimating(Partial(quadratic, form), keys, directions=directions, samples=samples, sigma=0.2, at_once=2)
        return jax.grad(lambda p: jnp.sum(model(p) @ weights))(point)

    point = jnp.broadcast_to(jnp.asarray(at, jnp.float32), (trials, N))
    for forms in (0 * q, q):
        got = np.asarray(estimate((jnp.asarray(w, jnp.float32), jnp.asarray(forms, jnp.float32)), point), np.float64)
        want = w @ np.asarray(weights) + np.einsum("kij,j,k->i", forms + forms.transpose(0, 2, 1), at, weights)
        share = SHARE[directions](samples)
        error = np.mean(np.sum((got - want) ** 2, -1)) / np.sum(want**2)
        np.testing.assert_allclose(error, share, rtol=0.06)
        bias = np.linalg.norm(got.mean(0) - want) / np.linalg.norm(want)
        assert bias < 2.5 * np.sqrt(share / trials)


def test_all_coordinates_are_the_gradient_and_logits_stay_as_they_are():
    model, x, y, w = problem()
    x, keys = jnp.asarray(x), core.example_keys(KEY, "any", jnp.arange(len(x)))

    @jax.jit
    def slope(model):
        return jax.grad(lambda p: jnp.sum(margin(model(p), jnp.asarray(y))))(x)

    whole = estimating(model, keys, directions="coordinates", samples=N, sigma=0.1, at_once=3)
    np.testing.assert_array_equal(whole(x), model(x))
    np.testing.assert_allclose(slope(whole), slope(model), atol=1e-5)
    # keys decide the directions, the grouping of queries does not
    one, two, other = (
        slope(estimating(model, k, samples=4, sigma=0.1, at_once=n)) for k, n in ((keys, 1), (keys, 4), (keys[::-1], 1))
    )
    np.testing.assert_allclose(one, two, atol=1e-4)
    assert not np.allclose(one, other, atol=0.1)
    assert Estimate("normal", 4, 1) == Estimate("normal", 4, 1)


def test_logits_that_are_not_finite_guide_nobody():
    model, x, _, w = problem(b=4)
    keys = core.example_keys(KEY, "any", jnp.arange(4))

    def sick(w, x):
        return jnp.where(x[:, :1] > 0.5, jnp.nan, linear(w, x))

    x[:, 0] = 0.5
    model = estimating(Partial(sick, w), keys, samples=8, sigma=0.1)
    got = jax.jit(jax.grad(lambda p: jnp.sum(model(p)[:, 0])))(jnp.asarray(x))
    assert np.isfinite(got).all()


class Counted:
    """A linear model on the host that counts the rows it was asked."""

    def __init__(self, w):
        self.w, self.rows = w, 0

    def __call__(self, x):
        self.rows += len(x)
        return (x.reshape(len(x), -1) - 0.5) @ self.w


def test_estimated_attacks_break_a_host_function_and_count_every_row_that_it_was_asked():
    _, x, y, w = problem()
    host = Counted(w)
    wirings = [
        (nes(linf(0.06), queries=90, samples=4, early=False), 10 * 9 + 3),
        (spsa(linf(0.06), queries=100, samples=4, early=False), 11 * 9 + 3),
        (estimated(apgd_ce(linf(0.06), steps=9, early=False), samples=5, sigma=0.01), None),
        (estimated(fmn(l2(0.5), steps=12), samples=6, at_once=2, sigma=0.01), 12 * 13 + 3),
        (zoo(l2(0.5), queries=150, samples=6, rounds=2, rate=0.02, abort=False), 2 * 5 * 13 + 3),
    ]
    for attack, queries in wirings:
        host.rows = 0
        found = jax.block_until_ready(go(attack, models.black_box(host, 3), x, y))
        assert isinstance(attack, Estimated)
        assert host.rows == found.queries.sum() and (found.grads == 0).all()
        assert queries is None or (found.queries == queries).all()
        np.testing.assert_array_equal(host(np.asarray(found.x)).argmax(-1) != y, found.success)
        assert found.success.mean() > 0.6
        assert core.feasible(attack.threat, np.asarray(found.x), x).all()


def test_enough_directions_give_the_attack_on_gradients():
    model, x, y, _ = problem()
    real = go(pgd(l2(0.1), steps=8, start="zero"), model, x, y)
    near = go(nes(l2(0.1), queries=8 * 1201, samples=600, at_once=60, early=False, steps=8), model, x, y)
    np.testing.assert_array_equal(near.success, real.success)
    clean = margin(model(jnp.asarray(x)), jnp.asarray(y))
    assert ((clean - near.score) > 0.97 * (clean - real.score) - 1e-6).all()
    early = go(nes(linf(0.1), queries=500, samples=10), model, x, y)
    assert early.success.all() and len(set(early.queries.tolist())) >= 1 and early.queries.max() <= 503


def test_settings_are_checked():
    for bad in (
        lambda: nes(linf(0.1), queries=0),
        lambda: nes(linf(0.1), queries=100, samples=50),
        lambda: nes(linf(0.1), samples=0),
        lambda: spsa(linf(0.1), queries=0),
        lambda: zoo(l2(1.0), queries=100),
        lambda: zoo(l2(1.0), rounds=0),
        lambda: estimated(pgd(linf(0.1)), sigma=0.0),
        lambda: estimated(pgd(linf(0.1)), samples=4, at_once=3),
    ):
        with pytest.raises(ValueError, match="must"):
            bad()
    with pytest.raises(ValueError, match="unknown directions"):
        estimated(pgd(linf(0.1)), directions="gaussian")
    for build, threat in ((spsa, "l1"), (zoo, "linf")):
        from jaxadv.threats import THREATS

        with pytest.raises(ValueError, match=f"norm ball .*; got {threat}"):
            build(THREATS[threat](1.0))
    assert estimated(pgd(linf(0.1))).name == "estimated_pgd" and estimated(pgd(linf(0.1)), name="a").name == "a"
    model, x, _, _ = problem(b=4)
    twice = estimating(model, core.example_keys(KEY, "any", jnp.arange(4)))
    with pytest.raises(ValueError, match="one key for each row"):
        jax.grad(lambda p: jnp.sum(twice(p)))(jnp.concatenate([x, x]))
