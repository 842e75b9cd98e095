"""sNODE: adjoint and sensitivity against NumPy, the Sobolev kernel, linear conjugate gradients, nearest boundaries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg

import jaxadv as ja
from benchmarks.claims import framework
from jaxadv.continuous import standalone as sn

NET = sn.SNODE(3, horizon=1.0, rate=6, fit=0.7, entropy=0.4, rest=0.3, decay=0.2, activation="softplus")


@pytest.fixture(scope="module")
def problem():
    """Weights, first states, labels and directions in float64."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)  # noqa: E731
    weights, ways = ({"w": draw(6, 5, 5), "b": draw(6, 5)} for _ in range(2))
    return weights, draw(4, 5), np.array([0, 2, 1, 2]), ways, draw(4, 5)


def euler(weights, x, h=1 / 6, act=lambda z: np.logaddexp(z, 0)):
    xs = [x]
    for w, b in zip(weights["w"], weights["b"]):
        xs.append(xs[-1] + h * act(xs[-1] @ w.T + b))
    return np.stack(xs)


def cost(weights, x, y):
    """Of NET, term by term."""
    out = euler(weights, x)[-1]
    wanted = np.eye(5)[y]
    z = out[:, :3]
    entropy = np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]
    each = 0.35 * ((out - wanted) ** 2).sum(1) + 0.4 * entropy + 0.15 * ((out - np.log(2)) ** 2).sum(1)
    return each.mean() + 0.1 / 6 * sum((v**2).sum() for v in weights.values())


def test_direct_and_adjoint_problem(problem):
    weights, x, y, ways, _ = problem
    with jax.enable_x64(True):

        @jax.jit
        def both(weights, x, y):
            value, density = sn.snode_gradient(weights, x, y, NET)
            return value, density, jax.grad(sn.snode_cost)(weights, x, y, NET), sn.snode_forward(weights, x, NET)

        value, density, grad, xs = jax.tree.map(np.asarray, both(weights, x, y))
    np.testing.assert_allclose(xs, euler(weights, x), rtol=1e-12)
    np.testing.assert_allclose(value, cost(weights, x, y), rtol=1e-12)
    for name in weights:
        np.testing.assert_allclose(density[name] * NET.h, grad[name], rtol=1e-9, atol=1e-12)
    move = lambda s: {k: weights[k] + s * ways[k] for k in weights}  # noqa: E731
    slope = (cost(move(1e-6), x, y) - cost(move(-1e-6), x, y)) / 2e-6
    np.testing.assert_allclose(NET.h * sum((density[k] * ways[k]).sum() for k in weights), slope, rtol=1e-7)


def test_sensitivity_problem(problem):
    weights, x, _, ways, dx = problem
    with jax.enable_x64(True):

        @jax.jit
        def both(weights, x, ways, dx):
            return sn.sensitivity(weights, x, NET, dparams=ways, dx=dx), sn.flow_jacobian(weights, x, NET)

        moved, jacobian = jax.tree.map(np.asarray, both(weights, x, ways, dx))
        only = np.asarray(jax.jit(lambda *a: sn.sensitivity(*a, NET, dx=dx)[-1])(weights, x))
    xs, xi = euler(weights, x), [dx]  # the sensitivity problem, written out
    for i in range(6):
        w, b = weights["w"][i], weights["b"][i]
        slope = 1 / (1 + np.exp(-(xs[i] @ w.T + b)))
        xi.append(xi[-1] + slope * (xi[-1] @ w.T + xs[i] @ ways["w"][i].T + ways["b"][i]) / 6)
    np.testing.assert_allclose(moved, xi, rtol=1e-10)
    near = [euler(weights, x + s * dx)[-1] for s in (1e-6, -1e-6)]
    np.testing.assert_allclose(only, (near[0] - near[1]) / 2e-6, atol=1e-7)
    np.testing.assert_allclose(np.einsum("bij,bj->bi", jacobian, dx), only, rtol=1e-10)


def test_the_sobolev_gradient_solves_its_boundary_problem():
    n, horizon = 120, 3.0
    h = horizon / n
    t = (np.arange(n) + 0.5) * h
    matrix = sn.green(n, h)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-10)  # constants stay
    assert np.linalg.eigvalsh(matrix).min() > 0
    low, high = np.minimum(t[:, None], t), np.maximum(t[:, None], t)
    kernel = np.cosh(low) * np.cosh(horizon - high) / np.sinh(horizon)
    np.testing.assert_allclose(matrix / h, kernel, atol=h / 10)  # the kink spans one cell
    smooth = np.exp(-t) * np.sin(3 * t)
    np.testing.assert_allclose(matrix @ smooth, kernel @ smooth * h, atol=2e-4)
    for k, length in ((1, 1.0), (4, 1.0), (3, 0.2)):
        u = np.cos(k * np.pi * t / horizon)
        exact = u / (1 + (length * 2 / h * np.sin(k * np.pi / (2 * n))) ** 2)  # on the grid
        np.testing.assert_allclose(sn.green(n, h, length) @ u, exact, atol=1e-9)
        np.testing.assert_allclose(exact, u / (1 + (length * k * np.pi / horizon) ** 2), atol=5e-4)  # in the limit
    assert sn.green(1, 0.1) == pytest.approx(1)
    u = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(30, 2, 2)), jnp.float32)}
    np.testing.assert_allclose(
        sn.sobolev(u, 0.1, 0.5)["w"], np.einsum("ij,jkl->ikl", sn.green(30, 0.1, 0.5), u["w"]), atol=1e-6
    )


@pytest.mark.slow
def test_costs_and_gradients_converge_as_the_grid_is_refined(key):
    x, y = jnp.linspace(0, 1, 12).reshape(3, 4), jnp.array([0, 1, 1])
    values, middle = [], []
    for rate in (8, 16, 32):
        net = sn.SNODE(2, horizon=2.0, rate=rate)
        weights = sn.snode_init(key, 4, net)
        assert weights["w"].shape == (2 * rate, 4, 4) and weights["b"].shape == (2 * rate, 4)
        value, density = jax.jit(lambda w, net=net: sn.snode_gradient(w, x, y, net))(weights)
        values.append(float(value))
        smooth = np.asarray(sn.sobolev(density, net.h)["b"])
        middle.append((smooth[rate - 1] + smooth[rate]) / 2)
    assert 1.6 < (values[0] - values[1]) / (values[1] - values[2]) < 2.4  # Euler: first order, densities stay
    far = [np.abs(a - middle[2]).max() for a in middle[:2]]
    assert far[1] < 0.55 * far[0] < 0.1 * np.abs(middle[2]).max()


@pytest.mark.parametrize(
    "method", ["fr", *(pytest.param(name, marks=pytest.mark.slow) for name in sn.CONJUGATE if name != "fr")]
)
def test_on_a_linear_flow_it_is_linear_conjugate_gradients(method):
    """One Euler step of a linear field: the cost is quadratic, so the formulas coincide, and SciPy takes the steps."""
    rng = np.random.default_rng(1)
    net = sn.SNODE(2, horizon=1.0, rate=1, activation="identity")
    x, y = rng.normal(size=(7, 3)), np.array([0, 1, 1, 0, 1, 0, 0])
    design = np.hstack([x, np.ones((7, 1))])  # [w | b] acts on each component alike
    wanted = np.eye(3)[y] - x
    normal, right = design.T @ design / 7, design.T @ wanted / 7
    big = scipy.sparse.linalg.LinearOperator((12, 12), lambda v: (normal @ v.reshape(4, 3)).ravel(), dtype=float)
    steps: list = []
    scipy.sparse.linalg.cg(big, right.ravel(), rtol=1e-14, maxiter=5, callback=lambda v: steps.append(v.copy()))
    optimizer = sn.ncg(method, inner="w12" if method == "fr" else "l2")
    with jax.enable_x64(True):

        @jax.jit
        def step(weights, state):
            density = sn.snode_gradient(weights, x, y, net)[1]
            flow = lambda w: sn.snode_forward(w, x, net)[-1]  # noqa: E731
            loss = lambda out, w: sn.snode_loss(out, y, net).mean()  # noqa: E731
            move, state = optimizer.update(density, state, weights, flow=flow, cost=loss)
            return jax.tree.map(jnp.add, weights, move), state

        weights = {"w": jnp.zeros((1, 3, 3)), "b": jnp.zeros((1, 3))}
        state, ours = optimizer.init(weights), []
        for _ in range(5):
            weights, state = step(weights, state)
            ours.append(np.vstack([np.asarray(weights["w"][0]).T, np.asarray(weights["b"])]).ravel())
    np.testing.assert_allclose(ours, steps, atol=1e-8)
    best = np.linalg.lstsq(design, wanted, rcond=None)[0]
    np.testing.assert_allclose(ours[3], best.ravel(), atol=1e-6)  # as many steps as there are different eigenvalues


def test_formulas_of_conjugate_gradients():
    g, last, d = np.random.default_rng(2).normal(size=(3, 9))
    turn = sn.Turn(g @ g, g @ last, last @ last, d @ g, d @ last)
    y = g - last
    fr, pr = g @ g / (last @ last), g @ y / (last @ last)
    wanted = {"fr": fr, "pr+": max(0, pr), "fr-pr": np.clip(pr, -fr, fr), "hs": g @ y / (d @ y), "dy": g @ g / (d @ y)}
    assert wanted.keys() == sn.CONJUGATE.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(sn.CONJUGATE[name](turn), value, rtol=1e-5)
    smooth = sn.conjugate("fr", riesz=lambda u: sn.sobolev(u, 0.1), inner="w12")
    state = smooth.init({"b": jnp.zeros((4, 1))})
    u = {"b": jnp.array([[1.0], [2.0], [-1.0], [0.5]])}
    first, state = smooth.update(u, state)
    np.testing.assert_allclose(first["b"], -sn.green(4, 0.1) @ u["b"], atol=1e-6)
    second, state = smooth.update(u, state)  # the same gradient again: the share is one
    np.testing.assert_allclose(second["b"], 2 * first["b"], atol=1e-6)
    assert isinstance(state, sn.ConjugateState) and int(state.count) == 2


def test_the_step_minimizes_the_cost_of_the_linearized_flow(problem):
    weights, x, y, ways, _ = problem
    search = sn.linearized_search()
    with jax.enable_x64(True):

        @jax.jit
        def found(weights, ways):
            flow = lambda w: sn.snode_forward(w, x, NET)[-1]  # noqa: E731
            loss = lambda out, w: sn._cost(out, w, y, NET)  # noqa: E731
            move, state = search.update(ways, search.init(weights), weights, flow=flow, cost=loss)
            along = lambda s: loss(  # noqa: E731
                flow(weights) + s * jax.jvp(flow, (weights,), (ways,))[1],
                {k: weights[k] + s * ways[k] for k in weights},
            )
            grid = state.step + jnp.array([0, 1e-4, -1e-4, 0.3, -0.3])
            return move, state, jax.vmap(along)(grid)

        for sign in (1, -1):  # the step may be negative
            move, state, at = jax.tree.map(np.asarray, found(weights, {k: sign * v for k, v in ways.items()}))
            assert isinstance(state, sn.SearchState) and at.argmin() == 0 and abs(at[1] - at[2]) < 1e-9
            np.testing.assert_allclose(move["b"], sign * state.step * ways["b"], rtol=1e-12)
            np.testing.assert_allclose(state.cost, cost(weights, x, y), rtol=1e-6)


@pytest.mark.slow
def test_for_squared_distances_the_step_has_a_closed_form(problem):
    weights, x, y, ways, _ = (jax.tree.map(lambda v: v.astype(np.float32), p) for p in problem)
    y = y.astype(np.int32)
    net = sn.SNODE(3, horizon=1.0, rate=6, activation="softplus", rest=0.5)
    flow = lambda w: sn.snode_forward(w, x, net)[-1]  # noqa: E731
    search = sn.linearized_search(1)
    loss = lambda out, w: sn.snode_loss(out, y, net).mean()  # noqa: E731
    _, state = jax.jit(lambda w, d: search.update(d, search.init(w), w, flow=flow, cost=loss))(weights, ways)
    xi = np.asarray(jax.jit(lambda w, d: sn.sensitivity(w, x, net, dparams=d)[-1])(weights, ways), float)
    out = euler(weights, x)[-1]
    top = (xi * (out - np.eye(5)[y])).sum() + 0.5 * (xi * (out - np.log(2))).sum()
    np.testing.assert_allclose(state.step, -top / (1.5 * (xi**2).sum()), rtol=1e-4)


@pytest.mark.slow
def test_training_lowers_the_cost_and_classifies(key):
    net = sn.SNODE(2, horizon=3.0, rate=8)
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int32)  # no linear rule
    weights = sn.snode_init(key, 4, net)
    run = jax.jit(lambda w: (*sn.snode_ncg(w, x, y, net, steps=50, method="pr+", inner="w12", length=0.5),))
    trained, values = run(weights)
    assert np.isclose(values[0], sn.snode_cost(weights, x, y, net), rtol=1e-5)
    assert values[-1] < 0.05 * values[0] and (np.diff(values) < 1e-3).all()
    out = sn.snode_forward(trained, x, net)[-1]
    assert (np.argmax(out[:, :2], -1) == y).mean() > 0.95


def test_as_a_network(key):
    made = sn.snode(key, shape=(4, 4, 1), classes=3, pool=2, horizon=1.0, rate=2, activation="smooth_relu")
    net = made.apply.args[0]
    x = np.random.default_rng(0).uniform(size=(2, 4, 4, 1)).astype(np.float32)
    state = -x.reshape(2, 2, 2, 2, 2).mean((2, 4)).reshape(2, 4)
    np.testing.assert_allclose(sn.snode_state(x, net), state, atol=1e-6)
    act = lambda z: np.where(abs(z) < 0.1, (z + 0.1) ** 2 / 0.4, np.maximum(z, 0))  # noqa: E731
    want = euler(jax.tree.map(np.asarray, made.params), state, 0.5, act)[-1][:, :3]
    np.testing.assert_allclose(ja.models.model(made)(x), want, atol=1e-6)
    assert set(sn.FLOW_ACTIVATIONS) >= {"tanh", "sigmoid", "relu", "leaky_relu", "elu", "softplus"}
    assert made.apply(made.params, made.state, x, bn="train")[1] is made.state


def test_the_attack_finds_the_nearest_boundary_of_a_linear_classifier(key):
    w = np.array([[1.0, 0.2, -0.5], [0.1, 1.0, 0.3], [-0.4, 0.1, 0.9], [0.3, -0.6, 0.2]], np.float32)
    x = np.array([[0.5, 0.6, 0.4, 0.5], [0.4, 0.5, 0.6, 0.4]], np.float32)
    model = ja.pure(lambda w, x: x @ w, jnp.asarray(w))
    y = np.asarray(model(x)).argmax(1).astype(np.int32)
    ball = ja.l2(5.0, bounds=(-5.0, 5.0))
    attack = sn.sensitivity_attack(ball, steps=60, step_size=0.02, kappa=1.0)
    found = jax.jit(attack.run)(key, model, x, y)
    normal = w.T[None] - w.T[y][:, None]
    gap = -np.einsum("bcd,bd->bc", normal, x)
    long = np.linalg.norm(normal, axis=-1)
    away = np.where(long > 0, gap / np.where(long > 0, long, 1), np.inf)
    aim = away.argmin(1)
    assert np.asarray(found.success).all()
    np.testing.assert_array_less(0, np.asarray(found.size) - away.min(1) + 1e-6)
    np.testing.assert_array_less(np.asarray(found.size) - away.min(1), 0.02 + 1e-5)  # one step at most beyond
    way = (np.asarray(found.x) - x) / np.asarray(found.size)[:, None]
    np.testing.assert_allclose(way, normal[[0, 1], aim] / long[[0, 1], aim][:, None], atol=1e-4)


@pytest.mark.slow
def test_the_attack_reaches_targets_and_moves_where_there_is_no_gradient(key):
    w = np.array([[1.0, 0.2, -0.5], [0.1, 1.0, 0.3], [-0.4, 0.1, 0.9]], np.float32)
    x, y, target = jnp.full((2, 3), 0.5), jnp.array([1, 1]), jnp.array([0, 2])
    model, ball = ja.pure(lambda w, x: x @ w, jnp.asarray(w)), ja.l2(5.0, bounds=(-5.0, 5.0))
    aimed = sn.sensitivity_attack(ball, steps=200, step_size=0.02, early=True)
    reached = jax.jit(aimed.run)(key, model, x, ja.Targets(y, target))
    assert np.asarray(reached.success).all() and isinstance(aimed, sn.SensitivityAttack)
    np.testing.assert_array_equal(np.asarray(model(reached.x)).argmax(1), target)
    flat = ja.pure(lambda x: jnp.array([[2.0, 1.0]]) + 0 * x[:, :2])
    dead = jax.jit(aimed.run)(key, flat, x, jnp.zeros(2, int))
    assert np.asarray(dead.flags["zero_gradient"]).all() and not np.asarray(dead.success).any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sn.SNODE(10, horizon=0.55, rate=10), "whole number of cells"),
        (lambda: sn.SNODE(10, activation="tan"), "unknown activation"),
        (lambda: sn.conjugate("newton"), "unknown method"),
        (lambda: sn.conjugate(inner="h1"), "unknown inner"),
        (lambda: sn.snode(jax.random.key(0), shape=(2, 2, 1), classes=9), "a component for each class"),
        (lambda: sn.snode_state(np.ones((1, 5, 5, 1)), sn.SNODE(2, pool=2)), "pool must divide"),
        (lambda: sn.sensitivity_attack(ja.linf(0.1)), "l2 for sensitivity"),
        (lambda: sn.linearized_search(0), "iterations must be"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_verdict_on_snode():
    claim = framework.load("snode")

    def judged(known, robust, clean=95.0):
        arms = {"sNODE, Sobolev": (known, robust, clean), "residual network": (0.0, 0.0, 95.0)}
        what = ("sensitivity attack, robust %", "AutoAttack, robust %", "clean %")
        given = {f"{arm}: {name}": [v, v + 0.1, v] for arm, vs in arms.items() for name, v in zip(what, vs)}
        return claim.verdict(given)[0]

    assert judged(9.0, 5.0) == "holds" and judged(9.0, 5.0, 90.0) == "holds in part"
    assert judged(9.0, -1.0) == "holds in part" and judged(-1.0, -1.0) == "does not hold here"
