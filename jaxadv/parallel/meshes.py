"""Meshes, and how a state lies on one: whole on every device, or in shares.

What lives here: `make_mesh`, the part of a mesh that is ours, layouts, placing and copying states. What does not: rows
(`batches.py`).
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxadv.core import PyTree, check

Layout = Callable[[tuple[int, ...], Mesh], PartitionSpec]
"""How a leaf of a state lies on a mesh, from its shape; `fsdp` makes one."""


def make_mesh(
    devices: int | Sequence[Any] | None = None, axes: Mapping[str, int] | None = None, explicit: bool = False
) -> Mesh:
    """Arrange devices in a named mesh.

    Devices of several slices (TPU pods joined by an ordinary network) are arranged so that only the first axis spans
    slices: sums over the others stay within one, and a sum over the first crosses the slow network once.

    Args:
      devices: the devices, or how many of `jax.devices()` to take; None takes as many as `axes` says, or all.
      axes: name to size of each mesh axis, e.g. `{'data': 8}`; None puts all devices on the axis `data`.
      explicit: whether shardings are part of the types (`jax.sharding.AxisType.Explicit`) or left to the compiler.

    Returns:
      The mesh.

    Raises:
      ValueError: if there are not so many devices, the axes do not multiply to the number of devices, or the first
        one is no multiple of the number of slices.
    """
    known = jax.devices()
    if devices is None:
        devices = len(known) if axes is None else math.prod(axes.values())
    if isinstance(devices, int):
        check.whole("devices", devices)
        if devices > len(known):
            raise ValueError(
                f"devices must be at most the {len(known)} that jax sees; got {devices}. On a CPU, set "
                f"jax.config.update('jax_num_cpu_devices', {devices}) before the first array is made."
            )
        devices = known[:devices]
    axes = {"data": len(devices)} if axes is None else dict(axes)
    if math.prod(axes.values()) != len(devices):
        raise ValueError(
            f"the axes of a mesh must multiply to its {len(devices)} devices; got {axes}. "
            "Pass fewer devices or another size of an axis."
        )
    kinds = (AxisType.Explicit if explicit else AxisType.Auto,) * len(axes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=list(devices), axis_types=kinds)
    first, *others = axes.values()
    if first % slices:
        raise ValueError(
            f"the first axis of a mesh must be a multiple of the {slices} slices that its devices belong to; got "
            f"{axes}. Put the axis that shares rows first."
        )
    within, across = (first // slices, *others), (slices, *(1 for _ in others))
    return Mesh(create_hybrid_device_mesh(within, across, list(devices)), tuple(axes), axis_types=kinds)


def local(mesh: Mesh | None) -> Mesh | None:
    """Return the part of a mesh of one axis that belongs to this process.

    Args:
      mesh: the mesh, or None.

    Returns:
      A mesh of the devices of this process, in their order; None for None.
    """
    if mesh is None or jax.process_count() == 1:
        return mesh
    mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return Mesh(np.asarray(mine), mesh.axis_names)


def fsdp(axis: str = "data", least: int = 2**14) -> Layout:
    """Lay a state out so that every device keeps a share of each large leaf: for networks that do not fit.

    A leaf is split along its longest axis among those that the mesh axis divides; the compiler gathers it where a step
    uses it, and sums gradients straight into the shares. Averages and momenta are split like their parameters.

    Args:
      axis: the mesh axis that shares leaves, usually the one that shares rows.
      least: leaves of fewer elements, and those that no axis divides, stay whole on every device.

    Returns:
      What `compile_step` takes as `layout`.

    References:
      Rajbhandari et al. 2020, ZeRO: Memory optimizations toward training trillion parameter models, arXiv:1910.02054
      (stage 3); Xu et al. 2020, Automatic cross-replica sharding of weight update, arXiv:2004.13336.
    """

    def layout(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        parts = mesh.shape[axis]
        fits = [i for i, size in enumerate(shape) if size % parts == 0 and size >= parts]
        if math.prod(shape) < least or not fits:
            return PartitionSpec()
        longest = max(fits, key=lambda i: shape[i])
        return PartitionSpec(*(axis if i == longest else None for i in range(len(shape))))

    return layout


def is_key(leaf: Any) -> bool:
    """Tell whether a leaf holds typed keys.

    Args:
      leaf: an array or a number.

    Returns:
      Whether its type is one of keys.
    """
    kind = getattr(leaf, "dtype", None)
    return kind is not None and jnp.issubdtype(kind, jax.dtypes.prng_key)


@functools.lru_cache(maxsize=1024)
def named(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """Return a sharding, the same object each time: a step asks for it at every call.

    Args:
      mesh: the mesh.
      spec: which of its axes split which axes of an array.

    Returns:
      The sharding.
    """
    return NamedSharding(mesh, spec)


def lies(leaf: Any, where: NamedSharding) -> bool:
    """Tell whether a leaf lies where it should, so that nothing need be moved.

    Args:
      leaf: an array, a numpy array or a number.
      where: where it should lie.

    Returns:
      Whether it does.
    """
    return isinstance(leaf, jax.Array) and leaf.sharding == where


def sharding(leaf: Any, mesh: Mesh, layout: Layout | None = None) -> NamedSharding:
    """Return how a leaf of a state lies on a mesh.

    Args:
      leaf: an array, a number or a typed key; keys lie whole on every device.
      mesh: the mesh.
      layout: says it from the shape; None keeps every leaf whole on every device.

    Returns:
      Its sharding.
    """
    return named(mesh, PartitionSpec() if layout is None or is_key(leaf) else layout(np.shape(leaf), mesh))


def place(tree: PyTree, mesh: Mesh, layout: Layout | None = None) -> PyTree:
    """Place arrays that are global already, or of which every process holds all; a tree that lies right stays.

    Args:
      tree: arrays, numpy arrays, typed keys or numbers.
      mesh: the mesh.
      layout: as `sharding` takes it.

    Returns:
      The same values.
    """
    leaves, form = jax.tree.flatten(tree)
    where = [sharding(leaf, mesh, layout) for leaf in leaves]
    if all(map(lies, leaves, where)):
        return tree
    if jax.process_count() == 1:
        return form.unflatten(jax.device_put(leaves, where))

    def put(leaf, where):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, where)
        if is_key(leaf):
            data = jax.random.key_data(leaf)
            return jax.random.wrap_key_data(put(data, where), impl=jax.random.key_impl(leaf))
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

    return form.unflatten(map(put, leaves, where))


def replicate(tree: PyTree, mesh: Mesh | None = None) -> PyTree:
    """Copy a tree to every device of a mesh; no two leaves of the copy, and no leaf of the original, share memory.

    Args:
      tree: arrays, numpy arrays, typed keys or numbers.
      mesh: the mesh; None copies to the default device.

    Returns:
      The copy.
    """
    copy = jax.tree.map(jnp.copy, tree)  # device_put alone would share the buffer of the device it came from
    return copy if mesh is None else place(copy, mesh)
