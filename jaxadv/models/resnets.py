"""Residual networks with pre-activation, in the variants that robust training has published under one name.

"PreActResNet-18" names several networks; two arguments tell them apart.

| source | `shortcut` | `final_norm` |
| --- | --- | --- |
| fast_adversarial, N-FGSM | `'raw'` | True |
| Rice et al. 2020 (robust overfitting), AWP | `'preact'` | True |
| GradAlign | `'raw'` | False |

`'raw'` feeds the projection shortcut with the block's input, `'preact'` with the normalized and activated input.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxadv.core import check, landmark
from jaxadv.models.channels import gates
from jaxadv.models.nets import ACTIVATIONS, Net, conv, dense, image_shape, normalizer
from jaxadv.models.norms import Dropout

SHORTCUTS = ("raw", "preact")
"""What a projection shortcut reads."""


class Block(nnx.Module):
    """Norm, activation, 3x3 convolution, twice, beside a shortcut that is the identity or a 1x1 convolution.

    With `norm='none'` convolutions have biases and the branch is multiplied by a learned number that starts at zero,
    so that depth does not blow the signal up (De and Smith 2020, arXiv:2002.10444, "SkipInit").
    """

    def __init__(self, inputs, outputs, stride, *, shortcut, norm, activation, dropout, tag, init, rngs: nnx.Rngs):
        free = norm == "none"
        self.bn1 = normalizer(inputs, norm)
        self.conv1 = conv(inputs, outputs, 3, stride=stride, padding=1, bias=free, init=init, rngs=rngs)
        self.bn2 = normalizer(outputs, norm)
        self.conv2 = conv(outputs, outputs, 3, padding=1, bias=free, init=init, rngs=rngs)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = conv(inputs, outputs, 1, stride=stride, bias=False, init=init, rngs=rngs)
        self.free = free
        if free:
            self.gain = nnx.Param(jnp.zeros(1))
        self.preact = check.choice("shortcut", shortcut, SHORTCUTS) == "preact"
        self.dropout = Dropout(dropout, tag)
        self.activation = check.choice("activation", activation, ACTIVATIONS)

    def __call__(self, x):
        """Return the block's output for `x` `[b, h, w, c]`."""
        active = self.activation(self.bn1(x))
        side = x
        if self.projects:
            side = self.shortcut(active if self.preact else x)
        branch = self.dropout(self.activation(self.bn2(self.conv1(active))))
        branch = self.conv2(branch)
        if self.free:
            branch = branch * self.gain[...].reshape(1, 1, 1, 1)
        return side + branch


class ResNet(Net):
    """A stem convolution, stages of `Block`, an optional final norm and activation, global mean, dense."""

    def __init__(
        self,
        shape,
        classes,
        mean,
        std,
        *,
        name,
        stem,
        widths,
        depths,
        strides,
        shortcut,
        final_norm,
        norm,
        activation,
        dropout,
        stem_stride,
        gated,
        init,
        rngs: nnx.Rngs,
    ):
        super().__init__(shape, classes, mean, std)
        inputs = image_shape(name, shape)[2]
        check.whole("stem_stride", stem_stride)
        self.conv1 = conv(inputs, stem, 3, stride=stem_stride, padding=1, bias=norm == "none", init=init, rngs=rngs)
        channels, tag = stem, 0
        for stage, (width, depth, stride) in enumerate(zip(widths, depths, strides), 1):
            blocks = []
            for place in range(depth):
                blocks.append(
                    Block(
                        channels,
                        width,
                        stride if place == 0 else 1,
                        shortcut=shortcut,
                        norm=norm,
                        activation=activation,
                        dropout=dropout,
                        tag=tag,
                        init=init,
                        rngs=rngs,
                    )
                )
                channels, tag = width, tag + 1
            setattr(self, f"layer{stage}", nnx.List(blocks))
        self.stages = len(widths)
        self.gates = gates(gated, (channels,) * depths[-1], classes, dense=partial(dense, init=init, rngs=rngs))
        self.final_norm = final_norm
        if final_norm:
            self.bn = normalizer(channels, norm)
        self.linear = dense(channels, classes, init=init, rngs=rngs)
        self.activation = check.choice("activation", activation, ACTIVATIONS)

    def forward(self, x):
        """Return logits from the normalized input."""
        x = self.conv1(x)
        for stage in range(1, self.stages):
            for block in getattr(self, f"layer{stage}"):
                x = landmark(block(x))
        for block, gate in zip(getattr(self, f"layer{self.stages}"), self.gates):
            x = landmark(gate(block(x)))
        if self.final_norm:
            x = self.activation(self.bn(x))
        return self.linear(x.mean((1, 2)))


class PreActResNet18(ResNet):
    """The pre-activation residual network of 18 layers for small images; 11.17 M parameters at width 64 for CIFAR-10.

    Args:
      shape: (height, width, channels).
      classes: number of classes.
      mean: see `Net`.
      std: see `Net`.
      width: channels of the first stage (64 as published); the others have 2, 4 and 8 times as many.
      shortcut: `'raw'` (default, fast_adversarial) or `'preact'` (Rice et al., AWP).
      final_norm: whether norm and activation precede the global mean (default True; GradAlign: False).
      norm: `'batch'` (default), `'group'` or `'none'`.
      activation: `'relu'` (default) or `'silu'`.
      dropout: rate between the convolutions of a block; acts only if `apply` gets a key.
      stem_stride: stride of the first convolution (1 as published).
      gated: whether a channel gate follows each block of the last stage, see `channels.Gate`.
      init: `'torch'` (default, as fast_adversarial, Rice et al. and AWP) or `'kaiming_normal'` (GradAlign).
      rngs: randomness of the weights.

    References:
      He et al. 2016, Identity mappings in deep residual networks, arXiv:1603.05027. Wong et al. 2020,
      arXiv:2001.03994. Rice et al. 2020, arXiv:2002.11569. Andriushchenko and Flammarion 2020, arXiv:2007.02617.
    """

    def __init__(
        self,
        shape,
        classes,
        mean=None,
        std=None,
        *,
        width=64,
        shortcut="raw",
        final_norm=True,
        norm="batch",
        activation="relu",
        dropout=0.0,
        stem_stride=1,
        gated=False,
        init="torch",
        rngs: nnx.Rngs,
    ):
        check.whole("width", width)
        super().__init__(
            shape,
            classes,
            mean,
            std,
            name="preact_resnet18",
            stem=width,
            widths=(width, 2 * width, 4 * width, 8 * width),
            depths=(2, 2, 2, 2),
            strides=(1, 2, 2, 2),
            shortcut=shortcut,
            final_norm=final_norm,
            norm=norm,
            activation=activation,
            dropout=dropout,
            stem_stride=stem_stride,
            gated=gated,
            init=init,
            rngs=rngs,
        )


def _check_depth(depth) -> None:
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, 28, 34, ...); got {depth!r}. WRN-28-10 has depth 28.")


class WideResNet(ResNet):
    """A wide residual network, WRN-depth-width; WRN-28-10 has 36.48 M parameters for CIFAR-10.

    Args:
      shape: (height, width, channels).
      classes: number of classes.
      mean: see `Net`.
      std: see `Net`.
      depth: 6 n + 4, with n blocks in each of three stages (28 by default).
      width: the stages have 16, 32 and 64 times this many channels (10 by default).
      shortcut: `'preact'` (default, as published and in TRADES) or `'raw'`.
      final_norm: whether norm and activation precede the global mean (True as published).
      norm: `'batch'` (default), `'group'` or `'none'`.
      activation: `'relu'` (default) or `'silu'` (Gowal et al. 2020).
      dropout: rate between the convolutions of a block (N-FGSM: 0.3); acts only if `apply` gets a key.
      stem_stride: stride of the first convolution (1 as published).
      gated: whether a channel gate follows each block of the last stage, see `channels.Gate`.
      init: `'torch'` (default) or `'kaiming_normal'` (TRADES).
      rngs: randomness of the weights.

    References:
      Zagoruyko and Komodakis 2016, Wide residual networks, arXiv:1605.07146. Zhang et al. 2019, arXiv:1901.08573
      (code). Gowal et al. 2020, Uncovering the limits of adversarial training, arXiv:2010.03593.
    """

    def __init__(
        self,
        shape,
        classes,
        mean=None,
        std=None,
        *,
        depth=28,
        width=10,
        shortcut="preact",
        final_norm=True,
        norm="batch",
        activation="relu",
        dropout=0.0,
        stem_stride=1,
        gated=False,
        init="torch",
        rngs: nnx.Rngs,
    ):
        check.whole("width", width)
        _check_depth(depth)
        super().__init__(
            shape,
            classes,
            mean,
            std,
            name="wide_resnet",
            stem=16,
            widths=(16 * width, 32 * width, 64 * width),
            depths=((depth - 4) // 6,) * 3,
            strides=(1, 2, 2),
            shortcut=shortcut,
            final_norm=final_norm,
            norm=norm,
            activation=activation,
            dropout=dropout,
            stem_stride=stem_stride,
            gated=gated,
            init=init,
            rngs=rngs,
        )


class StandardizedConv(nnx.Module):
    """A convolution whose kernel has mean 0 and norm `gain` for each output channel; biases start at 0, gains at 1.

    `W' = gain (W - mean) / sqrt(max(var n, 1e-4))` with mean and biased variance over the `n = size^2 inputs` entries
    of an output channel; padding `SAME`.

    Args:
      inputs: input channels.
      outputs: output channels.
      size: side of the kernel.
      stride: in both directions.
      rngs: randomness of the kernel, N(0, 1/n).

    References:
      Qiao et al. 2019, Micro-batch training with batch-channel normalization and weight standardization,
      arXiv:1903.10520; Brock et al. 2021, arXiv:2101.08692 (the gain); De et al. 2022, arXiv:2204.13650.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, rngs: nnx.Rngs):
        shape = (size, size, inputs, outputs)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) / math.sqrt(math.prod(shape[:3])))
        self.gain = nnx.Param(jnp.ones(outputs))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.stride = stride

    def __call__(self, x):
        """Convolve `x` `[b, h, w, inputs]`."""
        kernel = self.kernel[...].astype(jnp.promote_types(x.dtype, jnp.float32))
        center = kernel - kernel.mean((0, 1, 2), keepdims=True)
        spread = jnp.square(center).sum((0, 1, 2), keepdims=True)  # var n
        gain, bias = (v[...].reshape(1, 1, 1, -1) for v in (self.gain, self.bias))
        kernel = center * gain.astype(kernel.dtype) * lax.rsqrt(jnp.maximum(spread, 1e-4))
        strides = (self.stride, self.stride)
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, kernel.astype(x.dtype), strides, "SAME", dimension_numbers=numbers)
        return x + bias.astype(x.dtype)


class PrivateBlock(nnx.Module):
    """Activation, norm, 3x3 convolution, twice, beside the identity or activation, norm, 1x1 convolution."""

    def __init__(self, inputs, outputs, stride, *, projects, norm, activation, rngs: nnx.Rngs):
        self.norm1, self.norm2 = normalizer(inputs, norm), normalizer(outputs, norm)
        self.conv1 = StandardizedConv(inputs, outputs, 3, stride=stride, rngs=rngs)
        self.conv2 = StandardizedConv(outputs, outputs, 3, rngs=rngs)
        self.projects = projects
        if projects:
            self.norm0 = normalizer(inputs, norm)
            self.shortcut = StandardizedConv(inputs, outputs, 1, stride=stride, rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        """Return the block's output for `x` `[b, h, w, c]`."""
        side = self.shortcut(self.norm0(self.activation(x))) if self.projects else x
        x = self.conv1(self.norm1(self.activation(x)))
        return side + self.conv2(self.norm2(self.activation(x)))


class PrivateWideResNet(Net):
    """The wide residual network of differentially private training: no state, every example on its own.

    It differs from `WideResNet` in the order activation, norm, convolution, in weight standardization with learned
    gains and biases, in norms of 16 groups, and in a projection on the first shortcut of every stage. WRN-16-4 has
    2.75 M parameters, WRN-40-4 8.96 M.

    Args:
      shape: (height, width, channels).
      classes: number of classes.
      mean: see `Net`.
      std: see `Net`.
      depth: 6 n + 4, with n blocks in each of three stages (16 or 40 as published).
      width: the stages have 16, 32 and 64 times this many channels (4 as published).
      norm: `'group'` (default, as published), `'none'`; `'batch'` mixes examples and is of no use here.
      activation: `'relu'` (default) or `'silu'`.
      init: of the last layer, see `nets.INITS`; kernels of convolutions are drawn from N(0, 1 / fan_in).
      rngs: randomness of the weights.

    References:
      De et al. 2022, Unlocking high-accuracy differentially private image classification through scale,
      arXiv:2204.13650, section 3 and the official code.
    """

    def __init__(
        self,
        shape,
        classes,
        mean=None,
        std=None,
        *,
        depth=16,
        width=4,
        norm="group",
        activation="relu",
        init="torch",
        rngs: nnx.Rngs,
    ):
        super().__init__(shape, classes, mean, std)
        inputs = image_shape("wide_resnet_private", shape)[2]
        check.whole("width", width)
        _check_depth(depth)
        self.activation = check.choice("activation", activation, ACTIVATIONS)
        self.conv1 = StandardizedConv(inputs, 16, 3, rngs=rngs)
        blocks, channels = [], 16
        for outputs, stride in zip((16 * width, 32 * width, 64 * width), (1, 2, 2)):
            for place in range((depth - 4) // 6):
                first = {"stride": stride if place == 0 else 1, "projects": place == 0}
                blocks.append(
                    PrivateBlock(channels, outputs, **first, norm=norm, activation=self.activation, rngs=rngs)
                )
                channels = outputs
        self.blocks = nnx.List(blocks)
        self.norm = normalizer(channels, norm)
        self.linear = dense(channels, classes, init=init, rngs=rngs)

    def forward(self, x):
        """Return logits from the normalized input."""
        x = self.conv1(x)
        for block in self.blocks:
            x = landmark(block(x))
        return self.linear(self.norm(self.activation(x)).mean((1, 2)))
