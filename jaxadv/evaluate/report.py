"""The report: what an evaluation found, as plain data with a versioned JSON form.

What lives here: the dataclasses `Report` and `ModelReport`, their JSON in and out with validation, several reports
merged into one, and the folder a report is saved in. What does not: any counting (`engine`), pages (`html`,
`markdown`).

Two runs of one seed give the same JSON but for `timing`. The JSON is strict: no NaN, no infinity. Every example has an
outcome in the columns of `examples`:

| `by` | meaning | `restart` | `size` |
| --- | --- | --- | --- |
| `-3` | certified: shown to be robust, not attacked | -1 | null |
| `-2` | misclassified without any attack, returned as it is | -1 | 0 |
| `-1` | robust against every attack tried | -1 | null |
| `j >= 0` | broken by `attacks[j]` | which restart | size of the verified perturbation |
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxadv.core import atomic_write
from jaxadv.evaluate.flags import Flag

SCHEMA = "jaxadv.report/2"
"""Name and version of the JSON form; a change that readers must know about raises the number."""

OLDER = ("jaxadv.report/1",)
"""Schemas that are still read: version 1 knew no certificates, no slots and no diagnostics."""

CERTIFIED, MISCLASSIFIED, ROBUST = -3, -2, -1
"""Values of the column `by` for examples that no attack broke."""

_COLUMNS = ("index", "label", "clean", "adversarial", "by", "restart", "size")
_FILES = ("report.json", "report.html", "report.md", "adversarial.npz")
_NUMBER = (int, float)
_ATTACK = {
    "name": str,
    "settings": dict,
    "restarts": int,
    "attacked": int,
    "broken": int,
    "claimed": int,
    "refused": int,
    "robust_accuracy_after": _NUMBER,
    "queries": int,
    "grads": int,
}
_POINT = {
    "eps": _NUMBER,
    "robust_accuracy": _NUMBER,
    "robust_interval": list,
    "certified_accuracy": (*_NUMBER, type(None)),
    "broken": int,
    "carried": int,
}
_SEARCH = {"slots": int, "devices": int, "dtype": str, "retried": int}


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """What was found about one model.

    Attributes:
      name: the model's name in tables and figures.
      n: number of examples.
      clean_accuracy: share of examples classified correctly without an attack.
      clean_interval: its 95 % Clopper-Pearson interval.
      robust_accuracy: share classified correctly at every point that any attack found, so an upper bound on the true
        one.
      robust_interval: its 95 % Clopper-Pearson interval (of sampling, not of the strength of the attacks).
      certified_accuracy: share that a certificate covers, so a lower bound on the true robust accuracy; None where
        there was no certificate.
      certified_interval: its 95 % Clopper-Pearson interval, or None.
      threat: `norm`, `eps`, `bounds`.
      attacks: one entry for each attack in the order they ran, each on the survivors of those before.
      search: how it was computed: `slots` of each of the `devices`, `dtype` that the attacks followed, and how many
        runs were `retried` in float32.
      flags: what makes the numbers doubtful; empty is good.
      curve: robust accuracy over budgets, `eps` rising; empty if none was asked for.
      examples: the columns of the outcome table, see the module.
      targeted: None, or `rule` and `success_rate` of a targeted evaluation.
      diagnostics: None, or the numbers behind the diagnosis of the evaluation itself.
      statements: sentences that a reader of the numbers must know.
      x_adv: float32 `[n, ...]` the points behind the outcomes (not part of the JSON), or None.
    """

    name: str
    n: int
    clean_accuracy: float
    clean_interval: tuple[float, float]
    robust_accuracy: float
    robust_interval: tuple[float, float]
    certified_accuracy: float | None
    certified_interval: tuple[float, float] | None
    threat: dict[str, Any]
    attacks: list[dict[str, Any]]
    search: dict[str, Any]
    flags: list[Flag]
    curve: list[dict[str, Any]]
    examples: dict[str, list]
    targeted: dict[str, Any] | None
    diagnostics: dict[str, Any] | None
    statements: list[str]
    x_adv: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the adversarial examples."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "x_adv"}
        out["clean_interval"], out["robust_interval"] = list(self.clean_interval), list(self.robust_interval)
        out["certified_interval"] = None if self.certified_interval is None else list(self.certified_interval)
        out["flags"] = [dataclasses.asdict(flag) for flag in self.flags]
        return out


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found about one or more models on the same examples.

    Attributes:
      versions: version of `jaxadv`, `jax`, `numpy`, `python`.
      device: kind of the device that computed.
      seed: the seed the caller stated, or None.
      key: words of the random key.
      data: `name`, `split`, `n`, `shape`, `classes`, `fingerprint` (a hash of examples, labels and indices).
      models: one entry for each model.
      timing: seconds; the only part in which two runs of one seed differ.
      x: float32 `[n, ...]` the examples (not part of the JSON), or None.
    """

    versions: dict[str, str]
    device: str
    seed: int | None
    key: list[int]
    data: dict[str, Any]
    models: list[ModelReport]
    timing: dict[str, Any]
    x: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form as plain dicts and lists."""
        return {
            "schema": SCHEMA,
            "versions": self.versions,
            "seed": self.seed,
            "key": self.key,
            "device": self.device,
            "data": self.data,
            "models": [m.to_dict() for m in self.models],
            "timing": self.timing,
        }

    def to_json(self) -> str:
        """Return strict JSON (no NaN), one line for each short list, ending in a newline."""
        return dumps(self.to_dict())

    def robustbench(self, **known: Any) -> list[dict[str, Any]]:
        """Return the entries of a RobustBench leaderboard, and what this report adds to them.

        Args:
          **known: fields that an evaluation cannot know: `link`, `authors`, `venue`, `architecture`,
            `additional_data`, `reported`, ... Accuracies are in percent, as text, as on the leaderboard.

        Returns:
          One entry for each model: the leaderboard's fields, then those of the report under names of their own.

        References:
          Croce et al. 2021, RobustBench: a standardized adversarial robustness benchmark, arXiv:2010.09670.
        """
        entries = []
        for model in self.models:
            robust = f"{100 * model.robust_accuracy:.2f}"
            serious = [flag.name for flag in model.flags if flag.severity == "error"]
            entry = dict.fromkeys(("link", "authors", "venue", "architecture", "reported", "external", "footnote"), "")
            entry |= {"name": model.name, "additional_data": False, "number_forward_passes": 1}
            entry |= {"dataset": self.data["name"], "eps": model.threat["eps"], "threat_model": model.threat["norm"]}
            entry |= {"clean_acc": f"{100 * model.clean_accuracy:.2f}", "autoattack_acc": robust}
            entry |= {"unreliable": bool(serious), "corruptions_acc": "", "corruptions_mce": ""} | known
            entry |= {"schema_version": SCHEMA, "n_examples": model.n, "indices_hash": self.data["fingerprint"]}
            entry |= {"ci95": [100 * v for v in model.robust_interval], "key": self.key, "seed": self.seed}
            entry |= {"dtype": model.search["dtype"], "matmul_precision": "highest", "versions": self.versions}
            names = ("name", "broken", "queries", "grads")
            seconds = {t["name"]: t["attacks"] for t in self.timing.get("models", [])}.get(model.name, [])
            per = [{n: a[n] for n in names} | {"acc": 100 * a["robust_accuracy_after"]} for a in model.attacks]
            for a, spent in zip(per, seconds):
                a["seconds"] = spent["seconds"]
            entry |= {"per_attack": per, "warnings": [flag.name for flag in model.flags]}
            if model.certified_accuracy is not None:
                entry["certified_acc"] = 100 * model.certified_accuracy
            entries.append(entry)
        return entries

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `report.json`, `report.html`, `report.md` and, where examples were kept, `adversarial.npz`.

        Each file is written beside its place and then renamed, so a reader never sees half a file.

        Args:
          folder: made if missing; files of an earlier report are replaced.

        Returns:
          The folder.
        """
        from jaxadv.evaluate import html, markdown

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = {"report.json": self.to_json(), "report.html": html.render(self), "report.md": markdown.render(self)}
        for name, content in text.items():
            atomic_write(folder / name, lambda file, content=content: file.write(content.encode()))
        if self.x is not None:
            arrays = {f"adversarial_{i}": m.x_adv for i, m in enumerate(self.models) if m.x_adv is not None}
            columns = self.models[0].examples
            arrays |= {"x": self.x, "y": np.asarray(columns["label"]), "index": np.asarray(columns["index"])}
            atomic_write(folder / _FILES[3], lambda file: np.savez(file, allow_pickle=False, **arrays))
        else:
            (folder / _FILES[3]).unlink(missing_ok=True)
        return folder


def dumps(tree: Any) -> str:
    """Write strict JSON: indented, but lists of numbers and strings on one line.

    Args:
      tree: dicts, lists, strings, numbers, booleans and None.

    Returns:
      The text, ending in a newline.

    Raises:
      ValueError: if a number is NaN or infinite.
    """

    def write(value: Any, indent: str) -> str:
        inner = indent + "  "
        if isinstance(value, Mapping) and value:
            rows = [f"{inner}{json.dumps(str(k))}: {write(v, inner)}" for k, v in value.items()]
            return "{\n" + ",\n".join(rows) + "\n" + indent + "}"
        if isinstance(value, (list, tuple)) and any(isinstance(v, (Mapping, list, tuple)) for v in value):
            return "[\n" + ",\n".join(inner + write(v, inner) for v in value) + "\n" + indent + "]"
        return json.dumps(value, allow_nan=False, ensure_ascii=False)

    return write(tree, "") + "\n"


def load(path: str | os.PathLike) -> Report:
    """Read a report from a JSON file or from the folder that `Report.save` wrote.

    Args:
      path: the file, or the folder (then stored adversarial examples are read too).

    Returns:
      The validated report.

    Raises:
      ValueError: if it is not a report of a schema that this version reads.
    """
    path = Path(path)
    folder = path if path.is_dir() else None
    report = from_json((path / "report.json" if folder else path).read_text())
    stored = folder / "adversarial.npz" if folder else None
    if stored is None or not stored.exists():
        return report
    with np.load(stored) as arrays:
        models = [
            dataclasses.replace(m, x_adv=arrays[f"adversarial_{i}"]) if f"adversarial_{i}" in arrays else m
            for i, m in enumerate(report.models)
        ]
        return dataclasses.replace(report, models=models, x=arrays["x"])


def from_json(text: str) -> Report:
    """Read a report from its JSON text.

    Args:
      text: what `Report.to_json` wrote.

    Returns:
      The validated report.

    Raises:
      ValueError: if the text is not strict JSON or not a valid report.
    """

    def refuse(word):
        raise ValueError(f"a report must be strict JSON; got the number {word}. Was it written by another program?")

    return from_dict(json.loads(text, parse_constant=refuse))


def from_dict(tree: Any) -> Report:
    """Read a report from plain dicts and lists; the inverse of `Report.to_dict`.

    Args:
      tree: the parsed JSON.

    Returns:
      The validated report.

    Raises:
      ValueError: on another schema, missing or unknown keys, wrong types, or numbers that contradict each other.
    """
    found = tree.get("schema") if isinstance(tree, dict) else None
    if found in OLDER:
        tree, found = _upgraded(tree), SCHEMA
    if found != SCHEMA:
        raise ValueError(f"a report must have schema {SCHEMA!r}; got {found!r}. Written by another version of jaxadv?")
    kinds = {"schema": str, "versions": dict, "seed": (int, type(None)), "key": list, "device": str, "data": dict}
    _fields(tree, kinds | {"models": list, "timing": dict}, "report")
    _fields(
        tree["data"],
        dict.fromkeys(("name", "split", "fingerprint"), str) | {"n": int, "shape": list, "classes": int},
        "data",
    )
    if not tree["models"]:
        raise ValueError("a report must hold at least one model; got an empty list. Was it cut short?")
    models = [_model(entry, f"models[{i}]") for i, entry in enumerate(tree["models"])]
    for model in models:
        if model.n != tree["data"]["n"]:
            raise ValueError(
                f"all models must be judged on the {tree['data']['n']} examples; {model.name!r} has {model.n}."
            )
    return Report(models=models, **{k: v for k, v in tree.items() if k not in ("schema", "models")})


def _upgraded(tree: dict[str, Any]) -> dict[str, Any]:
    """Bring a report of schema 1 to the present form: what it did not know is absent."""
    new: dict[str, Any] = {"certified_accuracy": None, "certified_interval": None, "diagnostics": None}
    search = {"slots": 0, "devices": 1, "dtype": "float32", "retried": 0}
    models = []
    for model in tree["models"] if isinstance(tree.get("models"), list) else ():
        if isinstance(model, dict):
            curve = [p | {"certified_accuracy": None} if isinstance(p, dict) else p for p in model.get("curve", [])]
            model = {**model, **new, "search": search, "curve": curve}
        models.append(model)
    return {**tree, "schema": SCHEMA, "models": models}


def _fields(tree: Any, kinds: Mapping[str, Any], where: str) -> None:
    """Refuse a dict with missing keys, unknown keys or values of a wrong type."""
    if not isinstance(tree, dict):
        raise ValueError(f"{where} must be an object; got {type(tree).__name__}. Edited by hand?")
    missing, unknown = sorted(set(kinds) - set(tree)), sorted(set(tree) - set(kinds))
    if missing or unknown:
        raise ValueError(
            f"{where} must have the keys {sorted(kinds)}; missing {missing}, unknown {unknown}. Edited by hand?"
        )
    for name, kind in kinds.items():
        value = tree[name]
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, _NUMBER))
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{where}.{name} must be {_word(kind)}; got {value!r:.60}. Edited by hand?")


def _word(kind: Any) -> str:
    return " or ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__


def _share(value: Any, interval: Any, where: str) -> tuple[float, float]:
    """Check an accuracy with its interval and return the interval."""
    good = isinstance(interval, list) and len(interval) == 2 and all(isinstance(v, _NUMBER) for v in interval)
    if not good or not 0 <= interval[0] <= value <= interval[1] <= 1:
        raise ValueError(
            f"{where} must satisfy 0 <= low <= accuracy <= high <= 1; got {value} in {interval}. Edited by hand?"
        )
    return float(interval[0]), float(interval[1])


def _model(tree: Any, where: str) -> ModelReport:
    kinds: dict[str, Any] = {"name": str, "n": int, "threat": dict, "examples": dict, "targeted": (dict, type(None))}
    kinds |= {"certified_accuracy": (*_NUMBER, type(None)), "certified_interval": (list, type(None)), "search": dict}
    kinds |= dict.fromkeys(("clean_accuracy", "robust_accuracy"), _NUMBER) | {"diagnostics": (dict, type(None))}
    kinds |= dict.fromkeys(("clean_interval", "robust_interval", "attacks", "flags", "curve", "statements"), list)
    _fields(tree, kinds, where)
    clean = _share(tree["clean_accuracy"], tree["clean_interval"], f"{where}.clean_accuracy")
    robust = _share(tree["robust_accuracy"], tree["robust_interval"], f"{where}.robust_accuracy")
    certified = None
    if tree["certified_accuracy"] is not None:
        certified = _share(tree["certified_accuracy"], tree["certified_interval"], f"{where}.certified_accuracy")
    _fields(tree["search"], _SEARCH, f"{where}.search")
    _fields(tree["threat"], {"norm": str, "eps": (*_NUMBER, list), "bounds": list}, f"{where}.threat")
    for i, entry in enumerate(tree["attacks"]):
        _fields(entry, _ATTACK, f"{where}.attacks[{i}]")
    for i, entry in enumerate(tree["curve"]):
        _fields(entry, _POINT, f"{where}.curve[{i}]")
        _share(entry["robust_accuracy"], entry["robust_interval"], f"{where}.curve[{i}]")
    _outcomes(tree, where)
    flags = [Flag.from_dict(flag) for flag in tree["flags"]]
    ends = {"clean_interval": clean, "robust_interval": robust, "certified_interval": certified}
    return ModelReport(**{**tree, **ends, "flags": flags})


def _outcomes(tree: Mapping[str, Any], where: str) -> None:
    """Check that the outcomes of the examples add up to the numbers."""
    columns, n = tree["examples"], tree["n"]
    _fields(columns, dict.fromkeys(_COLUMNS, list), f"{where}.examples")
    if any(len(columns[c]) != n for c in _COLUMNS):
        raise ValueError(f"{where}.examples must have {n} rows; got {[len(columns[c]) for c in _COLUMNS]}. Cut short?")
    by = columns["by"]
    certified = by.count(CERTIFIED) / n
    clean, robust = (sum(b != MISCLASSIFIED for b in by) / n, (by.count(ROBUST) + by.count(CERTIFIED)) / n)
    stated = (tree["clean_accuracy"], tree["robust_accuracy"], tree["certified_accuracy"] or 0.0)
    if (clean, robust, certified) != stated:
        raise ValueError(
            f"{where}: the outcomes must add up to the accuracies; they give {clean} clean, {robust} robust and "
            f"{certified} certified, stated are {stated[0]}, {stated[1]} and {stated[2]}. Edited by hand?"
        )
    if any(not (isinstance(b, int) and CERTIFIED <= b < len(tree["attacks"])) for b in by):
        raise ValueError(
            f"{where}.examples.by must name an attack, or be -1, -2 or -3; got {sorted(set(by))}. Edited by hand?"
        )


def merge(*reports: Report) -> Report:
    """Put the models of several reports on one page.

    Args:
      *reports: reports about the same examples, made with the same key and the same versions.

    Returns:
      One report with all their models, in order.

    Raises:
      ValueError: if nothing is given, two models share a name, or the reports differ in examples, key, versions or
      device.
    """
    if not reports:
        raise ValueError("merge needs at least one report; got none. Pass the reports one by one: merge(*reports).")
    first = reports[0]
    for part in ("data", "seed", "key", "versions", "device"):
        other = next((r for r in reports if getattr(r, part) != getattr(first, part)), None)
        if other is not None:
            raise ValueError(
                f"merged reports must have the same {part}; got {getattr(first, part)} and {getattr(other, part)}. "
                "Evaluate all models on the same examples with the same key in one session."
            )
    models = [m for r in reports for m in r.models]
    names = [m.name for m in models]
    if len(set(names)) < len(names):
        raise ValueError(f"models must have different names; got {names}. Pass name=... to evaluate.")
    timing = {"models": [entry for r in reports for entry in r.timing.get("models", [])]}
    x = next((r.x for r in reports if r.x is not None), None)
    return dataclasses.replace(first, models=models, timing=timing, x=x)
