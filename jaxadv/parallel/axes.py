"""The four functions through which a step talks to the other shards, and the name of the axis that it is given.

What lives here: `Axis`, `psum`, `pmean_weighted`, `axis_index`, `varying`. What does not: who maps the axis
(`executors.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxadv.core import PyTree

AxisName = str | tuple[str, ...] | None
"""What a step gets as `axis_name`: one mapped axis, several, or None when it sees the whole batch."""


class Axis(str):
    """The name of a mapped axis that knows whether its executor checks varying values.

    It is the plain name for `jax.lax.psum` and all other collectives. `checked` is True under `jax.shard_map` as it
    comes (`check_vma=True`), where `varying` has work to do, and False under `vmap` and `pmap`, where it has none.
    """

    checked: bool

    def __new__(cls, name: str, checked: bool) -> "Axis":
        """Return the name with its flag."""
        axis = super().__new__(cls, name)
        axis.checked = checked
        return axis


def _names(axis_name: AxisName) -> tuple[str, ...]:
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else axis_name


def psum(tree: PyTree, axis_name: AxisName = None) -> PyTree:
    """Sum every leaf over the shards.

    Args:
      tree: arrays, each shard's part of a sum.
      axis_name: the mapped axis or axes; None returns the tree as it is.

    Returns:
      The sums, the same on every shard.
    """
    names = _names(axis_name)
    return lax.psum(tree, names) if names else tree


def pmean_weighted(total: PyTree, count: Any, axis_name: AxisName = None) -> PyTree:
    """Divide a sum by a count after both were summed over the shards.

    Args:
      total: arrays, each shard's sum over its rows (rows whose mask is False left out).
      count: scalar, how many rows each shard counted.
      axis_name: the mapped axis or axes, or None.

    Returns:
      `psum(total) / psum(count)` in the floating type of each leaf; zeros if no shard counted a row.
    """
    total, count = psum((total, count), axis_name)

    def mean(leaf):
        leaf = jnp.asarray(leaf)
        kind = leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.float32
        wide = jnp.promote_types(kind, jnp.float32)  # counts above 256 are not exact in bfloat16
        rows = jnp.asarray(count, wide)
        return jnp.where(rows > 0, leaf.astype(wide) / jnp.where(rows > 0, rows, 1), 0).astype(kind)

    return jax.tree.map(mean, total)


def axis_index(axis_name: AxisName = None) -> Array:
    """Return the number of this shard.

    Randomness that uses it depends on the number of devices; use the `index` of the example instead.

    Args:
      axis_name: the mapped axis or axes, or None.

    Returns:
      int32 scalar in `[0, number of shards)`; 0 without an axis.
    """
    names = _names(axis_name)
    return lax.axis_index(names) if names else jnp.zeros((), jnp.int32)


def varying(tree: PyTree, axis_name: AxisName = None) -> PyTree:
    """Give every shard a copy of its own, so that a gradient with respect to it is that of the shard's own rows.

    Call it on the parameters before every `jax.grad` with respect to them. The values do not change.

    | `axis_name` | what happens |
    | --- | --- |
    | None | the tree as it is |
    | an `Axis` that is not checked (`vmap`, `pmap`) | the tree as it is; gradients are of the shard's own rows anyway |
    | an `Axis` that is checked (`shard_map`) | `jax.lax.pcast(leaf, axis, to='varying')`; what varies already stays |
    | a plain string | taken as checked: right in a `shard_map` of your own, refused by jax under a `vmap` of your own |

    Args:
      tree: arrays.
      axis_name: the mapped axis or axes, as the executor gave it to the step.

    Returns:
      The tree, varying over the axes.
    """
    names = tuple(name for name in _names(axis_name) if getattr(name, "checked", True))
    if not names:
        return tree

    def leaf(a):
        a = jnp.asarray(a)
        missing = tuple(name for name in names if name not in jax.typeof(a).mat.varying)
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(leaf, tree)
