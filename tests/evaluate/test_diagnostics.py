"""Planted defenses that hide gradients, each of which raises its own flag, and honest models that raise none."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from jaxadv import data, losses, threats
from jaxadv.attacks import fgsm, pgd
from jaxadv.evaluate import FLAGS, diagnostics
from jaxadv.evaluate.diagnostics import CHECKS, RAISES, Diagnosis, diagnose

KEY = jax.random.key(0)
LINF = threats.linf(0.1)


def net(params, x):
    h = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["w"] + params["a"][None])
    return h @ params["v"] + params["b"][None]


@functools.cache
def digits():
    x, y = data.load("digits").all()
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)


@functools.cache
def trained(robust=False):
    """A two-layer network on the digits, a few hundred steps of Adam, on clean or on adversarial points."""
    x, y = digits()
    rng = np.random.default_rng(0)
    start = {
        "w": rng.normal(size=(64, 64)) / 8,
        "a": np.zeros(64),
        "v": rng.normal(size=(64, 10)) / 8,
        "b": np.zeros(10),
    }
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), start)
    optimizer = optax.adam(3e-3)
    inner = pgd(LINF, steps=5, keep="last")

    @jax.jit
    def step(carry, i):
        params, opt = carry
        rows = jax.random.randint(jax.random.fold_in(KEY, i), (128,), 0, len(x))
        at = inner.run(KEY, Partial(net, params), x[rows], y[rows], index=rows).x if robust else x[rows]
        grad = jax.grad(lambda p: losses.cross_entropy(net(p, at), y[rows]).mean())(params)
        update, opt = optimizer.update(grad, opt)
        return (optax.apply_updates(params, update), opt), None

    carry = (params, optimizer.init(params))
    carry, _ = jax.lax.scan(step, carry, jnp.arange(400))
    return carry[0]


def quantized(params, x):
    return net(params, jnp.round(x * 6) / 6)


def loud(params, x):
    return 1e3 * net(params, x)


def softmax(params, x):
    return jax.nn.softmax(net(params, x))


def cut_off(params, x):
    return net(params, jax.lax.stop_gradient(x))


def shattered(params, x):
    return net(params, x) + 4 * jnp.sin(600 * x.reshape(x.shape[0], -1)[:, :10])


def resized(params, x):
    """Pads and shifts by an amount drawn from the bits of the input: random to an attacker, a function to jax."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(x.shape[0], -1).sum(-1, dtype=jnp.uint32)

    def one(x, bits):
        key = jax.random.key(bits)
        size = jax.random.randint(key, (2,), 5, 9) / 8
        shift = jax.random.uniform(jax.random.fold_in(key, 1), (2,), minval=-1, maxval=1.5)
        return jax.image.scale_and_translate(x, x.shape, (0, 1), size, shift, "linear")

    return net(params, jax.vmap(one)(x, bits))


@jax.custom_vjp
def reversed_gradient(x):
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def backward(params, x):
    return net(params, reversed_gradient(x))


def purified(params, x):
    """Two steps that raise the largest logit, before the answer."""
    for _ in range(2):
        x = x + 0.05 * jax.grad(lambda x: net(params, x).max(-1).sum())(x)
    return net(params, x)


def pair(params, x):
    z = net(params, x)
    return jnp.stack([jnp.max(z[:, :5], -1), jnp.max(z[:, 5:], -1)], -1)


class Drawn:
    """Noise drawn anew at every trace."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __call__(self, params, x):
        return net(params, x) + self.rng.normal(size=(1, 10)).astype(np.float32)


def blunt(threat):
    """An attack that works at small budgets and stands still at large ones."""
    return dataclasses.replace(pgd(threat, steps=10), step_size=jnp.where(jnp.asarray(threat.eps) < 0.15, 0.02, 0.0))


def weak(threat):
    return pgd(threat, steps=5, step_size=jnp.asarray(threat.eps, jnp.float32) * 0.06, start="zero")


def standing_still(threat):
    return pgd(threat, steps=5, step_size=jnp.asarray(threat.eps, jnp.float32) * 1e-6, start="zero")


def longer(threat):
    return pgd(threat, steps=100, step_size=jnp.asarray(threat.eps, jnp.float32) * 0.1)


def wandering(threat):
    return pgd(threat, steps=20, step_size=jnp.asarray(threat.eps, jnp.float32) * 1.9, keep="last", loss=drifting)


def drifting(logits, y):
    """Lowers the margin while it is positive and raises it beyond: a search that runs away from what it finds."""
    return jnp.abs(losses.margin(logits, y) + 0.1)


def ask(model, threat=LINF, **settings):
    x, y = digits()
    if model is pair:
        y = (y >= 5).astype(jnp.int32)
    model = Partial(model, trained())
    return diagnose(KEY, model, x, y, threat, **{"n": 60, "steps": 12, "queries": 60} | settings)


def names(found):
    return {f.name for f in found.flags}


PLANTED = [  # defense or attack, checks, the flag that must be raised
    (quantized, {}, "gradient", "zero_gradient"),
    (loud, {}, "gradient", "saturated_loss"),
    (backward, {}, "gradient", "gradient_mismatch"),
    (cut_off, {}, "gradient", "zero_gradient"),
    (cut_off, {}, "strength", "black_box_stronger"),
    (cut_off, {"surrogate": True}, "strength", "transfer_stronger"),
    (cut_off, {}, "budgets", "unbounded_attack_fails"),
    (shattered, {}, "landscape", "rough_landscape"),
    pytest.param(resized, {}, "stability", "unstable_predictions", marks=pytest.mark.slow),
    (softmax, {}, "forward", "probabilities"),
    (Drawn(), {}, "forward", "randomized"),
    (purified, {}, "inference", "test_time_optimization"),
    (pair, {}, "classes", "few_classes"),
    (net, {"attack": blunt}, "budgets", "larger_budget_safer"),
    (net, {"attack": standing_still}, "strength", "single_step_stronger"),
    (net, {"attack": weak}, "steps", "more_steps_help"),
    (net, {"attack": weak}, "steps", "step_size_matters"),
    (net, {"attack": wandering}, "trajectory", "silent_success"),
    (net, {"attack": standing_still, "threat": threats.linf(0.3)}, "strength", "attack_weaker_than_noise"),
]


CASES = [p if isinstance(p, tuple) and not hasattr(p, "values") else p.values for p in PLANTED]
IDS = [f"{getattr(p[0], '__name__', 'drawn')}-{p[3]}" for p in CASES]


@pytest.mark.parametrize(("model", "settings", "check", "flag"), PLANTED, ids=IDS)
def test_a_planted_defect_raises_its_flag(model, settings, check, flag):
    if settings.get("surrogate"):
        settings = {"surrogate": Partial(net, trained())}
    found = ask(model, which=[check], **settings)
    assert flag in names(found)
    one = next(f for f in found.flags if f.name == flag)
    kind = FLAGS[flag]
    assert (one.severity, one.words, one.remedy) == kind and one.detail and np.isfinite(one.value)
    assert RAISES.get(flag, check) == check


def test_every_flag_of_a_diagnosis_is_planted_here():
    assert set(RAISES) <= {flag for *_, flag in CASES} and set(RAISES) <= set(FLAGS)
    assert set(RAISES.values()) <= set(CHECKS)


@pytest.mark.parametrize(
    ("robust", "threat"),
    [
        pytest.param(False, LINF, marks=pytest.mark.slow),
        pytest.param(True, threats.l2(0.6), marks=pytest.mark.slow),
    ],
    ids=["standard-linf", "robust-l2"],
)
def test_honest_models_raise_nothing(robust, threat):
    x, y = digits()
    model = Partial(net, trained(robust))
    steps = 100 if robust and threat.norm == "l2" else 40
    attack = longer if steps == 100 else None  # there the default stops short, and the diagnosis says so
    other = Partial(net, trained(not robust))
    found = diagnose(KEY, model, x, y, threat, n=100, attack=attack, queries=100, surrogate=other)
    assert found.flags == (), found.flags
    assert isinstance(found, Diagnosis) and set(found.numbers) == {"examples", *CHECKS}
    assert found.numbers["examples"] == 100
    numbers = found.numbers
    assert numbers["gradient"]["measured_by_promised"] == pytest.approx(1, abs=0.1)
    shares = numbers["budgets"]["by_share_of_budget"]
    assert shares["0.5"] >= shares["1"] >= shares["2"] and numbers["budgets"]["unbounded"] == 0
    strength = numbers["strength"]
    assert strength["attack"] <= strength["single_step"] <= strength["noise"] + 0.02
    assert 0 < strength["attack"] < 1 and strength["attack"] <= strength["square"]
    assert np.shape(numbers["landscape"]["mean_margin"]) == (9, 9)
    trace = numbers["trajectory"]["mean_margin"]
    assert len(trace) == steps + 1 and trace[-1] < trace[0]
    json.dumps(numbers)


def test_a_trained_network_raises_nothing_in_the_cheap_checks():
    found = ask(net, which=["forward", "classes", "inference", "gradient", "stability", "landscape", "trajectory"])
    assert found.flags == () and found.numbers["stability"]["movement"] < 0.01


def test_the_promise_of_a_linear_model_is_kept_exactly():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
    model = Partial(lambda w, x: x @ w, w)
    x = jnp.asarray(rng.uniform(0.2, 0.8, (40, 6)), jnp.float32)
    found = diagnose(KEY, model, x, model(x).argmax(-1), threats.linf(0.05), which=["gradient", "landscape"])
    assert found.numbers["gradient"]["measured_by_promised"] == pytest.approx(1, abs=2e-3)
    assert found.numbers["landscape"]["roughness"] == 0
    grid = np.asarray(found.numbers["landscape"]["mean_margin"])
    np.testing.assert_allclose(np.diff(grid, axis=0), np.diff(grid, axis=0).mean(), rtol=1e-3)  # a plane
    assert np.diff(grid, axis=0).mean() < 0


def test_nothing_right_nothing_said_and_settings_are_checked():
    x, y = digits()
    model = Partial(net, trained())
    wrong = (model(x).argmax(-1) + 1) % 10
    assert diagnose(KEY, model, x, wrong, LINF) == Diagnosis((), {"examples": 0})
    with pytest.raises(ValueError, match=r"unknown check 'gradients'.*'gradient'"):
        diagnose(KEY, model, x, y, LINF, which=["gradients"])
    with pytest.raises(ValueError, match="one budget for all"):
        diagnose(KEY, model, x, y, threats.linf(jnp.full(len(x), 0.1)))
    with pytest.raises(ValueError, match="n must be"):
        diagnose(KEY, model, x, y, LINF, n=0)


def test_a_plain_function_and_an_attack_without_a_path_are_fine():
    x, y = digits()
    params = trained()
    found = diagnose(KEY, lambda x: net(params, x), x, y, LINF, n=20, which=["classes", "inference", "forward"])
    assert found.flags == () and found.numbers["classes"] == {"classes": 10, "targets": 9}
    one = diagnose(KEY, Partial(net, params), x, y, LINF, n=20, which=["trajectory"], attack=lambda t: fgsm(t))
    assert one.numbers["trajectory"]["followed"] and diagnostics.CHECKS is CHECKS


@pytest.mark.slow
def test_unions_and_weights_of_numpy_are_diagnosed_like_any():
    x, y = (np.asarray(part[:60]) for part in digits())
    few = {"n": 20, "steps": 8, "queries": 20}
    both = threats.union(LINF, threats.l2(0.6))
    found = diagnose(KEY, Partial(net, jax.tree.map(np.asarray, trained())), x, y, both, **few)
    again = diagnose(KEY, Partial(net, trained()), x, y, both, **few)
    assert found.flags == () and set(found.numbers) == {"examples", *CHECKS}
    for name in ("gradient", "steps", "strength"):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=0.02), found.numbers[name], again.numbers[name])
    broken = Partial(cut_off, trained())
    assert "zero_gradient" in {flag.name for flag in diagnose(KEY, broken, x, y, both, **few).flags}
