"""What a run writes beside its weights: metrics as lines of JSON, and a description of its settings.

What lives here: the append-only metrics file, and `describe`, which turns settings (objectives, attacks, optimizers)
into plain text so that a resumed run can be compared with the one that began. What does not: checkpoints.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv.core import atomic_write

_DEPTH = 16


class Metrics:
    """A file of JSON lines, each with its `step`; flushed at every line.

    Args:
      path: the file; None keeps no file.
      step: lines of later steps are dropped (they belong to steps that will be taken again).
    """

    def __init__(self, path: Path | None, step: int = 0):
        self._file = None
        if path is None:
            return
        if path.exists():
            kept = "".join(f"{line}\n" for line, known in _lines(path) if known["step"] <= step)
            atomic_write(path, lambda file: file.write(kept.encode()))
        self._file = open(path, "a", encoding="utf-8")  # closed by close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line.

        Args:
          record: plain values; numbers that are not finite become null.
        """
        if self._file is not None:
            self._file.write(json.dumps(plain(record), allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    """The whole lines of a file; a line that a crash cut off is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            known = json.loads(line)
            if isinstance(known, dict) and "step" in known:
                yield line, known


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a metrics file.

    Args:
      path: of `metrics.jsonl`.

    Returns:
      One dict for each line.
    """
    return [known for _, known in _lines(Path(path))]


def plain(value: Any) -> Any:
    """Turn numbers of numpy and jax into JSON's; numbers that are not finite into None.

    Args:
      value: nested dicts and lists of numbers and text.

    Returns:
      The same of plain values.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(value: Any) -> dict[str, Any]:
    """Describe settings as a flat table of plain values, so that two runs can be compared and their difference named.

    Functions are described by name, defaults and what they enclose (so an optax optimizer shows its rates), dataclasses
    and tuples by their fields, arrays by shape and checksum.

    Args:
      value: any nest of settings.

    Returns:
      Path to plain value.
    """
    table: dict[str, Any] = {}
    _describe(value, "", table, ())
    return table


def _describe(value: Any, path: str, table: dict[str, Any], above: tuple[int, ...]) -> None:
    if value is None or isinstance(value, (bool, int, float, str)):
        table[path] = plain(value)
        return
    if id(value) in above or len(above) >= _DEPTH:
        table[path] = type(value).__name__
        return
    above = (*above, id(value))
    name, parts = _parts(value)
    table[path] = name
    for key, part in parts.items():
        _describe(part, f"{path}.{key}" if path else str(key), table, above)


def _parts(value: Any) -> tuple[Any, dict[Any, Any]]:
    """A name for a value, and the named parts that it consists of."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        if array.ndim == 0:
            return plain(array.item()) if array.dtype.kind in "fiub" else str(array), {}
        return f"{array.dtype}{list(array.shape)} crc32 {zlib.crc32(np.ascontiguousarray(array).tobytes()):08x}", {}
    kind = type(value).__name__
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return kind, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return kind, dict(sorted(value.items(), key=lambda item: str(item[0])))
    if isinstance(value, tuple) and (names := getattr(value, "_fields", None)):
        return kind, dict(zip(names, value))
    if isinstance(value, (tuple, list)):
        return kind, dict(enumerate(value))
    if isinstance(value, functools.partial):
        named = {**{f"arg{i}": a for i, a in enumerate(value.args)}, **value.keywords}
        return _name(value.func), {"of": value.func, **named}
    if inspect.ismethod(value):
        return _name(value), {"self": value.__self__}
    if inspect.isfunction(value):
        return _name(value), _enclosed(inspect.unwrap(value))
    return _name(value) if callable(value) else kind, {}


def _name(fn: Any) -> str:
    return f"{getattr(fn, '__module__', '')}.{getattr(fn, '__qualname__', type(fn).__name__)}"


def _enclosed(fn: Any) -> dict[str, Any]:
    parts = {k: p.default for k, p in inspect.signature(fn).parameters.items() if p.default is not p.empty}
    cells = zip(fn.__code__.co_freevars, fn.__closure__ or ())
    for name, cell in cells:
        with contextlib.suppress(ValueError):  # a cell that is still empty
            parts[name] = cell.cell_contents
    return parts


def differences(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 6) -> list[str]:
    """List what differs between two descriptions.

    Args:
      old: the description of the run that began.
      new: the description of the run at hand.
      limit: how many to list; the rest is counted.

    Returns:
      Lines `path: old -> new`; empty if equal.
    """
    missing = object()
    paths = [p for p in sorted({*old, *new}) if old.get(p, missing) != new.get(p, missing)]
    lines = [f"{p}: {old.get(p, '(absent)')!r} -> {new.get(p, '(absent)')!r}" for p in paths[:limit]]
    return lines + ([f"and {len(paths) - limit} more"] if len(paths) > limit else [])
