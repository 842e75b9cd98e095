"""TisODE, random end times and exchanged solvers: closed forms, identities, and what each loss reduces to."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from jaxadv import continuous, losses, models
from jaxadv.attacks.draws import takes_keys
from jaxadv.continuous import SolveCfg, latent, ode_solve
from jaxadv.core import Trainable, example_keys

SHAPE = {"shape": (8, 8, 1), "classes": 10, "channels": 4, "stem": 1}
EULER = {"method": "euler", "mode": "fixed", "n_steps": 4}


@pytest.fixture(scope="module")
def small():
    key = jax.random.key(0)
    net = continuous.create("odenet_tis", key, time=False, cfg=EULER, **SHAPE)
    x = jax.random.uniform(key, (3, 8, 8, 1))
    return net, {"x": x, "y": jnp.asarray([1, 2, 3]), "index": jnp.arange(3), "step": jnp.full(3, 5)}


# --------------------------------------------------------------------------------------------------------------- TisODE


@pytest.fixture(scope="module")
def tis(small):
    net, batch = small

    @jax.jit
    def run():
        def asked(**settings):
            return continuous.tisode(**settings)(net.apply, net.params, net.state, batch, jax.random.key(1))

        out = {
            "off": asked(weight=0.0, window=(0.75, 1.5)),
            "on": asked(weight=0.5, window=(0.75, 1.5)),
            "late": asked(weight=0.5, window=(0.75, 1.5), after=6),
            "begun": asked(weight=0.5, window=(0.75, 1.5), after=5),
        }
        ends = net.apply(net.params, net.state, batch["x"], taps=("block",), hints={"times": jnp.asarray([0.75, 1.0])})
        long = SolveCfg("euler", "fixed", t1=1.5, n_steps=6)
        end = net.apply(net.params, net.state, batch["x"], taps=("block",), hints={"solve": long})
        logits = net.apply(net.params, net.state, batch["x"])[0]
        return out, ends[0][1]["block"][:3], end[0][1]["block"], losses.cross_entropy(logits, batch["y"])

    return run()


def test_where_the_field_is_never_negative_the_integral_is_the_way_gone(tis):
    out, begin, end, _ = tis
    moved = np.asarray(end - begin).reshape(3, -1).mean(1)
    np.testing.assert_allclose(out["on"][1][1]["steady"], moved, rtol=1e-4)
    assert (moved > 0).all()


def test_without_weight_or_before_its_time_the_loss_is_the_cross_entropy(tis):
    out, _, _, cross = tis
    np.testing.assert_allclose(out["off"][0], cross, rtol=1e-5)
    np.testing.assert_array_equal(out["late"][0], out["off"][0])
    np.testing.assert_array_equal(out["begun"][0], out["on"][0])
    np.testing.assert_allclose(out["on"][0] - out["off"][0], 0.5 * out["on"][1][1]["steady"], rtol=1e-4)


def test_the_steady_loss_of_a_decay_is_its_closed_form():
    """dz = -kz from z0 > 0: z0 (exp(-k ta) - exp(-k tb)); the augmented state in float64."""
    k, since, until, z0 = 1.7, 0.75, 1.5, np.array([[0.5], [2.0]])

    def field(k, t, state):
        dz = -k * state[0]
        return dz, jnp.where(t >= since - 1e-9, jnp.abs(dz).mean(-1), 0)

    with jax.enable_x64(True):
        cfg = SolveCfg("euler", "fixed", t1=until, n_steps=6000)
        run = jax.jit(lambda z: ode_solve(field, k, (z, jnp.zeros(2)), cfg, ts=jnp.asarray([1.0, until]))[0])
        (z, integral) = run(z0)
        np.testing.assert_allclose(integral[-1], z0[:, 0] * (np.exp(-k * since) - np.exp(-k * until)), rtol=1e-3)
        np.testing.assert_allclose(z[0], z0 * np.exp(-k), rtol=1e-3)


def test_refusals_of_tisode():
    with pytest.raises(ValueError, match="window must begin before it ends"):
        continuous.tisode(window=(1.0, 1.0))
    with pytest.raises(ValueError, match="weight must be finite and greater than 0"):
        continuous.tisode(-1.0)


# ----------------------------------------------------------------------------------------------------- random end times


def test_the_divergence_of_gammas_is_its_integral():
    assert float(continuous.gamma_kl(1.0, 1.0, 2.0, 0.5)) == pytest.approx(1.463510, abs=1e-5)
    for a, b in ((2.0, 0.5), (3.5, 1.2), (0.7, 2.0)):
        one: Any = stats.gamma(a, scale=1 / b)
        two: Any = stats.gamma(2.0, scale=2.0)
        exact = integrate.quad(lambda t, p=one, q=two: p.pdf(t) * (p.logpdf(t) - q.logpdf(t)), 1e-12, 80, limit=400)[0]
        assert float(continuous.gamma_kl(a, b, *continuous.PRIOR)) == pytest.approx(exact, abs=1e-4)


@pytest.fixture(scope="module")
def means():
    """What each estimator makes of E[exp(-T)] and of E[1], q = Gamma(2, 3) cut at 3."""

    @jax.jit
    def run(key):
        def mean(name, n):
            t, w = latent.nodes(name, key, jnp.float32(2.0), jnp.float32(3.0), n, 3.0)
            return jnp.sum(w * jnp.exp(-t)), jnp.sum(w), jnp.all(jnp.diff(t) >= 0)

        late = latent.nodes("uniform_is_exact", key, jnp.float32(8.0), jnp.float32(1.0), 20_000, 3.0)
        whole = latent.nodes("quadrature", key, jnp.float32(8.0), jnp.float32(1.0), 40, 3.0)
        found = {name: mean(name, 40 if name == "quadrature" else 20_000) for name in continuous.ESTIMATORS}
        return found | {"late": late[1].sum(), "whole": whole[1].sum()}

    return run(jax.random.key(0))


def test_estimators_agree_with_the_laplace_transform(means):
    exact = (3 / 4) ** 2  # E[z(T)] of dz = -z is (b / (b + 1))^a
    assert float(means["quadrature"][0]) == pytest.approx(exact, abs=2e-3)
    assert float(means["reparam"][0]) == pytest.approx(exact, abs=0.01)
    assert float(means["uniform_is_exact"][0]) == pytest.approx(exact, abs=0.02)
    assert float(means["uniform_is"][0]) * 3 == pytest.approx(exact, abs=0.02)
    for name in continuous.ESTIMATORS:
        assert float(means[name][1]) == pytest.approx(1 / 3 if name == "uniform_is" else 1, abs=0.03)
        assert bool(means[name][2])


def test_importance_sampling_counts_nothing_beyond_the_end_and_quadrature_does(means):
    assert float(means["late"]) == pytest.approx(stats.gamma(8.0).cdf(3.0), rel=0.1)  # 0.012: a loss next to nothing
    assert float(means["whole"]) == pytest.approx(1, abs=1e-4)


def test_gradients_of_the_sampled_times_are_those_of_the_mean(key):
    """d/da and d/db of E[T] = a / b."""

    def mean(a, b):
        t, w = latent.nodes("reparam", key, a, b, 20_000, 100.0)
        return jnp.sum(t * w)

    to_a, to_b = jax.jit(jax.grad(mean, (0, 1)))(2.0, 3.0)
    assert float(to_a) == pytest.approx(1 / 3, abs=0.01) and float(to_b) == pytest.approx(-2 / 9, abs=0.01)


TIMES = SolveCfg("rk4", "fixed", t1=3.0, n_steps=6)


@pytest.fixture(scope="module")
def timed(small):
    """An LT-NODE, an ALT-NODE, and one without motion: losses, predictions, models; one program."""
    net, batch = small
    still = Trainable(net.apply, jax.tree.map(jnp.zeros_like, net.params), net.state)
    encoder = continuous.time_encoder(jax.random.key(2), shape=(8, 8, 1), channels=4, stem=1)
    nets = {
        "lt": continuous.lt_node(net, TIMES),
        "alt": continuous.lt_node(net, TIMES, encoder=encoder),
        "still": continuous.lt_node(still, TIMES),
    }

    @jax.jit
    def run(key):
        def loss(name, params, **settings):
            made = continuous.latent_time(**settings)
            return made(nets[name].apply, params, nets[name].state, batch, key)

        def total(params):
            return loss("still", params, estimator="quadrature", n_samples=8, kl_weight=1.0)[0].sum()

        out: dict = {"published": loss("lt", nets["lt"].params), "slope": jax.grad(total)(nets["still"].params)["time"]}
        out["of rows"] = loss("alt", nets["alt"].params, n_samples=2, estimator="reparam", kl_weight=0.1)
        out |= {name: models.model(nets[name])(batch["x"]) for name in nets}
        out["law"] = continuous.posterior(nets["alt"], batch["x"])
        ts = jnp.asarray([0.5, 1.5])
        out["at"] = continuous.at_times(nets["lt"], ts)(batch["x"])
        out["one"] = net.apply(net.params, net.state, batch["x"], hints={"times": ts, "solve": TIMES})[0]
        out["predicted"] = continuous.predict(key, nets["alt"], batch["x"], n_samples=3)
        keys = example_keys(key, "end time", jnp.arange(3))
        out["drawn"] = continuous.sampled(nets["alt"], 3)(batch["x"], keys=keys)
        return out

    return nets, run(jax.random.key(3))


@pytest.mark.slow
def test_without_motion_the_posterior_has_nothing_to_learn_but_the_prior(timed):
    """dlogits/dT = 0 and weights that sum to one: the loss's slope in (a, b) is that of the divergence."""
    _, out = timed

    def kl(log_a, log_b):
        return 3 * continuous.gamma_kl(jnp.exp(log_a), jnp.exp(log_b), *continuous.PRIOR)

    slopes = jax.jit(jax.grad(kl, (0, 1)))(0.0, 0.0)
    np.testing.assert_allclose([out["slope"]["log_a"], out["slope"]["log_b"]], slopes, rtol=1e-4)
    np.testing.assert_allclose(np.exp(out["still"]), 0.1, atol=1e-6)


@pytest.mark.slow
def test_one_solve_gives_the_mean_of_probabilities_at_given_times(timed):
    _, out = timed
    logs = jax.nn.softmax(out["one"].reshape(2, 3, 10))
    np.testing.assert_allclose(np.exp(out["at"]), logs.mean(0), atol=1e-6)


@pytest.mark.slow
def test_predictions_are_probabilities_and_losses_belong_to_rows(timed):
    nets, out = timed
    for name in ("lt", "alt"):
        np.testing.assert_allclose(np.exp(out[name]).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(out["predicted"], np.exp(out["drawn"]), rtol=1e-6)
    np.testing.assert_allclose(out["predicted"].sum(-1), 1, atol=1e-5)
    for name in ("published", "of rows"):
        values, (_, metrics) = out[name]
        assert values.shape == (3,) and np.isfinite(values).all() and metrics["kl"].shape == (3,)
    np.testing.assert_allclose(out["published"][1][1]["kl"], 1.463510, atol=1e-5)  # a = b = 1 at first
    assert out["law"].shape == (3, 2) and np.std(np.asarray(out["law"])[:, 0]) > 0
    assert takes_keys(continuous.sampled(nets["alt"], 3))


def test_refusals_of_random_end_times(small):
    with pytest.raises(ValueError, match="unknown estimator 'uniform'.*uniform_is"):
        continuous.latent_time(estimator="uniform")
    with pytest.raises(ValueError, match="prior must be finite and greater than 0"):
        continuous.lt_node(small[0], TIMES, prior=(0.0, 1.0))


def test_the_encoder_has_the_published_parameters(key):
    made = jax.eval_shape(lambda k: continuous.time_encoder(k, shape=(28, 28, 1)), key)
    assert sum(leaf.size for leaf in jax.tree.leaves(made.params)) == 132_354


# ---------------------------------------------------------------------------------------------------- exchanged solvers


def decay(params, x, cfg):
    """Two classes by the sign of the first feature after a linear flow."""
    z, stats = ode_solve(lambda p, t, z: -p * z, params, x, cfg)
    return jnp.stack([z[:, 0], -z[:, 0]], -1), stats


def test_weights_stay_and_solvers_change(small):
    net, batch = small
    model = continuous.ode_model(net)
    assert continuous.cfg_of(model, batch["x"]) == SolveCfg(**EULER)
    finer = continuous.fixed_step(model, batch["x"], "rk4", 2)
    assert continuous.cfg_of(finer, batch["x"]) == SolveCfg("rk4", "fixed", n_steps=2)
    loose = continuous.with_tolerance(model, batch["x"], 0.1)
    assert continuous.cfg_of(loose, batch["x"]) == SolveCfg(n_steps=4, rtol=0.1, atol=0.1)
    mixed = continuous.surrogate_gradient(model, finer)

    @jax.jit
    def run(x):
        def slope(m):
            return jax.grad(lambda x: losses.cross_entropy(m(x), batch["y"]).sum())(x)

        own, _ = net.apply(net.params, net.state, x)
        told = continuous.solved(finer, x)
        return [m(x) for m in (model, mixed, finer)], own, [slope(m) for m in (model, mixed, finer)], told

    (logits, mixed_logits, fine), own, slopes, (told, stats) = run(batch["x"])
    np.testing.assert_array_equal(logits, own)
    np.testing.assert_array_equal(mixed_logits, logits)  # native forward pass
    np.testing.assert_array_equal(told, fine)
    assert stats.nfe.tolist() == [8] * 3 and np.abs(fine - logits).max() > 1e-4

    # The gradient of the cross-entropy is the surrogate's pullback of the native one's slope in the logits.
    def pulled(x):
        _, pull = jax.vjp(finer, x)
        return pull(jax.grad(lambda z: losses.cross_entropy(z, batch["y"]).sum())(logits))[0]

    np.testing.assert_allclose(slopes[1], jax.jit(pulled)(batch["x"]), rtol=1e-4, atol=1e-7)
    assert np.abs(slopes[1] - slopes[0]).max() > 1e-6


def test_a_function_of_your_own_and_refusals(small):
    x = jnp.asarray([[1.0, 2.0], [-1.0, 0.5]])
    cfg = SolveCfg("rk4", "fixed", n_steps=4)
    model = continuous.ode_model(decay, cfg, jnp.asarray(0.5))
    np.testing.assert_allclose(model(x)[:, 0], np.array([1.0, -1.0]) * np.exp(-0.5), rtol=1e-4)
    other = continuous.with_cfg(model, SolveCfg("euler", "fixed", n_steps=1))
    np.testing.assert_allclose(other(x)[:, 0], [0.5, -0.5], rtol=1e-6)
    with pytest.raises(ValueError, match="must come with the cfg"):
        continuous.ode_model(decay)
    plain = models.model(small[0])
    for door in (continuous.solved, continuous.cfg_of, partial(continuous.fixed_step)):
        with pytest.raises(ValueError, match="must know its solver.*ode_model"):
            door(plain, x)
