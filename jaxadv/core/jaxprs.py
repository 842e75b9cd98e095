"""Programs as data: the three things that every reader of jaxprs needs, over the public `jax.extend.core`."""

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
