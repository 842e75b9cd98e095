"""The report as markdown, for terminals, pull requests and papers' appendices; and the words both pages share.

What lives here: `render` and how numbers, intervals and threats are put in words. What does not: pictures (`html`).
"""

from collections.abc import Sequence
from typing import Any

from jaxadv.evaluate.intervals import mcnemar
from jaxadv.evaluate.report import CERTIFIED, MISCLASSIFIED, ROBUST, ModelReport, Report

_NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1", "l0": "L0"}
_MARKS = {"error": "**error**", "warning": "**warning**", "note": "note"}


def percent(value: float) -> str:
    """Return a share in percent, to hundredths.

    Args:
      value: in [0, 1].

    Returns:
      For example `66.33 %`.
    """
    return f"{100 * value:.2f} %"


def interval(ends: Any) -> str:
    """Return an interval of shares in percent.

    Args:
      ends: `(low, high)` in [0, 1].

    Returns:
      For example `[62.40, 70.11]`.
    """
    return f"[{100 * ends[0]:.2f}, {100 * ends[1]:.2f}]"


def threat_words(threat: dict[str, Any]) -> str:
    """Return a threat in words.

    Args:
      threat: `norm`, `eps` and `bounds` of a model's report.

    Returns:
      For example `L∞, eps 0.0314 (8/255), values in [0, 1]`.
    """
    eps, bounds = threat["eps"], [b if isinstance(b, (int, float)) else None for b in threat["bounds"]]
    if isinstance(eps, list):
        budget = f"eps {min(eps):.4g} to {max(eps):.4g} (one for each example)"
    else:
        levels = eps * 255
        whole = threat["norm"] == "linf" and abs(levels - round(levels)) < 1e-4 and 0 < levels < 64
        budget = f"eps {eps:.4g}" + (f" ({round(levels)}/255)" if whole else "")
    box = "values in bounds of their own" if None in bounds else f"values in [{bounds[0]:g}, {bounds[1]:g}]"
    return f"{_NORMS.get(threat['norm'], threat['norm'])}, {budget}, {box}"


def data_words(data: dict[str, Any]) -> str:
    """Return the data in words.

    Args:
      data: of a report.

    Returns:
      For example `mnist (test), 1000 examples of shape 28 x 28 x 1, 10 classes`.
    """
    name = data["name"] or "unnamed data"
    split = f" ({data['split']})" if data["split"] else ""
    shape = " x ".join(map(str, data["shape"]))
    return f"{name}{split}, {data['n']} examples of shape {shape}, {data['classes']} classes"


def certified_words(model: ModelReport) -> list[str]:
    """Return the certified accuracy of a model and its interval in words.

    Args:
      model: a model's report; it has a certified accuracy.

    Returns:
      Two words.
    """
    return [percent(model.certified_accuracy or 0.0), interval(model.certified_interval or (0.0, 0.0))]


def confusion(columns: dict[str, list], classes: int) -> list[list[int]]:
    """Count what the examples of each class are taken for under attack.

    Args:
      columns: of the outcome table.
      classes: number of classes.

    Returns:
      A row for each label: counts for each predicted class, and last those whose logits are not finite.
    """
    table = [[0] * (classes + 1) for _ in range(classes)]
    for label, said in zip(columns["label"], columns["adversarial"]):
        table[label][said if said >= 0 else classes] += 1
    return table


def size_curve(columns: dict[str, list], eps: float, points: int = 24) -> list[tuple[float, float]]:
    """Return the share of examples that no verified perturbation up to a size breaks: robust accuracy from sizes.

    Args:
      columns: of the outcome table.
      eps: the budget.
      points: number of sizes between 0 and the budget.

    Returns:
      `(size, share)`, sizes rising; it cannot rise, and at the budget it is the robust accuracy.
    """
    n = len(columns["by"])
    sizes = sorted(s for s, by in zip(columns["size"], columns["by"]) if by >= 0 or by == MISCLASSIFIED)
    grid = [eps * i / points for i in range(points + 1)]
    counts = [sum(s <= at for s in sizes) for at in grid[:-1]] + [len(sizes)]  # the last: rounding above the budget too
    return [(at, (n - count) / n) for at, count in zip(grid, counts)]


def spent_words(model: ModelReport) -> str:
    """Tell what the attacks cost.

    Args:
      model: a model's report.

    Returns:
      A sentence.
    """
    queries, grads = (sum(a[name] for a in model.attacks) for name in ("queries", "grads"))
    attacked = max((a["attacked"] for a in model.attacks), default=0)
    each = f", {grads / attacked:,.0f} gradients for each attacked example" if attacked else ""
    return f"In all {queries:,} forward passes of rows, {grads:,} of them with a gradient{each}."


def search_words(model: ModelReport) -> str:
    """Tell how the attacks were computed.

    Args:
      model: a model's report.

    Returns:
      A sentence, or nothing where the report does not say.
    """
    search = model.search
    if not search["slots"]:
        return ""
    where = f" on each of {search['devices']} devices" if search["devices"] > 1 else ""
    again = f"; {search['retried']} runs were repeated in float32" if search["retried"] else ""
    return f"{search['slots']} slots{where}, attacks in {search['dtype']}{again}."


def compared(models: Sequence[ModelReport]) -> list[list[str]]:
    """Compare models pairwise on the same examples.

    Args:
      models: reports about the same examples.

    Returns:
      For each pair: names, how many examples hold in one alone, and the p-value of the exact McNemar test.
    """
    rows = []
    held = [[by in (ROBUST, CERTIFIED) for by in m.examples["by"]] for m in models]
    for i in range(len(models)):
        for j in range(i + 1, len(models)):
            one = sum(a and not b for a, b in zip(held[i], held[j]))
            two = sum(b and not a for a, b in zip(held[i], held[j]))
            both = sum(a and b for a, b in zip(held[i], held[j]))
            chance = mcnemar(one, two)
            rows.append([models[i].name, models[j].name, str(both), str(one), str(two), f"{chance:.3g}"])
    return rows


COMPARED = ("One", "Other", "Robust in both", "In one alone", "In the other alone", "p (McNemar)")
"""Head of the table of `compared`."""


def carried_words(model: ModelReport) -> str:
    """Tell how many examples the attacks did not have to break, because a smaller budget of the curve had done so.

    Args:
      model: a model's report.

    Returns:
      A sentence, or nothing.
    """
    carried = next((p["carried"] for p in model.curve if p["eps"] == model.threat["eps"]), 0)
    if not carried:
        return ""
    return f"{carried} examples had been broken at smaller budgets of the curve and were carried over with their sizes."


def _cell(words: Any) -> str:
    return str(words).replace("|", "\\|").replace("\n", " ")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a table.

    Args:
      head: one name for each column.
      rows: their cells. Bars and line breaks are escaped.

    Returns:
      The lines, with an empty one at the end.
    """
    lines = ["| " + " | ".join(map(_cell, head)) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(_cell(c) for c in row) + " |" for row in rows] + [""]


def _model(model: ModelReport) -> list[str]:
    out = [f"## {_cell(model.name)}", ""]
    if model.flags:
        out += [f"- {_MARKS[f.severity]} `{f.name}`: {f.words} {f.detail} {f.remedy}" for f in model.flags]
    else:
        out.append("No red flags.")
    head = ["attack", "restarts", "attacked", "broken", "refused", "robust accuracy after", "queries", "gradients"]
    rows = [
        [a["name"], a["restarts"], a["attacked"], a["broken"], a["refused"], percent(a["robust_accuracy_after"])]
        + [a["queries"], a["grads"]]
        for a in model.attacks
    ]
    words = carried_words(model)
    out += ["", *table(head, rows), " ".join(w for w in (spent_words(model), search_words(model), words) if w), ""]
    if model.curve:
        points = [
            [
                f"{p['eps']:.6g}",
                percent(p["robust_accuracy"]),
                interval(p["robust_interval"]),
                p["broken"],
                p["carried"],
            ]
            for p in model.curve
        ]
        out += table(["eps", "robust accuracy", "95 % interval", "broken", "of these carried over"], points)
    if model.targeted:
        rate = percent(model.targeted["success_rate"])
        out += [
            f"Targeted (rule: {model.targeted['rule']}): {rate} of the correctly classified examples reached their "
            f"target.",
            "",
        ]
    return out


def render(report: Report) -> str:
    """Return the report as markdown.

    Args:
      report: the report.

    Returns:
      The text, ending in a newline.
    """
    certified = any(m.certified_accuracy is not None for m in report.models)
    head = ["model", "clean accuracy", "95 % interval", "robust accuracy", "95 % interval"]
    head += [*(["certified accuracy", "95 % interval"] if certified else []), "flags"]
    rows = []
    for m in report.models:
        row = [m.name, percent(m.clean_accuracy), interval(m.clean_interval), percent(m.robust_accuracy)]
        row.append(interval(m.robust_interval))
        if certified:
            row += ["-", "-"] if m.certified_accuracy is None else certified_words(m)
        rows.append([*row, ", ".join(f.name for f in m.flags) or "none"])
    threats = list(dict.fromkeys(threat_words(m.threat) for m in report.models))
    out = ["# Robustness report", "", f"Data: {data_words(report.data)}.", ""]
    out += [f"Threat: {'; '.join(threats)}.", "", *table(head, rows)]
    if len(report.models) > 1:
        out += table(COMPARED, compared(report.models))
    for model in report.models:
        out += _model(model)
    out += ["## How to read this", ""]
    out += [f"- {s}" for s in dict.fromkeys(s for m in report.models for s in m.statements)]
    versions = ", ".join(f"{k} {v}" for k, v in report.versions.items())
    seed = "not stated" if report.seed is None else report.seed
    out += [
        "",
        f"Seed {seed}, key {report.key}; {versions}; {report.device}; data fingerprint {report.data['fingerprint']}.",
    ]
    return "\n".join(out) + "\n"
