"""Serving attacks: examples resident on the devices, slots kept full, results handed over as rows finish.

What lives here: how many slots there are, data on one or several devices, blocks of large sets, chunks of steps, and
what happens when memory runs out. What does not: the program itself (`core.serve`), verdicts and the order of attacks
(`engine`).

| choice | rule |
| --- | --- |
| slots | `CPU_SLOTS`, or what fits into half of the memory of an accelerator, at most `MOST_SLOTS`; at most one a row |
| out of memory | half the slots, and the rows that were in flight start anew |
| several devices | row `i` lives on device `i % devices`; every device drains a queue of its own, none waits for rows |
| several processes | each serves the rows of its own devices, which nobody else sees (`Server.own`); nothing is sent |
| chunk | as many steps as take about `SECONDS`: results reach the host (and a journal) that often |

A row's answer depends on its index and on the number of slots (through the shapes of batches: rounding), on nothing
else: not on order, refilling, chunks, or what else is in the queue.
"""

import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxadv import parallel
from jaxadv.core import Data, Result, advance_board, begin, block_of, canonical, check

CPU_SLOTS = 64
"""Slots on a CPU: batches of this size already run at full speed there, and more would leave longer tails."""

MOST_SLOTS = 1024
"""Slots on an accelerator, at most."""

SECONDS = 2.0
"""About how long a chunk of steps takes."""

BLOCK_BYTES = 2**30
"""Examples resident at once, in bytes for each device."""


def footprint(model: Any, x: Any) -> int:
    """Estimate the memory that one row needs in a gradient step.

    Args:
      model: logits from a batch.
      x: `[n, ...]` examples, for their shape.

    Returns:
      Bytes of all intermediate values of a gradient for one row: an upper estimate, compilers keep fewer.
    """

    def size(jaxpr: Any) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            inner = [j for v in eqn.params.values() for j in (v if isinstance(v, (tuple, list)) else (v,))]
            inner = [getattr(j, "jaxpr", j) for j in inner if isinstance(j, (jex.ClosedJaxpr, jex.Jaxpr))]
            own = sum(int(np.prod(v.aval.shape)) * 4 for v in eqn.outvars if hasattr(v.aval, "shape"))
            total += sum(map(size, inner)) if inner else own
        return total

    row = jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), jnp.float32)
    return max(size(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(model(x))))(row).jaxpr), 1)


def slots_for(model: Any, x: Any, device: Any = None) -> int:
    """Choose the number of slots of a device.

    Args:
      model: logits from a batch.
      x: `[n, ...]` examples.
      device: a jax device; None is the first.

    Returns:
      The number of slots, at most the number of examples.
    """
    device = jax.devices()[0] if device is None else device
    if device.platform == "cpu":
        return min(CPU_SLOTS, len(x))
    memory = (device.memory_stats() or {}).get("bytes_limit", 2**33)
    fits = max(memory // 2 // footprint(model, x), 1)
    return int(min(2 ** int(np.log2(fits)), MOST_SLOTS, len(x)))


def exhausted(error: BaseException) -> bool:
    """Tell whether an error says that a device has no memory left.

    Args:
      error: what was raised.

    Returns:
      True for jax's RESOURCE_EXHAUSTED.
    """
    return isinstance(error, (jax.errors.JaxRuntimeError, RuntimeError)) and "RESOURCE_EXHAUSTED" in str(error)


def _start(attack, key, model, data, queue, restart, *, slots):
    return begin(attack, key, model, data, queue, restart, slots=slots)


def _chunk(board, attack, key, model, data, queue, count, restart, limit, *, room):
    work = canonical(partial(advance_board, room=room))
    return work(board, attack, key, model, data, queue, count, restart, limit)


@lru_cache(maxsize=64)
def _programs(slots: int, room: int, mesh: Mesh | None) -> tuple[Callable, Callable]:
    """The two compiled functions: a board of idle slots, and a chunk of work on it."""
    start, chunk = partial(_start, slots=slots), partial(_chunk, room=room)
    if mesh is None:
        return jax.jit(start), jax.jit(chunk, donate_argnums=0)
    all_, own = PartitionSpec(), PartitionSpec(mesh.axis_names[0])
    settings: dict[str, Any] = {"mesh": mesh, "out_specs": own, "check_vma": False}
    start = jax.shard_map(start, in_specs=(all_, all_, all_, own, own, all_), **settings)
    chunk = jax.shard_map(chunk, in_specs=(own, all_, all_, all_, own, own, own, all_, all_), **settings)
    return jax.jit(start), jax.jit(chunk, donate_argnums=0)


def _power(n: int) -> int:
    """The next power of two, so that sets of nearly one size share a program."""
    return 1 << max(int(n) - 1, 0).bit_length()


class Server:
    """Examples on the devices, and slots in which attacks work on them.

    Attributes:
      slots: slots of each device; halved when memory runs out.
      rows: the row numbers that this process serves.
      work: row-steps that finished rows took (`needed`) and that slots did (`done`), steps, exchanges and dispatches.
    """

    def __init__(
        self, model: Any, x: Any, y: Any, *, index: Any = None, eps: Any = None, slots: int | None = None,
        mesh: Mesh | None = None, block: int | None = None,
    ):  # fmt: skip
        """Lay out the examples.

        Args:
          model: logits from a batch.
          x: `[n, ...]` examples.
          y: labels or a pytree, every leaf `[n, ...]`.
          index: int `[n]` dataset indices; `arange(n)` by default.
          eps: `[n]` budgets for attacks that are functions of budgets, or None.
          slots: slots of each device; None chooses.
          mesh: a mesh of one axis over the devices (of all processes), or None for one device.
          block: rows resident on each device at once; None chooses by size.

        Raises:
          ValueError: on numbers below 1, or a mesh of several axes.
        """
        if mesh is not None and len(mesh.axis_names) != 1:
            raise ValueError(f"mesh must have one axis; got {mesh.axis_names}. Pass jax.make_mesh((8,), ('data',)).")
        part = (0, 1) if mesh is None else (jax.process_index(), jax.process_count())
        mesh = parallel.local(mesh)
        self.model, self.mesh = model, mesh
        self.devices = 1 if mesh is None else mesh.size
        self.rows = np.flatnonzero(np.arange(len(x)) // self.devices % part[1] == part[0])
        self.n = len(self.rows)
        x = np.asarray(x)
        x = x if x.dtype == np.float64 else np.asarray(x, np.float32)
        index = np.arange(len(x), dtype=np.int32) if index is None else np.asarray(index, np.int32)
        eps = None if eps is None else np.asarray(eps, np.float32)
        every = Data(x, jax.tree.map(np.asarray, y), index, eps)
        self.data = every if part[1] == 1 else jax.tree.map(lambda a: a[self.rows], every)
        first = None if mesh is None else mesh.devices.flat[0]
        share = max(-(-self.n // self.devices), 1)
        slots = slots_for(model, x, first) if slots is None else slots
        most = max(BLOCK_BYTES // max(x[:1].nbytes, 1), 1)
        block = min(_power(share), most) if block is None else block
        check.whole("slots", slots)
        check.whole("block", block)
        self.slots, self.block = min(slots, share), block
        self.placed: tuple[int, Any] = (-1, None)
        self.work = {"needed": 0, "done": 0, "steps": 0, "exchanges": 0, "dispatches": 0}

    def own(self, rows: np.ndarray) -> np.ndarray:
        """Return those of some rows that this process serves.

        Args:
          rows: int `[m]` row numbers.

        Returns:
          Row numbers, in their order.
        """
        return rows[np.isin(rows, self.rows)]

    def drain(
        self, attack: Any, key: Any, rows: Any = None, *, restart: int = 0, model: Any = None
    ) -> Iterator[tuple[np.ndarray, Result]]:
        """Run an attack on some of the examples.

        Args:
          attack: an attack, or a pytree that makes one of budgets `[b]`.
          key: a typed key.
          rows: int `[m]` row numbers, worked on in this order; None is all. Rows of other processes are left out.
          restart: number of the restart.
          model: another model than the server's own, e.g. one of lower precision.

        Yields:
          `(rows, result)`: numbers of rows as they finish, each once, in any order, with their results (numpy).
        """
        model = self.model if model is None else model
        left = np.arange(self.n) if rows is None else np.searchsorted(self.rows, self.own(np.asarray(rows)))
        size = self.block * self.devices
        for number in range(-(-self.n // size)):
            part = left[(left >= number * size) & (left < (number + 1) * size)]
            while len(part):
                try:
                    for found, result in self._serve(attack, key, model, number, part, restart):
                        part = part[~np.isin(part, found)]
                        yield self.rows[found], result
                    break
                except Exception as error:
                    if not exhausted(error) or self.slots == 1:
                        raise
                    self.slots //= 2

    def _place(self, number: int) -> Any:
        """The examples of a block on the devices; the one before makes place for it."""
        if self.placed[0] == number:
            return self.placed[1]
        self.placed = (-1, None)
        size = self.block * self.devices
        here = jax.tree.map(lambda a: a[number * size : (number + 1) * size], self.data)

        def put(a):
            padded = np.concatenate([a, np.zeros((size - len(a), *a.shape[1:]), a.dtype)])
            if self.mesh is None:
                return jnp.asarray(padded)
            dealt = padded.reshape(self.block, self.devices, *a.shape[1:]).swapaxes(0, 1).reshape(padded.shape)
            return jax.device_put(dealt, self._sharding())

        self.placed = (number, jax.tree.map(put, here))
        return self.placed[1]

    def _sharding(self) -> Any:
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names[0]))

    def _serve(
        self, attack: Any, key: Any, model: Any, number: int, rows: np.ndarray, restart: int
    ) -> Iterator[tuple[np.ndarray, Result]]:
        """Serve rows of one block with the present number of slots."""
        data, devices, slots = self._place(number), self.devices, self.slots
        room = max(slots, 2 * block_of(slots))
        start, chunk = _programs(slots, room, self.mesh)
        local = rows - number * self.block * devices
        queue, count = np.zeros((devices, self.block), np.int32), np.zeros(devices, np.int32)
        for d in range(devices):
            own = local[local % devices == d] // devices
            queue[d, : len(own)], count[d] = own, len(own)
        queue, count = (jax.device_put(a, self._sharding()) for a in (queue.reshape(-1), count))
        turn = np.uint32(restart)
        board = start(attack, key, model, data, queue, turn)
        left, limit, before, first = len(rows), 16, np.zeros(2, np.int64), True
        while left:
            began = time.perf_counter()
            board, out = chunk(board, attack, key, model, data, queue, count, turn, np.int32(limit))
            filled = np.asarray(out.filled)
            steps = np.asarray([np.sum(board.steps), np.sum(board.swaps)], np.int64)
            spent = time.perf_counter() - began
            if not first or spent < SECONDS:  # the first may have compiled
                limit = int(np.clip(limit * np.clip(SECONDS / max(spent, 1e-4), 0.25, 4), 1, 2**20))
            first = False
            at = np.concatenate([d * room + np.arange(f) for d, f in enumerate(filled)]).astype(int)
            shard = np.repeat(np.arange(devices), filled)
            found, row, taken = jax.tree.map(lambda a, at=at: np.asarray(a)[at], out[:3])
            self.work["needed"] += int(taken.sum())
            self.work["done"] += int(steps[0] - before[0]) * slots
            self.work["steps"] += int(steps[0] - before[0])
            self.work["exchanges"] += int(steps[1] - before[1])
            self.work["dispatches"] += 1
            before, left = steps, left - len(at)
            if len(at):
                yield row * devices + shard + number * self.block * devices, found


def drain(
    attack: Any, key: Any, model: Any, x: Any, y: Any, rows: Any = None, *, slots: int | None = None,
    index: Any = None, restart: int = 0, mesh: Mesh | None = None, block: int | None = None,
) -> Iterator[tuple[np.ndarray, Result]]:  # fmt: skip
    """Run one attack on examples from slots; see `Server`, which serves several attacks from the same place.

    Args:
      attack: an attack.
      key: a typed key.
      model: logits from a batch.
      x: `[n, ...]` examples.
      y: labels or a pytree, every leaf `[n, ...]`.
      rows: int `[m]` row numbers; None is all.
      slots: slots of each device; None chooses.
      index: int `[n]` dataset indices; `arange(n)` by default.
      restart: number of the restart.
      mesh: a mesh of one axis over the devices, or None for one device.
      block: rows resident on each device at once; None chooses by size.

    Returns:
      An iterator over `(rows, result)`, in the order in which rows finish.
    """
    server = Server(model, x, y, index=index, slots=slots, mesh=mesh, block=block)
    return server.drain(attack, key, rows, restart=restart)
