"""Batches: counting their rows, padding them with rows that do not count, spreading them over devices.

What lives here: what is done to rows before a step sees them. What does not: reading data (the room `data`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxadv.core import PyTree, check
from jaxadv.parallel import meshes


def rows_of(batch: PyTree, everywhere: bool = False) -> int:
    """Count the rows of a batch.

    Args:
      batch: arrays `[b, ...]`.
      everywhere: whether the rows of all processes count, where each has its own part.

    Returns:
      How many rows there are.

    Raises:
      ValueError: if the leaves have different leading axes.
    """
    leaves = jax.tree.leaves(batch)
    shapes = [tuple(getattr(leaf, "shape", ())) for leaf in leaves]
    sizes: set[Any] = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"every leaf of a batch must have the same leading axis; got shapes {shapes}. "
            "What is the same for all rows (a step number, a key) belongs in the state."
        )
    parts = everywhere and not (isinstance(leaves[0], jax.Array) and not leaves[0].is_fully_addressable)
    return sizes.pop() * (jax.process_count() if parts else 1)


def pad_batch(batch: Mapping[str, PyTree], multiple: int) -> dict[str, PyTree]:
    """Pad a batch to a multiple of the number of devices with rows that do not count.

    Padding rows repeat row 0 (so that they are as harmless as real data), have `mask` False and, where the batch has an
    `index`, index -1. An empty batch becomes `multiple` rows of zeros that do not count.

    Args:
      batch: name to arrays (or pytrees of arrays) `[b, ...]`; numpy stays numpy. A batch without `mask` gets one.
      multiple: the number of rows becomes the next multiple of it.

    Returns:
      The batch with `mask` bool.

    Raises:
      ValueError: if `multiple` is not at least 1 or the leaves have different leading axes.
    """
    check.whole("multiple", multiple)
    n = rows_of(batch)
    extra = max(1, -(-n // multiple)) * multiple - n
    batch = {"mask": np.ones(n, bool), **batch}
    if not extra:
        return batch

    def pad(leaf, fill=None):
        lib = np if isinstance(leaf, np.ndarray) else jnp
        shape = (extra, *leaf.shape[1:])
        if fill is None and n:
            tail = lib.broadcast_to(leaf[:1], shape)
        else:
            tail = lib.full(shape, 0 if fill is None else fill, leaf.dtype)
        return lib.concatenate([leaf, tail])

    fills = {"mask": False, "index": -1}
    return {
        name: jax.tree.map(lambda leaf, name=name: pad(leaf, fills.get(name)), part) for name, part in batch.items()
    }


def global_batch(batch: PyTree, mesh: Mesh | None, data_axes: tuple[str, ...] = ("data",)) -> PyTree:
    """Spread a batch over the devices of a mesh, rows in order.

    Args:
      batch: arrays `[b, ...]`. With several processes each gives its own part of the rows, process 0 the first; arrays
        that are global already stay.
      mesh: the mesh, or None to leave the batch where it is.
      data_axes: the mesh axes that share the rows.

    Returns:
      Global arrays with the rows of all processes.
    """
    if mesh is None:
        return batch
    sharding = meshes.named(mesh, PartitionSpec(data_axes))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def place(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, batch)
