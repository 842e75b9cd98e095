"""Noise, blurs and digital corruptions, each as what it draws and what it does to one image.

What lives here: thirteen of the nineteen corruptions; the others, which draw pictures of their own, are in
`weather.py`. What does not: settings (`tables.py`), the batched door (`base.py`), parts (`image.py`).

All follow Hendrycks and Dietterich 2019 (arXiv:1903.12261) as their code computes them, with these differences: images
stay real numbers (the published code cuts results to bytes, also once in the middle of glass blur, and pixelate rounds
after each axis), sizes other than 32 and 224 and gray images are taken, and randomness comes from keys.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxadv.corruptions import image as parts
from jaxadv.corruptions.base import Corruption, colors, nothing, pick
from jaxadv.corruptions.jpeg import jpeg, quantization
from jaxadv.corruptions.tables import Rows

_SHUFFLES = 3  # the most rounds of glass blur in any table

# ---------------------------------------------------------------------------------------------------------------- noise


def _key(key, shape):
    """Draw later: the distribution depends on the image."""
    del shape
    return key


def gaussian_noise(
    x: Float[Array, "h w c"], drawn: Float[Array, "h w c"], level: Array, table: Rows
) -> Float[Array, "h w c"]:
    """Add normal noise.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: `[h, w, c]` standard normal.
      level: the severity less one; may be traced.
      table: for each severity (standard deviation,).

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    (sigma,) = pick(table, level)
    return x + sigma * drawn


def shot_noise(x: Float[Array, "h w c"], drawn, level: Array, table: Rows) -> Float[Array, "h w c"]:
    """Count photons: Poisson numbers of mean `rate * x`, divided by the rate.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: a typed key: the distribution of the counts depends on the image.
      level: the severity less one; may be traced.
      table: for each severity (rate,), photons of a pixel of value 1.

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    (rate,) = pick(table, level)
    return jax.random.poisson(drawn, rate * x).astype(jnp.float32) / rate


def impulse_noise(
    x: Float[Array, "h w c"], drawn: Float[Array, "h w c"], level: Array, table: Rows
) -> Float[Array, "h w c"]:
    """Set some values to 0 or 1 with equal chance.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: `[h, w, c]` uniform in [0, 1).
      level: the severity less one; may be traced.
      table: for each severity (share of values,).

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    (share,) = pick(table, level)
    return jnp.where(drawn < share / 2, 0.0, jnp.where(drawn < share, 1.0, x))


def speckle_noise(
    x: Float[Array, "h w c"], drawn: Float[Array, "h w c"], level: Array, table: Rows
) -> Float[Array, "h w c"]:
    """Add normal noise in proportion to the value.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: `[h, w, c]` standard normal.
      level: the severity less one; may be traced.
      table: for each severity (standard deviation at value 1,).

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    (sigma,) = pick(table, level)
    return x + x * sigma * drawn


# ----------------------------------------------------------------------------------------------------------------- blur


def _gaussian(shape: tuple[int, ...], sigmas, level: Array, mode: str = "edge", truncate: float = 4.0):
    """The matrices of a Gaussian blur of both axes at a severity."""
    return [pick([parts.gaussian_matrix(n, s, mode, truncate) for s in sigmas], level) for n in shape[:2]]


def gaussian_blur(x: Float[Array, "h w c"], drawn: None, level: Array, table: Rows) -> Float[Array, "h w c"]:
    """Blur with a Gaussian.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: None.
      level: the severity less one; may be traced.
      table: for each severity (standard deviation in pixels,).

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    del drawn
    return parts.separable(x, *_gaussian(x.shape, [row[0] for row in table], level))


def defocus_blur(x: Float[Array, "h w c"], drawn: None, level: Array, table: Rows) -> Float[Array, "h w c"]:
    """Spread each pixel over a disk.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: None.
      level: the severity less one; may be traced.
      table: for each severity (radius of the disk, blur of its edge), in pixels.

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    del drawn
    return parts.correlate(x, pick(parts.disk_kernels(table), level))


def shuffled(x: Float[Array, "h w c"], drawn: Float[Array, "h w 2"], reach) -> Float[Array, "h w c"]:
    """Let every pixel show one of its neighborhood, where those handled before it have already changed.

    The published loop runs from the last pixel to the first and means to swap two; its assignment copies instead. So a
    pixel shows what its neighbor shows then: the neighbor's first value, or, if that pixel came before it, its new one.
    Chains of neighbors are followed by doubling, so all pixels are done at once with the loop's result.

    Args:
      x: `[h, w, c]`.
      drawn: `[h, w, 2]` uniform in [0, 1): where to look, columns first.
      reach: offsets are whole numbers in [-reach, reach).

    Returns:
      `[h, w, c]`.
    """
    h, w, c = x.shape
    right, down = jnp.moveaxis(jnp.floor(drawn * 2 * reach) - reach, -1, 0).astype(jnp.int32)
    row, column = jnp.arange(h)[:, None], jnp.arange(w)[None]
    handled = (row > reach) & (row <= h - reach) & (column > reach) & (column <= w - reach)
    here = row * w + column
    there = jnp.clip(row + down, 0, h - 1) * w + jnp.clip(column + right, 0, w - 1)
    old = h * w  # the second half of the list stands for first values, each of which points at itself
    before = handled.reshape(-1)[there] & (there > here)
    points = jnp.where(handled, jnp.where(before, there, there + old), here + old).reshape(-1)
    points = jnp.concatenate([points, jnp.arange(old, 2 * old)])
    points = lax.fori_loop(0, int(np.ceil(np.log2(h * w))), lambda _, p: p[p], points)
    return x.reshape(h * w, c)[points[:old] - old].reshape(h, w, c)


def glass_blur(
    x: Float[Array, "h w c"], drawn: Float[Array, "r h w 2"], level: Array, table: Rows
) -> Float[Array, "h w c"]:
    """Blur, let pixels show their neighbors, blur again.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: `[rounds, h, w, 2]` uniform in [0, 1), see `shuffled`.
      level: the severity less one; may be traced.
      table: for each severity (standard deviation of the blur, farthest neighbor, rounds); pixels.

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261. Differs: no cut to bytes between the blurs.
    """
    _, reach, rounds = pick(table, level)
    blur = _gaussian(x.shape, [row[0] for row in table], level)
    x = parts.separable(x, *blur)
    most = int(max(row[2] for row in table))
    x = lax.fori_loop(0, most, lambda r, x: jnp.where(r < rounds, shuffled(x, drawn[r], reach), x), x)
    return parts.separable(x, *blur)


def motion_blur(x: Float[Array, "h w c"], drawn: Float[Array, ""], level: Array, table: Rows) -> Float[Array, "h w c"]:
    """Blur along a line.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: `[]` angle in degrees, uniform from -45 to 45.
      level: the severity less one; may be traced.
      table: for each severity (radius, standard deviation), in pixels.

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    radius, sigma = pick(table, level)
    return parts.motion(x, drawn, radius, sigma, int(max(row[0] for row in table)))


def zoom_blur(x: Float[Array, "h w c"], drawn: None, level: Array, table: Rows) -> Float[Array, "h w c"]:
    """Average the image and enlargements of its middle.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: None.
      level: the severity less one; may be traced.
      table: for each severity (end, step): the factors are 1, 1 + step, ... below end.

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    del drawn
    factors = [np.arange(1, end, step) for end, step in table]
    counts, most = [len(f) for f in factors], max(len(f) for f in factors)
    factors = [np.pad(f, (0, most - len(f)), constant_values=1.0) for f in factors]
    rows, columns = (pick([[parts.zoom_positions(n, z) for z in f] for f in factors], level) for n in x.shape[:2])
    count = pick(counts, level)

    def add(total, at):
        number, row, column = at
        zoomed = parts.separable(x, parts.hat(row, x.shape[0]), parts.hat(column, x.shape[1]))
        return total + jnp.where(number < count, zoomed, 0.0), None

    return lax.scan(add, x, (jnp.arange(most), rows, columns))[0] / (count + 1)


# -------------------------------------------------------------------------------------------------------------- digital


def brightness(x: Float[Array, "h w c"], drawn: None, level: Array, table: Rows) -> Float[Array, "h w c"]:
    """Raise the value of hue, saturation and value, by scaling the color: black, which has none, becomes gray.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: None.
      level: the severity less one; may be traced.
      table: for each severity (by how much,).

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    del drawn
    (more,) = pick(table, level)
    value = jnp.max(x, -1, keepdims=True)
    raised = jnp.minimum(value + more, 1.0)
    return jnp.where(value > 0, x * (raised / jnp.where(value > 0, value, 1.0)), raised)


def contrast(x: Float[Array, "h w c"], drawn: None, level: Array, table: Rows) -> Float[Array, "h w c"]:
    """Draw values towards the mean of their channel.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: None.
      level: the severity less one; may be traced.
      table: for each severity (what is left of the difference,).

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    del drawn
    (share,) = pick(table, level)
    mean = jnp.mean(x, (0, 1), keepdims=True)
    return (x - mean) * share + mean


def saturate(x: Float[Array, "h w c"], drawn: None, level: Array, table: Rows) -> Float[Array, "h w c"]:
    """Change the saturation of hue, saturation and value to `a s + b`.

    Grays have the hue of red. An image of one channel is taken as a colored one, and the brightness of the answer is
    returned.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: None.
      level: the severity less one; may be traced.
      table: for each severity (a, b).

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    Raises:
      ValueError: if `x` has neither one channel nor three.

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    del drawn
    colors("saturate", x)
    a, b = pick(table, level)
    rgb = jnp.broadcast_to(x, (*x.shape[:2], 3))
    value, low = jnp.max(rgb, -1, keepdims=True), jnp.min(rgb, -1, keepdims=True)
    span = value - low
    gray = jnp.broadcast_to(jnp.asarray([0.0, 1.0, 1.0]), rgb.shape)
    missing = jnp.where(span > 0, (value - rgb) / jnp.where(span > 0, span, 1.0), gray)
    changed = jnp.clip(a * span / jnp.where(value > 0, value, 1.0) + b, 0.0, 1.0)
    rgb = value * (1 - changed * missing)
    return rgb if x.shape[-1] == 3 else parts.luma(rgb)


def elastic_transform(
    x: Float[Array, "h w c"], drawn: dict[str, Array], level: Array, table: Rows
) -> Float[Array, "h w c"]:
    """Move three points of the image, and every pixel a little.

    Lengths are shares of the shorter side (of 244/224 of it for large images, a slip that the
    published files were made with).

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: `points` `[3, 2]` and `bumps` `[2, h, w]`, uniform in [-1, 1]; columns first.
      level: the severity less one; may be traced.
      table: for each severity (height of the bumps, their width, move of the points).

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    h, w, _ = x.shape
    size = min(h, w) * (244 / 224 if max(row[0] for row in table) > 1 else 1.0)
    height, _, move = pick(table, level) * size
    middle, side = jnp.asarray([w // 2, h // 2], jnp.float32)[None], min(h, w) // 3
    points = middle + side * jnp.asarray([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    moved = points + move * drawn["points"]
    (a, b), (c, d) = moved[1] - moved[0], moved[2] - moved[0]  # the edges of the moved triangle
    inverse = jnp.stack([jnp.stack([d, -b]), jnp.stack([-c, a])]) / (a * d - b * c)
    edges = points[1:] - points[:1]
    linear = [[inverse[i, 0] * edges[0, j] + inverse[i, 1] * edges[1, j] for i in range(2)] for j in range(2)]
    row, column = jnp.arange(h, dtype=jnp.float32)[:, None], jnp.arange(w, dtype=jnp.float32)[None]
    to_column, to_row = (
        points[0, j] + linear[j][0] * (column - moved[0, 0]) + linear[j][1] * (row - moved[0, 1]) for j in range(2)
    )
    x = parts.sample(x, to_row, to_column, "reflect")
    blur = _gaussian(x.shape, [line[1] * size for line in table], level, "symmetric", 3.0)
    right, down = (height * parts.separable(bumps, *blur) for bumps in drawn["bumps"])
    return parts.sample(x, row + down, column + right, "symmetric")


def pixelate(x: Float[Array, "h w c"], drawn: None, level: Array, table: Rows) -> Float[Array, "h w c"]:
    """Shrink and enlarge with square pixels.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: None.
      level: the severity less one; may be traced.
      table: for each severity (share of the size,).

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261. Differs: no rounding after each axis.
    """
    del drawn
    maps = [
        [parts.box_matrix(m, n) @ parts.box_matrix(n, m) for m in (max(1, int(n * share)) for (share,) in table)]
        for n in x.shape[:2]
    ]
    return parts.separable(x, pick(maps[0], level), pick(maps[1], level))


def jpeg_compression(x: Float[Array, "h w c"], drawn: None, level: Array, table: Rows) -> Float[Array, "h w c"]:
    """Compress as JPEG and decompress; differentiable, see `jpeg.jpeg`.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: None.
      level: the severity less one; may be traced.
      table: for each severity (quality from 1 to 100,).

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    Raises:
      ValueError: if `x` has neither one channel nor three.

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    del drawn
    colors("jpeg_compression", x)
    return jpeg(x, pick([quantization(quality) for (quality,) in table], level))


def _bumps(key, shape):
    points, bumps = jax.random.split(key)
    return {
        "points": jax.random.uniform(points, (3, 2), minval=-1.0),
        "bumps": jax.random.uniform(bumps, (2, *shape[:2]), minval=-1.0),
    }


def _angle(key, shape):
    del shape
    return jax.random.uniform(key, minval=-45.0, maxval=45.0)


def _neighbors(key, shape):
    return jax.random.uniform(key, (_SHUFFLES, *shape[:2], 2))


DRAWS = {
    gaussian_noise: jax.random.normal,
    shot_noise: _key,
    impulse_noise: jax.random.uniform,
    defocus_blur: nothing,
    glass_blur: _neighbors,
    motion_blur: _angle,
    zoom_blur: nothing,
    brightness: nothing,
    contrast: nothing,
    elastic_transform: _bumps,
    pixelate: nothing,
    jpeg_compression: nothing,
    speckle_noise: jax.random.normal,
    gaussian_blur: nothing,
    saturate: nothing,
}
"""What each corruption of this file draws."""

COMMON = {apply.__name__: Corruption(apply.__name__, draw, apply) for apply, draw in DRAWS.items()}
"""Name to corruption."""
