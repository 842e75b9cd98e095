"""Side-by-side timing: every contender once a round, in turn, after a warm-up; medians, ranges, ratios.

Absolute times on a shared machine mean little; the ratio of two medians that were taken in turn in one process does.
A contender is a function that blocks until its result is there. Compile time is the first call, reported apart.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def side_by_side(contenders: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, dict]:
    """Time contenders in turn, A B C A B C ..., and return first call, median, least and most seconds of each."""
    first = {}
    for name, call in contenders.items():
        start = time.perf_counter()
        call()
        first[name] = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(t), "least": min(t), "most": max(t), "first_call": first[name]}
        for name, t in times.items()
    }


def environment() -> dict[str, str | int | None]:
    """Return what the figures depend on: versions, device, cores."""
    import jax

    found: dict[str, str | int | None] = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }
    for name in ("torch", "torchattacks", "foolbox"):
        module = sys.modules.get(name)
        found[name] = getattr(module, "__version__", None)
    return found


def store(name: str, record: dict) -> Path:
    """Write one benchmark's record to `results/NAME.json` and return the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return path


def table(rows: list[list[str]]) -> str:
    """Lay rows out as a markdown table; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("-" * w for w in widths) + " |", *lines[1:]])
