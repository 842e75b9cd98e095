"""Parts that corruptions are made of, for one image `[h, w, c]`: linear maps, samples, blurs, distances.

What lives here: arithmetic of images, without randomness and without settings of anybody's benchmark. What does not:
the corruptions (`common.py`, `weather.py`), JPEG (`jpeg.py`).

The idea: a separable linear operation (blur, zoom, shrink) is one matrix for each axis, `rows @ image @ columns.T`, and
what happens at the border is part of the matrix. Matrices come from numpy when a program is traced, one for each
severity, so that the severity is data. Under `vmap` each image has its own matrices and every product the same shape,
whatever the batch: so rows live alone to the bit.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_UNROLLED = 7


def folded(n: int, reach: int, mode: str) -> np.ndarray:
    """Return which of n pixels stand in the places from `-reach` to `n + reach`.

    Args:
      n: number of pixels.
      reach: how far beyond each end.
      mode: `edge` (aaa|abc|ccc), `symmetric` (cba|abc|cba) or `reflect` (cb|abc|ba).

    Returns:
      int `[n + 2 reach]`.
    """
    return np.pad(np.arange(n), reach, mode=mode)  # pyright: ignore[reportArgumentType, reportCallIssue]


def extend(x: Float[Array, "h w ..."], reach: int, mode: str) -> Float[Array, "... "]:
    """Continue an image beyond its borders.

    Args:
      x: `[h, w, ...]`.
      reach: by how many pixels on each side.
      mode: as in `folded`.

    Returns:
      `[h + 2 reach, w + 2 reach, ...]`.
    """
    rows, columns = folded(x.shape[0], reach, mode), folded(x.shape[1], reach, mode)
    return x[rows][:, columns]


def gaussian_matrix(n: int, sigma: float, mode: str = "edge", truncate: float = 4.0) -> np.ndarray:
    """Return the matrix of a Gaussian blur along one axis.

    Args:
      n: number of pixels.
      sigma: width in pixels; 0 is the identity.
      mode: the border, as in `folded`.
      truncate: the kernel ends after so many widths.

    Returns:
      float32 `[n, n]`; each row sums to one.
    """
    reach = int(truncate * sigma + 0.5)
    taps = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (taps / sigma) ** 2) if reach else np.ones(1)
    matrix = np.zeros((n, n))
    for row, around in enumerate(np.lib.stride_tricks.sliding_window_view(folded(n, reach, mode), 2 * reach + 1)):
        np.add.at(matrix[row], around, weights / weights.sum())
    return matrix.astype(np.float32)


def box_matrix(n: int, m: int) -> np.ndarray:
    """Return the matrix that makes n pixels m by averaging those whose centers a new pixel covers.

    Args:
      n: number of pixels.
      m: number of new pixels.

    Returns:
      float64 `[m, n]`; each row sums to one. Where `m > n` it repeats pixels.
    """
    scale = n / m
    width = max(scale, 1.0)
    center = (np.arange(m)[:, None] + 0.5) * scale
    offset = (np.arange(n)[None] + 0.5 - center) / width
    inside = ((offset > -0.5) & (offset <= 0.5)).astype(np.float64)
    return inside / inside.sum(1, keepdims=True)


def zoom_positions(n: int, factor: float) -> np.ndarray:
    """Return where the pixels of the enlarged middle of an axis lie in the original.

    Args:
      n: number of pixels.
      factor: at least 1.

    Returns:
      `[n]` positions: the middle `ceil(n / factor)` pixels, enlarged with their first and last centers kept, and cut
      to n.
    """
    kept = int(np.ceil(n / factor))
    made = round(kept * factor)
    first, cut = (n - kept) // 2, (made - n) // 2
    step = (kept - 1) / (made - 1) if made > 1 else 0.0
    return first + (np.arange(n) + cut) * step


def hat(positions: Float[Array, "*k m"], n: int) -> Float[Array, "*k m n"]:
    """Return the matrix of linear interpolation at positions between n pixels.

    Args:
      positions: `[..., m]` in [0, n - 1].
      n: number of pixels.

    Returns:
      `[..., m, n]`.
    """
    pixels = jnp.arange(n, dtype=jnp.float32).reshape((1,) * positions.ndim + (n,))
    return jnp.maximum(0.0, 1.0 - jnp.abs(positions[..., None] - pixels))


def separable(x: Float[Array, "h w *c"], rows: Float[Array, "k h"], columns: Float[Array, "m w"]):
    """Apply a matrix to each axis of an image.

    Args:
      x: `[h, w]` or `[h, w, c]`.
      rows: `[k, h]`.
      columns: `[m, w]`.

    Returns:
      `[k, m]` or `[k, m, c]`.
    """
    down = jnp.tensordot(rows, x, 1, precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(jnp.tensordot(columns, down, ((1,), (1,)), precision=lax.Precision.HIGHEST), 0, 1)


def correlate(x: Float[Array, "h w *c"], kernel: Float[Array, "k k"], mode: str = "reflect") -> Float[Array, "h w *c"]:
    """Sum the neighborhood of each pixel, weighted by a kernel.

    Args:
      x: `[h, w]` or `[h, w, c]`.
      kernel: `[k, k]`, k odd.
      mode: the border, as in `folded`.

    Returns:
      Of the shape of `x`.
    """
    k, (h, w) = kernel.shape[0], x.shape[:2]
    wide = extend(x, k // 2, mode)

    def line(strip, weights):
        return sum(weights[j] * strip[:, j : j + w] for j in range(k))

    if k <= _UNROLLED:
        return jnp.asarray(sum(line(wide[i : i + h], kernel[i]) for i in range(k)))

    def row(total, i):
        return total + line(lax.dynamic_slice_in_dim(wide, i, h), lax.dynamic_index_in_dim(kernel, i, keepdims=False))

    return lax.fori_loop(0, k, lambda i, total: row(total, i), jnp.zeros_like(x))


def disk_kernel(radius: float, blur: float) -> np.ndarray:
    """Return a disk whose edge is softened by a small Gaussian.

    Args:
      radius: of the disk, in pixels.
      blur: width of the Gaussian; it is 3 x 3, and 5 x 5 for disks wider than 8.

    Returns:
      float64 `[k, k]`, which sums to one unless the disk touches the edge of its square.
    """
    reach, half = (8, 1) if radius <= 8 else (int(radius), 2)
    line = np.arange(-reach, reach + 1)
    disk = (line[:, None] ** 2 + line[None] ** 2 <= radius**2).astype(np.float64)
    taps = np.exp(-0.5 * (np.arange(-half, half + 1) / blur) ** 2)
    matrix = np.zeros((len(line), len(line)))
    for row, around in enumerate(
        np.lib.stride_tricks.sliding_window_view(folded(len(line), half, "reflect"), len(taps))
    ):
        np.add.at(matrix[row], around, taps / taps.sum())
    return matrix @ (disk / disk.sum()) @ matrix.T


def disk_kernels(rows: Sequence[tuple[float, ...]]) -> np.ndarray:
    """Return several disks in squares of one size, as small as they allow.

    Args:
      rows: (radius, blur) of each.

    Returns:
      float32 `[s, k, k]`.
    """
    kernels = [disk_kernel(*row) for row in rows]
    size = max(len(kernel) for kernel in kernels)
    stack = np.stack([np.pad(kernel, (size - len(kernel)) // 2) for kernel in kernels])
    used = np.flatnonzero((stack > 1e-12).any((0, 1)))
    return stack[:, used[0] : used[-1] + 1, used[0] : used[-1] + 1].astype(np.float32)


def motion(x: Float[Array, "h w c"], angle, radius, sigma, most: int) -> Float[Array, "h w c"]:
    """Blur along a line, as ImageMagick does: half a Gaussian at whole pixels, the border continued.

    Args:
      x: `[h, w, c]`.
      angle: direction in degrees, from the right downwards.
      radius: `2 radius + 1` pixels are averaged.
      sigma: width of the Gaussian.
      most: the largest radius that may come, static.

    Returns:
      `[h, w, c]`.
    """
    taps = jnp.arange(2 * most + 1, dtype=jnp.float32)
    weights = jnp.where(taps <= 2 * radius, jnp.exp(-0.5 * (taps / sigma) ** 2), 0.0)
    weights = weights / jnp.sum(weights)
    turn = jnp.deg2rad(angle)
    down, right = (jnp.ceil(taps * part - 0.5).astype(jnp.int32) for part in (jnp.sin(turn), jnp.cos(turn)))
    wide = extend(x, 2 * most, "edge")

    def add(total, tap):
        weight, row, column = tap
        return total + weight * lax.dynamic_slice(wide, (row + 2 * most, column + 2 * most, 0), x.shape), None

    return lax.scan(add, jnp.zeros_like(x), (weights, down, right))[0]


def sample(x: Float[Array, "h w c"], rows: Float[Array, "*m"], columns: Float[Array, "*m"], mode: str, order: int = 1):
    """Read an image between its pixels.

    Args:
      x: `[h, w, c]`.
      rows: where, `[...]`.
      columns: where, `[...]`.
      mode: beyond the border, as in `folded`, or `zero`.
      order: 1 interpolates linearly, 0 takes the nearest pixel.

    Returns:
      `[..., c]`.
    """

    def fold(i: Int[Array, "*m"], n: int):
        if mode in ("edge", "zero") or n == 1:
            return jnp.clip(i, 0, n - 1)
        period = 2 * n if mode == "symmetric" else 2 * n - 2
        i = jnp.mod(i, period)
        return jnp.where(i < n, i, (period - 1 if mode == "symmetric" else period) - i)

    def read(row, column):
        found = x.reshape(-1, x.shape[-1])[fold(row, x.shape[0]) * x.shape[1] + fold(column, x.shape[1])]
        if mode != "zero":
            return found
        inside = (row >= 0) & (row < x.shape[0]) & (column >= 0) & (column < x.shape[1])
        return jnp.where(inside[..., None], found, 0.0)

    if order == 0:
        return read(jnp.round(rows).astype(jnp.int32), jnp.round(columns).astype(jnp.int32))
    top, left = jnp.floor(rows), jnp.floor(columns)
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    i, j = top.astype(jnp.int32), left.astype(jnp.int32)
    around = read(jnp.stack([i, i, i + 1, i + 1]), jnp.stack([j, j + 1, j, j + 1]))
    above = (1 - right) * around[0] + right * around[1]
    return (1 - down) * above + down * ((1 - right) * around[2] + right * around[3])


def affine_warp(
    x: Float[Array, "h w c"], matrix: Float[Array, "2 3"], *, order: int = 1, mode: str = "zero"
) -> Float[Array, "h w c"]:
    """Move the pixels of an image by an affine map about its middle.

    Args:
      x: `[h, w, c]`; `jax.vmap` makes it batched.
      matrix: `[2, 3]`: a pixel at `(row, column)`, measured from the middle of the image, shows what stood at
        `matrix @ (row, column, 1)`.
      order: 1 interpolates linearly, 0 takes the nearest pixel.
      mode: what lies beyond the border: `zero`, `edge`, `symmetric` or `reflect`.

    Returns:
      `[h, w, c]`; differentiable in `x` and, with order 1, in `matrix`.
    """
    middle = [(n - 1) / 2 for n in x.shape[:2]]
    row, column = (jnp.arange(n, dtype=jnp.float32) - m for n, m in zip(x.shape[:2], middle))
    row, column = row[:, None], column[None]
    where = [matrix[i, 0] * row + matrix[i, 1] * column + matrix[i, 2] + middle[i] for i in range(2)]
    return sample(x, where[0], where[1], mode, order)


def luma(x: Float[Array, "*b h w c"]) -> Float[Array, "*b h w 1"]:
    """Return the brightness that the eye sees, ITU-R 601; a gray image is its own.

    Args:
      x: `[..., h, w, 1]` or `[..., h, w, 3]`.

    Returns:
      `[..., h, w, 1]`.
    """
    if x.shape[-1] == 1:
        return x
    return 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]


def tint(color: Sequence[float], channels: int) -> np.ndarray:
    """Return a color as images of so many channels show it.

    Args:
      color: red, green and blue.
      channels: 3, or 1 for the brightness alone.

    Returns:
      float32 `[channels]`.
    """
    given = np.asarray(color, np.float32)
    return given if channels == 3 else np.asarray([np.dot(given, (0.299, 0.587, 0.114))], np.float32)


def canny(gray: Float[Array, "h w"], low: float, high: float) -> Bool[Array, "h w"]:
    """Find edges: ridges of the Sobel gradient above `low` that hang together with one above `high`.

    Args:
      gray: `[h, w]` in levels from 0 to 255.
      low: the least gradient of an edge, in the sum of absolute values.
      high: what some pixel of each edge exceeds.

    Returns:
      `[h, w]`.

    References:
      Canny 1986, A computational approach to edge detection.
    """
    wide = extend(gray, 1, "edge")
    h, w = gray.shape

    def at(a, i, j):
        return lax.slice(a, (1 + i, 1 + j), (1 + i + h, 1 + j + w))

    dx = sum(k * (at(wide, i, 1) - at(wide, i, -1)) for i, k in ((-1, 1.0), (0, 2.0), (1, 1.0)))
    dy = sum(k * (at(wide, 1, j) - at(wide, -1, j)) for j, k in ((-1, 1.0), (0, 2.0), (1, 1.0)))
    size = jnp.abs(dx) + jnp.abs(dy)
    around = jnp.pad(size, 1)
    slope = float(np.tan(np.pi / 8))
    flat, steep = jnp.abs(dy) < slope * jnp.abs(dx), jnp.abs(dy) > jnp.abs(dx) / slope
    falls = dx * dy < 0
    before = jnp.where(falls, at(around, -1, 1), at(around, -1, -1))
    after = jnp.where(falls, at(around, 1, -1), at(around, 1, 1))
    before = jnp.where(flat, at(around, 0, -1), jnp.where(steep, at(around, -1, 0), before))
    after = jnp.where(flat, at(around, 0, 1), jnp.where(steep, at(around, 1, 0), after))
    ridge = (size > low) & (size > before) & jnp.where(flat | steep, size >= after, size > after)

    def grow(carry):
        found, _ = carry
        padded = jnp.pad(found, 1)
        near = jnp.stack([at(padded, i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)])
        new = jnp.any(near, 0) & ridge
        return new, jnp.any(new != found)

    strong = ridge & (size > high)
    return lax.while_loop(lambda carry: carry[1], grow, (strong, jnp.any(strong)))[0]


def distance(mask: Bool[Array, "h w"], most: float) -> Float[Array, "h w"]:
    """Return the Euclidean distance of each pixel to the nearest one of a mask, exactly.

    Args:
      mask: `[h, w]`.
      most: the largest distance that is told apart.

    Returns:
      `[h, w]`, at most `most`.
    """
    far = jnp.float32(most**2)

    def squares(n: int):
        line = np.arange(n, dtype=np.float32)
        return jnp.asarray((line[:, None] - line[None]) ** 2)

    down = jnp.min(jnp.where(mask[None], squares(mask.shape[0])[..., None], far), 1)
    both = jnp.min(down[:, None] + squares(mask.shape[1])[None], -1)
    return jnp.sqrt(jnp.minimum(both, far))


def equalize(levels: Float[Array, "h w"]) -> Float[Array, "h w"]:
    """Spread whole levels from 0 to 255 so that each is about as frequent.

    Args:
      levels: `[h, w]` whole numbers.

    Returns:
      `[h, w]` whole numbers.
    """
    at = jnp.clip(levels, 0, 255).astype(jnp.int32)
    counts = jnp.sum(at.reshape(-1, 1) == jnp.arange(256)[None], 0)
    total, least = at.size, counts[jnp.min(at)]
    share = (jnp.cumsum(counts) - least) / jnp.maximum(total - least, 1)
    return jnp.where(total == least, levels, jnp.round(255 * share)[at])
