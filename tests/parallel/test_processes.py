"""Two processes of four devices each: the numbers of one process with one device, also after one of them was lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(folder, spec="off", devices=1, pause=0.0, *words):
    folder.mkdir(exist_ok=True)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "JAX_PLATFORMS": "cpu"} | cache
    given = [str(folder), spec, str(devices), str(pause), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(HERE / "child.py"), *given], env=env, **pipes)


def two(folder, pause=0.0, *words):
    """Two processes; the second one reads slowly."""
    port = free_port()
    return [start(folder, f"127.0.0.1:{port},2,{i}", 8, pause * i, *words) for i in (0, 1)]


def ended(children):
    """Exit codes and what was printed to standard error; nobody is left running."""
    try:
        told = [child.communicate(timeout=400)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    return [child.returncode for child in children], told


def until_step(folder, step, children):
    """Wait until a run has reported a step."""
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and all(child.poll() is None for child in children):
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached: {ended(children)}")


def found(folder):
    """Weights, the private step and the outcome of every example."""
    report = json.loads((folder / "evaluation" / "report.json").read_text())["models"][0]
    with np.load(folder / "private.npz") as arrays:
        private = {name: arrays[name] for name in arrays.files}
    return load_file(folder / "run" / "model.safetensors"), private, report["examples"] | {"attacks": report["attacks"]}


def held(folder):
    """The parts of the weights, the biases and their momenta that each of two processes had."""
    both = [json.loads((folder / f"held-{i}.json").read_text()) for i in (0, 1)]
    assert both[0] == both[1] and len(both[0]) == 4
    return sorted(both[0].values())


def same(one, other):
    for arrays, others in zip(one[:2], other[:2]):
        assert sorted(arrays) == sorted(others)
        for name in arrays:
            np.testing.assert_allclose(arrays[name], others[name], atol=1e-5, rtol=0)
    exact = ("index", "label", "clean", "adversarial", "by", "restart", "attacks")
    assert [one[2][k] for k in exact] == [other[2][k] for k in exact]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, one device."""
    folder = tmp_path_factory.mktemp("processes") / "alone"
    codes, told = ended([start(folder)])
    assert codes == [0], told
    return folder


@pytest.mark.slow
def test_two_processes_train_privatize_and_evaluate_as_one_does(alone):
    folder = alone.parent / "two"
    codes, told = ended(two(folder))
    assert codes == [0, 0], told
    same(found(folder), found(alone))
    assert held(folder) == [1, 1, 1, 1]
    assert "Report:" not in told[1] and "train: " in told[0] and "train: " not in told[1]  # the first one speaks
    assert (folder / "evaluation" / "process-1").is_dir()
    first, second = (
        [json.loads(line) for line in (f / "run" / "metrics.jsonl").read_text().splitlines()] for f in (folder, alone)
    )
    assert [(m["step"], m["event"]) for m in first] == [(m["step"], m["event"]) for m in second]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_preempted_and_a_killed_process_and_another_number_of_devices_change_nothing(alone):
    """SIGTERM to one that begins alone, then to one of two, then SIGKILL to one of two, then one goes on alone.

    One of the two reads slowly, and their state lies in shares: both read what one has written, both write the
    checkpoints, and one reads them whole.
    """
    folder = alone.parent / "lost"
    child = start(folder, "off", 2, 0.05)
    until_step(folder, 5, [child])
    child.send_signal(signal.SIGTERM)
    codes, told = ended([child])
    assert codes == [0], told
    begun = int(re.search(r"interrupted at step (\d+) of 200; saved", told[0])[1])
    children = two(folder, 0.05, "--fsdp", "--resume")
    until_step(folder, begun + 10, children)
    children[1].send_signal(signal.SIGTERM)
    codes, told = ended(children)
    assert codes == [0, 0], told
    stopped = int(re.search(r"interrupted at step (\d+) of 200; saved", told[0])[1])
    assert begun + 10 <= stopped < 200 and (folder / "run" / "checkpoints" / str(stopped)).is_dir()

    assert held(folder) == [0.5, 0.5, 1, 1]
    facts = json.loads((folder / "run" / "checkpoints" / str(stopped) / "meta" / "metadata").read_text())
    assert int(facts["checksum"], 16) > 0
    children = two(folder, 0.05, "--fsdp", "--resume")
    until_step(folder, stopped + 30, children)
    children[1].kill()
    codes, told = ended(children)
    assert codes[0] in (4, -signal.SIGABRT) and codes[1] == -signal.SIGKILL, told  # our sentence, or jax's own
    assert re.search("another process of this run ended|another task died", told[0]) and "Traceback" not in told[0]

    codes, told = ended([start(folder, "off", 2, 0.0, "--resume")])
    assert codes == [0], told
    assert int(re.search(r"train: (\d+)/200", told[0])[1]) > stopped
    same(found(folder), found(alone))
