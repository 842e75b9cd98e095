"""Laws of the norm balls: projection, sampling, steepest directions, against closed forms, scipy and enumeration."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from jaxadv import core
from jaxadv.threats import THREATS, Ball, Union, l0, l1, l2, linf, union

LAW = settings(deadline=None, derandomize=True, max_examples=30)
KINDS = (*THREATS, "l2_exact", "union")
CONVEX = ("linf", "l1", "l2_exact")  # Euclidean projections onto convex sets
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind, eps, bounds=(0.0, 1.0)):
    if kind == "l2_exact":
        return l2(eps, bounds, exact=True)
    if kind == "union":
        return union(linf(eps, bounds), l1(2 * eps, bounds), l2(1.5 * eps, bounds))
    return THREATS[kind](jnp.ceil(eps * 4) if kind == "l0" else eps, bounds)


@jax.jit
def project(threat, point, x):
    return threat.project(point, x)


@jax.jit
def steepest(threat, grad):
    return threat.steepest(grad)


@jax.jit
def sample(threat, keys, x):
    return threat.sample(keys, x)


problems = st.tuples(
    st.integers(0, 2**31 - 1), st.sampled_from([1e-3, 0.05, 0.3, 1.0, 2.5]), st.sampled_from([1e-3, 0.3, 1.0, 30.0])
)
BOUNDS = [(0.0, 1.0), (-2.5, 2.25), (-1.0, 3.0)]


def draw(seed, scale, bounds=(0.0, 1.0), b=4, n=5):
    rng = np.random.default_rng(seed)
    x = rng.uniform(*bounds, (b, n))
    x[0, 0], x[1, 1] = bounds  # some features stand at a bound
    return x.astype(np.float32), (x + scale * rng.normal(size=(b, n))).astype(np.float32)


@kinds
@pytest.mark.parametrize("bounds", BOUNDS)
@LAW
@given(problems)
def test_project_is_feasible_idempotent_and_keeps_feasible_points(kind, bounds, problem):
    seed, eps, scale = problem
    x, point = draw(seed, scale, bounds)
    threat = build(kind, jnp.float32(eps), tuple(map(jnp.float32, bounds)))
    once = np.asarray(project(threat, point, x))
    assert core.feasible(threat, once, x).all()
    np.testing.assert_allclose(project(threat, once, x), once, atol=2e-6)
    np.testing.assert_array_equal(project(threat, x, x), x)
    halfway = x + (once - x) * np.float32(0.5)
    if kind != "l0":
        np.testing.assert_allclose(project(threat, halfway, x), halfway, atol=2e-6)


@pytest.mark.parametrize("kind", CONVEX)
@LAW
@given(problems)
def test_projections_onto_convex_sets_never_expand(kind, problem):
    seed, eps, scale = problem
    x, one = draw(seed, scale)
    _, two = draw(seed + 1, scale)
    threat = build(kind, jnp.float32(eps), (jnp.float32(0), jnp.float32(1)))
    moved = np.linalg.norm(np.asarray(project(threat, one, x)) - np.asarray(project(threat, two, x)), axis=-1)
    far = np.linalg.norm(one - two, axis=-1)
    assert (moved <= far * (1 + 1e-5) + 2e-6 * max(1, scale)).all()


def nearest_by_slsqp(kind, row, center, eps):
    n, options = len(center), {"ftol": 1e-14, "maxiter": 500}
    if kind == "l1":  # move = up - down, both at least 0, their sum at most eps
        limits = [(0, 1 - c) for c in center] + [(0, c) for c in center]
        rule = {"type": "ineq", "fun": lambda u: eps - u.sum()}
        found = minimize(
            lambda u: np.sum((center + u[:n] - u[n:] - row) ** 2), np.full(2 * n, 0.01), bounds=limits,
            constraints=rule, method="SLSQP", options=options,
        )  # fmt: skip
        return center + found.x[:n] - found.x[n:]
    room = eps if kind == "linf" else 1.0
    limits = [(max(0, c - room), min(1, c + room)) for c in center]
    rule = {"type": "ineq", "fun": lambda p: eps**2 - np.sum((p - center) ** 2)}
    rules = [rule] if kind == "l2_exact" else []
    distance = lambda p: np.sum((p - row) ** 2)  # noqa: E731
    return minimize(distance, center, bounds=limits, constraints=rules, method="SLSQP", options=options).x


@pytest.mark.parametrize("kind", ["linf", "l1", "l2_exact"])
@pytest.mark.parametrize("seed", range(4))
def test_exact_projections_meet_scipy(kind, seed):
    x, point = draw(seed, 0.8, b=2)
    eps = 0.6
    got = np.asarray(project(build(kind, eps), point, x), np.float64)
    for row, center, start in zip(point.astype(float), x.astype(float), got):
        best = nearest_by_slsqp(kind, row, center, eps)
        np.testing.assert_allclose(start, best, atol=1e-4)
        assert np.linalg.norm(start - row) <= np.linalg.norm(best - row) + 1e-5


@LAW
@given(problems)
def test_l1_projection_satisfies_kkt(problem):
    """One threshold for all: features strictly inside lie that much short of their wanted move."""
    seed, eps, _ = problem
    x, point = draw(seed, 0.5)
    got = np.asarray(project(l1(jnp.float32(eps)), point, x), np.float64)
    for row, center, z in zip(point.astype(float), x.astype(float), got):
        want, move = np.abs(row - center), np.abs(z - center)
        room = np.where(row > center, 1 - center, center)
        assert (np.sign(z - center) * np.sign(row - center) >= 0).all()
        if move.sum() < eps - 1e-4:  # budget not binding: the box alone decides
            np.testing.assert_allclose(move, np.minimum(want, room), atol=1e-5)
            continue
        inside = (move > 1e-6) & (move < room - 1e-6)
        shrink = np.median((want - move)[inside]) if inside.any() else None
        if shrink is None:
            continue
        assert shrink >= -1e-5
        np.testing.assert_allclose(move, np.clip(want - shrink, 0, room), atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 2, 4])
def test_l0_projection_meets_enumeration_of_all_subsets(seed, count):
    x, point = draw(seed, 0.7, n=6)
    got = np.asarray(project(l0(float(count)), point, x))
    for row, center, z in zip(point, x, got):
        inside = np.clip(row, 0, 1)
        subsets = itertools.combinations(range(6), count)
        options = [np.where(np.isin(range(6), s), inside, center) for s in subsets]
        best = min(np.linalg.norm(o - row) for o in options)
        assert abs(np.linalg.norm(z - row) - best) < 1e-5
        assert (z != center).sum() <= count


def test_l0_counts_whole_features():
    x, point = draw(0, 5.0, n=6)
    assert ((np.asarray(project(l0(2.5), point, x)) != x).sum(-1) <= 2).all()


def test_usual_l2_projection_clips_and_then_shrinks():
    x, point = draw(3, 0.9)
    move = np.clip(point, 0, 1).astype(float) - x
    length = np.linalg.norm(move, axis=-1, keepdims=True)
    want = x + move * np.minimum(1, 0.4 / length)
    np.testing.assert_allclose(project(l2(0.4), point, x), want, atol=1e-6)


@LAW
@given(problems)
def test_union_is_the_nearest_member(problem):
    seed, eps, scale = problem
    x, point = draw(seed, scale)
    members = tuple(make(jnp.float32(w * eps)) for make, w in ((linf, 1), (l2, 1.5), (l1, 2)))
    got = np.asarray(project(union(*members), point, x), np.float64)
    near = np.min([np.linalg.norm(np.asarray(project(m, point, x), float) - point, axis=-1) for m in members], axis=0)
    np.testing.assert_allclose(np.linalg.norm(got - point, axis=-1), near, rtol=1e-5, atol=1e-6)
    every = np.array([core.feasible(m, got.astype(np.float32), x) for m in members])
    np.testing.assert_array_equal(union(*members).contains(got.astype(np.float32), x), every.any(0))
    size = np.min([m.size(got, x.astype(float)) / np.float64(m.eps) for m in members], axis=0)
    np.testing.assert_allclose(union(*members).size(got, x.astype(float)), size, rtol=1e-12)


def test_the_verdict_on_a_union_uses_each_members_own_rounding():
    both = union(linf(1e-6), l2(1.0))
    x = np.full((1, 8), 0.5, np.float32)
    point = x.copy()
    point[0] += np.float32(1.03 / np.sqrt(8))
    assert not both.contains(point, x).any()
    assert not core.feasible(both, point, x).any()


@kinds
@pytest.mark.parametrize("eps", [0.05, 1.0])
def test_sample_is_feasible_per_row_and_never_stays(kind, eps):
    x = np.tile(draw(0, 1.0, n=20)[0][:1], (6, 1))
    keys = jax.random.split(jax.random.key(0), 6)
    threat = build(kind, jnp.float32(eps), (jnp.float32(0), jnp.float32(1)))
    got = np.asarray(sample(threat, keys, x))
    assert core.feasible(threat, got, x).all()
    assert (np.abs(got - x).max(-1) > 0).all() and len(np.unique(got, axis=0)) == 6
    order = np.array([3, 0, 5, 1, 2, 4])
    np.testing.assert_array_equal(sample(threat, keys[order], x), got[order])


def test_linf_sample_fills_the_cube_and_l2_sample_the_radius():
    x = np.full((2000, 3), 0.5, np.float32)
    keys = jax.random.split(jax.random.key(1), 2000)
    cube = (np.asarray(sample(linf(0.2), keys, x)) - x) / 0.2
    assert abs(cube.mean()) < 0.03 and abs(cube.var() - 1 / 3) < 0.02
    radius = np.linalg.norm(np.asarray(sample(l2(0.2), keys, x)) - x, axis=-1) / 0.2
    assert abs(radius.mean() - 0.5) < 0.03 and radius.max() > 0.97
    signs = np.mean(np.asarray(sample(l1(0.2), keys, x)) > x)
    assert abs(signs - 0.5) < 0.03


@pytest.mark.parametrize(("kind", "primal", "dual"), [("linf", np.inf, 1), ("l2", 2, 2), ("l1", 1, np.inf)])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e-30, 1e30])
def test_steepest_attains_the_dual_norm_at_any_scale(kind, primal, dual, scale):
    grad = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    move = np.asarray(steepest(build(kind, 0.3), jnp.asarray(grad * np.float32(scale))), float)
    np.testing.assert_allclose(np.linalg.norm(move, primal, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose((move * grad).sum(-1), np.linalg.norm(grad, dual, axis=-1), rtol=1e-5)


def test_steepest_of_l0_and_of_a_union():
    grad = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    np.testing.assert_allclose(steepest(l0(2.0), grad), grad / np.abs(grad).max(-1, keepdims=True), rtol=1e-6)
    members = (linf(0.1), l2(0.3), l1(0.5))
    moves = np.array([np.asarray(steepest(m, grad)) * m.eps for m in members])
    best = moves[np.argmax((moves * grad).sum(-1), axis=0), np.arange(4)]
    np.testing.assert_allclose(steepest(union(*members), grad), best, rtol=1e-6)


def test_l1_steepest_shares_ties_and_spreads():
    np.testing.assert_allclose(steepest(l1(1.0), np.float32([[2, -2, 1, 0]])), [[0.5, -0.5, 0, 0]])
    spread = steepest(l1(1.0, spread=0.5), np.float32([[4, -3, 2, 1]]))
    np.testing.assert_allclose(spread, [[0.5, -0.5, 0, 0]])


@kinds
def test_a_zero_gradient_gives_zeros(kind):
    move = np.asarray(steepest(build(kind, 0.3), np.zeros((3, 5), np.float32)))
    np.testing.assert_array_equal(move, 0)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_eps_of_each_row_is_a_loop_over_rows_and_vmap_is_a_loop_over_eps(kind):
    x, point = draw(5, 0.9)
    keys = jax.random.split(jax.random.key(2), 4)
    eps = np.float32([1, 2, 3, 4]) if kind == "l0" else np.float32([0.05, 0.3, 0.7, 1.5])
    make = (lambda e: l2(e, exact=True)) if kind == "l2_exact" else THREATS[kind]
    rows = np.concatenate([project(make(float(e)), point[i : i + 1], x[i : i + 1]) for i, e in enumerate(eps)])
    np.testing.assert_allclose(project(make(eps), point, x), rows, atol=1e-6)
    rows = np.concatenate([sample(make(float(e)), keys[i : i + 1], x[i : i + 1]) for i, e in enumerate(eps)])
    np.testing.assert_allclose(sample(make(eps), keys, x), rows, atol=1e-6)
    np.testing.assert_array_equal(make(eps).contains(np.asarray(project(make(eps), point, x)), x), True)
    swept = jax.jit(jax.vmap(lambda e: project(make(e), point, x)))(eps)
    np.testing.assert_allclose(swept, np.stack([project(make(float(e)), point, x) for e in eps]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_zero_budget_leaves_x(kind):
    x, point = draw(6, 0.9)
    keys = jax.random.split(jax.random.key(2), 4)

    @jax.jit
    def both(eps, point, x):
        threat = build(kind, eps)
        return threat.project(point, x), threat.sample(keys, x)

    for got in both(jnp.float32(0), point, x):
        np.testing.assert_array_equal(got, x)


@kinds
def test_bounds_may_be_arrays_over_an_example(kind):
    x, point = draw(7, 0.9)
    low, high = np.float32([0, 0, 0.0, 0, 0]), np.float32([1, 1, 2, 1, 1])
    threat = build(kind, 0.5, (low, high))
    got = np.asarray(project(threat, point, x))
    assert (got >= low).all() and (got <= high).all()
    assert core.feasible(threat, got, x).all()
    assert np.asarray(threat.contains(jnp.asarray(got), jnp.asarray(x))).all()


def test_size_of_numpy_is_float64_and_agrees_with_numpy_norms():
    x, point = draw(8, 0.9)
    x, point = x.astype(float), point.astype(float)
    for kind, order in (("linf", np.inf), ("l2", 2), ("l1", 1), ("l0", 0)):
        size = build(kind, 0.5).size(point, x)
        assert isinstance(size, np.ndarray) and size.dtype == np.float64
        np.testing.assert_allclose(size, np.linalg.norm(point - x, order, axis=-1), rtol=1e-14)
        traced = build(kind, 0.5).size(jnp.asarray(point, jnp.float32), jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(traced, size, rtol=1e-5)


def test_names_types_and_refusals():
    assert [build(k, 0.5).norm for k in KINDS] == ["linf", "l2", "l1", "l0", "l2", "union"]
    assert isinstance(linf(0.1), Ball) and isinstance(union(linf(0.1), l2(0.1)), Union)
    assert union(linf(0.1), l2(0.1)).eps == 1.0 and union(linf(0.1), l2(0.1)).bounds == (0.0, 1.0)
    assert l1(0.1).sparse and not l2(0.1).sparse
    for make in THREATS.values():
        for bad in (0.0, -1.0, math.nan, math.inf, np.array([])):
            with pytest.raises(ValueError, match=r"eps .*got"):
                make(bad)
        with pytest.raises(ValueError, match=r"bounds must be .*got .*(Pass|Swap)"):
            make(1.0, (1.0, 0.0))
    with pytest.raises(ValueError, match=r"8/255 for images"):
        linf(0.0)
    with pytest.raises(ValueError, match=r"at least 1; got 0.5\. \w+"):
        l0(0.5)
    with pytest.raises(ValueError, match=r"spread must .*got 2\. \w+"):
        l1(1.0, spread=2)
    with pytest.raises(ValueError, match=r"at least two threats; got 1.*Pass"):
        union(linf(0.1))
    with pytest.raises(ValueError, match=r"same bounds; got .*Pass"):
        union(linf(0.1), l2(0.1, (0.0, 2.0)))
    with pytest.raises(ValueError, match=r"each of the 4 examples; got shape \(3,\).*vmap"):
        project(linf(np.float32([0.1, 0.2, 0.3])), *draw(0, 1.0))


@pytest.mark.parametrize("kind", ["linf", "l2", "l1", "l2_exact"])
def test_rounding_never_leaves_the_box(kind):
    """`x + (high - x)` may lie one rounding above `high`; a point that far out is not allowed."""
    rng = np.random.default_rng(0)
    low, high = np.float32(-0.3), np.float32(0.7)
    x = rng.uniform(low, high, (400, 20)).astype(np.float32)
    point = (x + rng.choice([-3, 3], x.shape)).astype(np.float32)
    assert (x + (high - x) > high).any() or (x + (low - x) < low).any()
    got = np.asarray(project(build(kind, 50.0, (low, high)), point, x))
    np.testing.assert_array_equal((got >= low) & (got <= high), True)
    assert core.feasible(build(kind, 50.0, (low, high)), got, x).all()


@pytest.mark.parametrize(("n", "eps", "bounds"), [(2, 2.0, (-2.1, 2.1)), (2, 1.0, (0.0, 1.0)), (5, 0.7, (0.0, 1.0))])
@pytest.mark.parametrize("make", [linf, l2, functools.partial(l2, exact=True), l1])
def test_many_projections_with_few_features_are_feasible_in_float64(make, n, eps, bounds):
    rng = np.random.default_rng(0)
    x = rng.uniform(*bounds, (4000, n)).astype(np.float32)
    point = (x + rng.normal(size=x.shape) * 3 * eps / np.sqrt(n)).astype(np.float32)
    threat = make(eps, bounds)
    found = np.asarray(jax.jit(threat.project)(point, x))
    assert core.feasible(threat, found, x).all()
    np.testing.assert_allclose(np.asarray(jax.jit(threat.project)(found, x)), found, atol=3e-7)


@pytest.mark.parametrize("kind", ["linf", "l2", "l1"])
def test_projections_can_be_differentiated(kind):
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        x, point = jnp.asarray(rng.uniform(0.2, 0.8, (3, 7))), jnp.asarray(rng.normal(size=(3, 7)))
        weight, eps = jnp.asarray(rng.normal(size=(3, 7))), jnp.asarray([0.1, 0.7, 50.0])

        def total(point, x, eps):
            return jnp.sum(weight * build(kind, jnp.asarray(eps)).project(jnp.asarray(point), jnp.asarray(x)))

        jax.test_util.check_grads(jax.jit(total), (point, x, eps), 1, modes=["fwd", "rev"], rtol=1e-6)
