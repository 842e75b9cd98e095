"""Augmentations: pure functions `(key, x) -> x` of ONE example, which the trainer maps over the batch inside the step.

What lives here: crops and flips of the recipes, and the box of CutMix. What does not: mixing examples (each row
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


def resized_crop(area: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Callable:
    """Cut out a window of random area and shape at a random place and bring it to the old size, bilinearly.

    Args:
      area: least and largest share of the image that the window covers.
      ratio: least and largest width over height, drawn uniformly in its logarithm.

    Returns:
      `(key, x [h, w, c]) -> [h, w, c]`.

    Raises:
      ValueError: if a pair does not rise within its range.

    References:
      Szegedy et al. 2015, Going deeper with convolutions, arXiv:1409.4842, section 6. Differs from torchvision: sides
      that are longer than the image are cut (there the draw is repeated), places are no whole pixels.
    """
    for name, (low, high), most in (("area", area, 1.0), ("ratio", ratio, float("inf"))):
        if not 0 < low <= high <= most:
            raise ValueError(f"{name} must be a rising pair of positive numbers up to {most:g}; got {(low, high)}.")

    def augment(key, x):
        height, width, _ = x.shape
        share, shape, *places = jax.random.uniform(key, (4,))
        share = area[0] + share * (area[1] - area[0])
        shape = jnp.exp(jnp.log(ratio[0]) + shape * (jnp.log(ratio[1]) - jnp.log(ratio[0])))
        size = jnp.stack([jnp.sqrt(share * height * width / shape), jnp.sqrt(share * height * width * shape)])
        whole = jnp.asarray([height, width], size.dtype)
        size = jnp.minimum(size, whole)
        scale = whole / size
        corner = jnp.stack(places) * (whole - size)
        moved = jax.image.scale_and_translate(
            x.astype(size.dtype), x.shape, (0, 1), scale, -corner * scale, "linear", antialias=False
        )
        return moved.astype(x.dtype)

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


AUGMENTATIONS = {"crop": crop, "resized_crop": resized_crop, "flip": flip}
"""Name to a function that builds the augmentation from its settings."""
