"""FAB against the official code step by step, its projections against a linear program, and exact distances."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.tree_util import Partial
from scipy.optimize import linprog, minimize

from jaxadv import core
from jaxadv.attacks import ATTACKS, FAB, fab, fab_t
from jaxadv.attacks.fab import to_hyperplane
from jaxadv.core import Targets
from jaxadv.threats import l0, l1, l2, linf, union

KEY = jax.random.key(0)
BALLS = {"linf": linf, "l2": l2, "l1": l1}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
FIXTURE = Path(__file__).parents[1] / "fixtures" / "fab_torch.npz"
NETWORK = Path(__file__).parents[1] / "fixtures" / "apgd_torch.npz"


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def linear(w, x):
    return x.reshape(x.shape[0], -1) @ w


def problem(seed=0, n=12, b=16, low=0.4, high=0.6, classes=5):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(n, classes)).astype(np.float32)
    x = rng.uniform(low, high, (b, n)).astype(np.float32)
    return Partial(linear, jnp.asarray(w)), x, (x @ w).argmax(-1).astype(np.int32), w


# ------------------------------------------------------------------------------------------------------- projections


def exact(norm, x, w, b):
    """Size of the shortest move onto w . u = b inside [0, 1], by linear programming or SLSQP; None if there is none."""
    n = len(x)
    if norm == "l2":
        lead = np.zeros(n)
        found = minimize(
            lambda d: 0.5 * d @ d,
            lead,
            jac=lambda d: d,
            bounds=list(zip(-x, 1 - x)),
            constraints={"type": "eq", "fun": lambda d: w @ (x + d) - b, "jac": lambda d: w},
            options={"maxiter": 500, "ftol": 1e-14},
        )
        return np.linalg.norm(found.x) if found.success else None
    # d = p - q with p, q >= 0; linf: minimize t with p, q <= t; l1: minimize the sum of both
    box = [(0, 1 - v) for v in x] + [(0, v) for v in x]
    if norm == "l1":
        found = linprog(np.ones(2 * n), A_eq=[np.r_[w, -w]], b_eq=[b - w @ x], bounds=box)
    else:
        cost = np.r_[np.zeros(2 * n), 1]
        within = np.c_[np.eye(2 * n), -np.ones(2 * n)]
        found = linprog(cost, within, np.zeros(2 * n), [np.r_[w, -w, 0]], [b - w @ x], [*box, (0, None)])
    return found.fun if found.success else None


@pytest.mark.parametrize("norm", BALLS)
def test_projection_is_the_shortest_move_onto_the_hyperplane_in_the_box(norm):
    rng = np.random.default_rng(3)
    x, w = rng.uniform(size=(30, 6)), rng.normal(size=(30, 6))
    x[:8, :3] = rng.integers(0, 2, (8, 3))  # on the bounds
    w[8:14, ::2] = 0
    w[14:18] = np.sign(w[14:18])  # ties
    b = (w * rng.uniform(size=x.shape)).sum(-1)
    with jax.enable_x64(True):
        move = np.asarray(to_hyperplane(*map(jnp.asarray, (x, w, (w * x).sum(-1) - b)), (0.0, 1.0), norm))
        # 1e-30 times the hyperplane is the same hyperplane
        tiny = to_hyperplane(*map(jnp.asarray, (x, 1e-30 * w, 1e-30 * ((w * x).sum(-1) - b))), (0.0, 1.0), norm)
    np.testing.assert_allclose(tiny, move, atol=1e-12)
    np.testing.assert_allclose((w * (x + move)).sum(-1), b, atol=1e-10)
    assert (x + move > -1e-12).all() and (x + move < 1 + 1e-12).all()
    want = [exact(norm, *row) for row in zip(x, w, b)]
    np.testing.assert_allclose(np.linalg.norm(move, ORDER[norm], axis=-1), want, atol=1e-6)


@pytest.mark.parametrize("norm", BALLS)
def test_projection_goes_to_the_corner_where_the_hyperplane_is_out_of_reach_and_nowhere_without_a_normal(norm):
    x = jnp.asarray([[0.2, 0.7, 0.5], [0.2, 0.7, 0.5]])
    w = jnp.asarray([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    move = to_hyperplane(x, w, jnp.asarray([-10.0, 1.0]), (0.0, 1.0), norm)
    np.testing.assert_allclose(x + move, [[1, 0, 0.5], [0.2, 0.7, 0.5]], atol=1e-6)


@pytest.mark.parametrize("norm", BALLS)
def test_projection_agrees_with_the_official_one(norm):
    stored = np.load(FIXTURE)
    x, w, b = (stored[f"P/{name}"] for name in ("points", "w", "b"))
    with jax.enable_x64(True):
        move = to_hyperplane(*map(jnp.asarray, (x, w, (w * x).sum(-1) - b)), (0.0, 1.0), norm)
    np.testing.assert_allclose(move, stored[f"P/{norm}"], atol=1e-9)


# ---------------------------------------------------------------------------------------------------- official, by step


def cnn(params, x):
    """The fixture's network, channels-last."""
    for i in ("0", "2"):
        kernel = jnp.transpose(params[f"{i}.weight"], (2, 3, 1, 0))
        x = lax.conv_general_dilated(x, kernel, (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + params[f"{i}.bias"][None, None, None])
    x = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
    x = jax.nn.relu(x @ params["5.weight"].T + params["5.bias"][None])
    return x @ params["7.weight"].T + params["7.bias"][None]


@pytest.mark.parametrize("kind", ["u", "t"])
@pytest.mark.parametrize("norm", BALLS)
def test_every_iterate_is_the_official_one(norm, kind):
    stored, net = np.load(FIXTURE), np.load(NETWORK)
    steps, at = int(stored["steps"]), stored["at"]
    with jax.enable_x64(True):
        model = Partial(cnn, {k[2:]: jnp.asarray(net[k], jnp.float64) for k in net if k.startswith("w.")})
        x, y = jnp.asarray(net["x"], jnp.float64), jnp.asarray(net["y"])
        threat = BALLS[norm](1e-6)
        attack = (
            fab(threat, steps=steps, early=False) if kind == "u" else fab_t(threat, targets=1, steps=steps, early=False)
        )
        state = attack.init(core.example_keys(KEY, attack.name, jnp.arange(len(y))), model, x, y)
        step = jax.jit(lambda s: attack.step(s, model, x, y))
        path = []
        for _ in range(steps):
            path.append(np.asarray(state.point))
            state = step(state)
        best = np.asarray(state.best)
    np.testing.assert_allclose(np.stack(path)[at], stored[f"{norm}_{kind}/path"], atol=1e-6)
    np.testing.assert_allclose(best, stored[f"{norm}_{kind}/adv"], atol=1e-6)


# ----------------------------------------------------------------------------------------------------- exact distances


def boundary_distance(norm, w, x, y):
    """Distance of each row to the nearest decision boundary of a linear model, where the box is not in the way."""
    gap = (x @ w)[np.arange(len(y)), y][:, None] - x @ w
    slope = np.linalg.norm(w[:, y].T[:, None] - w.T[None], DUAL[norm], axis=-1)
    return np.where(np.arange(w.shape[1]) == y[:, None], np.inf, gap / np.maximum(slope, 1e-9)).min(-1)


@pytest.mark.parametrize("make", [fab, fab_t])
@pytest.mark.parametrize("norm", BALLS)
def test_linear_model_gives_the_distance_to_the_boundary(norm, make):
    """The overshoot of 5 % and the steps back by 10 % end within 2 % of the exact distance."""
    model, x, y, w = problem(b=24)
    want = boundary_distance(norm, w, x, y)
    keep = want < {"linf": 0.3, "l2": 0.4, "l1": 0.4}[norm]  # the box is at least 0.4 away
    assert keep.sum() > 15
    found = go(make(BALLS[norm](50.0), steps=40, early=False), model, x, y)
    got = np.asarray(found.size)
    assert found.success.all() and (got[keep] >= want[keep] - 1e-5).all()
    np.testing.assert_allclose(got[keep], want[keep], rtol=0.02)
    # given a budget, rows within it are broken and no others
    eps = float(np.median(want))
    clear = np.abs(want - eps) > 0.02 * eps
    broken = go(make(BALLS[norm](eps), steps=40), model, x, y)
    np.testing.assert_array_equal(np.asarray(broken.success)[clear], (want < eps)[clear])
    assert core.feasible(BALLS[norm](eps), np.asarray(broken.x), x).all()
    score = np.asarray(broken.score)
    assert (score <= (x @ w).max(-1) - np.sort(x @ w)[:, -2] + 1e-5).all()
    assert (np.asarray(broken.queries)[~np.asarray(broken.success)] > 80).all()
    assert (np.asarray(broken.queries)[np.asarray(broken.success)] < 80).any()


def wavy(params, x):
    return jnp.sin(3 * x @ params[0]) @ params[1]


def wavy_problem(k=4):
    rng = np.random.default_rng(2)
    params = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 20), (20, k))]
    x = jnp.asarray(rng.uniform(0.2, 0.8, (30, 6)), jnp.float32)
    return Partial(wavy, params), x, jnp.argmax(wavy(params, x), -1).astype(jnp.int32)


def test_restarts_begin_elsewhere_and_find_nearer_points():
    model, x, y = wavy_problem()
    one, many = (go(fab(l2(1.0), steps=20, restarts=n, early=False), model, x, y) for n in (1, 5))
    both = np.asarray(one.success & many.success)
    assert both.sum() > 20 and (np.asarray(many.success) >= np.asarray(one.success)).all()
    gain = np.asarray(one.size - many.size)[both]
    assert (gain >= -1e-5).all() and (gain > 1e-4).any()
    for norm, make in BALLS.items():
        attack = fab_t(make(0.4), steps=3, targets=2, restarts=2, early=False)
        state = attack.init(core.example_keys(KEY, "fab_t", jnp.arange(30)), model, x, y)
        step = jax.jit(lambda s, a=attack: (a._begun(s, x), a.step(s, model, x, y)))
        for number in range(12):
            begun, after = jax.device_get(step(state)[0]), step(state)[1]
            if number in (0, 6):  # a new target begins at the clean point
                np.testing.assert_array_equal(begun, x)
            if number in (3, 9):  # a restart half the smaller of budget and nearest distance away
                far = np.linalg.norm(begun - np.asarray(x), ORDER[norm], axis=-1)
                limit = np.minimum(0.4, state.distance) / 2
                assert (far <= limit + 1e-5).all() and np.mean(far > 0.8 * limit) > 0.5
            state = after
        assert attack.start == "random" and fab_t(make(0.4)).start == "zero"


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("make", [fab, fab_t])
def test_few_classes(make, classes):
    model, x, y, w = problem(classes=classes)
    found = go(make(linf(50.0), steps=20, early=False), model, x, y)
    np.testing.assert_allclose(
        np.minimum(found.size, 0.3), np.minimum(boundary_distance("linf", w, x, y), 0.3), rtol=0.03
    )
    rounds = classes - 1 if make is fab_t else 1
    np.testing.assert_array_equal(found.queries, 2 + 2 * 20 * rounds)
    np.testing.assert_array_equal(found.grads, 20 * rounds if make is fab_t else 20 * (classes - 1))


def test_a_thousand_classes():
    model, x, y, w = problem(classes=1000, b=4)
    want = boundary_distance("l2", w, x, y)
    found = go(fab(l2(5.0), steps=2, early=False), model, x, y)
    np.testing.assert_allclose(found.size, want, rtol=0.06)
    np.testing.assert_array_equal(found.grads, 2 * 999)
    targeted = go(fab_t(l2(5.0), steps=8, early=False), model, x, y)
    assert (np.asarray(targeted.size) >= want - 1e-5).all()


def test_dead_gradients_and_nan_are_flagged_and_wrong_rows_come_back_unchanged():
    model, x, y, w = problem(b=8)
    wrong = y.copy()
    wrong[0] = (y[0] + 1) % 5
    found = go(fab(linf(0.2), steps=10), model, x, wrong)
    np.testing.assert_array_equal(found.x[0], x[0])
    assert found.success[0] and found.size[0] == 0 and found.queries[0] == 2 and found.grads[0] == 0

    dead = go(fab_t(l2(0.2), steps=3), Partial(linear, jnp.zeros_like(model.args[0])), x, y * 0)
    assert dead.flags["zero_gradient"].all() and not dead.flags["nonfinite"].any()
    np.testing.assert_array_equal(dead.x, x)

    def sick(w, x):
        z = x @ w
        return jnp.where(x[:, :1] > 0.55, jnp.nan, z)

    for make in (fab, fab_t):
        found = go(make(linf(0.2), steps=5), Partial(sick, model.args[0]), x, y)
        ill = x[:, 0] > 0.55
        assert ill.any() and found.success[ill].all() and found.flags["nonfinite"][ill].all()
        assert np.isfinite(found.x).all() and core.feasible(linf(0.2), np.asarray(found.x), x).all()


def test_settings_are_checked_and_names_known():
    assert {"fab", "fab_t"} <= set(ATTACKS) and isinstance(fab(linf(0.1)), FAB)
    assert fab(linf(0.1)).max_steps == 100 and fab_t(linf(0.1)).max_steps == 900
    for threat in (l0(3.0), union(linf(0.1), l2(1.0))):
        with pytest.raises(ValueError, match="linf, l2 or l1 for fab; got"):
            fab(threat)
    for setting in ("steps", "restarts", "targets"):
        with pytest.raises(ValueError, match=setting):
            fab_t(linf(0.1), **{setting: 0})
    model, x, y, _ = problem()
    with pytest.raises(ValueError, match="looks for any failure"):
        fab(linf(0.1)).run(KEY, model, jnp.asarray(x), Targets(label=jnp.asarray(y), target=jnp.asarray(y)))
    with pytest.raises(ValueError, match="norm"):
        to_hyperplane(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones(1), (0.0, 1.0), "l3")
