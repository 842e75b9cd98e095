"""Protocols as data: which attacks run, in which order, how often, at which budget.

What lives here: the table `PROTOCOLS`, and how stages become attacks at a given budget. What does not: running them
(`engine`), AutoAttack's own list (`attacks.autoattack`) and the attacks themselves. A protocol is a function from the
norm of the threat to a tuple of stages; a suite that comes later is one more row of the table.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxadv import losses
from jaxadv.attacks import ATTACKS, scaled
from jaxadv.attacks.autoattack import Chain
from jaxadv.attacks.autoattack import Stage as Stage
from jaxadv.attacks.autoattack import stages as autoattack
from jaxadv.core import Attack, Threat, check, pytree, static
from jaxadv.evaluate import odes

BALLS = ("linf", "l2", "l1")
"""Norms that AutoAttack knows; other threats get `GRADIENT` in its place."""

QUICK = (Stage("fgsm"), Stage("pgd", (("steps", 20),)))
GRADIENT = (
    Stage("fgsm"),
    Stage("pgd", (("steps", 40), ("name", "pgd_ce"))),
    Stage("pgd", (("steps", 100), ("loss", losses.margin), ("name", "pgd_margin")), restarts=5),
)
"""One step, then cross-entropy, then the margin with restarts: for every threat, and for targeted evaluations."""


def _suite(version: str) -> Callable[[str], tuple[Stage, ...]]:
    return lambda norm: autoattack(norm, version) if norm in BALLS else GRADIENT


def _fast(norm: str) -> tuple[Stage, ...]:
    if norm not in BALLS:
        return GRADIENT[:2]
    hard = norm == "l1"  # there short searches miss most
    shrink: tuple = (("large_eps", True),) if hard else ()
    return (
        Stage("apgd_ce", (("steps", 100 if hard else 50), *shrink)),
        Stage("apgd_t", (("targets", 3), ("steps", 50), *shrink)),
        Stage("fab_t", (("targets", 5 if hard else 3),)),
        Stage("square", (("queries", 1000),)),
    )


def _thorough(norm: str) -> tuple[Stage, ...]:
    if norm not in BALLS:
        return (*GRADIENT, Stage("mi_fgsm", (("steps", 50),)))
    first = autoattack(norm, "standard")
    shrink: tuple = (("large_eps", True),) if norm == "l1" else ()
    more = (
        Stage("apgd_dlr", (("restarts", 5), *shrink)),
        Stage("apgd_t", (("targets", 9), ("restarts", 3), ("name", "apgd_t_restarts"), *shrink)),
        Stage("mi_fgsm", (("steps", 50), ("loss", losses.margin))),
        Stage("pgd", (("steps", 100), ("loss", losses.margin), ("name", "pgd_margin")), restarts=5),
    )
    return (*first, *more)


PROTOCOLS: dict[str, Callable[[str], tuple[Stage, ...]]] = {
    "quick": lambda norm: QUICK,
    "fast": _fast,
    "standard": _suite("standard"),
    "plus": _suite("plus"),
    "rand": _suite("rand"),
    "thorough": _thorough,
    "gradient": lambda norm: GRADIENT,
    "ode": odes.stages,
}
"""Protocols by name, each a function of the threat's norm. `standard`, the default, is AutoAttack; `custom` is the name
for attacks of your own, passed in the place of a protocol. `ode` is for models that know their solver
(`continuous.ode_model`), see `odes`, whose `ode_report` adds its alarms. `fast` takes 26 to 41 % of the gradients of
`standard` and a quarter to a third of its forward passes. On the nine networks and norms of
`benchmarks/parity/protocols.py` it missed 29 of 4,500 examples that `standard` broke (0.64 %, 95 % interval 0.43 to
0.92 %) and broke 2 others; robust accuracy was higher by 0 to 1 point, and by 2.4 in l1 on a network that masks
its gradients."""


def with_eps(threat: Threat, eps: float) -> Threat:
    """Return the threat with another budget, of the same type, so that programs are reused.

    Args:
      threat: a frozen dataclass with the field `eps`.
      eps: the new budget.

    Returns:
      The threat.
    """
    old = threat.eps
    new = float(eps) if isinstance(old, (int, float)) else np.asarray(eps, np.asarray(old).dtype)
    return dataclasses.replace(threat, eps=new)  # pyright: ignore[reportArgumentType]


def stages_of(attacks: Any, restarts: int | None, norm: str = "linf") -> tuple[Stage, ...]:
    """Read the arguments `attacks` and `restarts` of an evaluation.

    Args:
      attacks: a protocol's name, or attacks, names, functions of a threat and stages; None is `standard`. A `Chain` is
        taken apart into its attacks.
      restarts: how often every attack runs, or None for what the protocol says.
      norm: of the threat.

    Returns:
      The stages.

    Raises:
      ValueError: on unknown names, no attack, or a number of restarts below 1.
      TypeError: on other things.
    """
    if attacks is None or isinstance(attacks, str) and attacks in PROTOCOLS:
        chosen = PROTOCOLS[attacks or "standard"](norm)
    else:
        several = attacks if isinstance(attacks, (tuple, list)) and not isinstance(attacks, Stage) else (attacks,)
        chosen = tuple(stage for a in several for stage in _apart(a))
    if not chosen:
        raise ValueError("attacks must name at least one attack; got none. Pass attacks='standard' for the default.")
    if restarts is not None:
        check.whole("restarts", restarts)
        chosen = tuple(stage._replace(restarts=restarts) for stage in chosen)
    for stage in chosen:
        if isinstance(stage.attack, str):
            check.choice("attack or protocol", stage.attack, ATTACKS if len(chosen) > 1 else {**ATTACKS, **PROTOCOLS})
        elif not callable(stage.attack) and not isinstance(stage.attack, Attack):
            raise TypeError(
                f"attacks must be names, attacks or functions of a threat; got {type(stage.attack).__name__}."
            )
    return chosen


def _apart(given: Any) -> tuple[Stage, ...]:
    if isinstance(given, Chain):
        return tuple(Stage(part, (), times) for part, times in zip(given.parts, given.restarts))
    return (given if isinstance(given, Stage) else Stage(given),)


@pytree
class Each:
    """The attack of a stage as a function of budgets `[b]`, for threats with a budget for each example."""

    threat: Threat
    stage: Stage = static()

    def __call__(self, eps: Any) -> Attack:
        """Return the attack on rows with these budgets."""
        return build(self.stage, self.threat, dataclasses.replace(self.threat, eps=eps))  # pyright: ignore


def build(stage: Stage, base: Threat, threat: Threat) -> Any:
    """Return the attack of a stage at one budget.

    Args:
      stage: the stage.
      base: the threat of the evaluation.
      threat: the same but for its budget.

    Returns:
      The attack.

    Raises:
      ValueError: if a built attack is to follow a budget for each example.
    """
    if not isinstance(stage.attack, Attack):
        builder = ATTACKS[stage.attack] if isinstance(stage.attack, str) else stage.attack
        return builder(threat, **dict(stage.settings))
    if np.ndim(base.eps):
        raise ValueError(
            "attacks must be given by name or as functions of a threat where each example has its own eps; got a built "
            f"{stage.attack.name!r}, whose budgets cannot follow the examples into batches. Pass its name."
        )
    if threat.eps is base.eps:
        return stage.attack
    return scaled(stage.attack, float(threat.eps) / float(base.eps))


def describe(attack: Any) -> dict[str, Any]:
    """Return an attack's settings as JSON: numbers and words as they are, functions by name.

    Args:
      attack: a frozen dataclass.

    Returns:
      The settings, without name and threat.
    """

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if isinstance(value, Attack):
            return {"name": value.name} | describe(value)
        if isinstance(value, (np.ndarray, np.generic, jax.Array)):
            array = np.asarray(value)
            number = array.size == 1 and np.issubdtype(array.dtype, np.number)
            return plain(array.item()) if number else f"{array.dtype}{list(array.shape)}"
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            return [plain(v) for v in value]
        return getattr(value, "__name__", type(value).__name__)

    fields = dataclasses.fields(attack) if dataclasses.is_dataclass(attack) else ()
    values = {f.name: getattr(attack, f.name) for f in fields if f.name != "name"}
    return {name: plain(value) for name, value in values.items() if not isinstance(value, Threat)}
