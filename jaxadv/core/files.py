"""Files that are there whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def atomic_write(path: Path, fill: Callable[[Any], Any]) -> None:
    """Fill a temporary file in the same folder and rename it into place: nobody sees half a file.

    Args:
      path: the file; its folder must exist.
      fill: writes into the open binary file.

    Raises:
      OSError: if that fails (a full disk); an older file is then intact and nothing is left over.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
