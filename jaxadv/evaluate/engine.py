"""The evaluation: attacks on the survivors of one another, every success verified, every example accounted for.

What lives here: the loop over budgets, attacks and restarts, the one verdict (`verify`), protocols as data, and the
seam through which attacks are served (`survivors`). What does not: attacks, flags, intervals, pages.

The rules of honesty:

1. The clean prediction is counted once. A misclassified example is not robust, is not attacked and is returned as it
   is.
2. A point counts only after verification apart from the attack: float32, feasible in float64 (`core.feasible`), and the
   model asked again through a forward pass of its own at matrix precision "highest". What an attack claims about itself
   decides nothing.
3. Logits that are not finite never count as robust; a point that is not finite never counts as found.
4. Robust accuracy is the worst case over attacks, restarts and smaller budgets of the security curve.

Programs: one for each (attack structure, batch shape). Attack, model and key are arguments of one jitted function, so
other budgets and other weights reuse it.
"""

import dataclasses
import hashlib
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import __version__
from jaxadv.core import Attack, Result, Targets, Threat, check, example_keys, feasible, run
from jaxadv.evaluate import flags as red
from jaxadv.evaluate.intervals import share
from jaxadv.evaluate.protocols import Stage, build, describe, stages_of, with_eps
from jaxadv.evaluate.report import MISCLASSIFIED, ROBUST, ModelReport, Report

TARGET_RULES = ("random", "next", "least_likely")


class Verdict(NamedTuple):
    """What a point is worth, one row for each example; numpy arrays."""

    feasible: np.ndarray
    broken: np.ndarray
    size: np.ndarray
    predicted: np.ndarray


class Problem(NamedTuple):
    """Checked arguments, on the host."""

    key: Any
    model: Any
    x: np.ndarray
    y: np.ndarray
    target: np.ndarray | None
    index: np.ndarray
    batch: int

    def goal(self, rows: np.ndarray) -> Any:
        """Return what the attacks on these rows are given in the place of `y`."""
        if self.target is None:
            return self.y[rows]
        return Targets(self.y[rows], self.target[rows])  # pyright: ignore[reportArgumentType]

    def judge(self, rows: np.ndarray, points: np.ndarray, threat: Threat) -> Verdict:
        """Return the verdict on points for these rows, under a threat cut for them."""
        return _verdict(self.model, points, self.x[rows], self.goal(rows), _host(threat), self.batch)


@dataclasses.dataclass
class Ledger:
    """The outcome of every example so far; `by` is read as in `report`."""

    by: np.ndarray
    restart: np.ndarray
    size: np.ndarray
    adversarial: np.ndarray
    x: np.ndarray

    def open(self) -> np.ndarray:
        """Return the rows that nothing has broken."""
        return np.flatnonzero(self.by == ROBUST)

    def broken(self) -> np.ndarray:
        """Return the rows that an attack has broken."""
        return np.flatnonzero(self.by >= 0)

    def write(self, rows: np.ndarray, points: np.ndarray, verdict: Verdict, by: int, restart: int) -> None:
        """Enter the broken ones among these rows."""
        hit = verdict.broken
        at = rows[hit]
        self.by[at], self.restart[at] = by, restart
        self.size[at], self.adversarial[at] = verdict.size[hit], verdict.predicted[hit]
        self.x[at] = points[hit]

    def copy(self) -> "Ledger":
        """Return a copy that shares no memory."""
        return Ledger(*(getattr(self, f.name).copy() for f in dataclasses.fields(self)))


@jax.jit
def _forward(model, x):
    return model(x)


@jax.jit
def _attack(attack, key, model, x, y, index, restart):
    return run(attack, key, model, x, y, index=index, restart=restart)


@jax.jit
def _noise(threat, key, x, index):
    return threat.sample(example_keys(key, "noise", index, 0), x)


def _batches(rows: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """Cut rows into batches of one size; the last is filled up with its own last row."""
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        yield np.concatenate([part, np.repeat(part[-1:], batch - len(part))]), len(part)


def logits_of(model: Any, x: np.ndarray, batch_size: int = 500) -> np.ndarray:
    """Ask the model, batch by batch, at matrix precision "highest".

    Args:
      model: logits from a batch.
      x: `[n, ...]`.
      batch_size: rows of a batch; the last is padded.

    Returns:
      float32 `[n, k]`.
    """
    return _logits(model, x, min(batch_size, len(x)))


def _logits(model: Any, x: np.ndarray, batch: int) -> np.ndarray:
    """Logits through batches of exactly this many rows, so that few rows do not ask for a program of their own."""
    with jax.default_matmul_precision("highest"):
        found = [np.asarray(_forward(model, x[rows]), np.float32)[:m] for rows, m in _batches(np.arange(len(x)), batch)]
    return np.concatenate(found)


def verify(model: Any, x_adv: Any, x: Any, y: Any, threat: Threat, *, batch_size: int = 500) -> Verdict:
    """Judge points apart from the attack that made them; also stored ones and ones from elsewhere.

    Args:
      model: logits from a batch.
      x_adv: `[n, ...]` the points; judged as float32.
      x: `[n, ...]` the examples they belong to.
      y: int `[n]` labels, or `Targets`.
      threat: the allowed set; its `eps` a number or `[n]`.
      batch_size: rows of a forward pass.

    Returns:
      `feasible`, `broken` (feasible, and the logits are not finite, or the largest is not the label's or, with targets,
      is the target's), `size` in float64, `predicted` class (-1 where logits are not finite).

    Raises:
      ValueError: if the shapes of `x_adv` and `x` differ.
    """
    x_adv, x = np.asarray(x_adv, np.float32), np.asarray(x, np.float32)
    if x_adv.shape != x.shape:
        raise ValueError(f"x_adv must have the shape of x, {x.shape}; got {x_adv.shape}. Points of another selection?")
    return _verdict(_callable(model), x_adv, x, y, _host(threat), min(batch_size, len(x)))


def _verdict(model: Any, x_adv: np.ndarray, x: np.ndarray, y: Any, threat: Threat, batch: int) -> Verdict:
    """The verdict of `verify`, through batches of exactly this many rows; the threat has numpy leaves."""
    allowed, size = np.zeros(len(x), bool), np.zeros(len(x))
    for start in range(0, len(x), batch):
        rows = slice(start, start + batch)
        part = _cut(threat, np.arange(len(x))[rows], len(x))
        with np.errstate(invalid="ignore"):
            allowed[rows] = feasible(part, x_adv[rows], x[rows])
            size[rows] = part.size(x_adv[rows].astype(np.float64), x[rows].astype(np.float64))
    logits = _logits(model, x_adv, batch)
    finite = np.isfinite(logits).all(-1)
    predicted = np.where(finite, logits.argmax(-1), -1)
    wrong = predicted == np.asarray(y.target) if isinstance(y, Targets) else predicted != np.asarray(y)
    return Verdict(allowed, allowed & (wrong | ~finite), size, predicted)


def survivors(
    attack: Any, key: Any, model: Any, x: np.ndarray, y: Any, *, index: np.ndarray, restart: int, batch_size: int
) -> Iterator[tuple[np.ndarray, Result]]:
    """Run an attack on a queue of examples. The seam: another way of serving replaces this function and nothing else.

    Args:
      attack: an attack, or a function from row numbers to the attack on these rows.
      key: a typed key.
      model: logits from a batch.
      x: `[m, ...]` the queue.
      y: labels or `Targets`, `[m]`.
      index: int `[m]` dataset indices.
      restart: number of the restart.
      batch_size: rows of a batch.

    Yields:
      `(rows, result)`: row numbers in the queue, in any order, each once, with their results as numpy arrays.
    """
    for rows, real in _batches(np.arange(len(x)), batch_size):
        one = attack if isinstance(attack, Attack) else attack(rows)
        goal = jax.tree.map(lambda a, rows=rows: a[rows], y)
        found = _attack(one, key, model, x[rows], goal, index[rows], np.uint32(restart))
        yield rows[:real], jax.tree.map(lambda a, real=real: np.asarray(a)[:real], found)


def _callable(model: Any) -> Any:
    """Make a plain function a pytree; leave pytrees alone."""
    leaves = jax.tree.leaves(model)
    return jax.tree_util.Partial(model) if len(leaves) == 1 and leaves[0] is model else model


def _host(threat: Threat) -> Threat:
    """The threat with numpy leaves, so that verdicts are taken in float64."""
    return jax.tree.map(np.asarray, threat)


def _cut(threat: Threat, rows: np.ndarray, n: int) -> Threat:
    """The threat for some of n rows, where each has a budget of its own."""
    eps = np.asarray(threat.eps)
    if eps.ndim == 0:
        return threat
    if eps.shape != (n,):
        raise ValueError(f"eps must be a number or one for each of the {n} examples; got shape {eps.shape}.")
    return dataclasses.replace(threat, eps=eps[rows])  # pyright: ignore[reportArgumentType]


def _check_model(model: Any, x: np.ndarray) -> int:
    """Trace the model once on abstract values; return the number of classes or say what is wrong."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    try:
        out = jax.eval_shape(model, shape)
    except Exception as error:
        hint = "Examples of another data set, or a model that takes keyword arguments?"
        if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
            hint = "This looks like channels first (NCHW); images are [b, h, w, c]: pass x.transpose(0, 2, 3, 1)."
        elif x.ndim == 4:
            hint = "A model that wants channels first (NCHW)? Transpose inside the model: x.transpose(0, 3, 1, 2)."
        elif x.ndim in (2, 3):
            hint = "A model that wants images [b, h, w, c]? Reshape x, or reshape inside the model."
        short = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ValueError(
            f"the model must take a batch of shape {x.shape}; it raised {type(error).__name__}: {short}. {hint}"
        ) from error
    check.logits(out, x.shape[0])
    return int(out.shape[1])


def _check_curve(threat: Threat, eps_curve: Sequence[float]) -> tuple[float, ...]:
    """Return the budgets to evaluate, rising; the threat's own is among them if there is a curve."""
    names = [f.name for f in dataclasses.fields(threat)] if dataclasses.is_dataclass(threat) else []
    for eps in eps_curve:
        check.positive("every eps of eps_curve", eps, "The accuracy at 0 is the clean accuracy.")
    if len(eps_curve) and ("eps" not in names or np.ndim(threat.eps)):
        raise ValueError(
            f"eps_curve needs a threat with one number as its budget; got {threat.norm!r}. Evaluate each budget by "
            f"itself."
        )
    main = float(np.max(np.asarray(threat.eps)))
    return tuple(sorted({float(e) for e in eps_curve if not math.isclose(e, main, rel_tol=1e-6)} | {main}))


def _targets(targets: Any, key: Any, y: np.ndarray, index: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the target class of every example and the name of the rule."""
    k = logits.shape[1]
    if not isinstance(targets, str):
        check.labels(targets, len(y), k, name="targets")
        target, rule = np.asarray(targets, np.int32), "given"
    else:
        rule = check.choice("rule for targets", targets, TARGET_RULES)
        if rule == "next":
            target = (y + 1) % k
        elif rule == "random":
            keys = example_keys(key, "targets", jnp.asarray(index))
            draw = np.asarray(jax.vmap(lambda one: jax.random.randint(one, (), 1, k))(keys))
            target = (y + draw) % k
        else:
            others = np.where(np.arange(k) == y[:, None], np.inf, np.nan_to_num(logits, nan=np.inf))
            target = others.argmin(-1)
    same = np.flatnonzero(target == y)
    if len(same):
        raise ValueError(
            f"targets must differ from the labels; got the label itself for {len(same)} examples, first at row "
            f"{same[0]}. "
            "Leave those examples out, or pass targets='next'."
        )
    return target.astype(np.int32), rule


class _Progress:
    """Counts examples over all passes (budget, attack, restart) for the caller's progress bar."""

    def __init__(self, tell: Callable | None, passes: int, n: int):
        self.tell, self.total, self.n, self.finished = tell, passes * n, n, 0

    def __call__(self, done: int, stage: str) -> None:
        """Tell that `done` of the n examples of this pass are decided."""
        if self.tell is not None:
            self.tell(self.finished + done, self.total, stage)

    def close(self, stage: str) -> None:
        """End a pass."""
        self.finished += self.n
        self(0, stage)


class _Seen(NamedTuple):
    """What one attack showed at one budget: its row of the table and the evidence for the flags."""

    row: dict[str, Any]
    rows: int
    zero_gradient: int
    nonfinite: np.ndarray
    sizes: np.ndarray
    seconds: float


def _run_stage(
    problem: Problem, stage: Stage, number: int, base: Threat, threat: Threat, ledger: Ledger, tick: _Progress
) -> _Seen:
    """Run all restarts of one attack on what is left, verify what it returns, and enter it in the ledger."""
    start, n, apart = time.perf_counter(), len(problem.x), np.ndim(threat.eps) > 0
    attack = build(stage, base, _cut(threat, np.arange(problem.batch), n))
    counts = dict.fromkeys(("claimed", "refused", "queries", "grads"), 0)
    before, tried, zero, nonfinite, sizes = len(ledger.open()), 0, 0, np.zeros(n, bool), []
    for restart in range(stage.restarts):
        label = f"{attack.name}, restart {restart + 1} of {stage.restarts}, eps {float(np.max(threat.eps)):.4g}"
        queue = ledger.open()
        tick(n - len(queue), label)
        one = attack if not apart else lambda part, queue=queue: build(stage, base, _cut(threat, queue[part], n))
        served = survivors(
            one,
            problem.key,
            problem.model,
            problem.x[queue],
            problem.goal(queue),
            index=problem.index[queue],
            restart=restart,
            batch_size=problem.batch,
        )
        for part, result in served:
            rows, points = queue[part], np.asarray(result.x, np.float32)
            allowed = _cut(threat, rows, n)
            verdict = problem.judge(rows, points, allowed)
            ledger.write(rows, points, verdict, number, restart)
            claimed = np.asarray(result.success, bool)
            counts["claimed"] += int(claimed.sum())
            counts["refused"] += int((claimed & ~verdict.broken).sum())
            counts["queries"] += int(np.sum(result.queries, dtype=np.int64))
            counts["grads"] += int(np.sum(result.grads, dtype=np.int64))
            tried += len(rows)
            zero += int(np.sum(result.flags.get("zero_gradient", 0)))
            nonfinite[rows] |= result.flags.get("nonfinite", False) | (verdict.feasible & (verdict.predicted < 0))
            sizes.append(np.stack([verdict.size / np.asarray(allowed.eps, np.float64), verdict.broken], -1))
            tick(n - len(ledger.open()), label)
        tick.close(label)
    after = len(ledger.open())
    row = {"name": attack.name, "settings": describe(attack), "restarts": stage.restarts, "attacked": before}
    row |= {"broken": before - after, "claimed": counts["claimed"], "refused": counts["refused"]}
    row |= {"robust_accuracy_after": after / n, "queries": counts["queries"], "grads": counts["grads"]}
    sizes = np.concatenate(sizes) if sizes else np.zeros((0, 2))
    return _Seen(row, tried, zero, nonfinite, sizes, time.perf_counter() - start)


def _run_noise(problem: Problem, number: int, threat: Threat, ledger: Ledger) -> _Seen:
    """Try one draw of random noise on what every attack left: a check of the attacks that counts like one."""
    start, n = time.perf_counter(), len(problem.x)
    queue = ledger.open()
    for rows, real in _batches(queue, problem.batch):
        points = np.asarray(
            _noise(_cut(threat, rows, n), problem.key, problem.x[rows], problem.index[rows]), np.float32
        )
        rows, points = rows[:real], points[:real]
        verdict = problem.judge(rows, points, _cut(threat, rows, n))
        ledger.write(rows, points, verdict, number, 0)
    broken = len(queue) - len(ledger.open())
    row = {"name": "noise", "settings": {"draws": 1}, "restarts": 1, "attacked": len(queue), "broken": broken}
    row |= {"claimed": 0, "refused": 0, "robust_accuracy_after": (len(queue) - broken) / n}
    row |= {"queries": len(queue), "grads": 0}
    return _Seen(row, len(queue), 0, np.zeros(n, bool), np.zeros((0, 2)), time.perf_counter() - start)


def _carry(problem: Problem, threat: Threat, ledger: Ledger) -> int:
    """Verify at a new budget what was broken at smaller ones, reopen what does not hold, return how many hold."""
    rows = ledger.broken()
    if not len(rows):
        return 0
    holds = problem.judge(rows, ledger.x[rows], _cut(threat, rows, len(problem.x))).broken
    lost = rows[~holds]
    ledger.by[lost], ledger.restart[lost], ledger.size[lost] = ROBUST, -1, np.nan
    ledger.x[lost], ledger.adversarial[lost] = problem.x[lost], -1
    return int(holds.sum())


def _sweep(
    problem: Problem, stages: Sequence[Stage], threat: Threat, budgets: Sequence[float], ledger: Ledger, tick: _Progress
) -> tuple[Ledger, list[_Seen], list[dict], list[dict]]:
    """Evaluate budgets from small to large; return ledger and evidence at the threat's own, the curve, the seconds."""
    main = float(np.max(np.asarray(threat.eps)))
    curve, seconds, kept, evidence, lowest = [], [], ledger, [], 1.0
    n, sampled = len(problem.x), type(threat).sample is not Threat.sample
    for eps in budgets:
        start = time.perf_counter()
        here = threat if eps == main else with_eps(threat, eps)
        carried = _carry(problem, here, ledger)
        seen = [_run_stage(problem, stage, i, threat, here, ledger, tick) for i, stage in enumerate(stages)]
        if sampled:
            seen.append(_run_noise(problem, len(stages), here, ledger))
        lowest = min(lowest, len(ledger.open()) / n)
        value, interval = share(round(lowest * n), n)
        point = {"eps": eps, "robust_accuracy": value, "robust_interval": list(interval)}
        curve.append(point | {"broken": len(ledger.broken()), "carried": carried})
        seconds.append({"eps": eps, "seconds": time.perf_counter() - start})
        if eps == main:
            kept, evidence = ledger.copy(), seen
    return kept, evidence, curve, seconds


def _statements(threat: Threat, curve: Sequence, rule: str | None, noise: bool) -> list[str]:
    """The sentences that a reader of the numbers must know."""
    out = [
        "Robust accuracy is an upper bound: the share of examples classified correctly at every point that these "
        "attacks found. "
        "A stronger attack may lower it.",
        "Misclassified examples are not robust and were not attacked.",
        "Every counted point was verified apart from the attack: float32, inside the bounds, its size in float64 at "
        "most eps plus "
        "one rounding of each coordinate, and the model asked again at matrix precision 'highest'. Logits that are "
        "not finite "
        "never count as robust.",
        "Intervals are 95 % Clopper-Pearson: they tell of the sampling of examples, not of the strength of the "
        "attacks.",
    ]
    if noise:
        out.append(
            "After the attacks one draw of random noise was tried on the survivors; what it breaks counts as broken."
        )
    if threat.norm == "union":
        members = ", ".join(f"{m.norm} {float(np.max(np.asarray(m.eps))):g}" for m in getattr(threat, "members", ()))
        out.append(f"The threat is a union of {members}; sizes are shares of a member's budget.")
    if curve:
        out.append(
            "A point found within a smaller budget lies within every larger one: it was verified there and carried "
            "over, and the "
            "curve is the pointwise minimum, so it cannot rise."
        )
    if rule is not None:
        out.append(
            f"The evaluation is targeted (rule: {rule}): an example is broken only when its target class is reached "
            f"(or logits are "
            "not finite). Untargeted robust accuracy may be much lower."
        )
    return out


def _flags(
    problem: Problem, threat: Threat, clean: np.ndarray, kept: Ledger, seen: Sequence[_Seen], interval: Any
) -> list:
    """Collect the red flags of one model, worst first."""
    n, survivors_left = len(problem.x), len(kept.open())
    attacks = [s for s in seen if s.row["name"] != "noise"]
    sizes = np.concatenate([s.sizes for s in attacks])
    sizes = sizes[np.isfinite(sizes[:, 0])]
    used = sizes[sizes[:, 1] > 0] if (sizes[:, 1] > 0).any() else sizes
    rows = np.resize(np.arange(n), min(8, problem.batch) if problem.batch > 1 else 2)
    model, bad = problem.model, np.any([s.nonfinite for s in seen], axis=0)
    again = jax.jit(lambda m, x: m(x))
    with jax.default_matmul_precision("highest"):
        found = red.forward_passes(
            lambda x: _forward(model, x), lambda x: again(model, x), problem.x[rows], threat.bounds
        )
    found += [
        red.nonfinite_logits(int((~np.isfinite(clean).all(-1)).sum()), int(bad.sum()), n),
        red.label_mismatch(clean, problem.y),
        red.budget_unusable(threat, problem.x),
        red.probabilities(clean),
        red.input_range(problem.x, threat.bounds),
        red.zero_gradient([(s.row["name"], s.zero_gradient, s.rows) for s in attacks]),
        red.claims_refused([(s.row["name"], s.row["refused"], s.row["claimed"]) for s in attacks]),
        red.budget_unused(1.0, used[:, 0], survivors_left),
        red.few_examples(interval, n),
    ]
    noise = next((s.row for s in seen if s.row["name"] == "noise"), None)
    if noise is not None:
        found.append(red.weaker_than_noise(noise["broken"], noise["attacked"]))
    return sorted((f for f in found if f is not None), key=lambda f: red.SEVERITIES.index(f.severity))


def _data(data: Any, problem: Problem, classes: int) -> dict[str, Any]:
    """Name and fingerprint of the examples; `data` is a name, a mapping or a source with `name` and `split`."""
    get = data.get if isinstance(data, Mapping) else lambda name, default: getattr(data, name, default)
    name, split = (data, "") if isinstance(data, str) else (str(get("name", "")), str(get("split", "")))
    mark = hashlib.sha256(repr((problem.x.shape, classes)).encode())
    for array in (problem.x, problem.y, problem.index):
        mark.update(np.ascontiguousarray(array).tobytes())
    shape = list(problem.x.shape[1:])
    out = {"name": name, "split": split, "n": len(problem.x), "shape": shape, "classes": classes}
    return out | {"fingerprint": mark.hexdigest()[:16]}


def _versions() -> dict[str, str]:
    own = {"jaxadv": __version__, "jax": jax.__version__}
    return own | {"numpy": np.__version__, "python": platform.python_version()}


def _problem(key: Any, model: Any, x: Any, y: Any, threat: Threat, index: Any, batch_size: int) -> tuple[Problem, int]:
    """Check the arguments and bring them to the host; return them with the number of classes."""
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
        raise TypeError(f"key must be one typed key; got {type(key).__name__}. Pass jax.random.key(0).")
    if not isinstance(threat, Threat):
        raise TypeError(f"threat must be a Threat; got {type(threat).__name__}. Pass threats.linf(8 / 255).")
    check.whole("batch_size", batch_size)
    check.positive("eps", threat.eps, "For no attack at all report the clean accuracy.")
    x = np.asarray(x)
    check.inputs(x)
    x = np.ascontiguousarray(x, np.float32)
    low, high = (np.asarray(b, np.float32) for b in threat.bounds)
    check.inputs(x, (low, high))
    y = np.asarray(y)
    check.labels(y, len(x))
    _cut(threat, np.zeros(1, int), len(x))
    model = _callable(model)
    classes = _check_model(model, x[: min(batch_size, len(x))])
    check.labels(y, len(x), classes)
    index = np.arange(len(x)) if index is None else np.asarray(index)
    check.labels(index, len(x), name="index")
    problem = Problem(key, model, x, y.astype(np.int32), None, index.astype(np.int32), min(batch_size, len(x)))
    return problem, classes


def _examples(problem: Problem, kept: Ledger, predicted: np.ndarray) -> dict[str, list]:
    """The outcome table, by columns."""
    sizes = [None if by == ROBUST else float(f"{size:.9g}") for by, size in zip(kept.by, kept.size)]
    return {
        "index": problem.index.tolist(),
        "label": problem.y.tolist(),
        "clean": predicted.tolist(),
        "adversarial": np.where(kept.by == ROBUST, predicted, kept.adversarial).tolist(),
        "by": kept.by.tolist(),
        "restart": kept.restart.tolist(),
        "size": sizes,
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
    eps_curve: Sequence[float] = (),
    targets: Any = None,
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
        attack, and `Stage`s. Default: `standard`.
      restarts: how often every attack runs; None leaves it to the protocol (once for bare attacks).
      name: the model's name in the report.
      index: int `[n]` dataset indices, from which random keys come; `arange(n)` by default.
      batch_size: rows of a batch.
      eps_curve: further budgets for the security curve.
      targets: None for an untargeted evaluation; int `[n]`; or a rule of `TARGET_RULES`.
      data: name of the data, a mapping with `name` and `split`, or a source.
      seed: the seed behind `key`, to be stated in the report.
      progress: called with `(done, total, stage)`.
      keep_adversarial: keep examples and adversarial examples in the report, for pictures and `adversarial.npz`.

    Returns:
      A report with one model.

    Raises:
      ValueError: on impossible arguments, or a model that returns no finite logits at all.
      TypeError: on labels or inputs of a wrong dtype, or an untyped key.

    References:
      Carlini et al. 2019, On evaluating adversarial robustness, arXiv:1902.06705. Croce et al. 2021, RobustBench,
      arXiv:2010.09670.
    """
    start = time.perf_counter()
    problem, classes = _problem(key, model, x, y, threat, index, batch_size)
    stages, budgets = stages_of(attacks, restarts), _check_curve(threat, eps_curve)
    n = len(problem.x)
    clean = logits_of(problem.model, problem.x, problem.batch)
    finite = np.isfinite(clean).all(-1)
    if not finite.any():
        raise ValueError(
            f"the model must return finite logits; got NaN or infinity for all {n} examples. Were weights loaded?"
        )
    rule = None
    if targets is not None:
        target, rule = _targets(targets, key, problem.y, problem.index, clean)
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
    clean_seconds = time.perf_counter() - start
    tick = _Progress(progress, sum(s.restarts for s in stages) * len(budgets), n)
    kept, seen, curve, seconds = _sweep(problem, stages, threat, budgets, ledger, tick)
    clean_accuracy, clean_interval = share(int(correct.sum()), n)
    robust_accuracy, robust_interval = share(len(kept.open()), n)
    curve = curve if len(eps_curve) else []
    noise = seen[-1].row["name"] == "noise"
    targeted = None
    if rule is not None:
        targeted = {"rule": rule, "success_rate": len(kept.broken()) / max(int(correct.sum()), 1)}
    entry = ModelReport(
        name=name,
        n=n,
        clean_accuracy=clean_accuracy,
        clean_interval=clean_interval,
        robust_accuracy=robust_accuracy,
        robust_interval=robust_interval,
        threat={
            "norm": threat.norm,
            "eps": np.asarray(threat.eps).tolist(),
            "bounds": [np.asarray(b).tolist() for b in threat.bounds],
        },
        attacks=[s.row for s in seen],
        flags=_flags(problem, _host(threat), clean, kept, seen, robust_interval),
        curve=curve,
        examples=_examples(problem, kept, predicted),
        targeted=targeted,
        statements=_statements(threat, curve, rule, noise),
        x_adv=kept.x if keep_adversarial else None,
    )
    timing = {"name": name, "total": time.perf_counter() - start, "clean": clean_seconds}
    timing |= {"attacks": [{"name": s.row["name"], "seconds": s.seconds} for s in seen], "curve": seconds}
    return Report(
        versions=_versions(),
        device=jax.devices()[0].device_kind,
        seed=seed,
        key=np.asarray(jax.random.key_data(key)).ravel().tolist(),
        data=_data(data, problem, classes),
        models=[entry],
        timing={"models": [timing]},
        x=problem.x if keep_adversarial else None,
    )
