"""The journal: what was finished is on disk, whatever happens, and a resumed run tells the same."""

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxadv import evaluate, threats
from jaxadv.evaluate import Stage, engine, journal, slots
from jaxadv.evaluate.journal import Journal, digest, frame, scan

KEY = jax.random.key(0)
LINF = threats.linf(0.02)
HERE = Path(__file__).resolve().parent


def told(report):
    tree = report.to_dict()
    del tree["timing"]
    return json.dumps(tree), report.models[0].x_adv.tobytes()


def test_blocks_come_back_as_they_were_written(tmp_path):
    made = Journal(tmp_path / "deep" / "er", {"a": [1, 2.5], "b": None})
    made.append("0/1", row=np.arange(3), size=np.float64([np.nan, 0.1, np.inf]))
    made.append("0/1", row=np.arange(0), points=np.zeros((0, 2), np.float32))
    made.append("slots", slots=4)
    made.close()
    again = Journal(tmp_path / "deep" / "er", {"b": None, "a": (1, 2.5)}, resume=True)
    assert list(again.past) == ["0/1", "slots"] and again.cut == 0
    np.testing.assert_array_equal(again.past["0/1"][0]["size"], [np.nan, 0.1, np.inf])
    assert again.past["0/1"][1]["points"].shape == (0, 2) and again.past["slots"][0]["slots"] == 4
    again.append("0/2", row=np.arange(1))
    again.finish()
    again.close()
    third = Journal(tmp_path / "deep" / "er", {"a": [1, 2.5], "b": None}, resume=True)
    assert list(third.past) == ["0/1", "slots", "0/2", "end"]
    third.close()


def test_a_file_cut_at_any_byte_loses_the_last_block_alone(tmp_path):
    made = Journal(tmp_path, {"a": 1})
    made.append("x", row=np.arange(3))
    whole = made.path.stat().st_size
    made.append("x", row=np.arange(4))
    made.close()
    data = made.path.read_bytes()
    for end in range(whole, len(data)):
        made.path.write_bytes(data[:end])
        again = Journal(tmp_path, {"a": 1}, resume=True)
        assert [len(b["row"]) for b in again.past["x"]] == [3] and again.cut == end - whole
        again.append("y", row=np.arange(2))
        again.close()
        third = Journal(tmp_path, {"a": 1}, resume=True)
        assert [len(b["row"]) for b in third.past["x"] + third.past["y"]] == [3, 2] and third.cut == 0
        third.close()


def test_a_flipped_bit_ends_the_good_part(tmp_path):
    made = Journal(tmp_path, {"a": 1})
    for n in (3, 4, 5):
        made.append("x", row=np.arange(n))
    made.close()
    data = bytearray(made.path.read_bytes())
    records, good = scan(bytes(data))
    assert len(records) == 4 and good == len(data) and frame(records[-1]) == bytes(data[-len(frame(records[-1])) :])
    data[good - len(frame(records[3])) - 20] ^= 1  # in the block of four
    assert len(scan(bytes(data))[0]) == 2
    made.path.write_bytes(bytes(data))
    again = Journal(tmp_path, {"a": 1}, resume=True)
    assert [len(b["row"]) for b in again.past["x"]] == [3]
    again.close()


def test_an_unfinished_journal_is_not_thrown_away_and_a_finished_one_is_replaced(tmp_path):
    made = Journal(tmp_path, {"a": 1})
    made.append("x", row=np.arange(3))
    made.close()
    with pytest.raises(ValueError, match=r"holds 1 blocks of finished examples. Resume it"):
        Journal(tmp_path, {"a": 1})
    again = Journal(tmp_path, {"a": 1}, resume=True)
    again.finish()
    again.close()
    new = Journal(tmp_path, {"a": 2})
    new.close()
    assert len(scan(new.path.read_bytes())[0]) == 1
    assert journal.FILE == new.path.name and new.path.read_bytes().startswith(journal.MAGIC)


def test_a_stranger_s_file_is_left_alone(tmp_path):
    (tmp_path / journal.FILE).write_text("a diary that is longer than the first line of a journal")
    for resume in (False, True):
        with pytest.raises(ValueError, match="is not a journal"):
            Journal(tmp_path, {}, resume=resume)
    assert (tmp_path / journal.FILE).read_text().startswith("a diary")


def test_a_full_disk_is_told_and_leaves_the_earlier_blocks(tmp_path):
    made = Journal(tmp_path, {"a": 1})
    made.append("x", row=np.arange(3))

    class Full:
        def __init__(self, file, room):
            self.file, self.room = file, room

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            part = bytes(data)[: self.room]
            self.room -= len(part)
            if not part:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(part)

    real, made._file = made._file, Full(made._file, 50)
    with pytest.raises(OSError, match="No space left on device; what was written before is intact") as caught:
        made.append("x", row=np.arange(1000))
    assert caught.value.errno == errno.ENOSPC
    made._file = real
    made.append("x", row=np.arange(5))
    made.close()
    again = Journal(tmp_path, {"a": 1}, resume=True)
    assert [len(b["row"]) for b in again.past["x"]] == [3, 5] and again.cut == 0
    again.close()


def test_two_writers_are_one_too_many(tmp_path):
    made = Journal(tmp_path, {"a": 1})
    with pytest.raises(ValueError, match="another one is writing"):
        Journal(tmp_path, {"a": 1}, resume=True)
    made.close()


def test_a_digest_sees_values_shapes_and_types():
    tree = {"w": np.arange(6.0), "f": np.sin, "k": KEY}
    assert digest(tree) == digest({"w": np.arange(6.0), "f": np.cos, "k": KEY})
    others = [np.arange(6.0) + 1e-15 * (np.arange(6) == 5) * 100, np.arange(6), np.arange(6.0).reshape(2, 3)]
    assert len({digest(tree), *(digest(tree | {"w": w}) for w in others)}) == 4
    assert digest(tree) != digest(tree | {"k": jax.random.key(1)})


SETTINGS = {"attacks": (Stage("r_fgsm", (), 3), "fgsm"), "eps_curve": (0.01,), "slots": 16}


@pytest.fixture(scope="module")
def finished(kit, tmp_path_factory):
    """A journal of a whole evaluation, with many records, and what its report says."""
    p, folder = kit.linear(n=80), tmp_path_factory.mktemp("journal")
    patch = pytest.MonkeyPatch()
    patch.setattr(slots, "SECONDS", 0.0)
    report = evaluate(KEY, p.model, p.x, p.y, LINF, journal=folder, certificate=nothing, **SETTINGS)
    patch.undo()
    return p, (folder / journal.FILE).read_bytes(), told(report)


def nothing(key, model, x, y, threat, index):
    return np.asarray(index) < 7


def test_a_resumed_run_tells_the_same_wherever_it_was_stopped(finished, tmp_path):
    p, data, want = finished
    records, _ = scan(data)
    ends = np.cumsum([len(journal.MAGIC), *(len(frame(r)) for r in records)])
    assert len(records) > 20
    assert told(evaluate(KEY, p.model, p.x, p.y, LINF, certificate=nothing, **SETTINGS)) == want
    rng = np.random.default_rng(0)
    cuts = [0, 5, ends[1], ends[2], *rng.integers(ends[1], len(data), 8), ends[-2], len(data)]
    for end in cuts:
        (tmp_path / journal.FILE).write_bytes(data[:end])
        again = evaluate(KEY, p.model, p.x, p.y, LINF, certificate=nothing, journal=tmp_path, resume=True, **SETTINGS)
        assert told(again) == want
        (tmp_path / journal.FILE).unlink()


def test_what_is_on_disk_is_not_computed_again(finished, tmp_path, monkeypatch):
    p, data, want = finished
    (tmp_path / journal.FILE).write_bytes(data)
    monkeypatch.setattr(slots.Server, "_serve", None)  # nothing may be served
    again = evaluate(KEY, p.model, p.x, p.y, LINF, certificate=nothing, journal=tmp_path, resume=True, **SETTINGS)
    assert told(again) == want


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"key": jax.random.key(1)}, "key"),
        ({"scale": 2.0}, "model"),
        ({"flip": True}, "data"),
        ({"threat": threats.linf(0.03)}, "threat"),
        ({"attacks": ("fgsm",)}, "protocol"),
        ({"eps_curve": (0.015,)}, "budgets"),
        ({"slots": 17}, "slots"),
        ({"search_dtype": "bfloat16"}, "search"),
        ({"targets": "next"}, "targets"),
        ({"certificate": None}, "certificate"),
    ],
)
def test_a_journal_of_another_evaluation_is_refused_by_name(finished, tmp_path, change, word):
    p, data, _ = finished
    (tmp_path / journal.FILE).write_bytes(data)
    model = Partial(p.model.func, *(change.pop("scale", 1.0) * np.asarray(a) for a in p.model.args))
    y = 1 - p.y if change.pop("flip", False) else p.y
    settings = {"threat": LINF, "certificate": nothing, **SETTINGS} | change
    with pytest.raises(ValueError, match=rf"must be the one that was started: same .*\b{word}\b"):
        evaluate(settings.pop("key", KEY), model, p.x, y, journal=tmp_path, resume=True, **settings)
    assert (tmp_path / journal.FILE).read_bytes() == data


def closure(level):
    def certify(key, model, x, y, threat, index):
        return np.asarray(index) < level

    return certify


def test_a_certificate_is_known_by_its_name_and_settings(finished):
    named = engine._settings_of(nothing)
    assert named == ["nothing", {}] and engine._settings_of(None) is None
    assert (
        engine._settings_of(closure(7)) == ["closure.<locals>.certify", {"level": 7}] != engine._settings_of(closure(8))
    )
    assert engine._settings_of(functools.partial(nothing, scale=2)) == ["nothing", {"scale": 2}]


def test_resume_needs_a_journal(kit):
    p = kit.linear(n=20)
    with pytest.raises(ValueError, match="Pass journal=folder"):
        evaluate(KEY, p.model, p.x, p.y, LINF, resume=True)


CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
import jax, numpy as np
from jaxadv import evaluate, threats, attacks
from jaxadv.evaluate import Stage, slots
import conftest
slots.SECONDS = 0.0
p = conftest.linear(n=200)
report = evaluate(jax.random.key(0), p.model, p.x, p.y, threats.linf(0.02), journal=sys.argv[1] + "/journal",
                  attacks=(Stage("pgd", (("steps", 30),), 16),), slots=16, resume=True)
report.save(sys.argv[1])
"""


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_the_report_is_identical(tmp_path):
    def start(folder):
        cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parents[1])} | cache
        return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(HERE)], env=environment)

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert start(straight).wait() == 0
    rng, kills, sizes = np.random.default_rng(0), 0, [0]
    file = broken / "journal" / journal.FILE
    while kills < 2:
        child = start(broken)
        while child.poll() is None and (not file.exists() or file.stat().st_size <= sizes[-1]):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.3))
        if child.poll() is not None:
            break
        child.send_signal(signal.SIGKILL)
        child.wait()
        kills += 1
        sizes.append(file.stat().st_size)
    assert start(broken).wait() == 0 and kills >= 1
    trees = [json.loads((folder / "report.json").read_text()) for folder in (straight, broken)]
    for tree in trees:
        del tree["timing"]
    assert trees[0] == trees[1]
    with np.load(straight / "adversarial.npz") as one, np.load(broken / "adversarial.npz") as two:
        for name in one:
            assert one[name].tobytes() == two[name].tobytes()
