"""The report as markdown, for terminals, pull requests and papers' appendices; and the words both pages share.

What lives here: `render` and how numbers, intervals and threats are put in words. What does not: pictures (`html`).
"""

from typing import Any

from jaxadv.evaluate.report import ModelReport, Report

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


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
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
    out += ["", *_table(head, rows), *([words, ""] if words else [])]
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
        out += _table(["eps", "robust accuracy", "95 % interval", "broken", "of these carried over"], points)
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
    head = ["model", "clean accuracy", "95 % interval", "robust accuracy", "95 % interval", "flags"]
    rows = [
        [m.name, percent(m.clean_accuracy), interval(m.clean_interval), percent(m.robust_accuracy)]
        + [interval(m.robust_interval), ", ".join(f.name for f in m.flags) or "none"]
        for m in report.models
    ]
    threats = list(dict.fromkeys(threat_words(m.threat) for m in report.models))
    out = ["# Robustness report", "", f"Data: {data_words(report.data)}.", ""]
    out += [f"Threat: {'; '.join(threats)}.", "", *_table(head, rows)]
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
