"""Claims: a paper's sentence, an experiment that could refute it, and the verdict as measured.

A claim is a file beside this one. It defines

- `CLAIM`, a plain dict: `sentence` (the paper's claim), `source`, `tier` (one of `TIERS`), `seeds` (at least three),
  `minutes` (its budget), `settings` (what the experiment depends on) and `smoke` (the settings of a run of one step);
- `run(settings, seeds, smoke) -> {measure: [one number for each seed]}`;
- `verdict(numbers) -> (one of VERDICTS, why)`, a pure function of what `run` returned.

What lives here: finding, running and storing claims, intervals over seeds, and the tables, which are made of stored
results and never typed. What does not: any experiment. Results are `results/NAME.json`; `RESULTS.md` and the marked
part of the README are generated from them, and a test checks that they agree.
"""

import importlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

import jaxadv as ja

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results"
TABLE = HERE / "RESULTS.md"
README = ROOT / "README.md"
SCHEMA = "jaxadv.claim/1"
TIERS = {"digits": 3, "mnist": 20, "cifar": 8}
"""Tier to the most minutes that all seeds and baselines of a claim may take (two cores; `cifar`: one accelerator)."""
VERDICTS = ("holds", "holds in part", "does not hold here")
FIELDS = {"sentence": str, "source": str, "tier": str, "seeds": tuple, "minutes": int, "settings": dict, "smoke": dict}
BEGIN, END = "<!-- claims: begin (generated) -->", "<!-- claims: end -->"


def names() -> list[str]:
    """Return the names of all claims: the files beside this one and `arms.py`, which claims share."""
    return sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("framework", "arms"))


def load(name: str) -> Any:
    """Import a claim and check that it has the three parts that a claim must have.

    Args:
      name: the file's name without `.py`.

    Returns:
      The module.

    Raises:
      ValueError: if there is no such claim, or a part is missing or of another form.
    """
    ja.core.check.choice("claim", name, names())
    module = importlib.import_module(f"benchmarks.claims.{name}")
    claim = getattr(module, "CLAIM", {})
    wrong = [f"{field} ({kind.__name__})" for field, kind in FIELDS.items() if not isinstance(claim.get(field), kind)]
    wrong += [part for part in ("run", "verdict") if not callable(getattr(module, part, None))]
    if wrong or set(claim) != set(FIELDS):
        raise ValueError(f"claim {name!r} must define CLAIM with {', '.join(FIELDS)}, run and verdict; wrong: {wrong}.")
    ja.core.check.choice("tier", claim["tier"], TIERS)
    if len(claim["seeds"]) < 3 or not set(claim["smoke"]) <= set(claim["settings"]):
        raise ValueError(f"claim {name!r} must have at least three seeds, and its smoke settings must be settings.")
    return module


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean over seeds and its 95 % interval by Student's t.

    Args:
      values: one number for each seed.

    Returns:
      Mean, lower and upper end; both ends are the mean where there is one seed only.
    """
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return float(x.mean()), float(x.mean()), float(x.mean())
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


def gain(numbers: dict[str, list[float]], better: str, base: str) -> tuple[float, float, float]:
    """Return by how much one measure exceeds another, seed by seed.

    Args:
      numbers: measure to one number for each seed.
      better: name of the measure that should be larger.
      base: name of the other.

    Returns:
      Mean of the differences, and the ends of their 95 % interval.
    """
    return interval(np.subtract(numbers[better], numbers[base]).tolist())


def filled(numbers: dict[str, list[float]], arms: Iterable[str]) -> dict[str, list[float]]:
    """Give arms that a smoke run left out, because their programs are alike, the numbers of one that it took.

    Args:
        numbers: `ARM: MEASURE` to one number for each seed.
        arms: Every arm of the claim.

    Returns:
        The numbers, with all arms.
    """
    some = next(arm for arm in arms if any(key.startswith(f"{arm}: ") for key in numbers))
    alike = {key[len(some) :]: values for key, values in numbers.items() if key.startswith(f"{some}: ")}
    return {f"{arm}{what}": list(values) for arm in arms for what, values in alike.items()} | numbers


def measure(
    name: str, *, settings: dict[str, Any] | None = None, seeds: Sequence[int] | None = None, smoke: bool = False
) -> dict[str, Any]:
    """Run a claim and return its record, ready to be stored.

    Args:
      name: of the claim.
      settings: changes to the claim's settings; only names that it has.
      seeds: other seeds than the claim's.
      smoke: one step of everything with one seed, to see that the file still runs; such a record is never stored.

    Returns:
      The record: claim, settings, seeds, numbers, intervals, verdict, versions, device and minutes.

    Raises:
      ValueError: on unknown settings or measures that do not have one finite number for each seed.
    """
    module = load(name)
    claim = module.CLAIM
    for setting in settings or {}:
        ja.core.check.choice(f"setting of claim {name}", setting, claim["settings"])
    used = claim["settings"] | (claim["smoke"] if smoke else {}) | (settings or {})
    seeds = tuple(seeds or claim["seeds"])[: 1 if smoke else None]
    start = time.perf_counter()
    numbers = {key: [float(v) for v in values] for key, values in module.run(dict(used), seeds, smoke).items()}
    minutes = (time.perf_counter() - start) / 60
    wrong = [key for key, values in numbers.items() if len(values) != len(seeds) or not np.all(np.isfinite(values))]
    if wrong:
        raise ValueError(f"each measure must have one finite number for each of the seeds {seeds}; wrong: {wrong}.")
    word, why = module.verdict(numbers)
    ja.core.check.choice("verdict", word, VERDICTS)
    return {
        "schema": SCHEMA,
        "name": name,
        "sentence": claim["sentence"],
        "source": claim["source"],
        "tier": claim["tier"],
        "settings": used,
        "seeds": list(seeds),
        "numbers": numbers,
        "intervals": {key: list(interval(values)) for key, values in numbers.items()},
        "verdict": word,
        "why": why,
        "versions": {
            "jaxadv": ja.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "minutes": round(minutes, 2),
        "smoke": smoke,
    }


def store(record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a record to `folder/NAME.json`, whole or not at all.

    Args:
      record: of `measure`.
      folder: where results are kept.

    Returns:
      The file.

    Raises:
      ValueError: if the record is of a smoke run.
    """
    if record["smoke"]:
        raise ValueError(f"only full runs are stored; got a smoke run of {record['name']!r}. Run it without --smoke.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['name']}.json"
    beside = path.with_suffix(".json.partial")
    beside.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)
    return path


def stored(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return all stored records, by name.

    Args:
      folder: where results are kept.

    Returns:
      The records.
    """
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _section(record: dict[str, Any]) -> list[str]:
    settings = ", ".join(f"{k} {v}" for k, v in record["settings"].items())
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    lines = [
        f"## {record['name']}",
        "",
        f"{record['sentence']} ({record['source']})",
        "",
        f"**{record['verdict']}**: {record['why']}",
        "",
        "| measure | mean | 95 % interval over seeds | each seed |",
        "|---|---|---|---|",
    ]
    for key, values in record["numbers"].items():
        mean, low, high = record["intervals"][key]
        if key.endswith("%"):  # Student's t knows nothing of the ends of a share
            low, high = max(low, 0.0), min(high, 100.0)
        each = ", ".join(_number(v) for v in values)
        lines.append(f"| {key} | {_number(mean)} | {_number(low)} to {_number(high)} | {each} |")
    lines += [
        "",
        f"Tier {record['tier']}; seeds {', '.join(map(str, record['seeds']))}; {settings}.",
        f"Measured in {record['minutes']:.1f} minutes on {record['device']}; {versions}.",
        "",
    ]
    return lines


def table(folder: Path = RESULTS) -> str:
    """Return the text of `RESULTS.md`.

    Args:
      folder: where results are kept.

    Returns:
      Markdown: the short table, then a section for each stored claim.
    """
    records = stored(folder)
    lines = [
        "# Claims, as measured",
        "",
        "Generated by `jaxadv claims table` from `results/*.json`; not to be edited. A verdict is what this",
        "experiment found, with this budget and on this data; the experiment of a claim is the file of its name.",
        "",
        summary(folder, short=False),
        "",
    ]
    for record in records:
        lines += _section(record)
    return "\n".join(lines).rstrip("\n") + "\n"


def summary(folder: Path = RESULTS, *, short: bool = True) -> str:
    """Return the table of claims with their verdicts.

    Args:
      folder: where results are kept.
      short: name those that were not measured yet in a line below, as the front page does, not in rows.

    Returns:
      Markdown.
    """
    by_name = {r["name"]: r for r in stored(folder)}
    lines = ["| claim | what the paper says | as measured here |", "|---|---|---|"]
    left = [name for name in names() if name not in by_name]
    for name in sorted({*by_name, *([] if short else left)}):
        record = by_name.get(name)
        said = record["sentence"] if record else load(name).CLAIM["sentence"]
        found = f"**{record['verdict']}**: {record['why']}" if record else "not measured yet"
        lines.append(f"| `{name}` | {said} | {found} |")
    if short and left:
        lines += ["", f"Written, and not measured yet: {', '.join(f'`{name}`' for name in left)}."]
    return "\n".join(lines)


def between_marks(text: str, part: str) -> str:
    """Replace what stands between the marks of the generated part.

    Args:
      text: with both marks, once.
      part: what is to stand there.

    Returns:
      The new text.

    Raises:
      ValueError: if the marks are not there exactly once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the README must have the marks {BEGIN!r} and {END!r}, each once.")
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{part}\n{END}", text, flags=re.DOTALL)


def write_tables() -> list[Path]:
    """Write `RESULTS.md` and the marked part of the README from the stored results.

    Returns:
      The files.
    """
    TABLE.write_text(table(), encoding="utf-8")
    README.write_text(between_marks(README.read_text(encoding="utf-8"), summary()), encoding="utf-8")
    return [TABLE, README]


class Trained(NamedTuple):
    """A model, what training cost with compilation (minutes on the clock and of the processors), and the network."""

    model: Any
    minutes: float
    processor_minutes: float
    net: Any


def train(recipe: Callable, data: Any, seed: int, **settings: Any) -> Trained:
    """Train by a recipe without its validation: the last weights are judged, and minutes count training only.

    Args:
      recipe: a function of the data that returns the arguments of `train.fit`.
      data: the training source.
      seed: of everything random, the first weights too.
      **settings: of the recipe, or arguments of `train.fit` that it lets be overridden.

    Returns:
      The model to evaluate, and what training cost.
    """
    arguments = recipe(data, seed=seed, **settings) | {"attack": None, "validation": None, "collapse": None}
    start, used = time.perf_counter(), time.process_time()
    state = ja.fit(jax.random.key(seed), **arguments)
    jax.block_until_ready(state.params)
    spent, used = (time.perf_counter() - start) / 60, (time.process_time() - used) / 60
    net = ja.train.trained(arguments["trainable"], state)
    return Trained(ja.models.model(net), spent, used, net)


def judged(model: Any, source: Any, threat: Any, attack: Any, seed: int, *, restarts: int | None = None) -> Any:
    """Return what an evaluation found, with an outcome for each example.

    Args:
      model: logits from a batch.
      source: the test examples.
      threat: what the attacker may do.
      attack: what judges: an attack, several in a tuple, or the name of a protocol.
      seed: of the attack's randomness.
      restarts: how often each runs, on the survivors; None leaves it to the protocol (once for bare attacks).

    Returns:
      The `evaluate.ModelReport`.
    """
    x, y = source.all()
    report = ja.evaluate(
        jax.random.key(seed),
        model,
        x,
        y,
        threat,
        attacks=attack if isinstance(attack, str | tuple) else (attack,),
        restarts=restarts,
        index=source.index,
        keep_adversarial=False,
    )
    return report.models[0]


def accuracies(
    model: Any, source: Any, threat: Any, attack: Any, seed: int, *, restarts: int | None = None
) -> tuple[float, float]:
    """Return clean and robust accuracy in percent, as an evaluation counts them.

    Args:
      model: logits from a batch.
      source: the test examples.
      threat: what the attacker may do.
      attack: see `judged`.
      seed: of the attack's randomness.
      restarts: see `judged`.

    Returns:
      Clean and robust accuracy, in percent.
    """
    found = judged(model, source, threat, attack, seed, restarts=restarts)
    return 100 * found.clean_accuracy, 100 * found.robust_accuracy
