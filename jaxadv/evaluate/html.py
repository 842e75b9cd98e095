"""The report as one HTML page that needs nothing beside itself: inline SVG, base64 PNG, no scripts.

What lives here: the page. What does not: figures (`figures`), words for numbers (`markdown`), any counting. The JSON of
the report is embedded in the page, so the page can be read by programs too.
"""

import base64
import html as escape
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxadv.evaluate.figures import Bar, Curve, bars, curves, histogram
from jaxadv.evaluate.markdown import (
    COMPARED,
    carried_words,
    certified_words,
    compared,
    confusion,
    data_words,
    interval,
    percent,
    search_words,
    size_curve,
    spent_words,
    threat_words,
)
from jaxadv.evaluate.report import ModelReport, Report

_PICTURES, _SIDE, _IMAGE_BYTES, _JSON_BYTES = 10, 96, 900_000, 700_000

_STYLE = """
:root { color-scheme: light dark; --bg: #fbfaf8; --card: #fff; --fg: #1d1c1a; --muted: #66635d; --line: #e4e1da;
  --s0: #2f6fb5; --s1: #d4622a; --s2: #3a8a5c; --s3: #8458ad; --s4: #a8842c; --s5: #b1456e; --clean: #a3a7ad;
  --error: #b3261e; --warning: #9a6200; --note: #4a6a8a; --track: #eceae4; }
@media (prefers-color-scheme: dark) { :root { --bg: #15171a; --card: #1d2024; --fg: #e9e6e1; --muted: #a39f97;
  --line: #33373d; --s0: #6ea8e6; --s1: #ef8f5b; --s2: #6cc194; --s3: #b894dd; --s4: #d6b45a; --s5: #e583a8;
  --clean: #7b8088; --error: #ff8a80; --warning: #f0b866; --note: #9dbbd8; --track: #2a2e33; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.015em; }
h2 { font-size: 1.3rem; margin: 44px 0 12px; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 0 0 8px; }
h2 i { display: inline-block; width: 14px; height: 14px; border-radius: 4px; margin-right: 10px; }
.card > figure svg { max-width: 620px; }
p { margin: 8px 0; max-width: 76ch; } .muted, figcaption { color: var(--muted); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 14px 0;
} .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: .82rem; color: var(--muted); }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: baseline; white-space: nowrap; }
tr:last-child td { border-bottom: 0; } td.num, th.num { text-align: right; padding-right: 22px; }
.big { font-size: 1.35rem; font-weight: 650; } .low { color: var(--muted); font-size: .86rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 14px; }
.two > * { margin: 0; min-width: 0; } figure { margin: 0; } figcaption { font-size: .88rem; margin-top: 6px; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: inherit; fill: var(--fg); }
.tick { font-size: 12px; } svg .tick { fill: var(--muted); } .label { font-size: 13px; } .value { font-size: 13px;
font-weight: 600; } .grid { stroke: var(--line); } .base { stroke: var(--muted); } .error { stroke: var(--fg);
stroke-width: 1.5; } .curve { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
.band { opacity: .16; } .dot { stroke: var(--card); stroke-width: 1.5; }
SERIES
.key { display: inline-flex; align-items: center; gap: 6px; margin-right: 16px; font-size: .9rem; }
.key i { width: 12px; height: 12px; border-radius: 3px; display: inline-block; }
.meter { display: inline-block; width: 110px; height: 8px; border-radius: 4px; background: var(--track); margin-right:
10px; } .meter i { display: block; height: 100%; border-radius: 4px; }
.flag { border-left: 4px solid var(--note); padding: 2px 0 2px 14px; margin: 14px 0; }
.flag b { text-transform: capitalize; } .flag p { margin: 2px 0; }
.flag.error { border-color: var(--error); } .flag.error b { color: var(--error); } .flag.note b { color: var(--note); }
.flag.warning { border-color: var(--warning); } .flag.warning b { color: var(--warning); }
.wall { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 14px 12px; }
.wall figure { font-size: .8rem; } .wall figcaption { font-size: .78rem; margin: 2px 0 8px; line-height: 1.35; }
.wall img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; image-rendering: pixelated;
border-radius: 4px;
  border: 1px solid var(--line); background: var(--track); }
details { margin: 12px 0; } summary { cursor: pointer; font-weight: 600; }
code, pre { font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; margin: 8px 0; }
li { margin: 5px 0; max-width: 80ch; }
""".replace(
    "SERIES",
    "\n".join(
        f".bar.s{i}, .dot.s{i}, .band.s{i} {{ fill: var(--s{i}); }} .curve.s{i} {{ stroke: var(--s{i}); }} "
        f"i.s{i} {{ background: var(--s{i}); }}"
        for i in range(6)
    )
    + "\n.bar.s9 { fill: var(--clean); } i.s9 { background: var(--clean); }",
)


def _e(words: Any) -> str:
    return escape.escape(str(words), quote=True)


def _color(number: int) -> int:
    return number % 6


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """An HTML table; the cells are HTML already."""
    kind = [' class="num"' if i in numbers else "" for i in range(len(head))]
    top = "".join(f'<th scope="col"{kind[i]}>{_e(h)}</th>' for i, h in enumerate(head))
    body = "".join("<tr>" + "".join(f"<td{kind[i]}>{c}</td>" for i, c in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _headline(report: Report) -> str:
    rows, certified = [], any(m.certified_accuracy is not None for m in report.models)
    for model in report.models:
        worst = model.flags[0].severity if model.flags else ""
        words = f"{len(model.flags)} (worst: {worst})" if worst else "none"
        rows.append(
            [
                f"<b>{_e(model.name)}</b>",
                f'<span class="big">{percent(model.clean_accuracy)}</span>',
                f'<span class="low">{interval(model.clean_interval)}</span>',
                f'<span class="big">{percent(model.robust_accuracy)}</span>',
                f'<span class="low">{interval(model.robust_interval)}</span>',
            ]
        )
        if certified:
            value, ends = ("-", "-") if model.certified_accuracy is None else certified_words(model)
            rows[-1] += [f'<span class="big">{value}</span>', f'<span class="low">{ends}</span>']
        rows[-1].append(_e(words))
    head = ["Model", "Clean accuracy", "95 % interval", "Robust accuracy", "95 % interval"]
    head += [*(["Certified accuracy", "95 % interval"] if certified else []), "Red flags"]
    pairs = ""
    if len(report.models) > 1:
        cells = [[_e(cell) for cell in row] for row in compared(report.models)]
        pairs = (
            f"<details><summary>Pairs on the same examples</summary>{_table(COMPARED, cells, (2, 3, 4, 5))}</details>"
        )
    return f'<div class="card">{_table(head, rows)}{pairs}</div>'


def _key(names: Sequence[tuple[int, str]]) -> str:
    return "".join(f'<span class="key"><i class="s{s}"></i>{_e(n)}</span>' for s, n in names)


def _overview(report: Report) -> str:
    """The two figures that compare the models."""
    groups = [
        (
            m.name,
            [
                Bar(9, "clean", m.clean_accuracy, m.clean_interval),
                Bar(_color(i), "robust", m.robust_accuracy, m.robust_interval),
            ],
        )
        for i, m in enumerate(report.models)
    ]
    words = "; ".join(
        f"{m.name}: clean {percent(m.clean_accuracy)}, robust {percent(m.robust_accuracy)}" for m in report.models
    )
    figure = bars(f"Clean and robust accuracy. {words}", groups)
    out = [
        f'<figure class="card">{figure}<figcaption>Clean (gray) and robust accuracy; error bars are 95 % intervals.'
        "</figcaption></figure>"
    ]
    lines, names = [], []
    for i, model in enumerate(report.models):
        if model.curve:
            points = [(0.0, model.clean_accuracy, model.clean_interval)]
            points += [(p["eps"], p["robust_accuracy"], tuple(p["robust_interval"])) for p in model.curve]
            lines.append(Curve(model.name, *zip(*points)))
            names.append((_color(i), model.name))
    if lines:
        norm = threat_words(report.models[0].threat).split(",")[0]
        title = "Security curve: robust accuracy over the budget. " + "; ".join(
            f"{c.name}: " + ", ".join(f"{percent(y)} at {x:g}" for x, y in zip(c.x, c.y)) for c in lines
        )
        out.append(
            f'<figure class="card">{curves(title, lines, f"budget eps ({norm})")}<figcaption>{_key(names)}<br>'
            "Security curve; bands are 95 % intervals.</figcaption></figure>"
        )
    return f'<div class="two">{"".join(out)}</div>'


def _attack_table(model: ModelReport, color: int) -> str:
    rows = []
    for a in model.attacks:
        after = a["robust_accuracy_after"]
        meter = (
            f'<span class="meter" aria-hidden="true"><i class="s{color}" style="width:{100 * after:.1f}%"></i></span>'
        )
        counts = (a["restarts"], a["attacked"], a["broken"], a["refused"])
        rows.append([f"<code>{_e(a['name'])}</code>", *map(str, counts), meter + percent(after)])
        rows[-1] += [f"{a['queries']:,}", f"{a['grads']:,}"]
    head = ["Attack", "Restarts", "Attacked", "Broken", "Refused", "Robust accuracy after it", "Queries", "Gradients"]
    return _table(head, rows, (1, 2, 3, 4, 6, 7))


def _words(model: ModelReport) -> str:
    words = " ".join(w for w in (spent_words(model), search_words(model), carried_words(model)) if w)
    return f'<p class="muted">{_e(words)}</p>'


def _confusion(model: ModelReport, classes: int) -> str:
    """Labels against what the model says under attack."""
    if classes > 20:
        return f'<p class="muted">Not shown for {classes} classes; see the outcomes in report.json.</p>'
    table = confusion(model.examples, classes)
    last = [] if not any(row[-1] for row in table) else ["not finite"]
    head = ["Label", *map(str, range(classes)), *last]
    rows = []
    for label, row in enumerate(table):
        most = max(sum(row), 1)
        cells = [f'<span style="opacity:{0.35 + 0.65 * n / most:.2f}">{n or "·"}</span>' for n in row]
        rows.append([f"<b>{label}</b>", *cells[: classes + len(last)]])
    words = "Rows: labels; columns: predictions at the points that the attacks found (at the clean one where none did)."
    return f'{_table(head, rows, range(1, len(head)))}<p class="muted">{words}</p>'


def _flag_list(model: ModelReport) -> str:
    if not model.flags:
        return '<p class="muted">No red flags: none of the checks of the evaluation itself was raised.</p>'
    return "".join(
        f'<div class="flag {f.severity}"><p><b>{f.severity}</b> <code>{_e(f.name)}</code></p>'
        f"<p>{_e(f.words)} {_e(f.detail)}</p>"
        f'<p class="muted">Remedy: {_e(f.remedy)}</p></div>'
        for f in model.flags
    )


def _sizes(model: ModelReport, color: int) -> str:
    """The histogram of the sizes of the verified perturbations."""
    eps, columns = model.threat["eps"], model.examples
    sizes = [s for s, by in zip(columns["size"], columns["by"]) if by >= 0]
    if not sizes:
        return '<p class="muted">No example was broken, so there are no sizes to show.</p>'
    top = max(eps) if isinstance(eps, list) else eps
    norm = threat_words(model.threat).split(",")[0]
    title = f"Sizes of {len(sizes)} verified perturbations of {model.name}, from {min(sizes):.4g} to {max(sizes):.4g}"
    figure = histogram(title, sizes, float(top), f"size ({norm}), budget {top:.4g}", color)
    words = f"Sizes of the {len(sizes)} verified perturbations; attacks of a fixed budget move to its edge."
    out = f"<figure>{figure}<figcaption>{words}</figcaption></figure>"
    if isinstance(eps, list) or sum(s < 0.98 * eps for s in sizes) < 0.1 * len(sizes):
        return out
    points = size_curve(columns, eps)
    line = Curve(model.name, [p[0] for p in points], [p[1] for p in points], [(p[1], p[1]) for p in points])
    title = f"Robust accuracy of {model.name} over the budget, from the sizes of the smallest perturbations found"
    figure = curves(title, [line], f"size ({norm})", series=color)
    words = "Robust accuracy at smaller budgets, as far as these perturbations tell: an upper bound."
    return f"{out}<figure>{figure}<figcaption>{words}</figcaption></figure>"


def png(image: np.ndarray) -> str:
    """Return an image as a data address.

    Args:
      image: float `[h, w, c]` with 1 or 3 channels, values in [0, 1]; shrunk if larger than 96 pixels.

    Returns:
      `data:image/png;base64,...`.
    """
    from PIL import Image

    pixels = np.round(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if max(picture.size) > _SIDE:
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _images(report: Report) -> np.ndarray | None:
    """The examples as `[n, h, w, c]`, or None if they are no images."""
    x = report.x
    if x is None:
        return None
    if x.ndim == 3 and min(x.shape[1:]) >= 4:
        return x[..., None]
    return x if x.ndim == 4 and x.shape[-1] in (1, 3) and min(x.shape[1:3]) >= 4 else None


def _wall(report: Report, number: int) -> str:
    """Clean example, adversarial example and magnified difference, with predictions."""
    model, images = report.models[number], _images(report)
    if images is None or model.x_adv is None:
        return '<p class="muted">No pictures: the examples are no images, or were not kept.</p>'
    columns = model.examples
    by = np.asarray([m.examples["by"] for m in report.models])
    broken = np.flatnonzero(by[number] >= 0)
    if not len(broken):
        return '<p class="muted">No pictures: no example was broken.</p>'
    shared = (by[:, broken] >= 0).sum(0)  # the same examples for all models where possible
    sizes = np.asarray([columns["size"][row] for row in broken], float)
    chosen = broken[np.lexsort((sizes, -shared))][:_PICTURES]
    low, high = (np.asarray(b, np.float64) for b in model.threat["bounds"])
    clean = (images[chosen] - low.min()) / (high.max() - low.min())
    moved = (model.x_adv.reshape(images.shape)[chosen] - low.min()) / (high.max() - low.min())
    gain = 0.5 / max(float(np.abs(moved - clean).max()), 1e-12)
    cards, spent = [], 0
    for i, row in enumerate(chosen):
        label, before, after = (columns[c][row] for c in ("label", "clean", "adversarial"))
        name, size = model.attacks[columns["by"][row]]["name"], columns["size"][row]
        said = after if after >= 0 else "not finite"
        parts = [
            (
                clean[i],
                f"Example {columns['index'][row]}, label {label}, clean, predicted {before}",
                f"label {label}, predicted {before}",
            ),
            (
                moved[i],
                f"The same example attacked by {name}, predicted {said}",
                f"<b>predicted {said}</b> ({_e(name)})",
            ),
            (
                0.5 + gain * (moved[i] - clean[i]),
                f"Difference magnified {gain:.3g} times",
                f"difference × {gain:.3g}, size {size:.4g}",
            ),
        ]
        card = "".join(
            f'<img src="{png(im)}" alt="{_e(alt)}"><figcaption>{words}</figcaption>' for im, alt, words in parts
        )
        spent += len(card)
        if spent > _IMAGE_BYTES / len(report.models):
            break
        cards.append(f"<figure>{card}</figure>")
    words = (
        f"Broken examples, smallest perturbation first"
        f"{' (and before them those that break in every model)' if len(report.models) > 1 else ''}: the clean "
        f"example, the "
        f"adversarial one, and their difference magnified {gain:.3g} times around gray."
    )
    return f'<p class="muted">{words}</p><div class="wall">{"".join(cards)}</div>'


def _model_section(report: Report, number: int) -> str:
    model, color = report.models[number], _color(number)
    targeted = ""
    if model.targeted:
        targeted = (
            f"<p><b>Targeted evaluation</b> (rule: {_e(model.targeted['rule'])}): "
            f"{percent(model.targeted['success_rate'])} of the "
            "correctly classified examples reached their target.</p>"
        )
    points = ""
    if model.curve:
        rows = [
            [
                f"{p['eps']:.6g}",
                percent(p["robust_accuracy"]),
                interval(p["robust_interval"]),
                str(p["broken"]),
                str(p["carried"]),
            ]
            for p in model.curve
        ]
        head = ["eps", "Robust accuracy", "95 % interval", "Broken", "Of these carried over"]
        points = f"<details><summary>Security curve in numbers</summary>{_table(head, rows, (0, 3, 4))}</details>"
    cards = {
        "Red flags": _flag_list(model),
        "Attacks, each on the survivors of those before": _words(model) + _attack_table(model, color) + points,
        "Sizes of perturbations": _sizes(model, color),
        "Confusion under attack": _confusion(model, report.data["classes"]),
        "Adversarial examples: the closest calls": _wall(report, number),
    }
    body = "".join(f'<div class="card"><h3>{head}</h3>{content}</div>' for head, content in cards.items())
    return f'<section><h2><i class="s{color}"></i>{_e(model.name)}</h2>{targeted}{body}</section>'


def _settings(report: Report) -> str:
    rows = [[_e(k), f"<code>{_e(v)}</code>"] for k, v in report.versions.items()]
    rows += [["device", f"<code>{_e(report.device)}</code>"]]
    rows += [
        ["seed", f"<code>{_e('not stated' if report.seed is None else report.seed)}</code>"],
        ["key", f"<code>{report.key}</code>"],
    ]
    rows += [["data fingerprint", f"<code>{_e(report.data['fingerprint'])}</code>"]]
    blocks = [f"<details><summary>Versions, seed and data</summary>{_table(['What', 'Value'], rows)}</details>"]
    for model in report.models:
        lines = [f"{a['name']} x {a['restarts']}: {json.dumps(a['settings'])}" for a in model.attacks]
        blocks.append(
            f"<details><summary>Attack settings: {_e(model.name)}</summary>"
            f"<pre>{_e(chr(10).join(lines))}</pre></details>"
        )
    times = []
    for entry in report.timing.get("models", []):
        times.append([_e(entry["name"]), "in all", f"{entry['total']:.2f}"])
        times += [["", f"<code>{_e(a['name'])}</code>", f"{a['seconds']:.2f}"] for a in entry.get("attacks", [])]
    for entry in report.timing.get("models", []):
        if cost := entry.get("cost"):
            times.append([_e(entry["name"]), "a gradient, a forward pass of one row", _pair(cost)])
            times += [
                ["", f"overhead of <code>{_e(a['name'])}</code>", f"{a['overhead']:.2f}"] for a in cost["attacks"]
            ]
    blocks.append(
        "<details><summary>Timing, compilation included</summary>"
        f"{_table(['Model', 'Part', 'Seconds'], times, (2,))}</details>"
    )
    return "".join(blocks)


def _pair(cost: Any) -> str:
    return f"{cost['t_grad']:.3g}, {cost['t_fwd']:.3g}"


def _embedded(report: Report) -> str:
    """The JSON of the report for programs, without the outcomes of the examples where that would be heavy."""
    tree = report.to_dict()
    text = json.dumps(tree, allow_nan=False)
    if len(text) > _JSON_BYTES:
        for model in tree["models"]:
            model["examples"] = "left out of the page; see report.json"
        text = json.dumps(tree, allow_nan=False)
    return f'<script type="application/json" id="report">{text.replace("<", chr(92) + "u003c")}</script>'


def render(report: Report) -> str:
    """Return the report as one HTML page.

    Args:
      report: the report; with `x` and `x_adv` kept it shows pictures.

    Returns:
      The page; it loads nothing from elsewhere and stays below 2 MB.
    """
    names = " and ".join(m.name for m in report.models) if len(report.models) < 4 else f"{len(report.models)} models"
    threats = "; ".join(dict.fromkeys(threat_words(m.threat) for m in report.models))
    statements = dict.fromkeys(s for m in report.models for s in m.statements)
    sections = "".join(_model_section(report, i) for i in range(len(report.models)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Robustness report: {_e(names)}</title><style>{_STYLE}</style></head><body><main>"
        f'<header><h1>Robustness of {_e(names)}</h1><p class="muted">{_e(data_words(report.data))}<br>'
        f"Threat: {_e(threats)}</p></header>{_headline(report)}{_overview(report)}{sections}"
        f"<section><h2>How to read this</h2><ul>{''.join(f'<li>{_e(s)}</li>' for s in statements)}</ul></section>"
        f"<section><h2>Settings</h2>{_settings(report)}</section></main>{_embedded(report)}</body></html>\n"
    )
