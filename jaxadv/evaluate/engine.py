"""The evaluation: attacks on the survivors of one another, every success verified, every example accounted for.

What lives here: the loop over budgets, attacks and restarts, what is entered about each example, and what a resumed run
takes over from its journal. What does not: attacks, how they are served (`slots`), the verdict (`verdict`), the records
(`ledger`), what is told about them (`findings`), pages.

The rules of honesty:

1. The clean prediction is counted once. A misclassified example is not robust, is not attacked and is returned as it
   is.
2. A point counts only after verification apart from the attack: float32, feasible in float64 (`core.feasible`), and the
   model asked again through a forward pass of its own at matrix precision "highest". What an attack claims about itself
   decides nothing.
3. Logits that are not finite never count as robust; a point that is not finite never counts as found.
4. Robust accuracy is the worst case over attacks, restarts and smaller budgets of the security curve: an upper bound.
   With a certificate there is a lower bound beside it; certified examples are not attacked, so an attack that would
   contradict the certificate is not looked for.

Programs: one for each (attack structure, number of slots). Attack, model and key are arguments of one jitted function,
so other budgets and other weights reuse it.
"""

import functools
import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import parallel
from jaxadv.attacks.autoattack import fitting, transfer
from jaxadv.core import Threat, as_callable, check, example_keys
from jaxadv.evaluate.findings import cost_of, diagnosed, entry_of
from jaxadv.evaluate.inputs import TARGET_RULES as TARGET_RULES
from jaxadv.evaluate.inputs import Problem, check_curve, choose_targets, data_entry, problem_of, versions
from jaxadv.evaluate.intervals import share
from jaxadv.evaluate.journal import Journal, digest
from jaxadv.evaluate.ledger import Ledger, Outcome, Progress, Seen, Work
from jaxadv.evaluate.protocols import PROTOCOLS, Each, Stage, build, describe, stages_of, with_eps
from jaxadv.evaluate.report import CERTIFIED, MISCLASSIFIED, ROBUST, Report
from jaxadv.evaluate.slots import Server
from jaxadv.evaluate.verdict import batches, cut, logits_of
from jaxadv.evaluate.verdict import verify as verify


class Search(NamedTuple):
    """One pass: an attack, the model it follows, its place in the order of things, and the number of the restart."""

    attack: Any
    model: Any
    name: str
    restart: int


@jax.jit
def _noise(threat, key, x, index):
    return threat.sample(example_keys(key, "noise", index, 0), x)


def _lower(model: Any, x: Any) -> Any:
    return model(x.astype(jnp.bfloat16)).astype(jnp.float32)


def bfloat16(model: Any) -> Any:
    """Return the model with weights and inputs in bfloat16 and logits in float32.

    Args:
      model: logits from a batch, a callable pytree.

    Returns:
      The model that a search may follow; verdicts never ask it.
    """

    def low(leaf):
        wide = hasattr(leaf, "dtype") and leaf.dtype in (np.float32, np.float64)
        return jnp.asarray(leaf, jnp.bfloat16) if wide else leaf

    return jax.tree_util.Partial(_lower, jax.tree.map(low, model))


def _judged(work: Work, rows: np.ndarray, result: Any, threat: Threat) -> Outcome:
    """Judge what an attack returned for some rows."""
    points = np.asarray(result.x, np.float32)
    verdict = work.problem.judge(rows, points, cut(threat, rows, len(work.problem.x)), work.batch)
    none = np.zeros(len(rows), bool)
    return Outcome(
        row=rows,
        **verdict._asdict(),
        claimed=np.asarray(result.success, bool),
        queries=np.asarray(result.queries),
        grads=np.asarray(result.grads),
        zero_gradient=np.asarray(result.flags.get("zero_gradient", none), bool),
        nonfinite=np.asarray(result.flags.get("nonfinite", none), bool) | (verdict.feasible & (verdict.predicted < 0)),
        points=points[verdict.broken],
    )


def _outcomes(work: Work, search: Search, queue: np.ndarray, threat: Threat) -> Iterator[Outcome]:
    """What becomes of the rows of a pass: as they finish, or with several processes when all have finished."""
    own = _own_outcomes(work, search, queue, threat)
    return own if jax.process_count() == 1 else (Outcome(**block) for block in _everybody(o._asdict() for o in own))


def _everybody(blocks: Iterable[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """The blocks of all processes, each process's as one, in the order of processes."""
    mine, file = list(blocks), io.BytesIO()
    if mine:
        np.savez(file, allow_pickle=False, **{name: np.concatenate([b[name] for b in mine]) for name in mine[0]})
    for payload in parallel.exchange(file.getvalue()):
        if payload:
            with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
                yield dict(arrays)


def _own_outcomes(work: Work, search: Search, queue: np.ndarray, threat: Threat) -> Iterator[Outcome]:
    """Give what the journal knows about a pass, then serve the other rows and note them there."""
    rest = work.server.own(queue)
    for block in work.past(search.name):
        outcome = Outcome(**block)
        rest = rest[~np.isin(rest, outcome.row)]
        yield outcome
    slots = work.server.slots
    served = work.server.drain(search.attack, work.problem.key, rest, restart=search.restart, model=search.model)
    for rows, result in served:
        outcome = _judged(work, rows, result, threat)
        if work.server.slots != slots:
            slots = work.server.slots
            work.keep("slots", slots=slots)
        work.keep(search.name, **outcome._asdict())
        yield outcome


def _run_stage(work: Work, number: int, threat: Threat, ledger: Ledger, place: int) -> Seen:
    """Run all restarts of one attack on what is left, verify what it returns, and enter it in the ledger."""
    start, n, stage = time.perf_counter(), len(work.problem.x), work.stages[number]
    attack = build(stage, work.base, threat)
    served = Each(with_eps(work.base, 1.0), stage) if np.ndim(threat.eps) else attack
    counts = dict.fromkeys(("claimed", "refused", "queries", "grads"), 0)
    before, tried, zero, nonfinite, sizes = len(ledger.open()), 0, 0, np.zeros(n, bool), []
    for restart in range(stage.restarts):
        label = f"{attack.name}, restart {restart + 1} of {stage.restarts}, eps {float(np.max(threat.eps)):.4g}"
        queue = ledger.open()
        # Firm examples first: they take the longest, so the quick ones fill the slots in the end.
        queue = queue[np.argsort(-work.margin[queue], kind="stable")]
        work.tick(n - len(queue), label)
        for precision, model in work.searches:
            last, refused = precision == work.searches[-1][0], []
            search = Search(served, model, f"{place}/{number}/{restart}/{precision}", restart)
            for outcome in _outcomes(work, search, queue, threat):
                rows, allowed = outcome.row, cut(threat, outcome.row, n)
                ledger.write(rows, outcome.points, outcome, number, restart)
                refused.append(rows[outcome.claimed & ~outcome.broken])
                if last:
                    counts["claimed"] += int(outcome.claimed.sum())
                    counts["refused"] += len(refused[-1])
                counts["queries"] += int(np.sum(outcome.queries, dtype=np.int64))
                counts["grads"] += int(np.sum(outcome.grads, dtype=np.int64))
                tried += len(rows)
                zero += int(outcome.zero_gradient.sum())
                nonfinite[rows] |= outcome.nonfinite
                sizes.append(np.stack([outcome.size / np.asarray(allowed.eps, np.float64), outcome.broken], -1))
                work.tick(n - len(ledger.open()), label)
            if not last:  # what only the lower precision believed is searched again
                again = np.concatenate([*refused, queue[:0]])
                queue = queue[np.isin(queue, again)]
                work.retried += len(queue)
        work.tick.close(label)
    after = len(ledger.open())
    row = {"name": attack.name, "settings": describe(attack), "restarts": stage.restarts, "attacked": before}
    row |= {"broken": before - after, "claimed": counts["claimed"], "refused": counts["refused"]}
    row |= {"robust_accuracy_after": ledger.held() / n, "queries": counts["queries"], "grads": counts["grads"]}
    sizes = np.concatenate(sizes) if sizes else np.zeros((0, 2))
    return Seen(row, tried, zero, nonfinite, sizes, time.perf_counter() - start)


def _certify(work: Work, threat: Threat, ledger: Ledger, place: int) -> None:
    """Ask the certificate about what is open; what it covers is not attacked."""
    held = ledger.certified()
    ledger.by[held] = ROBUST  # certified at a smaller budget only
    if work.certificate is None:
        return
    problem, name, n = work.problem, f"{place}/certificate", len(work.problem.x)
    rest = ledger.open()
    found = [{"row": block["row"], "holds": block["holds"]} for block in work.past(name)]
    rest = work.server.own(rest)
    for block in found:
        rest = rest[~np.isin(rest, block["row"])]
    for rows, real in batches(rest, problem.batch):
        y = problem.y[rows]
        holds = work.certificate(
            problem.key, problem.model, problem.x[rows], y, cut(threat, rows, n), problem.index[rows]
        )
        holds, rows = np.asarray(holds)[:real], rows[:real]
        if holds.dtype != bool or holds.shape != (real,):
            raise TypeError(
                f"certificate must return bool [b], whether each example is certified; got {holds.dtype}"
                f"{list(holds.shape)} for {len(y)} examples. Radii? Compare them with threat.eps."
            )
        found.append({"row": rows, "holds": holds})
        work.keep(name, **found[-1])
    for block in _everybody(found):
        ledger.by[block["row"][block["holds"]]] = CERTIFIED


def _run_noise(work: Work, number: int, threat: Threat, ledger: Ledger) -> Seen:
    """Try one draw of random noise on what every attack left: a check of the attacks that counts like one."""
    start, problem, n = time.perf_counter(), work.problem, len(work.problem.x)
    queue = ledger.open()
    for rows, real in batches(queue, problem.batch):
        points = np.asarray(_noise(cut(threat, rows, n), problem.key, problem.x[rows], problem.index[rows]), np.float32)
        rows, points = rows[:real], points[:real]
        verdict = problem.judge(rows, points, cut(threat, rows, n))
        ledger.write(rows, points[verdict.broken], verdict, number, 0)
    broken = len(queue) - len(ledger.open())
    row = {"name": "noise", "settings": {"draws": 1}, "restarts": 1, "attacked": len(queue), "broken": broken}
    row |= {"claimed": 0, "refused": 0, "robust_accuracy_after": ledger.held() / n}
    row |= {"queries": len(queue), "grads": 0}
    return Seen(row, len(queue), 0, np.zeros(n, bool), np.zeros((0, 2)), time.perf_counter() - start)


def _carry(problem: Problem, threat: Threat, ledger: Ledger) -> int:
    """Verify at a new budget what was broken at smaller ones, reopen what does not hold, return how many hold."""
    rows = ledger.broken()
    if not len(rows):
        return 0
    holds = problem.judge(rows, ledger.x[rows], cut(threat, rows, len(problem.x))).broken
    lost = rows[~holds]
    ledger.by[lost], ledger.restart[lost], ledger.size[lost] = ROBUST, -1, np.nan
    ledger.x[lost], ledger.adversarial[lost] = problem.x[lost], -1
    return int(holds.sum())


def _sweep(
    work: Work, threat: Threat, budgets: Sequence[float], ledger: Ledger
) -> tuple[Ledger, list[Seen], list[dict], list[dict]]:
    """Evaluate budgets from small to large; return ledger and evidence at the threat's own, the curve, the seconds."""
    main = float(np.max(np.asarray(threat.eps)))
    curve, seconds, kept, evidence, lowest = [], [], ledger, [], 1.0
    n, sampled = len(work.problem.x), type(threat).sample is not Threat.sample
    for place, eps in enumerate(budgets):
        start = time.perf_counter()
        here = threat if eps == main else with_eps(threat, eps)
        carried = _carry(work.problem, here, ledger)
        _certify(work, here, ledger, place)
        seen = [_run_stage(work, i, here, ledger, place) for i in range(len(work.stages))]
        if sampled:
            seen.append(_run_noise(work, len(work.stages), here, ledger))
        lowest = min(lowest, ledger.held() / n)
        value, interval = share(round(lowest * n), n)
        point = {"eps": eps, "robust_accuracy": value, "robust_interval": list(interval)}
        point |= {"certified_accuracy": None if work.certificate is None else len(ledger.certified()) / n}
        curve.append(point | {"broken": len(ledger.broken()), "carried": carried})
        seconds.append({"eps": eps, "seconds": time.perf_counter() - start})
        if eps == main:
            kept, evidence = ledger.copy(), seen
    return kept, evidence, curve, seconds


def _settings_of(function: Any) -> Any:
    """Name of a function and the plain values it was made with, or None."""
    if function is None:
        return None
    if isinstance(function, functools.partial):
        made, inner = {"args": function.args} | function.keywords, function.func
    else:
        cells, inner = getattr(function, "__closure__", None) or (), function
        made = dict(
            zip(getattr(getattr(function, "__code__", None), "co_freevars", ()), (c.cell_contents for c in cells))
        )
    plain = {name: value for name, value in made.items() if isinstance(value, (bool, int, float, str))}
    return [getattr(inner, "__qualname__", type(inner).__name__), plain]


def _mark(work: Work, budgets: Sequence[float], predicted: np.ndarray, fingerprint: str) -> dict[str, Any]:
    """What a journal belongs to: all that decides about a record."""
    problem, protocol = work.problem, []
    for stage in work.stages:
        attack = build(stage, work.base, work.base)
        told = {"name": attack.name, "restarts": stage.restarts, "settings": describe(attack)}
        protocol.append(told | {"arrays": digest(attack)})
    return {
        "key": [str(jax.random.key_impl(problem.key)), *np.asarray(jax.random.key_data(problem.key)).ravel().tolist()],
        "data": fingerprint,
        "model": [digest(problem.model), digest(predicted)],
        "threat": {"norm": work.base.norm, "arrays": digest(work.base)},
        "protocol": protocol,
        "budgets": list(budgets),
        "targets": None if problem.target is None else digest(problem.target),
        "slots": [work.server.slots, work.server.devices, problem.batch],
        "process": [jax.process_index(), jax.process_count()],
        "search": [precision for precision, _ in work.searches],
        "certificate": _settings_of(work.certificate),
        "versions": {**versions(), "device": jax.devices()[0].device_kind},
    }


def evaluate(
    key: Any,
    model: Any,
    x: Any,
    y: Any,
    threat: Threat,
    *,
    attacks: Any = None,
    restarts: int | None = None,
    name: str = "model",
    index: Any = None,
    batch_size: int = 500,
    slots: int | None = None,
    mesh: Any = None,
    search_dtype: str | None = None,
    eps_curve: Sequence[float] = (),
    targets: Any = None,
    certificate: Callable | None = None,
    surrogate: Any = None,
    diagnostics: Any = None,
    journal: Any = None,
    resume: bool = False,
    measure: bool = False,
    data: Any = "",
    seed: int | None = None,
    progress: Callable[[int, int, str], Any] | None = None,
    keep_adversarial: bool = True,
) -> Report:
    """Measure clean and robust accuracy, with intervals, flags, and the outcome of every example.

    Args:
      key: a typed key; the same key gives the same report but for `timing`.
      model: logits `[b, k]` from a batch `[b, ...]`; a callable pytree (new weights then reuse compiled programs) or a
        function.
      x: float `[n, ...]` examples within the threat's bounds.
      y: int `[n]` labels in [0, k).
      threat: what the attacker may do; `eps` a number, or `[n]` with attacks given by name.
      attacks: a name in `PROTOCOLS`, or a tuple of attacks, names in `attacks.ATTACKS`, functions from a threat to an
        attack, and `Stage`s. Default: `standard`, which is AutoAttack.
      restarts: how often every attack runs; None leaves it to the protocol (once for bare attacks).
      name: the model's name in the report.
      index: int `[n]` dataset indices, from which random keys come; `arange(n)` by default.
      batch_size: rows of a forward pass outside the attacks.
      slots: rows of each device that are attacked at once; None chooses, see `slots`. Another number may change
        roundings.
      mesh: a mesh of one axis; each of its devices drains a queue of its own. None is one device. With several
        processes it spans the devices of all, every process calls with the same arguments, attacks and judges its own
        share of the examples, and returns the same report; `journal` then holds a folder for each.
      search_dtype: `"bfloat16"` lets the attacks follow the model in that precision; verdicts stay in float32. None is
        the model as it is.
      eps_curve: further budgets for the security curve.
      targets: None for an untargeted evaluation; int `[n]`; or a rule of `TARGET_RULES`.
      certificate: a function `(key, model, x, y, threat, index) -> bool [b]` that tells of correctly classified
        examples which ones nothing within the threat can change; it must be about this same model. They are not
        attacked, and the report carries a lower bound beside the upper one.
      surrogate: another model whose gradients an attack `transfer` follows, after the others.
      diagnostics: True for the room's `diagnose`, or a function `(key, model, x, y, threat, *, index)` that returns an
        object with `flags` and `numbers`; both go into the report.
      journal: a folder; every finished example is written there before the next ones, see `journal`.
      resume: go on with the journal of the same evaluation that was stopped.
      measure: also time a gradient and a forward pass, for the overhead of each attack in the report's `timing`.
      data: name of the data, a mapping with `name` and `split`, or a source.
      seed: the seed behind `key`, to be stated in the report.
      progress: called with `(done, total, stage)`.
      keep_adversarial: keep examples and adversarial examples in the report, for pictures and `adversarial.npz`.

    Returns:
      A report with one model.

    Raises:
      ValueError: on impossible arguments, a model that returns no finite logits at all, or a journal of another
        evaluation.
      TypeError: on labels or inputs of a wrong dtype, or an untyped key.
      OSError: if the journal cannot be written.

    References:
      Carlini et al. 2019, On evaluating adversarial robustness, arXiv:1902.06705. Croce et al. 2021, RobustBench,
      arXiv:2010.09670.
    """
    start = time.perf_counter()
    problem, classes = problem_of(key, model, x, y, threat, index, batch_size)
    if search_dtype is not None:
        check.choice("search_dtype", search_dtype, {"bfloat16": bfloat16})
    if resume and journal is None:
        raise ValueError("resume needs the journal of the evaluation that was stopped; got none. Pass journal=folder.")
    stages, left_out = _stages(attacks, restarts, threat, problem, targets is not None, surrogate)
    budgets = check_curve(threat, eps_curve)
    n = len(problem.x)
    clean = logits_of(problem.model, problem.x, problem.batch)
    finite = np.isfinite(clean).all(-1)
    if not finite.any():
        raise ValueError(
            f"the model must return finite logits; got NaN or infinity for all {n} examples. Were weights loaded?"
        )
    rule = None
    if targets is not None:
        target, rule = choose_targets(targets, key, problem.y, problem.index, clean)
        problem = problem._replace(target=target)
    predicted = np.where(finite, clean.argmax(-1), -1)
    correct = predicted == problem.y
    ledger = Ledger(
        by=np.where(correct, ROBUST, MISCLASSIFIED),
        restart=np.full(n, -1),
        size=np.where(correct, np.nan, 0.0),
        adversarial=predicted.copy(),
        x=problem.x.copy(),
    )
    eps = threat.eps if np.ndim(threat.eps) else None
    server = Server(problem.model, problem.x, problem.goal(), index=problem.index, eps=eps, slots=slots, mesh=mesh)
    full = ("float32", problem.model)
    work = Work(
        problem=problem,
        base=threat,
        stages=stages,
        server=server,
        searches=(full,) if search_dtype is None else ((search_dtype, bfloat16(problem.model)), full),
        margin=_margin(clean, problem.y),
        batch=min(problem.batch, server.slots * server.devices),
        certificate=certificate,
        journal=None,
        tick=Progress(progress, sum(s.restarts for s in stages) * len(budgets), n),
    )
    entry_of_data = data_entry(data, problem, classes)
    if journal is not None:
        mark = _mark(work, budgets, predicted, entry_of_data["fingerprint"])
        number = jax.process_index()  # every process keeps a journal of its own rows
        folder = Path(journal) / f"process-{number}" if number else journal
        work.journal = Journal(folder, mark, resume=resume)
        for block in work.past("slots"):
            server.slots = int(block["slots"])
    clean_seconds = time.perf_counter() - start
    try:
        kept, seen, curve, seconds = _sweep(work, threat, budgets, ledger)
        if work.journal is not None:
            work.journal.finish()
    finally:
        if work.journal is not None:
            work.journal.close()
    timing = {"name": name, "total": 0.0, "clean": clean_seconds}
    timing |= {"attacks": [{"name": s.row["name"], "seconds": s.seconds} for s in seen], "curve": seconds}
    if measure:
        timing["cost"] = cost_of(work, seen)
    entry = entry_of(work, name, kept, seen, curve if len(eps_curve) else [], clean, predicted, rule, keep_adversarial)
    entry.statements.extend(left_out)
    if diagnostics is not None and diagnostics is not False:
        entry = diagnosed(diagnostics, problem, threat, entry)
    timing["total"] = time.perf_counter() - start
    return Report(
        versions=versions(),
        device=jax.devices()[0].device_kind,
        seed=seed,
        key=np.asarray(jax.random.key_data(key)).ravel().tolist(),
        data=entry_of_data,
        models=[entry],
        timing={"models": [timing]},
        x=problem.x if keep_adversarial else None,
    )


def _stages(
    attacks: Any, restarts: int | None, threat: Threat, problem: Problem, targeted: bool, surrogate: Any
) -> tuple[tuple[Stage, ...], list[str]]:
    """The attacks that fit these inputs, and sentences about those of a protocol that do not."""
    named = attacks is None or isinstance(attacks, str) and attacks in PROTOCOLS
    stages, left_out = stages_of(attacks, restarts, threat.norm), []
    if named:  # what was asked for by itself is tried, and says itself what it needs
        stages, left_out = fitting(stages, problem.x.shape[1:], targeted)
    if surrogate is not None:
        stages = (*stages, Stage(lambda threat: transfer(threat, as_callable(surrogate, "surrogate"))))
    return stages, left_out


def _margin(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far the logit of the label stands above the others; lowest where logits are not finite."""
    own = np.arange(logits.shape[1]) == y[:, None]
    with np.errstate(invalid="ignore"):
        margin = logits.max(-1, where=own, initial=-np.inf) - logits.max(-1, where=~own, initial=-np.inf)
    return np.nan_to_num(margin, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
