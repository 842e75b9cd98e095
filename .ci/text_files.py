"""Check tracked text files: they end with one newline, have no trailing spaces, and no tracked file is over 512 KiB."""

import subprocess
import sys
from pathlib import Path

LARGEST = 512 * 1024
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cff", ".cfg", ".json", ""}


def complaints(path: Path) -> list[str]:
    """Return what is wrong with one file, as sentences."""
    content = path.read_bytes()
    found = []
    if len(content) > LARGEST:
        found.append(f"{path}: {len(content) // 1024} KiB; at most {LARGEST // 1024} KiB belong in the repository")
    if path.suffix in TEXT and content:
        if not content.endswith(b"\n") or content.endswith(b"\n\n"):
            found.append(f"{path}: must end with exactly one newline")
        lines = content.split(b"\n")
        if path.suffix != ".md":  # two spaces are a line break in Markdown
            found += [f"{path}:{n}: trailing spaces" for n, line in enumerate(lines, 1) if line != line.rstrip()]
    return found


def main(names: list[str]) -> int:
    """Check the named files, or all tracked ones."""
    if not names:
        names = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout.split("\0")
    found = [line for name in names if name and Path(name).is_file() for line in complaints(Path(name))]
    print("\n".join(found) or "text files: nothing to mend")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
