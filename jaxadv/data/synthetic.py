"""Generated data with known truth: every set here has a closed form that a test or a claim can be held against.

What lives here: Gaussians with one robust coordinate, linearly separable images with a known margin, two moons. What
does not: real data (`sources.py`). Each generator takes a typed key first and is a pure function of its arguments;
each returns a `Source`, so everything downstream treats it like real data.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxadv.core import check
from jaxadv.data.sources import Source, arrays

_FARTHEST = 8.0  # standard deviations; a float32 normal draw of jax stays below 6


def _key(key: Key[Array, ""]) -> None:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"key must be a typed key; got {key.dtype}. Pass jax.random.key(seed).")


def gaussians(
    key: Key[Array, ""], n: int, *, features: int = 100, eta: float | None = None, probability: float = 0.95
) -> Source:
    """Draw the data on which robustness and accuracy are at odds: one robust coordinate, many weak ones.

    With s = 2 y - 1: x_0 = s with the given probability and -s otherwise; x_1 .. x_d are independent N(eta s, 1). The
    mean of the weak coordinates classifies with accuracy Phi(eta sqrt(d)), yet a perturbation of size 2 eta in every
    coordinate (linf) turns it into its opposite; x_0 alone gives accuracy `probability` and withstands every eps < 1.

    Args:
      key: typed key.
      n: number of examples.
      features: d, the number of weak coordinates.
      eta: their mean; default 3 / sqrt(d), which gives accuracy 0.9987.
      probability: how often the robust coordinate agrees with the label, in [0.5, 1].

    Returns:
      A `Source` of shape (d + 1,) with classes 0 and 1, equally likely. Its bounds are symmetric and wide: no draw is
      clipped.

    Raises:
      ValueError: if a setting is out of range.

    References:
      Tsipras, Santurkar, Engstrom, Turner and Madry 2019, Robustness may be at odds with accuracy, eq. 1,
      arXiv:1805.12152.
    """
    _key(key)
    check.whole("n", n)
    check.whole("features", features)
    eta = 3.0 / math.sqrt(features) if eta is None else eta
    check.positive("eta", eta)
    if not 0.5 <= probability <= 1.0:
        raise ValueError(f"probability must lie in [0.5, 1]; got {probability}. Below 0.5 the label is only renamed.")
    k_label, k_agree, k_weak = jax.random.split(key, 3)
    y = jax.random.bernoulli(k_label, 0.5, (n,))
    s = np.where(y, 1.0, -1.0).astype(np.float32)
    agree = np.where(jax.random.bernoulli(k_agree, probability, (n,)), 1.0, -1.0).astype(np.float32)
    weak = np.asarray(jax.random.normal(k_weak, (n, features))) + np.float32(eta) * s[:, None]
    x = np.concatenate([(s * agree)[:, None], weak], axis=1).astype(np.float32)
    reach = float(math.ceil(eta + _FARTHEST))
    return arrays(x, np.asarray(y, np.int32), name="gaussians", classes=2, bounds=(-reach, reach))


def separable_images(
    key: Key[Array, ""], n: int, *, shape: tuple[int, ...] = (8, 8, 1), classes: int = 2, gap: float = 0.2
) -> Source:
    """Draw images that a known linear rule separates with a known margin.

    Pixel i (counted in row-major order over the whole image) belongs to class `i mod classes`. An image of class y has
    its own class's pixels uniform in [(1 + gap) / 2, 1] and all others uniform in [0, (1 - gap) / 2]. The linear
    classifier "mean over the pixels of each class" is right with margin at least `gap`, also after every linf
    perturbation below `gap / 2`.

    Args:
      key: typed key.
      n: number of examples; labels are balanced up to one example per class, in random order.
      shape: shape of an image, with at least one pixel for each class.
      classes: number of classes, at least 2.
      gap: the margin, in (0, 1].

    Returns:
      A `Source` with bounds [0, 1].

    Raises:
      ValueError: if a setting is out of range.
    """
    _key(key)
    check.whole("n", n)
    check.whole("classes", classes, least=2)
    if not 0.0 < gap <= 1.0:
        raise ValueError(f"gap must lie in (0, 1]; got {gap}. It is a difference of pixel values in [0, 1].")
    pixels = math.prod(shape)
    if pixels < classes:
        raise ValueError(f"shape must have a pixel for each of the {classes} classes; got {shape} with {pixels}.")
    k_label, k_pixel = jax.random.split(key)
    y = np.asarray(jax.random.permutation(k_label, np.arange(n) % classes), np.int32)
    noise = np.asarray(jax.random.uniform(k_pixel, (n, pixels))) * np.float32((1.0 - gap) / 2)
    own = np.arange(pixels) % classes == y[:, None]
    x = np.where(own, np.float32(1.0) - noise, noise).reshape(n, *shape)
    return arrays(x, y, name="separable_images", classes=classes)


def moons(key: Key[Array, ""], n: int, *, noise: float = 0.1) -> Source:
    """Draw two interleaved half circles in the plane.

    Class 0 lies on (cos t, sin t), class 1 on (1 - cos t, 1/2 - sin t), t uniform in [0, pi], each plus Gaussian noise
    that is cut at three standard deviations, so that the bounds hold exactly.

    Args:
      key: typed key.
      n: number of examples; the classes alternate in number up to one example, in random order.
      noise: standard deviation before the cut, at least 0.

    Returns:
      A `Source` of shape (2,) with bounds [-1 - 3 noise, 2 + 3 noise].

    Raises:
      ValueError: if a setting is out of range.
    """
    _key(key)
    check.whole("n", n)
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise must be finite and at least 0; got {noise}.")
    k_label, k_angle, k_noise = jax.random.split(key, 3)
    y = np.asarray(jax.random.permutation(k_label, np.arange(n) % 2), np.int32)
    t = np.asarray(jax.random.uniform(k_angle, (n,), maxval=math.pi))
    first = np.stack([np.cos(t), np.sin(t)], axis=1)
    second = np.stack([1.0 - np.cos(t), 0.5 - np.sin(t)], axis=1)
    x = np.where(y[:, None] == 0, first, second)
    x = x + np.float32(noise) * np.asarray(jax.random.truncated_normal(k_noise, -3.0, 3.0, (n, 2)))
    low, high = -1.0 - 3.0 * noise, 2.0 + 3.0 * noise
    return arrays(np.clip(x, low, high).astype(np.float32), y, name="moons", classes=2, bounds=(low, high))
