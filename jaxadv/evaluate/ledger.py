"""What an evaluation keeps: the outcome of every example, what the passes share, and what each attack showed.

What lives here: plain records. What does not: how they are filled (`engine`) and what is told about them (`findings`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxadv.core import Threat
from jaxadv.evaluate.inputs import Problem
from jaxadv.evaluate.journal import Journal
from jaxadv.evaluate.protocols import Stage
from jaxadv.evaluate.report import CERTIFIED, ROBUST
from jaxadv.evaluate.slots import Server


class Outcome(NamedTuple):
    """What became of rows that an attack has finished with: one entry for each row, and the points that broke.

    It is what the journal stores; a fresh and a resumed run enter the same outcomes.
    """

    row: np.ndarray
    feasible: np.ndarray
    broken: np.ndarray
    size: np.ndarray
    predicted: np.ndarray
    claimed: np.ndarray
    queries: np.ndarray
    grads: np.ndarray
    zero_gradient: np.ndarray
    nonfinite: np.ndarray
    points: np.ndarray  # of the broken rows, in their order


@dataclasses.dataclass
class Ledger:
    """The outcome of every example so far; `by` is read as in `report`."""

    by: np.ndarray
    restart: np.ndarray
    size: np.ndarray
    adversarial: np.ndarray
    x: np.ndarray

    def open(self) -> np.ndarray:
        """Return the rows that nothing has broken."""
        return np.flatnonzero(self.by == ROBUST)

    def broken(self) -> np.ndarray:
        """Return the rows that an attack has broken."""
        return np.flatnonzero(self.by >= 0)

    def write(self, rows: np.ndarray, points: np.ndarray, verdict: Any, by: int, restart: int) -> None:
        """Enter the broken ones among these rows; `points` are theirs."""
        hit = verdict.broken
        at = rows[hit]
        self.by[at], self.restart[at] = by, restart
        self.size[at], self.adversarial[at] = verdict.size[hit], verdict.predicted[hit]
        self.x[at] = points

    def certified(self) -> np.ndarray:
        """Return the rows that a certificate covers."""
        return np.flatnonzero(self.by == CERTIFIED)

    def held(self) -> int:
        """Return how many examples count as robust: attacked in vain, or certified."""
        return len(self.open()) + len(self.certified())

    def copy(self) -> "Ledger":
        """Return a copy that shares no memory."""
        return Ledger(*(getattr(self, f.name).copy() for f in dataclasses.fields(self)))


class Progress:
    """Counts examples over all passes (budget, attack, restart) for the caller's progress bar."""

    def __init__(self, tell: Callable | None, passes: int, n: int):
        self.tell, self.total, self.n, self.finished = tell, passes * n, n, 0

    def __call__(self, done: int, stage: str) -> None:
        """Tell that `done` of the n examples of this pass are decided."""
        if self.tell is not None:
            self.tell(self.finished + done, self.total, stage)

    def close(self, stage: str) -> None:
        """End a pass."""
        self.finished += self.n
        self(0, stage)


@dataclasses.dataclass
class Work:
    """What all passes over the examples share."""

    problem: Problem
    base: Threat
    stages: tuple[Stage, ...]
    server: Server
    searches: tuple[tuple[str, Any], ...]  # precision and model of the search; the last is the model itself
    margin: np.ndarray
    batch: int
    certificate: Callable | None
    journal: Journal | None
    tick: "Progress"
    retried: int = 0

    def past(self, name: str) -> list[dict[str, np.ndarray]]:
        """Return the blocks that an earlier run left under a name."""
        return self.journal.past.get(name, []) if self.journal is not None else []

    def keep(self, name: str, **columns: Any) -> None:
        """Put a block on the disk."""
        if self.journal is not None:
            self.journal.append(name, **columns)


class Seen(NamedTuple):
    """What one attack showed at one budget: its row of the table and the evidence for the flags."""

    row: dict[str, Any]
    rows: int
    zero_gradient: int
    nonfinite: np.ndarray
    sizes: np.ndarray
    seconds: float
