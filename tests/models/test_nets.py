"""Small networks against hand-written convolutions, their published sizes, and the checks that all networks share."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.signal import correlate

from jaxadv import models
from jaxadv.models.nets import (
    ACTIVATIONS,
    INITS,
    MLP,
    MadryCNN,
    Net,
    SmallCNN,
    conv,
    dense,
    image_shape,
    kaiming_normal,
    normalizer,
    torch_uniform,
)

SMALL = {
    "preact_resnet18": {"width": 2},
    "resnet50": {"width": 2, "depths": (1,)},
    "wide_resnet": {"depth": 10, "width": 1},
    "wide_resnet_private": {"depth": 10, "width": 1},
    "vit": {"width": 8, "depth": 1},
    "cnn_madry": {"hidden": 16},
    "mlp": {"widths": (9,)},
}
SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3)]
# preact_resnet18 is the code of wide_resnet at more depth; the others have tests of their own
RUN = [name for name in models.NETS if name not in ("preact_resnet18", "wide_resnet_private", "vit")]


@pytest.fixture
def small(filled):
    """`filled` with small settings for each network."""
    return lambda name, shape=(8, 8, 1), **options: filled(name, shape, **(SMALL.get(name, {}) | options))


def count(name, **options):
    made = jax.eval_shape(lambda k: models.create(name, k, classes=10, **options), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(made.params))


def convolve(x, kernel, bias, stride, padding):
    """Cross-correlation by scipy, one channel pair at a time."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    kernel = np.asarray(kernel, np.float64)
    rows = []
    for row in x:
        full = [
            sum(correlate(row[..., i], kernel[..., i, o], "valid") for i in range(kernel.shape[2]))
            for o in range(kernel.shape[3])
        ]
        rows.append(np.stack(full, -1)[::stride, ::stride])
    return np.stack(rows) + np.asarray(bias)


def linear(x, p):
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"])


def test_cnn_small_is_its_hand_written_forward(key, small):
    net = small("cnn_small", (8, 12, 2))
    x = jax.random.uniform(key, (3, 8, 12, 2))
    p = net.params
    z = np.maximum(convolve(x, p["conv1"]["kernel"], p["conv1"]["bias"], 2, 1), 0)
    z = np.maximum(convolve(z, p["conv2"]["kernel"], p["conv2"]["bias"], 2, 1), 0)
    assert z.shape == (3, 2, 3, 32) and p["dense1"]["kernel"].shape == (192, 100)
    want = linear(np.maximum(linear(z.reshape(3, -1), p["dense1"]), 0), p["dense2"])
    np.testing.assert_allclose(models.model(net)(x), want, atol=1e-5)


def test_cnn_madry_is_its_hand_written_forward(key, small):
    net = small("cnn_madry", (6, 8, 1), channels=(3, 4), hidden=5)
    x = jax.random.uniform(key, (2, 6, 8, 1))
    p = net.params

    def pool(z):
        z = np.pad(z, ((0, 0), (0, z.shape[1] % 2), (0, z.shape[2] % 2), (0, 0)), constant_values=-np.inf)
        return z.reshape(z.shape[0], z.shape[1] // 2, 2, z.shape[2] // 2, 2, -1).max((2, 4))

    z = pool(np.maximum(convolve(x, p["conv1"]["kernel"], p["conv1"]["bias"], 1, 2), 0))
    z = pool(np.maximum(convolve(z, p["conv2"]["kernel"], p["conv2"]["bias"], 1, 2), 0))
    want = linear(np.maximum(linear(z.reshape(2, -1), p["dense1"]), 0), p["dense2"])
    np.testing.assert_allclose(models.model(net)(x), want, atol=1e-5)


def test_mlp_is_its_hand_written_forward_for_any_input_shape(key, small):
    net = small("mlp", (5,), widths=(4, 3), activation="silu")
    x = jax.random.normal(key, (6, 5))
    z, p = np.asarray(x, np.float64), net.params["layers"]
    for layer in "01":
        z = linear(z, p[layer])
        z = z / (1 + np.exp(-z))
    np.testing.assert_allclose(models.model(net)(x), linear(z, p["2"]), atol=1e-5)
    flat = models.create("mlp", key, shape=(2, 3), classes=2, widths=())
    z = jax.random.normal(key, (4, 2, 3))
    np.testing.assert_allclose(
        models.model(flat)(z), linear(np.asarray(z).reshape(4, 6), flat.params["layers"]["0"]), atol=1e-6
    )


def test_published_sizes():
    assert count("cnn_small", shape=(28, 28, 1)) == (16 * 16 + 16) + (16 * 16 * 32 + 32) + (32 * 49 * 100 + 100) + 1010
    assert count("cnn_madry", shape=(28, 28, 1)) == 3_274_634  # the MNIST challenge's network
    assert count("mlp", shape=(28, 28, 1), widths=(256, 256)) == 784 * 256 + 256 + 256 * 257 + 2570


@pytest.mark.parametrize("name", models.NETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_network_takes_every_image_shape(name, shape, key, small):
    x = jax.random.uniform(key, (2, *shape))
    logits = jax.eval_shape(lambda x: models.model(small(name, shape, classes=7))(x), x)
    assert logits.shape == (2, 7) and logits.dtype == jnp.float32


@pytest.mark.parametrize("name", models.NETS)
def test_every_network_refuses_other_inputs_at_trace_time(name, small):

    def ask(x):  # traced only
        return jax.eval_shape(lambda x: models.model(small(name, (28, 28, 1)))(x), x)

    nchw = r"expected \[b, 28, 28, 1\] \(NHWC\), got \[b, 1, 28, 28\]: channels-first\? use x\.transpose\(0, 2, 3, 1\)"
    with pytest.raises(ValueError, match=nchw):
        ask(jnp.zeros((4, 1, 28, 28)))
    with pytest.raises(ValueError, match=r"got \[b, 28, 28, 3\]"):
        ask(jnp.zeros((4, 28, 28, 3)))
    with pytest.raises(ValueError, match=r"got \[28, 28, 1\]: a single example\? use x\[None\]"):
        ask(jnp.zeros((28, 28, 1)))
    with pytest.raises(TypeError, match="Pass x / 255"):
        ask(jnp.zeros((4, 28, 28, 1), jnp.uint8))


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_every_network_has_every_norm_and_trains_in_it(name, norm, key, small):
    net = small(name, norm=norm)
    x = jax.random.uniform(key, (4, 8, 8, 1))

    @jax.jit
    def train(params, state, x):
        def loss(p):
            logits, new = net.apply(p, state, x, bn="train", key=key)
            return jnp.square(logits).sum(), (logits, new)

        grads, (logits, new) = jax.grad(loss, has_aux=True)(params)
        return logits, new, grads

    logits, state, grads = train(net.params, net.state, x)
    assert jax.tree.structure(state) == jax.tree.structure(net.state)
    assert bool(net.state) == (norm == "batch")
    moved = [bool((a != b).any()) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(net.state))]
    assert all(moved)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    if norm != "batch":  # rows do not see each other
        np.testing.assert_allclose(jax.jit(models.model(net))(x[:1]), logits[:1], atol=1e-5)


@pytest.mark.parametrize("name", RUN)
def test_half_precision_computes_in_half_and_answers_in_float32(name, key, small):
    net = small(name, norm="batch")
    x = jax.random.uniform(key, (8, 8, 8, 1))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), net.params)
    train = jax.jit(lambda p, x: net.apply(p, net.state, x, bn="train"))
    logits, state = train(half, x.astype(jnp.bfloat16))
    assert logits.dtype == jnp.float32 and all(s.dtype == jnp.float32 for s in jax.tree.leaves(state))
    traced = str(jax.make_jaxpr(lambda p, x: net.apply(p, net.state, x)[0])(half, x.astype(jnp.bfloat16)))
    for line in traced.splitlines():
        if "conv_general_dilated" in line or "dot_general" in line:
            assert ":bf16[" in line.split("=")[0], line
    np.testing.assert_allclose(logits, train(net.params, x)[0], atol=0.15)


@pytest.mark.parametrize("name", RUN)
def test_normalization_sits_inside(name, key, small):
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    x = jax.random.uniform(key, (2, 8, 8, 3))
    inside, plain = small(name, (8, 8, 3), mean=mean, std=std), small(name, (8, 8, 3))
    z = (np.asarray(x) - np.array(mean, np.float32)) / np.array(std, np.float32)
    ask = jax.jit(lambda model, x: model(x))
    np.testing.assert_allclose(ask(models.model(inside), x), ask(models.model(plain), jnp.asarray(z)), atol=1e-5)
    one = small(name, (8, 8, 3), mean=0.5, std=0.25)
    np.testing.assert_allclose(ask(models.model(one), x), ask(models.model(plain), (x - 0.5) / 0.25), atol=1e-5)


def test_impossible_settings_are_refused(small):
    with pytest.raises(ValueError, match="one for each of the 3 channels; got 2"):
        small("mlp", (8, 8, 3), mean=(0.1, 0.2))
    with pytest.raises(ValueError, match="std must be finite and greater than 0"):
        small("mlp", std=0.0)
    with pytest.raises(ValueError, match="positive sizes of one example"):
        small("mlp", (0, 3))
    with pytest.raises(ValueError, match="classes must be a whole number of at least 2"):
        small("mlp", classes=1)
    with pytest.raises(ValueError, match=r"shape \(height, width, channels\); got \(64,\)"):
        small("cnn_small", (64,))
    with pytest.raises(ValueError, match="large enough for its strides"):
        small("cnn_small", (2, 2, 1))
    with pytest.raises(ValueError, match="unknown activation 'rellu'. Did you mean 'relu'"):
        small("mlp", activation="rellu")
    with pytest.raises(ValueError, match="unknown norm"):
        normalizer(4, "layer")
    with pytest.raises(ValueError, match="unknown init"):
        dense(2, 3, init="xavier", rngs=nnx.Rngs(0))
    assert image_shape("cnn", [4, 5, 6]) == (4, 5, 6)
    assert set(INITS) == {"torch", "kaiming_normal"} and set(ACTIVATIONS) == {"relu", "silu"}


def test_a_network_of_ones_own_inherits_the_checks():
    class Sum(Net):
        def forward(self, x):
            return jnp.stack([x.sum((1, 2, 3)), 0 * x[:, 0, 0, 0]], -1)

    net = models.from_nnx(Sum((2, 2, 1), 2, mean=1.0))
    np.testing.assert_allclose(net(jnp.full((1, 2, 2, 1), 3.0)), [[8.0, 0.0]])
    with pytest.raises(ValueError, match=r"got \[b, 1, 2, 2\]"):
        net(jnp.zeros((1, 1, 2, 2)))
    with pytest.raises(TypeError, match="must define forward"):
        Net((2,), 2)(jnp.zeros((1, 2)))
    assert issubclass(MLP, Net) and issubclass(SmallCNN, Net) and issubclass(MadryCNN, Net)


def test_torch_initialization_has_its_bounds_and_spread(key):
    kernel = torch_uniform(key, (4, 4, 16, 64))
    bound = 1 / math.sqrt(256)
    assert np.abs(kernel).max() <= bound and np.abs(kernel).max() > 0.99 * bound
    np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.02)
    layer = conv(16, 64, 4, rngs=nnx.Rngs(0))
    assert 0.9 * bound < np.abs(layer.bias[...]).max() <= bound
    flat = dense(400, 300, rngs=nnx.Rngs(0))
    assert np.abs(flat.kernel[...]).max() <= 0.05 and 0.045 < np.abs(flat.bias[...]).max() <= 0.05


def test_kaiming_normal_has_gradaligns_deviations_and_zero_biases(key):
    np.testing.assert_allclose(kaiming_normal(key, (3, 3, 32, 64)).std(), math.sqrt(2 / (9 * 64)), rtol=0.02)
    np.testing.assert_allclose(kaiming_normal(key, (200, 300)).std(), math.sqrt(2 / 200), rtol=0.02)
    for layer in (
        conv(3, 4, 3, init="kaiming_normal", rngs=nnx.Rngs(0)),
        dense(3, 4, init="kaiming_normal", rngs=nnx.Rngs(0)),
    ):
        assert (layer.bias[...] == 0).all()
