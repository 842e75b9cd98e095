"""CIFS: the authors' gates, joint loss and gradient on the same weights; what the search maximizes."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxadv import attacks, losses, models, threats, train
from jaxadv.models.channels import Gate
from jaxadv.train import channels

FIXTURE = Path(__file__).parent.parent / "fixtures" / "objectives_torch2.npz"


@pytest.fixture(scope="module")
def official():
    with np.load(FIXTURE) as stored:
        return {name[5:]: stored[name] for name in stored.files if name.startswith("cifs/")} | {
            "beta": float(stored["gates"])
        }


class Net(nnx.Module):
    """Two convolutions, each with a gate; global mean, linear: the network of the fixture."""

    def __init__(self, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), padding="VALID", rngs=rngs)
        dense = functools.partial(nnx.Linear, rngs=rngs)
        self.conv1, self.conv2 = conv(1, 4), conv(4, 5)
        self.gates = nnx.List([Gate(4, 4, hidden=128, dense=dense), Gate(5, 4, dense=dense)])
        self.linear = dense(5, 4)

    def __call__(self, x):
        x = self.gates[0](nnx.relu(self.conv1(x)))
        return self.linear(self.gates[1](nnx.relu(self.conv2(x))).mean((1, 2)))


def in_our_names(official, prefix):
    """Arrays of the authors' network as ours holds them."""
    found = {k.removeprefix(prefix): jnp.asarray(v) for k, v in official.items() if k.startswith(prefix)}

    def layer(name):
        kernel = found[f"{name}.weight"]
        axes = (2, 3, 1, 0) if kernel.ndim == 4 else (1, 0)
        return {"kernel": kernel.transpose(axes), "bias": found[f"{name}.bias"]}

    gates = {
        "0": {"hidden": layer("gate1.Probe.0.fc"), "out": layer("gate1.Probe.1")},
        "1": {"out": layer("gate2.Probe.1")},
    }
    return {"conv1": layer("conv1"), "conv2": layer("conv2"), "linear": layer("linear"), "gates": gates}


def network(official):
    net = models.trainable(Net(nnx.Rngs(0)))
    params = in_our_names(official, "w.")
    assert jax.tree.structure(params) == jax.tree.structure(net.params)
    return net._replace(params=params)


def rows(official):
    n = len(official["y"])
    x = jnp.asarray(official["x"]).transpose(0, 2, 3, 1)
    return {
        "x": x, "found": x, "y": jnp.asarray(official["y"]), "index": jnp.arange(n), "mask": jnp.ones(n, bool)
    }  # fmt: skip


def test_the_authors_joint_loss_and_gradient(official, key):
    net, batch = network(official), rows(official)
    loss = train.cifs(threats.linf(0.1), beta=official["beta"]).loss
    got = jax.jit(functools.partial(train.grad_fn(loss), net.apply))(net.params, net.state, batch, key)
    np.testing.assert_allclose(got.sums["loss"] / 9, official["loss"], rtol=1e-5)
    for value, want in zip(jax.tree.leaves(got.total), jax.tree.leaves(in_our_names(official, "grad/")), strict=True):
        assert np.linalg.norm(np.asarray(value) / 9 - want) <= 1e-4 * np.linalg.norm(want)


def test_the_authors_logits_where_no_label_is_known(official):
    net, batch = network(official), rows(official)
    (logits, scores), _ = net.apply(net.params, net.state, batch["x"], taps=("gates.*.scores",))
    np.testing.assert_allclose(logits, official["logits"], atol=2e-5)
    for got, want in zip(scores.values(), official["scores"], strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    np.testing.assert_allclose(models.model(net)(batch["x"]), logits, atol=1e-6)


def test_joint_logits_hold_the_joint_loss_and_the_search_maximizes_it(official, key):
    net, batch, threat = network(official), rows(official), threats.linf(0.05)
    (logits, scores), _ = net.apply(net.params, net.state, batch["x"], taps=("gates.*.scores",))
    seen = train.joint_model(net, beta=2.0)
    each = [losses.cross_entropy(z, batch["y"]) for z in (logits, *scores.values())]
    want = each[0] + each[1] + each[2]  # beta 2 over two gates, times 3 / 3
    np.testing.assert_allclose(-channels.of_label(seen(batch["x"]), batch["y"]), want, rtol=1e-5)
    alone = channels.joint(logits, tuple(scores.values()), beta=0.0)
    np.testing.assert_allclose(-channels.of_label(alone, batch["y"]), 3 * each[0], rtol=1e-5)

    attack = attacks.pgd(threat, steps=4, keep="last", name="cifs", loss=channels.of_label, criterion=channels.of_label)
    found = jax.jit(functools.partial(train.cifs(threat, steps=4).find, net.apply))(net.params, net.state, batch, key)
    again = jax.jit(attack.run)(key, seen, batch["x"], batch["y"], index=batch["index"])
    np.testing.assert_allclose(found["found"], again.x, atol=1e-6)
    assert float((-channels.of_label(seen(again.x), batch["y"]) - want).min()) > 0


def test_impossible_settings_are_refused(kit, key):
    with pytest.raises(ValueError, match="beta"):
        train.cifs(threats.linf(0.1), beta=-1.0)
    net = kit.mlp()
    batch = dict(kit.rows(), x=jnp.zeros((8, 4, 4, 1)), found=jnp.zeros((8, 4, 4, 1)))
    with pytest.raises(ValueError, match=r"must name a layer; got '\*gates"):
        train.cifs(threats.linf(0.1)).loss(net.apply, net.params, net.state, batch, key)
