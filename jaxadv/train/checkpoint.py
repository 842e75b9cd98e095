"""Checkpoints on disk: asynchronous, whole or absent, the newest two and the best; the only file that knows orbax.

What lives here: writing and reading a nest of arrays with a small table of facts, keeping what must be kept, errors
that say what is lost and what is not. What does not: what a training state is (`trainer.py`) and when to save
(`driver.py`).

A checkpoint counts as soon as orbax has committed it; a write that was cut off is never seen again. Arrays are stored
by their path in the nest with one checksum over all, so that damaged files are refused instead of trained on: a sum to
which every process adds what it holds, the same however arrays are split. Several processes write and read together;
what is read lies as the pattern does, so another number of devices or processes may go on.
"""

import functools
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import parallel
from jaxadv.core import PyTree

_KEPT = 2
_AT_ONCE = 2**20


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the folder, what failed, and what to do."""


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def flatten(tree: PyTree) -> dict[str, Any]:
    """List the arrays of a nest by path; typed keys as their data.

    Args:
      tree: a pytree of arrays and typed keys.

    Returns:
      Path to array.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jax.random.key_data(a) if _is_key(a) else jnp.asarray(a) for path, a in leaves}


def _unflatten(tree: PyTree, found: Mapping[str, Any]) -> PyTree:
    def leaf(path, like):
        value = found[jax.tree_util.keystr(path)]
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(like)) if _is_key(like) else value

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _mixed(words: np.ndarray) -> np.ndarray:
    """Spread the bits of unsigned 64-bit words, so that sums of them notice what sums of neighbors would not."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def checksum(arrays: Mapping[str, Any]) -> int:
    """Return what this process adds to the checksum of named arrays, which does not depend on how they are split.

    Every element counts once, with its name and place: over all processes the sum is the same for any number of
    devices and processes.

    Args:
      arrays: name to array.

    Returns:
      A whole number below 2^64; the checksum is the sum over the processes, modulo 2^64.

    References:
      The mixing function is that of Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators,
      doi:10.1145/2660193.2660195, with the constants of variant 13 of Stafford.
    """
    total = 0
    for name, value in arrays.items():
        seed = np.uint64(zlib.crc32(name.encode()) << 32)
        shape = value.shape or (1,)
        strides = np.cumprod([1, *shape[:0:-1]], dtype=np.uint64)[::-1]
        for shard in value.addressable_shards:
            if shard.replica_id:
                continue
            parts = [part.indices(size) for part, size in zip(shard.index or [slice(None)], shape)]
            first, *others = (np.arange(*part, dtype=np.uint64) * stride for part, stride in zip(parts, strides))
            within = functools.reduce(np.add.outer, others, np.zeros((), np.uint64))
            data = np.asarray(shard.data).reshape(len(first), *within.shape)
            rows = max(1, _AT_ONCE // max(1, within.size))
            for i in range(0, len(first), rows):
                words = data[i : i + rows].view(f"u{data.dtype.itemsize}").astype(np.uint64)
                place = np.add.outer(first[i : i + rows] + seed, within)
                total += int(np.sum(_mixed(_mixed(place) + words), dtype=np.uint64))
    return total % 2**64


def _not_told_twice(record: logging.LogRecord) -> bool:
    """Whether to log a record: not the traceback of an error that orbax raises as well, for `_guard` to tell."""
    return not (record.exc_info and "orbax" in Path(record.pathname).parts)


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
      folder: where; made if absent.

    Raises:
      CheckpointError: if the folder cannot be made.
    """

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").addFilter(_not_told_twice)  # adding it again changes nothing
        self._ocp, self.folder, self.best = ocp, folder, None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=None, enable_async_checkpointing=True, cleanup_tmp_directories=True, step_prefix=None
            )
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint folder must be writable; {folder} failed with: {error}. Choose another folder."
            ) from error

    def steps(self) -> list[int]:
        """Return the steps of all committed checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree: PyTree, facts: Mapping[str, Any], *, best: bool = False) -> None:
        """Begin to write a checkpoint; returns once the arrays are copied. Errors may show only at the next call.

        Args:
          step: its number; one that exists already is left as it is.
          tree: a pytree of arrays and typed keys.
          facts: plain values to keep with it.
          best: keep it until a better one is committed.

        Raises:
          CheckpointError: if this or the previous write fails.
        """
        self.wait()
        if step not in self._manager.all_steps():
            arrays = flatten(tree)
            meta = {"facts": dict(facts), "checksum": _everyone(checksum(arrays)), "arrays": sorted(arrays)}
            args = self._ocp.args
            composite = args.Composite(state=args.StandardSave(arrays), meta=args.JsonSave(meta))
            self._guard(step, lambda: self._manager.save(step, args=composite, force=True))
        self._writing = step
        if best:
            self._next_best = step

    def wait(self) -> None:
        """Wait until everything is written, then drop what need not be kept.

        Raises:
          CheckpointError: if the write failed; older checkpoints are intact.
        """
        self._guard(self._writing, self._manager.wait_until_finished)
        if self._next_best is not None:
            self.best, self._next_best = self._next_best, None
        for step in self.steps()[:-_KEPT]:
            if step != self.best:
                self._guard(step, lambda step=step: self._manager.delete(step))

    _writing: int | None = None
    _next_best: int | None = None

    def _guard(self, step: int | None, act: Any) -> Any:
        try:
            return act()
        except Exception as error:  # orbax and tensorstore raise many kinds
            self._next_best = None
            good = [s for s in _committed(self.folder) if s != step]
            kept = (
                f"The checkpoint of step {good[-1]} is intact: free some space and resume."
                if good
                else "No earlier checkpoint exists."
            )
            raise CheckpointError(
                f"writing the checkpoint of step {step} to {self.folder} failed: {_first_line(error)}. "
                f"Is the disk full, over quota, or read-only? {kept}"
            ) from error

    def drop_after(self, step: int) -> None:
        """Delete checkpoints of later steps, which will be computed again.

        Args:
          step: the newest step to keep.
        """
        for later in [s for s in self.steps() if s > step]:
            self._manager.delete(later)

    def restore(self, tree: PyTree, step: int) -> tuple[PyTree, dict[str, Any]]:
        """Read a checkpoint.

        Args:
          tree: a pytree like the one that was saved; its shapes, types and places are what is asked for.
          step: which checkpoint.

        Returns:
          The arrays in the form of `tree`, and the facts.

        Raises:
          CheckpointError: if there is no such checkpoint, its files are damaged, or it holds other arrays.
        """
        known = self.steps()
        if step not in known:
            raise CheckpointError(
                f"{self.folder} must hold a checkpoint of step {step}; it has {known or 'none'}. "
                "Resume from one of these."
            )
        like = {name: _abstract(a) for name, a in flatten(tree).items()}
        found: Any = None
        meta: Any = None
        wrong = None
        try:
            found, meta = self._read(step, like)
        except Exception as error:  # orbax and tensorstore raise many kinds
            wrong = error
        read = parallel.agree(wrong is None)
        if read and meta["checksum"] != _everyone(checksum(found)):
            read, wrong = False, ValueError("its values do not match their checksum")
        if not read:
            good = [s for s in known if s < step]
            advice = (
                f"resume from the one before with resume={good[-1]}"
                if good
                else "it is the only one: begin anew in another folder"
            )
            words = "another process could not" if wrong is None else _first_line(wrong)
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.folder} must be whole; reading it failed: {words}. "
                f"Other checkpoints: {good or 'none'}; {advice}."
            ) from wrong
        return _unflatten(tree, found or {}), meta["facts"]

    def _read(self, step: int, like: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        args = self._ocp.args
        meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
        if meta["arrays"] != sorted(like):
            raise ValueError(f"it holds other arrays: {_odd(meta['arrays'], like)}")
        found = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(like)))["state"]
        return found, meta

    def close(self) -> None:
        """Wait for the last write and let go of the folder.

        Raises:
          CheckpointError: if the last write failed.
        """
        try:
            self.wait()
        finally:
            self._manager.close()


def _everyone(mine: int) -> str:
    """Add up what all processes found. Every process must call it."""
    total = sum(int.from_bytes(part, "little") for part in parallel.exchange(mine.to_bytes(8, "little")))
    return f"{total % 2**64:016x}"


def _abstract(a: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)


def _odd(names: list[str], like: Mapping[str, Any]) -> str:
    return ", ".join(sorted(set(names) ^ set(like))[:4])


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines[0] if lines else '')[:300]}"


def _committed(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
