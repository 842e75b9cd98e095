"""Loss, gradient, attacked points and running statistics of the authors' codes, on the same weights, batch and noise.

The fixture is made by benchmarks/parity/objectives.py in PyTorch and float64; ours is float32.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attacks, losses, threats, train
from jaxadv.core import Trainable
from jaxadv.train import terms

FIXTURES = Path(__file__).parent.parent / "fixtures"


def read(name):
    with np.load(FIXTURES / name) as stored:
        kept = {key: stored[key] for key in stored.files}
    wide = [key for key, value in kept.items() if value.ndim and value.dtype == np.float64]
    return kept | {key: kept[key].astype(np.float32) for key in wide}


@pytest.fixture(scope="module")
def official():
    return read("objectives_torch.npz")


@pytest.fixture(scope="module")
def fast():
    """What fast_adversarial's loops compute."""
    return read("objectives_torch3.npz")


def apply(params, state, x, *, bn="eval", key=None, mask=None, axis_name=None):
    """Linear, batch norm, tanh, linear; running statistics as PyTorch moves them."""
    params = {name: value if value.ndim > 1 else value[None] for name, value in params.items()}
    h = x @ params["first.weight"].T + params["first.bias"]
    mean, var = state["running_mean"][None], state["running_var"][None]
    if bn != "eval":
        mean, var = h.mean(0, keepdims=True), h.var(0, keepdims=True)
    if bn == "train":
        n = len(x)
        state = {
            "running_mean": 0.9 * state["running_mean"] + 0.1 * mean[0],
            "running_var": 0.9 * state["running_var"] + 0.1 * var[0] * n / (n - 1),
        }
    h = (h - mean) / jnp.sqrt(var + 1e-5) * params["norm.weight"] + params["norm.bias"]
    return jnp.tanh(h) @ params["last.weight"].T + params["last.bias"], state


def network(official):
    weights = {name[2:]: jnp.asarray(value) for name, value in official.items() if name.startswith("w.")}
    state = {name: weights.pop(f"norm.{name}") for name in ("running_mean", "running_var")}
    return Trainable(apply, weights, state)


def rows(official):
    n = len(official["y"])
    names = {"x": official["x"], "y": official["y"], "index": np.arange(n, dtype=np.int32), "mask": np.ones(n, bool)}
    return {name: jnp.asarray(value) for name, value in names.items()}


def same(official, name, got, n, *, statistics=True):
    """Relative error at most 1e-4 of the loss and of each gradient, in the norm of its tensor."""
    np.testing.assert_allclose(got.sums["loss"] / n, official[f"{name}/loss"], rtol=1e-5)
    for leaf, value in got.total.items():
        want = official[f"{name}/grad/{leaf}"]
        error = np.linalg.norm(np.asarray(value) / n - want)
        assert error <= 1e-4 * np.linalg.norm(want) + 1e-6, leaf  # batch norm cancels the first bias
    for leaf, value in got.state.items() if statistics else ():
        np.testing.assert_allclose(value, official[f"{name}/after/{leaf}"], rtol=1e-4, atol=1e-6)


def search(official, name, **settings):
    """The authors' search: their noise, their step, their number of steps."""
    step = {"steps": int(official["steps"]), "step_size": float(official["step_size"]), "keep": "last"}
    attack = attacks.pgd(threats.linf(float(official["eps"])), start="zero", **step, **settings)
    return train.started(attack, lambda threat, keys, x: x + 0.001 * official[f"{name}/noise"])


def build(name, official):
    threat = threats.linf(float(official["eps"]))
    if name == "trades":
        attack = search(official, name, loss=losses.minus_kl, criterion=losses.minus_kl)
        return train.trades(threat, beta=float(official["beta"]), attack=attack)
    if name == "mart":
        return train.mart(threat, weight=float(official["weight"]), attack=search(official, name))
    if name == "grad_align":
        noise = official["grad_align/noise"].reshape(official["x"].shape)
        term = terms.alignment(threat, start=lambda threat, keys, x: x + noise)
        return train.plus(train.fgsm_at(threat), term, float(official["alignment"]))
    clipped = {"noise": 1, "clip": 1, "alpha": 1.25 * threat.eps} if name == "n_fgsm_clip" else {}
    made = train.n_fgsm(threat, bn_attack="train", **clipped)
    noise = official[f"{name}/noise"].reshape(official["x"].shape)
    inner = made.keywords["attack"].attack
    return train.pgd_at(
        train.started(inner, lambda threat, keys, x: jnp.clip(x + noise, 0, 1)), bn_attack=made.keywords["bn_attack"]
    )


@pytest.mark.parametrize("name", ["trades", "mart", "n_fgsm", "n_fgsm_clip", "grad_align"])
def test_the_authors_loss_and_gradient(official, key, name):
    net, batch, objective = network(official), rows(official), build(name, official)
    found = objective.find(net.apply, net.params, net.state, batch, key)["found"]
    np.testing.assert_allclose(found, official[f"{name}/found"], atol=1e-6)
    got = jax.jit(train.grad_fn(objective), static_argnums=0)(net.apply, net.params, net.state, batch, key)
    same(official, name, got, len(official["y"]), statistics=name != "grad_align")  # its term moves theirs, too


def test_the_authors_logit_consistency(official, key):
    """At the points of TRADES: three of the 36 entries of the batch count."""
    net, batch = network(official), rows(official) | {"found": jnp.asarray(official["trades/found"])}
    settings = {"weight": float(official["consistency"]), "top": float(official["top"])}
    objective = train.advlc(attacks.pgd(threats.linf(float(official["eps"]))), **settings)
    got = jax.jit(train.grad_fn(objective.loss), static_argnums=0)(net.apply, net.params, net.state, batch, key)
    same(official, "advlc", got, len(official["y"]))


@pytest.mark.parametrize("name", ["at", "trades"])
def test_the_authors_adversary_of_the_weights(official, key, name):
    """Their points for both, so that the weights and the gradient there are compared alone."""
    net, batch = network(official), rows(official) | {"found": jnp.asarray(official["trades/found"])}
    threat = threats.linf(float(official["eps"]))
    passes = ("robust", "clean", "clean")  # their order here is not that of the code of TRADES
    built = {
        "at": train.pgd_at(attacks.fgsm(threat)),
        "trades": train.trades(threat, beta=float(official["beta"]), running=passes),
    }
    gradient = train.awp(built[name].loss, gamma=float(official[f"gamma_{name}"]))
    got = jax.jit(gradient, static_argnums=0)(net.apply, net.params, net.state, batch, key)
    same(official, f"awp_{name}", got, len(official["y"]))

    slope = jax.jit(partial(train.grad_fn(built[name].loss), net.apply))(net.params, net.state, batch, key).total
    moves = train.perturbed.weight_perturbation(slope, net.params, float(official[f"gamma_{name}"]))
    for leaf, move in moves.items():
        want = official[f"awp_{name}/moved/{leaf}"]
        np.testing.assert_allclose(net.params[leaf] + move, want, atol=2e-6, err_msg=leaf)


@pytest.mark.parametrize("name", ["mnist", "cifar"])
def test_the_loss_and_gradient_of_fast_adversarial(fast, key, name):
    """Their MNIST loop does not cut the random start to the bounds, the one for CIFAR-10 does."""
    net, batch, threat = network(fast), rows(fast), threats.linf(float(fast["eps"]))
    made = train.fgsm_rs(threat, start={"mnist": "unclipped", "cifar": "random"}[name], bn_attack="train")
    begun = batch["x"] + fast[f"{name}/noise"].reshape(batch["x"].shape)
    begun = begun if name == "mnist" else jnp.clip(begun, 0, 1)
    attack = train.started(made.keywords["attack"], lambda threat, keys, x: begun)
    objective = train.pgd_at(attack, bn_attack=made.keywords["bn_attack"])
    found = objective.find(net.apply, net.params, net.state, batch, key)["found"]
    np.testing.assert_allclose(found, fast[f"{name}/found"], atol=1e-6)
    got = jax.jit(train.grad_fn(objective), static_argnums=0)(net.apply, net.params, net.state, batch, key)
    same(fast, name, got, len(fast["y"]))


def test_two_replays_of_free_as_in_fast_adversarial(fast, key):
    """Loss, gradient, statistics and perturbations of both, with a step of the weights between."""
    net, batch, threat = network(fast), rows(fast), threats.linf(float(fast["eps"]))
    made = train.free(threat)
    step = jax.jit(partial(made(train.pgd_at(attacks.fgsm(threat))), net.apply))
    params, state, carry, n = net.params, net.state, made.carry(batch["x"].shape), len(fast["y"])
    for replay in range(2):
        got = step(params, state, batch | {"carry": carry}, key)
        same(fast, f"free{replay}", got, n)
        np.testing.assert_allclose(got.carry, fast[f"free{replay}/carry"], atol=1e-6)
        params = jax.tree.map(lambda p, g: p - float(fast["rate"]) * g / n, params, got.total)
        state, carry = got.state, got.carry
