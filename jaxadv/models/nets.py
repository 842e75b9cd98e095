"""Small networks, and what all bundled networks share: input checks, normalization inside the model, initialization.

What lives here: `Net` (the base of every bundled network), the layers' builders, multilayer perceptrons and two small
convolutional networks. What does not: residual networks (`resnets.py`), the table of names (`create.py`).

Images are channels-last, `[b, h, w, c]`, in the range of the data. A network of any other input shape than the one it
was built for refuses at trace time.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxadv.core import check
from jaxadv.models.channels import gates
from jaxadv.models.norms import NORMS

ACTIVATIONS: dict[str, Callable] = {"relu": jax.nn.relu, "silu": jax.nn.silu}
"""Name of an activation to the function."""


def torch_uniform(key, shape, dtype=jnp.float32):
    """Draw a kernel as PyTorch does by default: Kaiming-uniform with a = sqrt(5), which is U(-1, 1) / sqrt(fan_in).

    Args:
      key: a typed key.
      shape: `[..., inputs, outputs]`.
      dtype: of the result.

    Returns:
      The kernel.
    """
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def kaiming_normal(key, shape, dtype=jnp.float32):
    """Draw a kernel as GradAlign and the wide residual networks do.

    Args:
      key: a typed key.
      shape: `[h, w, inputs, outputs]`, drawn from N(0, 2 / (h w outputs)), or `[inputs, outputs]`, from N(0, 2 /
        inputs).
      dtype: of the result.

    Returns:
      The kernel.

    References:
      Andriushchenko and Flammarion 2020, Understanding and improving fast adversarial training, arXiv:2007.02617
      (code).
    """
    fan = shape[0] if len(shape) == 2 else math.prod(shape[:2]) * shape[-1]
    return math.sqrt(2 / fan) * jax.random.normal(key, shape, dtype)


INITS: dict[str, Callable] = {"torch": torch_uniform, "kaiming_normal": kaiming_normal}
"""Name of an initialization to what draws a kernel. Biases: U(-1, 1) / sqrt(fan_in) for `torch`, else 0."""


def _draw_bias(layer, init: str, rngs: nnx.Rngs):
    kernel = layer.kernel[...]
    if init == "torch" and layer.bias is not None:
        bound = 1 / math.sqrt(math.prod(kernel.shape[:-1]))
        layer.bias[...] = jax.random.uniform(rngs.params(), kernel.shape[-1:], kernel.dtype, -bound, bound)
    return layer


def conv(
    inputs: int, outputs: int, size: int, *, stride=1, padding=0, bias=True, init="torch", rngs: nnx.Rngs
) -> nnx.Conv:
    """Build a square convolution.

    Args:
      inputs: input channels.
      outputs: output channels.
      size: side of the kernel.
      stride: stride in both directions.
      padding: zeros on each of the four sides.
      bias: whether it has a bias.
      init: one of `INITS`.
      rngs: where the randomness comes from.

    Returns:
      The layer.
    """
    layer = nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        use_bias=bias,
        kernel_init=check.choice("init", init, INITS),
        rngs=rngs,
    )
    return _draw_bias(layer, init, rngs)


def dense(inputs: int, outputs: int, *, init="torch", rngs: nnx.Rngs) -> nnx.Linear:
    """Build a fully connected layer with bias.

    Args:
      inputs: input features.
      outputs: output features.
      init: one of `INITS`.
      rngs: where the randomness comes from.

    Returns:
      The layer.
    """
    layer = nnx.Linear(inputs, outputs, kernel_init=check.choice("init", init, INITS), rngs=rngs)
    return _draw_bias(layer, init, rngs)


def normalizer(features: int, norm: str) -> nnx.Module:
    """Build a normalization layer.

    Args:
      features: number of channels.
      norm: `'batch'`, `'group'` or `'none'`.

    Returns:
      The layer.
    """
    return check.choice("norm", norm, NORMS)(features)


def _per_channel(name: str, value, channels: int) -> tuple[float, ...] | None:
    if value is None:
        return None
    values = (
        tuple(float(v) for v in value) if isinstance(value, Sequence) or getattr(value, "ndim", 0) else (float(value),)
    )
    if len(values) not in (1, channels):
        raise ValueError(
            f"{name} must be one number or one for each of the {channels} channels; got {len(values)} numbers. "
            "Are the channels the last entry of shape?"
        )
    return values if len(values) == channels else values * channels


class Net(nnx.Module):
    """The base of the bundled networks: checks the input, normalizes it, and calls `forward`.

    Args:
      shape: shape of one example, channels last, e.g. (28, 28, 1).
      classes: number of classes, at least 2.
      mean: subtracted from the input, one number or one for each channel; None for 0.
      std: divides the input after that; None for 1.

    Raises:
      ValueError: on an impossible shape, class count, mean or std; when called, on inputs of another shape.
    """

    def __init__(self, shape: Sequence[int], classes: int, mean=None, std=None):
        if not shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
            raise ValueError(f"shape must hold the positive sizes of one example, e.g. (28, 28, 1); got {shape!r}.")
        check.whole("classes", classes, 2)
        self.shape, self.classes = tuple(shape), classes
        self.mean_in, self.std_in = _per_channel("mean", mean, shape[-1]), _per_channel("std", std, shape[-1])
        if self.std_in is not None:
            check.positive("std", self.std_in)

    def __call__(self, x):
        """Return logits `[b, classes]` from `x` `[b, *shape]` in the range of the data."""
        self._check(x)
        columns = (1,) * (x.ndim - 1) + (-1,)
        if self.mean_in is not None:
            x = x - jnp.asarray(self.mean_in, x.dtype).reshape(columns)
        if self.std_in is not None:
            x = x / jnp.asarray(self.std_in, x.dtype).reshape(columns)
        return self.forward(x)

    @classmethod
    def flattened(cls, shape: Sequence[int]) -> tuple[str, tuple[int, ...]] | None:
        """Return the layer that reads a flattened image and that image's height and width, or None."""
        return None

    def forward(self, x):
        """Return logits from the normalized input."""
        raise TypeError(f"{type(self).__name__} must define forward")

    def _check(self, x) -> None:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x must be floating point; got {x.dtype}. Bytes? Pass x / 255.")
        if x.ndim > 0 and x.shape[1:] == self.shape:
            return
        want = ", ".join(["b", *map(str, self.shape)])
        image = len(self.shape) == 3
        if x.shape == self.shape:
            got, hint = ", ".join(map(str, x.shape)), "a single example? use x[None]"
        else:
            got = ", ".join(["b", *map(str, x.shape[1:])])
            hint = "another data set? build the network with the shape of one example"
            if image and x.shape[1:] == (self.shape[2], *self.shape[:2]):
                hint = "channels-first? use x.transpose(0, 2, 3, 1)"
        raise ValueError(f"expected [{want}]{' (NHWC)' if image else ''}, got [{got}]: {hint}")


def image_shape(name: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """Refuse anything but the shape of an image.

    Args:
      name: of the network, for the message.
      shape: shape of one example.

    Returns:
      Height, width, channels.

    Raises:
      ValueError: if `shape` has not three entries.
    """
    if len(shape) != 3:
        raise ValueError(f"{name} must have shape (height, width, channels); got {tuple(shape)}. No images? Use 'mlp'.")
    return shape[0], shape[1], shape[2]


class MLP(Net):
    """A multilayer perceptron on the flattened example; any input shape.

    Args:
      shape: shape of one example.
      classes: number of classes.
      mean: see `Net`.
      std: see `Net`.
      widths: hidden widths; () is a linear model.
      norm: normalization before each activation, `'batch'`, `'group'` or `'none'` (default).
      activation: `'relu'` (default) or `'silu'`.
      init: `'torch'` (default, PyTorch's Kaiming-uniform) or `'kaiming_normal'`.
      rngs: randomness of the weights.
    """

    def __init__(
        self,
        shape,
        classes,
        mean=None,
        std=None,
        *,
        widths=(256, 256),
        norm="none",
        activation="relu",
        init="torch",
        rngs: nnx.Rngs,
    ):
        super().__init__(shape, classes, mean, std)
        for width in widths:
            check.whole("widths", width)
        sizes = [math.prod(shape), *widths, classes]
        self.layers = nnx.List([dense(a, b, init=init, rngs=rngs) for a, b in zip(sizes, sizes[1:])])
        self.norms = nnx.List([normalizer(width, norm) for width in widths])
        self.activation = check.choice("activation", activation, ACTIVATIONS)

    @classmethod
    def flattened(cls, shape) -> tuple[str, tuple[int, ...]]:
        """Return the layer that reads a flattened image, and the image's height and width."""
        return "layers.0", tuple(shape[:-1])

    def forward(self, x):
        """Return logits from the normalized input."""
        x = x.reshape(x.shape[0], -1)
        for layer, norm in zip(self.layers, self.norms):
            x = self.activation(norm(layer(x)))
        return self.layers[-1](x)


class TwoConvolutions(Net):
    """What the small convolutional networks share; a subclass gives `_grid`, `_after`, and calls `_layers`."""

    def _layers(self, name, channels, hidden, *, norm, activation, init, rngs: nnx.Rngs, **kernel):
        """Make two convolutions of one `kernel`, their norms, and two dense layers."""
        inputs, side, (first, second) = image_shape(name, self.shape)[2], self._grid(self.shape), channels
        if min(side) < 1:
            raise ValueError(
                f"{name} must have images large enough for its strides; got shape {self.shape}. Use 'mlp'."
            )
        self.conv1 = conv(inputs, first, **kernel, init=init, rngs=rngs)
        self.norm1 = normalizer(first, norm)
        self.conv2 = conv(first, second, **kernel, init=init, rngs=rngs)
        self.norm2 = normalizer(second, norm)
        self.dense1 = dense(side[0] * side[1] * second, hidden, init=init, rngs=rngs)
        self.dense2 = dense(hidden, self.classes, init=init, rngs=rngs)
        self.activation = check.choice("activation", activation, ACTIVATIONS)

    @staticmethod
    def _grid(shape) -> tuple[int, int]:
        """Height and width that the first dense layer reads."""
        raise TypeError("a subclass of TwoConvolutions must define _grid")

    def _after(self, place: int, x):
        """What follows the activation of a convolution."""
        raise TypeError(f"{type(self).__name__} must define _after")

    @classmethod
    def flattened(cls, shape) -> tuple[str, tuple[int, ...]]:
        """Return the layer that reads a flattened image, and that image's height and width."""
        return "dense1", cls._grid(shape)

    def forward(self, x):
        """Return logits from the normalized input."""
        x = self._after(0, self.activation(self.norm1(self.conv1(x))))
        x = self._after(1, self.activation(self.norm2(self.conv2(x))))
        x = self.activation(self.dense1(x.reshape(x.shape[0], -1)))
        return self.dense2(x)


class SmallCNN(TwoConvolutions):
    """Two strided convolutions and a dense layer: the MNIST network of fast adversarial training.

    Convolutions of 16 and 32 channels, 4x4, stride 2, padding 1; dense 100; dense classes. Works on images from 4x4 on.

    Args:
      shape: (height, width, channels).
      classes: number of classes.
      mean: see `Net`.
      std: see `Net`.
      channels: channels of the two convolutions.
      hidden: width of the dense layer.
      norm: normalization after each convolution, `'batch'`, `'group'` or `'none'` (default, as published).
      activation: `'relu'` (default) or `'silu'`.
      init: `'torch'` (default, as published) or `'kaiming_normal'`.
      gated: whether a channel gate follows each convolution's activation, see `channels.Gate`.
      rngs: randomness of the weights.

    References:
      Wong, Rice and Kolter 2020, Fast is better than free, arXiv:2001.03994; code locuslab/fast_adversarial,
      MNIST/mnist_net.py.
    """

    def __init__(
        self,
        shape,
        classes,
        mean=None,
        std=None,
        *,
        channels=(16, 32),
        hidden=100,
        norm="none",
        activation="relu",
        init="torch",
        gated=False,
        rngs: nnx.Rngs,
    ):
        super().__init__(shape, classes, mean, std)
        drawn = {"norm": norm, "activation": activation, "init": init, "rngs": rngs}
        self._layers("cnn_small", channels, hidden, size=4, stride=2, padding=1, **drawn)
        self.gates = gates(gated, channels, classes, dense=partial(dense, init=init, rngs=rngs))

    @staticmethod
    def _grid(shape) -> tuple[int, int]:
        return shape[0] // 2 // 2, shape[1] // 2 // 2

    def _after(self, place: int, x):
        return self.gates[place](x)


class MadryCNN(TwoConvolutions):
    """Two convolutions with pooling and a wide dense layer: the network of the MNIST challenge.

    Convolutions of 32 and 64 channels, 5x5, each followed by 2x2 max pooling (sides are rounded up); dense 1024; dense
    classes.

    Args:
      shape: (height, width, channels).
      classes: number of classes.
      mean: see `Net`.
      std: see `Net`.
      channels: channels of the two convolutions.
      hidden: width of the dense layer.
      norm: normalization after each convolution, `'batch'`, `'group'` or `'none'` (default, as published).
      activation: `'relu'` (default) or `'silu'`.
      init: `'torch'` (default; the original draws truncated normals of deviation 0.1) or `'kaiming_normal'`.
      rngs: randomness of the weights.

    References:
      Madry et al. 2018, Towards deep learning models resistant to adversarial attacks, arXiv:1706.06083; code
      MadryLab/mnist_challenge, model.py.
    """

    def __init__(
        self,
        shape,
        classes,
        mean=None,
        std=None,
        *,
        channels=(32, 64),
        hidden=1024,
        norm="none",
        activation="relu",
        init="torch",
        rngs: nnx.Rngs,
    ):
        super().__init__(shape, classes, mean, std)
        drawn = {"norm": norm, "activation": activation, "init": init, "rngs": rngs}
        self._layers("cnn_madry", channels, hidden, size=5, padding=2, **drawn)

    @staticmethod
    def _grid(shape) -> tuple[int, int]:
        return -(-shape[0] // 4), -(-shape[1] // 4)

    def _after(self, place: int, x):
        return nnx.max_pool(x, (2, 2), (2, 2), "SAME")
