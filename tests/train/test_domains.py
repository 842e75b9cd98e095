"""DIAL: the authors' loss and gradient, reductions to TRADES, the schedule of the reversal."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attacks, losses, models, threats, train
from jaxadv.core import Trainable
from jaxadv.train import domains

FIXTURE = Path(__file__).parent.parent / "fixtures" / "objectives_torch2.npz"


@pytest.fixture(scope="module")
def official():
    with np.load(FIXTURE) as stored:
        return {name: stored[name] for name in stored.files}


def body(params, state, x, *, bn="eval", key=None, mask=None, axis_name=None, taps=(), hints=None):
    """Linear, batch norm, tanh, linear; what the last layer is given is the tap `features`."""
    params = {name: value if value.ndim > 1 else value[None] for name, value in params.items()}
    h = x @ params["first.weight"].T + params["first.bias"]
    mean, var = state["running_mean"][None], state["running_var"][None]
    if bn != "eval":
        mean, var, n = h.mean(0, keepdims=True), h.var(0, keepdims=True), len(x)
    if bn == "train":
        new = {"running_mean": mean[0], "running_var": var[0] * n / (n - 1)}
        state = {name: 0.9 * state[name] + 0.1 * value for name, value in new.items()}
    features = jnp.tanh((h - mean) / jnp.sqrt(var + 1e-5) * params["norm.weight"] + params["norm.bias"])
    logits = features @ params["last.weight"].T + params["last.bias"]
    return (logits, {"features": features}) if taps else logits, state


def network(official):
    """The authors' network: the head of theirs is a perceptron of ours."""
    stored = {name[7:]: jnp.asarray(a) for name, a in official.items() if name.startswith("dial/w.")}
    own = {name: value for name, value in stored.items() if not name.startswith("domain")}
    state = {name: own.pop(f"norm.{name}") for name in ("running_mean", "running_var")}
    head = models.create("mlp", jax.random.key(0), shape=(10,), classes=2, widths=(7,), norm="batch")
    dense = {
        str(i): {"kernel": stored[f"domain.{at}.weight"].T, "bias": stored[f"domain.{at}.bias"]}
        for i, at in enumerate((0, 3))
    }
    norm = {ours: stored[f"domain.1.{theirs}"] for ours, theirs in (("scale", "weight"), ("bias", "bias"))}
    rest = {ours: stored[f"domain.1.running_{ours}"] for ours in ("mean", "var")}
    head = head._replace(params={"layers": dense, "norms": {"0": norm}}, state={"norms": {"0": rest}})
    return models.branched(Trainable(body, own, state), head, at="features")


def in_their_names(tree):
    """Parameters or gradients by the names of the authors' network."""
    named = dict(tree["trunk"])
    for i, at in enumerate((0, 3)):
        layer = tree["branch"]["layers"][str(i)]
        named |= {f"domain.{at}.weight": layer["kernel"].T, f"domain.{at}.bias": layer["bias"]}
    norm = tree["branch"]["norms"]["0"]
    return named | {"domain.1.weight": norm["scale"], "domain.1.bias": norm["bias"]}


def rows(official):
    n = len(official["dial/y"])
    batch = {"x": official["dial/x"], "y": official["dial/y"], "index": np.arange(n, dtype=np.int32)}
    return {name: jnp.asarray(a) for name, a in (batch | {"mask": np.ones(n, bool)}).items()}


@pytest.mark.parametrize("distance", ["kl", pytest.param("ce", marks=pytest.mark.slow)])
def test_the_authors_loss_and_gradient(official, key, distance):
    name, net, batch = f"dial_{distance}", network(official), rows(official)
    kind = domains.DISTANCES[distance]
    pgd = attacks.pgd(
        threats.linf(float(official["eps"])), steps=int(official["steps"]), step_size=float(official["step_size"]),
        start="zero", keep="last", loss=kind, criterion=kind,
    )  # fmt: skip
    attack = train.started(pgd, lambda threat, keys, x: x + 0.001 * official[f"{name}/noise"])
    weights = {"beta": float(official["beta"]), "domain": float(official["domain"])}
    objective = train.dial(pgd.threat, distance=distance, attack=attack, **weights)
    rho = float(official["reversal"])
    fixed = functools.partial(
        objective.loss.func, **objective.loss.keywords | {"hints": lambda batch: {"reversal": rho}}
    )
    found = jax.jit(functools.partial(objective.find, net.apply))(net.params, net.state, batch, key)
    np.testing.assert_allclose(found["found"], official[f"{name}/found"], atol=1e-6)
    got = jax.jit(functools.partial(train.grad_fn(fixed), net.apply))(net.params, net.state, found, key)
    np.testing.assert_allclose(got.sums["loss"] / 9, official[f"{name}/loss"], rtol=1e-5)
    for leaf, value in in_their_names(got.total).items():
        want = official[f"{name}/grad/{leaf}"]
        error = np.linalg.norm(np.asarray(value) / 9 - want)
        assert error <= 1e-4 * np.linalg.norm(want) + 2e-6, leaf  # batch norm cancels the biases before it
    after = {f"norm.{k}": v for k, v in got.state["trunk"].items()}
    after |= {f"domain.1.running_{k}": v for k, v in got.state["branch"]["norms"]["0"].items()}
    for leaf, value in after.items():
        np.testing.assert_allclose(value, official[f"{name}/after/{leaf}"], rtol=1e-4, atol=1e-6)


def test_without_the_domains_it_is_trades_and_the_reversal_only_turns_the_features(kit, key):
    net = train.with_domains(key, kit.mlp(norm="batch"), shape=(4, 4, 1), at="layers.1:in", width=5)
    assert net.params["branch"]["layers"]["0"]["kernel"].shape == (16, 5)
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(8, 4, 4, 1)), jnp.float32)
    batch = dict(kit.rows(), x=x, step=jnp.full(8, 30, jnp.int32))
    threat = threats.linf(0.1)
    attack = attacks.pgd(threat, steps=2, loss=losses.minus_kl, criterion=losses.minus_kl, keep="last")

    find = train.dial(threat, attack=attack).find
    found = jax.jit(functools.partial(find, net.apply))(net.params, net.state, batch, key)
    again = jax.jit(functools.partial(train.trades(threat, attack=attack).find, net.apply))
    np.testing.assert_array_equal(again(net.params, net.state, batch, key)["found"], found["found"])

    def slope(objective):
        go = jax.jit(functools.partial(train.grad_fn(objective.loss), net.apply))
        return go(net.params, net.state, found, key)

    trades = slope(train.trades(threat, beta=3, attack=attack, running=("clean", "robust")))
    none = slope(train.dial(threat, beta=3, domain=0, attack=attack))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, none.total, trades.total)
    full = slope(train.dial(threat, beta=3, domain=2, attack=attack)).total
    part = slope(train.dial(threat, beta=3, domain=2, attack=attack, total_steps=60)).total
    rho = float(domains.reversal(30, steps=60))
    jax.tree.map(close, part["branch"], full["branch"])
    own = jax.tree.map(lambda a, b: a + rho * (b - a), trades.total["trunk"], full["trunk"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), part["trunk"], own)


def test_the_reversal_rises_from_nothing_to_almost_one():
    step = jnp.arange(0, 101)
    got, q = domains.reversal(step, steps=100), np.arange(0, 101) / 100
    np.testing.assert_allclose(got, 2 / (1 + np.exp(-10 * q)) - 1, atol=1e-6)
    assert float(got[0]) == 0 and float(got[-1]) == pytest.approx(0.99991, abs=1e-5)


@pytest.mark.parametrize("settings", [{"beta": -1.0}, {"domain": -0.1}, {"distance": "l2"}, {"total_steps": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="beta|domain|distance|total_steps"):
        train.dial(threats.linf(0.1), **settings)
