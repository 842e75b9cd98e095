"""One step, many executors: a step is written once and runs on one device, on many, or on fake ones.

What lives here: meshes, the executors of `compile_step`, the four functions through which a step talks to the other
shards (`psum`, `pmean_weighted`, `axis_index`, `varying`), padding, and placing batches in one process or many. What
does not: any training step, data loading. A state is whole on every device unless a `Layout` (`fsdp`) splits it.

The rules that make the answer the same in every executor:

1. A step is `step(state, batch, *, axis_name=None) -> (state, metrics)`, pure, and sees the rows of one shard.
2. Losses are sums with counts; both go through `psum`, then are divided once. A mean of means is wrong as soon as masks
   make the shards unequal.
3. Parameters go through `varying` before every `jax.grad` with respect to them. Inside `jax.shard_map` the gradient
   with respect to a value that is the same on all shards is summed over the shards *inside* `jax.grad`, without an
   error: a later `psum` then counts it once for each device, and per-example clipping clips sums of gradients of
   strangers.
4. Noise and the optimizer come after the `psum` and use the same key on all shards, so that the state stays the same on
   all.
5. Randomness of an example comes from its `index`, never from its device.
6. Loop carries start from data (`zeros_like(x)`), not from constants (`zeros(shape)`).
"""

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxadv.core import PyTree, check
from jaxadv.core.jaxprs import held

AxisName = str | tuple[str, ...] | None
"""What a step gets as `axis_name`: one mapped axis, several, or None when it sees the whole batch."""

Step = Callable[..., tuple[PyTree, PyTree]]
"""`step(state, batch, *, axis_name=None) -> (state, metrics)`, pure, for the rows of one shard."""


Layout = Callable[[tuple[int, ...], Mesh], PartitionSpec]
"""How a leaf of a state lies on a mesh, from its shape; `fsdp` makes one."""


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


# ---------------------------------------------------------------------------------------------- what a step may call


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


# ------------------------------------------------------------------------------------------- meshes, batches, processes


def make_mesh(
    devices: int | Sequence[Any] | None = None, axes: Mapping[str, int] | None = None, explicit: bool = False
) -> Mesh:
    """Arrange devices in a named mesh.

    Args:
      devices: the devices, or how many of `jax.devices()` to take; None takes as many as `axes` says, or all.
      axes: name to size of each mesh axis, e.g. `{'data': 8}`; None puts all devices on the axis `data`.
      explicit: whether shardings are part of the types (`jax.sharding.AxisType.Explicit`) or left to the compiler.

    Returns:
      The mesh.

    Raises:
      ValueError: if there are not so many devices, or the axes do not multiply to the number of devices.
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
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=list(devices), axis_types=(kind,) * len(axes))


def distributed(spec: str) -> bool:
    """Join the processes of a run, once. Called by the command line before any array is made, by nothing else.

    Args:
      spec: `'off'`; `'auto'` where the cluster tells (Cloud TPU, Slurm, Open MPI, Kubernetes); or `'address:port,n,i'`:
        the coordinator, the number of processes and the number of this one.

    Returns:
      Whether there is more than this process to talk to.

    Raises:
      ValueError: on any other text.
    """
    if spec == "off":
        return False
    joined = jax.distributed.is_initialized()
    if spec == "auto":
        if not joined:
            jax.distributed.initialize()
        return True
    parts = [part.strip() for part in spec.split(",")]
    whole = len(parts) == 3 and ":" in parts[0] and parts[1].isdigit() and parts[2].isdigit()
    if not whole or int(parts[2]) >= int(parts[1]):
        raise ValueError(
            f"distributed must be 'auto', 'off' or 'address:port,n,i' with process i in [0, n); got {spec!r}. "
            "For example '127.0.0.1:1234,2,0' and '127.0.0.1:1234,2,1'."
        )
    if not joined:
        jax.distributed.initialize(parts[0], int(parts[1]), int(parts[2]))
    return True


def _rows(batch: PyTree) -> int:
    """How many rows a batch has, or a refusal if its leaves disagree."""
    sizes: set[Any] = {leaf.shape[0] if getattr(leaf, "ndim", 0) else None for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes:
        shapes = [tuple(getattr(leaf, "shape", ())) for leaf in jax.tree.leaves(batch)]
        raise ValueError(
            f"every leaf of a batch must have the same leading axis; got shapes {shapes}. "
            "What is the same for all rows (a step number, a key) belongs in the state."
        )
    return sizes.pop()


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
    n = _rows(batch)
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
    sharding = NamedSharding(mesh, PartitionSpec(data_axes))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def place(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, batch)


def _everywhere(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    return PartitionSpec()


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


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _put(tree: PyTree, mesh: Mesh, layout: Layout = _everywhere) -> PyTree:
    """Place arrays that are global already, or of which every process holds all."""

    def sharding(leaf):
        return NamedSharding(mesh, PartitionSpec() if _is_key(leaf) else layout(np.shape(leaf), mesh))

    if jax.process_count() == 1:
        return jax.device_put(tree, jax.tree.map(sharding, tree))

    def place(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding(leaf))
        if _is_key(leaf):
            return jax.random.wrap_key_data(place(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding(leaf), lambda index: value[index])

    return jax.tree.map(place, tree)


def replicate(tree: PyTree, mesh: Mesh | None = None) -> PyTree:
    """Copy a tree to every device of a mesh; no two leaves of the copy, and no leaf of the original, share memory.

    Args:
      tree: arrays, numpy arrays, typed keys or numbers.
      mesh: the mesh; None copies to the default device.

    Returns:
      The copy.
    """
    copy = jax.tree.map(jnp.copy, tree)  # device_put alone would share the buffer of the device it came from
    return copy if mesh is None else _put(copy, mesh)


# ----------------------------------------------------------------------------------------------- several processes


def whole(tree: PyTree) -> PyTree:
    """Fetch a tree, also where no process holds all of it. Every process must call it.

    Args:
      tree: arrays, no typed keys.

    Returns:
      The values as numpy arrays, the same in every process.
    """

    def leaf(a):
        split = isinstance(a, jax.Array) and not (a.is_fully_addressable or a.is_fully_replicated)
        return np.asarray(multihost_utils.process_allgather(a, tiled=True) if split else a)

    return jax.tree.map(leaf, tree)


PATIENCE = 7 * 24 * 3600
"""Seconds that a process waits for the others; one that is gone is noticed sooner, by its heartbeat."""

_meetings = itertools.count()


def _meet() -> None:
    """Wait until every process has come here: collectives on CPU give up on one that is half a minute late."""
    from jax._src import distributed as service  # jax has no public door to the service's barriers

    client: Any = service.global_state.client
    client.wait_at_barrier(f"jaxadv/{next(_meetings)}", PATIENCE * 1000)


def exchange(payload: bytes) -> list[bytes]:
    """Give every process the bytes of all processes. Every process must call it.

    Args:
      payload: of this process, of any length below 2 GiB.

    Returns:
      The payloads in the order of processes.
    """
    if jax.process_count() == 1:
        return [payload]
    _meet()
    sizes = np.ravel(multihost_utils.process_allgather(np.asarray([len(payload)], np.int32)))
    mine = np.zeros(max(int(sizes.max()), 1), np.uint8)
    mine[: len(payload)] = np.frombuffer(payload, np.uint8)
    every = multihost_utils.process_allgather(mine)
    return [row[:size].tobytes() for row, size in zip(every, sizes)]


def agree(mine: bool) -> bool:
    """Tell whether something holds in every process. Every process must call it.

    Args:
      mine: whether it holds in this one.

    Returns:
      Whether it holds in all.
    """
    return b"" not in exchange(b"1" if mine else b"")


def preempted(step: int) -> bool:
    """Tell, the same to every process at the same step, that one of them was asked to end (SIGTERM).

    Args:
      step: number of the step that was just done; every process asks after every step.

    Returns:
      True at the step at which all processes should save; always False where there is only one.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


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


# --------------------------------------------------------------------------------------------------------- executors


def _typed(mesh: Mesh, kind: AxisType) -> Mesh:
    """The same mesh with all axes of one kind."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(kind,) * len(mesh.axis_names))


def _axes(names: tuple[str, ...], checked: bool) -> Any:
    axes = tuple(Axis(name, checked) for name in names)
    return axes[0] if len(axes) == 1 else axes


def _one_device() -> Mesh:
    return make_mesh(jax.local_devices()[:1])


def _jit(
    step: Step, mesh: Mesh | None, axes: tuple[str, ...], count: int, donated: tuple[int, ...],
    kind: AxisType = AxisType.Auto, layout: Layout | None = None,
):  # fmt: skip
    """The compiler splits the step; it sees the whole batch."""
    if mesh is None:
        return jax.jit(functools.partial(step, axis_name=None), donate_argnums=donated), None, lambda batch: batch
    mesh = _typed(mesh, kind)
    same, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(axes))

    def keep(a):
        laid = layout or _everywhere
        return a if _is_key(a) else lax.with_sharding_constraint(a, NamedSharding(mesh, laid(np.shape(a), mesh)))

    def run(state, batch):
        state, metrics = step(state, batch, axis_name=None)
        return state if layout is None else jax.tree.map(keep, state), metrics

    whole_state = same if layout is None else None  # None: as it comes, and as it was made
    run = jax.jit(run, donate_argnums=donated, in_shardings=(whole_state, split), out_shardings=(whole_state, same))
    return (run if count == 1 else _guarded(run)), mesh, lambda batch: global_batch(batch, mesh, axes)


def _guarded(run: Callable) -> Callable:
    """Look at what was traced, once for each shape of the arguments, before it runs."""
    seen: set = set()

    def look(state, batch):
        shapes = tuple((np.shape(leaf), str(leaf.dtype)) for leaf in jax.tree.leaves((state, batch)))
        if shapes not in seen:
            if _splits_wrongly(run.trace(state, batch).jaxpr.jaxpr):
                raise ValueError(
                    "a step for how='jit' or 'explicit' on several devices must not hold per-example gradients of the "
                    "kernel "
                    "of a convolution (vmap of grad); got one, and the compiler splits it into wrong numbers without "
                    "an "
                    "error. Pass how='shard_map', which gives the same answer without the compiler's splitting."
                )
            seen.add(shapes)
        return contextlib.nullcontext()

    return _Within(run, look)


class _Within:
    """A compiled function that is called and lowered within a context made of its arguments."""

    def __init__(self, run: Any, within: Callable):
        self.run, self.within = run, within

    def __call__(self, state, batch):
        with self.within(state, batch):
            return self.run(state, batch)

    def lower(self, state, batch):
        with self.within(state, batch):
            return self.run.lower(state, batch)


def _splits_wrongly(jaxpr: Any) -> bool:
    """Whether a program holds a convolution that XLA's partitioner gets wrong where the examples are sharded.

    The per-example kernel gradient is a convolution whose groups are the examples: the leading axis of its input is the
    feature axis, with one input feature for each group. Split over the groups, all devices but the first return wrong
    values.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
            if groups > 1 and spec.lhs_spec[0] != 0 and eqn.invars[1].aval.shape[spec.rhs_spec[1]] == 1:
                return True
        if eqn.primitive.name == "shard_map":  # split by hand: right
            continue
        if any(_splits_wrongly(inner) for value in eqn.params.values() for inner in held(value)):
            return True
    return False


def _explicit(step: Step, mesh: Mesh | None, axes: tuple[str, ...], count: int, donated: tuple[int, ...]):
    """The same with shardings in the types of what goes in and comes out, under `jax.set_mesh`.

    In between the compiler decides: typed shardings have no rule for much that a step does (strided convolutions as
    reshapes, single rows of a batch, keys beside rows).
    """
    axes = axes if mesh is not None else ("data",)

    auto: Any = jax.sharding.auto_axes

    def typed(state, batch, *, axis_name=None):
        return auto(functools.partial(step, axis_name=axis_name), out_sharding=PartitionSpec())(state, batch)

    run, mesh, place = _jit(typed, mesh or _one_device(), axes, count, donated, AxisType.Explicit)
    typed_mesh: Any = jax.set_mesh
    return _Within(run, lambda state, batch: typed_mesh(mesh)), mesh, place


def _shard_map(step: Step, mesh: Mesh | None, axes: tuple[str, ...], count: int, donated: tuple[int, ...]):
    """Each device runs the step on its rows; jax checks that state and metrics come out the same on all."""
    axes = axes if mesh is not None else ("data",)
    mesh = _typed(mesh or _one_device(), AxisType.Auto)
    same, split = PartitionSpec(), PartitionSpec(axes)
    name = _axes(axes, checked=True)

    def shard(state, batch):
        return step(state, batch, axis_name=name)

    run = jax.jit(
        jax.shard_map(shard, mesh=mesh, in_specs=(same, split), out_specs=(same, same)), donate_argnums=donated
    )
    return run, mesh, lambda batch: global_batch(batch, mesh, axes)


def _pmap(step: Step, mesh: Mesh | None, axes: tuple[str, ...], count: int, donated: tuple[int, ...]):
    """The same by `jax.pmap`: all devices on one axis, which takes the first name; nothing is checked."""
    mesh = mesh or _one_device()
    devices = list(mesh.devices.flat)
    here = sum(d.process_index == jax.process_index() for d in devices)
    name = _axes(axes[:1], checked=False)

    def shard(state, batch):
        return step(state, batch, axis_name=name)

    run = jax.pmap(shard, name, in_axes=(None, 0), out_axes=(None, None), devices=devices, donate_argnums=donated)
    return run, make_mesh(devices, {axes[0]: len(devices)}), lambda batch: _split(batch, here)


def _vmap(step: Step, mesh: Mesh | None, axes: tuple[str, ...], count: int, donated: tuple[int, ...]):
    """Fake devices on one: the shards are an axis of `jax.vmap`, which takes the first name."""
    name = _axes(axes[:1], checked=False)

    def shard(state, batch):
        return step(state, batch, axis_name=name)

    run = jax.vmap(shard, in_axes=(None, 0), out_axes=(None, None), axis_name=name, axis_size=count)
    return jax.jit(run, donate_argnums=donated), None, lambda batch: _split(batch, count)


def _split(batch: PyTree, shards: int) -> PyTree:
    return jax.tree.map(lambda a: a.reshape(shards, a.shape[0] // shards, *a.shape[1:]), batch)


HOW: dict[str, Callable] = {
    "jit": _jit,
    "explicit": _explicit,
    "shard_map": _shard_map,
    "pmap": _pmap,
    "vmap": _vmap,
}
"""Name of an executor to its builder; the names are what `compile_step` takes as `how`."""


class Executor:
    """A step compiled for an executor: what `compile_step` returns."""

    def __init__(
        self, run: Any, mesh: Mesh | None, spread: Callable, count: int, donate: bool, layout: Layout = _everywhere
    ):
        self._run, self._spread, self._count, self._donate = run, spread, count, donate
        self.mesh, self.layout = mesh, layout
        self._ours: list[weakref.ref] = []  # the leaves returned by the last call

    def __call__(self, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        """Check the batch, place it and the state, and see to it that only memory of our own is donated."""
        state, metrics = self._run(*self._placed(state, batch))
        if self._donate:
            self._ours[:] = [weakref.ref(leaf) for leaf in jax.tree.leaves(state)]
        return state, metrics

    def lower(self, state: PyTree, batch: PyTree) -> Any:
        """Lower the step without running it, to look at its program.

        Args:
          state: as the step gets it.
          batch: as the step gets it.

        Returns:
          A `jax.stages.Lowered`: `.compile()` has `as_text()`, `memory_analysis()` and `cost_analysis()`, for each
          device.
        """
        return self._run.lower(*self._placed(state, batch))

    def place(self, state: PyTree) -> PyTree:
        """Place a state on the devices as the step will return it, e.g. as the pattern of a checkpoint to be read.

        Args:
          state: arrays that every process holds whole.

        Returns:
          The same values.
        """
        return state if self.mesh is None else _put(state, self.mesh, self.layout)

    def _placed(self, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        rows = _rows(batch) if self.mesh is None else _total_rows(batch)
        if rows % self._count:
            raise ValueError(
                f"the rows of a batch must divide equally among the {self._count} devices; got {rows} rows. "
                f"Pad with parallel.pad_batch(batch, {self._count})."
            )
        return (self._owned(state) if self._donate else self.place(state)), self._spread(batch)

    def _owned(self, state: PyTree) -> PyTree:
        """The state in memory that may be given away: what we returned ourselves, and copies of all else."""
        mine, seen = {id(known) for ref in self._ours if (known := ref()) is not None}, set()

        def leaf(a):
            keep = id(a) in mine and id(a) not in seen
            seen.add(id(a))
            return a if keep else self.place(jnp.copy(a))

        return jax.tree.map(leaf, state)


def compile_step(
    step: Step,
    *,
    how: str = "jit",
    mesh: Mesh | None = None,
    data_axes: tuple[str, ...] = ("data",),
    donate: bool = True,
    devices: int | None = None,
    layout: Layout | None = None,
) -> Executor:
    """Compile a step for an executor. The answer is the same for all of them and for any number of devices.

    | `how` | what runs | when |
    | --- | --- | --- |
    | `'jit'` | one program over the mesh, split by the compiler | training, the default |
    | `'explicit'` | the same; shardings are in the types of what goes in and out | beside code with typed shardings |
    | `'shard_map'` | the step on each device's rows, with collectives | private training, early-exit attacks |
    | `'pmap'` | the same through `jax.pmap` | code bases written around it |
    | `'vmap'` | fake devices on one device | tests |

    Under `'jit'` and `'explicit'` the step sees the whole batch and `axis_name=None`; elsewhere it sees the rows of one
    shard and an `Axis` (a tuple of them for several `data_axes`). Metrics must come out the same on every shard, so
    they are sums that went through `psum`: `'shard_map'` and `'vmap'` refuse others, `'pmap'` would return those of the
    first device. Per-example gradients of the kernel of a convolution (`vmap` of `grad`) are refused under `'jit'` and
    `'explicit'` on several devices, because the compiler splits them into wrong numbers without an error (seen on jax
    0.10.2 and 0.12.0).

    Donation: the memory of the state goes to the next state. Only what this function's result returned itself is given
    away; any other leaf (initial parameters, a checkpoint, leaves that you replaced, two leaves that are one array such
    as `params` and a fresh `ema`) is copied first, so that arrays of the caller stay alive. A state that was returned
    is used up by the next call: copy (`replicate`) what you keep.

    Args:
      step: `step(state, batch, *, axis_name=None) -> (state, metrics)`, pure.
      how: name of the executor, one of `HOW`.
      mesh: the devices (`make_mesh()` for all, of all processes); None is one device of this process in every executor.
      data_axes: mesh axes that share the rows of the batch; other axes of the mesh hold copies.
      donate: whether the state's memory is reused.
      devices: number of fake devices of `'vmap'`; None takes as many as the mesh has.
      layout: how the leaves of the state lie on the devices, under `'jit'` only; None keeps all of it on every device.

    Returns:
      An `Executor`, `callable(state, batch) -> (state, metrics)`: batch is a pytree of `[b, ...]` arrays with all rows
      (with several processes: the rows of this one, or global arrays); the state comes out without a device axis, the
      same on every device, or laid out by `layout`.

    Raises:
      ValueError: on an unknown executor or mesh axis; when called, on a batch that the devices cannot share equally.
    """
    build = check.choice("executor", how, HOW)
    if not data_axes:
        raise ValueError("data_axes must name at least one axis; got (). The usual name is 'data'.")
    if mesh is not None:
        for name in data_axes:
            check.choice("mesh axis", name, mesh.axis_names)
    if devices is not None:
        check.whole("devices", devices)
        if how != "vmap":
            raise ValueError(
                f"devices must be None unless how='vmap'; got {devices} with how={how!r}. "
                f"Real devices come from mesh=parallel.make_mesh({devices})."
            )
    if layout is not None and (how != "jit" or mesh is None):
        raise ValueError(
            f"layout must be None unless how='jit' with a mesh; got how={how!r} and mesh={mesh}. The other executors "
            "keep the whole state on every device."
        )
    count = devices or _shards(mesh, data_axes, how)
    donated = (0,) if donate else ()
    if layout is not None:
        run, mesh, spread = _jit(step, mesh, data_axes, count, donated, layout=layout)
        return Executor(run, mesh, spread, count, donate, layout)
    run, mesh, spread = build(step, mesh, data_axes, count, donated)
    return Executor(run, mesh, spread, count, donate)


def _shards(mesh: Mesh | None, axes: tuple[str, ...], how: str) -> int:
    """How many parts the rows are split into."""
    if mesh is None:
        return 1
    return mesh.size if how == "pmap" else math.prod(mesh.shape[name] for name in axes)


def _total_rows(batch: PyTree) -> int:
    """The rows of all processes together."""
    rows = _rows(batch)
    leaf = jax.tree.leaves(batch)[0]
    whole = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    return rows if whole else rows * jax.process_count()
