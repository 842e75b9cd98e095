"""Commands that measure and show: `evaluate`, `attack`, `report`, `verify-report`, `list`, `claims`, `bench`, `data`.

What lives here: from a configuration to calls of the rooms, and what is printed about the answer. What does not:
training (`training.py`), loading models and data (`sources.py`), any measuring (room `evaluate`).
"""

import dataclasses
import inspect
import json
import shlex
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxadv import data as data_room
from jaxadv import evaluate, train
from jaxadv.attacks import ATTACKS
from jaxadv.cli import configs, files, sources
from jaxadv.cli.errors import FLAGGED, OK, Stopped, UsageError
from jaxadv.cli.parsing import fraction
from jaxadv.cli.progress import Progress, note, say, table
from jaxadv.core import Targets, atomic_write, check
from jaxadv.evaluate.engine import evaluate as measure
from jaxadv.threats import THREATS

EVALUATION = "evaluation.json"
"""File beside a report that says which MODEL it is about."""


def percent(value: float, interval: Iterable[float] | None = None) -> str:
    """Write a share, with its interval if there is one.

    Args:
      value: in [0, 1].
      interval: its ends.

    Returns:
      E.g. `93.1 % (90.0 to 95.5)`.
    """
    ends = "" if interval is None else " ({:.1f} to {:.1f})".format(*(100 * v for v in interval))
    return f"{100 * value:.1f} %{ends}"


def budget(threat: dict[str, Any]) -> str:
    """Write a threat of a report.

    Args:
      threat: its `norm` and `eps`.

    Returns:
      E.g. `linf 0.3`.
    """
    eps = threat["eps"]
    return f"{threat['norm']} {eps:g}" if isinstance(eps, (int, float)) else f"{threat['norm']}, eps per example"


def show_models(report: evaluate.Report) -> None:
    """Print the headline: each model, clean and robust, with intervals.

    Args:
      report: the report.
    """
    data, n = report.data, report.models[0].n
    certified = any(m.certified_accuracy is not None for m in report.models)
    rows = []
    for m in report.models:
        lower = () if m.certified_accuracy is None else (percent(m.certified_accuracy, m.certified_interval),)
        shown = (percent(m.clean_accuracy, m.clean_interval), percent(m.robust_accuracy, m.robust_interval))
        rows.append((m.name, *shown, *((lower or ("-",)) if certified else ()), budget(m.threat)))
    where = f"{data['name']} ({data['split']})" if data["split"] else data["name"]
    head = ("model", ">clean accuracy", ">robust accuracy", *((">certified",) if certified else ()), "threat")
    table(f"{where}, {n} examples", head, rows)


def show_flags(report: evaluate.Report) -> None:
    """Print the red flags to standard error, each with its remedy.

    Args:
      report: the report.
    """
    for model in report.models:
        for flag in model.flags:
            note(f"{flag.severity}: {model.name}: {flag.name}: {flag.words} {flag.detail} {flag.remedy}")


def exit_code(report: evaluate.Report) -> int:
    """Return 1 if a red flag of severity error was raised, else 0.

    Args:
      report: the report.

    Returns:
      The exit code.
    """
    return FLAGGED if any(flag.severity == "error" for model in report.models for flag in model.flags) else OK


def _without(source: data_room.Source, rule: Any) -> tuple[data_room.Source, Any]:
    """Apply `--targeted N`: leave the examples of class N out; returns what `evaluate` takes as targets."""
    if not isinstance(rule, int):
        return source, rule
    kept = source.y != rule
    if not kept.any():
        raise UsageError(
            f"--targeted {rule} must leave examples of other classes; got none among the {len(source)} chosen."
        )
    if not kept.all():
        note(f"{int((~kept).sum())} of {len(source)} examples belong to the target class {rule} and are left out.")
        source = source.subset(kept)
    return source, np.full(len(source), rule, np.int32)


def _stages(config: configs.Evaluate) -> Any:
    """Read `--attacks` and `--protocol`."""
    if config.attacks is not None and config.protocol is not None:
        raise UsageError(f"give --attacks or --protocol, not both; got {config.attacks!r} and {config.protocol!r}.")
    if config.attacks is None:
        return (
            None
            if config.protocol is None
            else (check.choice("protocol", config.protocol, evaluate.PROTOCOLS) and config.protocol)
        )
    names = [name.strip() for name in config.attacks.split(",") if name.strip()]
    if not names:
        raise UsageError("--attacks must name attacks, joined by commas; got none. E.g. --attacks fgsm,pgd")
    for name in names:
        check.choice("attack", name, ATTACKS)
    return tuple(names)


def _inputs(config: Any) -> tuple[sources.Loaded, data_room.Source, Any]:
    """Load MODEL and DATA of a configuration, and see that they fit."""
    check.whole("batch_size", config.batch_size)
    check.choice("threat", config.norm, THREATS)
    if config.restarts is not None:
        check.whole("restarts", config.restarts)
    loaded = sources.load_model(config.model)
    source = sources.load_data(sources.data_name(config.data, loaded), config.split, config.data_root, config.n)
    sources.fits(loaded, source)
    return loaded, *_without(source, sources.target_rule(config.targeted, source.classes))


# ------------------------------------------------------------------------------------------------------------- evaluate


def run_evaluate(config: configs.Evaluate) -> int:
    """Evaluate a model and write its report.

    Args:
      config: the arguments.

    Returns:
      The exit code: 1 if a red flag of severity error was raised.

    Raises:
      UsageError: on arguments that cannot be used.
    """
    stages = _stages(config)
    loaded, source, targets = _inputs(config)
    budgets = sources.budgets(config.eps, config.norm, source.name, loaded)
    threats = [sources.threat(config.norm, eps, source) for eps in budgets]
    save_adv = files.npz_path(config.save_adv)
    files.writable(config.out)
    honest = config.protocol == "ode"
    surrogate = None if config.surrogate is None else sources.load_model(config.surrogate).model
    x, y = source.all()
    try:
        with Progress() as progress:
            report = (evaluate.ode_report if honest else measure)(
                jax.random.key(config.seed),
                loaded.model,
                x,
                y,
                threats[0],
                attacks=stages,
                restarts=config.restarts,
                name=config.name or loaded.name,
                index=source.index,
                batch_size=config.batch_size,
                slots=config.slots,
                mesh=_mesh(config.devices),
                search_dtype=config.search_dtype,
                eps_curve=budgets if len(budgets) > 1 else (),
                targets=targets,
                surrogate=surrogate,
                diagnostics=honest or config.diagnose,
                journal=config.out,
                resume=config.resume,
                measure=config.measure,
                data=source,
                seed=config.seed,
                progress=lambda done, total, stage: progress(done, total, "evaluate", stage),
            )
    except KeyboardInterrupt:
        raise Stopped(
            f"interrupted; what was finished is in {config.out}. Go on with the same command and --resume."
        ) from None
    if not files.lead():  # every process has the same report
        return exit_code(report)
    where = {"model": config.model, "name": report.models[0].name}
    atomic_write(config.out / EVALUATION, lambda file: file.write((json.dumps(where, indent=2) + "\n").encode()))
    report.save(config.out)
    model = report.models[0]
    if save_adv is not None:
        _save_adversarial(
            save_adv, x, np.asarray(model.x_adv), y, source.index, np.asarray(model.examples["by"]) >= 0, threats[0]
        )
    show_models(report)
    attacks = [
        (a["name"], a["restarts"], a["attacked"], a["broken"], percent(a["robust_accuracy_after"]))
        for a in model.attacks
    ]
    table(
        "attacks, each on the survivors of those before",
        ("attack", ">restarts", ">attacked", ">broken", ">robust after"),
        attacks,
    )
    if model.targeted is not None:
        say(
            f"Targeted ({model.targeted['rule']}): {percent(model.targeted['success_rate'])} of the attacked "
            f"reached their target."
        )
    if model.curve:
        rows = [
            (f"{point['eps']:g}", percent(point["robust_accuracy"], point["robust_interval"])) for point in model.curve
        ]
        table("security curve", (">eps", ">robust accuracy"), rows)
        say(f"The robust accuracy of the report belongs to the first --eps, {float(threats[0].eps):g}.")
    if config.card:
        _card(config, loaded.model, source)
    show_flags(report)
    say(f"Report: {config.out / 'report.html'} (and report.json, report.md).")
    return exit_code(report)


def _card(config: configs.Evaluate, model: Any, source: data_room.Source) -> None:
    """Measure, store and print the card of corruptions, geometry, occlusion and shape."""
    from jaxadv.evaluate.card import report_card

    x, y = source.all()
    with Progress() as progress:
        card = report_card(
            jax.random.key(config.seed),
            model,
            x,
            y,
            index=source.index,
            batch_size=config.batch_size,
            progress=lambda done, total, word: progress(done, total, "card", word),
        )
    text = json.dumps(card.to_dict(), indent=2) + "\n"
    atomic_write(config.out / "card.json", lambda file: file.write(text.encode()))
    table("card", ("what is done to the images", ">accuracy"), [(what, percent(value)) for what, value in card.rows()])


def _mesh(devices: int | None) -> Any:
    """A mesh over so many devices, or over those of all processes; None for one."""
    if jax.process_count() == 1 and (devices is None or devices == 1):
        return None
    return jax.sharding.Mesh(np.asarray(jax.devices()[:devices]), ("data",))


def _save_adversarial(path: Path, x: Any, x_adv: Any, y: Any, index: Any, success: Any, threat: Any) -> None:
    """Write examples and adversarial examples; sizes are measured in float64 on what is stored."""
    size = np.asarray(threat.size(np.asarray(x_adv, np.float64), np.asarray(x, np.float64)))
    arrays = {"x": x, "x_adv": x_adv, "y": y, "index": index, "success": success, "size": size}
    files.save_arrays(path, {name: np.asarray(value) for name, value in arrays.items()})
    say(f"Adversarial examples: {path} ({', '.join(arrays)}).")


# --------------------------------------------------------------------------------------------------------------- attack


def run_attack(config: configs.Attack) -> int:
    """Run one attack on every example, also on those that are misclassified without it.

    Args:
      config: the arguments.

    Returns:
      The exit code.

    Raises:
      UsageError: on arguments that cannot be used.
    """
    if jax.process_count() > 1:
        raise UsageError("--distributed must be 'off' for attack, which runs in one process. Use evaluate --attacks.")
    builder = check.choice("attack", config.attack, ATTACKS)
    loaded, source, targets = _inputs(config)
    given = () if config.eps is None else (config.eps,)
    eps, *_ = sources.budgets(given, config.norm, source.name, loaded)
    threat = sources.threat(config.norm, eps, source)
    attack = builder(threat, **_settings(config, builder))
    save_adv = files.npz_path(config.save_adv)
    x, y = source.all()
    key = jax.random.key(config.seed)
    began = time.perf_counter()
    clean = evaluate.logits_of(loaded.model, x, config.batch_size)
    if not np.isfinite(clean).all(-1).any():
        raise UsageError(
            f"the model {loaded.name!r} must return finite logits; got NaN or infinity for all {len(x)} "
            f"examples. Were weights loaded?"
        )
    goal = _goal(config, targets, y, source.index, clean)
    with Progress() as progress:
        found = _worst(config, attack, key, loaded.model, x, goal, source.index, threat, progress)
    _show_attack(config, attack, clean, y, found, threat, time.perf_counter() - began)
    if save_adv is not None:
        _save_adversarial(save_adv, x, found["x_adv"], y, source.index, found["success"], threat)
    return OK


def _settings(config: configs.Attack, builder: Callable) -> dict[str, Any]:
    """What was given beside the attack's defaults."""
    given: dict[str, Any] = {}
    if config.steps is not None:
        check.whole("steps", config.steps)
        given["steps"] = config.steps
    if config.step_size is not None:
        given["step_size"] = fraction(config.step_size, "step_size")
        check.positive(
            "step_size", given["step_size"], "It is in the units of eps; a usual value is 2.5 * eps / steps."
        )
    taken = inspect.signature(builder).parameters
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    for name in given:
        if name not in taken and not free:
            raise UsageError(
                f"--{name.replace('_', '-')} must be left out for {config.attack}, which has no such setting; "
                f"got {given[name]}."
            )
    return given


def _goal(config: configs.Attack, targets: Any, y: Any, index: Any, clean: Any) -> Any:
    """What the attack is given in the place of labels."""
    if targets is None:
        return y
    classes = clean.shape[-1]
    if isinstance(targets, str):
        if targets == "next":
            targets = (y + 1) % classes
        elif targets == "random":
            shift = np.random.default_rng(np.random.SeedSequence([config.seed, 0x7A6])).integers(
                1, classes, 1 + int(np.max(index))
            )
            targets = (y + shift[index]) % classes
        else:
            targets = np.where(np.arange(classes) == y[:, None], np.inf, np.nan_to_num(clean, nan=np.inf)).argmin(-1)
    return Targets(label=y, target=np.asarray(targets, np.int32))  # pyright: ignore[reportArgumentType]


def _worst(
    config: configs.Attack,
    attack: Any,
    key: Any,
    model: Any,
    x: Any,
    goal: Any,
    index: Any,
    threat: Any,
    progress: Progress,
) -> Any:
    """Run all restarts; keep for each example the first verified success, else the last point."""
    n, batch = len(x), min(config.batch_size, len(x))
    server = evaluate.Server(model, x, goal, index=index, slots=config.slots, mesh=_mesh(config.devices))
    found = {"x_adv": x.copy(), "success": np.zeros(n, bool), "predicted": np.full(n, -1), "size": np.zeros(n)}
    found |= {name: np.zeros(n, np.int64) for name in ("queries", "grads")} | {"refused": 0}
    done = 0
    for restart in range(config.restarts):
        rows = np.flatnonzero(~found["success"])
        if not len(rows):
            break
        for at, result in server.drain(attack, key, rows, restart=restart):
            points = np.asarray(result.x, np.float32)
            mine = jax.tree.map(lambda a, at=at: a[at], goal)
            verdict = evaluate.verify(model, points, x[at], mine, threat, batch_size=batch)
            found["refused"] += int((np.asarray(result.success) & ~verdict.broken).sum())
            kept = verdict.feasible
            found["x_adv"][at[kept]] = points[kept]
            for name in ("size", "predicted"):
                found[name][at[kept]] = getattr(verdict, name)[kept]
            found["success"][at] = verdict.broken
            found["queries"][at] += result.queries
            found["grads"][at] += result.grads
            done += len(at)
            progress(done, n * (restart + 1), f"{config.attack}, restart {restart + 1} of {config.restarts}")
        done = n * (restart + 1)
    return found


def _show_attack(
    config: configs.Attack, attack: Any, clean: Any, y: Any, found: dict[str, Any], threat: Any, seconds: float
) -> None:
    """Print what one attack did."""
    n, correct = len(y), np.isfinite(clean).all(-1) & (clean.argmax(-1) == y)
    size = found["size"][found["success"]]
    rows = [
        ("examples", n),
        ("clean accuracy", percent(correct.mean(), evaluate.clopper_pearson(int(correct.sum()), n))),
    ]
    if config.targeted is None:
        robust = int((~found["success"] & correct).sum())
        rows.append(("accuracy under attack", percent(robust / n, evaluate.clopper_pearson(robust, n))))
    else:
        hits = int(found["success"].sum())
        rows.append((f"target reached ({config.targeted})", percent(hits / n, evaluate.clopper_pearson(hits, n))))
    rows += [
        ("threat", f"{threat.norm} {float(threat.eps):g}"),
        ("steps", attack.max_steps),
        ("restarts", config.restarts),
    ]
    if len(size):
        rows.append(("size of successes", f"median {np.median(size):.4g}, largest {size.max():.4g}"))
    rows += [("gradients for each example", f"{found['grads'].mean():.1f}"), ("seconds", f"{seconds:.1f}")]
    if found["refused"]:
        rows.append(("claims refused", f"{found['refused']} successes did not hold when checked"))
    table(f"{config.attack} on {config.data or 'the data of the run'}", ("what", ">value"), rows)


# --------------------------------------------------------------------------------------------------------------- report


def run_report(config: configs.Report) -> int:
    """Show stored reports: a table, or one page.

    Args:
      config: the arguments.

    Returns:
      The exit code.

    Raises:
      UsageError: on arguments that cannot be used.
    """
    if not config.reports:
        raise UsageError(
            "report needs at least one file report.json or a folder that holds one; got none. E.g. jaxadv report demo"
        )
    loaded = [_read(path) for path in config.reports]
    if config.robustbench is not None:
        if config.robustbench.suffix != ".json":
            raise UsageError(f"--robustbench must end in .json; got {config.robustbench}. E.g. --robustbench rb.json")
        files.writable(config.robustbench.parent, "--robustbench")
        text = json.dumps([entry for report in loaded for entry in report.robustbench()], indent=2) + "\n"
        atomic_write(config.robustbench, lambda file: file.write(text.encode()))
        say(f"RobustBench entries: {config.robustbench}")
    if config.out is None:
        for report in loaded:
            show_models(report)
            show_flags(report)
        return OK
    from jaxadv.evaluate import html, markdown

    kinds = {".html": html.render, ".md": markdown.render}
    if config.out.suffix not in kinds:
        raise UsageError(f"--out must end in .html or .md; got {config.out}. E.g. --out page.html")
    files.writable(config.out.parent)
    text = kinds[config.out.suffix](_merged(loaded, config.reports))
    atomic_write(config.out, lambda file: file.write(text.encode()))
    say(f"Page: {config.out}")
    return OK


def _read(path: Path) -> evaluate.Report:
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"a report must be a file report.json or a folder that holds one; got {path}. Write one: jaxadv "
            f"evaluate MODEL"
        )
    if path.name == "report.json" and (path.parent / "adversarial.npz").is_file():
        path = path.parent  # with the pictures
    try:
        return evaluate.load(path)
    except ValueError as error:
        raise UsageError(f"{file} must be a report of jaxadv; {error}") from error


def run_verify_report(config: configs.VerifyReport) -> int:
    """Check the adversarial examples of a stored report again.

    Args:
      config: the arguments.

    Returns:
      The exit code: 1 if an example does not hold.

    Raises:
      UsageError: if there is no report, no examples, or no model.
    """
    folder = config.report if config.report.is_dir() else config.report.parent
    report = _read(config.report)
    if report.x is None:
        raise UsageError(
            f"verify-report needs the examples, {folder / 'adversarial.npz'}; there is no such file. Evaluate again."
        )
    spec = config.model
    if spec is None:
        try:
            spec = str(json.loads((folder / EVALUATION).read_text())["model"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(
                f"verify-report needs the model; {folder / EVALUATION} names none. "
                f"Pass it: jaxadv verify-report {shlex.quote(str(config.report))} --model MODEL"
            ) from None
    model = sources.load_model(spec).model
    wrong = evaluate.verify_report(report, model, batch_size=config.batch_size)
    checked = sum(by >= 0 for m in report.models for by in m.examples["by"])
    for place, row, words in wrong:
        note(f"{report.models[place].name}: example {report.models[place].examples['index'][row]} (row {row}): {words}")
    if wrong:
        rows = len({(place, row) for place, row, _ in wrong})
        say(f"{rows} rows of the report do not hold; {checked} adversarial examples were checked.")
        return FLAGGED
    say(f"All {checked} adversarial examples hold: float32, within bounds and budget, misclassified by {spec}.")
    return OK


def _merged(loaded: list[evaluate.Report], paths: tuple[Path, ...]) -> evaluate.Report:
    """Put reports on one page; models of one name are told apart by the folder they come from."""
    names = [m.name for report in loaded for m in report.models]
    apart = []
    for report, path in zip(loaded, paths):
        where = (path if path.is_dir() else path.parent).resolve().name
        renamed = [
            dataclasses.replace(m, name=f"{m.name} ({where})") if names.count(m.name) > 1 else m for m in report.models
        ]
        timing = [dict(t, name=m.name) for t, m in zip(report.timing.get("models", []), renamed)]
        apart.append(dataclasses.replace(report, models=renamed, timing={**report.timing, "models": timing}))
    return apart[0] if len(apart) == 1 else evaluate.merge(*apart)


# ----------------------------------------------------------------------------------------------------------------- list

DATA_SETS = {
    "digits": "handwritten digits, 8 x 8, built in (Alpaydin and Kaynak 1998, CC BY 4.0)",
    "mnist": "handwritten digits, 28 x 28, IDX files in DATA_ROOT/mnist (LeCun, Cortes and Burges 1998)",
    "cifar10_jpeg": "ten kinds of things, 32 x 32 x 3, JPEG copies in DATA_ROOT/cifar10_jpeg (Krizhevsky 2009)",
}
"""One line for each data set by name."""


def first_line(thing: Any) -> str:
    """Return the first line of a docstring, without the word "Return".

    Args:
      thing: anything with a docstring.

    Returns:
      The line, or nothing.
    """
    line = (inspect.getdoc(thing) or "").strip().split("\n")[0].removeprefix("Return ")
    return line[:1].upper() + line[1:]


def _protocol(stages: Any) -> str:
    def words(stage: Any) -> str:
        name = (
            stage.attack
            if isinstance(stage.attack, str)
            else getattr(stage.attack, "name", getattr(stage.attack, "__name__", "?"))
        )
        settings = [f"{k} {getattr(v, '__name__', v)}" for k, v in stage.settings if k != "name"]
        shown = f" ({', '.join(settings)})" if settings else ""
        return name + shown + (f" x {stage.restarts}" if stage.restarts > 1 else "")

    return ", then ".join(words(stage) for stage in stages("linf"))


def run_list(config: configs.List) -> int:
    """List what there is, with one line about each.

    Args:
      config: the arguments.

    Returns:
      The exit code.
    """
    every: dict[str, Callable[[], dict[str, str]]] = {
        "attacks": lambda: {name: first_line(made) for name, made in ATTACKS.items()},
        "threats": lambda: {name: first_line(made) for name, made in THREATS.items()},
        "recipes": lambda: {name: first_line(made) for name, made in train.RECIPES.items()},
        "models": lambda: {name: first_line(made) for name, made in sources.NETS.items()},
        "data": lambda: {
            **{name: DATA_SETS.get(name, "") for name in data_room.SOURCES},
            "FILE.npz": "your own arrays x and y (and bounds, classes)",
            "tfds:NAME": "a tfds data set prepared as array_record in DATA_ROOT",
        },
        "protocols": lambda: {name: _protocol(stages) for name, stages in evaluate.PROTOCOLS.items()},
    }
    for what, rows in every.items():
        if config.what in ("all", what):
            table(what, ("name", "what it is"), rows().items())
    return OK


# ----------------------------------------------------------------------------------------------------- claims and bench


def run_data(config: configs.Data) -> int:
    """Make an array_record set of raw files.

    Args:
      config: the arguments.

    Returns:
      The exit code.
    """
    folder = data_room.prepare(config.raw, config.name, config.out, size=config.size)
    for split in ("train", "validation", "test"):
        if list(folder.glob(f"{config.name}-{split}.*")):
            made = data_room.tfds_source(folder, "train+validation" if split == "train" else split)
            say(f"{split}: {len(made)} examples of shape {made.shape} in {made.classes} classes.")
    out = shlex.quote(str(config.out))
    say(f"{folder}: use it with --data tfds:{config.name} --data-root {out}")
    return OK


def run_claims(config: configs.Claims) -> int:
    """List, run or tabulate claims of a source checkout.

    Args:
      config: the arguments.

    Returns:
      The exit code.

    Raises:
      UsageError: if there is no checkout, or no claim of that name.
    """
    from jaxadv.cli import claims

    if config.action == "list":
        found = claims.claims_list(config.root)
        table(
            "claims",
            ("name", "tier", "verdict", "claim"),
            [[row[k] for k in ("name", "tier", "verdict", "sentence")] for row in found],
        )
    elif config.action == "table":
        for path in claims.claims_table(config.root):
            say(str(path))
    else:
        if config.name is None:
            raise UsageError("claims run needs the name of a claim; got none. See: jaxadv claims list")
        record = claims.claims_run(config.root, config.name, smoke=config.smoke)
        say(
            f"{config.name}: {record.get('verdict', 'no verdict')}"
            + (f" -> {record['path']}" if record.get("path") else " (not stored)")
        )
    return OK


def run_bench(config: configs.Bench) -> int:
    """List or run benchmarks of a source checkout.

    Args:
      config: the arguments.

    Returns:
      The exit code, that of the benchmark.

    Raises:
      UsageError: if there is no checkout, or no benchmark of that name.
    """
    from jaxadv.cli import claims

    if config.action == "list":
        table(
            "benchmarks", ("name", "purpose"), [(row["name"], row["purpose"]) for row in claims.bench_list(config.root)]
        )
        return OK
    if config.name is None:
        raise UsageError("bench run needs the name of a benchmark; got none. See: jaxadv bench list")
    return claims.bench_run(config.root, config.name)
