"""From a source to batches: order of an epoch, static shapes, prefetch, resume, and rows per process.

What lives here: the permutation of an epoch (`order`), a class-balanced order (`balanced_order`), the arithmetic of
steps and epochs, one padded batch (`make_batch`), and the stream of batches (`batches`). What does not: reading files
(`sources.py`), augmentation (on the device, inside the step), placing arrays on devices (pass `place=`), private
sampling (a Poisson sampler draws positions and masks of its own and calls `make_batch`).

Nothing here depends on timing, on the number of processes or on the platform: step t of a run is a pure function of
(seed, number of examples, batch size, t). Resuming is therefore a number, not a replay.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32

from jaxadv.core import check

_THREAD = "jaxadv-batches"


@runtime_checkable
class Readable(Protocol):
    """What the pipeline needs of a source: a length, random access, and the dataset index of each position."""

    index: Any

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def __getitem__(self, indices: Any) -> dict[str, np.ndarray]:
        """Return `x` and `y` at the given positions."""
        ...


def order(n: int, seed: int, epoch: int) -> Int32[np.ndarray, "n"]:
    """Return the order in which an epoch visits `n` examples: a uniform permutation, a pure function of its arguments.

    The permutation sorts the first `n` raw 64-bit words of the counter-based generator Philox-4x64-10 with key (seed,
    epoch). Raw words of a bit generator are fixed by definition, unlike the methods of `numpy.random.Generator`, so
    the order is the same on every platform and with every version of numpy.

    Args:
      n: number of examples, at least 1.
      seed: the run's seed, in [0, 2^64).
      epoch: which pass over the data, counted from 0.

    Returns:
      Positions 0 .. n-1, each once.

    Raises:
      ValueError: if an argument is not a whole number in its range.

    References:
      Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3, doi:10.1145/2063384.2063405.

    >>> order(5, seed=0, epoch=0).tolist()
    [0, 2, 1, 4, 3]
    """
    check.whole("n", n)
    check.whole("seed", seed, least=0)
    check.whole("epoch", epoch, least=0)
    if int(seed) >= 2**64:
        raise ValueError(f"seed must lie below 2^64; got {seed}. Take it modulo 2^64.")
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(int(n))
    return np.argsort(words, kind="stable").astype(np.int32)


def balanced_order(y: Int[np.ndarray, "n"], seed: int) -> Int32[np.ndarray, "n"]:
    """Return a fixed random order of which every prefix is class-balanced as far as the class sizes allow.

    First comes one example of every class, then a second one of every class, and so on; which example, and the order of
    classes within a round, follow `order(n, seed, 0)`.

    Args:
      y: labels [n].
      seed: which of the orders.

    Returns:
      Positions 0 .. n-1, each once. In any prefix, two classes that are not exhausted differ by at most one example.
    """
    shuffled = order(len(y), seed, 0)
    grouped = np.argsort(y[shuffled], kind="stable")  # places in `shuffled`, class after class
    labels = y[shuffled][grouped]
    rounds = np.empty(len(y), np.int64)
    rounds[grouped] = np.arange(len(y)) - np.searchsorted(labels, labels, side="left")
    return shuffled[np.argsort(rounds, kind="stable")]


def steps_per_epoch(n: int, batch_size: int, *, drop_last: bool = True) -> int:
    """Return how many batches one pass over `n` examples gives.

    Args:
      n: number of examples.
      batch_size: examples per (global) batch.
      drop_last: leave out the last, smaller batch; otherwise it is padded.

    Returns:
      `n // batch_size`, or the same rounded up.

    Raises:
      ValueError: if an epoch would hold no batch at all.
    """
    check.whole("n", n)
    check.whole("batch_size", batch_size)
    if drop_last and batch_size > n:
        raise ValueError(
            f"batch_size must be at most the number of examples while the last, smaller batch is dropped; "
            f"got batch_size={batch_size} for {n} examples. Use a smaller batch, or drop_last=False."
        )
    return n // batch_size if drop_last else -(-n // batch_size)


def epoch_and_step(step: int, per_epoch: int) -> tuple[int, int]:
    """Split a global step into the epoch and the step within that epoch, both counted from 0.

    Args:
      step: the global step.
      per_epoch: steps per epoch, from `steps_per_epoch`.

    Returns:
      (epoch, step within the epoch).
    """
    check.whole("step", step, least=0)
    check.whole("per_epoch", per_epoch)
    return divmod(int(step), int(per_epoch))


def process_rows(batch_size: int, process: tuple[int, int]) -> slice:
    """Return which rows of each global batch belong to one process of several.

    Args:
      batch_size: rows of the global batch.
      process: (this process, number of processes), the first counted from 0.

    Returns:
      Rows [i * b / n, (i + 1) * b / n): the processes' rows, put one after another, are the global batch.

    Raises:
      ValueError: if the process number is out of range or the batch cannot be divided evenly.
    """
    i, n = process
    check.whole("the number of processes", n)
    check.whole("batch_size", batch_size)
    if not 0 <= i < n:
        raise ValueError(f"process must be (i, n) with 0 <= i < n; got {process}. Processes are counted from 0.")
    if batch_size % n:
        raise ValueError(
            f"batch_size must be a multiple of the number of processes; got batch_size={batch_size} for {n} processes. "
            f"Use {max(1, round(batch_size / n)) * n}."
        )
    rows = batch_size // n
    return slice(i * rows, (i + 1) * rows)


def as_floats(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Make floats of stored bytes.

    Args:
      batch: `x`, with `scale` beside it where `x` is bytes, and whatever else.

    Returns:
      The batch without `scale`; `x` float32, divided by it.
    """
    if "scale" not in batch:
        return batch
    floats = batch["x"].astype(np.float32) / np.float32(batch["scale"])
    return {name: floats if name == "x" else value for name, value in batch.items() if name != "scale"}


def make_batch(
    source: Readable, positions: Any, size: int | None = None, *, process: tuple[int, int] = (0, 1),
    stored: bool = False,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Gather one batch of static shape.

    Args:
      source: a `Source`.
      positions: integers [k] into the source, in [0, len(source)); -1 marks a row that is padding.
      size: rows of the global batch, at least k; the rest is padding. Default k.
      process: (i, n): return only the rows of process i of n.
      stored: give `x` as the source keeps it (`Source.stored`), to be finished by `as_floats`.

    Returns:
      `x` float32 [b, ...], `y` int32 [b], `index` int32 [b] (index in the data set; -1 for padding) and `mask` bool [b]
      (False for padding). Padded rows repeat the source's first example, so that they hold ordinary values.

    Raises:
      ValueError: if there are more positions than rows, or positions are not integers of shape [k].
      IndexError: if a position is outside the source.
    """
    given = np.asarray(positions)
    if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        raise ValueError(
            f"positions must be integers of shape [k]; got {given.dtype}{list(given.shape)}. Pass a list of positions."
        )
    size = len(given) if size is None else size
    check.whole("size", size)
    if len(given) > size:
        raise ValueError(f"a batch of {size} rows can hold at most {size} positions; got {len(given)}. Raise size.")
    if given.size and (given.min() < -1 or given.max() >= len(source)):
        raise IndexError(
            f"positions must lie in [0, {len(source)}), or be -1 for padding; got {given.min()} to {given.max()}. "
            "Dataset indices instead of positions? Look them up in source.index."
        )
    places = np.full(size, -1, np.int32)
    places[: len(given)] = given
    places = places[process_rows(size, process)]
    mask = places >= 0
    real = np.where(mask, places, 0)
    kept = getattr(source, "stored", None) if stored else None
    batch = source[real] if kept is None else kept(real)
    index = np.where(mask, np.asarray(source.index)[real], -1).astype(np.int32)
    return {name: batch[name] for name in ("x", "y", "scale") if name in batch} | {"index": index, "mask": mask}


@dataclasses.dataclass(frozen=True)
class _Passes:
    """What step t visits of some positions: `rows` at a time, in a new order in every pass."""

    positions: np.ndarray
    rows: int
    seed: int
    shuffle: bool
    drop_last: bool

    def __post_init__(self):
        self.per_epoch  # noqa: B018  # raises where a pass would hold no batch

    @property
    def per_epoch(self) -> int:
        """Steps of one pass."""
        return steps_per_epoch(len(self.positions), self.rows, drop_last=self.drop_last)

    def __call__(self, step: int) -> np.ndarray:
        epoch, within = epoch_and_step(step, self.per_epoch)
        visited = self.positions
        if self.shuffle:
            visited = visited[_recent(len(visited), self.seed, epoch)]
        return visited[within * self.rows : (within + 1) * self.rows]


_recent = functools.lru_cache(maxsize=4)(order)  # of the streams that are read now


@dataclasses.dataclass(frozen=True)
class _Mixed:
    """What step t visits of a blend: its share of each part, in random places of the batch."""

    parts: tuple[_Passes, ...]
    seed: int
    shuffle: bool

    @property
    def per_epoch(self) -> int:
        """Steps of one pass over the first part."""
        return self.parts[0].per_epoch

    def __call__(self, step: int) -> np.ndarray:
        chosen = np.concatenate([at(step) for at in self.parts])
        return chosen[order(len(chosen), self.seed, step)] if self.shuffle else chosen


def _visits(source: Readable, batch_size: int, seed: int, shuffle: bool, drop_last: bool) -> _Passes | _Mixed:
    """Return what gives the positions of step t; each part of a blend makes passes of its own."""
    blended: Any = getattr(source, "parts", None)
    if blended is None:
        return _Passes(np.arange(len(source), dtype=np.int32), batch_size, seed, shuffle, drop_last)
    if not drop_last:
        raise ValueError(
            "drop_last must be True for a blend, whose parts end at different steps; got False. "
            "To visit every example once, read the sources that it was made of."
        )
    parts = blended(batch_size)
    made = (_Passes(at, rows, (seed + i) % 2**64, shuffle, True) for i, (at, rows) in enumerate(parts))
    return _Mixed((*made,), (seed + len(parts)) % 2**64, shuffle)


@dataclasses.dataclass(frozen=True)
class Reader:
    """The batch of step t: `positions(t)` of a source, padded to `rows`, as one process of several gets it."""

    source: Readable
    positions: Callable[[int], np.ndarray]
    rows: int
    process: tuple[int, int] = (0, 1)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Return the batch of a step."""
        return make_batch(self.source, self.positions(step), self.rows, process=self.process)

    def stored(self, step: int) -> dict[str, np.ndarray]:
        """Return it as the source keeps it: what travels between processes."""
        return make_batch(self.source, self.positions(step), self.rows, process=self.process, stored=True)


def batches(
    source: Readable,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    epochs: int | None = None,
    shuffle: bool = True,
    drop_last: bool = True,
    process: tuple[int, int] = (0, 1),
    prefetch: int = 2,
    workers: int = 0,
    place: Callable[[dict[str, np.ndarray]], Any] | None = None,
) -> Generator[Any, None, None]:
    """Stream batches, read ahead by one background thread, or by worker processes.

    Epoch e visits the examples in `order(len(source), seed, e)`. Batches are cut from the global order first and
    divided between processes second, so one and many processes see the same global batches. A source with `parts` (see
    `data.blend`) gives its fixed share of each part to every batch, in random places of it; each part is visited in an
    order of its own, and an epoch is one pass over the first part.

    Args:
      source: where examples come from.
      batch_size: rows of the global batch.
      seed: seed of the order, in [0, 2^64).
      start: global step to begin at; the stream equals the uninterrupted one from there on, also in mid-epoch.
      epochs: how many passes the uninterrupted stream makes (counted from step 0, not from `start`); None for no end.
      shuffle: False visits the source in its own order, in every epoch.
      drop_last: leave out the last, smaller batch of an epoch; False pads it (`mask` False, `index` -1). A blend
        leaves it out.
      process: (i, n): yield the rows of process i of n, `batch_size / n` of them.
      prefetch: batches read ahead; 0 reads in the caller's thread.
      workers: processes that read, each every so-many-th batch and `prefetch` of them ahead (grain's, which start as
        new interpreters: a script of yours needs `if __name__ == "__main__":`); 0 reads in this process. Worth it
        where decoding is what a step waits for, as with large images; the batches are the same.
      place: applied to each batch in the background thread, for example `jax.device_put`.

    Returns:
      A generator of batches as `make_batch` makes them. It closes its thread when it ends, when reading fails (the
      error appears at the step that failed, not earlier) and when it is closed or collected.

    Raises:
      ValueError: at once, not at the first batch, if a setting does not fit.
      ImportError: with `workers`, if grain is missing.

    >>> from jaxadv import data
    >>> first = next(data.batches(data.load("digits"), 32, seed=0))
    >>> first["x"].shape, first["y"].dtype.name
    ((32, 8, 8, 1), 'int32')
    """
    check.whole("start", start, least=0)
    if epochs is not None:
        check.whole("epochs", epochs, least=0)
    process_rows(batch_size, process)
    order(1, seed, 0)  # refuse a bad seed here, not in the thread
    visits = _visits(source, batch_size, seed, shuffle, drop_last)
    stop = None if epochs is None else epochs * visits.per_epoch
    return stream(Reader(source, visits, batch_size, process), start, stop, prefetch, workers, place)


def check_workers(workers: int) -> None:
    """Check that examples can be read by so many processes.

    Args:
      workers: their number; 0 reads in this process.

    Raises:
      ValueError: if it is no whole number of at least 0.
      ImportError: if it is not 0 and grain is missing.
    """
    check.whole("workers", workers, least=0)
    if not workers:
        return
    try:
        import grain  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"workers={workers} needs the package grain; got: {error}. Use pip install 'jaxadv[grain]', or workers=0."
        ) from error


def stream(
    read: Callable[[int], Any],
    start: int,
    stop: int | None,
    prefetch: int,
    workers: int = 0,
    place: Callable[[Any], Any] | None = None,
) -> Generator[Any, None, None]:
    """Yield what `read` makes of steps `start`, `start + 1`, ..., worked on ahead of time.

    Args:
      read: what makes a batch of the number of a step; with workers it must be picklable.
      start: the first step.
      stop: the step to end before; None for no end.
      prefetch: how many to work ahead; 0 uses no thread.
      workers: processes that call `read`; 0 calls it in the background thread.
      place: what the background thread makes of each batch before it is handed out.

    Returns:
      A generator of batches in the order of steps.

    Raises:
      ValueError: if a number is out of range.
      ImportError: with workers, if grain is missing.
    """
    check.whole("prefetch", prefetch, least=0)
    check_workers(workers)
    steps = itertools.count(start) if stop is None else iter(range(start, stop))
    if not workers:
        return _ahead(read if place is None else lambda step: place(read(step)), steps, prefetch)
    made = _made_by_workers(read, start, stop, workers, max(prefetch, 1))
    return _pulled(made, (lambda batch: batch) if place is None else place, steps, prefetch)


def _pulled(made: Any, place: Callable[[Any], Any], steps: Iterator[int], prefetch: int) -> Generator[Any, None, None]:
    """Hand out what workers made, each copied from shared memory and placed by the background thread; end them."""
    rows: Any = iter(made)  # workers start with the first batch

    def pull(step: int) -> Any:
        return place(as_floats({name: np.array(value) for name, value in next(rows).items()}))

    try:
        with contextlib.closing(rows):
            yield from _ahead(pull, steps, prefetch)
    finally:
        made = rows = None
        gc.collect()  # grain ends by an exception whose frames hold the last batch, and its shared memory, in a cycle


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Batches by number, as grain indexes them."""

    read: Callable[[int], Any]
    start: int
    stop: int | None

    def __len__(self) -> int:
        return (sys.maxsize if self.stop is None else max(self.stop, self.start)) - self.start

    def __getitem__(self, index: int) -> Any:
        return getattr(self.read, "stored", self.read)(self.start + int(index))


def _made_by_workers(read: Callable[[int], Any], start: int, stop: int | None, workers: int, depth: int) -> Any:
    """Return the iterable of batches that worker processes make, in order."""
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain reads flags of its own, and not everyone has a main of absl
        flags.FLAGS.mark_as_parsed()
    one = grain.MapDataset.source(_Steps(read, start, stop)).to_iter_dataset(grain.ReadOptions(0, 0))
    return one.mp_prefetch(grain.MultiprocessingOptions(workers, depth), worker_init_fn=_begin)


def _begin(worker: int, of: int) -> None:
    """Leave Ctrl-C to the process that trains; it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _ahead(read: Callable[[int], Any], steps: Iterator[int], depth: int) -> Generator[Any, None, None]:
    """Yield `read(step)` in order while one thread works on the next `depth` steps; 0 uses no thread."""
    if depth == 0:
        yield from map(read, steps)
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix=_THREAD)
    try:
        waiting = deque(pool.submit(read, step) for step in itertools.islice(steps, depth))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(read, step) for step in itertools.islice(steps, 1))
            yield batch
    finally:
        # A generator caught in a reference cycle may be collected inside its own thread, which cannot wait for itself.
        inside = threading.current_thread().name.startswith(_THREAD)
        pool.shutdown(wait=not inside, cancel_futures=True)
