"""Programs as data: what every reader of jaxprs needs, over the public `jax.extend.core`, and what programs cost."""

import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core as jex


def read(atom: Any, known: dict) -> Any:
    """Look up an operand.

    Args:
      atom: a literal or a variable of a jaxpr.
      known: variables to values.

    Returns:
      The value.
    """
    return atom.val if isinstance(atom, jex.Literal) else known[atom]


def bind(eqn: Any, values: list, params: dict) -> Any:
    """Evaluate an equation in the current trace.

    Args:
      eqn: the equation.
      values: of its operands.
      params: of its primitive; those of the equation, or changed ones.

    Returns:
      The value, or the list of them where the primitive has several.
    """
    bound = eqn.primitive.get_bind_params(params)
    functions, bound = bound if isinstance(bound, tuple) else ((), bound)  # jax 0.10 returns a pair for some primitives
    return eqn.primitive.bind(*functions, *values, **bound)


def held(value: Any) -> list:
    """Find the open jaxprs that a parameter of a primitive holds.

    Args:
      value: the parameter.

    Returns:
      The jaxprs, none for most parameters.
    """
    if isinstance(value, jex.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, jex.Jaxpr):
        return [value]
    if isinstance(value, (tuple, list)):
        return [j for v in value for j in held(v)]
    return []


def products(jaxpr: jex.Jaxpr, wanted: Sequence[bool] | None = None) -> int:
    """Count the multiplications in matrix products and convolutions that the results of a program need.

    Loops of known length count as often as they run, branches as the dearest of them. What no wanted result depends on
    is left out, as a compiler does; inside of loops and branches everything counts.

    Args:
      jaxpr: the program.
      wanted: which of its results; all by default.

    Returns:
      The number.

    Raises:
      ValueError: if there are products in a loop that runs until a condition holds.
    """
    wanted = [True] * len(jaxpr.outvars) if wanted is None else wanted
    live = {id(v) for v, asked in zip(jaxpr.outvars, wanted, strict=True) if asked}
    total = 0
    for eqn in reversed(jaxpr.eqns):
        asked = [id(v) in live for v in eqn.outvars]
        if not any(asked) and not eqn.effects:
            continue
        live |= {id(v) for v in eqn.invars}
        total += _products(eqn, asked)
    return total


def _products(eqn: Any, asked: list[bool]) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name in ("dot_general", "conv_general_dilated"):
        right, size = eqn.invars[1].aval.shape, math.prod(eqn.outvars[0].aval.shape)
        if name == "conv_general_dilated":
            between = math.prod(params["lhs_dilation"])  # most of a stretched input is zeros
            return size * math.prod(right) // right[params["dimension_numbers"].rhs_spec[0]] // between
        return size * math.prod(right[i] for i in params["dimension_numbers"][0][1])
    inner = [j for value in params.values() for j in held(value)]
    if name in ("scan", "while", "cond"):
        each = [products(j) for j in inner]
        if name == "while" and any(each):
            raise ValueError(
                "products can only be counted in loops of known length; got one that runs until a condition holds."
            )
        return max(each, default=0) if name == "cond" else sum(each) * params.get("length", 1)
    return sum(products(j, asked if len(j.outvars) == len(asked) else None) for j in inner)
