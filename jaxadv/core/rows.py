"""Batches row by row: features in a line, one number for each row, a choice between rows.

What lives here: the three shapes that every attack needs. What does not: anything that looks across rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxadv.core.types import PyTree


def flat(value: Shaped[Array, "b ..."]) -> Shaped[Array, "b d"]:
    """Return the features of each row in one line.

    Args:
      value: `[b, ...]`.

    Returns:
      `[b, d]`.
    """
    return value.reshape(value.shape[0], -1)


def wide(value: Shaped[Array, " b"], x: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    """Shape one number for each row so that it broadcasts over the features of a batch.

    Args:
      value: `[b]`.
      x: `[b, ...]`; only its rank matters.

    Returns:
      `[b, 1, ..., 1]`.
    """
    return value.reshape(value.shape + (1,) * (x.ndim - 1))


def select(rows, yes: PyTree, no: PyTree) -> PyTree:
    """Choose between two states row by row.

    Args:
      rows: bool `[b]`.
      yes: the state taken where `rows` is True; every leaf `[b, ...]`.
      no: the state taken elsewhere.

    Returns:
      The mixed state.
    """
    return jax.tree.map(lambda a, b: jnp.where(wide(rows, a), a, b), yes, no)
