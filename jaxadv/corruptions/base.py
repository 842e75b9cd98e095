"""What a corruption is: what it draws, what it does with that to one image, and the door that makes it batched.

What lives here: the type, keys, severities, checks. What does not: any corruption.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxadv.core import check, example_keys
from jaxadv.corruptions.tables import TABLES, Rows

SEVERITIES = (1, 2, 3, 4, 5)
"""The five severities."""

LARGE = 65
"""Images whose shorter side has so many pixels take the table of large images unless told otherwise."""


def pick(values: Any, level: Array) -> Array:
    """Return the settings of one severity.

    Args:
      values: five of anything with one shape, known when the program is traced.
      level: the severity less one.

    Returns:
      float32, of the shape of one.
    """
    return jnp.asarray(np.asarray(values, np.float32))[level]


def nothing(key: Any, shape: tuple[int, ...]) -> None:
    """Draw nothing: what corruptions without randomness draw.

    Args:
      key: a typed key.
      shape: of the image.
    """
    del key, shape


@dataclasses.dataclass(frozen=True)
class Corruption:
    """A change of images that no adversary chose: a pure batched function `(key, x, severity) -> x`.

    It has two halves, both for one image, so that the random numbers can be held fixed or searched: `draw(key, shape)`
    gives a pytree of random numbers, the same at every severity, and `apply(x, drawn, level, table)` is a deterministic
    function of the image `[h, w, c]`, the drawn numbers, the severity less one (data, may be traced) and the settings
    of all severities (static). One compiled program serves all severities, also several in one batch.

    Attributes:
      name: enters the keys, so that two corruptions never share randomness.
      draw: what is random.
      apply: what is done.
    """

    name: str
    draw: Callable[[Any, tuple[int, ...]], Any]
    apply: Callable[[Array, Any, Array, Rows], Array]

    def __call__(
        self,
        key: Any,
        x: Float[Array, "b h w c"] | Float[np.ndarray, "b h w c"],
        severity: Any,
        *,
        index: Any = None,
        table: str | None = None,
    ) -> Float[Array, "b h w c"]:
        """Corrupt a batch.

        Args:
          key: a typed key.
          x: `[b, h, w, c]` in [0, 1].
          severity: 1 to 5, a number or one for each image; may be traced (then it is cut to that range).
          index: int `[b]` dataset indices, from which the random keys come; defaults to `arange(b)`.
          table: `small` (CIFAR-C) or `large` (ImageNet-C); default by size, see `LARGE`.

        Returns:
          float32 `[b, h, w, c]` in [0, 1].

        Raises:
          ValueError: on inputs of another shape or outside [0, 1], another severity, an unknown table.
          TypeError: on integer inputs.
        """
        check.inputs(x, (0.0, 1.0))
        level = _level(severity, x.shape[0])
        rows = settings(self.name, x.shape, table)
        index = jnp.arange(x.shape[0], dtype=jnp.int32) if index is None else jnp.asarray(index, jnp.int32)
        if index.shape != (x.shape[0],):
            raise ValueError(
                f"index must hold one dataset index for each of the {x.shape[0]} images; got {index.shape}. "
                "Slice it like x."
            )

        def one(key, image, level):
            return jnp.clip(self.apply(image, self.draw(key, image.shape), level, rows), 0.0, 1.0)

        return jax.vmap(one)(example_keys(key, self.name, index), jnp.asarray(x, jnp.float32), level)


def settings(name: str, shape: tuple[int, ...], table: str | None) -> Rows:
    """Return the settings of a corruption for images of a shape.

    Args:
      name: of the corruption.
      shape: `(..., h, w, c)`.
      table: `small`, `large`, or None for what suits the size.

    Returns:
      Five rows of numbers.

    Raises:
      ValueError: if there is no such table.
    """
    chosen = table or ("large" if min(shape[-3:-1]) >= LARGE else "small")
    return check.choice("table", chosen, TABLES[name])


def colors(name: str, x: Array) -> None:
    """Refuse images that are neither gray nor red, green and blue.

    Args:
      name: of the corruption.
      x: `[h, w, c]`.

    Raises:
      ValueError: if there are not one or three channels.
    """
    if x.shape[-1] not in (1, 3):
        raise ValueError(
            f"{name} must be given gray or RGB images, channels last; got {x.shape[-1]} channels. "
            "Channels first? Pass jnp.moveaxis(x, 1, -1)."
        )


def _level(severity: Any, b: int) -> Array:
    known = check.concrete(severity)
    if known is not None and (
        not np.issubdtype(known.dtype, np.integer) or np.any((known < SEVERITIES[0]) | (known > SEVERITIES[-1]))
    ):
        raise ValueError(f"severity must be a whole number from 1 to 5, or one for each image; got {severity}.")
    severity = jnp.asarray(severity, jnp.int32)
    if severity.shape not in ((), (b,)):
        raise ValueError(f"severity must be a number or one for each of the {b} images; got {severity.shape}.")
    return jnp.broadcast_to(jnp.clip(severity, 1, 5) - 1, (b,))


def as_bytes(x: Any) -> UInt8[np.ndarray, "..."]:
    """Cut numbers in [0, 1] to bytes, as the published files were: downwards.

    Args:
      x: any shape, in [0, 1].

    Returns:
      uint8 of that shape, `floor(255 x)`; what differs from a whole number by float32's rounding only counts as one.
    """
    return np.floor(255 * np.asarray(x, np.float64) + 1e-4).astype(np.uint8)
