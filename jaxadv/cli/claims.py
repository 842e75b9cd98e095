"""`jaxadv claims` and `jaxadv bench`: doors to `benchmarks/` of a source checkout.

What lives here: finding the checkout and handing over. What does not: any experiment, and how results become
tables; both stand in the checkout's `benchmarks/`, which an installed package does not carry. Each function
returns what is to be printed.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxadv.core import check

KINDS = ("speed", "parity")
"""Folders of `benchmarks/` whose files are scripts of their own."""


class NeedsCheckout(FileNotFoundError):
    """Raised where a command reads `benchmarks/` and there is none; the exit status is 2."""


def _benchmarks(root: str | os.PathLike) -> Path:
    folder = Path(root).resolve() / "benchmarks"
    if not (folder / "claims" / "framework.py").is_file():
        raise NeedsCheckout(
            f"needs a source checkout: there is no benchmarks/claims/framework.py under {Path(root).resolve()}. "
            "Run in the root of the checkout, or point --root to it."
        )
    return folder


def _framework(root: str | os.PathLike) -> Any:
    """The module `benchmarks.claims.framework` of the checkout at `root`."""
    top = str(_benchmarks(root).parent)
    if top not in sys.path:
        sys.path.insert(0, top)
    return importlib.import_module("benchmarks.claims.framework")


def claims_list(root: str | os.PathLike = ".") -> list[dict[str, str]]:
    """Return one row for each claim: `name`, `tier`, `verdict` ("not measured yet" without a result), `sentence`.

    Args:
      root: the source checkout.

    Returns:
      The rows, by name.

    Raises:
      NeedsCheckout: if `root` is none.
    """
    framework = _framework(root)
    found = {record["name"]: record["verdict"] for record in framework.stored()}
    rows = []
    for name in framework.names():
        claim = framework.load(name).CLAIM
        verdict = found.get(name, "not measured yet")
        rows.append({"name": name, "tier": claim["tier"], "verdict": verdict, "sentence": claim["sentence"]})
    return rows


def claims_run(
    root: str | os.PathLike,
    name: str,
    *,
    seeds: Sequence[int] | None = None,
    settings: dict[str, Any] | None = None,
    smoke: bool = False,
) -> dict[str, Any]:
    """Run a claim, and store its record in `benchmarks/claims/results/` if it was run as written.

    Args:
      root: the source checkout.
      name: of the claim.
      seeds: other seeds than the claim's.
      settings: other settings than the claim's.
      smoke: one step of everything with one seed.

    Returns:
      The record, with `path`: where it was stored, or None (smoke, other settings, or fewer than three seeds).

    Raises:
      NeedsCheckout: if `root` is none.
      ValueError: on an unknown claim or setting.
    """
    framework = _framework(root)
    record = framework.measure(name, settings=settings, seeds=seeds, smoke=smoke)
    as_written = not smoke and not settings and len(record["seeds"]) >= 3
    return record | {"path": str(framework.store(record)) if as_written else None}


def claims_table(root: str | os.PathLike = ".") -> list[str]:
    """Write `benchmarks/claims/RESULTS.md` and the marked part of the README from the stored results.

    Args:
      root: the source checkout.

    Returns:
      The files written.

    Raises:
      NeedsCheckout: if `root` is none.
    """
    return [str(path) for path in _framework(root).write_tables()]


def bench_list(root: str | os.PathLike = ".") -> list[dict[str, str]]:
    """Return one row for each benchmark script: `name` (`speed/attacks`) and `purpose`, its docstring's first line.

    Args:
      root: the source checkout.

    Returns:
      The rows, by name.

    Raises:
      NeedsCheckout: if `root` is none.
    """
    folder = _benchmarks(root)
    rows = []
    for path in sorted(p for kind in KINDS for p in (folder / kind).glob("*.py")):
        text = path.read_text(encoding="utf-8").lstrip()
        purpose = text[3:].split("\n")[0].split('"""')[0] if text.startswith('"""') else ""
        rows.append({"name": f"{path.parent.name}/{path.stem}", "purpose": purpose})
    return rows


def bench_run(
    root: str | os.PathLike, name: str, arguments: Sequence[str] = (), *, call: Callable[..., int] = subprocess.call
) -> int:
    """Run a benchmark script in a process of its own, in the root of the checkout, with this interpreter.

    Args:
      root: the source checkout.
      name: `speed/attacks` or the like; see `bench_list`.
      arguments: handed to the script as they are.
      call: starts the process.

    Returns:
      The script's exit status.

    Raises:
      NeedsCheckout: if `root` is none.
      ValueError: if there is no such script.
    """
    folder = _benchmarks(root)
    check.choice("benchmark", name, [row["name"] for row in bench_list(root)])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")])}
    return call([sys.executable, str(folder / f"{name}.py"), *arguments], cwd=folder.parent, env=environment)
