"""`main`: help, versions, exit codes, what is a user's error and what is a bug, and that the process is left as it
was."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxadv import cli as room
from jaxadv.cli import COMMANDS, configs, errors, main

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("jax", "flax", "orbax", "optax", "tensorflow_datasets", "PIL", "scipy")


def alone(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


@pytest.mark.parametrize("words", [["--help"], ["evaluate", "--help"], ["train", "--out", "x", "--print-config"]])
def test_help_and_print_config_load_nothing_heavy(words):
    done = alone(
        f"import sys\nfrom jaxadv.cli import main\ncode = main({words!r})\n"
        f"print('loaded', code, sorted(m for m in {HEAVY!r} if m in sys.modules))"
    )
    assert done.stdout.rstrip().endswith("loaded 0 []"), done


def test_help_names_every_command_and_is_quick(cli):
    start = time.process_time()
    ran = cli("--help")
    assert time.process_time() - start < 1.5
    assert ran.code == 0 and all(f"• {name} " in ran.out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, cli):
    ran = cli(command, "--help")
    assert ran.code == 0 and "--print-config" in ran.out
    assert " ".join(configs.COMMANDS[command].__doc__.split("\n")[0].split()) in " ".join(ran.out.split())


def test_no_words_show_the_help_and_are_bad_usage(cli):
    ran = cli()
    assert ran.code == 2 and "demo" in ran.out


def test_the_version(cli):
    from jaxadv import __version__

    assert cli("--version") == (0, f"jaxadv {__version__}\n", "")


def test_print_config_prints_what_config_reads(cli, tmp_path):
    ran = cli("evaluate", "runs/a", "--eps", "8/255", "--eps", "0.1", "--print-config")
    assert ran.code == 0 and not ran.err
    file = tmp_path / "c.yaml"
    file.write_text(ran.out)
    assert cli("evaluate", "--config", file, "--print-config") == ran
    changed = cli("evaluate", "--config", file, "--seed", 9, "--print-config").out
    assert changed == ran.out.replace("seed: 0", "seed: 9")


def test_a_bad_config_is_one_paragraph(refused, tmp_path):
    assert "--config must be a YAML file" in refused("train", "--config", tmp_path / "none.yaml")


def test_words_that_make_no_sense_give_2(cli):
    for words in (["train"], ["evaluate", "m", "--epss", "1"], ["nonsense"], ["list", "nonsense"]):
        ran = cli(*words)
        assert ran.code == 2 and ran.err and "Traceback" not in ran.err


def fail_with(monkeypatch, error):
    def run(command, config):
        raise error

    monkeypatch.setattr(room, "_run", run)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (errors.UsageError("fix this"), errors.USAGE, "jaxadv: fix this\n"),
        (ValueError("fix\n  that"), errors.USAGE, "jaxadv: fix that\n"),
        (TypeError("type"), errors.USAGE, "jaxadv: type\n"),
        (ImportError("pip install it"), errors.USAGE, "jaxadv: pip install it\n"),
        (FloatingPointError("the loss"), errors.USAGE, "jaxadv: the loss\n"),
        (FileNotFoundError("no such set"), errors.USAGE, "jaxadv: no such set\n"),
        (
            PermissionError(13, "Permission denied", "/x/y"),
            errors.USAGE,
            "jaxadv: /x/y: Permission denied. Choose another place",
        ),
        (
            OSError(28, "No space left on device"),
            errors.USAGE,
            "No space left on device. Choose another place, or free some space.",
        ),
        (MemoryError(), errors.USAGE, "ran out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory allocating"), errors.USAGE, "Lower --batch-size"),
        (KeyboardInterrupt(), errors.INTERRUPTED, "jaxadv: interrupted before the end"),
        (errors.Stopped("resume so"), errors.INTERRUPTED, "resume so\n"),
    ],
)
def test_what_goes_wrong_ends_in_an_exit_code(error, code, words, cli, monkeypatch):
    fail_with(monkeypatch, error)
    ran = cli("list")
    assert ran.code == code and words in ran.err and "Traceback" not in ran.err and not ran.out


def test_a_reader_that_has_gone_is_no_error():
    """`jaxadv list | head -1`."""
    words = [sys.executable, "-m", "jaxadv.cli", "list", "threats"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(120) == 0 and process.stderr.read() == b""
    process.stderr.close()


def test_a_bug_shows_its_traceback_and_gives_3(cli, monkeypatch):
    fail_with(monkeypatch, KeyError("lost"))
    ran = cli("list")
    assert ran.code == errors.INTERNAL == 3
    assert "Traceback" in ran.err and ran.err.rstrip().endswith("Please report it with the lines above.")


def test_the_traceback_of_a_users_error_is_there_for_the_asking(cli, monkeypatch):
    fail_with(monkeypatch, ValueError("fix that"))
    ran = cli("list", "--traceback")
    assert ran.code == 2 and "Traceback" in ran.err and ran.err.rstrip().endswith("jaxadv: fix that")


def test_the_exit_codes():
    codes = (errors.OK, errors.FLAGGED, errors.USAGE, errors.INTERNAL, errors.INTERRUPTED)
    assert codes == (0, 1, 2, 3, 130)
    for code in map(str, codes):
        assert f"| {code} |" in room.__doc__


def test_a_cache_is_used_for_the_command_only(cli, nearest_mean, tmp_path, monkeypatch):
    before, seen = jax.config.jax_compilation_cache_dir, []
    monkeypatch.setattr(room, "_run", lambda command, config: seen.append(jax.config.jax_compilation_cache_dir) or 0)
    assert cli("demo", "--cache", tmp_path / "c").code == 0
    monkeypatch.setenv("JAXADV_CACHE", str(tmp_path / "env"))
    assert cli("demo").code == 0
    monkeypatch.delenv("JAXADV_CACHE")
    assert cli("demo").code == 0
    assert seen == [str(tmp_path / "c"), str(tmp_path / "env"), before]
    assert jax.config.jax_compilation_cache_dir == before


def test_devices_are_forced_in_a_fresh_process():
    code = (
        "import jaxadv.cli as room, jax\n"
        "room._run = lambda command, config: print(len(jax.devices())) or 0\n"
        "raise SystemExit(room.main(['demo', '--devices', '3']))"
    )
    done = alone(code, XLA_FLAGS="")
    assert done.returncode == 0 and done.stdout == "3\n", done


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "jaxadv.cli", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("jaxadv ")
    assert callable(main)
