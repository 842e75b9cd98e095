"""Protocols as data: which attacks run, in which order, how often, at which budget.

What lives here: `Stage`, the table `PROTOCOLS`, and how stages become attacks at a given budget. What does not: running
them (`engine`) and the attacks themselves. A protocol is a tuple of stages; a suite that comes later is one more row of
the table.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxadv import losses
from jaxadv.attacks import ATTACKS
from jaxadv.core import Attack, Threat, check


class Stage(NamedTuple):
    """One attack of a protocol.

    Attributes:
      attack: a name of `attacks.ATTACKS`, a function from a threat to an attack, or an attack.
      settings: arguments for the named or given function, as pairs.
      restarts: how often it runs on the survivors, each time with other random numbers.
    """

    attack: Any
    settings: tuple[tuple[str, Any], ...] = ()
    restarts: int = 1


PROTOCOLS: dict[str, tuple[Stage, ...]] = {
    "quick": (Stage("fgsm"), Stage("pgd", (("steps", 20),))),
    "standard": (
        Stage("fgsm"),
        Stage("pgd", (("steps", 40), ("name", "pgd_ce"))),
        Stage("pgd", (("steps", 100), ("loss", losses.margin), ("name", "pgd_margin")), restarts=5),
    ),
}
"""Protocols by name. `standard` is the default: one step, then cross-entropy, then the margin with restarts."""


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


def refit(attack: Any, old: float, new: float) -> Any:
    """Give an attack another budget: budgets of its threats and its step sizes are scaled by `new / old`.

    Args:
      attack: a frozen dataclass with `threat` and perhaps `step_size`, or one that holds such attacks.
      old: the budget it was made for.
      new: the budget it gets.

    Returns:
      The attack; its structure is unchanged, so compiled programs are reused.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(attack):
        value: Any = getattr(attack, field.name)
        if field.name == "step_size":
            changes[field.name] = value * (new / old)
        elif isinstance(value, Threat):
            changes[field.name] = with_eps(value, new if float(value.eps) == old else float(value.eps) * (new / old))
        elif isinstance(value, Attack):
            changes[field.name] = refit(value, old, new)
        elif isinstance(value, tuple) and value and all(isinstance(v, Attack) for v in value):
            changes[field.name] = tuple(refit(v, old, new) for v in value)
    return dataclasses.replace(attack, **changes)


def stages_of(attacks: Any, restarts: int | None) -> tuple[Stage, ...]:
    """Read the arguments `attacks` and `restarts` of an evaluation.

    Args:
      attacks: a protocol's name, or attacks, names, functions of a threat and stages; None is `standard`.
      restarts: how often every attack runs, or None for what the protocol says.

    Returns:
      The stages.

    Raises:
      ValueError: on unknown names, no attack, or a number of restarts below 1.
      TypeError: on other things.
    """
    if attacks is None or isinstance(attacks, str) and attacks in PROTOCOLS:
        chosen = PROTOCOLS[attacks or "standard"]
    else:
        several = attacks if isinstance(attacks, (tuple, list)) and not isinstance(attacks, Stage) else (attacks,)
        chosen = tuple(a if isinstance(a, Stage) else Stage(a) for a in several)
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
    return refit(stage.attack, float(base.eps), float(threat.eps))


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
