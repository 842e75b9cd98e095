"""JPEG's round trip for one image, as libjpeg does it by default, with gradients that pass through its roundings.

What lives here: color conversion, 2 x 2 chroma averages, the discrete cosine transform of 8 x 8 blocks, quantization,
and the way back with smooth chroma. What does not: the coding of coefficients into bytes, which loses nothing.

References:
  Wallace 1992, The JPEG still picture compression standard. The quantization tables are those of its annex K, scaled by
  quality as the Independent JPEG Group's library scales them.
  Straight-through gradients: Shin and Song 2017, JPEG-resistant adversarial images.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LUMA = """
16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
CHROMA = """
17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""


_HALF = 0.5 + 1e-4  # float32's rounding must not turn ties
_STEP = 4 * np.float32(np.sqrt(8))


def quantization(quality: float) -> np.ndarray:
    """Return the steps to which cosine coefficients are rounded.

    Args:
      quality: from 1 to 100.

    Returns:
      float32 `[2, 8, 8]`: for brightness and for color.
    """
    base = np.asarray([text.split() for text in (LUMA, CHROMA)], np.int64).reshape(2, 8, 8)
    quality = int(quality)
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((base * scale + 50) // 100, 1, 255).astype(np.float32)


def cosines() -> np.ndarray:
    """Return the orthonormal matrix of the cosine transform.

    Returns:
      float32 `[8, 8]`: row k holds the k-th cosine.
    """
    k, i = np.arange(8)[:, None], np.arange(8)[None]
    matrix = 0.5 * np.cos(np.pi * (2 * i + 1) * k / 16)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


def _through(exact: Array, rounded: Array) -> Array:
    """The value of one, the gradient of the other."""
    return exact + jax.lax.stop_gradient(rounded - exact)


def _round(x: Array) -> Array:
    return _through(x, jnp.sign(x) * jnp.floor(jnp.abs(x) + _HALF))


def _floor(x: Array) -> Array:
    return _through(x, jnp.floor(x))


def _across(basis: np.ndarray, blocks: Array) -> Array:
    """Multiply the rows of blocks `[a, 8, b, 8]` by a matrix; sums of eight products, the same for every batch."""
    return sum(basis[:, i][None, None, None] * blocks[..., i][..., None] for i in range(8))  # pyright: ignore[reportReturnType]


def _down(basis: np.ndarray, blocks: Array) -> Array:
    """Multiply the columns of blocks by a matrix."""
    return sum(basis[:, i][None, :, None, None] * blocks[:, i][:, None] for i in range(8))  # pyright: ignore[reportReturnType]


def _between(x: Array) -> Array:
    """Round as the library's integers do between the two passes of a transform."""
    return _round(x * _STEP) / _STEP


def _coded(plane: Float[Array, "h w"], steps: Float[Array, "8 8"]) -> Float[Array, "h w"]:
    """Quantize a plane of levels in the cosine domain."""
    h, w = plane.shape
    full = jnp.pad(plane, ((0, -h % 8), (0, -w % 8)), mode="edge")
    blocks = full.reshape(full.shape[0] // 8, 8, full.shape[1] // 8, 8) - 128
    basis = cosines()
    steps = steps[None, :, None, :]
    found = _round(8 * _down(basis, _between(_across(basis, blocks)))) / 8
    kept = _round(found / steps) * steps  # of eighths: ties are frequent, and go away from zero
    back = _round(_across(basis.T, _between(_down(basis.T, kept)))) + 128
    return jnp.clip(back, 0, 255).reshape(full.shape)[:h, :w]


def _halved(plane: Float[Array, "h w"]) -> Float[Array, "k m"]:
    """Average 2 x 2 pixels of whole blocks of columns; halves go up in every other column, down in the rest."""
    full = jnp.pad(plane, ((0, plane.shape[0] % 2), (0, -plane.shape[1] % 16)), mode="edge")
    total = full[::2, ::2] + full[1::2, ::2] + full[::2, 1::2] + full[1::2, 1::2]
    return _floor((total + 1 + (jnp.arange(total.shape[1]) % 2)[None]) / 4)


def _doubled(plane: Float[Array, "k m"]) -> Float[Array, "h w"]:
    """Enlarge twice with weights 3/4 and 1/4, in levels."""
    wide = jnp.pad(plane, 1, mode="edge")
    h, w = plane.shape
    rows = jnp.stack([3 * plane + wide[:-2, 1:-1], 3 * plane + wide[2:, 1:-1]], 1).reshape(2 * h, w)
    wide = jnp.pad(rows, ((0, 0), (1, 1)), mode="edge")
    both = jnp.stack([_floor((3 * rows + wide[:, :-2] + 8) / 16), _floor((3 * rows + wide[:, 2:] + 7) / 16)], 2)
    return both.reshape(2 * h, 2 * w)


def jpeg(x: Float[Array, "h w c"], steps: Float[Array, "2 8 8"]) -> Float[Array, "h w c"]:
    """Compress an image and decompress it.

    Args:
      x: `[h, w, 1]` or `[h, w, 3]` in [0, 1].
      steps: `[2, 8, 8]` of `quantization`.

    Returns:
      Of the shape of `x`, in multiples of 1/255. Equal to libjpeg-turbo's answer but for a few coefficients that lie on
      the edge of two steps (on 32 x 32 images at most five levels, 0.06 on average). The gradient is that of the same
      steps without their roundings.
    """
    levels = _round(255 * x)
    if x.shape[-1] == 1:
        return _coded(levels[..., 0], steps[0])[..., None] / 255
    red, green, blue = (levels[..., i] for i in range(3))
    light = _floor(0.299 * red + 0.587 * green + 0.114 * blue + 0.5)
    cool = _floor(-0.168735892 * red - 0.331264108 * green + 0.5 * blue + 128.5 - 1e-4)
    warm = _floor(0.5 * red - 0.418687589 * green - 0.081312411 * blue + 128.5 - 1e-4)
    light = _coded(light, steps[0])
    h, w = light.shape
    small = (_coded(_halved(p), steps[1])[:, : (w + 1) // 2] for p in (cool, warm))
    cool, warm = (_doubled(p)[:h, :w] - 128 for p in small)
    red = light + _floor(1.402 * warm + 0.5)
    green = light + _floor(-0.344136286 * cool - 0.714136286 * warm + 0.5)
    blue = light + _floor(1.772 * cool + 0.5)
    return jnp.clip(jnp.stack([red, green, blue], -1), 0, 255) / 255
