"""The house rules that `conftest.py` adds to pytest, shown on small runs of their own."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = """
import time
import pytest

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def test_busy():
    burn(0.4)

def test_waiting():
    time.sleep(0.4)

@pytest.mark.slow
def test_slow():
    burn(0.4)

def test_quick():
    pass
"""


def run(folder, *options):
    """Run four small tests under the project's conftest; return the exit status and the output."""
    (folder / "tests").mkdir()
    (folder / "tests" / "test_four.py").write_text(TESTS)
    (folder / "tests" / "conftest.py").write_text((HERE / "conftest.py").read_text(encoding="utf-8"))
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow\n  corner\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "tests"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_test_that_computes_too_long_fails_the_run(tmp_path):
    status, out = run(tmp_path, "--strict-durations=0.3")
    assert status == 1 and "4 passed" in out
    assert "test_busy" in out and "test_waiting" not in out and "test_slow" not in out


def test_laws_and_spine_are_marked_corner():
    config = (HERE / "conftest.py").read_text(encoding="utf-8")
    assert all(f'"{part}"' in config for part in ("laws", "core", "test_layout.py", "test_public.py", "test_spine.py"))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", "-m", "corner"]
    command += ["tests/test_layout.py", "tests/test_conftest.py"]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert "test_each_rule_bites" in done.stdout and "test_conftest" not in done.stdout
