"""The executors: how a step is compiled for one device, many, or fake ones.

What lives here: one builder for each name in `HOW`, and the refusal of programs that the compiler splits wrongly. What
does not: checking arguments, placing states and donation (`steps.py`).
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core as jex
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxadv.core import PyTree
from jaxadv.core.jaxprs import held
from jaxadv.parallel.axes import Axis
from jaxadv.parallel.batches import global_batch
from jaxadv.parallel.meshes import Layout, is_key, lies, make_mesh, named, sharding

Step = Callable[..., tuple[PyTree, PyTree]]
"""`step(state, batch, *, axis_name=None) -> (state, metrics)`, pure, for the rows of one shard."""


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
    same, split = named(mesh, PartitionSpec()), named(mesh, PartitionSpec(axes))

    def keep(a):
        return a if is_key(a) else lax.with_sharding_constraint(a, sharding(a, mesh, layout))

    def run(state, batch):
        state, metrics = step(state, batch, axis_name=None)
        return state if layout is None else jax.tree.map(keep, state), metrics

    whole_state = same if layout is None else None  # None: as it comes, and as it was made
    run = jax.jit(run, donate_argnums=donated, in_shardings=(whole_state, split), out_shardings=(whole_state, same))
    return (run if count == 1 else _guarded(run)), mesh, _spread(mesh, axes)


def _spread(mesh: Mesh, axes: tuple[str, ...]) -> Callable[[PyTree], PyTree]:
    """How rows reach the devices: numpy arrays go in as they are, because the compiled step knows where they belong."""
    alone, split = jax.process_count() == 1, named(mesh, PartitionSpec(axes))

    def ready(leaf):
        return (alone and isinstance(leaf, np.ndarray)) or lies(leaf, split)

    return lambda batch: batch if all(map(ready, jax.tree.leaves(batch))) else global_batch(batch, mesh, axes)


_NOTHING = contextlib.nullcontext()


def _guarded(run: Callable) -> Callable:
    """Look at what was traced, once for each shape of the arguments, before it runs."""
    seen: set = set()

    def look(state, batch):
        leaves, form = jax.tree.flatten((state, batch))
        asked = form, *((leaf.shape, leaf.dtype) for leaf in leaves)
        if asked not in seen:
            if _splits_wrongly(run.trace(state, batch).jaxpr.jaxpr):
                raise ValueError(
                    "a step for how='jit' or 'explicit' on several devices must not hold per-example gradients of the "
                    "kernel of a convolution (vmap of grad); got one, and the compiler splits it into wrong numbers "
                    "without an error. Pass how='shard_map', which gives the same answer without the compiler's "
                    "splitting."
                )
            seen.add(asked)
        return _NOTHING

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
    values. `core.canonical` transposes such an input before, so axes are followed back through transpositions.
    """
    made = {v: eqn for eqn in jaxpr.eqns if eqn.primitive.name == "transpose" for v in eqn.outvars}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
            rows, batch = eqn.invars[0], spec.lhs_spec[0]
            while not isinstance(rows, jex.Literal) and rows in made:
                rows, batch = made[rows].invars[0], made[rows].params["permutation"][batch]
            if groups > 1 and batch != 0 and eqn.invars[1].aval.shape[spec.rhs_spec[1]] == 1:
                return True
        if eqn.primitive.name == "shard_map":  # split by hand: right
            continue
        if any(_splits_wrongly(inner) for value in eqn.params.values() for inner in held(value)):
            return True
    return False


def _explicit(
    step: Step, mesh: Mesh | None, axes: tuple[str, ...], count: int, donated: tuple[int, ...],
    layout: Layout | None = None,
):  # fmt: skip
    """The same with shardings in the types of what goes in and comes out, under `jax.set_mesh`.

    In between the compiler decides: typed shardings have no rule for much that a step does (strided convolutions as
    reshapes, single rows of a batch, keys beside rows).
    """
    axes = axes if mesh is not None else ("data",)
    auto: Any = jax.sharding.auto_axes
    where = _typed(mesh or _one_device(), AxisType.Explicit)

    def typed(state, batch, *, axis_name=None):
        laid = PartitionSpec() if layout is None else jax.tree.map(lambda a: sharding(a, where, layout).spec, state)
        run = auto(functools.partial(step, axis_name=axis_name), out_sharding=(laid, PartitionSpec()))
        return run(state, batch)

    run, _, spread = _jit(typed, where, axes, count, donated, AxisType.Explicit, layout)
    typed_mesh: Any = jax.set_mesh
    return _Within(run, lambda state, batch: typed_mesh(where)), where, spread


def _shard_map(step: Step, mesh: Mesh | None, axes: tuple[str, ...], count: int, donated: tuple[int, ...]):
    """Each device runs the step on its rows; jax checks that state and metrics come out the same on all."""
    axes = axes if mesh is not None else ("data",)
    mesh = _typed(mesh or _one_device(), AxisType.Auto)
    same, split = PartitionSpec(), PartitionSpec(axes)
    shard = functools.partial(step, axis_name=_axes(axes, checked=True))
    run = jax.shard_map(shard, mesh=mesh, in_specs=(same, split), out_specs=(same, same))
    given = (named(mesh, same), named(mesh, split))
    return jax.jit(run, donate_argnums=donated, in_shardings=given), mesh, _spread(mesh, axes)


def _pmap(step: Step, mesh: Mesh | None, axes: tuple[str, ...], count: int, donated: tuple[int, ...]):
    """The same by `jax.pmap`: all devices on one axis, which takes the first name; nothing is checked."""
    mesh = mesh or _one_device()
    devices = list(mesh.devices.flat)
    here = sum(d.process_index == jax.process_index() for d in devices)
    name = _axes(axes[:1], checked=False)
    shard = functools.partial(step, axis_name=name)
    run = jax.pmap(shard, name, in_axes=(None, 0), out_axes=(None, None), devices=devices, donate_argnums=donated)
    mesh = make_mesh(devices, {axes[0]: len(devices)})
    alone, split = jax.process_count() == 1, named(mesh, PartitionSpec(axes[:1]))
    folded = jax.jit(_fold, static_argnums=1, out_shardings=split if alone else None)  # not operation by operation

    def part(a):
        if not isinstance(a, jax.Array):
            return _fold(a, here)
        return folded(a if not alone or lies(a, split) else jax.device_put(a, split), here)

    return run, mesh, lambda batch: jax.tree.map(part, batch)


def _vmap(step: Step, mesh: Mesh | None, axes: tuple[str, ...], count: int, donated: tuple[int, ...]):
    """Fake devices on one: the shards are an axis of `jax.vmap`, which takes the first name."""
    name = _axes(axes[:1], checked=False)
    shard = functools.partial(step, axis_name=name)
    run = jax.vmap(shard, in_axes=(None, 0), out_axes=(None, None), axis_name=name, axis_size=count)

    def whole(state, batch):
        return run(state, jax.tree.map(lambda a: _fold(a, count), batch))

    return jax.jit(whole, donate_argnums=donated), None, lambda batch: batch


def _fold(a: Any, shards: int) -> Any:
    return a.reshape(shards, a.shape[0] // shards, *a.shape[1:])


HOW: dict[str, Callable] = {
    "jit": _jit,
    "explicit": _explicit,
    "shard_map": _shard_map,
    "pmap": _pmap,
    "vmap": _vmap,
}
"""Name of an executor to its builder; the names are what `compile_step` takes as `how`."""
