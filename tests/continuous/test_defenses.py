"""Stability defenses: logarithmic norms against matrix exponentials, Jacobians by hand, exact zeros, skew fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import jaxadv as ja
from jaxadv import continuous
from jaxadv.continuous import SolveCfg, SolveStats
from jaxadv.continuous import defenses as de
from jaxadv.continuous import nets as made

RK4 = SolveCfg("rk4", "fixed", n_steps=20, t1=1.5)


def tanh_field(params, t, z):
    return jnp.tanh(z @ params["w"].T + t) @ params["v"].T - 0.3 * z


def linear_field(params, t, z):
    return z @ params.T


def test_the_logarithmic_norm_bounds_the_matrix_exponential():
    a = np.random.default_rng(0).normal(size=(20, 4, 4)).astype(np.float32)
    mu = np.asarray(de.log_norm(jnp.asarray(a)))
    for matrix, rate in zip(a, mu):
        for t in (0.1, 1.0, 3.0):
            assert np.linalg.norm(scipy.linalg.expm(t * matrix), 2) <= np.exp(t * rate) * (1 + 1e-5)
        slope = (np.linalg.norm(np.eye(4) + 1e-6 * matrix.astype(float), 2) - 1) / 1e-6  # its definition
        assert rate == pytest.approx(slope, abs=1e-4)
    assert (np.linalg.eigvals(a).real.max(-1) <= mu + 1e-5).all()


def test_no_small_perturbation_grows_by_more_than_the_bound():
    rng = np.random.default_rng(1)
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in {"w": (6, 3), "v": (3, 6)}.items()}
    z, way = rng.normal(size=(2, 40, 3)).astype(np.float32)
    small = 1e-2 * way / np.linalg.norm(way, axis=1, keepdims=True)

    @jax.jit
    def run(params, z, small):
        found = de.contraction(tanh_field, params, z, RK4, n=40)
        ends = de.ode_solve(tanh_field, params, jnp.concatenate([z, z + small]), RK4)[0]
        sharp = de.contraction(linear_field, jnp.diag(jnp.array([-1.0, 0.5])), jnp.ones((1, 2)), RK4, n=2)
        return found, jnp.linalg.norm(ends[40:] - ends[:40], axis=1) / 1e-2, sharp

    found, growth, sharp = jax.tree.map(np.asarray, run(params, z, small))
    assert isinstance(found, de.Contraction) and found.ok.all() and found.rates.shape == (41, 40)
    assert (growth <= found.bound * 1.02).all() and (growth > 0.1 * found.bound).any()
    still = np.tanh(z @ params["w"].T)  # the field's derivative by hand
    jacobian = np.einsum("ij,bj,jk->bik", params["v"], 1 - still**2, params["w"]) - 0.3 * np.eye(3)
    rate = np.linalg.eigvalsh((jacobian + jacobian.transpose(0, 2, 1)) / 2)[:, -1]
    np.testing.assert_allclose(found.rates[0], rate, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sharp.bound, np.exp(0.75), rtol=1e-5)  # sharp where the field is symmetric


def test_the_terms_of_sodef_by_hand():
    rng = np.random.default_rng(2)
    params = {"w": rng.normal(size=(4, 4)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}
    z = rng.normal(size=(3, 4)).astype(np.float32)
    terms = jax.tree.map(np.asarray, jax.jit(lambda p, z: de.sodef_terms(de.sodef_field, p, z))(params, z))
    inside = -(z @ params["w"].T + params["b"])
    np.testing.assert_allclose(terms["steady"], ((50 * np.sin(inside)) ** 2).mean(1), rtol=1e-4)
    for row, arg in enumerate(inside):
        j = -np.cos(arg)[:, None] * params["w"]
        away = np.abs(j).sum(0) - 2 * np.abs(np.diag(j))
        np.testing.assert_allclose(terms["diagonal"][row], np.exp(np.diag(j) + 1).mean(), rtol=1e-5)
        np.testing.assert_allclose(terms["dominant"][row], np.exp(0.1 * (away + 1)).mean(), rtol=1e-5)
    weights = {"dominant": 2.0, "steady": 0.5}
    penalty = jax.jit(lambda p, z: de.sodef_penalty(de.sodef_field, p, z, weights=weights))(params, z)
    np.testing.assert_allclose(penalty, 2 * terms["dominant"] + 0.5 * terms["steady"], rtol=1e-5)
    assert set(de.SODEF_WEIGHTS) == set(terms)
    with pytest.raises(ValueError, match="unknown term 'diag'"):
        de.sodef_penalty(de.sodef_field, params, z, weights={"diag": 1.0})


def test_a_field_that_fulfills_sodef_attracts():
    a, z = 6.0, np.random.default_rng(3).normal(size=(1, 5)).astype(np.float32)
    params = {"w": a * jnp.eye(5), "b": jnp.asarray(-a * z[0])}  # z is its equilibrium, the Jacobian there is -a I
    terms = jax.jit(lambda p, z: de.sodef_terms(de.sodef_field, p, z))(params, z)
    np.testing.assert_allclose([terms[k][0] for k in ("steady", "diagonal", "dominant")],
                               [0, np.exp(1 - a), np.exp(0.1 * (1 - a))], rtol=1e-4, atol=1e-6)  # fmt: skip
    jacobian = np.random.default_rng(4).normal(size=(5, 5)).astype(np.float32) - 8 * np.eye(5, dtype=np.float32)
    assert (np.abs(jacobian).sum(0) - 2 * np.abs(np.diag(jacobian)) < 0).all()  # dominant, and so
    assert np.linalg.eigvals(jacobian).real.max() < 0


def test_the_lyapunov_loss_is_zero_exactly_where_the_cross_entropy_falls_fast_enough(key):
    w = jax.random.normal(key, (5, 3))
    head = lambda z: z @ w  # noqa: E731
    y, kappa = jnp.array([0, 2, 1, 1]), 3.0
    value = lambda z, y: ja.losses.cross_entropy(head(z), y)  # noqa: E731

    def falling(rate):
        def field(t, z, x):
            v, pull = jax.vjp(lambda z: value(z, y), z)
            slope = pull(jnp.ones_like(v))[0]
            return -rate * (v / jnp.square(slope).sum(-1))[:, None] * slope

        return field

    @jax.jit
    def losses(key):
        ask = lambda field: de.lyanet_loss(  # noqa: E731
            field, head, y, y, key, features=5, classes=3, points=40, kappa=kappa, limit=2.0
        )
        points = de.lyapunov_points(jax.random.split(key)[1], 40, 5, 3, limit=2.0)
        rates = [ask(falling(rate)) for rate in (kappa, 2 * kappa, kappa / 2)]
        mean = jax.vmap(lambda z: value(jnp.broadcast_to(z, (4, 5)), y))(points).mean(0)
        return (*rates, ask(lambda t, z, x: 0 * z), mean, points)

    exact, faster, slower, none, mean, points = jax.tree.map(np.asarray, losses(key))
    np.testing.assert_allclose(exact, 0, atol=1e-5)
    np.testing.assert_array_equal(faster, 0)
    np.testing.assert_allclose(none, kappa * mean, rtol=1e-5)
    np.testing.assert_allclose(slower, kappa / 2 * mean, rtol=1e-4)
    assert (np.linalg.norm(points, axis=1) <= 2 * np.sqrt(3)).all() and np.linalg.norm(points, axis=1).max() > 3


def test_what_the_lyapunov_loss_sends_back(key):
    """Gradients flow through the slope, not through κ V."""
    z, y, motion = jnp.array([[0.3, -0.2]]), jnp.array([0]), jnp.array([[-1.0, 2.0]])
    loss = lambda s: de.lyapunov_violation(motion, lambda z: s * z, z, y, kappa=5.0).sum()  # noqa: E731
    slope = lambda s: jax.jvp(lambda z: ja.losses.cross_entropy(s * z, y), (z,), (motion,))[1].sum()  # noqa: E731
    np.testing.assert_allclose(*jax.jit(lambda s: (jax.grad(loss)(s), jax.grad(slope)(s)))(1.0), rtol=1e-5)


def test_the_skew_convolution_turns_and_keeps_the_norm():
    rng = np.random.default_rng(5)
    kernel, u = rng.normal(size=(3, 3, 2, 2)).astype(np.float32), rng.normal(size=(2, 8, 4, 2)).astype(np.float32)
    moved = np.asarray(jax.jit(lambda k, u: de.skew_convolution(k, u, lambda v: v))(kernel, u))
    np.testing.assert_allclose((moved * u).sum((1, 2, 3)), 0, atol=1e-4)
    z = np.pad(u[:, 4:], ((0, 0), (1, 1), (1, 1), (0, 0)))
    ahead = sum(z[:, i : i + 4, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3))
    np.testing.assert_allclose(moved[:, :4], ahead, atol=1e-5)


def test_a_block_and_the_last_layer_of_sonet(key):
    params = de.sonet_init(key, 4)
    x = np.random.default_rng(6).normal(size=(2, 3, 3, 4)).astype(np.float32)
    one = SolveCfg("euler", "fixed", n_steps=1)
    head = {"w": jnp.linspace(-1, 1, 6).reshape(3, 2), "b": jnp.linspace(0, 1, 5)}

    @jax.jit
    def run(params, head, x):
        u = jnp.concatenate([x, x], 1)
        moved = de.sonet_field(params, 0.0, u)
        features = x.mean((1, 2))[:, :3]
        return de.sonet_block(params, x, one), moved, features, de.sonet_logits(head, features, one)

    out, moved, features, logits = jax.tree.map(np.asarray, run(params, head, x))
    np.testing.assert_allclose(out, x + moved[:, :3], atol=1e-5)
    act = np.where(features > 0, features, 0.01 * features)
    np.testing.assert_allclose(logits, 0.1 - act @ np.asarray(head["w"]) + np.asarray(head["b"])[3:], atol=1e-5)
    s = jnp.arange(5.0)[None] + 1
    turned = de.sonet_head_field(head | {"b": jnp.zeros(5)}, 0.0, s)
    assert float((turned * s).sum()) == pytest.approx(0, abs=1e-4)  # skew where the activation is the identity


def stiff(params, t, z):
    return -params * jax.nn.softplus(8 * z) * (z - jnp.cos(3 * t))


ADAPTIVE = SolveCfg("heun", rtol=1e-2, atol=1e-2, max_steps=200)


def test_local_errors_by_hand():
    x = np.array([[0.2, 0.1], [0.3, 0.2]], np.float32)
    found = jax.jit(lambda x: de.local_error(stiff, 1.0, x, ADAPTIVE, steps=5))(x)
    z, want, t = np.asarray(x, float), 0.0, 0.0
    field = lambda t, z: -np.logaddexp(0, 8 * z) * (z - np.cos(3 * t))  # noqa: E731
    for _ in range(5):
        first = field(t, z)
        second = field(t + 0.2, z + 0.2 * first)
        new = z + 0.1 * (first + second)
        error = 0.1 * (second - first) / (1e-2 + 1e-2 * np.maximum(abs(z), abs(new)))
        want = want + np.log(np.sqrt((error**2).mean(1)))
        z, t = new, t + 0.2
    np.testing.assert_allclose(found, want, rtol=1e-3)
    assert float(de.effort(jnp.array([[3.0, 4.0]]), None)[0]) == -3
    assert float(de.fewest(jnp.array([[3.0, 4.0]]), None)[0]) == -4
    with pytest.raises(ValueError, match="only adaptive solves"):
        de.solver_cost(lambda params, x: x, stiff, 1.0, SolveCfg("euler", "fixed"))


def toy(x):
    return jnp.stack([x.sum(-1), jnp.floor(10 * x.sum(-1))], axis=-1)


def test_the_attack_on_costs_follows_the_one_and_counts_the_other(key):
    x = jnp.array([[0.2, 0.1], [0.3, 0.95]])
    attack = de.solver_cost_attack(ja.linf(0.1), steps=3, start="zero")
    found = jax.jit(attack.run)(key, ja.pure(toy), x, jnp.zeros(2))
    np.testing.assert_allclose(found.x, [[0.3, 0.2], [0.4, 1.0]], atol=1e-6)
    np.testing.assert_array_equal(found.score, [-5, -14])


def turning(params, t, z):
    """A rotation whose speed is the third component."""
    return jnp.stack([-z[:, 2] * z[:, 1], z[:, 2] * z[:, 0], 0 * z[:, 2]], axis=-1)


@pytest.mark.slow
def test_the_cost_that_is_followed_ranks_solves_as_their_steps_do():
    x = jnp.linspace(0.5, 12, 10)[:, None] * jnp.array([[0.0, 0.0, 1.0]]) + jnp.array([[1.0, 0.0, 0.0]])
    model = de.solver_cost(lambda params, x: x, turning, jnp.zeros(()), ADAPTIVE, steps=16)
    costs = np.asarray(jax.jit(lambda m, x: m(x))(model, x))
    assert (np.diff(costs[:, 1]) >= 0).all() and costs[-1, 1] > 4 * costs[0, 1] and (np.diff(costs[:, 0]) > 0).all()


def test_steps_of_a_network_as_a_model():
    def apply(params, state, x, *, bn, taps):
        assert taps == ("block.stats",) and bn == "eval"
        n = jnp.arange(x.shape[0])
        return (x[:, :2], {"block.stats": SolveStats(n + 7, n, n, n, n > -1)}), state

    model = de.step_counter(ja.Trainable(jax.tree_util.Partial(apply), {}, {}))
    costs = model(jnp.ones((3, 2)))
    np.testing.assert_array_equal(costs, [[7, 0], [8, 0], [9, 0]])
    np.testing.assert_array_equal(ja.margin(costs, jnp.ones(3, int)), [-7, -8, -9])


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def nets():
    """The three networks on 4x4 images, two Euler steps: logits, taps, losses and their gradients; one program."""
    key, cfg = jax.random.key(0), {"method": "euler", "mode": "fixed", "n_steps": 2}
    shared = {"shape": (4, 4, 1), "classes": 3, "stem": 1, "cfg": cfg}
    made = {
        "sodef": continuous.create("sodef", key, channels=3, features=5, **shared),
        "lyanet": continuous.create("lyanet", key, channels=3, features=4, width=6, **shared),
        "sonet": continuous.create("sonet", key, channels=8, **shared),
    }
    x, y = jax.random.uniform(key, (2, 4, 4, 1)), jnp.array([0, 2])
    losses = {"sodef": continuous.sodef({"steady": 0.1, "diagonal": 2.0}), "lyanet": continuous.lyanet(points=7)}

    def given(name):
        return made[name], {"x": x, "y": y}

    @jax.jit
    def run(params):
        out: dict = {}
        for name, tap in (("sodef", "block:in"), ("lyanet", "steer"), ("sonet", "stem")):
            out[name] = made[name].apply(params[name], {}, x, taps=(tap, "block"))[0]
        for name, loss in losses.items():
            net, batch = given(name)

            def total(p, net=net, batch=batch, loss=loss):
                values, (_, metrics) = loss(net.apply, p, net.state, batch, key)
                return values.sum(), (values, metrics)

            out[f"{name} loss"] = jax.grad(total, has_aux=True)(params[name])
        out["solved"] = continuous.solved(continuous.ode_model(made["sonet"]), x)
        return out

    params = {name: net.params for name, net in made.items()}
    return jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, run(params)), np.asarray(y)


def linear(layer, z):
    return z @ layer["kernel"] + layer["bias"]


def cross_entropy(z, y):
    return np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), y]


@pytest.mark.slow
def test_the_network_of_sodef_and_its_loss_by_hand(nets):
    params, out, y = nets
    (logits, seen), p = out["sodef"], params["sodef"]
    start = z = seen["block:in"]
    w, b = p["block"]["field"]["w"], p["block"]["field"]["b"]
    for _ in range(2):
        z = z + np.sin(-(z @ w.T + b)) / 2
    np.testing.assert_allclose(logits, linear(p["linear"], z), atol=1e-5)
    np.testing.assert_allclose(p["before"]["kernel"] @ p["before"]["kernel"].T, np.eye(3), atol=1e-5)
    slopes, (values, metrics) = out["sodef loss"]
    inside = start @ w.T + b
    diagonal = -np.cos(inside) * np.diag(w)
    penalty = 0.1 * np.square(50 * np.sin(inside)).mean(-1) + 2 * np.exp(diagonal + 1).mean(-1)
    np.testing.assert_allclose(metrics["unstable"], penalty, rtol=1e-4)
    np.testing.assert_allclose(values, cross_entropy(logits, y) + penalty, rtol=1e-4)
    assert (
        all(np.isfinite(v).all() for v in jax.tree.leaves(slopes)) and np.abs(slopes["block"]["field"]["w"]).max() > 0
    )


@pytest.mark.slow
def test_the_network_of_lyanet_and_its_loss_without_a_solve(nets):
    params, out, y = nets
    (logits, seen), p = out["lyanet"], params["lyanet"]
    steer, hidden, last = seen["steer"], p["block"]["field"]["hidden"], p["block"]["field"]["out"]

    def field(t, z):
        return linear(last, np.tanh(linear(hidden, np.concatenate([z, steer, np.full((2, 1), t)], 1))))

    z = np.zeros_like(steer)
    for t in (0.0, 0.5):
        z = z + field(t, z) / 2
    np.testing.assert_allclose(logits, linear(p["linear"], z), atol=1e-5)
    k_time, k_point = jax.random.split(jax.random.key(0))
    t, want = float(jax.random.uniform(k_time)), np.zeros(2)
    for point in np.asarray(de.lyapunov_points(k_point, 7, 4, 3)):
        at = np.tile(point, (2, 1))
        logs = linear(p["linear"], at).astype(float)
        prob = np.exp(logs - logs.max(1, keepdims=True))
        pull = (prob / prob.sum(1, keepdims=True) - np.eye(3)[y]) @ p["linear"]["kernel"].T
        value = np.log(prob.sum(1)) + logs.max(1) - logs[np.arange(2), y]
        want += np.maximum((pull * field(t, at)).sum(1) + 10 * value, 0) / 7
    slopes, (values, metrics) = out["lyanet loss"]
    np.testing.assert_allclose(values, want, rtol=1e-4)
    np.testing.assert_allclose(metrics["violation"], values)
    assert (
        all(np.isfinite(v).all() for v in jax.tree.leaves(slopes))
        and np.abs(slopes["stem"]["convs"]["0"]["kernel"]).max() > 0
    )


@pytest.mark.slow
def test_the_network_of_sonet_is_its_parts(nets):
    params, out, _ = nets
    (logits, seen), p = out["sonet"], params["sonet"]
    euler = SolveCfg("euler", "fixed", n_steps=2)
    top = np.asarray(jax.jit(lambda p, x: de.sonet_block(p, x, euler))(p["block"]["field"], seen["stem"]))
    np.testing.assert_allclose(seen["block"][:, : top.shape[1]], top, atol=1e-5)
    s = np.concatenate([top.mean((1, 2)), np.full((2, 3), 0.1)], 1)
    w, b, act = p["last"]["field"]["w"], p["last"]["field"]["b"], lambda v: np.where(v > 0, v, 0.01 * v)
    for _ in range(2):
        s = s + (np.concatenate([act(s[:, 8:]) @ w.T, -act(s[:, :8]) @ w], 1) + b) / 2
    np.testing.assert_allclose(logits, s[:, 8:], atol=1e-5)
    told, stats = out["solved"]
    np.testing.assert_allclose(told, logits, atol=1e-6)
    assert stats.num_steps.tolist() == [4, 4] and stats.ok.all()  # both solves


def test_what_the_networks_and_losses_refuse(key):
    with pytest.raises(ValueError, match="multiple of 8"):
        continuous.create("sonet", key, shape=(4, 4, 1), classes=3, stem=1, channels=4)
    with pytest.raises(ValueError, match="unknown term 'calm'"):
        continuous.sodef({"calm": 1.0})
    with pytest.raises(ValueError, match="kappa must be"):
        continuous.lyanet(kappa=0.0)
    assert issubclass(made.SODEF, made.Net) and {"sodef", "lyanet", "sonet"} < set(continuous.NETS)
    assert made.LyaNet and made.SONet and made.SodefField and made.SteeredField and made.SkewField
    assert made.SkewHead and made.Hinted
