"""`train` and `demo`: run folders, resuming, interruptions, and that the exported network is the trained one."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxadv import cli as cli_room
from jaxadv import data, evaluate, models, train
from jaxadv.cli import files, sources, training
from jaxadv.cli.configs import Train
from jaxadv.cli.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--recipe", "tiny_digits", "--validate-every", 1000, "--save-every", 1000]  # at the end only
LARGE = ("cifar10", "imagenet")
RECIPES = [
    pytest.param(name, marks=pytest.mark.slow) if any(word in name for word in LARGE) else name
    for name in train.RECIPES
]


def config_of(run):
    return json.loads((run / "config.json").read_text())


def test_train_writes_a_run_folder_whose_weights_are_the_trained_ones(cli, tiny, tmp_path):
    run = tmp_path / "run"
    ran = cli("train", *TINY, "--out", run, "--seed", 5, "--batch-size", 50)
    assert ran.code == 0, ran
    assert {"config.json", "metrics.jsonl", "checkpoints", "model.safetensors", "train.log", "run.json"} <= {
        p.name for p in run.iterdir()
    }
    config = config_of(run)
    assert config["schema"] == files.RUN_SCHEMA and config["seed"] == 5 and config["batch_size"] == 50
    assert config["arguments"]["recipe"] == "tiny_digits" and config["arguments"]["data"] == "digits"
    assert set(config["versions"]) >= {"jaxadv", "jax", "python", "numpy", "flax"} and config["device"]["kind"]
    assert config["steps"] == len(data.load("digits", "train")) // 50

    source, validation = data.load("digits", "train"), data.load("digits", "validation")
    network = models.create("mlp", jax.random.key(5), shape=(8, 8, 1), classes=10, widths=())
    arguments = tiny(source, seed=5, epochs=1, batch_size=50, validation=validation, trainable=network)
    state = train.fit(jax.random.key(5), **arguments)
    exported, spec = models.load(run / "model.safetensors")
    assert spec == config["network"]
    for ours, theirs in zip(jax.tree.leaves(exported.params), jax.tree.leaves(state.params)):
        np.testing.assert_array_equal(ours, theirs)
    log = (run / "train.log").read_text()
    assert "started: recipe tiny_digits" in log and "validation clean" in log and "finished" in log
    assert f"those of the last step, {config['steps']} of {config['steps']}" in ran.out
    assert f"jaxadv evaluate {run}" in ran.out


@pytest.mark.parametrize("name", RECIPES)
def test_the_network_written_beside_the_weights_is_that_of_the_recipe(name):
    """What is exported is built from NETWORKS; the recipe must build the same from the same seed."""
    known = training.data_of(name)
    shape = {"digits": (8, 8, 1), "mnist": (28, 28, 1)}.get(known, (32, 32, 3))
    source = data.arrays(
        np.random.default_rng(0).uniform(size=(400, *shape)).astype(np.float32), np.arange(400) % 10, classes=10
    )
    known_to_recipe = inspect.signature(train.RECIPES[name]).parameters
    for option, value in training.NETWORKS[name][1].items():  # what is narrowed below is as published
        assert option not in known_to_recipe or known_to_recipe[option].default == value
    narrow = {"width": 2} if "width" in training.NETWORKS[name][1] else {}
    given, spec = training._recipe(name, source, 3, {"epochs": 1}, narrow)
    own = train.RECIPES[name](source, seed=3, epochs=1, **narrow)["trainable"]
    # The structure holds the whole graph: shortcuts, normalization, widths.
    assert jax.tree.structure(own) == jax.tree.structure(given["trainable"])
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(given["trainable"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(training.NETWORKS) == set(train.RECIPES) and spec["name"] in sources.NETS
    assert known in training.DATA_OF.values() and (known in data.SOURCES or known == "tfds:imagenet")


def test_a_setting_that_changes_the_network_behind_its_description_is_refused():
    source = data.arrays(np.zeros((256, 32, 32, 3), np.float32), np.arange(256) % 10)
    with pytest.raises(UsageError, match="by options of zerosnet .*widths.* got width"):
        training._recipe("zerosnet_cifar10", source, 0, {"epochs": 1}, {"width": 2})


def test_settings_reach_fit(tmp_path):
    config = Train(out=tmp_path, eps="8/255", epochs=2, keep="best", precision="bfloat16", save_every=3)
    assert training._given(config) == {
        "eps": 8 / 255,
        "epochs": 2,
        "keep": "best",
        "precision": "bfloat16",
        "save_every": 3,
    }
    assert training._given(Train(out=tmp_path)) == {}


def test_an_interrupted_run_resumes_to_the_same_weights(cli, tiny, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut run"
    words = ["--recipe", "tiny_digits", "--eps", "1/10", "--batch-size", 100, "--save-every", 4, "--validate-every", 6]
    assert cli("train", *words, "--out", whole).code == 0

    follow = training.follow

    def impatient(*given):
        tell = follow(*given)

        def callback(step, state, metrics):
            tell(step, state, metrics)
            if step == 6:
                signal.raise_signal(signal.SIGINT)

        return callback

    with monkeypatch.context() as patch:
        patch.setattr(training, "follow", impatient)
        ran = cli("train", *words, "--out", cut)
    command = f"jaxadv train --out '{cut}' --resume"
    assert ran.code == 130 and ran.err.rstrip().endswith(f"Resume with:\n{command}")
    assert "interrupted at step 6 of 12" in ran.err and not (cut / "model.safetensors").exists()
    assert "interrupted at step 6" in (cut / "train.log").read_text()

    ran = cli("evaluate", cut, "--n", 10)
    assert ran.code == 2 and "finish it: jaxadv train" in ran.err
    ran = cli("train", "--out", cut, "--resume")
    assert ran.code == 0, ran
    ours, theirs = (models.load(folder / "model.safetensors")[0] for folder in (cut, whole))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "resumed" in (cut / "train.log").read_text()
    steps = [m["step"] for m in train.read_metrics(cut / "metrics.jsonl") if m["event"] == "train"]
    assert (
        steps
        == sorted(steps)
        == [m["step"] for m in train.read_metrics(whole / "metrics.jsonl") if m["event"] == "train"]
    )


def test_resume_with_other_arguments_is_refused_with_what_differs(cli, refused, tiny, tmp_path):
    run = tmp_path / "run"
    assert cli("train", *TINY, "--out", run).code == 0
    message = refused("train", "--out", run, "--resume", "--epochs", 2)
    assert "settings that it began with" in message and "steps: 20 -> 40" in message
    assert cli("train", "--out", run, "--resume").code == 0  # nothing is left to do
    assert f"Continue it with: {training.resume_command(run)}" in refused("train", *TINY, "--out", run)


def test_the_budget_and_the_data_of_a_run_are_the_defaults_of_its_evaluation(cli, tiny, tmp_path):
    run, out = tmp_path / "run", tmp_path / "evaluation"
    assert cli("train", *TINY, "--eps", "1/20", "--keep", "best", "--out", run).code == 0
    assert "the best by robust accuracy" in (run / "train.log").read_text()
    assert cli("evaluate", run, "--n", 20, "--attacks", "fgsm", "--out", out).code in (0, 1)
    tree = json.loads((out / "report.json").read_text())
    assert (tree["data"]["name"], tree["models"][0]["name"], tree["models"][0]["threat"]["eps"]) == (
        "digits",
        "run",
        0.05,
    )


def test_train_on_a_file_and_on_several_devices(cli, tiny, tmp_path):
    x, y = data.load("digits", "train").all()
    np.savez(tmp_path / "own.npz", x=x[:220], y=y[:220])
    run = tmp_path / "run"
    words = [*TINY, "--data", tmp_path / "own.npz", "--batch-size", 60, "--devices", 2, "--how", "shard_map"]
    assert cli("train", *words, "--out", run).code == 0
    assert config_of(run)["arguments"]["data"] == str(tmp_path / "own.npz") and config_of(run)["device"]["count"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "fast_minst"], "unknown recipe 'fast_minst'. Did you mean 'fast_mnist'"),
        (["--recipe", "fast_digits", "--data", "digitz"], "unknown data set 'digitz'. Did you mean 'digits'"),
        (["--recipe", "fast_digits", "--eps", "0"], "eps must be finite and greater than 0; got 0.0"),
        (["--recipe", "fast_digits", "--eps", "nan"], "eps must be finite and greater than 0; got nan"),
        (["--recipe", "fast_digits", "--eps", "a"], "eps must be a number or a fraction"),
        (["--recipe", "fast_digits", "--epochs", 0], "epochs must be a whole number of at least 1; got 0"),
        (["--recipe", "fast_digits", "--batch-size", 5000], "batch_size"),
        ([*TINY, "--devices", 3], "the rows of a batch must divide equally among the 3 devices"),
        (["--recipe", "fast_digits", "--resume"], "--resume needs a run that was started before"),
    ],
)
def test_train_refuses_bad_arguments(words, message, refused, tiny, tmp_path):
    assert message in refused("train", *words, "--out", tmp_path / "run")


def test_train_refuses_missing_data_and_folders_in_use(refused, tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("JAXADV_DATA", raising=False)
    message = refused("train", "--out", tmp_path / "run")
    assert "mnist/train-images-idx3-ubyte.gz" in message and not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    assert "which holds files" in refused("train", *TINY, "--out", tmp_path)
    assert "--out must be a folder that can be written" in refused("train", *TINY, "--out", tmp_path / "file")


def test_a_full_disk_while_training_is_one_paragraph(refused, tiny, tmp_path, monkeypatch):
    def full(self, *given, **more):
        raise train.CheckpointError(f"writing the checkpoint of step 3 to {tmp_path} failed: No space left on device.")

    monkeypatch.setattr(train.Checkpoints, "save", full)
    assert "No space left on device" in refused("train", *TINY, "--out", tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------- files


def test_arrays_are_saved(tmp_path):
    files.save_arrays(tmp_path / "b.npz", {"x": np.arange(3)})
    np.testing.assert_array_equal(np.load(tmp_path / "b.npz")["x"], [0, 1, 2])


def test_places_are_checked(tmp_path):
    files.writable(tmp_path / "new" / "deep")
    assert (tmp_path / "new" / "deep").is_dir() and not list((tmp_path / "new" / "deep").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--here must be a folder that can be written; got .*file"):
        files.writable(tmp_path / "file", "--here")
    assert files.npz_path(None) is None
    assert files.npz_path(tmp_path / "a.npz") == tmp_path / "a.npz"
    with pytest.raises(UsageError, match="must be a file that ends in .npz"):
        files.npz_path(tmp_path / "a.txt")


def test_the_record_of_a_run(tmp_path, monkeypatch):
    files.write_run(tmp_path, "train", Train(out=tmp_path, seed=4), steps=3)
    tree = config_of(tmp_path)
    assert (
        tree["command"] == "train"
        and tree["seed"] == 4
        and tree["steps"] == 3
        and tree["arguments"]["out"] == str(tmp_path)
    )
    assert tree["versions"] == files.versions()
    assert tree["git"] is None or len(tree["git"].split("+")[0]) == 40
    monkeypatch.setattr(files.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(OSError("no git")))
    assert files.revision() is None


def test_any_setting_of_recipe_network_or_training_can_be_set(cli, tiny, tmp_path):
    words = ("--set", "widths=[7]", "--set", "ema=0.9", "--set", "accumulate=2", "--set", "norm=batch")
    ran = cli("train", *TINY, "--out", tmp_path / "run", "--batch-size", 50, *words)
    assert ran.code == 0, ran
    _, spec = models.load(tmp_path / "run" / "model.safetensors")
    assert spec["options"] == {"widths": [7], "norm": "batch"}
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["accumulate"] == 2 and config["ema"] == 0.9
    again = cli("train", "--out", tmp_path / "run", "--resume")
    assert again.code == 0 and config_of(tmp_path / "run")["arguments"]["set"] == list(words[1::2])
    for setting, said in {
        "epochs=3": "an option of its own: --epochs",
        "wdiths=[7]": "Did you mean 'widths'",
        "optimizer=adam": "unknown setting of tiny_digits, of mlp or of training 'optimizer'",
        "width": "--set must be KEY=VALUE",
        "net=cnn_smal": "Did you mean 'cnn_small'",
    }.items():
        refused = cli("train", *TINY, "--out", tmp_path / "other", "--set", setting)
        assert refused.code == 2 and said in " ".join(refused.err.split()), (setting, refused)
    assert not (tmp_path / "other").exists()


def test_the_log_is_dated(tmp_path):
    log = training.Log(tmp_path / "train.log")
    log("one")
    log("two")
    lines = (tmp_path / "train.log").read_text().split("\n")
    assert [line[20:] for line in lines[:2]] == ["one", "two"] and time.strptime(lines[0][:19], "%Y-%m-%d %H:%M:%S")


# ------------------------------------------------------------------------------------------------- the demo, whole runs


def test_a_small_demo(cli, tiny, tmp_path, monkeypatch):
    for name in ("standard_digits", "pgd_digits"):
        monkeypatch.setitem(train.RECIPES, name, tiny)
        monkeypatch.setitem(training.NETWORKS, name, training.NETWORKS["tiny_digits"])
    monkeypatch.setitem(evaluate.PROTOCOLS, "gradient", lambda norm: (evaluate.Stage("fgsm"),))
    out = tmp_path / "demo"
    ran = cli("demo", "--out", out, "--epochs", 1, "--n", 20, "--eps", "0.1")
    assert ran.code in (0, 1), ran
    tree = json.loads((out / "report.json").read_text())
    keys = {
        "name",
        "n",
        "clean_accuracy",
        "clean_interval",
        "robust_accuracy",
        "robust_interval",
        "threat",
        "attacks",
        "flags",
    }
    assert len(tree["models"]) == 2 and all(set(m) >= keys for m in tree["models"])
    assert [m["name"] for m in tree["models"]] == ["standard training", "adversarial training"]
    assert (out / "report.html").is_file() and str(out / "report.html") in ran.out
    assert all(m["threat"] == {"norm": "linf", "eps": 0.1, "bounds": [0.0, 1.0]} for m in tree["models"])
    for part in ("standard", "robust"):
        assert config_of(out / part)["arguments"]["data"] == "digits"
        assert models.load(out / part / "model.safetensors")[1]["name"] == "mlp"
    assert "eps must be finite" in cli("demo", "--out", out, "--eps", "0").err
    assert cli("demo", "--out", out, "--epochs", 0).code == 2


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    run = tmp_path / "run"
    words = [
        sys.executable,
        "-m",
        "jaxadv.cli",
        "train",
        "--recipe",
        "standard_digits",
        "--epochs",
        "300",
        "--out",
        str(run),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    metrics = run / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"Resume with:\njaxadv train --out {run} --resume" in err and "Traceback" not in err and not out
    again = subprocess.Popen(
        [*words[:4], "--out", str(run), "--resume"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline, size = time.monotonic() + 300, metrics.stat().st_size
    while time.monotonic() < deadline and again.poll() is None and metrics.stat().st_size <= size:
        time.sleep(0.2)
    again.send_signal(signal.SIGINT)
    err = again.communicate(timeout=120)[1]
    assert again.returncode == 130, err
    first, second = (int(step) for step in re.findall(r"interrupted at step (\d+)", (run / "train.log").read_text()))
    assert 0 < first < second and metrics.stat().st_size > size and f"interrupted at step {second} of 6000" in err


# ------------------------------------------------------------------------------------------------- several processes


def test_one_process_leads_and_trains_on_what_was_asked_for():
    assert files.lead() and training.mesh_of(None) is None and training.mesh_of(2).size == 2


def test_a_lost_process_is_told_from_a_bug(monkeypatch):
    gone, bug = RuntimeError("INTERNAL: [Gloo] Connection closed by peer"), RuntimeError("list index out of range")
    assert not cli_room._lost(gone)  # there is only this process
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    wrapped = ValueError("reading failed")
    wrapped.__cause__ = gone
    assert cli_room._lost(gone) and cli_room._lost(wrapped) and not cli_room._lost(bug)


def test_words_about_processes_that_make_no_sense_are_refused(refused, tmp_path, monkeypatch):
    words = ("train", "--recipe", "standard_digits", "--out", tmp_path / "run")
    assert "distributed must be 'auto', 'off'" in refused(*words, "--distributed", "here")
    assert "multiple of the 2 processes; got 3" in refused(*words, "--distributed", "a:1,2,0", "--devices", 3)
    assert "layout must be None unless how='jit' with a mesh" in refused(*words, "--fsdp")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "demo, which runs in one process" in refused("demo", "--out", tmp_path / "demo")
    assert "attack, which runs in one process" in refused("attack", "model")


@pytest.mark.slow
def test_a_prepared_set_of_images_goes_from_raw_files_to_an_evaluation(cli, tiny, tmp_path):
    """Shaped like ImageNet: folders of classes, files of many sizes; then records, training, attack."""
    pytest.importorskip("array_record", reason="array_record exists for Linux only")
    from PIL import Image

    for part, n in (("train", 40), ("test", 9)):
        for i in range(n):
            path = tmp_path / "raw" / part / f"n{i % 3:08d}" / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            color = np.eye(3, dtype=np.uint8)[i % 3] * np.uint8(200)
            Image.fromarray(np.broadcast_to(color, (20 + i, 24, 3)).copy()).save(path)
    sets = tmp_path / "sets"
    assert cli("data", "prepare", tmp_path / "raw", "--name", "photos", "--out", sets, "--size", 12).code == 0
    run, where = tmp_path / "run", ("--data", "tfds:photos", "--data-root", sets)
    ran = cli("train", *TINY, *where, "--out", run, "--batch-size", 8, "--epochs", 6)
    assert ran.code == 0, ran
    words = ("--eps", "0.05", "--attacks", "fgsm", "--out", tmp_path / "evaluation")
    assert cli("evaluate", run, *words, "--data-root", sets).code in (0, 1)
    (model,) = json.loads((tmp_path / "evaluation" / "report.json").read_text())["models"]
    assert model["n"] == 9 and model["clean_accuracy"] == 1.0
    deep = ("--recipe", "pgd_imagenet", "--set", "width=2", "--set", "depths=[1, 1]", "--set", "remat=true")
    ran = cli("train", *deep, *where, "--out", tmp_path / "deep", "--batch-size", 8, "--epochs", 1)
    assert ran.code == 0, ran
    network, spec = models.load(tmp_path / "deep" / "model.safetensors")
    assert spec["name"] == "resnet50" and spec["options"] == {"width": 2, "depths": [1, 1]}
    assert network.params["conv1"]["kernel"].shape == (7, 7, 3, 2) and "layer3" not in network.params
