"""Test-wide settings: eight CPU devices, shape and type checks on, implicit promotion of ranks refused.

Also house rules: laws and spine carry the mark `corner`; with `--strict-durations` a test that computes for more than
five seconds without the mark `slow` fails the run; and XLA compiles quickly rather than well, because most tests
compile for longer than they compute (what computes for long runs in a process of its own, compiled as users do).
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

# Wraps every module of the package as it is imported. With PEP 484's tower an int is good where a float is asked for.
_CHECK = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
_HOOK = install_import_hook("jaxadv", _CHECK)

import functools
import gc
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from jax._src.interpreters import mlir

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# JAX loads all dialects anew for each program and keeps them: half of a small program's time, half of the memory.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

QUICK = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version__.startswith("0.10."):  # XLA ends the process at a flag it does not know, and later ones do not
    QUICK.append("--xla_cpu_use_fusion_emitters=false")

HERE = Path(__file__).resolve().parent
CORNER = ("laws", "core", "test_layout.py", "test_public.py", "test_spine.py")


@pytest.fixture
def key():
    """A typed key; tests that need several split it."""
    return jax.random.key(0)


@pytest.fixture
def script():
    """Run a program in a process of its own, compiled and checked as a user's would be; what it prints."""

    def run(program: str) -> str:
        flags = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in QUICK)
        command, environment = [sys.executable, "-c", program], os.environ | {"XLA_FLAGS": flags}
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def data_root():
    """The folder of real data, or a skip that says what is missing."""
    root = os.environ.get("JAXADV_DATA")
    if not root:
        pytest.skip("needs real data: set JAXADV_DATA to a folder with mnist/ and cifar10_jpeg/")
    return root


def pytest_addoption(parser):
    parser.addoption(
        "--strict-durations",
        nargs="?",
        const=5.0,
        default=None,
        type=float,
        metavar="SECONDS",
        help="fail the run if a test without the mark slow computes for longer (5 if no number is given)",
    )


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        path = Path(item.path)
        if path.is_relative_to(HERE) and path.relative_to(HERE).parts[0] in CORNER:
            item.add_marker(pytest.mark.corner)


def _seconds():
    """Wall clock, and processor time of this process and its finished children."""
    used = os.times()
    return time.perf_counter(), used.user + used.system + used.children_user + used.children_system


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    before = _seconds()
    yield
    # The smaller of the two: a busy machine stretches the wall clock, several threads the processor time.
    spent = min(after - start for after, start in zip(_seconds(), before))
    item.user_properties.append(("seconds", spent))


def pytest_collection_finish(session):
    """Programs and their traces live long: look for garbage among new objects only, and seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


MAPS = Path("/proc/self/maps")
MANY = 36_000
"""Memory maps of a process at which compiled programs are let go: Linux ends a process at 65,530."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    count = item.config.stash[_COUNT] = item.config.stash.get(_COUNT, 0) + 1
    if count % 25 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()
        gc.collect()


def pytest_configure(config):
    flags = os.environ.get("XLA_FLAGS", "").split()  # read when the first array is made; child processes inherit them
    os.environ["XLA_FLAGS"] = " ".join([*flags, *(flag for flag in QUICK if flag not in flags)])
    config.stash[_LONG] = []
    config.pluginmanager.register(_Durations(config), "durations-of-house")


_LONG = pytest.StashKey[list[tuple[float, str]]]()
_COUNT = pytest.StashKey[int]()


class _Durations:
    """Collects the tests that were too long; works in the process that reports, with or without workers."""

    def __init__(self, config):
        self.config = config
        self.limit = config.getoption("--strict-durations")

    def pytest_runtest_logreport(self, report):
        spent = dict(report.user_properties).get("seconds", 0.0)
        if self.limit is not None and report.when == "call" and "slow" not in report.keywords and spent > self.limit:
            self.config.stash[_LONG].append((spent, report.nodeid))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if self.config.stash[_LONG] and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if not self.config.stash[_LONG]:
            return
        terminalreporter.section("too long without the mark slow", red=True)
        for spent, name in sorted(self.config.stash[_LONG], reverse=True):
            terminalreporter.write_line(f"{spent:6.1f} s (limit {self.limit:g} s)  {name}")
