"""Files for clusters, run dry: what they start is a command line that jaxadv understands."""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from jaxadv.cli.parsing import parse

SCALE = Path(__file__).resolve().parents[2] / "docs" / "scale"


def understood(words):
    command, config = parse(words)
    return command, config


@pytest.mark.parametrize("begun", (False, True))
def test_the_slurm_script_starts_two_commands_that_parse(tmp_path, begun):
    """With a stand-in for srun that prints its words; once with checkpoints to go on from."""
    script = SCALE / "slurm" / "train.sbatch"
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/bash\nprintf "%q " "$@"; echo\n')
    fake.chmod(0o755)
    out = tmp_path / "out"
    if begun:
        (out / "checkpoints").mkdir(parents=True)
        (out / "config.json").write_text('{"arguments": {"recipe": "pgd_cifar10"}}')
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(out), "DATA_ROOT": str(tmp_path)}
    done = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [words[:3] for words in lines] == [
        ["--kill-on-bad-exit=1", "jaxadv", "train"],
        ["--kill-on-bad-exit=1", "jaxadv", "evaluate"],
    ]
    command, config = understood(lines[0][2:])
    assert (command, config.distributed, config.out, config.resume) == ("train", "auto", out, begun)
    assert understood(lines[1][2:])[1].distributed == "auto"
    asked = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert all(option.startswith("--") for option in asked) and "--signal=TERM@120" in asked and "--requeue" in asked


def test_the_jobset_is_one_process_a_host_and_its_command_parses(tmp_path):
    tree = yaml.safe_load((SCALE / "kubernetes" / "jobset.yaml").read_text())
    assert (tree["apiVersion"], tree["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = tree["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    sides = [int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
    assert sides[0] * sides[1] == job["completions"] * container["resources"]["limits"]["google.com/tpu"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    program = container["args"][0].replace("exec jaxadv", "printf '%q '")
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    command, config = understood(shlex.split(done.stdout))
    assert (command, config.distributed, config.resume) == ("train", "auto", False)


def test_the_ray_script_gives_every_process_its_number(monkeypatch):
    """With a stand-in for ray that runs everything at once, here."""
    started = []

    class Actor:
        def __init__(self, cls):
            self.made = cls()

        def __getattr__(self, name):
            return SimpleNamespace(remote=lambda *args: getattr(self.made, name)(*args))

    def remote(**options):
        assert options["scheduling_strategy"] == "SPREAD"
        return lambda cls: SimpleNamespace(remote=lambda: Actor(cls))

    fake = SimpleNamespace(init=lambda: None, remote=remote, get=lambda found: found)
    monkeypatch.setitem(sys.modules, "ray", fake)
    spec = importlib.util.spec_from_file_location("ray_train", SCALE / "ray" / "train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script.socket, "gethostbyname", lambda name: "10.0.0.1")
    monkeypatch.setattr(script.subprocess, "call", lambda words: started.append(words[3:]) or len(started) // 3)
    assert script.main(3, ["train", "--recipe", "pgd_cifar10", "--out", "run"]) == 1  # the third one failed
    for number, words in enumerate(started):
        assert understood(words)[1].distributed == f"10.0.0.1:{script.PORT},3,{number}"
