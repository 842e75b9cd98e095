"""The same attack at another budget.

What lives here: `scaled`. What does not: any search. Budgets and step sizes are data of an attack, so a scaled attack
reuses the compiled programs of the one it was made from.
"""

import dataclasses
from typing import Any

from jaxadv.core import Attack, Threat, check


def scaled(attack: Any, factor: Any) -> Any:
    """Multiply the budget and the step size of an attack, and of the attacks that it holds.

    Args:
      attack: a frozen dataclass with `threat` and perhaps `step_size`, or one that holds such attacks.
      factor: a positive number, or `[b]`, one for each example; may be traced.

    Returns:
      The attack; its structure is unchanged.

    Raises:
      ValueError: if a known factor is not positive.
    """
    check.positive("factor", factor, "A budget of 0 is the clean accuracy.")
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(attack):
        value: Any = getattr(attack, field.name)
        if field.name == "step_size":
            changes[field.name] = value * factor
        elif isinstance(value, Threat):
            changes[field.name] = dataclasses.replace(value, eps=value.eps * factor)  # pyright: ignore
        elif isinstance(value, Attack):
            changes[field.name] = scaled(value, factor)
        elif isinstance(value, tuple) and value and all(isinstance(v, Attack) for v in value):
            changes[field.name] = tuple(scaled(v, factor) for v in value)
    return dataclasses.replace(attack, **changes)
