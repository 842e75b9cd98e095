"""Diagnostics of an evaluation: is the attack working, or is the model only hiding from it?

One door, `diagnose`: a table of checks on a few correctly classified examples, each of which measures something that
must hold if the attack works and raises a flag where it does not. They gather AutoAttack's warnings, the indicators of
attack failure, the sanity suite, and sweeps of budget, step size and loss landscape.

What does not live here: the flags' words (`flags.FLAGS`), and any influence on the numbers of an evaluation. Silence
proves nothing; a flag is a reason to look.

References:
  Croce and Hein 2020, Reliable evaluation of adversarial robustness (the warnings are in the code), arXiv:2003.01690.
  Pintor et al. 2022, Indicators of attack failure, arXiv:2106.09947.
  Carlini et al. 2019, On evaluating adversarial robustness, arXiv:1902.06705.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv.attacks import fgsm, pgd, square
from jaxadv.attacks.blackbox import NORMS
from jaxadv.core import Attack, Threat, as_callable, check, edges, example_keys, loop, robust, step_keys
from jaxadv.core.run import advance
from jaxadv.evaluate import flags as red
from jaxadv.evaluate.flags import Flag
from jaxadv.losses import margin, minus_cross_entropy
from jaxadv.threats import linf

_NEIGHBORS, _POINTS, _GRID, _DRAWS = 16, 33, 9, 10


class Diagnosis(NamedTuple):
    """What the checks found.

    Attributes:
      flags: the raised flags, worst first.
      numbers: name of the check to what it measured, plain values for a report.
    """

    flags: tuple[Flag, ...]
    numbers: dict[str, Any]


@dataclasses.dataclass
class Case:
    """What the checks share: the examples, the attack, and answers that several of them need."""

    key: Any
    model: Any
    x: np.ndarray
    y: np.ndarray
    index: np.ndarray
    threat: Threat
    attack: Callable[[Threat], Attack]
    steps: int
    queries: int
    surrogate: Any
    known: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def slack(self) -> float:
        """Differences of accuracy up to this are chance: three points, or three examples."""
        return max(0.03, 3 / len(self.x)) + 1e-6

    def run(self, attack: Attack, name: str) -> Any:
        """The result of an attack, computed once for each name."""
        if name not in self.known:
            found = _run(attack, self.key, self.model, self.x, self.y, self.index)
            self.known[name] = jax.tree.map(np.asarray, found)
        return self.known[name]

    def standing(self, attack: Attack, name: str) -> float:
        """The share of examples that an attack leaves standing."""
        return float(1 - np.mean(self.run(attack, name).success))

    def white_box(self) -> float:
        """The share that the attack under diagnosis leaves standing."""
        return self.standing(self.attack(self.threat), "attack")

    def pair(self) -> tuple[Any, Any]:
        """Examples and labels on the device."""
        return jnp.asarray(self.x), jnp.asarray(self.y)


@jax.jit
def _run(attack, key, model, x, y, index):
    return attack.run(key, model, x, y, index=index)


@jax.jit
def _trace(attack, key, model, x, y, index):
    """Follow an attack: margin and verdict at its point before each step and after the last, `[steps + 1, b]`."""
    state = attack.init(example_keys(key, attack.name, index), model, x, y)

    def look(state):
        logits = model(state.point)
        return margin(logits, y), ~robust(logits, y)

    first = look(state)
    seen = [jnp.zeros((attack.max_steps + 1, *leaf.shape), leaf.dtype).at[0].set(leaf) for leaf in first]

    def step(carry):
        number, state, seen = carry
        state = advance(attack, state, model, x, y)
        return number + 1, state, [s.at[number + 1].set(leaf) for s, leaf in zip(seen, look(state))]

    _, state, seen = loop(step, (jnp.int32(0), state, seen), attack.max_steps)
    return seen, attack.result(state, model, x, y)


@jax.jit
def _gradients(model, x, y):
    """Input gradients of cross-entropy and margin, and the margin."""
    cross = jax.grad(lambda x: minus_cross_entropy(model(x), y).sum())(x)
    (_, value), apart = jax.value_and_grad(lambda x: ((m := margin(model(x), y)).sum(), m), has_aux=True)(x)
    return cross, apart, value


@jax.jit
def _margins(model, points, y):
    """Margin and spread of the logits at many points of each example, `[m, b]`."""

    def one(points):
        logits = model(points)
        return margin(logits, y), jnp.max(logits, -1) - jnp.min(logits, -1)

    return jax.lax.map(one, points)


@jax.jit
def _neighbors(threat, keys, x, radius):
    """Points within a share of the range of every feature, uniform, inside the bounds."""
    low, high = edges(threat.bounds, x)

    def draw(i):
        noise = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype, -1, 1))(step_keys(keys, i))
        return jnp.clip(x + radius * (high - low) * noise, low, high)

    return jax.lax.map(draw, jnp.broadcast_to(jnp.arange(_NEIGHBORS)[:, None], (_NEIGHBORS, x.shape[0])))


@jax.jit
def _noise(threat, model, key, x, y, index):
    """Whether random points of the threat break an example, `[draws, b]`."""
    keys = example_keys(key, "diagnosis noise", index)

    def draw(i):
        return ~robust(model(threat.sample(step_keys(keys, i), x)), y)

    return jax.lax.map(draw, jnp.broadcast_to(jnp.arange(_DRAWS)[:, None], (_DRAWS, x.shape[0])))


def _rows(a: np.ndarray) -> np.ndarray:
    return a.reshape(len(a), -1)


def _tell(found: list, raised: bool, name: str, value: float, threshold: float, detail: str) -> None:
    if raised:
        found.append(red.flag(name, value, threshold, detail))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _forward(case: Case) -> tuple[dict, list[Flag]]:
    """Ask again, beside others, and look at the outputs: determinism, rows alone, logits."""
    rows = np.resize(np.arange(len(case.x)), max(2, min(8, len(case.x))))
    forward, again = (jax.jit(lambda x: case.model(x)) for _ in range(2))
    found = red.forward_passes(forward, again, case.x[rows], case.threat.bounds)
    logits = np.asarray(forward(case.x), np.float32)
    told = red.probabilities(logits)
    spread = np.ptp(logits, axis=-1)
    return {"classes": logits.shape[1], "median_spread_of_logits": float(np.median(spread))}, [
        *found,
        *([told] if told else []),
    ]


def _classes(case: Case) -> tuple[dict, list[Flag]]:
    """Count classes against what losses and protocols need."""
    k = jax.eval_shape(case.model, jax.ShapeDtypeStruct(case.x.shape, case.x.dtype)).shape[-1]
    found: list[Flag] = []
    without = {2: "no DLR loss, no targeted DLR", 3: "no targeted DLR"}.get(k, "")
    _tell(found, k < 4, "few_classes", k, 4, f"{k} classes: {without}.")
    return {"classes": int(k), "targets": int(min(9, k - 1))}, found


def _inference(case: Case) -> tuple[dict, list[Flag]]:
    """Look for derivatives inside the forward pass, by the names that jax gives to what differentiation made."""
    jaxpr = jax.make_jaxpr(case.model)(case.x[:1]).jaxpr
    inside, total = 0, 0
    stack = [jaxpr]
    while stack:
        for eqn in stack.pop().eqns:
            total += 1
            inside += "transpose(" in str(getattr(eqn.source_info, "name_stack", ""))
            for value in eqn.params.values():
                for held in value if isinstance(value, (tuple, list)) else [value]:
                    held = getattr(held, "jaxpr", held)
                    if hasattr(held, "eqns"):
                        stack.append(held)
    found: list[Flag] = []
    detail = f"{inside} of {total} operations of the forward pass are parts of a gradient."
    _tell(found, inside > 0, "test_time_optimization", inside, 0, detail)
    return {"operations": total, "of_gradients": inside}, found


def _gradient(case: Case) -> tuple[dict, list[Flag]]:
    """Are there gradients, and do they tell what happens? I1 of Pintor et al., and central differences."""
    x, y = case.pair()
    keys = example_keys(case.key, "diagnosis", jnp.asarray(case.index))
    found: list[Flag] = []
    dead, lost, ratios = [], [], []
    for point in (x, case.threat.sample(keys, x)):
        cross, apart, _ = (np.asarray(g, np.float64) for g in _gradients(case.model, point, y))
        gone = [(_rows(g) == 0).all(1) | ~np.isfinite(_rows(g)).all(1) for g in (cross, apart)]
        dead.append(gone[1])
        lost.append(gone[0] & ~gone[1])
        length = np.abs(_rows(apart)).sum(1)
        alive = ~gone[1]
        if not alive.any():
            continue
        low, high = (np.asarray(b, np.float64) for b in case.threat.bounds)
        h = 2e-3 * float(np.max(high - low))
        direction = np.sign(apart)
        ahead, behind = (np.asarray(point, np.float64) + s * h * direction for s in (1, -1))
        both = np.stack([ahead, behind]).astype(np.float32)
        values = np.asarray(_margins(case.model, jnp.asarray(both), y)[0], np.float64)
        ratios.append(((values[0] - values[1]) / (2 * h * np.where(alive, length, 1)))[alive])
    zero, saturated = float(np.mean(dead)), float(np.mean(lost))
    n = 2 * len(case.x)
    told = red.zero_gradient([("margin at the example and at a random start", int(np.sum(dead)), n)])
    found += [told] if told else []
    _tell(found, saturated > 0.01, "saturated_loss", saturated, 0.01, f"{_percent(saturated)} of {n} gradients.")
    ratio = float(np.median(np.concatenate(ratios))) if ratios else None
    if ratio is not None:
        detail = f"Along the sign of the gradient the margin changed by {ratio:.2g} times the promised amount (median)."
        _tell(found, not 0.5 <= ratio <= 1.5, "gradient_mismatch", abs(ratio - 1), 0.5, detail)
    return {"zero_gradient": zero, "saturated": saturated, "measured_by_promised": ratio}, found


def _stability(case: Case) -> tuple[dict, list[Flag]]:
    """How far logits move under noise much smaller than the budget, at the attack's points: I2 of Pintor et al.

    Theirs compares the loss under noise of 4/255 with the loss; small losses make it large for honest models. Here the
    noise is a thousandth of the range, and changes of the margin count in units of the spread of the logits.
    """
    result = case.run(case.attack(case.threat), "attack")
    keys = example_keys(case.key, "diagnosis neighbors", jnp.asarray(case.index))
    near = _neighbors(case.threat, keys, jnp.asarray(result.x), jnp.float32(1e-3))
    points = jnp.concatenate([jnp.asarray(result.x)[None], near])
    values, spread = (np.asarray(v, np.float64) for v in _margins(case.model, points, jnp.asarray(case.y)))
    moved = np.abs(values[1:] - values[:1]).mean(0) / np.maximum(spread[0], 1e-30)
    value = float(np.mean(np.minimum(np.nan_to_num(moved, nan=1.0), 1)))
    found: list[Flag] = []
    detail = f"Noise of a thousandth of the range moves the margin by {_percent(value)} of the spread of the logits."
    _tell(found, value > 0.1, "unstable_predictions", value, 0.1, detail)
    return {"movement": value, "neighbors": _NEIGHBORS}, found


def _trajectory(case: Case) -> tuple[dict, list[Flag]]:
    """Follow the attack: lost successes (I3) and an unfinished search (I4 of Pintor et al.)."""
    attack = case.attack(case.threat)
    args = (case.key, case.model, *case.pair(), jnp.asarray(case.index))
    try:
        (values, broken), result = jax.tree.map(np.asarray, _trace(attack, *args))
    except AttributeError:  # an attack whose state shows no point
        return {"followed": False}, []
    passed, kept = broken.any(0), np.asarray(result.success)
    lost = float(np.mean(passed & ~kept))
    lowest = np.minimum.accumulate(np.asarray(values, np.float64), axis=0)
    reach = np.maximum(np.ptp(lowest, axis=0), 1e-30)
    late = (lowest[-min(10, len(lowest) // 2) - 1] - lowest[-1]) / reach
    found: list[Flag] = []
    detail = f"{_percent(lost)} of the examples failed on the way and not in the end."
    _tell(found, lost > 0, "silent_success", lost, 0.0, detail)
    numbers = {"followed": True, "lost_successes": lost, "late_progress": float(np.mean(late))}
    return numbers | {"mean_margin": np.mean(values, axis=1).astype(float).tolist()}, found


def _steps(case: Case) -> tuple[dict, list[Flag]]:
    """Sweep the step size, and spend more steps; the steps of the attack should neither need nor mind it."""
    attack: Any = case.attack(case.threat)
    base, found, slack = case.white_box(), [], case.slack
    numbers: dict[str, Any] = {"robust_accuracy": base}
    if hasattr(attack, "step_size"):
        swept = {}
        for factor in (0.1, 0.3, 3.0):
            other = dataclasses.replace(attack, step_size=attack.step_size * factor)
            swept[f"{factor:g}"] = case.standing(other, f"step size x {factor:g}")
        numbers["by_step_size"] = swept | {"1": base}
        factor = min(swept, key=lambda f: swept[f])
        drop = base - swept[factor]
        detail = f"{_percent(base)} stand, {_percent(swept[factor])} with {factor} times the step size."
        _tell(found, drop > slack, "step_size_matters", drop, slack, detail)
    if hasattr(attack, "max_steps") and hasattr(attack, "step_size"):
        longer = dataclasses.replace(attack, max_steps=5 * attack.max_steps)
        more = numbers["with_five_times_the_steps"] = case.standing(longer, "more steps")
        drop = base - more
        detail = f"{_percent(base)} stand, {_percent(more)} after five times the steps."
        _tell(found, drop > slack, "more_steps_help", drop, slack, detail)
    return numbers, found


def _budgets(case: Case) -> tuple[dict, list[Flag]]:
    """Half, all and twice the budget, and no limit but the bounds (I6 of Pintor et al.)."""
    found: list[Flag] = []
    shares = {"1": case.white_box()}
    threat: Any = case.threat
    if _has_budget(threat):
        for factor in (0.5, 2.0):
            other = dataclasses.replace(threat, eps=jnp.asarray(threat.eps, jnp.float32) * factor)
            shares[f"{factor:g}"] = case.standing(case.attack(other), f"eps x {factor:g}")
    low, high = (np.asarray(b, np.float32) for b in threat.bounds)
    whole = linf(float(np.max(high - low)), threat.bounds)
    free = case.standing(case.attack(whole), "unbounded")
    ordered = [shares[f] for f in sorted(shares, key=float)]
    rise = max((b - a for a, b in zip(ordered, ordered[1:])), default=0.0)
    _tell(found, rise > case.slack, "larger_budget_safer", rise, case.slack,
          f"Standing by share of the budget: {', '.join(f'{f}: {_percent(shares[f])}' for f in sorted(shares, key=float))}.")  # fmt: skip # noqa: E501
    detail = f"{_percent(free)} stand although any input within the bounds is allowed."
    _tell(found, free > case.slack, "unbounded_attack_fails", free, case.slack, detail)
    return {"by_share_of_budget": shares, "unbounded": free}, found


def _strength(case: Case) -> tuple[dict, list[Flag]]:
    """What must not beat the attack: one step, no gradients, noise, points made for another model."""
    base, slack, found = case.white_box(), case.slack, []
    numbers: dict[str, Any] = {"attack": base}

    def compare(name: str, share: float, flag: str, detail: str) -> None:
        numbers[name] = share
        _tell(found, base - share > slack, flag, base - share, slack,
              f"{_percent(base)} stand, {_percent(share)} {detail}.")  # fmt: skip

    single = case.standing(fgsm(case.threat), "single step")
    compare("single_step", single, "single_step_stronger", "after a single step")
    image = case.x.ndim == 4 and (case.threat.norm == "linf" or min(case.x.shape[1:3]) >= 5)
    if case.threat.norm in NORMS and image:
        blind = case.standing(square(case.threat, queries=case.queries), "square")
        compare("square", blind, "black_box_stronger", f"after {case.queries} queries of Square")
    if type(case.threat).sample is not Threat.sample:
        x, y = case.pair()
        draws = np.asarray(_noise(case.threat, case.model, case.key, x, y, jnp.asarray(case.index)))
        left = ~np.asarray(case.run(case.attack(case.threat), "attack").success)
        hit = int((draws.any(0) & left).sum())
        numbers["noise"] = float(1 - draws.any(0).mean())
        if hit > slack * len(case.x):
            found.append(red.weaker_than_noise(hit, int(left.sum())))
    if case.surrogate is not None:
        made = _run(case.attack(case.threat), case.key, case.surrogate, case.x, case.y, case.index)
        held = np.asarray(robust(case.model(made.x), jnp.asarray(case.y)))
        fooled = np.asarray(made.success)
        compare("transfer", float(held.mean()), "transfer_stronger", "at points made for the surrogate")
        numbers["transfer_failure"] = float(np.mean(held[fooled])) if fooled.any() else None  # I5 of Pintor et al.
    return numbers, found


def _landscape(case: Case) -> tuple[dict, list[Flag]]:
    """The margin along the steepest line and on a plane with a random direction."""
    x, y = case.pair()
    threat: Any = case.threat
    grad = _gradients(case.model, x, y)[1]
    keys = example_keys(case.key, "diagnosis landscape", jnp.asarray(case.index))
    low, high = edges(threat.bounds, x)
    walls: Any = threat if hasattr(threat, "p") else linf(0.1 * float(np.max(np.asarray(high - low))), threat.bounds)
    if walls.norm in ("l1", "l0"):  # a line that moves one feature shows little: use the l2 line of a visible length
        walls = linf(0.1 * float(np.max(np.asarray(high - low))), threat.bounds)
    eps = jnp.broadcast_to(jnp.asarray(walls.eps, x.dtype), x.shape[:1]).reshape((-1,) + (1,) * (x.ndim - 1))
    down = -eps * walls.steepest(grad)
    draw = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
    side = eps * walls.steepest(draw)

    def at(down_share, side_share):
        return jnp.clip(x + down_share * down + side_share * side, low, high)

    roughness = []
    for line in (lambda t: at(t, 0), lambda t: at(0, t)):
        points = jnp.stack([line(t) for t in np.linspace(-1, 1, _POINTS)])
        values, spread = (np.asarray(v, np.float64) for v in _margins(case.model, points, y))
        moves = np.diff(values, axis=0)
        moves = np.where(np.abs(moves) > 0.02 * np.maximum(spread.max(0), 1e-30)[None], moves, 0)
        turns = (np.sign(moves[1:]) * np.sign(moves[:-1]) < 0).sum(0)
        roughness.append(turns / (_POINTS - 2))
    value = float(np.mean(roughness))
    grid = jnp.stack([at(s, t) for s in np.linspace(-1, 1, _GRID) for t in np.linspace(-1, 1, _GRID)])
    plane = np.asarray(_margins(case.model, grid, y)[0], np.float64).mean(1).reshape(_GRID, _GRID)
    found: list[Flag] = []
    detail = f"The margin turns around at {_percent(value)} of the places along lines of {_POINTS} points."
    _tell(found, value > 0.2, "rough_landscape", value, 0.2, detail)
    return {"roughness": value, "mean_margin": plane.tolist()}, found


CHECKS: dict[str, Callable[[Case], tuple[dict, list[Flag]]]] = {
    "forward": _forward,
    "classes": _classes,
    "inference": _inference,
    "gradient": _gradient,
    "stability": _stability,
    "landscape": _landscape,
    "trajectory": _trajectory,
    "steps": _steps,
    "budgets": _budgets,
    "strength": _strength,
}
"""Checks by name, the cheap ones first."""

RAISES: dict[str, str] = {
    "few_classes": "classes",
    "test_time_optimization": "inference",
    "saturated_loss": "gradient",
    "gradient_mismatch": "gradient",
    "unstable_predictions": "stability",
    "rough_landscape": "landscape",
    "silent_success": "trajectory",
    "step_size_matters": "steps",
    "more_steps_help": "steps",
    "larger_budget_safer": "budgets",
    "unbounded_attack_fails": "budgets",
    "single_step_stronger": "strength",
    "black_box_stronger": "strength",
    "transfer_stronger": "strength",
}
"""The flags that only a diagnosis raises, and the check that does. Others come from the evaluation too."""


def diagnose(
    key: Any,
    model: Any,
    x: Any,
    y: Any,
    threat: Threat,
    *,
    which: Iterable[str] | None = None,
    attack: Callable[[Threat], Attack] | None = None,
    n: int = 100,
    steps: int = 40,
    queries: int = 200,
    surrogate: Any = None,
    index: Any = None,
) -> Diagnosis:
    """Check whether an attack on a model does what it should, on the first `n` correctly classified examples.

    Args:
      key: a typed key.
      model: logits `[b, k]` from a batch.
      x: `[m, ...]` examples inside the bounds.
      y: int `[m]` labels.
      threat: the allowed set, one budget for all examples.
      which: names of `CHECKS`; all by default.
      attack: from a threat to the gradient attack under diagnosis; PGD with `steps` steps by default.
      n: examples to use.
      steps: of the default attack.
      queries: of Square, where it takes the threat.
      surrogate: another model for the same task, whose adversarial points are carried over; None leaves that out.
      index: int `[m]` dataset indices, from which the random keys come; defaults to `arange(m)`.

    Returns:
      The flags, worst first, and what every check measured. No flags and `examples` 0 where nothing is classified
      correctly.

    Raises:
      ValueError: on unknown checks, budgets of rows, or arguments of a wrong shape.
    """
    names = list(CHECKS) if which is None else list(which)
    for name in names:
        check.choice("check", name, CHECKS)
    for name, value in (("n", n), ("steps", steps), ("queries", queries)):
        check.whole(name, value)
    x, y = np.asarray(x, np.float32), np.asarray(y)
    check.inputs(x, threat.bounds)
    check.labels(y, len(x))
    if np.ndim(threat.eps):
        raise ValueError(
            f"diagnose takes one budget for all examples; got eps of shape {np.shape(threat.eps)}. "
            "Diagnose at the largest."
        )
    model = as_callable(model)
    index = np.arange(len(x), dtype=np.int32) if index is None else np.asarray(index, np.int32)
    right = [np.asarray(robust(model(x[i : i + 500]), jnp.asarray(y[i : i + 500]))) for i in range(0, len(x), 500)]
    rows = np.flatnonzero(np.concatenate(right))[:n]
    numbers: dict[str, Any] = {"examples": len(rows)}
    if not len(rows):
        return Diagnosis((), numbers)
    maker = (lambda threat: pgd(threat, steps=steps)) if attack is None else attack
    case = Case(key, model, x[rows], y[rows], index[rows], _traced(threat), maker, steps, queries, surrogate)
    found: dict[str, Flag] = {}
    for name in names:
        numbers[name], raised = CHECKS[name](case)
        for one in raised:
            found.setdefault(one.name, one)
    order = sorted(found.values(), key=lambda f: red.SEVERITIES.index(f.severity))
    return Diagnosis(tuple(order), numbers)


def _traced(threat: Any) -> Any:
    """The threat with its budget as an array, so that sweeps share one program."""
    if not _has_budget(threat):
        return threat
    return dataclasses.replace(threat, eps=jnp.asarray(threat.eps, jnp.float32))


def _has_budget(threat: Any) -> bool:
    return dataclasses.is_dataclass(threat) and "eps" in {f.name for f in dataclasses.fields(threat)}
