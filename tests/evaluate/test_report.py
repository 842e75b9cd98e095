import copy
import dataclasses
import json

import numpy as np
import pytest

from jaxadv import evaluate
from jaxadv.evaluate import html, report


def test_the_json_round_trip_is_the_identity(pictures):
    text = pictures.to_json()
    back = report.from_json(text)
    assert back == pictures and back.to_json() == text
    assert json.loads(text) == pictures.to_dict()
    assert isinstance(back, evaluate.Report) and isinstance(back.models[0], evaluate.ModelReport)


def test_the_json_has_the_promised_keys(pictures):
    tree = json.loads(pictures.to_json())
    assert tree["schema"] == evaluate.SCHEMA == "jaxadv.report/2"
    assert {"schema", "versions", "seed", "data", "models", "timing"} <= set(tree)
    promised = "name n clean_accuracy clean_interval robust_accuracy robust_interval threat attacks flags"
    assert set(promised.split()) <= set(tree["models"][0])
    assert set(tree["versions"]) == {"jaxadv", "jax", "numpy", "python"}
    assert {"name", "n", "split", "fingerprint"} <= set(tree["data"])
    assert {"norm", "eps", "bounds"} == set(tree["models"][0]["threat"])
    assert {"name", "settings", "restarts", "broken", "robust_accuracy_after", "queries", "grads"} <= set(
        tree["models"][0]["attacks"][0]
    )


def spoil(tree, path, value):
    tree = copy.deepcopy(tree)
    at = tree
    for step in path[:-1]:
        at = at[step]
    if value is KeyError:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("schema",), "jaxadv.report/3", "schema"),
        (("schema",), KeyError, "schema"),
        (("seed",), KeyError, "missing \\['seed'\\]"),
        (("extra",), 1, "unknown \\['extra'\\]"),
        (("models",), [], "at least one model"),
        (("data", "n"), 31, "31 examples"),
        (("data", "name"), 3, "data.name must be str"),
        (("models", 0, "n"), True, "n must be int"),
        (("models", 0, "robust_accuracy"), 0.123, "models\\[0\\]"),
        (("models", 0, "robust_accuracy"), float("inf"), "robust_accuracy"),
        (("models", 0, "clean_interval"), [0.9, 0.2], "low <= accuracy"),
        (("models", 0, "examples", "by", 0), 7, "models\\[0\\]"),
        (("models", 1, "examples", "size"), [], "30 rows"),
        (("models", 0, "attacks", 0, "broken"), "3", "broken must be int"),
        (("models", 0, "curve", 0, "robust_interval"), [0.0], "curve\\[0\\]"),
        (("models", 0, "flags"), [{"name": "x"}], "a flag must"),
    ],
)
def test_a_spoiled_report_is_refused(pictures, path, value, words):
    with pytest.raises(ValueError, match=words):
        report.from_dict(spoil(pictures.to_dict(), path, value))


def test_numbers_must_be_finite(pictures):
    with pytest.raises(ValueError, match="strict JSON"):
        report.from_json(pictures.to_json().replace('"seed": 0', '"seed": NaN'))
    with pytest.raises(ValueError):
        report.dumps({"a": float("nan")})
    with pytest.raises(ValueError, match="schema"):
        report.from_json("[1]")


def test_dumps_is_json_for_any_tree():
    tree = {"a": [], "b": {}, "c": [1, 2.5, None, True, "x"], "d": [[1], {"e": 'ü\n"'}], "f": {"g": [{}]}}
    assert json.loads(report.dumps(tree)) == tree


def test_a_saved_report_loads_with_its_examples(pictures, tmp_path):
    folder = pictures.save(tmp_path / "deep" / "er")
    assert sorted(p.name for p in folder.iterdir()) == ["adversarial.npz", "report.html", "report.json", "report.md"]
    back = evaluate.load(folder)
    assert back == pictures and evaluate.load(folder / "report.json") == pictures
    np.testing.assert_array_equal(back.x, pictures.x)
    for one, two in zip(back.models, pictures.models):
        np.testing.assert_array_equal(one.x_adv, two.x_adv)
    assert html.render(back) == (folder / "report.html").read_text()
    with np.load(folder / "adversarial.npz") as arrays:
        np.testing.assert_array_equal(arrays["y"], pictures.models[0].examples["label"])
        np.testing.assert_array_equal(arrays["index"], np.arange(30))


def test_without_examples_no_stale_ones_stay(pictures, tmp_path):
    pictures.save(tmp_path)
    bare = dataclasses.replace(pictures, x=None, models=[dataclasses.replace(m, x_adv=None) for m in pictures.models])
    bare.save(tmp_path)
    assert not (tmp_path / "adversarial.npz").exists() and evaluate.load(tmp_path).x is None


def test_merge_keeps_order_and_refuses_what_does_not_belong_together(pictures):
    one, two = (dataclasses.replace(pictures, models=[m]) for m in pictures.models)
    assert [m.name for m in evaluate.merge(two, one).models] == ["twin", "plain"]
    assert [t["name"] for t in pictures.timing["models"]] == ["plain", "twin"]
    with pytest.raises(ValueError, match="different names"):
        evaluate.merge(one, one)
    with pytest.raises(ValueError, match="same data"):
        evaluate.merge(one, dataclasses.replace(two, data=two.data | {"fingerprint": "0"}))
    with pytest.raises(ValueError, match="same seed"):
        evaluate.merge(one, dataclasses.replace(two, seed=1))
    with pytest.raises(ValueError, match="at least one"):
        evaluate.merge()


def test_the_outcomes_add_up(pictures):
    for model in pictures.models:
        by = model.examples["by"]
        carried = next(c["carried"] for c in model.curve if c["eps"] == model.threat["eps"])
        assert sum(a["broken"] for a in model.attacks) + carried == sum(b >= 0 for b in by) > 0
        assert by.count(report.ROBUST) / 30 == model.robust_accuracy
        assert by.count(report.MISCLASSIFIED) / 30 == pytest.approx(1 - model.clean_accuracy)
        assert model.attacks[-1]["robust_accuracy_after"] == model.robust_accuracy


def test_reports_of_the_first_schema_are_still_read(pictures):
    tree = copy.deepcopy(pictures.to_dict())
    for model in tree["models"]:
        for name in ("certified_accuracy", "certified_interval", "search", "diagnostics"):
            del model[name]
        for point in model["curve"]:
            del point["certified_accuracy"]
    tree["schema"] = "jaxadv.report/1"
    assert report.OLDER == (tree["schema"],)
    back = report.from_json(report.dumps(tree))
    assert back.models[0].examples == pictures.models[0].examples and back.to_dict()["schema"] == evaluate.SCHEMA
    assert back.models[0].certified_accuracy is None and back.models[0].search["slots"] == 0
    assert html.render(back) and report.from_json(back.to_json()) == back
    with pytest.raises(ValueError, match="report must have"):
        report.from_dict({"schema": "jaxadv.report/1", "models": 3})


def test_the_entries_of_a_leaderboard(pictures):
    entries = pictures.robustbench(authors="A and B", additional_data=True)
    assert [e["name"] for e in entries] == ["plain", "twin"]
    fields = "link name authors additional_data number_forward_passes dataset venue architecture eps clean_acc reported"
    fields += " autoattack_acc external footnote unreliable corruptions_acc corruptions_mce"
    for entry, model in zip(entries, pictures.models):
        assert set(fields.split()) < set(entry) and json.loads(json.dumps(entry, allow_nan=False)) == entry
        assert entry["clean_acc"] == f"{100 * model.clean_accuracy:.2f}" and entry["authors"] == "A and B"
        assert entry["autoattack_acc"] == f"{100 * model.robust_accuracy:.2f}" and entry["additional_data"] is True
        assert [a["name"] for a in entry["per_attack"]] == [a["name"] for a in model.attacks]
        assert all(a["seconds"] >= 0 for a in entry["per_attack"])
        assert entry["ci95"] == [100 * v for v in model.robust_interval]
        assert entry["unreliable"] is any(f.severity == "error" for f in model.flags)
