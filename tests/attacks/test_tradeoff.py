"""Carlini-Wagner, EAD and L-BFGS: exact distances, SciPy on the same objective, and Foolbox on the same network."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.tree_util import Partial
from scipy.optimize import minimize

from benchmarks.parity import autoattack as parity
from jaxadv import core
from jaxadv.attacks import ATTACKS, EAD, LBFGS, Carlini, Tradeoff, carlini, ead, lbfgs
from jaxadv.attacks.tradeoff import Own, Quasi, Unbounded
from jaxadv.core import Targets
from jaxadv.threats import l1, l2, linf

KEY = jax.random.key(0)
BALLS = {"l2": l2, "l1": l1}
FIXTURES = Path(__file__).parents[1] / "fixtures"


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def linear(w, x):
    return (x - 0.5) @ w


def problem(n=12, b=16, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(n, classes)).astype(np.float32)
    x = rng.uniform(0.4, 0.6, (b, n)).astype(np.float32)
    model, z = Partial(linear, jnp.asarray(w)), (x - 0.5) @ w
    gap, slope = np.abs(z[:, 0] - z[:, 1]), w[:, 0] - w[:, 1]
    return model, x, z.argmax(-1).astype(np.int32), gap, slope


def curved(params, x):
    return jnp.tanh(x @ params[0]) @ params[1]


def curved_problem(n=6, k=4, b=12):
    rng = np.random.default_rng(2)
    params = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((n, 20), (20, k))]
    x = rng.uniform(0.05, 0.95, (b, n)).astype(np.float32)
    return Partial(curved, params), x, np.asarray(jnp.argmax(curved(params, x), -1), np.int32)


EXACT = [("carlini", {"steps": 300, "constant": 0.1}), ("lbfgs", {"steps": 40, "rounds": 14})]


@pytest.mark.parametrize(("attack", "settings"), EXACT, ids=[a for a, _ in EXACT])
def test_linear_model_gives_the_distance_within_one_percent(attack, settings):
    model, x, y, gap, slope = problem()
    want = gap / np.linalg.norm(slope)
    found = go(ATTACKS[attack](l2(50.0), **settings), model, x, y)
    assert found.success.all() and (np.asarray(found.size) >= want - 1e-5).all()
    np.testing.assert_allclose(found.size, want, rtol=0.01, atol=2e-4)
    asked = np.asarray(found.queries)
    assert (asked <= 3 + settings["steps"] * settings.get("rounds", 9)).all() and len(
        set(asked)
    ) > 1  # each its own end


def test_ead_moves_the_features_with_the_largest_weights():
    model, x, y, gap, slope = problem()
    found = go(ead(l1(50.0), steps=200, constant=0.1, beta=0.01), model, x, y)
    want = gap / np.abs(slope).max()
    assert found.success.all() and (np.asarray(found.size) >= want - 1e-5).all()
    move = np.abs(np.asarray(found.x) - x)
    order = np.argsort(-np.abs(slope))
    for row in move:
        changed = np.flatnonzero(row[order] > 0)
        np.testing.assert_array_equal(changed, np.arange(len(changed)))
    assert (move > 0).sum(-1).mean() < 6
    # without shrinkage the least elastic net is the nearest point in l2
    round_ = go(ead(l1(50.0), steps=200, constant=0.1, beta=0.0, rule="en"), model, x, y)
    far = np.linalg.norm(np.asarray(round_.x) - x, axis=-1)
    np.testing.assert_allclose(far, gap / np.linalg.norm(slope), rtol=0.02, atol=1e-3)
    assert (found.size < round_.size).mean() > 0.9


def test_lbfgs_ends_where_scipy_ends_on_the_same_objective():
    model, x, y = curved_problem()
    c, target = 0.7, (y + 1) % 4
    attack = lbfgs(l2(50.0), steps=80, rounds=1, constant=c, abort=False)
    goal = Targets(label=jnp.asarray(y), target=jnp.asarray(target))
    x = jnp.asarray(x)
    state = attack.init(core.example_keys(KEY, "lbfgs", jnp.arange(len(y))), model, x, goal)
    state = jax.jit(lambda s: lax.fori_loop(0, 80, lambda _, s: attack.step(s, model, x, goal), s))(state)
    assert isinstance(state.own, Own) and isinstance(state.own.descent, Quasi)

    def objective(z, start, t):
        return jnp.sum((z - start) ** 2) - c * jax.nn.log_softmax(model(z[None])[0])[t]

    slope = jax.jit(jax.value_and_grad(objective))
    best = []
    for i, (start, t) in enumerate(zip(x, target)):
        fun = lambda z, s=start, t=t: tuple(np.asarray(v, np.float64) for v in slope(jnp.asarray(z, jnp.float32), s, t))  # noqa: E731
        solved = minimize(fun, np.asarray(start), jac=True, method="L-BFGS-B", bounds=[(0, 1)] * 6)
        best.append(solved.fun)
        near = np.abs(solved.x - np.asarray(state.own.descent.base[i])).max()
        assert near < 2e-2 or state.own.descent.value[i] < solved.fun  # another valley, and a deeper one
    np.testing.assert_allclose(state.own.descent.value, best, atol=1e-3)
    assert ((state.own.descent.base >= 0) & (state.own.descent.base <= 1)).all()


def test_a_larger_constant_goes_farther():
    model, x, y = curved_problem()
    goal = Targets(label=jnp.asarray(y), target=jnp.asarray((y + 1) % 4))
    x, far = jnp.asarray(x), []
    for c in (0.1, 0.3, 1.0, 3.0):
        attack = lbfgs(l2(50.0), steps=60, rounds=1, constant=c, abort=False)
        state = attack.init(core.example_keys(KEY, "lbfgs", jnp.arange(len(y))), model, x, goal)
        state = jax.jit(lambda s, a=attack: lax.fori_loop(0, 60, lambda _, s: a.step(s, model, x, goal), s))(state)
        far.append(jnp.linalg.norm(state.own.descent.base - x, axis=-1))
    assert (np.diff(np.stack(far), axis=0) > -1e-3).mean() > 0.95


def test_the_constant_is_searched_as_the_rounds_say():
    model, x, y, gap, slope = problem(b=4)
    attack = carlini(l2(50.0), steps=30, rounds=10, constant=1e-3, abort=False)
    assert isinstance(attack, Carlini) and isinstance(attack, Tradeoff) and attack.max_steps == 300
    x, y = jnp.asarray(x), jnp.asarray(y)
    state = attack.init(core.example_keys(KEY, "carlini", jnp.arange(4)), model, x, y)
    assert isinstance(state.own.descent, Unbounded)
    step = jax.jit(lambda s: attack.step(s, model, x, y))
    tried, hits = [], []
    for number in range(300):
        state = step(state)
        if number % 30 == 29:
            tried.append(np.asarray(state.own.constant)), hits.append(np.asarray(state.own.hit))
    low, high, c = np.zeros(4), np.full(4, np.inf), np.full(4, 1e-3)
    for round_, (used, hit) in enumerate(zip(tried, hits)):
        np.testing.assert_allclose(used, np.where((round_ == 9) & np.isfinite(high), high, c), rtol=1e-5)
        low, high = np.where(hit, low, c), np.where(hit, c, high)
        c = np.where(np.isinf(high), 10 * c, (low + high) / 2)
    assert np.isfinite(high).all() and (high < 1e3).all()


def test_confidence_asks_for_a_margin():
    model, x, y = curved_problem()
    plain, sure = (go(carlini(l2(50.0), steps=100, constant=0.1, confidence=k), model, x, y) for k in (0.0, 1.0))
    both = np.asarray(plain.success & sure.success)
    assert both.mean() > 0.8
    assert (sure.score[both] <= -1 + 1e-3).all() and (plain.score[both] > -0.9).all()
    assert (sure.size[both] > plain.size[both]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "norm", "settings", "net"),
    [("carlini", "l2", {}, "mnist_robust"), ("ead", "l1", {"beta": 0.01}, "mnist_standard")],
)
def test_distances_are_those_of_foolbox_or_smaller(attack, norm, settings, net):
    arrays, found = (np.load(FIXTURES / name) for name in (f"autoattack_{net}.npz", "minimum_torch.npz"))
    x, y = found[f"{net}/x"].astype(np.float32) / 255, found[f"{net}/y"]
    settings = {"steps": 200, "rounds": 6, "constant": 0.1, "abort": False} | settings
    got = go(ATTACKS[attack](BALLS[norm](1e3), **settings), parity.forward(arrays, net), x, y)
    theirs, size = found[f"{net}/{attack}/{norm}"], np.where(got.success, got.size, np.inf)
    both = np.isfinite(theirs) & np.isfinite(size)
    assert np.isfinite(size).sum() >= np.isfinite(theirs).sum() and both.sum() >= 10
    assert np.median(size[both]) <= 1.02 * np.median(theirs[both])
    if attack == "carlini":  # the same arithmetic
        assert np.mean(np.abs(size[both] / theirs[both] - 1) < 0.01) > 0.9


MEMBERS = [
    ("carlini", "l2", {"steps": 100, "constant": 0.1}),
    ("ead", "l1", {"steps": 100, "constant": 0.1}),
    ("lbfgs", "l2", {"steps": 30}),
]


@pytest.mark.parametrize(("attack", "norm", "settings"), MEMBERS, ids=[a for a, *_ in MEMBERS])
def test_budgets_wrong_rows_and_targets(attack, norm, settings):
    model, x, y = curved_problem()
    wrong = y.copy()
    wrong[:2] = (wrong[:2] + 1) % 4
    free = go(ATTACKS[attack](BALLS[norm](50.0), **settings), model, x, wrong)
    assert free.success.mean() > 0.9
    np.testing.assert_array_equal(free.x[:2], x[:2])
    threat = BALLS[norm](float(np.median(free.size[2:])))
    tight = go(ATTACKS[attack](threat, early=True, **settings), model, x, wrong)
    assert core.feasible(threat, np.asarray(tight.x), x).all() and 0 < tight.success[2:].sum() < 10
    assert (tight.queries[:2] == 3).all() and tight.queries.max() > tight.queries[2:].min()
    target = (y + 1) % 4
    target[:2] = y[:2]  # there already
    aimed = go(ATTACKS[attack](BALLS[norm](50.0), **settings), model, x, Targets(jnp.asarray(y), jnp.asarray(target)))
    np.testing.assert_array_equal(aimed.success, np.asarray(model(aimed.x)).argmax(-1) == target)
    assert aimed.success.mean() > 0.4 and (aimed.size[:2] == 0).all()
    np.testing.assert_array_equal(aimed.x[:2], x[:2])


@pytest.mark.parametrize(("attack", "norm", "settings"), MEMBERS, ids=[a for a, *_ in MEMBERS])
def test_nan_and_dead_gradients_are_flagged(attack, norm, settings):
    model, x, y, *_ = problem(b=8)

    def sick(w, x):
        return jnp.where(x[:, :1] > 0.5, jnp.nan, (x - 0.5) @ w)

    made = ATTACKS[attack](BALLS[norm](2.0), **settings)
    found = go(made, Partial(sick, model.args[0]), x, y)
    ill = x[:, 0] > 0.5
    assert ill.any() and found.success[ill].all() and found.flags["nonfinite"][ill].all()
    assert np.isfinite(found.x).all() and core.feasible(BALLS[norm](2.0), np.asarray(found.x), x).all()
    flat = go(made, Partial(linear, jnp.zeros_like(model.args[0])), x, y * 0)
    assert flat.flags["zero_gradient"].all() and not flat.success.any() and np.isfinite(flat.x).all()


def test_settings_are_checked():
    assert isinstance(ead(l1(1.0)), EAD) and isinstance(lbfgs(l2(1.0)), LBFGS)
    for build in (carlini, lbfgs, ead):
        with pytest.raises(ValueError, match=f"norm ball .* for {build.__name__}; got linf"):
            build(linf(0.1))
        threat = l1(1.0) if build is ead else l2(1.0)
        for bad in ({"steps": 0}, {"rounds": 0}, {"constant": 0.0}, {"confidence": -1.0}):
            with pytest.raises(ValueError, match=next(iter(bad))):
                build(threat, **bad)
    for bad in ({"beta": -1.0}, {"rule": "l2"}, {"rate": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ead(l1(1.0), **bad)
    with pytest.raises(ValueError, match="rate"):
        carlini(l2(1.0), rate=-0.1)
