"""The journal of an evaluation: every finished example on disk, so that a killed run goes on where it stopped.

What lives here: the append-only file, its header that says what the records belong to, and what is cut or refused when
it is opened again. What does not: what the records mean (`engine`).

    file   = MAGIC record*
    record = length (uint32) crc32 (uint32) payload       little-endian

The first record is the header, JSON: the fingerprint of key, data, model, threat, protocol, slots and versions. All
others are blocks of arrays (npz) under a name. Each record is flushed to the disk before the next thing happens. A
record that is cut short or does not fit its checksum ends the file: it and what follows it are cut off on resume.
"""

import contextlib
import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAGIC = b"jaxadv.journal/1\n"
"""First bytes of the file: its name and version."""

FILE = "journal.bin"
"""Name of the file in its folder."""

_FRAME = struct.Struct("<II")
_END, _NAME = "end", "name of the block"


def frame(payload: bytes) -> bytes:
    """Return a record.

    Args:
      payload: its content.

    Returns:
      Length, checksum and content.
    """
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def scan(data: bytes) -> tuple[list[bytes], int]:
    """Read records until the first one that is torn or spoiled.

    Args:
      data: the bytes of a file.

    Returns:
      The payloads and the length of the good part of the file; nothing and 0 if it is no journal.
    """
    if not data.startswith(MAGIC):
        return [], 0
    found, at = [], len(MAGIC)
    while at + _FRAME.size <= len(data):
        length, mark = _FRAME.unpack_from(data, at)
        payload = data[at + _FRAME.size : at + _FRAME.size + length]
        if len(payload) < length or zlib.crc32(payload) != mark:
            break
        found.append(payload)
        at += _FRAME.size + length
    return found, at


def digest(tree: Any) -> str:
    """Return a hash of the arrays of a pytree: the same in every process.

    Args:
      tree: a pytree of arrays, e.g. a model.

    Returns:
      Sixteen hexadecimal digits, of shapes, types and values of all leaves.
    """
    mark = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (int, float, bool, complex)):
            continue  # a function; its outputs are compared instead
        typed = jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if typed else leaf)
        mark.update(f"{array.dtype}{array.shape}".encode())
        mark.update(np.ascontiguousarray(array).tobytes())
    return mark.hexdigest()[:16]


class Journal:
    """An open journal.

    Attributes:
      path: the file.
      past: name to the blocks that an earlier run left, in order; each a dict of arrays.
      cut: bytes of a torn end that were cut off.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: Mapping[str, Any], *, resume: bool = False):
        """Start a journal or open an old one.

        Args:
          folder: made if missing; the file in it is `FILE`.
          fingerprint: what the records belong to, plain JSON values by name.
          resume: go on with the journal that is there, if there is one.

        Raises:
          ValueError: if there is an unfinished journal and `resume` is False, if the one to resume belongs to another
            evaluation, or if another process writes it.
          OSError: if the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.past, self.cut = folder / FILE, {}, 0
        fingerprint = json.loads(json.dumps(fingerprint))
        new = not self.path.exists()
        self._file = open(self.path, "x+b" if new else "r+b", buffering=0)
        try:
            self._lock()
            data = self._file.read()
            records, good = scan(data)
            if not good and data[: len(MAGIC)] != MAGIC[: len(data)]:
                raise ValueError(
                    f"journal must be a folder of its own; {self.path} is not a journal. Choose another folder."
                )
            blocks = [_unpack(r) for r in records[1:]]
            if records and resume:
                _same(json.loads(records[0]), fingerprint, self.path)
                self.cut = len(data) - good
                for name, block in blocks:
                    self.past.setdefault(name, []).append(block)
            elif len(blocks) and blocks[-1][0] != _END:
                raise ValueError(
                    f"journal must be a folder without an unfinished evaluation; {self.path} holds {len(blocks)} "
                    "blocks of finished examples. Resume it (resume=True, --resume), or remove the file."
                )
            else:
                good = 0
            self._end = good
            self._file.truncate(good)
            if not good:
                self._write(MAGIC + frame(json.dumps(fingerprint).encode()))
        except BaseException:
            self._file.close()
            if new:
                self.path.unlink(missing_ok=True)
            raise

    def _lock(self) -> None:
        """Refuse a file that another process writes, where the system can tell."""
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"journal must belong to one process; another one is writing {self.path}. Wait for it, or choose "
                    "another folder."
                ) from None

    def _write(self, data: bytes) -> None:
        """Append bytes whole or not at all."""
        try:
            self._file.seek(self._end)
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise OSError(
                error.errno,
                f"{error.strerror or error}; what was written before is intact: free some space and resume",
                str(self.path),
            ) from error
        self._end += len(data)

    def append(self, name: str, **columns: Any) -> None:
        """Write a block of arrays and flush it to the disk.

        Args:
          name: what it belongs to.
          **columns: arrays.

        Raises:
          OSError: if that fails (a full disk); earlier records are intact.
        """
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **{_NAME: np.asarray(name)} | columns)
        self._write(frame(file.getvalue()))

    def finish(self) -> None:
        """Say that nothing follows, so that the next evaluation may replace the file."""
        if _END not in self.past:
            self.append(_END)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _unpack(payload: bytes) -> tuple[str, dict[str, np.ndarray]]:
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        block = dict(arrays)
    return str(block.pop(_NAME)), block


def _same(old: Any, new: Mapping[str, Any], path: Path) -> None:
    """Refuse a journal of another evaluation, and say what differs."""
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if not names:
        return
    shown = "; ".join(f"{n}: {_short(old.get(n), new.get(n))}, now {_short(new.get(n), old.get(n))}" for n in names)
    raise ValueError(
        f"a resumed evaluation must be the one that was started: same {', '.join(names)}; {path} was written with "
        f"{shown}. Repeat the arguments of the first run, or start anew in another folder."
    )


def _short(value: Any, other: Any) -> str:
    """A value in few words; of lists and dicts only what differs from the other."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {k: v for k, v in value.items() if other.get(k) != v}
    elif isinstance(value, list) and isinstance(other, list):
        value = [v for v in value if v not in other] or value
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
