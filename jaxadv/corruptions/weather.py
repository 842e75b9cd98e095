"""Corruptions that lay a picture over the image: snow, frost, fog, spatter, and the pictures.

What lives here: these four, each as what it draws and what it does to one image. What does not: settings (`tables.py`),
the batched door (`base.py`), parts (`image.py`). For the source and the common differences see `common.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxadv.corruptions import image as parts
from jaxadv.corruptions.base import Corruption, colors, pick
from jaxadv.corruptions.tables import Rows

_NEEDLES = 24
_ICE = (0.8, 0.95, 1.0)
_WATER = (175 / 255, 238 / 255, 238 / 255)
_MUD = (63 / 255, 42 / 255, 20 / 255)


def draw_plasma(key, shape: tuple[int, ...]) -> Float[Array, "n n"]:
    """Draw what `plasma` needs for an image.

    Args:
      key: a typed key.
      shape: `(h, w, ...)`.

    Returns:
      `[n, n]` uniform in [-1, 1], n the least power of two that covers the image.
    """
    n = 2 ** int(np.ceil(np.log2(max(2, *shape[:2]))))
    return jax.random.uniform(key, (n, n), minval=-1.0)


def plasma(drawn: Float[Array, "n n"], decay) -> Float[Array, "n n"]:
    """Make a cloud by the diamond-square rule, on a torus.

    Squares of side n, n/2, ... get a middle, the mean of their corners plus noise, then each edge one, the mean of its
    ends and the two middles beside it plus noise. Every pixel but the first is made once, with its own drawn number.

    Args:
      drawn: of `draw_plasma`.
      decay: noise shrinks by the square of this at each halving of the squares.

    Returns:
      `[n, n]` from 0 to 1.
    """
    n = drawn.shape[0]
    row, column = jnp.arange(n)[:, None], jnp.arange(n)[None]

    def halve(i, state):
        cloud, noise = state
        side = n >> i
        half = side // 2
        down, right = row % side, column % side

        def made(cloud, where, offsets):
            near = sum(jnp.roll(cloud, (half * a, half * b), (0, 1)) for a, b in offsets) / 4
            return jnp.where(where, near + noise * drawn, cloud)

        cloud = made(cloud, (down == half) & (right == half), ((1, 1), (1, -1), (-1, 1), (-1, -1)))
        edges = ((down == half) & (right == 0)) | ((down == 0) & (right == half))
        return made(cloud, edges, ((1, 0), (-1, 0), (0, 1), (0, -1))), noise / decay**2

    cloud, _ = lax.fori_loop(0, int(np.log2(n)), halve, (jnp.zeros((n, n)), jnp.float32(1.0)))
    cloud = cloud - jnp.min(cloud)
    return cloud / jnp.max(cloud)


def fog(x: Float[Array, "h w c"], drawn: Float[Array, "n n"], level: Array, table: Rows) -> Float[Array, "h w c"]:
    """Add a cloud and scale back to the brightest value.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: `[n, n]` of `draw_plasma`.
      level: the severity less one; may be traced.
      table: for each severity (weight of the cloud, its decay).

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261. The side of the cloud is the least power of two that covers the
      image: 32 and 256 for the published sizes, as there.
    """
    weight, decay = pick(table, level)
    cloud = plasma(drawn, decay)[: x.shape[0], : x.shape[1], None]
    most = jnp.max(x)
    return (x + weight * cloud) * most / (most + weight)


def snow(x: Float[Array, "h w c"], drawn: dict[str, Array], level: Array, table: Rows) -> Float[Array, "h w c"]:
    """Whiten the image and let flakes fall.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: `layer` `[h, w]` standard normal, and `angle` `[]` in degrees, uniform from -135 to -45.
      level: the severity less one; may be traced.
      table: for each severity (mean, deviation, zoom, least thickness, radius and width of the streaks, share of the
        image).

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    Raises:
      ValueError: if `x` has neither one channel nor three.

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    colors("snow", x)
    mean, deviation, _, least, radius, sigma, mix = pick(table, level)
    at = (pick([parts.zoom_positions(n, row[2]) for row in table], level) for n in x.shape[:2])
    zoom = [parts.hat(positions, n) for positions, n in zip(at, x.shape[:2])]
    layer = parts.separable(mean + deviation * drawn["layer"], *zoom)
    layer = jnp.floor(255 * jnp.clip(jnp.where(layer < least, 0.0, layer), 0.0, 1.0)) / 255
    layer = parts.motion(layer[..., None], drawn["angle"], radius, sigma, int(max(row[4] for row in table)))
    x = mix * x + (1 - mix) * jnp.maximum(x, 1.5 * parts.luma(x) + 0.5)
    return x + layer + layer[::-1, ::-1]


def _snow(key, shape):
    layer, angle = jax.random.split(key)
    return {
        "layer": jax.random.normal(layer, shape[:2]),
        "angle": jax.random.uniform(angle, minval=-135.0, maxval=-45.0),
    }


def ice(drawn: dict[str, Array], shape: tuple[int, ...]) -> Float[Array, "h w c"]:
    """Make a picture of frost: straight needles of all directions on a cloud, bluish white, 0.6 on average.

    Args:
      drawn: `ground` as `draw_plasma`, `needles` `[m, 6]` uniform in [0, 1): row, column, direction (two),
        length, strength.
      shape: `(h, w, c)`.

    Returns:
      `[h, w, c]` in [0, 1].
    """
    size = max(shape[:2])
    row, column = jnp.arange(shape[0])[:, None] / size, jnp.arange(shape[1])[None] / size
    turn = 2 * drawn["needles"][:, 2:4] - 1
    turn = turn / jnp.sqrt(jnp.sum(turn * turn, 1, keepdims=True) + 1e-6)

    def grow(i, picture):
        (top, left, _, _, length, strength), (down, right) = drawn["needles"][i], turn[i]
        along = jnp.abs((row - top) * down + (column - left) * right)
        across = jnp.abs((column - left) * down - (row - top) * right)
        needle = jnp.clip(0.8 + 3.2 * length - 8 * along, 0.0, 1.0) * jnp.clip(1 - 25 * across, 0.0, 1.0)
        return jnp.maximum(picture, (0.5 + 0.5 * strength) * needle)

    needles = lax.fori_loop(0, len(drawn["needles"]), grow, jnp.zeros(shape[:2]))
    ground = plasma(drawn["ground"], 2.0)[: shape[0], : shape[1]]
    return (
        jnp.clip(0.2 + 0.5 * ground + 0.5 * needles, 0.0, 1.0)[..., None]
        * jnp.asarray(parts.tint(_ICE, shape[-1]))[None, None]
    )


def frost(x: Float[Array, "h w c"], drawn: dict[str, Array], level: Array, table: Rows) -> Float[Array, "h w c"]:
    """Add a picture of frost.

    The published files use six photographs of frosted glass. Here the picture is generated (`ice`), so accuracies are
    like theirs and not theirs: a synthetic frost.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: `ground` and `needles` of `ice`.
      level: the severity less one; may be traced.
      table: for each severity (weight of the image, weight of the picture).

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    Raises:
      ValueError: if `x` has neither one channel nor three.

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    colors("frost", x)
    own, picture = pick(table, level)
    return own * x + picture * ice(drawn, x.shape)


def _ice(key, shape):
    ground, needles = jax.random.split(key)
    return {"ground": draw_plasma(ground, shape), "needles": jax.random.uniform(needles, (_NEEDLES, 6))}


def _wet(layer: Float[Array, "h w"]) -> Float[Array, "h w"]:
    """How much water shines, from the thickness of the drops: bright rims, lit from one corner; largest value one."""
    levels = jnp.floor(255 * layer)
    rim = jnp.floor(_mean(jnp.minimum(parts.distance(parts.canny(levels, 50.0, 150.0), 20.0), 20.0)))
    light = jnp.asarray([[-2.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    lit = jnp.clip(parts.correlate(parts.equalize(rim), light), 0.0, 255.0)
    shine = levels * jnp.round(_mean(lit))
    most = jnp.max(shine)
    return shine / jnp.where(most > 0, most, 1.0)


def _mean(x: Float[Array, "h w"]) -> Float[Array, "h w"]:
    return parts.correlate(x, jnp.full((3, 3), 1 / 9, jnp.float32))


def spatter(x: Float[Array, "h w c"], drawn: Float[Array, "h w"], level: Array, table: Rows) -> Float[Array, "h w c"]:
    """Splash water (severities 1 to 3) or mud.

    Args:
      x: `[h, w, c]` in [0, 1].
      drawn: `[h, w]` standard normal.
      level: the severity less one; may be traced.
      table: for each severity (mean, deviation, width, least thickness, strength of water or width of mud, 1 for mud).

    Returns:
      `[h, w, c]`, not yet cut to [0, 1].

    Raises:
      ValueError: if `x` has neither one channel nor three.

    References:
      Hendrycks and Dietterich 2019, arXiv:1903.12261. Differs: the rims of water come from exact Euclidean distances to
      edges, the published ones from a chamfer approximation.
    """
    colors("spatter", x)
    mean, deviation, _, least, strength, mud = pick(table, level)
    layer = parts.separable(mean + deviation * drawn, *_widths(x.shape, table, 2, level))
    layer = jnp.where(layer < least, 0.0, layer)
    water = strength * _wet(layer)[..., None] * jnp.asarray(parts.tint(_WATER, x.shape[-1]))[None, None]
    drops = parts.separable((layer > least).astype(jnp.float32), *_widths(x.shape, table, 4, level))
    drops = jnp.where(drops < 0.8, 0.0, drops)[..., None]
    brown = jnp.asarray(parts.tint(_MUD, x.shape[-1]))[None, None]
    return jnp.where(mud > 0, (1 - drops) * x + drops * brown, x + water)


def _widths(shape: tuple[int, ...], table: Rows, column: int, level: Array):
    return [pick([parts.gaussian_matrix(n, row[column]) for row in table], level) for n in shape[:2]]


def _layer(key, shape):
    return jax.random.normal(key, shape[:2])


DRAWS = {snow: _snow, frost: _ice, fog: draw_plasma, spatter: _layer}
"""What each corruption of this file draws."""

WEATHER = {apply.__name__: Corruption(apply.__name__, draw, apply) for apply, draw in DRAWS.items()}
"""Name to corruption."""
