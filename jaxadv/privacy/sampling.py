"""Which examples take part in a step: Poisson samples in arrays of one static shape.

What lives here: samplers, which tell the positions of a step, the probability that an example takes part, and how many
rows a batch has; and the stream of their batches. What does not: order for training without privacy (`data.batches`),
and what a sampler is worth (`plan.py`, `accounting.py`).

Step t is a pure function of (seed, t): words of the counter-based generator Philox with key (seed, t). So a resumed run
goes on by a number. Coins compare 64-bit words with `rate * 2^64`: exact to 2^-64, where a float32 uniform would miss a
small rate by parts in 10^5, upwards too. Whoever knows the seed knows who took part: it must stay secret.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from jaxadv import data as data_room
from jaxadv.core import check
from jaxadv.data.pipeline import Reader, stream

TAIL = 1e-25
"""A sampler without truncation gets so many rows that a sample overflows them with at most this probability."""


def seed_of(key) -> int:
    """Turn a key into the seed of samples.

    Args:
      key: a typed key, secret.

    Returns:
      64 bits.
    """
    high, low = np.asarray(jax.random.bits(key, (2,), jnp.uint32)).tolist()
    return (high << 32) | low


@dataclasses.dataclass(frozen=True)
class Poisson:
    """Each example takes part by a coin of its own; built by `poisson`.

    Attributes:
      n: number of examples.
      rate: probability that an example takes part in a step in which it may.
      rows: rows of a batch; of more examples a random subset takes part.
      cycle: example i may take part in the steps t with `t % cycle == i % cycle` only.
    """

    n: int
    rate: float
    rows: int
    cycle: int = 1

    @property
    def group(self) -> int:
        """The most examples that may take part in one step."""
        return -(-self.n // self.cycle)

    @property
    def size(self) -> float:
        """The expected number of examples in a step: public, what a private sum is divided by."""
        return self.rate * self.n / self.cycle

    @functools.cached_property
    def overflow(self) -> float:
        """Probability that a step's sample does not fit into the rows."""
        from scipy import stats

        return float(stats.binom.sf(self.rows, self.group, self.rate))

    @property
    def truncated(self) -> bool:
        """Whether the overflow is so likely that the accountant must know of it."""
        return self.overflow > TAIL

    def positions(self, seed: int, step: int) -> Int32[np.ndarray, " k"]:
        """Draw the sample of a step.

        Args:
          seed: 64 bits, from `seed_of`.
          step: counted from 0.

        Returns:
          Ascending positions, at most `rows`; possibly none.
        """
        mine = np.arange(int(step) % self.cycle, self.n, self.cycle, dtype=np.int32)
        words = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(len(mine))
        heads = np.ones(len(mine), bool) if self.rate == 1 else words < np.uint64(math.floor(self.rate * 2.0**64))
        if heads.sum() > self.rows:  # words below a bound are uniform: the smallest are a uniform subset
            heads[np.argsort(np.where(heads, words, np.iinfo(np.uint64).max), kind="stable")[self.rows :]] = False
        return mine[heads]


def poisson(
    n: int,
    size: float | None = None,
    *,
    rate: float | None = None,
    rows: int | None = None,
    multiple: int = 1,
    cycle: int = 1,
) -> Poisson:
    """Return a Poisson sampler whose batches all have the same number of rows.

    Args:
      n: number of examples.
      size: expected number of examples in a step; or give `rate`.
      rate: probability that an example takes part.
      rows: rows of a batch; fewer than a sample may need is **truncated** Poisson sampling, which only the accountant
        `'pld'` with neighbors `'replace_special'` counts. None takes as many as a sample needs but once in 10^25 steps.
      multiple: rows are rounded up to a multiple of this: devices times parts of an accumulated gradient.
      cycle: number of groups that take turns, for correlated noise; 1 is ordinary sampling.

    Returns:
      The sampler.

    Raises:
      ValueError: if a number is out of its range.

    References:
      Abadi et al. 2016, arXiv:1607.00133. Chua et al. 2024, Scalable DP-SGD: shuffling vs. Poisson subsampling,
      arXiv:2411.04205 (truncation). Choquette-Choo et al. 2023, (Amplified) banded matrix factorization,
      arXiv:2306.08153 (cycles).

    >>> poisson(60_000, 256).rows, poisson(60_000, 256, rows=320).truncated
    (439, True)
    """
    check.whole("n", n)
    check.whole("cycle", cycle)
    check.whole("multiple", multiple)
    if (size is None) == (rate is None):
        raise ValueError(f"exactly one of size and rate must be given; got size={size}, rate={rate}. Drop one.")
    rate = (size or 0) * cycle / n if rate is None else rate
    if not 0 < rate <= 1:
        raise ValueError(
            f"the sampling rate must lie in (0, 1]; got {rate:g} (size {size} of {n} examples in {cycle} groups). "
            "Lower the batch size."
        )
    made = Poisson(n, float(rate), 0, cycle)
    if rows is None:
        from scipy import stats

        rows = max(1, math.ceil(made.size))
        while rows < made.group and stats.binom.sf(rows, made.group, rate) > TAIL:
            rows += max(1, rows // 1000)
        rows = min(rows, made.group)
    check.whole("rows", rows)
    return dataclasses.replace(made, rows=-(-rows // multiple) * multiple)


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Batches of fixed size in a random order of the data. **No epsilon is known for it**: for experiments only.

    The accountants' numbers are for samples drawn by independent coins; the true epsilon of shuffled batches can be
    larger.

    Attributes:
      n: number of examples.
      size: examples in a step.

    References:
      Chua et al. 2024, How private are DP-SGD implementations?, arXiv:2403.17673.
    """

    n: int
    size: int

    cycle = 1

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self.size

    def positions(self, seed: int, step: int) -> Int32[np.ndarray, " k"]:
        """Return the positions of a step; see `Poisson.positions`."""
        per_epoch = data_room.steps_per_epoch(self.n, self.size)
        epoch, within = data_room.epoch_and_step(step, per_epoch)
        return data_room.order(self.n, seed, epoch)[within * self.size : (within + 1) * self.size]


def batches(
    sampler: Poisson | Shuffled,
    source: Any,
    seed: int,
    *,
    start: int = 0,
    process: tuple[int, int] = (0, 1),
    prefetch: int = 2,
    workers: int = 0,
    place: Callable[[dict[str, np.ndarray]], Any] | None = None,
) -> Generator[Any, None, None]:
    """Stream the batches of a sampler, without end, read ahead by one background thread, or by worker processes.

    Args:
      sampler: which examples.
      source: where they come from.
      seed: of the samples, from `seed_of`.
      start: step to begin at; the stream equals the uninterrupted one from there on.
      process: (i, n): yield the rows of process i of n.
      prefetch: batches read ahead; 0 reads in the caller's thread.
      workers: processes that read; see `data.batches`.
      place: applied to each batch in the background thread.

    Returns:
      A generator of batches as `data.make_batch` makes them, all with `sampler.rows` rows; padding has index -1 and
      mask False. A step whose sample is empty gives padding alone.

    Raises:
      ValueError: if the sampler is for another number of examples.
      ImportError: with `workers`, if grain is missing.
    """
    if len(source) != sampler.n:
        raise ValueError(
            f"the sampler must be for the {len(source)} examples of the source; got one for {sampler.n}. Build the "
            "plan from the data that is trained on, after validation data is held out."
        )
    check.whole("start", start, least=0)
    data_room.process_rows(sampler.rows, process)
    read = Reader(source, functools.partial(sampler.positions, seed), sampler.rows, process)
    return stream(read, start, None, prefetch, workers, place)
