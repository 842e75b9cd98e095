"""Augmentations: pure functions `(key, x) -> x` of ONE example, which the trainer maps over the batch inside the step.

What lives here: the crop and flip of the CIFAR recipes, and the box of CutMix. What does not: mixing examples (each row
lives alone, which private training and the keys by dataset index rely on; `terms.cutmix` mixes).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv.core import check


def crop(pad: int = 4, *, mirror: bool = False) -> Callable:
    """Pad and cut out a window of the old size at a random place.

    Args:
      pad: pixels on each side, at most the side of the image if mirrored.
      mirror: pad by the mirror image, edge rows repeated, instead of zeros.

    Returns:
      `(key, x [h, w, c]) -> [h, w, c]`.

    Raises:
      ValueError: if `pad` is not positive.
    """
    check.whole("pad", pad)

    def augment(key, x):
        corner = jax.random.randint(key, (2,), 0, 2 * pad + 1)
        sides = ((pad, pad), (pad, pad), (0, 0))
        wide = jnp.pad(x, sides, mode="symmetric") if mirror else jnp.pad(x, sides)
        return lax.dynamic_slice(wide, (corner[0], corner[1], jnp.zeros_like(corner[0])), x.shape)

    return augment


def flip() -> Callable:
    """Mirror left and right with probability one half.

    Returns:
      `(key, x [h, w, c]) -> [h, w, c]`.
    """

    def augment(key, x):
        return jnp.where(jax.random.bernoulli(key), x[:, ::-1], x)

    return augment


def box(key, height: int, width: int):
    """Draw the box of CutMix: its shape is that of the image, its center anywhere, and what lies outside is cut off.

    Before that its share of the area is uniform in (0, 1], the complement of Beta(1, 1); its sides are even numbers.

    Args:
      key: a typed key.
      height: of the image.
      width: of the image.

    Returns:
      bool `[height, width]`, True inside; nowhere, if the share is small.

    References:
      Yun et al. 2019, CutMix: regularization strategy to train strong classifiers with localizable features,
      arXiv:1905.04899, eq. 2; rounded as in the code of Rebuffi et al. 2021, arXiv:2103.01946.
    """
    share, *places = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.uniform(share))

    def inside(key, n):
        center, half = jax.random.randint(key, (), 0, n), jnp.floor(n * side).astype(jnp.int32) // 2
        place = jnp.arange(n)
        return (place >= center - half) & (place < center + half)

    rows, columns = (inside(key, n) for key, n in zip(places, (height, width)))
    return rows[:, None] & columns[None]


def chain(*augmentations: Callable) -> Callable:
    """Apply several augmentations in order, each with a key of its own.

    Args:
      *augmentations: functions `(key, x) -> x`.

    Returns:
      One such function.
    """

    def augment(key, x):
        for number, part in enumerate(augmentations):
            x = part(jax.random.fold_in(key, number), x)
        return x

    return augment


AUGMENTATIONS = {"crop": crop, "flip": flip}
"""Name to a function that builds the augmentation from its settings."""
