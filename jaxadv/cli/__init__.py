"""`jaxadv demo | train | evaluate | attack | report | verify-report | privacy | list | data | claims | bench`.

What lives here: `main`, which parses, sets jax up, runs a command, and turns what went wrong into one paragraph and
an exit code. This room is the only place that prints, reads the environment or touches `jax.config`. Commands are
imported when they run, so that `jaxadv --help` loads no jax.

| exit code | meaning |
| --- | --- |
| 0 | fine |
| 1 | the evaluation has a red flag of severity error; the report is written |
| 2 | bad usage or input; one paragraph on standard error says what to change |
| 3 | a bug of jaxadv; the traceback is shown |
| 4 | another process of the run was lost; start all of them again with --resume |
| 130 | interrupted; training says how to resume. SIGTERM saves and exits with 0 |
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence

from jaxadv.cli.configs import COMMANDS as COMMANDS
from jaxadv.cli.configs import Common, Machine
from jaxadv.cli.errors import INTERNAL, INTERRUPTED, LOST, OK, USAGE, Stopped, UsageError
from jaxadv.cli.parsing import parse, to_yaml

_HOME = {"demo": "training", "train": "training", "privacy": "privacy"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: the words after the program's name; default those of this process.

    Returns:
      The exit code, see the module docstring.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    wants_traceback = "--traceback" in argv
    if argv == ["--version"]:
        from jaxadv import __version__

        print(f"jaxadv {__version__}")
        return OK
    try:
        command, config = parse(argv or ["--help"])
        if config.print_config:
            print(to_yaml(command, config), end="")
            return OK
        with _machine(config):
            code = _run(command, config)
            sys.stdout.flush()
            return code
    except SystemExit as stop:  # tyro: help was shown, or the words made no sense
        code = stop.code if isinstance(stop.code, int) else USAGE if stop.code else OK
        return code if argv else USAGE
    except KeyboardInterrupt:
        return _complain("interrupted before the end; no report was written.", INTERRUPTED)
    except Stopped as stop:
        return _complain(str(stop), stop.code, prefix="")
    except BrokenPipeError:  # the reader of a pipe has gone: jaxadv list | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        if _lost(error):
            _complain(
                f"another process of this run ended or cannot be reached ({' '.join(str(error).split())[:200]}). What "
                "was saved is intact: start all processes again with the same command and --resume.",
                LOST,
            )
            os._exit(LOST)  # the usual way out waits for the process that is gone
        return _explain(error, wants_traceback)


def _lost(error: BaseException | None) -> bool:
    """Whether an error comes from the talk between processes; they are followed to their causes."""
    if error is None:
        return False
    import jax

    words = ("Gloo", "Connection closed by peer", "coordination service", "NCCL", "DEADLINE_EXCEEDED", "UNAVAILABLE")
    found = isinstance(error, (jax.errors.JaxRuntimeError, RuntimeError)) and any(w in str(error) for w in words)
    return jax.distributed.is_initialized() and (found or _lost(error.__cause__))


def _run(command: str, config: Common) -> int:
    room = importlib.import_module(f"jaxadv.cli.{_HOME.get(command, 'commands')}")
    return int(getattr(room, f"run_{command.replace('-', '_')}")(config))


def _complain(text: str, code: int, prefix: str = "jaxadv: ") -> int:
    with contextlib.suppress(OSError, ValueError):  # standard error may be gone, too
        print(f"{prefix}{text}", file=sys.stderr, flush=True)
    return code


def _explain(error: Exception, wants_traceback: bool) -> int:
    """Turn an error into one paragraph; the traceback is for bugs and for who asks."""
    import traceback

    text = " ".join(str(error).split()) or type(error).__name__
    memory = "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError)
    expected = (
        isinstance(error, (UsageError, ValueError, TypeError, OSError, ImportError, FloatingPointError)) or memory
    )
    expected = expected or type(error).__name__ == "CheckpointError"  # by name: importing its room would load orbax
    if not expected or wants_traceback:
        _complain("".join(traceback.format_exception(error)), INTERNAL, prefix="")
    if not expected:
        return _complain(
            f"this is a bug of jaxadv ({type(error).__name__}: {text}). Please report it with the lines above.",
            INTERNAL,
        )
    if memory:
        text = f"the machine ran out of memory ({text[:200]}). Lower --batch-size."
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}. Choose another place, or free some space."
    elif isinstance(error, OSError) and error.strerror:
        text = f"writing or reading a file failed: {error.strerror}. Choose another place, or free some space."
    return _complain(text, USAGE)


@contextlib.contextmanager
def _machine(config: Common) -> Iterator[None]:
    """Set jax up for a command, and leave the process as it was."""
    if not isinstance(config, Machine):
        yield
        return
    import jax

    from jaxadv import parallel
    from jaxadv.cli import progress

    _, *known = config.distributed.split(",")  # ADDRESS,N,I
    if config.devices is not None and config.distributed != "auto":
        _force_devices(config.devices, int(known[0]) if known and known[0].strip().isdigit() else 1)
    progress.mute(parallel.distributed(config.distributed) and jax.process_index() > 0)
    if config.devices is not None and len(jax.devices()) < config.devices:
        raise UsageError(f"--devices must be at most the {len(jax.devices())} that jax sees; got {config.devices}.")
    cache = config.cache or os.environ.get("JAXADV_CACHE")
    if not cache:
        yield
        return
    before = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 (declared at run time)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def _force_devices(count: int, processes: int = 1) -> None:
    """Split the CPU into as many devices as this process needs."""
    import jax

    if count < 1:
        raise UsageError(f"--devices must be at least 1; got {count}.")
    processes = max(processes, 1)
    if count % processes:
        raise UsageError(f"--devices must be a multiple of the {processes} processes; got {count}.")
    with contextlib.suppress(RuntimeError):  # a backend exists already: use what it has
        if count // processes > getattr(jax.config, "jax_num_cpu_devices"):  # noqa: B009 (declared at run time)
            jax.config.update("jax_num_cpu_devices", count // processes)
