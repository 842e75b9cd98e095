"""Residual networks: the published variants against PyTorch's arithmetic on the same weights, sizes, norm-free depth.

The fixture comes from `benchmarks/parity/models.py`, which has networks of its own in plain torch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxadv import models
from jaxadv.models.resnets import (
    SHORTCUTS,
    Block,
    PreActResNet18,
    PrivateBlock,
    PrivateWideResNet,
    ResNet,
    StandardizedConv,
    WideResNet,
)

CASES = [
    "mlp",
    "cnn_small",
    "cnn_madry",
    "preact_resnet18_raw",
    "preact_resnet18_preact",
    "preact_resnet18_gradalign",
    "wide_resnet",
]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_running_statistics_are_those_of_torch(stored, torch_case, name):
    spec, arrays = torch_case(name)
    net = models.from_torch_arrays(spec, arrays)
    x = jnp.asarray(stored[f"{name}/x"], jnp.float32)
    np.testing.assert_allclose(jax.jit(models.model(net))(x), stored[f"{name}/eval"], atol=1e-4)
    logits, state = jax.jit(lambda n, x: n.apply(n.params, n.state, x, bn="train"))(net, x)
    np.testing.assert_allclose(logits, stored[f"{name}/train"], atol=1e-4)
    after = {k.split("/after/")[1]: v for k, v in stored.items() if k.startswith(f"{name}/after/")}
    arrays = arrays | after
    want = models.from_torch_arrays(spec, arrays).state
    assert bool(after) == ("resnet" in name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), state, want)


def test_the_three_variants_are_three_functions(stored, torch_case):
    spec, arrays = torch_case("preact_resnet18_raw")
    x = jnp.asarray(stored["preact_resnet18_raw/x"], jnp.float32)
    raw = jax.jit(models.model(models.from_torch_arrays(spec, arrays)))(x)
    spec["options"]["shortcut"] = "preact"
    preact = jax.jit(models.model(models.from_torch_arrays(spec, arrays)))(x)
    assert np.abs(raw - preact).max() > 0.01
    spec["options"]["final_norm"] = False
    with pytest.raises(ValueError, match="unexpected bn.weight"):
        models.from_torch_arrays(spec, arrays)


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("preact_resnet18", {}, 11_172_170),
        ("preact_resnet18", {"shortcut": "preact"}, 11_172_170),
        ("preact_resnet18", {"final_norm": False}, 11_172_170 - 1024),
        ("wide_resnet", {"depth": 28, "width": 10}, 36_479_194),
        ("wide_resnet", {"depth": 34, "width": 10}, 46_160_474),
        ("wide_resnet", {"depth": 16, "width": 4}, 2_748_890),
        ("wide_resnet_private", {}, 2_753_818),
        ("wide_resnet_private", {"depth": 40}, 8_961_306),
    ],
)
def test_published_parameter_counts(name, options, parameters):
    made = jax.eval_shape(lambda k: models.create(name, k, shape=(32, 32, 3), classes=10, **options), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(made.params)) == parameters


def test_a_norm_free_block_starts_as_its_shortcut(key):
    settings = {"shortcut": "raw", "activation": "relu", "dropout": 0.0, "tag": 0, "init": "torch", "rngs": nnx.Rngs(0)}
    block = Block(3, 3, 1, norm="none", **settings)
    x = jax.random.normal(key, (2, 4, 4, 3))
    np.testing.assert_array_equal(block(x), x)
    block.gain[...] = jnp.ones(1)
    assert np.abs(block(x) - x).max() > 0.01
    assert SHORTCUTS == ("raw", "preact") and issubclass(PreActResNet18, ResNet) and issubclass(WideResNet, ResNet)


def test_dropout_acts_only_with_a_key(key, filled):
    net = filled("wide_resnet", depth=10, width=1, dropout=0.3)
    x = jax.random.uniform(key, (4, 8, 8, 1))
    run = jax.jit(lambda x, key: net.apply(net.params, net.state, x, bn="local", key=key)[0])
    plain, noisy, same = run(x, None), run(x, key), run(x, key)
    assert np.abs(noisy - plain).max() > 1e-4
    np.testing.assert_array_equal(noisy, same)


def test_stem_stride_halves_the_grid(key, filled):
    net = filled("preact_resnet18", (16, 16, 1), width=2, stem_stride=2)
    jaxpr = str(jax.make_jaxpr(models.model(net))(jnp.zeros((1, 16, 16, 1))))
    assert "f32[1,8,8,2]" in jaxpr and "f32[1,16,16,2]" not in jaxpr


def test_impossible_depths_and_variants_are_refused(key):
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 4.*got 18"):
        models.create("wide_resnet", key, shape=(8, 8, 1), classes=3, depth=18)
    with pytest.raises(ValueError, match="unknown shortcut 'pre'. Did you mean 'preact'"):
        models.create("preact_resnet18", key, shape=(8, 8, 1), classes=3, width=2, shortcut="pre")
    with pytest.raises(ValueError, match="width must be a whole number"):
        models.create("preact_resnet18", key, shape=(8, 8, 1), classes=3, width=0)


def test_sharded_training_pass_is_the_global_one(key, filled):
    """A whole network over an axis: logits, state and statistics of masked rows."""
    net = filled("wide_resnet", depth=10, width=1)
    x = jax.random.uniform(key, (8, 8, 8, 1))
    mask = jnp.arange(8) != 5

    def shard(x, mask):
        return net.apply(net.params, net.state, x, bn="train", axis_name="data", mask=mask)

    want, after = jax.jit(lambda x, mask: net.apply(net.params, net.state, x, bn="train", mask=mask))(x, mask)
    cut = x.reshape(4, 2, 8, 8, 1), mask.reshape(4, 2)
    got, state = jax.jit(jax.vmap(shard, axis_name="data", out_axes=(0, None)))(*cut)
    np.testing.assert_allclose(got.reshape(8, 3), want, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), state, after)


def test_a_standardized_kernel_has_mean_zero_and_the_norm_of_its_gain(key):
    layer = StandardizedConv(2, 3, 3, stride=2, rngs=nnx.Rngs(0))
    layer.kernel[...] = 2 + 3 * layer.kernel[...]
    layer.gain[...], layer.bias[...] = jnp.array([1.0, 2.0, -0.5]), jnp.array([0.1, 0.2, 0.3])
    x = jax.random.normal(key, (1, 4, 4, 2))
    kernel = np.asarray(layer.kernel[...], np.float64)
    kernel = kernel - kernel.mean((0, 1, 2))
    kernel = kernel / np.sqrt(kernel.var((0, 1, 2)) * 18) * np.array([1.0, 2.0, -0.5])
    np.testing.assert_allclose(np.linalg.norm(kernel.reshape(18, 3), axis=0), [1.0, 2.0, 0.5])
    padded = np.pad(np.asarray(x[0]), ((0, 1), (0, 1), (0, 0)))  # SAME at stride 2 pads behind
    want = [[np.tensordot(padded[i : i + 3, j : j + 3], kernel, 3) for j in (0, 2)] for i in (0, 2)]
    np.testing.assert_allclose(layer(x)[0], np.array(want) + [0.1, 0.2, 0.3], atol=1e-5)
    layer.kernel[...] = jnp.ones_like(layer.kernel[...])  # no spread: the floor keeps it finite
    assert np.isfinite(layer(x)).all()


def test_the_private_network_activates_before_it_normalizes_and_sees_each_example_alone(key, filled):
    net = filled("wide_resnet_private", (8, 8, 1), depth=10, width=1)
    x = jax.random.uniform(key, (3, 8, 8, 1))
    run = jax.jit(lambda p, x: (net.apply(p, {}, x)[0], jax.grad(lambda p: net.apply(p, {}, x)[0].sum())(p)))
    logits, grads = run(net.params, x)
    other, _ = run(net.params, x.at[1].multiply(5.0))
    np.testing.assert_array_equal(logits[::2], other[::2])
    assert net.state == {} and all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    settings = {"norm": "none", "activation": jnp.square, "rngs": nnx.Rngs(0)}
    block = PrivateBlock(2, 2, 1, projects=False, **settings)
    z = jax.random.normal(key, (1, 4, 4, 2))
    np.testing.assert_allclose(block(z), z + block.conv2(jnp.square(block.conv1(jnp.square(z)))), atol=1e-6)
    block = PrivateBlock(2, 4, 2, projects=True, **settings)
    side = block.shortcut(jnp.square(z))
    np.testing.assert_allclose(block(z), side + block.conv2(jnp.square(block.conv1(jnp.square(z)))), atol=1e-6)
    assert issubclass(PrivateWideResNet, nnx.Module)
