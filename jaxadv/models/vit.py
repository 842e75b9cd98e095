"""A small vision transformer: no batch statistics and no state, so that every example lives alone.

What lives here: layer normalization, self-attention and the network. What does not: what they share with the other
networks (`nets.py`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxadv.core import check, landmark
from jaxadv.models.nets import Net, conv, dense, image_shape
from jaxadv.models.norms import Layer, NoNorm


class LayerNorm(Layer):
    """Normalization of each position over its channels.

    Args:
      features: number of channels.
      eps: added to the variance.

    References:
      Ba, Kiros and Hinton 2016, Layer normalization, arXiv:1607.06450.
    """

    def __init__(self, features: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.eps = eps

    def __call__(self, x):
        """Normalize `x` `[b, ..., c]`."""
        z = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        center = z - z.mean(-1, keepdims=True)
        z = center * lax.rsqrt(jnp.square(center).mean(-1, keepdims=True) + self.eps)
        columns = (1,) * (x.ndim - 1) + (-1,)
        scale, bias = (v[...].astype(z.dtype).reshape(columns) for v in (self.scale, self.bias))
        return (z * scale + bias).astype(x.dtype)


NORMS = {"layer": LayerNorm, "none": lambda features: NoNorm()}
"""Name of a normalization to its builder."""


class Attention(nnx.Module):
    """Self-attention over positions.

    Args:
      width: number of channels, a multiple of `heads`.
      heads: number of heads.
      init: see `nets.INITS`.
      rngs: randomness of the weights.
    """

    def __init__(self, width: int, heads: int, *, init, rngs: nnx.Rngs):
        self.qkv = dense(width, 3 * width, init=init, rngs=rngs)
        self.out = dense(width, width, init=init, rngs=rngs)
        self.heads = heads

    def __call__(self, x):
        """Mix the positions of `x` `[b, t, c]`, head by head: each is a cut of channels, so nothing is transposed."""
        parts = jnp.split(self.qkv(x), 3 * self.heads, axis=-1)
        queries, keys, values = (parts[i * self.heads : (i + 1) * self.heads] for i in range(3))
        wide, mixed = jnp.promote_types(x.dtype, jnp.float32), []
        for q, k, v in zip(queries, keys, values):
            scores = jnp.einsum("btd,bsd->bts", q, k) * q.shape[-1] ** -0.5
            mixed.append(jax.nn.softmax(scores.astype(wide)).astype(x.dtype) @ v)
        return self.out(jnp.concatenate(mixed, axis=-1))


class EncoderBlock(nnx.Module):
    """Attention and a perceptron of one hidden layer, each behind a norm and beside the identity."""

    def __init__(self, width: int, heads: int, *, norm: str, init, rngs: nnx.Rngs):
        make = check.choice("norm", norm, NORMS)
        self.norm1, self.norm2 = make(width), make(width)
        self.attention = Attention(width, heads, init=init, rngs=rngs)
        self.inner = dense(width, 4 * width, init=init, rngs=rngs)
        self.outer = dense(4 * width, width, init=init, rngs=rngs)

    def __call__(self, x):
        """Return the block's output for `x` `[b, t, c]`."""
        x = x + self.attention(self.norm1(x))
        return x + self.outer(jax.nn.gelu(self.inner(self.norm2(x))))


class ViT(Net):
    """A vision transformer whose head reads the mean over positions; learned positions, no class token, no dropout.

    Args:
      shape: (height, width, channels); `patch` must divide height and width.
      classes: number of classes.
      mean: see `Net`.
      std: see `Net`.
      patch: side of a patch.
      width: channels (192 in ViT-Ti; 64 by default, for images of about 32 pixels).
      depth: number of blocks (12 in ViT-Ti).
      heads: attention heads, a divisor of `width`.
      norm: `'layer'` (default) or `'none'`.
      init: see `nets.INITS`.
      rngs: randomness of the weights.

    References:
      Dosovitskiy et al. 2021, An image is worth 16x16 words, arXiv:2010.11929. Mean in the place of a class token:
      Beyer et al. 2022, Better plain ViT baselines for ImageNet-1k, arXiv:2205.01580 (who fix the positions).
    """

    def __init__(
        self,
        shape,
        classes,
        mean=None,
        std=None,
        *,
        patch=4,
        width=64,
        depth=2,
        heads=4,
        norm="layer",
        init="torch",
        rngs: nnx.Rngs,
    ):
        super().__init__(shape, classes, mean, std)
        height, across, channels = image_shape("vit", shape)
        for name, value in (("patch", patch), ("width", width), ("depth", depth), ("heads", heads)):
            check.whole(name, value)
        if height % patch or across % patch:
            raise ValueError(f"patch must divide the sides of the image; got {patch} for {height} x {across}.")
        if width % heads:
            raise ValueError(f"heads must divide width; got {heads} heads for {width} channels.")
        self.patches = conv(channels, width, patch, stride=patch, init=init, rngs=rngs)
        positions = (height // patch) * (across // patch)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (positions, width)))
        self.blocks = nnx.List([EncoderBlock(width, heads, norm=norm, init=init, rngs=rngs) for _ in range(depth)])
        self.norm = NORMS[norm](width)
        self.linear = dense(width, classes, init=init, rngs=rngs)

    def forward(self, x):
        """Return logits from the normalized input."""
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.positions[...][None].astype(x.dtype)
        for block in self.blocks:
            x = landmark(block(x))
        return self.linear(self.norm(x).mean(1))
