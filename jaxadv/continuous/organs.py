"""Few-shot episodes of synthetic organs, with a stated generator.

What lives here: the images, their label maps, episodes. What does not: what segments them (`prototypes`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxadv.core import check

IGNORED = 255
"""The label of pixels that no loss counts."""

ORGANS = 3
"""Kinds of synthetic organs; the last is held out of training as the novel one."""


class Episode(NamedTuple):
    """What a few-shot segmentation is given and asked.

    Attributes:
      support: `[s, h, w, c]` images.
      masks: int `[s, h, w]` label maps of them.
      query: `[q, h, w, c]` images.
      truth: int `[q, h, w]` label maps of these.
    """

    support: Any
    masks: Any
    query: Any
    truth: Any


# ------------------------------------------------------------------------------------------------------------ phantoms


def phantoms(key, n: int, *, size: int = 64, noise: float = 0.05) -> tuple[Any, Any]:
    """Draw images of synthetic organs: textured ellipses on a smooth background, with noise.

    Organ k of 1, 2, 3 is an ellipse with half axes uniform in 0.12 to 0.22 of the side, turned at random, around a
    place on a ring of radius 0.26 about the center: places are a third of the ring apart, up to 0.2 of a third, and the
    ring is turned at random. So organs rarely touch; where they do, the higher number covers. Its
    brightness is 0.3 + 0.15 k, plus 0.08 times a sine of 2 k + 1 periods across the image in a random direction. The
    background is 0.25 plus 0.08 times a cosine of one period. Everything is cut to [0, 1].

    Args:
      key: a typed key.
      n: number of images.
      size: side.
      noise: deviation of the normal noise of each pixel.

    Returns:
      Images `[n, size, size, 1]` and label maps int32 `[n, size, size]`.
    """
    check.whole("n", n)
    check.whole("size", size, 8)
    grid = (jnp.arange(size) + 0.5) / size
    down, right = jnp.meshgrid(grid, grid, indexing="ij")

    def wave(key, periods):
        k_way, k_phase = jax.random.split(key)
        way, phase = jax.random.uniform(k_way, maxval=2 * jnp.pi), jax.random.uniform(k_phase, maxval=2 * jnp.pi)
        return jnp.sin(2 * jnp.pi * periods * (jnp.cos(way) * right + jnp.sin(way) * down) + phase)

    def one(key):
        k_back, k_noise, k_ring, k_organ = jax.random.split(key, 4)
        image, labels = 0.25 + 0.08 * wave(k_back, 1), jnp.zeros((size, size), jnp.int32)
        ring = jax.random.uniform(k_ring, maxval=2 * jnp.pi)
        for organ, k in zip(range(1, ORGANS + 1), jax.random.split(k_organ, ORGANS)):
            k_place, k_axes, k_turn, k_wave = jax.random.split(k, 4)
            angle = ring + (organ + jax.random.uniform(k_place, minval=-0.2, maxval=0.2)) * 2 * jnp.pi / ORGANS
            turn = jax.random.uniform(k_turn, maxval=jnp.pi)
            y, x = down - 0.5 - 0.26 * jnp.sin(angle), right - 0.5 - 0.26 * jnp.cos(angle)
            axes = jax.random.uniform(k_axes, (2,), minval=0.12, maxval=0.22)
            u, v = jnp.cos(turn) * x + jnp.sin(turn) * y, jnp.cos(turn) * y - jnp.sin(turn) * x
            inside = jnp.square(u / axes[0]) + jnp.square(v / axes[1]) < 1
            image = jnp.where(inside, 0.3 + 0.15 * organ + 0.08 * wave(k_wave, 2 * organ + 1), image)
            labels = jnp.where(inside, organ, labels)
        image = image + noise * jax.random.normal(k_noise, (size, size))
        return jnp.clip(image, 0, 1)[..., None], labels

    return jax.vmap(one)(jax.random.split(key, n))


def sample_episode(
    key, organs: Any = (1,), *, shots: int = 1, queries: int = 1, size: int = 64, noise: float = 0.05
) -> Episode:
    """Draw an episode about some organs; the others are background.

    Args:
      key: a typed key.
      organs: their numbers, one for each way; may be traced.
      shots: support images.
      queries: query images.
      size: side of the images.
      noise: see `phantoms`.

    Returns:
      The episode.
    """
    x, labels = phantoms(key, shots + queries, size=size, noise=noise)
    maps = sum((way * (labels == organ) for way, organ in enumerate(organs, 1)), jnp.zeros_like(labels))
    return Episode(x[:shots], maps[:shots], x[shots:], maps[shots:])
