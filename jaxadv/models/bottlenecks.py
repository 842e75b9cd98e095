"""The residual network of large images: blocks of three convolutions, activation after the sum.

What lives here: `resnet50` in the form that robust ImageNet training uses. What does not: pre-activation networks for
small images (`resnets.py`).
"""

import jax.numpy as jnp
from flax import nnx

from jaxadv.core import check, landmark
from jaxadv.models.nets import ACTIVATIONS, Net, conv, dense, image_shape, normalizer


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions, each with norm, beside a shortcut that is the identity or a 1x1 convolution.

    The stride is that of the 3x3 convolution, and the block hands on four times as many channels as its 3x3 convolution
    has. With `norm='none'` convolutions have biases and the branch is multiplied by a learned number that starts at
    zero, as in `resnets.Block`.
    """

    def __init__(self, inputs, width, stride, *, norm, activation, init, rngs: nnx.Rngs):
        free, outputs = norm == "none", 4 * width
        self.conv1 = conv(inputs, width, 1, bias=free, init=init, rngs=rngs)
        self.bn1 = normalizer(width, norm)
        self.conv2 = conv(width, width, 3, stride=stride, padding=1, bias=free, init=init, rngs=rngs)
        self.bn2 = normalizer(width, norm)
        self.conv3 = conv(width, outputs, 1, bias=free, init=init, rngs=rngs)
        self.bn3 = normalizer(outputs, norm)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = conv(inputs, outputs, 1, stride=stride, bias=free, init=init, rngs=rngs)
            self.bn0 = normalizer(outputs, norm)
        self.free = free
        if free:
            self.gain = nnx.Param(jnp.zeros(1))
        self.activation = activation

    def __call__(self, x):
        """Return the block's output for `x` `[b, h, w, c]`."""
        side = self.bn0(self.shortcut(x)) if self.projects else x
        x = self.activation(self.bn1(self.conv1(x)))
        x = self.activation(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        if self.free:
            x = x * self.gain[...].reshape(1, 1, 1, 1)
        return self.activation(side + x)


class ResNet50(Net):
    """The residual network of 50 layers for large images; 25,557,032 parameters at width 64 for 1,000 classes.

    A 7x7 convolution of stride 2, max pooling of 3x3 and stride 2, four stages of `Bottleneck`, global mean, dense: the
    variant with its strides on 3x3 convolutions ("v1.5"), whose weights most collections store.

    Args:
      shape: (height, width, channels).
      classes: number of classes.
      mean: see `Net`.
      std: see `Net`.
      width: channels of the first stage's 3x3 convolutions (64 as published); the others have 2, 4 and 8 times as many.
      depths: blocks of each stage; (3, 4, 23, 3) are 101 layers.
      norm: `'batch'` (default), `'group'` or `'none'`.
      activation: `'relu'` (default) or `'silu'`.
      init: `'torch'` (default) or `'kaiming_normal'` (as published).
      rngs: randomness of the weights.

    References:
      He et al. 2016, Deep residual learning for image recognition, table 1, arXiv:1512.03385; the place of the stride:
      Goyal et al. 2017, Accurate, large minibatch SGD, arXiv:1706.02677, 5.1.
    """

    def __init__(
        self,
        shape,
        classes,
        mean=None,
        std=None,
        *,
        width=64,
        depths=(3, 4, 6, 3),
        norm="batch",
        activation="relu",
        init="torch",
        rngs: nnx.Rngs,
    ):
        super().__init__(shape, classes, mean, std)
        inputs = image_shape("resnet50", shape)[2]
        check.whole("width", width)
        if not depths:
            raise ValueError(
                f"depths must hold a number of blocks for each stage; got {depths}. (3, 4, 6, 3) is usual."
            )
        self.activation = check.choice("activation", activation, ACTIVATIONS)
        self.conv1 = conv(inputs, width, 7, stride=2, padding=3, bias=norm == "none", init=init, rngs=rngs)
        self.bn1 = normalizer(width, norm)
        channels, self.stages = width, len(depths)
        for stage, depth in enumerate(depths):
            check.whole("depths", depth)
            blocks = []
            for place in range(depth):
                stride = 2 if stage > 0 and place == 0 else 1
                settings = {"norm": norm, "activation": self.activation, "init": init}
                blocks.append(Bottleneck(channels, width * 2**stage, stride, **settings, rngs=rngs))
                channels = 4 * width * 2**stage
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
        self.linear = dense(channels, classes, init=init, rngs=rngs)

    def forward(self, x):
        """Return logits from the normalized input."""
        x = self.activation(self.bn1(self.conv1(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for stage in range(1, self.stages + 1):
            for block in getattr(self, f"layer{stage}"):
                x = landmark(block(x))
        return self.linear(x.mean((1, 2)))
