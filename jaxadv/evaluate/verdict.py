"""The one verdict: is a point allowed, and does the model fail there, asked apart from the attack that made it.

What lives here: forward passes in batches of a fixed shape at matrix precision "highest", and the judgment of points:
float32, feasible in float64 (`core.feasible`), classified by the model itself. What does not: attacks, and what follows
from a verdict (`engine`).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxadv.core import Targets, Threat, as_callable, feasible
from jaxadv.threats import THREATS


class Verdict(NamedTuple):
    """What a point is worth, one row for each example; numpy arrays."""

    feasible: np.ndarray
    broken: np.ndarray
    size: np.ndarray
    predicted: np.ndarray


@jax.jit
def forward(model: Any, x: Any) -> Any:
    """Ask the model.

    Args:
      model: logits from a batch, a pytree.
      x: `[b, ...]`.

    Returns:
      `[b, k]`.
    """
    return model(x)


def batches(rows: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """Cut rows into batches of one size; the last is filled up with its own last row.

    Args:
      rows: row numbers.
      batch: rows of a batch.

    Yields:
      `(rows, real)`: row numbers of a batch, of which the first `real` count.
    """
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        yield np.concatenate([part, np.repeat(part[-1:], batch - len(part))]), len(part)


def logits_of(model: Any, x: np.ndarray, batch_size: int = 500) -> np.ndarray:
    """Ask the model, batch by batch, at matrix precision "highest".

    Args:
      model: logits from a batch.
      x: `[n, ...]`.
      batch_size: rows of a batch; the last is padded.

    Returns:
      float32 `[n, k]`.
    """
    return logits_in(model, x, min(batch_size, len(x)))


def logits_in(model: Any, x: np.ndarray, batch: int) -> np.ndarray:
    """Ask the model through batches of exactly this many rows, so that few rows do not ask for a program of their own.

    Args:
      model: logits from a batch, a pytree.
      x: `[n, ...]`.
      batch: rows of a batch.

    Returns:
      float32 `[n, k]`.
    """
    with jax.default_matmul_precision("highest"):
        found = [np.asarray(forward(model, x[rows]), np.float32)[:m] for rows, m in batches(np.arange(len(x)), batch)]
    return np.concatenate(found)


def verify(model: Any, x_adv: Any, x: Any, y: Any, threat: Threat, *, batch_size: int = 500) -> Verdict:
    """Judge points apart from the attack that made them; also stored ones and ones from elsewhere.

    Args:
      model: logits from a batch.
      x_adv: `[n, ...]` the points; judged as float32.
      x: `[n, ...]` the examples they belong to.
      y: int `[n]` labels, or `Targets`.
      threat: the allowed set; its `eps` a number or `[n]`.
      batch_size: rows of a forward pass.

    Returns:
      `feasible`, `broken` (feasible, and the logits are not finite, or the largest is not the label's or, with targets,
      is the target's), `size` in float64, `predicted` class (-1 where logits are not finite).

    Raises:
      ValueError: if the shapes of `x_adv` and `x` differ.
    """
    x_adv, x = np.asarray(x_adv, np.float32), np.asarray(x, np.float32)
    if x_adv.shape != x.shape:
        raise ValueError(f"x_adv must have the shape of x, {x.shape}; got {x_adv.shape}. Points of another selection?")
    return judge(as_callable(model), x_adv, x, y, host(threat), min(batch_size, len(x)))


def judge(model: Any, x_adv: np.ndarray, x: np.ndarray, y: Any, threat: Threat, batch: int) -> Verdict:
    """Do what `verify` does, through batches of exactly this many rows.

    Args:
      model: logits from a batch, a pytree.
      x_adv: float32 `[n, ...]` the points.
      x: float32 `[n, ...]` the examples.
      y: int `[n]` labels, or `Targets`.
      threat: with numpy leaves.
      batch: rows of a forward pass.

    Returns:
      The verdict.
    """
    allowed, size = np.zeros(len(x), bool), np.zeros(len(x))
    for start in range(0, len(x), batch):
        rows = slice(start, start + batch)
        part = cut(threat, np.arange(len(x))[rows], len(x))
        with np.errstate(invalid="ignore"):
            allowed[rows] = feasible(part, x_adv[rows], x[rows])
            size[rows] = part.size(x_adv[rows].astype(np.float64), x[rows].astype(np.float64))
    logits = logits_in(model, x_adv, batch)
    finite = np.isfinite(logits).all(-1)
    predicted = np.where(finite, logits.argmax(-1), -1)
    wrong = predicted == np.asarray(y.target) if isinstance(y, Targets) else predicted != np.asarray(y)
    return Verdict(allowed, allowed & (wrong | ~finite), size, predicted)


def verify_report(report: Any, model: Any = None, *, batch_size: int = 500) -> list[tuple[int, int, str]]:
    """Check the examples of a report again, as they were stored.

    Args:
      report: a `Report` with its examples, as `load` reads it from a folder.
      model: logits from a batch, or several, one for each model of the report; None checks all but predictions.
      batch_size: rows of a forward pass.

    Returns:
      `(model, row, words)` for everything that does not hold: a broken example that is not float32, leaves bounds or
      budget, is classified correctly (or, targeted, misses its target), or differs from what the report says about it;
      and any other example that is not the clean one.

    Raises:
      ValueError: if the report holds no examples, or its threat cannot be built from what it says.
    """
    if report.x is None or any(m.x_adv is None for m in report.models):
        raise ValueError("report must hold its examples; got none. Load the folder that Report.save wrote.")
    models = list(model) if isinstance(model, (tuple, list)) else [model] * len(report.models)
    return [
        (place, row, words)
        for place, (entry, own) in enumerate(zip(report.models, models))
        for row, words in _complaints(report.x, entry, own, batch_size)
    ]


def _complaints(x: np.ndarray, entry: Any, model: Any, batch_size: int) -> list[tuple[int, str]]:
    """What is wrong with the stored examples of one model."""
    threat = entry.threat
    if threat["norm"] not in THREATS:
        raise ValueError(
            f"threat must be one of {', '.join(THREATS)} to be built again from a report; got {threat['norm']!r}. "
            "Use evaluate.verify with the threat itself."
        )
    eps = np.asarray(threat["eps"], np.float64)
    built = THREATS[threat["norm"]](eps, tuple(np.asarray(b, np.float64) for b in threat["bounds"]))
    by, columns, n = np.asarray(entry.examples["by"]), entry.examples, len(x)
    found = []
    if entry.x_adv.dtype != np.float32 or x.dtype != np.float32:
        found.append((0, f"the stored arrays are {entry.x_adv.dtype} and {x.dtype}, not float32."))
    moved = np.flatnonzero((by < 0) & (entry.x_adv != x).reshape(n, -1).any(-1))
    found += [(int(row), "it counts as not broken, but its point is not the clean one.") for row in moved]
    rows = np.flatnonzero(by >= 0)
    if not len(rows):
        return found
    points, clean = np.asarray(entry.x_adv[rows], np.float32), np.asarray(x[rows], np.float32)
    allowed, label = host(cut(built, rows, n)), np.asarray(columns["label"])[rows]
    size = allowed.size(points.astype(np.float64), clean.astype(np.float64))
    inside = feasible(allowed, points, clean)
    found += [
        (int(r), f"its size is {s:.9g}, outside bounds or budget.") for r, s, ok in zip(rows, size, inside) if not ok
    ]
    stated = np.asarray([columns["size"][r] for r in rows], np.float64)
    apart = ~np.isclose(size, stated, rtol=1e-6, atol=1e-9)
    found += [
        (int(r), f"its size is {s:.9g}, the report says {t:.9g}.")
        for r, s, t in zip(rows[apart], size[apart], stated[apart])
    ]
    if model is None:
        return found
    logits = logits_of(as_callable(model), points, batch_size)
    predicted = np.where(np.isfinite(logits).all(-1), logits.argmax(-1), -1)
    told = np.asarray(columns["adversarial"])[rows]
    found += [
        (int(r), f"the model classifies it correctly, as {p}.") for r, p, y in zip(rows, predicted, label) if p == y
    ]
    other = (predicted != told) & (predicted != label)
    found += [
        (int(r), f"the model says {p}, the report {t}.") for r, p, t in zip(rows[other], predicted[other], told[other])
    ]
    return found


def host(threat: Threat) -> Threat:
    """Return the threat with numpy leaves, so that verdicts are taken in float64.

    Args:
      threat: any threat.

    Returns:
      The same with numpy leaves.
    """
    return jax.tree.map(np.asarray, threat)


def cut(threat: Threat, rows: np.ndarray, n: int) -> Threat:
    """Return the threat for some of n rows, where each has a budget of its own.

    Args:
      threat: its `eps` a number or `[n]`.
      rows: row numbers.
      n: number of examples.

    Returns:
      The threat; itself where it has one budget.

    Raises:
      ValueError: if there is neither one budget nor one for each example.
    """
    eps = np.asarray(threat.eps)
    if eps.ndim == 0:
        return threat
    if eps.shape != (n,):
        raise ValueError(f"eps must be a number or one for each of the {n} examples; got shape {eps.shape}.")
    return dataclasses.replace(threat, eps=eps[rows])  # pyright: ignore[reportArgumentType]
