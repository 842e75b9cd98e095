"""Residual networks with pre-activation, in the variants that robust training has published under one name.

"PreActResNet-18" names several networks; two arguments tell them apart.

| source | `shortcut` | `final_norm` |
| --- | --- | --- |
| fast_adversarial, N-FGSM | `'raw'` | True |
| Rice et al. 2020 (robust overfitting), AWP | `'preact'` | True |
| GradAlign | `'raw'` | False |

`'raw'` feeds the projection shortcut with the block's input, `'preact'` with the normalized and activated input.
"""

from functools import partial

import jax.numpy as jnp
from flax import nnx

from jaxadv.core import check
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
                x = block(x)
        for block, gate in zip(getattr(self, f"layer{self.stages}"), self.gates):
            x = gate(block(x))
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
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, 28, 34, ...); got {depth!r}. WRN-28-10 has depth 28.")
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
