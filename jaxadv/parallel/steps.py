"""The door: `compile_step` checks what it is given and returns an `Executor`, which is called like the step.

What lives here: placing states and batches, counting devices, donation. What does not: how a step is compiled
(`executors.py`).
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxadv.core import PyTree, check
from jaxadv.parallel import meshes
from jaxadv.parallel.batches import rows_of
from jaxadv.parallel.executors import HOW, Step
from jaxadv.parallel.meshes import Layout


class Executor:
    """A step compiled for an executor: what `compile_step` returns."""

    def __init__(self, run: Any, mesh: Mesh | None, spread: Callable, count: int, donate: bool, layout: Layout | None):
        self._run, self._spread, self._count, self._donate = run, spread, count, donate
        self.mesh, self.layout = mesh, layout
        self._ours: list[weakref.ref] = []  # the leaves returned by the last call

    def __call__(self, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        """Check the batch, place it and the state, and see to it that only memory of our own is donated."""
        state, metrics = self._run(*self._placed(state, batch))
        if self._donate:
            self._ours = list(map(weakref.ref, jax.tree.leaves(state)))
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
        return state if self.mesh is None else meshes.place(state, self.mesh, self.layout)

    def _placed(self, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        rows = rows_of(batch, everywhere=self.mesh is not None)
        if rows % self._count:
            raise ValueError(
                f"the rows of a batch must divide equally among the {self._count} devices; got {rows} rows. "
                f"Pad with parallel.pad_batch(batch, {self._count})."
            )
        return (self._owned(state) if self._donate else self.place(state)), self._spread(batch)

    def _owned(self, state: PyTree) -> PyTree:
        """The state in memory that may be given away: what we returned ourselves, and copies of all else."""
        leaves, form = jax.tree.flatten(state)
        mine = {id(known) for ref in self._ours if (known := ref()) is not None}
        given = list(map(id, leaves))
        if mine.issuperset(given) and len(set(given)) == len(given):  # what the last call returned, each leaf once
            return state
        strange = [i for i, a in enumerate(given) if a not in mine or a in given[:i]]
        for i, copy in zip(strange, self.place([jnp.copy(leaves[i]) for i in strange])):
            leaves[i] = copy
        return form.unflatten(leaves)


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
      layout: how the leaves of the state lie on the devices, under `'jit'` and `'explicit'` only (there the step must
        return a state of the structure that it got); None keeps all of it on every device.

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
    if layout is not None and (how not in ("jit", "explicit") or mesh is None):
        raise ValueError(
            f"layout must be None unless how='jit' with a mesh, or 'explicit' with one; got how={how!r} and "
            f"mesh={mesh}. The other executors keep the whole state on every device."
        )
    count = devices or _shards(mesh, data_axes, how)
    donated = (0,) if donate else ()
    laid = {} if layout is None else {"layout": layout}
    run, mesh, spread = build(step, mesh, data_axes, count, donated, **laid)
    return Executor(run, mesh, spread, count, donate, layout)


def _shards(mesh: Mesh | None, axes: tuple[str, ...], how: str) -> int:
    """How many parts the rows are split into."""
    if mesh is None:
        return 1
    return mesh.size if how == "pmap" else math.prod(mesh.shape[name] for name in axes)
