"""Kill it, fill its disk, damage its files: what was committed is there, and resumed runs repeat the bits."""

import gc
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, data, parallel, threats, train
from jaxadv.train import checkpoint as store

CHILD = r"""
import sys
from pathlib import Path
import jax, numpy as np, optax
from jaxadv import attacks, data, models, threats, train
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
source, validation = data.load("digits"), data.load("digits", "validation").take(64)
threat = threats.linf(0.1)
net = models.create("mlp", jax.random.key(3), shape=source.shape, classes=10, widths=(32, 32), norm="batch")
def tell(step, state, line):
    print("step", step, flush=True)
state = train.fit(
    jax.random.key(0), net,
    train.pgd_at(attacks.pgd(threat, steps=2, keep="last"), bn_attack="local"), optax.adam(1e-3),
    source, steps=steps, batch_size=32,
    attack=attacks.pgd(threat, steps=3), validation=validation, validate_every=25,
    keep="best", ema=0.99, collapse=train.Collapse(attacks.pgd(threat, steps=2), every=30, size=64), log_every=10,
    checkpoint=folder, save_every=3, resume=True, callbacks=[tell])
leaves = [jax.random.key_data(a) if a.dtype == state.key.dtype else a for a in jax.tree.leaves(state)]
np.savez(folder / "final.npz", *map(np.asarray, leaves))
"""


def start(folder, steps):
    here = Path(__file__).resolve().parents[2]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env = os.environ | {"PYTHONPATH": str(here), "JAX_PLATFORMS": "cpu"} | cache
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(steps)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_gives_the_same_bits(tmp_path, kit):
    """SIGKILL at seeded random moments, checkpoints being written every three steps; then one uninterrupted run."""
    steps, rng, kills = 45, random.Random(7), 0
    for _ in range(2):
        child = start(tmp_path / "killed", steps)
        for line in child.stdout:
            if line.startswith("step"):
                break
        time.sleep(rng.uniform(0.0, 0.7))
        child.kill()
        child.communicate()
        kills += child.returncode == -9
    assert kills >= 1
    for name in ("killed", "whole"):
        child = start(tmp_path / name, steps)
        _, errors = child.communicate(timeout=500)
        assert child.returncode == 0, errors[-3000:]
    one, two = (np.load(tmp_path / name / "final.npz") for name in ("killed", "whole"))
    assert sorted(one.files) == sorted(two.files)
    for name in one.files:
        assert one[name].dtype == two[name].dtype and one[name].tobytes() == two[name].tobytes()
    lines = [kit.quiet(train.read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("killed", "whole")]
    assert lines[0] == lines[1] and lines[0][-1]["step"] == steps


def arguments(kit, folder, **more):
    threat = threats.linf(0.1)
    given = dict(
        trainable=kit.mlp("batch"),
        objective=train.fgsm_rs(threat),
        optimizer=optax.adam(1e-2),
        data=kit.blobs(96),
        steps=12,
        batch_size=16,
        attack=attacks.pgd(threat, steps=2),
        validation=kit.blobs(32, seed=1),
        save_every=4,
        log_every=3,
        checkpoint=folder,
    )
    return given | more


class Stop(Exception):
    """Breaks a run off, as a crash would."""


def stop_at(where):
    def callback(step, state, line):
        if step >= where:
            raise Stop

    return callback


@pytest.mark.slow
def test_a_crash_resumed_is_a_run_without_one(kit, key, tmp_path):
    with pytest.raises(Stop):
        train.fit(key, **arguments(kit, tmp_path / "a", callbacks=[stop_at(9)]))
    crashed = train.read_metrics(tmp_path / "a" / "metrics.jsonl")
    resumed = train.fit(key, **arguments(kit, tmp_path / "a", resume=True))
    whole = train.fit(key, **arguments(kit, tmp_path / "b"))
    assert kit.same_bits(resumed, whole)
    files = [kit.quiet(train.read_metrics(tmp_path / name / "metrics.jsonl")) for name in "ab"]
    assert files[0] == files[1] and len(crashed) < len(files[0])
    lines: list = []  # nor does saving change what is reported
    train.fit(key, **arguments(kit, None, callbacks=[lambda step, state, line: lines.append(line)]))
    assert kit.quiet(lines) == files[0]
    again = train.fit(key, **arguments(kit, tmp_path / "a", resume=True))  # a finished run is only read
    assert kit.same_bits(again, whole)


def test_resuming_an_empty_folder_begins(kit, key, tmp_path):
    state = train.fit(key, **arguments(kit, tmp_path, resume=True))
    assert int(state.step) == 12


def test_the_best_survives_while_old_ones_go(kit, key, tmp_path):
    arrays = {"w": jnp.arange(3.0)}
    keeper = train.Checkpoints(tmp_path)
    for step in range(1, 8):
        keeper.save(step, arrays, {"n": step}, best=step == 2)
    keeper.wait()
    assert keeper.steps() == [2, 6, 7] and keeper.best == 2
    keeper.save(7, {"w": jnp.zeros(3)}, {"n": 0})  # a step that exists is left as it is
    tree, facts = keeper.restore(arrays, 7)
    assert kit.same_bits(tree, arrays) and facts == {"n": 7}
    keeper.drop_after(6)
    assert keeper.steps() == [2, 6]
    keeper.close()


def test_typed_keys_and_scalars_come_back_as_they_were(kit, key, tmp_path):
    tree = {
        "key": key,
        "keys": jax.random.split(key, 3),
        "n": jnp.int32(4),
        "flag": jnp.bool_(True),
        "half": jnp.ones(2, jnp.bfloat16),
    }
    keeper = train.Checkpoints(tmp_path)
    keeper.save(1, tree, {})
    keeper.wait()
    found, _ = keeper.restore(jax.tree.map(jnp.zeros_like, tree), 1)
    assert kit.same_bits(found, tree)
    with pytest.raises(train.CheckpointError, match="it holds other arrays"):
        keeper.restore({"other": jnp.zeros(2)}, 1)
    with pytest.raises(train.CheckpointError, match="must hold a checkpoint of step 5; it has .1."):
        keeper.restore(tree, 5)
    keeper.close()


def test_another_configuration_is_refused_by_name(kit, key, tmp_path):
    train.fit(key, **arguments(kit, tmp_path))
    with pytest.raises(FileExistsError, match="holds a run at step 12. Pass resume=True"):
        train.fit(key, **arguments(kit, tmp_path))
    for change, words in [
        ({"steps": 14}, "settings.steps: 12 -> 14"),
        ({"batch_size": 8}, "settings.batch_size: 16 -> 8"),
        ({"data": kit.blobs(96, seed=5)}, "sources.data: "),
        ({"objective": train.fgsm_rs(threats.linf(0.1), alpha=0.05)}, "objective.find.attack.step_size: 0.125 -> 0.05"),
        ({"optimizer": optax.adam(2e-2)}, r"optimizer\..*step_size: -0.01 -> -0.02"),
        ({"ema": 0.9}, "ema: None -> 0.9"),
        ({"trainable": kit.mlp("batch", widths=(8,))}, "arrays"),
    ]:
        with pytest.raises(ValueError, match=words):
            train.fit(key, **arguments(kit, tmp_path, resume=True, **change))
    with pytest.raises(ValueError, match="key"):
        train.fit(jax.random.key(9), **arguments(kit, tmp_path, resume=True))


def test_another_executor_may_resume(kit, key, tmp_path):
    smooth = {"objective": train.standard(), "optimizer": optax.sgd(0.1, momentum=0.9)}
    with pytest.raises(Stop):
        train.fit(key, **arguments(kit, tmp_path / "a", callbacks=[stop_at(9)], **smooth))
    resumed = train.fit(key, **arguments(kit, tmp_path / "a", resume=True, mesh=parallel.make_mesh(4), **smooth))
    whole = train.fit(key, **arguments(kit, tmp_path / "b", **smooth))
    for a, b in zip(kit.leaves(resumed), kit.leaves(whole)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def damage(folder, how):
    files = [p for p in folder.rglob("*") if p.is_file() and "/d/" in p.as_posix()]
    assert files
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if how == "cut" else bytes(b ^ 0x55 for b in content))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's readers, when they fail
@pytest.mark.parametrize("how", ["cut", "flip"])
def test_a_damaged_checkpoint_is_named_and_skipped_and_the_one_before_serves(kit, key, tmp_path, how):
    with pytest.raises(Stop):
        train.fit(key, **arguments(kit, tmp_path / "a", callbacks=[stop_at(9)]))
    folder = tmp_path / "a" / "checkpoints"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    damage(folder / str(steps[-1]), how)
    with pytest.raises(train.CheckpointError, match=f"step {steps[-1]} in .*reading it failed.*resume={steps[-2]}"):
        train.fit(key, **arguments(kit, tmp_path / "a", resume=steps[-1]))
    gc.collect()
    told: list = []
    resumed = train.fit(
        key, **arguments(kit, tmp_path / "a", resume=True, callbacks=[lambda step, state, line: told.append(line)])
    )
    assert told[0]["event"] == "skipped" and (told[0]["step"], told[0]["skipped"]) == (steps[-2], steps[-1])
    assert "must be whole" in told[0]["why"]
    assert kit.same_bits(resumed, train.fit(key, **arguments(kit, tmp_path / "b")))


def test_values_that_do_not_match_their_checksum_are_refused(kit, tmp_path, monkeypatch):
    """Also where what one device wrote is read in shares."""
    keeper, tree = train.Checkpoints(tmp_path), {"w": jnp.arange(4.0)}
    keeper.save(1, tree, {})
    keeper.wait()
    mesh = parallel.make_mesh(4)
    split = parallel.compile_step(train.make_step, mesh=mesh, layout=parallel.fsdp(least=2)).place(tree)
    assert len(split["w"].sharding.device_set) == 4 and not split["w"].is_fully_replicated
    read = keeper._read

    def spoiled(*how):
        found, meta = read(*how)
        return jax.tree.map(lambda w: w.at[3].add(1e-6), found), meta

    for like in (tree, split):
        assert kit.same_bits(keeper.restore(like, 1)[0], tree)
        with monkeypatch.context() as patch:
            patch.setattr(keeper, "_read", spoiled)
            with pytest.raises(train.CheckpointError, match="do not match their checksum.*begin anew"):
                keeper.restore(like, 1)
    keeper.close()


def test_a_checksum_does_not_depend_on_how_arrays_lie_but_on_every_value_and_place(monkeypatch):
    monkeypatch.setattr(store, "_AT_ONCE", 13)
    rng = np.random.default_rng(0)
    kinds = (np.float32, np.int32, bool, jnp.bfloat16)
    tree = {str(i): rng.normal(size=(8, 6)).astype(kind) for i, kind in enumerate(kinds)}
    tree |= {"n": np.int32(3), "none": np.zeros((0, 2), np.float32)}
    want = store.checksum(jax.tree.map(jnp.asarray, tree))
    for mesh in (parallel.make_mesh(2), parallel.make_mesh(8)):
        placed = parallel.compile_step(train.make_step, mesh=mesh, layout=parallel.fsdp(least=2)).place(tree)
        assert len({str(shard.index) for shard in placed["0"].addressable_shards}) == mesh.size
        assert store.checksum(placed) == want
    one, first = tree["0"], tree["0"].copy()
    first[2, 3] = np.nextafter(first[2, 3], 9)
    swapped, added = one.copy(), one + 0.0
    swapped[[1, 5]], added[0, :2] = swapped[[5, 1]], added[0, 1::-1]
    for other in ({"0": first}, {"0": swapped}, {"0": added}, {"n": np.int32(4)}, {"1": tree["0"], "0": tree["1"]}):
        assert store.checksum(jax.tree.map(jnp.asarray, tree | other)) != want


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # orbax's writing thread
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs limits on file size")
def test_a_full_disk_is_a_clear_error_and_the_checkpoint_before_is_intact(kit, key, tmp_path, caplog):
    """Files may not grow past 8 KiB from step 9 on; the network needs more. What was committed by then serves."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, state, line):
        if step == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))

    big = kit.mlp("batch", widths=(256, 256))
    given = arguments(kit, tmp_path / "a", trainable=big)
    try:
        with pytest.raises(
            train.CheckpointError, match=r"writing .* failed.*Is the disk full.*step 4 is intact"
        ) as caught:
            train.fit(key, **given, callbacks=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path / "a") in str(caught.value)
    assert not [record for record in caplog.records if record.exc_info]  # one error, told once
    del caught  # it holds orbax's unfinished writers
    gc.collect()
    resumed = train.fit(key, **given, resume=True)
    assert kit.same_bits(resumed, train.fit(key, **(given | {"checkpoint": tmp_path / "b"})))


def test_metrics_that_cannot_be_written_are_a_clear_error_too(kit, key, tmp_path, monkeypatch):
    def full(self, line):
        if line["step"] == 9:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train.record.Metrics, "write", full)
        with pytest.raises(train.CheckpointError, match="metrics.jsonl in .*No space left.*free some space and resume"):
            train.fit(key, **arguments(kit, tmp_path / "a"))
    resumed = train.fit(key, **arguments(kit, tmp_path / "a", resume=True))
    assert kit.same_bits(resumed, train.fit(key, **arguments(kit, tmp_path / "b")))


@pytest.mark.slow
def test_a_data_file_cut_short_during_training_is_named_and_mended_the_run_repeats_the_bits(kit, key, tmp_path):
    pytest.importorskip("array_record", reason="array_record exists for Linux only")
    x, y = kit.blobs(96, side=32).all()  # of several blocks
    np.savez(tmp_path / "train.npz", x=np.uint8(255 * x), y=y)
    made = data.prepare(tmp_path, "blobs", tmp_path / "sets")
    (file,) = made.glob("*-train.array_record*")
    whole = file.read_bytes()

    def cut(step, state, line):
        if step == 6:
            os.truncate(file, len(whole) // 2)

    def given(folder, **more):
        more |= {"data": data.tfds_source(made, "train+validation"), "trainable": kit.mlp(side=32)}
        return arguments(kit, tmp_path / folder, **more | {"attack": None, "validation": None})

    with pytest.raises(ValueError, match=f"the files of {made} must be whole; reading records .*Cut short"):
        train.fit(key, **given("a", callbacks=[cut]))
    file.write_bytes(whole)
    resumed = train.fit(key, **given("a", resume=True))
    assert kit.same_bits(resumed, train.fit(key, **given("b")))


def test_a_folder_that_cannot_be_made_is_a_clear_error(kit, key, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(train.CheckpointError, match="must be writable"):
        train.fit(key, **arguments(kit, tmp_path / "file"))


def test_the_description_is_plain_and_written_whole(kit, key, tmp_path):
    train.fit(key, **arguments(kit, tmp_path, steps=2))
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["schema"] == 1 and written["config"]["settings.steps"] == 2
    assert "0x" not in json.dumps(written)  # no addresses: another process must find the same text
    assert not list(tmp_path.glob(".run.json*"))
