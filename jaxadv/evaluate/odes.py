"""Honest evaluation of networks behind an ODE solver: the protocol `ode`, its alarms, and a report that holds both.

What lives here: `stages` (the row `ode` of the protocols), attacks that follow the same weights behind another solver
(`behind`), `alarms` (what must hold if the attacks work), `ode_report`. What does not: solvers and surrogates (room
`continuous`), the loop of an evaluation (`engine`).

Attacks on adaptive solvers can fail for reasons that are no robustness: the loss jumps where a step is accepted or
rejected, loose tolerances make another function than the flow, a batch shares its steps, and gradients through the
solver are those of a frozen grid. So an example counts as robust only if it withstands all of these:

| what | attacks |
| --- | --- |
| the deployed solver | PGD on cross-entropy (many steps, restarts, small steps), on the margin, AutoAttack |
| gradients of fixed grids, native forward pass | PGD through RK4 and Euler grids |
| other solvers attacked, the points carried over | PGD on fixed grids and on a ladder of tolerances |
| no gradients | Square (in AutoAttack), SPSA |
| another model | `evaluate(..., surrogate=...)` |
| a random end time (LT-NODE, ALT-NODE) | PGD through fresh and through fixed draws, carried over to the exact average |

A solve that fails gives NaN, which never counts as robust; the share of failures is told apart.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import losses
from jaxadv.attacks import ATTACKS, pgd
from jaxadv.attacks.autoattack import Stage, transfer
from jaxadv.attacks.autoattack import stages as autoattack
from jaxadv.core import Attack, Model, Result, Threat, check, edges, pytree, robust, static
from jaxadv.evaluate.diagnostics import Diagnosis
from jaxadv.evaluate.flags import FLAGS, Flag, Kind, flag
from jaxadv.evaluate.verdict import logits_of

GRIDS = (("rk4", 4), ("rk4", 8), ("rk4", 16), ("rk4", 32), ("euler", 4), ("euler", 8), ("euler", 16), ("euler", 32))
"""Fixed grids that attacks follow: method and steps."""

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Relative and absolute tolerances that attacks follow, and at which what they found is looked at again."""

DRAWS = 20
"""Draws of a random end time that attacks follow."""

ALARMS: dict[str, Kind] = {
    "solver_failed": Kind(
        "error",
        "Solves failed: too many steps, or a state that is not finite. Such examples count as broken.",
        "Raise max_steps or the tolerance, and say which share failed beside the accuracy.",
    ),
    "steps_moved": Kind(
        "warning",
        "Adversarial inputs are solved in another number of steps than clean ones, so the loss jumps between them.",
        "Attack fixed grids of the same weights and carry the points over, and report the accuracy there.",
    ),
    "surrogate_stronger": Kind(
        "warning",
        "Gradients of a fixed grid broke more examples than those through the deployed solver: step control masks "
        "gradients.",
        "Report the worst case over solvers; do not quote attacks through the adaptive solver alone.",
    ),
    "gradients_disagree": Kind(
        "warning",
        "Gradients through the deployed solver point elsewhere than those of a fixed grid of the same weights, or than "
        "differences of the loss.",
        "Tighten the tolerance for the attack, use the adjoint 'checkpoint', or attack a fixed grid.",
    ),
    "batch_coupled": Kind(
        "error",
        "An example's logits change when it is solved without its batch: the solver shares its steps.",
        "Evaluate with batching='per_example'.",
    ),
    "tolerance_decides": Kind(
        "warning",
        "The same inputs are classified otherwise at a tighter tolerance: the defense is the solver's error.",
        "Report the accuracy at tight tolerances too, and attack there.",
    ),
}
"""Alarms of ODE networks, beside `flags.FLAGS`."""


_TIMED = ("draws", "times")


@dataclasses.dataclass(frozen=True)
class Change:
    """What an attack follows in the place of the model; hashable, so a part of the attack's structure.

    Attributes:
      kind: `'grid'` (a fixed grid of the same weights), `'tolerance'`, `'gradient'` (the model with the gradients of
        a fixed grid), or for random end times `'draws'` (fresh ones at every point) or `'times'` (fixed ones).
      method: of the grid.
      value: its steps, the tolerance, or the number of draws.
    """

    kind: str
    method: str = "rk4"
    value: float = 8

    def __post_init__(self):
        check.choice("kind of change", self.kind, ("grid", "tolerance", "gradient", *_TIMED))

    @property
    def __name__(self) -> str:
        """The change in words."""
        if self.kind == "tolerance":
            return f"tolerance {self.value:g}"
        return f"{self.kind} x{self.value:g}" if self.kind in _TIMED else f"{self.kind} {self.method} x{self.value:g}"

    def __call__(self, model: Model, x: Any) -> Any:
        """Return what is followed.

        Args:
          model: from `continuous.ode_model`.
          x: a batch, of which the shape counts.
        """
        from jaxadv import continuous

        if self.kind == "tolerance":
            return continuous.with_tolerance(model, x, self.value)
        if self.kind in _TIMED:
            return continuous.drawn(model, int(self.value), fixed=self.kind == "times")
        grid = continuous.fixed_step(model, x, self.method, int(self.value))
        return grid if self.kind == "grid" else continuous.surrogate_gradient(model, grid)


@pytree
class Behind(Attack):
    """An attack that follows a change of the model and is judged on the model itself; built by `behind`."""

    threat: Threat
    inner: Attack
    name: str = static()
    max_steps: int = static()
    early: bool = static()
    change: Change = static()

    def init(self, keys, model, x, y):
        """Start on the changed model."""
        return self.inner.init(keys, self.change(model, x), x, y)

    def step(self, state, model, x, y):
        """Step on the changed model."""
        return self.inner.step(state, self.change(model, x), x, y)

    def done(self, state):
        """A row is done when the inner attack is."""
        return self.inner.done(state)

    def result(self, state, model, x, y) -> Result:
        """Ask the model at the point that the changed one led to."""
        found = self.inner.result(state, self.change(model, x), x, y)
        return found._replace(success=~robust(model(found.x), y), queries=found.queries + 1)


def behind(threat: Threat, *, change: Change, attack: str = "pgd", **settings: Any) -> Behind:
    """Return an attack that follows a change of the model.

    Args:
      threat: the allowed set.
      change: what is followed.
      attack: a name in `attacks.ATTACKS`.
      **settings: of the attack.

    Returns:
      The attack; its queries and gradients are those of the changed model, and one query of the model.

    Raises:
      ValueError: on an unknown attack, and, when it runs, on a model that does not know its solver.
    """
    name = f"{attack} on {change.__name__}"
    inner = check.choice("attack", attack, ATTACKS)(threat, **{"name": name} | settings)
    return Behind(
        threat=threat, inner=inner, name=inner.name, max_steps=inner.max_steps, early=inner.early, change=change
    )


def stages(
    norm: str = "linf", *, steps: int = 100, restarts: int = 5, grids: Sequence[tuple[str, int]] = GRIDS,
    tolerances: Sequence[float] = TOLERANCES, spsa_samples: int = 2048, spsa_steps: int = 100,
    version: str = "standard", draws: int = 0,
) -> tuple[Stage, ...]:  # fmt: skip
    """Return the attacks of the protocol `ode`, each on the survivors of those before.

    Args:
      norm: of the threat; without AutoAttack, or SPSA, where they do not know it.
      steps: gradient steps of each PGD.
      restarts: of PGD on the deployed solver.
      grids: fixed grids to follow, method and steps: their gradients, and the points carried over.
      tolerances: of adaptive steps to follow, the points carried over.
      spsa_samples: forward pairs of a step of SPSA; 0 leaves it out.
      spsa_steps: its steps.
      version: of AutoAttack, or `''` for none.
      draws: of a random end time, fresh at every point and fixed, the points carried over to the exact average; 0 for
        networks without one.

    Returns:
      The stages.

    Raises:
      ValueError: on impossible settings.

    References:
      Huang et al. 2020, Adversarial robustness of stabilized neural ODE might be from obfuscated gradients,
      arXiv:2009.13145. Athalye et al. 2018, Obfuscated gradients give a false sense of security, arXiv:1802.00420.
    """
    check.whole("steps", steps)
    walk: tuple = (("steps", steps),)
    out = [
        Stage("pgd", (*walk, ("name", "pgd_ce")), restarts),
        Stage("pgd", (*walk, ("loss", losses.margin), ("name", "pgd_margin")), restarts),
        Stage(_short, walk),
    ]
    if norm in ("linf", "l2", "l1") and version:
        out += autoattack(norm, version)
    for method, n in grids:
        out += [Stage(behind, (("change", Change(kind, method, n)), *walk)) for kind in ("gradient", "grid")]
    out += [Stage(behind, (("change", Change("tolerance", value=value)), *walk)) for value in tolerances]
    if draws:
        out += [Stage(behind, (("change", Change(kind, value=draws)), *walk)) for kind in _TIMED]
    if norm in ("linf", "l2") and spsa_samples:
        queries = 2 * spsa_samples * spsa_steps
        out.append(Stage("spsa", (("samples", spsa_samples), ("queries", queries), ("sigma", 0.01))))
    return tuple(out)


def _short(threat: Threat, *, steps: int) -> Attack:
    """PGD with steps of a hundredth of the budget, for losses that bend at small scales."""
    return pgd(threat, steps=steps, step_size=threat.eps / 100, loss=losses.margin, name="pgd_short")


# --------------------------------------------------------------------------------------------------------------- alarms


@jax.jit
def _run(attack, key, model, x, y, index):
    return attack.run(key, model, x, y, index=index)


@jax.jit
def _solved(model, x):
    from jaxadv import continuous

    return continuous.solved(model, x)


@jax.jit
def _slope(model, x, y):
    return jax.grad(lambda x: jnp.sum(losses.margin(model(x), y)))(x)


@jax.jit
def _differences(model, x, y, directions, radius):
    """Central differences of the margin along directions `[m, ...]`, `[m, b]`."""

    def along(v):
        ends = [losses.margin(model(x + sign * radius * v[None]), y) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * radius)

    return jax.lax.map(along, directions)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of rows; 1 where both are zero, 0 where one is or a value is not finite."""
    a, b = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (a, b))
    scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = (a * b).sum(1) / scale
    both = ~a.any(1) & ~b.any(1)
    return np.where(both, 1.0, np.nan_to_num(value, nan=0.0))


def _alarm(name: str, value: float, threshold: float, detail: str) -> Flag:
    if name in FLAGS:
        return flag(name, value, threshold, detail)
    return Flag(name, value=float(value), threshold=float(threshold), detail=detail, **ALARMS[name]._asdict())


def alarms(
    key: Any, model: Model, x: Any, y: Any, threat: Threat, *, index: Any = None, examples: int = 64, steps: int = 20,
    grid: tuple[str, int] = ("rk4", 16), queries: int = 1000, directions: int = 64, radius: float = 1e-2,
    surrogate: Any = None,
) -> Diagnosis:  # fmt: skip
    """Look for what contradicts the attacks on a network behind a solver; influences no number.

    | alarm | raised where |
    | --- | --- |
    | `solver_failed` | a solve failed, clean or attacked |
    | `black_box_stronger`, `transfer_stronger`, `surrogate_stronger` | such an attack broke more than PGD |
    | `more_steps_help` | ten times the steps broke more |
    | `unbounded_attack_fails` | with no limit but the bounds more than chance survived |
    | `zero_gradient` | gradients are exactly zero |
    | `gradients_disagree` | a median cosine (fixed grid, differences, float64 against float32) is below 0.9 |
    | `steps_moved` | steps differ between x and what PGD found by more than a fifth |
    | `batch_coupled` | logits of an example change without its batch |

    Gradients and differences are compared in float64, so that rounding decides nothing: the cosine `rounding` says how
    near the deployed float32 gradients are. Differences are taken at the given radius, along the same random directions
    for all examples.

    Args:
      key: a typed key.
      model: from `continuous.ode_model`, as deployed.
      x: float `[n, ...]`.
      y: int `[n]`.
      threat: the allowed set.
      index: int `[n]` dataset indices.
      examples: at most so many correctly classified ones are looked at.
      steps: of PGD.
      grid: method and steps of the fixed grid.
      queries: of Square, which is left out for inputs that are no images; 0 leaves it out.
      directions: random directions of differences; 0 leaves them out.
      radius: length of differences, in the units of x.
      surrogate: another model, for the transfer of points; None leaves it out.

    Returns:
      Flags, worst first, and numbers: among them `masks`, for each attack which examples it left standing.

    Raises:
      ValueError: if the model does not know its solver.
    """
    from jaxadv import continuous

    x, y = np.asarray(x, np.float32), np.asarray(y)
    index = np.arange(len(x)) if index is None else np.asarray(index)
    cfg = continuous.cfg_of(model, x)
    logits, stats = (jax.tree.map(np.asarray, part) for part in _solved(model, x))
    right = np.flatnonzero(np.isfinite(logits).all(-1) & (logits.argmax(-1) == y))[:examples]
    failed = float(1 - np.mean(stats.ok))
    numbers: dict[str, Any] = {"solver": {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}}
    numbers |= {"clean": _costs(stats), "examples": len(right), "failed_clean": failed}
    found: list[Flag] = []
    if not len(right):
        return Diagnosis(tuple(_failures(failed, 0.0, len(x), 0)), numbers)
    x, y, index = x[right], y[right], index[right]
    smooth = continuous.fixed_step(model, x, *grid)
    wide = dataclasses.replace(threat, eps=_everything(threat, x))  # pyright: ignore[reportArgumentType]
    attacks: dict[str, tuple[Any, Any]] = {
        "pgd": (pgd(threat, steps=steps, name="alarm"), model),
        "pgd, ten times the steps": (pgd(threat, steps=10 * steps, name="alarm"), model),
        "pgd, no limit": (pgd(wide, steps=steps, name="alarm"), model),
        "grid": (transfer(threat, smooth, attack=lambda t: pgd(t, steps=steps, name="alarm")), model),
        "gradient of a grid": (pgd(threat, steps=steps, name="alarm"), continuous.surrogate_gradient(model, smooth)),
    }
    if surrogate is not None:
        attacks["other model"] = (transfer(threat, surrogate), model)
    if queries and x.ndim == 4 and threat.norm in ("linf", "l2", "l1"):
        attacks["square"] = (ATTACKS["square"](threat, queries=queries), model)
    points = {name: _run(attack, key, m, x, y, index) for name, (attack, m) in attacks.items()}
    stands = {name: ~np.asarray(result.success) for name, result in points.items()}
    left = {name: float(mask.mean()) for name, mask in stands.items()}
    numbers |= {"standing": left, "masks": {name: mask.tolist() for name, mask in stands.items()}}
    slack = max(0.03, 3 / len(x)) + 1e-6
    for name, attack, words in (
        ("black_box_stronger", "square", "Square"),
        ("transfer_stronger", "other model", "Points of the other model"),
        ("surrogate_stronger", "grid", f"Points of the grid {grid[0]} x{grid[1]}"),
        ("surrogate_stronger", "gradient of a grid", f"Gradients of the grid {grid[0]} x{grid[1]}"),
        ("more_steps_help", "pgd, ten times the steps", f"{10 * steps} steps"),
    ):
        more = left["pgd"] - left.get(attack, left["pgd"])
        if more > slack and name not in {f.name for f in found}:
            found.append(_alarm(name, more, slack, f"{words} left {left[attack]:.0%} standing, PGD {left['pgd']:.0%}."))
    chance = 1 / logits.shape[1]
    if left["pgd, no limit"] > chance + slack:
        detail = f"{left['pgd, no limit']:.0%} stand, chance is {chance:.0%}."
        found.append(_alarm("unbounded_attack_fails", left["pgd, no limit"], chance, detail))
    found += _gradients(key, model, smooth, x, y, directions, radius, numbers)
    _, after = jax.tree.map(np.asarray, _solved(model, points["pgd"].x))
    numbers["attacked"] = _costs(after)
    numbers["failed_attacked"] = lost = float(1 - np.mean(after.ok))
    found += _failures(failed, lost, len(logits), len(x))
    if stats.num_steps.ndim:
        before = stats.num_steps[right]
        moved = float(np.mean(np.abs(after.num_steps - before) / np.maximum(before, 1)))
        numbers["steps_moved"] = moved
        if moved > 0.2:
            found.append(_alarm("steps_moved", moved, 0.2, f"Step counts change by {moved:.0%} on the mean."))
    found += _coupling(model, x, numbers)
    order = ("error", "warning", "note")
    return Diagnosis(tuple(sorted(found, key=lambda f: order.index(f.severity))), numbers)


def _everything(threat: Threat, x: np.ndarray) -> Any:
    """A budget that reaches every point within the bounds, of the type of the given one."""
    low, high = (np.broadcast_to(np.asarray(e), x.shape[1:]) for e in edges(threat.bounds, x, np))
    reach = {"linf": float(np.max(high - low)), "l1": float(np.sum(high - low))}
    most = reach.get(threat.norm, float(np.linalg.norm(high - low)))
    return np.full_like(np.asarray(threat.eps, np.float32), most) if np.ndim(threat.eps) else most


def _costs(stats: Any) -> dict[str, float]:
    return {
        "steps_mean": float(np.mean(stats.num_steps)),
        "steps_max": float(np.max(stats.num_steps)),
        "rejected_mean": float(np.mean(stats.num_rejected)),
        "nfe_mean": float(np.mean(stats.nfe)),
    }


def _failures(clean: float, attacked: float, n: int, m: int) -> list[Flag]:
    if not clean and not attacked:
        return []
    detail = f"{clean:.1%} of {n} clean solves and {attacked:.1%} of {m} attacked ones."
    return [_alarm("solver_failed", max(clean, attacked), 0.0, detail)]


def _wide(model: Model) -> Model:
    """The model with its parameters in float64."""
    narrow = lambda leaf: getattr(leaf, "dtype", None) == np.float32  # noqa: E731
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) if narrow(leaf) else leaf, model)


def _slopes(
    model: Any, smooth: Any, x: np.ndarray, y: np.ndarray, v: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients through the deployed solver and a fixed grid, and differences along `v`, all in float64."""
    with jax.enable_x64(True):
        model, smooth, x = _wide(model), _wide(smooth), np.asarray(x, np.float64)
        native, grid = (np.asarray(_slope(m, x, y)) for m in (model, smooth))
        return native, grid, np.asarray(_differences(model, x, y, v, radius)) if len(v) else np.zeros((0, len(x)))


def _gradients(
    key: Any, model: Any, smooth: Any, x: np.ndarray, y: np.ndarray, directions: int, radius: float, numbers: dict
) -> list[Flag]:
    """Compare gradients through the deployed solver with those of a fixed grid and with differences, in float64."""
    v = np.asarray(jax.random.normal(key, (directions, *x.shape[1:])), np.float64)
    v = v / np.linalg.norm(v.reshape(directions, -1), axis=1).reshape(-1, *(1,) * (x.ndim - 1))
    found, deployed = [], np.asarray(_slope(model, x, y))
    native, grid, seen = _slopes(model, smooth, x, y, v, radius)
    cosines = {"grid": float(np.median(_cosine(native, grid)))}
    if directions:
        told = v.reshape(directions, -1) @ native.reshape(len(x), -1).T
        cosines["differences"] = float(np.median(_cosine(told.T, seen.T)))
    cosines["rounding"] = float(np.median(_cosine(deployed, native)))
    numbers["cosines"] = cosines
    worst = min(cosines, key=lambda name: cosines[name])
    if cosines[worst] < 0.9:
        detail = ", ".join(f"{name} {value:.2f}" for name, value in cosines.items())
        found.append(_alarm("gradients_disagree", cosines[worst], 0.9, f"Median cosines: {detail}."))
    zero = float(np.mean(~deployed.reshape(len(x), -1).any(1)))
    numbers["zero_gradient"] = zero
    if zero > 0.01:
        found.append(_alarm("zero_gradient", zero, 0.01, f"{zero:.0%} of the examples."))
    return found


def _coupling(model: Any, x: np.ndarray, numbers: dict) -> list[Flag]:
    """Ask about a few examples alone."""
    some = x[:4]
    together = logits_of(model, x, len(x))[: len(some)]
    alone = logits_of(model, some, 1)
    spread = max(float(np.nanmax(np.abs(together), initial=0.0)), 1e-30)
    apart = float(np.nanmax(np.abs(together - alone), initial=0.0)) / spread
    numbers["apart_alone"] = apart
    return [_alarm("batch_coupled", apart, 1e-3, f"Logits moved by {apart:.2g} of their size.")] if apart > 1e-3 else []


# --------------------------------------------------------------------------------------------------------------- report


def ladder(model: Model, points: Any, y: Any, tolerances: Sequence[float] = TOLERANCES, batch_size: int = 500) -> dict:
    """Classify the same inputs at several tolerances.

    Args:
      model: from `continuous.ode_model`.
      points: float `[n, ...]`.
      y: int `[n]`.
      tolerances: relative and absolute.
      batch_size: rows of a forward pass.

    Returns:
      `deployed` and each tolerance as a word, to the accuracy; a failed solve is an error.
    """
    points, y = np.asarray(points, np.float32), np.asarray(y)
    changes = {f"{value:g}": Change("tolerance", value=value) for value in tolerances}
    asked = {"deployed": model} | {name: change(model, points) for name, change in changes.items()}
    logits = {name: logits_of(m, points, batch_size) for name, m in asked.items()}
    return {name: float(np.mean(np.isfinite(z).all(-1) & (z.argmax(-1) == y))) for name, z in logits.items()}


def ode_report(
    key: Any, model: Model, x: Any, y: Any, threat: Threat, *, attacks: Any = "ode", diagnostics: Any = True,
    tolerances: Sequence[float] = TOLERANCES, batch_size: int = 500, surrogate: Any = None, **settings: Any,
) -> Any:  # fmt: skip
    """Evaluate a network behind a solver: the protocol, its alarms, and the same points at other tolerances.

    Args:
      key: a typed key.
      model: from `continuous.ode_model`, as deployed.
      x: float `[n, ...]` examples within the threat's bounds.
      y: int `[n]` labels.
      threat: what the attacker may do.
      attacks: see `evaluate`; `stages(...)` with other budgets. The protocol's name stands for `DRAWS` draws too where
        the end time is random.
      diagnostics: True for `alarms`, a function of its signature, or False.
      tolerances: at which clean and adversarial examples are classified again.
      batch_size: rows of a forward pass.
      surrogate: another model to carry points over from.
      **settings: of `evaluate`.

    Returns:
      The report; its numbers hold `ladder` (accuracies at the tolerances, clean and adversarial) and `failed` (shares
      of solves).

    Raises:
      ValueError: if the model does not know its solver, or `evaluate` refuses.
    """
    from jaxadv import continuous
    from jaxadv.evaluate.engine import evaluate

    cfg = continuous.cfg_of(model, np.asarray(x)[:1])
    look = partial(alarms, surrogate=surrogate) if diagnostics is True else diagnostics
    timed = continuous.random_time(model) is not None
    if timed and attacks == "ode":
        attacks = stages(threat.norm, draws=DRAWS)
    given = {"attacks": attacks, "diagnostics": look, "batch_size": batch_size, "surrogate": surrogate}
    report = evaluate(key, model, x, y, threat, **given, **settings)
    entry = report.models[0]
    points = {"clean": x} if entry.x_adv is None else {"clean": x, "adversarial": entry.x_adv}
    told = {name: ladder(model, at, y, tolerances, batch_size) for name, at in points.items()}
    failed = {name: _failed(model, np.asarray(at, np.float32), batch_size) for name, at in points.items()}
    flags, numbers = list(entry.flags), dict(entry.diagnostics or {}) | {"ladder": told, "failed": failed}
    for name, row in told.items():
        apart = max((abs(row["deployed"] - value) for value in row.values()), default=0.0)
        if apart > 0.05 and cfg.mode == "adaptive" and "tolerance_decides" not in {f.name for f in flags}:
            words = ", ".join(f"{at} {100 * value:.1f} %" for at, value in row.items())
            flags.append(_alarm("tolerance_decides", apart, 0.05, f"Accuracy on {name} examples: {words}."))
    if max(failed.values()) and "solver_failed" not in {f.name for f in flags}:
        flags += _failures(failed["clean"], failed.get("adversarial", 0.0), len(y), len(y))
    statements = [
        *entry.statements,
        f"The model is solved with {cfg.method}, {cfg.mode}, "
        + (f"{cfg.n_steps} steps" if cfg.mode == "fixed" else f"rtol {cfg.rtol:g}, atol {cfg.atol:g}")
        + f", {cfg.batching}, precision {cfg.precision}; a failed solve counts as broken "
        f"({100 * max(failed.values()):.1f} % failed). Robust means robust to attacks through every solver listed.",
    ]
    if timed:
        statements.append(
            "Its end time is random: it is judged by the exact average over it (quadrature), not by draws."
        )
    order = ("error", "warning", "note")
    flags.sort(key=lambda f: order.index(f.severity))
    entry = dataclasses.replace(entry, flags=flags, diagnostics=numbers, statements=statements)
    return dataclasses.replace(report, models=[entry])


def _failed(model: Any, points: np.ndarray, batch_size: int) -> float:
    """Share of solves that fail, as deployed."""
    ok = [np.asarray(_solved(model, points[i : i + batch_size])[1].ok) for i in range(0, len(points), batch_size)]
    return float(1 - np.mean(np.concatenate([np.atleast_1d(part) for part in ok])))
