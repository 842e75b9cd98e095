"""The claims framework: what a claim must have, intervals, storage, tables that agree with results, the command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.claims import framework
from jaxadv.cli import claims

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = {"robust %": [90.0, 91.0, 92.0], "clean %": [98.0, 98.5, 99.5]}


def record(**changes):
    """A record as `measure` makes it, without an experiment."""
    intervals = {key: list(framework.interval(values)) for key, values in NUMBERS.items()}
    claim = framework.load("fast_at").CLAIM
    return {
        "schema": framework.SCHEMA,
        "name": "fast_at",
        "sentence": claim["sentence"],
        "source": claim["source"],
        "tier": "mnist",
        "settings": {"eps": 0.3},
        "seeds": [0, 1, 2],
        "numbers": NUMBERS,
        "intervals": intervals,
        "verdict": "holds in part",
        "why": "91.0 % robust",
        "versions": {"jax": "0"},
        "device": "cpu, 2 cores",
        "minutes": 1.25,
        "smoke": False,
    } | changes


@pytest.mark.parametrize("name", framework.names())
def test_each_claim_has_what_a_claim_must_have(name):
    claim = framework.load(name).CLAIM
    assert claim["minutes"] <= framework.TIERS[claim["tier"]] and len(set(claim["seeds"])) >= 3
    assert "arXiv" in claim["source"] or "doi" in claim["source"]


def test_the_first_claims_are_there_and_an_unknown_one_is_refused():
    assert {"autoattack", "fast_at", "pgd_training"} <= set(framework.names())
    with pytest.raises(ValueError, match="unknown claim 'fast_a'.*fast_at"):
        framework.load("fast_a")


def test_a_claim_without_its_parts_is_refused(monkeypatch):
    module = framework.load("fast_at")
    monkeypatch.setitem(module.CLAIM, "seeds", (0, 1))
    with pytest.raises(ValueError, match="at least three seeds"):
        framework.load("fast_at")
    monkeypatch.setitem(module.CLAIM, "seeds", [0, 1, 2])
    with pytest.raises(ValueError, match=r"wrong: \['seeds \(tuple\)'\]"):
        framework.load("fast_at")


def test_the_interval_is_students_t():
    values = [1.0, 2.0, 4.0]
    mean, low, high = framework.interval(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([mean, low, high], [np.mean(values), expected.low, expected.high])
    assert framework.interval([3.0]) == (3.0, 3.0, 3.0)


def test_arms_that_a_smoke_run_left_out_report_what_its_own_did():
    numbers = {"b: clean %": [1.0], "other %": [3.0]}
    assert framework.filled(numbers, ("a", "b")) == numbers | {"a: clean %": [1.0]}
    assert framework.filled(numbers | {"a: clean %": [2.0]}, ("a", "b"))["a: clean %"] == [2.0]


def test_measure_puts_together_what_the_claim_returned(monkeypatch):
    module = framework.load("fast_at")
    asked = {}

    def run(settings, seeds, smoke):
        asked.update(settings=settings, seeds=seeds, smoke=smoke)
        return {"robust %": [90.0 + s for s in seeds]}

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "verdict", lambda numbers: ("holds", f"{np.mean(numbers['robust %']):.0f} %"))
    found = framework.measure("fast_at", settings={"eps": 0.1})
    assert asked["settings"] == module.CLAIM["settings"] | {"eps": 0.1} and not asked["smoke"]
    assert found["numbers"] == {"robust %": [90.0, 91.0, 92.0]} and found["why"] == "91 %"
    assert found["versions"]["jaxadv"] and found["seeds"] == [0, 1, 2]
    framework.measure("fast_at", smoke=True)
    assert asked["smoke"] and asked["seeds"] == (0,) and asked["settings"]["data"] == "digits"
    with pytest.raises(ValueError, match="unknown setting of claim fast_at 'epsilon'"):
        framework.measure("fast_at", settings={"epsilon": 1})
    for bad in ({"a": [1.0]}, {"a": [1.0, 2.0, float("nan")]}):
        monkeypatch.setattr(module, "run", lambda *_, bad=bad: bad)
        with pytest.raises(ValueError, match=r"one finite number for each of the seeds.*\['a'\]"):
            framework.measure("fast_at")
    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "verdict", lambda _: ("proven", ""))
    with pytest.raises(ValueError, match="unknown verdict 'proven'"):
        framework.measure("fast_at")


def test_a_record_survives_storage_and_smoke_is_never_stored(tmp_path):
    path = framework.store(record(), tmp_path)
    assert path.name == "fast_at.json" and framework.stored(tmp_path) == [record()]
    assert [p.name for p in tmp_path.iterdir()] == ["fast_at.json"]
    with pytest.raises(ValueError, match="only full runs"):
        framework.store(record(smoke=True), tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        framework.store(record(minutes=float("nan")), tmp_path)
    assert framework.stored(tmp_path) == [record()]


def test_the_table_shows_every_number_and_says_what_was_not_measured(tmp_path):
    assert "not measured yet" in framework.table(tmp_path)
    framework.store(record(), tmp_path)
    text = framework.table(tmp_path)
    assert "**holds in part**: 91.0 % robust" in text
    assert "| robust % | 91 | 88.52 to 93.48 | 90, 91, 92 |" in text
    assert "| `pgd_training` |" in text and "not measured yet" in text
    short = framework.summary(tmp_path)
    assert "| `fast_at` |" in short and "| `pgd_training` |" not in short and "not measured yet: `a3t`" in short


def test_the_marked_part_is_replaced_and_nothing_else():
    text = f"above\n{framework.BEGIN}\nold\n{framework.END}\nbelow\n"
    assert framework.between_marks(text, r"new \1") == f"above\n{framework.BEGIN}\nnew \\1\n{framework.END}\nbelow\n"
    with pytest.raises(ValueError, match="must have the marks"):
        framework.between_marks("no marks", "new")


def test_the_written_tables_agree_with_the_stored_results():
    assert framework.TABLE.read_text(encoding="utf-8") == framework.table(), "run: jaxadv claims table"
    readme = framework.README.read_text(encoding="utf-8")
    assert readme == framework.between_marks(readme, framework.summary()), "run: jaxadv claims table"


@pytest.mark.parametrize("stored", framework.stored() or [None], ids=lambda r: r["name"] if r else "none stored")
def test_a_stored_verdict_follows_from_its_numbers(stored):
    if stored is None:
        return
    claim = framework.load(stored["name"])
    assert stored["schema"] == framework.SCHEMA and not stored["smoke"]
    assert (stored["verdict"], stored["why"]) == claim.verdict(stored["numbers"])
    assert stored["intervals"] == {key: list(framework.interval(v)) for key, v in stored["numbers"].items()}
    assert stored["settings"] == json.loads(json.dumps(claim.CLAIM["settings"]))
    assert stored["seeds"] == list(claim.CLAIM["seeds"])


FAST = {
    "recipe: robust %": [89.0, 88.0, 90.0],
    "as published: robust %": [89.0, 88.0, 90.0],
    "standard training: robust %": [0.0, 1.0, 0.0],
    "random start: robust %": [80.0, 81.0, 82.0],
    "PGD: robust %": [83.0, 82.0, 81.0],
    "no random start: robust %": [5.0, 1.0, 0.0],
    "random start: processor minutes": [1.0, 1.0, 1.0],
    "PGD: processor minutes": [5.0, 5.0, 5.0],
}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "holds"),
        ({"no random start: robust %": [79.0, 80.0, 81.0]}, "holds in part"),
        ({"PGD: robust %": [90.0, 90.0, 90.0]}, "does not hold here"),
        ({"PGD: processor minutes": [2.0, 2.0, 2.0]}, "does not hold here"),
        ({"as published: robust %": [89.0, 88.0, 20.0]}, "does not hold here"),
    ],
)
def test_the_verdict_on_fast_training_can_go_either_way(changes, word):
    found, why = framework.load("fast_at").verdict(FAST | changes)
    assert found == word and " %" in why


def test_the_verdict_on_pgd_training_can_go_either_way():
    judge = framework.load("pgd_training").verdict
    numbers = {
        "full: clean %": [98.0],
        "full: the attack trained on, robust %": [90.0],
        "full: FGSM, robust %": [95.0],
        "full: transfer, robust %": [97.0],
        "standard training: PGD on the margin, robust %": [0.0],
        "narrow: PGD on the margin, robust %": [20.0],
        "medium: PGD on the margin, robust %": [60.0],
        "full: PGD on the margin, robust %": [88.0],
    }
    word, why = judge(numbers)
    assert word == "holds" and "88.0 % under the worst of 3 others (PGD on the margin)" in why
    assert judge(numbers | {"full: FGSM, robust %": [60.0]})[0] == "holds in part"
    assert judge(numbers | {"narrow: PGD on the margin, robust %": [87.0]})[0] == "holds in part"
    broken = numbers | {"full: PGD on the margin, robust %": [10.0]}
    assert judge(broken)[0] == "does not hold here"


def test_doors_of_the_command_line(tmp_path, monkeypatch):
    rows = claims.claims_list(ROOT)
    assert [row["name"] for row in rows] == framework.names() and all(row["sentence"] for row in rows)
    monkeypatch.setattr(framework, "measure", lambda *a, **k: record(smoke=k["smoke"]))
    monkeypatch.setattr(framework, "store", lambda found: tmp_path / f"{found['name']}.json")
    assert claims.claims_run(ROOT, "fast_at", smoke=True)["path"] is None
    assert claims.claims_run(ROOT, "fast_at", settings={"eps": 0.1})["path"] is None
    assert claims.claims_run(ROOT, "fast_at")["path"].endswith("fast_at.json")
    monkeypatch.setattr(framework, "TABLE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(framework, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(f"{framework.BEGIN}{framework.END}\n")
    assert [Path(p).name for p in claims.claims_table(ROOT)] == ["RESULTS.md", "README.md"]
    assert "| `fast_at` |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "door",
    [
        claims.claims_list,
        claims.claims_table,
        claims.bench_list,
        lambda root: claims.claims_run(root, "fast_at"),
        lambda root: claims.bench_run(root, "speed/attacks"),
    ],
)
def test_without_a_source_checkout_every_door_says_so(door, tmp_path):
    with pytest.raises(claims.NeedsCheckout, match="needs a source checkout.*--root"):
        door(tmp_path)


def test_benchmarks_are_listed_and_run(tmp_path):
    (tmp_path / "benchmarks" / "claims").mkdir(parents=True)
    (tmp_path / "benchmarks" / "claims" / "framework.py").touch()
    for kind in claims.KINDS:
        (tmp_path / "benchmarks" / kind).mkdir()
        script = f'"""Measure {kind}."""\nimport sys\nsys.exit(int(sys.argv[1]))\n'
        (tmp_path / "benchmarks" / kind / "toy.py").write_text(script)
    assert claims.bench_list(tmp_path) == [
        {"name": "parity/toy", "purpose": "Measure parity."},
        {"name": "speed/toy", "purpose": "Measure speed."},
    ]
    assert claims.bench_run(tmp_path, "speed/toy", ["7"]) == 7
    with pytest.raises(ValueError, match="unknown benchmark 'speed/toi'.*speed/toy"):
        claims.bench_run(tmp_path, "speed/toi")


def shares():
    """Claims by the process that they share, because each begins, imports and compiles: kin, and the rest in two."""
    kin, rest = {"odenet": ["odenet"], "arms": []}, [[], []]
    for number, name in enumerate(name for name in framework.names() if name != "odenet"):
        relative = next((word for word in kin if hasattr(framework.load(name), word)), None)
        (rest[number % 2] if relative is None else kin[relative]).append(name)
    return [*kin.values(), *rest]


STEP = """
import functools, sys
from jax._src.interpreters import mlir
mlir.make_ir_context = functools.cache(mlir.make_ir_context)  # as in conftest.py
from jaxadv.cli import claims
for name in sys.argv[1:]:
    print(name, "...", claims.claims_run(".", name, smoke=True)["verdict"], flush=True)
"""


@pytest.mark.slow
@pytest.mark.claims
@pytest.mark.parametrize("names", shares(), ids="+".join)
def test_each_claim_takes_one_step(names):
    done = subprocess.run([sys.executable, "-c", STEP, *names], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
