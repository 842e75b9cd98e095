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
from jaxadv.attacks.minimum import to_hyperplane
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
