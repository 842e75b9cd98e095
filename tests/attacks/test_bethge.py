"""The attack of Brendel and Bethge: its steps against SciPy, and the distances of linear and curved models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.optimize import minimize

from jaxadv import core
from jaxadv.attacks import ATTACKS, BrendelBethge, brendel_bethge
from jaxadv.attacks.bethge import nearer, on_plane
from jaxadv.core import Targets
from jaxadv.threats import l1, l2, linf

KEY = jax.random.key(0)
ORDER = {"l2": 2, "linf": np.inf}
solve = jax.jit(nearer, static_argnums=0)


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def linear(w, x):
    return (x - 0.5) @ w


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_step_is_the_optimum_that_scipy_finds(norm):
    rng = np.random.default_rng(0)
    b, n = 6, 4
    back, normal = rng.normal(size=(b, n)), rng.normal(size=(b, n))
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    low, high = -rng.uniform(0.2, 1.5, (b, n)), rng.uniform(0.2, 1.5, (b, n))
    level, radius = rng.uniform(-0.15, 0.15, b), np.array([0.3, 0.5, 0.8, 3.0, 3.0, 0.4])
    got = np.asarray(solve(norm, *(jnp.asarray(v, jnp.float32) for v in (back, normal, low, high, level, radius))))
    for i in range(b):
        rules = [
            {"type": "eq", "fun": lambda u, i=i: normal[i] @ u[:n] - level[i]},
            {"type": "ineq", "fun": lambda u, i=i: radius[i] ** 2 - np.sum(u[:n] ** 2)},
        ]
        if norm == "linf":  # the last variable bounds all changes
            rules += [{"type": "ineq", "fun": lambda u, i=i, s=s: u[n] - s * (back[i] - u[:n])} for s in (1, -1)]
        goal = (lambda u: u[n]) if norm == "linf" else (lambda u, i=i: np.sum((back[i] - u[:n]) ** 2))
        start = np.append(level[i] * normal[i], 5.0)
        limits = [*zip(low[i], high[i]), (0, 9)]
        best = minimize(goal, start, bounds=limits, constraints=rules, method="SLSQP", options={"maxiter": 300})
        want = np.linalg.norm(back[i] - best.x[:n], ORDER[norm])
        assert best.success and abs(np.linalg.norm(back[i] - got[i], ORDER[norm]) - want) < 2e-3
        assert abs(normal[i] @ got[i] - level[i]) < 1e-4 and np.linalg.norm(got[i]) < radius[i] + 1e-4
        assert (got[i] >= low[i] - 1e-6).all() and (got[i] <= high[i] + 1e-6).all()
    whole = on_plane(*(jnp.asarray(v, jnp.float32) for v in (back, normal, -9 + 0 * low, 9 + 0 * high, level)))
    want = back + (level - (normal * back).sum(-1))[:, None] * normal
    np.testing.assert_allclose(whole, want, atol=1e-4)


def curved(w, x):
    """One class inside a sphere, one outside."""
    inside = 0.04 - jnp.sum(jnp.square(x - w[None]), axis=-1)
    return jnp.stack([inside, -inside], axis=-1)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_distances_of_linear_models_within_one_percent(norm):
    rng = np.random.default_rng(1)
    threat = {"l2": l2, "linf": linf}[norm](9.0)
    attack = brendel_bethge(threat, steps=60, bisections=0 if norm == "l2" else 10)
    assert isinstance(attack, BrendelBethge)
    w = rng.normal(size=(8, 2)).astype(np.float32)
    x = rng.uniform(0.4, 0.6, (16, 8)).astype(np.float32)
    y = linear(w, x).argmax(-1).astype(np.int32)
    slope = w[:, 0] - w[:, 1]
    want = np.abs((x - 0.5) @ slope) / np.linalg.norm(slope, 2 if norm == "l2" else 1)
    y[-1] = 1 - y[-1]  # the last row is wrong from the start
    found = jax.device_get(go(attack, Partial(linear, jnp.asarray(w)), x, y))
    assert found.success.all() and found.size[-1] == 0 and core.feasible(threat, found.x, x).all()
    near = (want < 0.35) & (np.arange(16) < 15)  # the box is farther
    assert near.sum() > 10 and (found.size[near] >= want[near] - 1e-5).all()
    np.testing.assert_allclose(found.size[near], want[near], rtol=0.01, atol=1e-4)


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
    with pytest.raises(ValueError, match="norm ball l2 or linf for brendel_bethge; got l1"):
        brendel_bethge(l1(1.0))
    with pytest.raises(ValueError, match="rates must be a falling pair"):
        brendel_bethge(l2(1.0), rates=(0.1, 0.5))
    with pytest.raises(ValueError, match="bisections must be a whole number"):
        brendel_bethge(l2(1.0), bisections=-1)


@pytest.mark.slow
def test_targets_and_a_model_that_never_fails():
    rng = np.random.default_rng(1)
    w, x = rng.normal(size=(8, 3)).astype(np.float32), rng.uniform(0.4, 0.6, (16, 8)).astype(np.float32)
    attack, y = brendel_bethge(l2(9.0), steps=60, bisections=0), np.zeros(16, np.int32)
    still = jax.device_get(go(attack, Partial(linear, jnp.zeros_like(w)), x, y))
    assert not still.success.any() and (still.size == 0).all() and still.flags["zero_gradient"].all()
    aimed = jax.device_get(go(attack, Partial(linear, jnp.asarray(w)), x, Targets(y, y + 2)))
    np.testing.assert_array_equal(linear(w, aimed.x).argmax(-1) == 2, aimed.success)
    assert aimed.success.mean() > 0.9
