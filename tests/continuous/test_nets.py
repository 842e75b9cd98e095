"""ODE networks: parameter counts, the block against a loop written out, hints and taps, specs and files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import continuous, models
from jaxadv.continuous import SolveCfg
from jaxadv.continuous.nets import Field, ODEBlock, ODENet, ODENetMNIST, ODENetTis, Told, extended, lt_node_net

SHAPE = {"shape": (8, 8, 1), "classes": 10, "channels": 4, "stem": 1}
EULER = {"method": "euler", "mode": "fixed", "n_steps": 4}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("odenet_mnist", {}, 208_266),
        ("odenet_tis", {}, 142_410),
        ("odenet_tis", {"time": False}, 141_130),
        ("lt_node", {}, 208_268),
        ("lt_node", {"encoder": True}, 208_266 + 132_354),
    ],
)
def test_parameters_are_those_of_the_published_networks(name, options, parameters, key):
    made = jax.eval_shape(lambda k: continuous.create(name, k, shape=(28, 28, 1), classes=10, **options), key)
    assert count(made.params) == parameters and not jax.tree.leaves(made.state)


@pytest.fixture(scope="module")
def asked():
    """Logits, taps and what the hints give, of a small network of each kind; all in one program."""
    key = jax.random.key(0)
    x = jax.random.uniform(key, (3, 8, 8, 1))
    nets = {
        "odenet_tis": continuous.create("odenet_tis", key, time=False, cfg=EULER, **SHAPE),
        "odenet_mnist": continuous.create("odenet_mnist", key, cfg=EULER, **SHAPE),
    }

    def call(net, **settings):
        return net.apply(net.params, net.state, x, **settings)[0]

    @jax.jit
    def run():
        out = {name: call(net, taps=("block.stats", "block:in", "block")) for name, net in nets.items()}
        net = nets["odenet_tis"]
        out["steady"] = call(net, taps=("block.motion",), hints={"steady": (0.75, 1.5)})
        out["times"] = call(net, hints={"times": jnp.asarray([0.5, 1.0])})
        out["solve"] = call(net, hints={"solve": SolveCfg("rk4", "fixed", n_steps=2)}, taps=("block.stats",))
        return out

    return nets, run()


def test_the_block_is_the_residual_loop_of_its_field(asked):
    nets, out = asked
    for name, net in nets.items():
        logits, seen = out[name]
        field = net.params["block"]["field"]
        z, first = np.asarray(seen["block:in"], np.float64), "2" in field["norms"]

        def convolved(t, z, layer):
            if "bias" in layer:
                z = np.concatenate([np.full((*z.shape[:-1], 1), t), z], -1)  # the time comes first
            kernel = np.asarray(layer["kernel"], np.float64)
            padded = np.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)))
            height, width = z.shape[1:3]
            parts = [padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)]
            return sum(parts) + np.asarray(layer.get("bias", 0.0))

        def normed(z, _):  # as many groups as channels, scale one and bias zero
            return (z - z.mean((1, 2), keepdims=True)) / np.sqrt(z.var((1, 2), keepdims=True) + 1e-5)

        for t in np.arange(4) / 4:
            k = z
            for layer in ("conv1", "conv2"):
                if first:
                    k = convolved(t, np.maximum(normed(k, 0), 0), field[layer])
                else:
                    k = np.maximum(normed(convolved(t, k, field[layer]), 0), 0)
            z = z + (normed(k, 0) if first else k) / 4
        np.testing.assert_allclose(seen["block"], z, atol=2e-4)
        assert logits.shape == (3, 10) and seen["block.stats"].nfe.tolist() == [4, 4, 4]


def test_hints_ask_for_motion_times_and_other_solvers(asked):
    _, out = asked
    logits, seen = out["odenet_tis"]
    steady, told = out["steady"]
    np.testing.assert_allclose(steady, logits, atol=1e-5)  # the answer does not change
    assert told["block.motion"].shape == (3,) and (told["block.motion"] > 0).all()
    np.testing.assert_allclose(out["times"][3:], logits, atol=1e-5)  # time first: the last rows are those at t1
    assert out["times"].shape == (6, 10) and np.abs(out["times"][:3] - logits).max() > 1e-3
    other, told = out["solve"]
    assert told["block.stats"].nfe.tolist() == [8] * 3 and 0 < np.abs(other - logits).max() < 1


@pytest.mark.parametrize(
    ("name", "options"),
    [("odenet_tis", {"time": False}), ("lt_node", {"points": 4}), ("lt_node", {"points": 4, "encoder": True})],
)
def test_a_spec_survives_json_and_files(name, options, tmp_path, key):
    spec = models.make_spec(name, nets=continuous.NETS, cfg=EULER, **options, **SHAPE)
    assert json.loads(json.dumps(spec)) == spec
    net = models.from_spec(spec, key, nets=continuous.NETS)
    models.save(tmp_path / "net.safetensors", net, spec, nets=continuous.NETS)
    again, told = models.load(tmp_path / "net.safetensors", nets=continuous.NETS)
    assert told == spec and jax.tree.structure(again) == jax.tree.structure(net)
    jax.tree.map(np.testing.assert_array_equal, again.params, net.params)
    if name == "lt_node":
        assert continuous.NETS[name] is lt_node_net
        assert ("log_a" in net.params["time"]) != options.get("encoder", False)
        assert continuous.random_time(continuous.ode_model(again)).apply.args[0].values[0].t1 == 3  # the latest end
    with pytest.raises(ValueError, match=f"unknown network '{name}'"):
        models.load(tmp_path / "net.safetensors")


def test_refusals(key):
    with pytest.raises(ValueError, match="large enough for its 3 convolutions.*stem=1"):
        continuous.create("odenet_mnist", key, shape=(4, 4, 1), classes=10)
    with pytest.raises(ValueError, match="got 'colour'. Valid: channels, stem, cfg"):
        continuous.create("odenet_mnist", key, shape=(8, 8, 1), classes=10, colour=1)
    with pytest.raises(ValueError, match="t1 must be after t0"):
        continuous.create("odenet_mnist", key, cfg={"t1": 0.0}, **SHAPE)
    assert extended(SolveCfg(), 0.5, 2.0).t1 == 2.0
    for since, until in ((0.5, 0.9), (-1.0, 1.5), (2.0, 1.5)):
        with pytest.raises(ValueError, match="the window must begin between"):
            extended(SolveCfg(), since, until)
    with pytest.raises(ValueError, match="on the grid of steps 0.25; got 0.75 to 1.3"):
        extended(SolveCfg(**EULER), 0.75, 1.3)
    net = continuous.create("odenet_tis", key, cfg=EULER, **SHAPE)
    with pytest.raises(ValueError, match="got both. Ask twice"):
        net.apply(net.params, {}, jnp.zeros((1, 8, 8, 1)), hints={"steady": (0.5, 1.5), "times": [1.0]})
    assert issubclass(ODENetTis, ODENet) and issubclass(ODENetMNIST, ODENet) and Field and ODEBlock and Told
