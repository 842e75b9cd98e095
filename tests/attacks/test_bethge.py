"""The attack of Brendel and Bethge: its steps against SciPy and enumeration, its distances on linear and curved models
and beside Foolbox.
"""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.optimize import minimize

from benchmarks.parity import autoattack as parity
from jaxadv import core
from jaxadv.attacks import ATTACKS, BrendelBethge, brendel_bethge
from jaxadv.attacks.bethge import nearer, on_plane
from jaxadv.core import Targets
from jaxadv.threats import l0, l1, l2, linf, union

KEY = jax.random.key(0)
FIXTURES = Path(__file__).parents[1] / "fixtures"
ORDER = {"l2": 2, "linf": np.inf, "l1": 1}
BALLS = {"l2": l2, "linf": linf, "l1": l1, "l0": l0}
solve = jax.jit(nearer, static_argnums=0)


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def linear(w, x):
    return (x - 0.5) @ w


def problems(b, n):
    """Moves that lead back, planes, boxes, levels and radii, all in float64."""
    rng = np.random.default_rng(0)
    back, normal = rng.normal(size=(b, n)), rng.normal(size=(b, n))
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    low, high = np.minimum(back, 0) - rng.uniform(0, 0.2, (b, n)), np.maximum(back, 0) + rng.uniform(0, 0.2, (b, n))
    return back, normal, low, high, rng.uniform(-0.15, 0.15, b), rng.uniform(0.3, 2.5, b)


def solved(norm, given):
    """What `nearer` finds, after a look at whether it is allowed."""
    back, normal, low, high, level, radius = given
    got = np.asarray(solve(norm, *(jnp.asarray(v, jnp.float32) for v in given)))
    np.testing.assert_allclose((normal * got).sum(-1), level, atol=1e-4)
    assert (np.linalg.norm(got, axis=-1) < radius + 1e-4).all()
    assert (got >= low - 1e-6).all() and (got <= high + 1e-6).all()
    return got


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_a_step_is_the_optimum_that_scipy_finds(norm):
    b, n = 6, 4
    back, normal, low, high, level, radius = given = problems(b, n)
    got = solved(norm, given)
    for i in range(b):
        rules = [
            {"type": "eq", "fun": lambda u, i=i: normal[i] @ u[:n] - level[i]},
            {"type": "ineq", "fun": lambda u, i=i: radius[i] ** 2 - np.sum(u[:n] ** 2)},
        ]
        if norm != "l2":  # further variables bound the changes: one all of them, or each its own
            rules += [{"type": "ineq", "fun": lambda u, i=i, s=s: u[n:] - s * (back[i] - u[:n])} for s in (1, -1)]
        bounds = {"l2": 0, "linf": 1, "l1": n}[norm]
        goal = (lambda u: np.sum(u[n:])) if bounds else (lambda u, i=i: np.sum((back[i] - u[:n]) ** 2))
        start = np.append(level[i] * normal[i], np.full(bounds, 5.0))
        limits = [*zip(low[i], high[i]), *[(0, 9)] * bounds]
        best = minimize(goal, start, bounds=limits, constraints=rules, method="SLSQP", options={"maxiter": 300})
        want = np.linalg.norm(back[i] - best.x[:n], ORDER[norm])
        assert best.success and abs(np.linalg.norm(back[i] - got[i], ORDER[norm]) - want) < 2e-3


def test_a_step_in_l0_changes_as_few_features_as_any_can():
    b, n = 24, 5
    back, normal, low, high, level, radius = given = problems(b, n)
    changed = (solved("l0", given) != back.astype(np.float32)).sum(-1)
    more = []
    for i in range(b):
        fewest = n
        for free in itertools.product((False, True), repeat=n):  # the others lead back
            ends = np.where(free, low[i], back[i]), np.where(free, high[i], back[i])
            least, most = -1e3, 1e3
            for _ in range(60):  # the shortest move onto the plane: t normal, clipped
                t = (least + most) / 2
                below = normal[i] @ np.clip(t * normal[i], *ends) <= level[i]
                least, most = (t, most) if below else (least, t)
            move = np.clip(t * normal[i], *ends)
            if abs(normal[i] @ move - level[i]) < 1e-9 and np.linalg.norm(move) <= radius[i]:
                fewest = min(fewest, sum(free))
        more.append(changed[i] - fewest)
    assert min(more) >= 0 and max(more) <= 1 and np.mean(more) < 0.15


def test_the_nearest_point_of_a_plane():
    back, normal, *_, level, _ = (v.astype(np.float32) for v in problems(6, 4))
    whole = on_plane(*(jnp.asarray(v) for v in (back, normal, -9 + 0 * back, 9 + 0 * back, level)))
    want = back + (level - (normal * back).sum(-1))[:, None] * normal
    np.testing.assert_allclose(whole, want, atol=1e-4)


def curved(w, x):
    """One class inside a sphere, one outside."""
    inside = 0.04 - jnp.sum(jnp.square(x - w[None]), axis=-1)
    return jnp.stack([inside, -inside], axis=-1)


def distances(norm, slope, gap, x, y):
    """The analytic distance of each row of a linear model; infinite in l2 and linf where the box may cut."""
    if norm in ("l2", "linf"):
        found = gap / np.linalg.norm(slope, 2 if norm == "l2" else 1)
        return np.where(found < 0.35, found, np.inf)
    toward = np.where(y == 0, -1, 1)[:, None] * slope
    room = np.where(toward > 0, 1 - x, x)
    gains = -np.sort(-room * np.abs(slope), axis=-1)
    if norm == "l0":  # those features first that can do most
        return (np.cumsum(gains, -1) <= gap[:, None]).sum(-1) + 1.0
    order = np.argsort(-np.abs(slope))  # the cheapest feature first, to its end
    done = np.cumsum((room * np.abs(slope))[:, order], -1)
    before = np.concatenate([np.zeros((len(x), 1)), done[:, :-1]], -1)
    return (np.clip(gap[:, None] - before, 0, done - before) / np.abs(slope)[order]).sum(-1)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1", "l0"])
def test_distances_of_linear_models_within_one_percent(norm):
    rng = np.random.default_rng(1)
    threat = BALLS[norm](9.0)
    attack = brendel_bethge(threat, bisections=0 if norm == "l2" else 10)
    assert isinstance(attack, BrendelBethge)
    w = rng.normal(size=(8, 2)).astype(np.float32)
    if norm == "l0":
        w *= np.linspace(0.3, 1, 8, dtype=np.float32)[:, None]
    x = rng.uniform(0.4, 0.6, (16, 8)).astype(np.float32)
    if norm in ("l1", "l0"):  # farther away, so that more than one feature has to change
        x = np.where(rng.uniform(size=x.shape) < 0.7, x, np.sign(w[:, 0] - w[:, 1]) * 0.3 + 0.5).astype(np.float32)
    y = linear(w, x).argmax(-1).astype(np.int32)
    slope = w[:, 0] - w[:, 1]
    want = distances(norm, slope, np.abs((x - 0.5) @ slope), x, y)
    y[-1] = 1 - y[-1]  # the last row is wrong from the start
    found = jax.device_get(go(attack, Partial(linear, jnp.asarray(w)), x, y))
    assert found.success.all() and found.size[-1] == 0 and core.feasible(threat, found.x, x).all()
    near = np.isfinite(want) & (np.arange(16) < 15)
    assert near.sum() > 10 and (found.size[near] >= want[near] - 1e-5).all()
    np.testing.assert_allclose(found.size[near], want[near], rtol=0.01, atol=1e-4)
    assert norm != "l0" or len(set(want[near])) > 1


def heavy(w, x):
    """A class that fails where a weighted sum is large."""
    rest = 4.5 - x @ w
    return jnp.stack([rest, -rest], axis=-1)


def test_features_that_are_not_needed_come_back_to_the_bit():
    rng = np.random.default_rng(0)
    w, x = rng.uniform(0.5, 1, 32).astype(np.float32), rng.uniform(0.02, 0.2, (8, 32)).astype(np.float32)
    y = np.zeros(8, np.int32)
    found = go(brendel_bethge(l0(32.0), noise=1.0), Partial(heavy, jnp.asarray(w)), x, y)
    want = distances("l0", -w, 4.5 - x @ w, x, y)
    assert found.success.all() and (found.size >= want).all() and (found.size <= want + 1).all()


@pytest.mark.slow
def test_distance_to_a_sphere():
    x = np.random.default_rng(1).uniform(0.4, 0.6, (16, 8)).astype(np.float32)
    attack, center = brendel_bethge(l2(9.0), steps=60), jnp.full(8, 0.5)
    found = jax.device_get(go(attack, Partial(curved, center), x, np.zeros(16, np.int32)))
    held = np.linalg.norm(x - 0.5, axis=-1) < 0.2
    want = 0.2 - np.linalg.norm(x - 0.5, axis=-1)[held]
    assert held.sum() > 8 and found.success.all()
    np.testing.assert_allclose(found.size[held], want, rtol=0.02, atol=1e-4)


def test_settings_are_checked():
    assert ATTACKS["brendel_bethge"] is brendel_bethge
    with pytest.raises(ValueError, match="norm ball l2 or linf or l1 or l0 for brendel_bethge; got union"):
        brendel_bethge(union(l2(1.0), linf(0.1)))
    with pytest.raises(ValueError, match="momentum must be a share"):
        brendel_bethge(l2(1.0), momentum=1.0)
    with pytest.raises(ValueError, match="noise must be a fraction"):
        brendel_bethge(l2(1.0), noise=2.0)
    with pytest.raises(ValueError, match="rates must be a falling pair"):
        brendel_bethge(l2(1.0), rates=(0.1, 0.5))
    with pytest.raises(ValueError, match="bisections must be a whole number"):
        brendel_bethge(l2(1.0), bisections=-1)


def plateau(_, x):
    """A class that holds within 0.6 of the origin, with a gradient only near the end of its reach."""
    inside = jnp.clip(0.6 - jnp.sqrt(jnp.sum(jnp.square(x), axis=-1)), -0.05, 0.05)
    return jnp.stack([inside, -inside], axis=-1)


def test_noise_finds_a_way_where_there_is_no_gradient():
    x, y = np.random.default_rng(0).uniform(0, 0.05, (16, 3)).astype(np.float32), np.zeros(16, np.int32)
    blind, found, other = (
        go(brendel_bethge(l2(9.0), noise=noise, name=name), Partial(plateau, 0), x, y)
        for noise, name in ((0.0, "one"), (0.6, "one"), (0.6, "two"))
    )
    assert not blind.success.any() and blind.flags["zero_gradient"].all()
    assert found.success.all() and (found.x != other.x).any()
    np.testing.assert_allclose(found.size, 0.6 - np.linalg.norm(x, axis=-1), rtol=0.03)


@pytest.mark.slow
def test_targets_and_a_model_that_never_fails():
    rng = np.random.default_rng(1)
    w, x = rng.normal(size=(8, 3)).astype(np.float32), rng.uniform(0.4, 0.6, (16, 8)).astype(np.float32)
    attack, y = brendel_bethge(l2(9.0), steps=60, bisections=0), np.zeros(16, np.int32)
    still = jax.device_get(go(attack, Partial(linear, jnp.zeros_like(w)), x, y))
    assert not still.success.any() and (still.size == 0).all() and still.flags["zero_gradient"].all()
    free = go(brendel_bethge(l2(9.0, (-np.inf, np.inf))), Partial(linear, jnp.asarray(w)), x, y)
    assert free.success.all() and np.isfinite(free.x).all()
    aimed = jax.device_get(go(attack, Partial(linear, jnp.asarray(w)), x, Targets(y, y + 2)))
    np.testing.assert_array_equal(linear(w, aimed.x).argmax(-1) == 2, aimed.success)
    assert aimed.success.mean() > 0.9


BESIDE = [
    ("l2", "mnist_standard", 1.02),
    pytest.param("l0", "mnist_standard", 1.02, marks=pytest.mark.slow),
    pytest.param("l1", "mnist_robust", 1.02, marks=pytest.mark.slow),
    pytest.param("linf", "mnist_robust", 1.05, marks=pytest.mark.slow),  # ours is 3 % farther, see docs/features.md
]


@pytest.mark.parametrize(("norm", "net", "share"), BESIDE)
def test_distances_are_those_of_foolbox_or_smaller(norm, net, share):
    with np.load(FIXTURES / f"autoattack_{net}.npz") as arrays, np.load(FIXTURES / "minimum_torch.npz") as found:
        model, x, y = parity.forward(arrays, net), found[f"{net}/x"].astype(np.float32) / 255, found[f"{net}/y"]
        theirs = found[f"{net}/brendel_bethge/{norm}"]
    threat = BALLS[norm](1e3)
    got = go(brendel_bethge(threat), model, x, y)
    assert got.success.all() and core.feasible(threat, np.asarray(got.x), x).all()
    assert np.median(got.size) <= share * np.median(theirs)
