"""Minimum-norm attacks: exact distances of linear models, enumeration, and the distances that other packages find."""

from itertools import combinations
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from benchmarks.parity import autoattack as parity
from jaxadv import core
from jaxadv.attacks import (
    ATTACKS,
    DDN,
    FMN,
    DeepFool,
    MinimumNorm,
    NewtonFool,
    ddn,
    deepfool,
    fmn,
    nearest,
    newtonfool,
    pgd,
    within,
)
from jaxadv.attacks.judge import ask
from jaxadv.attacks.minimum import ball, cosine, mended, nearest_boundary, slope
from jaxadv.core import Targets
from jaxadv.losses import margin
from jaxadv.threats import l0, l1, l2, linf, union

KEY = jax.random.key(0)
BALLS = {"linf": linf, "l2": l2, "l1": l1, "l0": l0}
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
FIXTURES = Path(__file__).parents[1] / "fixtures"


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def linear(w, x):
    return (x.reshape(x.shape[0], -1) - 0.5) @ w


def problem(n=12, b=24, low=0.4, high=0.6, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(n, classes)).astype(np.float32)
    x = rng.uniform(low, high, (b, n)).astype(np.float32)
    return Partial(linear, jnp.asarray(w)), x, ((x - 0.5) @ w).argmax(-1).astype(np.int32), w


def boundary_distance(norm, w, x, y, target=None):
    """Distance to the nearest decision boundary (or the target's region's nearest face) without a box."""
    z = (x - 0.5) @ w
    gap = z[np.arange(len(y)), y][:, None] - z
    slope = np.linalg.norm(w[:, y].T[:, None] - w.T[None], DUAL[norm], axis=-1)
    return np.where(np.arange(w.shape[1]) == y[:, None], np.inf, gap / np.maximum(slope, 1e-9)).min(-1)


def curved(params, x):
    return jnp.tanh(x @ params[0]) @ params[1]


def curved_problem(n=6, k=4, b=24):
    rng = np.random.default_rng(2)
    params = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((n, 20), (20, k))]
    x = jnp.asarray(rng.uniform(0.1, 0.9, (b, n)), jnp.float32)
    return Partial(curved, params), x, jnp.argmax(curved(params, x), -1).astype(jnp.int32)


# ---------------------------------------------------------------------------------------------------- exact distances


CLOSE = [
    ("deepfool", "linf", {"overshoot": 0.002}),
    ("deepfool", "l2", {"overshoot": 0.002}),
    ("ddn", "l2", {"steps": 200, "radius": 0.1}),
    ("fmn", "linf", {"steps": 300}),
    ("fmn", "l2", {"steps": 300}),
    ("fmn", "l1", {"steps": 300}),
]


@pytest.mark.parametrize(("attack", "norm", "settings"), CLOSE, ids=[f"{a}-{n}" for a, n, _ in CLOSE])
def test_linear_model_gives_the_distance_within_one_percent(attack, norm, settings):
    model, x, y, w = problem(classes=5 if attack == "deepfool" else 2)
    want = boundary_distance(norm, w, x, y)
    keep = want < 0.38  # the box is at least 0.4 away
    assert keep.sum() > 15
    found = go(ATTACKS[attack](BALLS[norm](50.0), **settings), model, x, y)
    got = np.asarray(found.size)
    assert found.success.all() and (got[keep] >= want[keep] - 1e-5).all()
    np.testing.assert_allclose(got[keep], want[keep], rtol=0.01, atol=2e-4)  # DeepFool adds 1e-4


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_deepfool_on_a_linear_model_takes_one_step_to_the_overshot_boundary(norm):
    model, x, y, w = problem()
    want = boundary_distance(norm, w, x, y)
    found = go(deepfool(BALLS[norm](50.0)), model, x, y)
    keep = want < 0.35
    np.testing.assert_allclose(found.size[keep], 1.02 * (want[keep] + 1e-4), rtol=1e-4)
    np.testing.assert_array_equal(found.grads[keep], 2 * 4)  # the second one finds that it has crossed
    np.testing.assert_array_equal(found.queries[keep], 2 + 3)
    whole = go(deepfool(BALLS[norm](50.0), steps=6, early=False), model, x, y)
    np.testing.assert_allclose(whole.x[keep], found.x[keep], atol=1e-6)  # another loop, other rounding
    np.testing.assert_array_equal(whole.grads, 6 * 4)
    many, x, y, _ = problem(classes=20)
    few, whole = (go(deepfool(BALLS[norm](50.0), candidates=c), many, x, y) for c in (2, 20))
    np.testing.assert_array_equal(few.grads, np.asarray(few.queries) - 3)
    assert (np.asarray(few.size) > np.asarray(whole.size) + 1e-3).any()  # the likeliest class is not always the nearest
    assert (few.size >= whole.size - 1e-5).all()


def test_the_nearest_boundary_is_that_of_all_classes_in_turn():
    model, x, y, w = problem(b=8)
    order = jnp.argsort(-linear(w, jnp.asarray(x)), axis=-1)[:, 1:]
    logits, away, normal, lost = nearest_boundary(model, jnp.asarray(x), jnp.asarray(y), order, l2(1.0).steepest)
    np.testing.assert_allclose(logits, linear(w, x), atol=1e-5)
    np.testing.assert_allclose(away, boundary_distance("l2", w, x, y), rtol=1e-4)
    step = x + np.asarray(away / jnp.linalg.norm(normal, axis=-1))[:, None] * normal  # onto the boundary
    top = np.sort(linear(w, step), -1)
    np.testing.assert_allclose(top[:, -1], top[:, -2], atol=1e-5)
    assert not lost.any()


def fewest(w, x, y):
    """The least number of features whose change inside the box moves a linear model off its label, by enumeration."""
    n, classes = w.shape
    for count in range(1, n + 1):
        for chosen in combinations(range(n), count):
            at = list(chosen)
            for k in set(range(classes)) - {y}:
                slope = w[at, k] - w[at, y]
                gain = np.maximum(slope * (1 - x[at]), -slope * x[at]).sum()
                if (w[:, k] - w[:, y]) @ (x - 0.5) + gain > 1e-6:
                    return count
    return np.inf


def test_fmn_l0_reaches_the_optimum_by_enumeration_in_most_rows_and_one_more_feature_in_all():
    rng = np.random.default_rng(4)
    w = (rng.choice([-1, 1], (8, 3)) * rng.uniform(0.5, 1, (8, 3))).astype(np.float32)
    side = np.sign(2 * w[:, 0] - w[:, 1] - w[:, 2])
    x = (0.5 + side * rng.uniform(0, 0.45, (24, 8))).astype(np.float32)
    model, y = Partial(linear, jnp.asarray(w)), linear(w, x).argmax(-1).astype(np.int32)
    want = np.array([fewest(w, *row) for row in zip(x, y)])
    assert len(set(want)) > 1 and np.isfinite(want).all()
    found = go(fmn(l0(8.0), steps=200), model, x, y)
    assert found.success.all() and (np.asarray(found.size) >= want).all()
    assert (np.asarray(found.size) <= want + 1).all() and np.mean(found.size == want) > 0.8
    # a budget that some rows cannot reach: no failing point, no NaN, feasible
    one = go(fmn(l0(1.0), steps=100), model, x, y)
    assert not one.success[want > 1].any() and one.success.any()
    assert core.feasible(l0(1.0), np.asarray(one.x), x).all() and np.isfinite(one.score).all()


def test_newtonfool_goes_down_the_probability_to_its_first_failing_point():
    model, x, y, w = problem()
    found = go(newtonfool(l2(50.0), eta=0.002), model, x, y)
    want = boundary_distance("l2", w, x, y)
    assert found.success.all() and (np.asarray(found.size) >= want - 1e-5).all()
    two, x, y, w = problem(classes=2)  # here the gradient of the probability points at the boundary
    found = go(newtonfool(l2(50.0), eta=0.002, steps=500), two, x, y)
    want = boundary_distance("l2", w, x, y)
    keep = want < 0.35
    step = 0.002 * np.linalg.norm(x, axis=-1)
    assert keep.sum() > 8 and (np.asarray(found.size) <= want + step + 1e-4)[keep].all()
    # the step never goes beyond chance in the linearization
    attack = newtonfool(l2(50.0), eta=10.0)
    keys = core.example_keys(KEY, "newtonfool", jnp.arange(len(y)))
    state = jax.jit(attack.init)(keys, two, jnp.asarray(x), jnp.asarray(y))
    after = jax.jit(attack.step)(state, two, jnp.asarray(x), jnp.asarray(y))
    value, grad = jax.jit(jax.vmap(jax.value_and_grad(lambda p, i: jax.nn.softmax((p - 0.5) @ w)[i])))(x, y)
    far = (value - 0.5) / jnp.linalg.norm(grad, axis=-1)
    inside = np.asarray(far) < 0.35
    np.testing.assert_allclose(jnp.linalg.norm(after.point - x, axis=-1)[inside], far[inside], rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ other packages


def stored(net):
    arrays = np.load(FIXTURES / f"autoattack_{net}.npz")
    found = np.load(FIXTURES / "minimum_torch.npz")
    x, y = found[f"{net}/x"].astype(np.float32) / 255, found[f"{net}/y"]
    return parity.forward(arrays, net), x, y, found


PEERS = [
    ("deepfool", "l2", {}),
    ("deepfool", "linf", {}),
    ("ddn", "l2", {"steps": 100}),
    ("fmn", "linf", {"steps": 100}),
    ("fmn", "l2", {"steps": 100}),
    ("fmn", "l1", {"steps": 100}),
    ("fmn", "l0", {"steps": 100}),
]


@pytest.mark.parametrize("net", ["mnist_standard", pytest.param("mnist_robust", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("attack", "norm", "settings"), PEERS, ids=[f"{a}-{n}" for a, n, _ in PEERS])
def test_distances_are_those_of_other_packages_or_smaller(attack, norm, settings, net):
    model, x, y, found = stored(net)
    theirs = found[f"{net}/{attack}/{norm}"]
    got = go(ATTACKS[attack](BALLS[norm](1e3), **settings), model, x, y)
    size = np.where(got.success, got.size, np.inf)
    assert np.median(size) <= 1.02 * np.median(theirs)
    assert np.isfinite(size).sum() >= np.isfinite(theirs).sum()
    assert core.feasible(BALLS[norm](1e3), np.asarray(got.x), x).all()


# ------------------------------------------------------------------------------------------------ budgets and bad input


MEMBERS = [("deepfool", "linf"), ("ddn", "l2"), ("fmn", "l1"), ("newtonfool", "l2")]


@pytest.mark.parametrize(("attack", "norm"), MEMBERS)
def test_a_budget_decides_success_and_wrong_rows_come_back_unchanged(attack, norm):
    model, x, y = curved_problem()
    x = np.asarray(x)
    wrong = np.asarray(y).copy()
    wrong[:3] = (wrong[:3] + 1) % 4
    free = go(ATTACKS[attack](BALLS[norm](50.0)), model, x, wrong)
    eps = float(np.median(free.size[3:]))
    threat = BALLS[norm](eps)
    tight = go(ATTACKS[attack](threat), model, x, wrong)
    size = np.asarray(free.size)
    clear = np.abs(size - eps) > 1e-4
    assert (np.asarray(within(threat, free)) <= np.asarray(tight.success)).all()  # a projection may fail, too
    np.testing.assert_array_equal(np.asarray(within(threat, free))[clear], (free.success & (size < eps))[clear])
    assert (~tight.success).any() and core.feasible(threat, np.asarray(tight.x), x).all()
    clean = margin(model(jnp.asarray(x)), jnp.asarray(wrong))
    assert (tight.score <= clean + 1e-6).all()
    for found in (free, tight):
        assert found.success[:3].all()
        np.testing.assert_array_equal(found.x[:3], x[:3])
        np.testing.assert_array_equal(found.size[:3], 0)
    # the returned point is the nearest failing one that was seen, and early stops there
    early = go(ATTACKS[attack](threat, early=True), model, x, wrong)
    np.testing.assert_array_equal(early.success, tight.success)
    assert (early.queries[:3] == 3).all() and early.queries.max() >= early.queries.min()


@pytest.mark.parametrize("norm", ["l2", "l0"])
def test_the_returned_point_is_the_nearest_failing_one_that_was_seen(norm):
    model, x, y = curved_problem()
    attack = fmn(BALLS[norm](50.0), steps=20)
    state = attack.init(core.example_keys(KEY, "fmn", jnp.arange(len(y))), model, x, y)
    least = np.full(len(y), np.inf)
    for _ in range(20):
        fails = np.asarray(jnp.argmax(model(state.point), -1) != y)
        size = np.asarray(attack.threat.size(state.point, x))
        least = np.where(fails, np.minimum(least, size), least)
        state = attack.step(state, model, x, y)
    found = attack.result(state, model, x, y)
    assert found.success.all() and (found.size <= least + 1e-6).all()


@pytest.mark.parametrize("attack", ["ddn", "fmn"])
def test_targets_are_reached_and_a_target_equal_to_the_label_is_there_already(attack):
    model, x, y, w = problem(classes=3)
    target = (y + 1) % 3
    target[:2] = y[:2]
    found = go(ATTACKS[attack](l2(50.0)), model, x, Targets(label=jnp.asarray(y), target=jnp.asarray(target)))
    reached = np.asarray(model(found.x)).argmax(-1)
    np.testing.assert_array_equal(found.success, reached == target)
    assert found.success.mean() > 0.8 and found.success[:2].all()  # the box may keep a target out of reach
    np.testing.assert_array_equal(found.x[:2], x[:2])
    assert (found.size[2:] >= boundary_distance("l2", w, x, y)[2:] - 1e-5).all()


@pytest.mark.parametrize(("attack", "norm"), MEMBERS)
def test_nan_and_dead_gradients_are_flagged(attack, norm):
    model, x, y, _ = problem(b=8)

    def sick(w, x):
        return jnp.where(x[:, :1] > 0.5, jnp.nan, x @ w)

    found = go(ATTACKS[attack](BALLS[norm](2.0)), Partial(sick, model.args[0]), x, y)
    ill = x[:, 0] > 0.5
    assert ill.any() and found.success[ill].all() and found.flags["nonfinite"][ill].all()
    assert np.isfinite(found.x).all() and core.feasible(BALLS[norm](2.0), np.asarray(found.x), x).all()
    flat = go(ATTACKS[attack](BALLS[norm](2.0)), Partial(linear, jnp.zeros_like(model.args[0])), x, y * 0)
    assert flat.flags["zero_gradient"].all() and not flat.success.any() and np.isfinite(flat.x).all()


# --------------------------------------------------------------------------------------------------------- conversions


def test_a_budget_attack_finds_distances_by_bisection_of_each_row():
    model, x, y, w = problem(classes=2)
    want = boundary_distance("linf", w, x, y)
    eps = float(np.quantile(want, 0.7)) * 1.01

    def build(threat):
        return pgd(threat, steps=3, start="zero")

    found = jax.jit(lambda x, y: nearest(build, linf(eps), KEY, model, x, y, rounds=12))(x, y)
    out = want > eps
    assert out.any() and (~out).sum() > 8
    np.testing.assert_array_equal(found.success, ~out)
    np.testing.assert_allclose(found.size[~out], want[~out], atol=eps / 2**11)
    np.testing.assert_array_equal(found.grads, 3 * 13)
    assert {"nonfinite", "zero_gradient", "infeasible"} <= set(found.flags)
    with pytest.raises(ValueError, match="rounds"):
        nearest(build, linf(0.38), KEY, model, x, y, rounds=0)
    fewer = nearest(lambda t: fmn(t, steps=40), l0(6.0), KEY, model, x, y, rounds=4)
    assert (fewer.size == np.round(fewer.size)).all() and fewer.success.all()


# ------------------------------------------------------------------------------------------------------- what is shared


def test_what_the_steps_share():
    model, x, y, w = problem(b=3)
    value, logits, grad = slope(margin, model, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(value, margin(jnp.asarray(linear(w, x)), jnp.asarray(y)), atol=1e-5)
    second = np.asarray(logits).argsort(-1)[:, -2]
    np.testing.assert_allclose(grad, w.T[y] - w.T[second], atol=1e-6)
    assert ask(lambda x: (x @ w).astype(jnp.bfloat16), jnp.asarray(x)).dtype == jnp.float32
    np.testing.assert_array_equal(mended(jnp.asarray([[1.0, jnp.nan, jnp.inf]])), [[1, 0, 0]])
    np.testing.assert_allclose(cosine(jnp.asarray([0, 5, 10]), 10, 1.0, 0.2), [1, 0.6, 0.2], atol=1e-6)
    ball(l2(1.0), ("l2",), "any")
    kinds = [ddn(l2(1.0)), fmn(l0(3.0)), deepfool(linf(1.0)), newtonfool(l2(1.0))]
    assert all(isinstance(a, c) and isinstance(a, MinimumNorm) for a, c in zip(kinds, (DDN, FMN, DeepFool, NewtonFool)))


def test_settings_are_checked():
    for build, threat in ((ddn, linf(0.1)), (newtonfool, l1(1.0)), (deepfool, l0(3.0)), (fmn, union(l2(1.0), l1(1.0)))):
        with pytest.raises(ValueError, match=f"norm ball .* for {build.__name__}; got {threat.norm}"):
            build(threat)
    for bad in (
        lambda: ddn(l2(1.0), steps=0),
        lambda: ddn(l2(1.0), radius=0.0),
        lambda: ddn(l2(1.0), gamma=1.5),
        lambda: fmn(l2(1.0), rates=(0.1, 1.0)),
        lambda: fmn(l2(1.0), gammas=(0.1, 0.0)),
        lambda: deepfool(l2(1.0), candidates=1),
        lambda: deepfool(l2(1.0), overshoot=-0.1),
        lambda: newtonfool(l2(1.0), eta=0.0),
    ):
        with pytest.raises(ValueError, match="must be"):
            bad()
    model, x, y, _ = problem(b=2)
    for build in (deepfool, newtonfool):
        with pytest.raises(ValueError, match="aims at no class"):
            build(l2(0.1)).run(KEY, model, x, Targets(label=jnp.asarray(y), target=jnp.asarray(y)))
    with pytest.raises(ValueError, match="integer labels or Targets"):
        fmn(l2(0.1)).run(KEY, model, x, jnp.zeros((2, 5)))
