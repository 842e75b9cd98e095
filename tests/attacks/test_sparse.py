"""Sparse attacks: saliency by brute force, the optimum by enumeration, and features that are left alone."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxadv import core
from jaxadv.attacks import ATTACKS, JSMA, Sparse, SparseFool, jsma, sparsefool
from jaxadv.core import Targets
from jaxadv.threats import l0, l2

KEY = jax.random.key(0)


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def linear(w, x):
    return (x - 0.5) @ w


def curved(params, x):
    return jnp.tanh(x @ params[0]) @ params[1]


def curved_problem(n=10, k=4, b=12):
    rng = np.random.default_rng(2)
    params = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((n, 20), (20, k))]
    x = rng.uniform(0.05, 0.95, (b, n)).astype(np.float32)
    return Partial(curved, params), x, np.asarray(jnp.argmax(curved(params, x), -1), np.int32)


def margins(seed, b=24, n=8):
    """Two classes, and examples deep inside theirs."""
    rng = np.random.default_rng(seed)
    w = np.stack([rng.choice([-1, 1], n) * rng.uniform(0.5, 1, n), np.zeros(n)], axis=1).astype(np.float32)
    x = (0.5 + np.sign(w[:, 0]) * rng.uniform(0, 0.2, (b, n))).astype(np.float32)
    return Partial(linear, jnp.asarray(w)), x, linear(w, x).argmax(-1).astype(np.int32), w


def fewest(slope, gap, room):
    """The least number of features that can bring a linear function down by `gap`, over all subsets."""
    gains = np.abs(slope) * room
    for count in range(1, len(slope) + 1):
        if any(gains[list(chosen)].sum() > gap + 1e-6 for chosen in combinations(range(len(slope)), count)):
            return count
    return np.inf


def test_sparsefool_on_a_linear_model_moves_the_largest_weights_and_as_few_as_there_must_be():
    model, x, y, w = margins(3)
    free = (x - 0.5) @ w[:, 0]
    wide = go(sparsefool(l0(8.0, bounds=(-50.0, 50.0))), model, x, y)  # nothing in the way: one feature
    np.testing.assert_array_equal(wide.size, 1)
    moved = np.abs(np.asarray(wide.x) - x).argmax(-1)
    np.testing.assert_array_equal(moved, np.abs(w[:, 0]).argmax())
    found = go(sparsefool(l0(8.0), reach=1.05), model, x, y)
    want = np.array([fewest(w[:, 0], gap, np.where(w[:, 0] > 0, row, 1 - row)) for gap, row in zip(free, x)])
    assert found.success.all() and len(set(want.tolist())) > 1
    assert (found.size >= want).all() and (np.asarray(found.size) <= want + 1).all()
    assert np.mean(found.size == want) > 0.5
    far = go(sparsefool(l0(8.0), reach=3.0), model, x, y)
    assert far.size.mean() >= found.size.mean()


def test_jsma_moves_the_pair_that_brute_force_chooses():
    model, x, y = curved_problem()
    target = (y + 1) % 4
    goal = Targets(label=jnp.asarray(y), target=jnp.asarray(target))
    x = jnp.asarray(x)
    for theta in (0.3, -0.3):
        attack = jsma(l0(10.0), theta=theta)
        state = jax.jit(attack.init)(core.example_keys(KEY, "jsma", jnp.arange(len(y))), model, x, goal)
        held = ~np.asarray(state.wrong)
        slopes = np.asarray(jax.jit(jax.vmap(jax.jacobian(lambda p: model(p[None])[0])))(x)) * np.sign(theta)
        after, moved = np.asarray(jax.jit(attack.step)(state, model, x, goal).point), 0
        for i in np.flatnonzero(held):
            a = slopes[i, target[i]]
            b = slopes[i].sum(0) - a
            pairs = {
                (p, q): -(a[p] + a[q]) * (b[p] + b[q])
                for p, q in combinations(range(10), 2)
                if a[p] + a[q] > 0 and b[p] + b[q] < 0
            }
            changed = tuple(np.flatnonzero(after[i] != x[i]))
            assert changed == (max(pairs, key=pairs.__getitem__) if pairs else ())
            moved += bool(pairs)
            step = np.asarray(x[i])[list(changed)]
            np.testing.assert_allclose(after[i][list(changed)], np.clip(step + theta, 0, 1), atol=1e-6)
        assert moved > 6
    few = jsma(l0(10.0), theta=0.3, pool=3)  # pairs among three
    assert isinstance(few, JSMA) and np.isfinite(go(few, model, x, goal).x).all()


@pytest.mark.parametrize("attack", ["jsma", "sparsefool"])
def test_budgets_wrong_rows_and_early_ends(attack):
    model, x, y = curved_problem()
    wrong = y.copy()
    wrong[:2] = (wrong[:2] + 1) % 4
    free = go(ATTACKS[attack](l0(10.0)), model, x, wrong)
    assert free.success.mean() > 0.5
    np.testing.assert_array_equal(free.x[:2], x[:2])
    whole = go(ATTACKS[attack](l0(10.0), early=False), model, x, wrong)
    np.testing.assert_allclose(whole.x, free.x, atol=1e-5)
    assert (whole.queries >= free.queries).all() and (free.queries < whole.queries).any()
    model, x, y, w = margins(3)
    room = np.where(w[:, 0] > 0, x, 1 - x)
    want = np.array([fewest(w[:, 0], *row) for row in zip((x - 0.5) @ w[:, 0], room)])
    one = go(ATTACKS[attack](l0(1.0)), model, x, y)  # out of reach for most
    np.testing.assert_array_equal(one.success, np.asarray(model(one.x)).argmax(-1) != y)
    assert not one.success[want > 1].any() and (want > 1).any() and np.isfinite(one.score).all()
    assert core.feasible(l0(1.0), np.asarray(one.x), x).all()


@pytest.mark.parametrize("attack", ["jsma", "sparsefool"])
def test_nan_and_dead_gradients_are_flagged(attack):
    model, x, y, _ = margins(1)

    def sick(w, x):
        return jnp.where(x[:, :1] > 0.55, jnp.nan, (x - 0.5) @ w)

    found = go(ATTACKS[attack](l0(4.0)), Partial(sick, model.args[0]), x, y)
    ill = x[:, 0] > 0.55
    assert found.success[ill].all() and found.flags["nonfinite"][ill].all() and np.isfinite(found.x).all()
    flat = go(ATTACKS[attack](l0(4.0)), Partial(linear, jnp.zeros_like(model.args[0])), x, y * 0)
    assert flat.flags["zero_gradient"].all() and not flat.success.any() and np.isfinite(flat.x).all()


def test_targets_and_settings_are_checked():
    model, x, y = curved_problem()
    same = Targets(label=jnp.asarray(y), target=jnp.asarray(y))
    there = go(jsma(l0(3.0)), model, x, same)
    assert there.success.all() and (there.size == 0).all()
    with pytest.raises(ValueError, match="aims at no class"):
        sparsefool(l0(3.0)).run(KEY, model, jnp.asarray(x), same)
    assert isinstance(sparsefool(l0(3.0)), SparseFool) and isinstance(jsma(l0(3.0)), Sparse)
    for build in (jsma, sparsefool):
        with pytest.raises(ValueError, match=f"norm ball l0 for {build.__name__}; got l2"):
            build(l2(1.0))
        with pytest.raises(ValueError, match="steps"):
            build(l0(3.0), steps=0)
    for bad in ({"theta": 0.0}, {"pool": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            jsma(l0(3.0), **bad)
    for bad in ({"reach": 0.0}, {"overshoot": -0.1}, {"inner": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            sparsefool(l0(3.0), **bad)
