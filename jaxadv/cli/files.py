"""Files of the command line: whole or absent, and refused before the work instead of after it.

What lives here: the check that a folder can be written, the record of a run (`config.json`). What
does not: reports and checkpoints, which their own rooms write.
"""

import json
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxadv.cli.configs import Common
from jaxadv.cli.errors import UsageError
from jaxadv.cli.parsing import plain
from jaxadv.core import atomic_write

RUN_SCHEMA = "jaxadv.run/1"
"""Name and version of a run's config.json."""


def lead() -> bool:
    """Return whether this is the process that writes and prints: the only one, or the first of several."""
    return jax.process_index() == 0


def writable(folder: Path, option: str = "--out") -> None:
    """Make a folder and see that it can be written.

    Args:
      folder: made if missing.
      option: the argument that named it, for the message.

    Raises:
      UsageError: if it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".jaxadv-") as probe:
            probe.write(b"x" * 4096)
            probe.flush()
    except OSError as error:
        raise UsageError(
            f"{option} must be a folder that can be written; got {folder}, which failed with: "
            f"{error.strerror or error}. "
            "Choose another folder, or free some space."
        ) from error


def npz_path(path: Path | None, option: str = "--save-adv") -> Path | None:
    """Check the name of an npz file to be written and that its folder can be written.

    Args:
      path: the file, or None.
      option: the argument that named it.

    Returns:
      The path.

    Raises:
      UsageError: if the name does not end in `.npz`, or the folder cannot be written.
    """
    if path is None:
        return None
    if path.suffix != ".npz" or path.is_dir():
        raise UsageError(f"{option} must be a file that ends in .npz; got {path}. E.g. {option} adversarial.npz")
    writable(path.parent, option)
    return path


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz file atomically.

    Args:
      path: the file.
      arrays: name to array.
    """
    atomic_write(path, lambda file: np.savez_compressed(file, **dict[str, Any](arrays)))


def revision() -> str | None:
    """Return the git revision of the source checkout that this package runs from.

    Returns:
      The revision, with `+changes` where tracked files differ from it; None for an installed package.
    """
    top = Path(__file__).resolve().parents[2]
    if not (top / ".git").exists():
        return None
    try:
        words = {"cwd": top, "capture_output": True, "text": True, "timeout": 10, "check": True}
        head = subprocess.run(["git", "rev-parse", "HEAD"], **words).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **words).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if dirty else "")


def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    from jaxadv import __version__

    found = {
        "jaxadv": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }
    return found | {name: metadata.version(name) for name in ("flax", "optax")}


def write_run(folder: Path, command: str, config: Common, **more: Any) -> None:
    """Write `config.json`: arguments, versions, seed, kind of device, git revision if any.

    Args:
      folder: of the run.
      command: its name.
      config: its arguments.
      **more: further plain values; `arguments` among them replaces those of `config`.
    """
    devices = jax.devices()
    tree = {
        "schema": RUN_SCHEMA,
        "command": command,
        "arguments": plain(config),
        "seed": getattr(config, "seed", None),
        "versions": versions(),
        "device": {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": getattr(config, "devices", None) or (1 if jax.process_count() == 1 else len(devices)),
        },
        "git": revision(),
    } | more
    if not lead():
        return
    text = json.dumps(tree, indent=2) + "\n"
    atomic_write(folder / "config.json", lambda file: file.write(text.encode()))
