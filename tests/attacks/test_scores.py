"""Searches on logits: what a linear model forces them to do, enumeration on a tiny image, exact counts of queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxadv import core, models
from jaxadv.attacks import OnePixel, Search, SimBA, one_pixel, simba
from jaxadv.attacks.scores import BASES
from jaxadv.attacks.waves import cosines
from jaxadv.core import Targets
from jaxadv.losses import margin
from jaxadv.threats import l0, l2, linf

KEY = jax.random.key(0)
N = 12


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def linear(w, x):
    return (x.reshape(x.shape[0], -1) - 0.5) @ w


def problem(shape=(N,), b=16, classes=2, seed=0, spread=0.1):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(np.prod(shape), classes)).astype(np.float32)
    x = rng.uniform(0.5 - spread, 0.5 + spread, (b, *shape)).astype(np.float32)
    return Partial(linear, jnp.asarray(w)), x, np.asarray(linear(w, x)).argmax(-1).astype(np.int32), w


class Counted:
    """A linear model on the host that counts the rows it was asked."""

    def __init__(self, w):
        self.w, self.rows = w, 0

    def __call__(self, x):
        self.rows += len(x)
        return (x.reshape(len(x), -1) - 0.5) @ self.w


def test_simba_moves_every_feature_of_a_linear_model_the_right_way_and_asks_twice_where_up_was_wrong():
    """With two queries a feature all have been tried: in linf the point is the optimum of the ball, one sign each."""
    _, x, y, w = problem()
    host, eps = Counted(w), 0.004
    found = go(simba(linf(eps), queries=2 * N, early=False), models.black_box(host, 2), x, y)
    assert host.rows == found.queries.sum() == len(x) * (2 * N + 2) and (found.grads == 0).all()
    away = np.sign(w[:, 1] - w[:, 0])[None] * np.where(y == 0, 1, -1)[:, None]
    np.testing.assert_allclose(found.x, x + eps * away, atol=1e-6)
    # after m queries: features in the row's own order, one query for each that is right going up, else two
    attack, x, y = simba(linf(eps), queries=9, early=False), jnp.asarray(x), jnp.asarray(y)
    state = attack.init(core.example_keys(KEY, "simba", jnp.arange(len(x))), Partial(linear, w), x, y)
    order = np.asarray(state.own.order)
    assert all(sorted(o) == list(range(N)) for o in order) and (order[0] != order[1]).any()
    found = go(attack, Partial(linear, w), x, y)
    for i, o in enumerate(order):
        cost = np.cumsum(np.where(away[i, o] > 0, 1, 2))
        moved = np.zeros(N)
        moved[o[cost <= 9]] = eps * away[i, o[cost <= 9]]
        np.testing.assert_allclose(found.x[i] - x[i], moved, atol=1e-6)


def test_simba_along_waves_is_simba_along_features_of_the_transformed_image():
    """On the whole basis with small steps a linear model takes every wave with the sign of its own weight."""
    model, x, y, w = problem(shape=(4, 4, 1))
    step = 0.004
    found = go(simba(l2(10.0), queries=32, step_size=step, basis="waves", share=1.0, early=False), model, x, y)
    basis = np.einsum("ia,jb->ijab", cosines(4, 4), cosines(4, 4)).reshape(16, 16)
    np.testing.assert_allclose(basis @ basis.T, np.eye(16), atol=1e-6)
    away = np.sign(basis @ (w[:, 1] - w[:, 0]))[None] * np.where(y == 0, 1, -1)[:, None]
    times = np.asarray(found.x - x).reshape(-1, 16) @ basis.T / (step * away)  # queries that are left begin anew
    np.testing.assert_allclose(times, np.round(times), atol=1e-3)
    assert times.min() > 0.9 and np.median(times) < 1.1
    few = go(simba(l2(10.0), queries=8, step_size=step, basis="waves", share=0.5, early=False), model, x, y)
    shares = np.asarray(few.x - x).reshape(-1, 16) @ basis.T
    assert np.abs(shares.reshape(-1, 4, 4)[:, 2:]).max() < 1e-6 < np.abs(shares.reshape(-1, 4, 4)[:, :2, :2]).min()


def test_simba_stops_where_it_breaks_and_reaches_targets():
    model, x, y, w = problem(classes=3)
    found = go(simba(linf(0.1), queries=100), model, x, y)
    assert found.success.all() and len(set(found.queries.tolist())) > 1 and found.queries.max() < 40
    clean = margin(model(jnp.asarray(x)), jnp.asarray(y))
    assert (found.score < clean).all() and core.feasible(linf(0.1), np.asarray(found.x), x).all()
    target = jnp.asarray((y + 1) % 3)
    found = go(simba(l2(1.0), queries=100, step_size=0.1), model, x, Targets(label=jnp.asarray(y), target=target))
    np.testing.assert_array_equal(found.success, np.asarray(model(found.x)).argmax(-1) == target)
    assert found.success.mean() > 0.7
    wrong = go(simba(linf(0.1), queries=30), model, x, (y + 1) % 3)
    np.testing.assert_array_equal(wrong.x, x)
    assert (wrong.queries == 2).all() and wrong.success.all()


def test_one_pixel_finds_the_best_pixel_by_enumeration():
    """The best change of one pixel of a linear model lies at an end of the range in each channel."""
    model, x, y, w = problem(shape=(3, 4, 2), spread=0.4)
    host = Counted(w)
    attack = one_pixel(l0(2.0), queries=4000, population=100, loss=margin, early=False)
    found = go(attack, models.black_box(host, 2), x, y)
    assert host.rows == found.queries.sum() == len(x) * 4002
    slope = (w[:, 1] - w[:, 0])[None] * np.where(y == 0, 1, -1)[:, None]  # what lowers the margin
    flat = x.reshape(len(x), -1)
    gain = np.maximum(slope * (1 - flat), -slope * flat).reshape(len(x), 12, 2).sum(-1).max(-1)
    clean = np.asarray(margin(model(jnp.asarray(x)), jnp.asarray(y)))
    np.testing.assert_allclose(found.score, clean - gain, atol=0.02)
    moved = (np.asarray(found.x) != x).any(-1).reshape(len(x), -1)
    assert (moved.sum(-1) == 1).all() and (found.size <= 2).all()
    np.testing.assert_array_equal(found.success, clean - gain < 0)  # none is so near to the boundary that it matters
    assert 0 < found.success.mean() < 1


def test_more_pixels_break_more_rows_and_stay_within_the_budget():
    model, x, y, _ = problem(shape=(3, 4, 2), spread=0.4)
    found = go(one_pixel(l0(6.0), queries=400, population=20, pixels=3), model, x, y)
    moved = (np.asarray(found.x) != x).any(-1).reshape(len(x), -1).sum(-1)
    assert moved.max() == 3 and found.success.mean() > 0.9
    assert core.feasible(l0(6.0), np.asarray(found.x), x).all()
    assert len(set(found.queries.tolist())) > 1  # rows stop where they break


@pytest.mark.parametrize("build", [lambda: simba(linf(0.3), queries=40), lambda: one_pixel(l0(1.0), queries=40)])
def test_logits_that_are_not_finite_are_no_success_on_the_way(build):
    """NaN beyond a wall that every move toward failure crosses: a clean row with finite logits never ends there."""

    def sick(x):
        z = jnp.sum(x.reshape(x.shape[0], -1), axis=-1)
        return jnp.where((z > 2.2)[:, None], jnp.nan, jnp.stack([z * 0, z - 100], axis=-1))

    x = jnp.full((4, 2, 2, 1), 0.5)
    found = go(build(), Partial(sick), x, jnp.zeros(4, jnp.int32))
    assert not found.success.any() and found.flags["nonfinite"].any() and np.isfinite(found.score).all()
    ill = go(build(), Partial(sick), x + 0.4, jnp.zeros(4, jnp.int32))  # here the example itself is
    assert ill.success.all() and (ill.x == x + 0.4).all()


def test_settings_are_checked():
    assert issubclass(SimBA, Search) and isinstance(one_pixel(l0(3.0)), OnePixel) and BASES == ("features", "waves")
    for bad in (
        lambda: simba(linf(0.1), queries=0),
        lambda: simba(linf(0.1), step_size=0.0),
        lambda: simba(linf(0.1), share=0.0),
        lambda: one_pixel(l0(3.0), queries=0),
        lambda: one_pixel(l0(3.0), pixels=0),
        lambda: one_pixel(l0(3.0), population=3),
        lambda: one_pixel(l0(3.0), factor=0.0),
        lambda: simba(l0(3.0)),
        lambda: one_pixel(linf(0.1)),
    ):
        with pytest.raises(ValueError, match="must"):
            bad()
    with pytest.raises(ValueError, match="unknown basis"):
        simba(linf(0.1), basis="wavelets")
    model, x, y, _ = problem(b=2)
    for attack in (simba(linf(0.1), basis="waves"), one_pixel(l0(3.0))):
        with pytest.raises(ValueError, match="images"):
            attack.run(KEY, model, x, y)
    model, x, y, _ = problem(shape=(2, 2, 3), b=2)
    with pytest.raises(ValueError, match="must hold 1 pixels of 3 channels"):
        one_pixel(l0(2.0)).run(KEY, model, x, y)
