"""Low frequencies of images as directions for black-box searches: the cosine transform as products with matrices."""

import math

import numpy as np
from jaxtyping import Float


def cosines(length: int, count: int) -> Float[np.ndarray, "count length"]:
    """Return the first rows of the orthonormal cosine transform (type II): waves of rising frequency.

    Args:
      length: of a wave.
      count: how many, at most `length`.

    Returns:
      float32 `[count, length]`, rows of length one that are orthogonal to each other.
    """
    count = min(count, length)
    waves = np.cos(math.pi * (np.arange(length) + 0.5) * np.arange(count)[:, None] / length)
    waves *= np.where(np.arange(count) == 0, math.sqrt(1 / length), math.sqrt(2 / length))[:, None]
    return waves.astype(np.float32)
