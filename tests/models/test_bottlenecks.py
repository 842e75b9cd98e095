"""ResNet-50: its published size, a forward pass in NumPy from weights under torchvision's names, training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import losses, models

SMALL = {"width": 2, "depths": (1, 2, 1)}
SHAPE = (36, 28, 3)


def torch_arrays(key="module.", classes=5):
    """Weights of a small network under the names of torchvision's state dicts, channels first."""
    rng, arrays = np.random.default_rng(0), {}

    def conv(name, outputs, inputs, size):
        arrays[f"{name}.weight"] = rng.normal(0, 1 / np.sqrt(inputs * size**2), (outputs, inputs, size, size))

    def norm(name, channels):
        for part, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            arrays[f"{name}.{part}"] = rng.uniform(low, low + 1, channels)
        arrays[f"{name}.num_batches_tracked"] = np.asarray(7)

    conv("conv1", 2, 3, 7)
    norm("bn1", 2)
    inputs = 2
    for stage, depth in enumerate(SMALL["depths"]):
        width = 2 * 2**stage
        for place in range(depth):
            at = f"layer{stage + 1}.{place}"
            for i, (outs, ins, size) in enumerate(((width, inputs, 1), (width, width, 3), (4 * width, width, 1)), 1):
                conv(f"{at}.conv{i}", outs, ins, size)
                norm(f"{at}.bn{i}", outs)
            if place == 0:
                conv(f"{at}.downsample.0", 4 * width, inputs, 1)
                norm(f"{at}.downsample.1", 4 * width)
            inputs = 4 * width
    arrays["fc.weight"], arrays["fc.bias"] = rng.normal(size=(classes, inputs)), rng.normal(size=classes)
    return {key + name: np.asarray(value, np.float32) for name, value in arrays.items()}


def forward(arrays, x):
    """The network in NumPy, channels first, in float64."""
    w = {k.removeprefix("module."): np.asarray(v, np.float64) for k, v in arrays.items()}

    def windows(x, size, stride, pad, fill=0.0):
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=fill)
        return np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))[:, :, ::stride, ::stride]

    def conv(name, x, stride=1, pad=0):
        kernel = w[f"{name}.weight"]
        return np.einsum("bihwrs,oirs->bohw", windows(x, kernel.shape[-1], stride, pad), kernel)

    def norm(name, x):
        scale, bias, mean, var = (
            w[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    relu = lambda x: np.maximum(x, 0)  # noqa: E731
    x = relu(norm("bn1", conv("conv1", x, 2, 3)))
    x = windows(x, 3, 2, 1, -np.inf).max((-2, -1))
    for stage, depth in enumerate(SMALL["depths"]):
        for place in range(depth):
            at, stride = f"layer{stage + 1}.{place}", 2 if stage and not place else 1
            side = norm(f"{at}.downsample.1", conv(f"{at}.downsample.0", x, stride)) if place == 0 else x
            x = relu(norm(f"{at}.bn1", conv(f"{at}.conv1", x)))
            x = relu(norm(f"{at}.bn2", conv(f"{at}.conv2", x, stride, 1)))
            x = relu(side + norm(f"{at}.bn3", conv(f"{at}.conv3", x)))
    return x.mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]


def test_logits_are_those_of_numpy_from_weights_under_torchvisions_names():
    x = np.random.default_rng(1).uniform(0, 1, (2, *SHAPE)).astype(np.float32)
    arrays = torch_arrays()
    net = models.from_torch_arrays(models.make_spec("resnet50", shape=SHAPE, classes=5, **SMALL), arrays)
    got = jax.jit(models.model(net))(x)
    np.testing.assert_allclose(got, forward(arrays, x.transpose(0, 3, 1, 2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "size"), [({}, 25_557_032), ({"depths": (3, 4, 23, 3)}, 44_549_160), ({"width": 128}, 98_004_072)]
)
def test_its_size_is_the_published_one(options, size):
    made = jax.eval_shape(
        lambda k: models.create("resnet50", k, shape=(224, 224, 3), classes=1000, **options), jax.random.key(0)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(made.params)) == size


def test_it_trains_and_without_normalization_begins_as_its_shortcuts():
    small = {"width": 2, "depths": (1, 1), "norm": "none"}
    net = models.create("resnet50", jax.random.key(0), shape=(32, 32, 1), classes=3, **small)
    x, y = jax.random.uniform(jax.random.key(1), (6, 32, 32, 1)), jnp.arange(6) % 3

    @jax.jit
    def step(params):
        loss = lambda p: losses.cross_entropy(net.apply(p, net.state, x)[0], y).mean()  # noqa: E731
        value, slope = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)

    value, params = step(net.params)
    for _ in range(30):
        last, params = step(params)
    assert float(last) < float(value)
    for block in (params["layer1"]["0"], params["layer2"]["0"]):
        assert float(jnp.abs(block["gain"]).sum()) > 0 and "bias" in block["conv1"]


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="depths must hold a number of blocks"):
        models.create("resnet50", jax.random.key(0), shape=(32, 32, 3), classes=3, depths=())
    with pytest.raises(ValueError, match="resnet50 must have shape"):
        models.create("resnet50", jax.random.key(0), shape=(32,), classes=3)
