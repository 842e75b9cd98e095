"""The loop door: run a step n times inside a compiled graph or from the host, at the speed of the step compiled alone.

On CPU, XLA rewrites a convolution into the layout of its fast path only in the entry computation of a program, never in
the body of a loop. The input gradient of a convolution has its kernel transposed there and falls to a path that is 2.5
to 3 times slower. `canonical` cures it from outside: it traces a function to a jaxpr and evaluates it again with every
convolution in a fast form (see `core.convolution`), inside jitted calls, branches, loops and rematerialized blocks too.
Custom derivatives are left as they are, so that they stay differentiable. What a loop's body computes from constants
alone, such as the transformed kernels of minimal filtering, is computed once, before the loop. On other backends it
does nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from jaxadv.core import check
from jaxadv.core.convolution import canonical_convolution
from jaxadv.core.jaxprs import bind, held, read

_INNER = {  # higher-order primitives to rebuild, and the parameters that hold their closed jaxprs
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
    "checkpoint": ("jaxpr",),
    "remat2": ("jaxpr",),
}
_INLINE = ("jit", "pjit", "closed_call", "core_call")


def loop(step: Callable, state: Any, n: int, *, until: Callable | None = None, host: bool = False) -> Any:
    """Run `state = step(state)` n times, or until every row is done.

    Args:
      step: a pure function from a state to the next.
      state: the first state, a pytree of arrays; under `shard_map` its leaves must start from data.
      n: at most so many steps.
      until: state to bool `[b]`; the loop ends early when all rows are True. None runs exactly `n` steps (and can be
        differentiated in reverse).
      host: dispatch each step from Python instead of compiling a loop; `step` is then called as it is, so pass a jitted
        one.

    Returns:
      The last state.

    Raises:
      ValueError: if `n` is not a whole number of at least 0.
    """
    check.whole("n", n, least=0)
    if host:
        for _ in range(n):
            if until is not None and bool(jnp.all(until(state))):
                break
            state = step(state)
        return state
    if n == 0:
        return state
    body = _prepared(step, state)
    if until is None:
        return lax.fori_loop(0, n, lambda _, s: body(s), state)

    def busy(carry):
        i, s = carry
        return (i < n) & ~jnp.all(until(s))

    return lax.while_loop(busy, lambda carry: (carry[0] + 1, body(carry[1])), (0, state))[1]


def canonical(fn: Callable, *, enabled: bool | None = None, form: str | None = None) -> Callable:
    """Return a function with the same numbers whose convolutions are fast inside loops on CPU.

    Args:
      fn: a pure function of pytrees of arrays.
      enabled: rewrite or not; None rewrites where the default backend is the CPU.
      form: force one form of `core.convolution.FORMS`; None chooses by shape.

    Returns:
      The function, rewritten when it is traced. Differentiable, and unchanged where it has no convolutions.
    """

    def rewritten(*args):
        on = jax.default_backend() == "cpu" if enabled is None else enabled
        if not on:
            return fn(*args)
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        leaves = jax.tree.leaves(args)
        if _has_convolution(closed.jaxpr):
            out = _evaluate(closed.jaxpr, closed.consts, leaves, form)
        else:
            out = jex.jaxpr_as_fun(closed)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return rewritten


def _prepared(step: Callable, state: Any) -> Callable:
    """The body of a loop: convolutions in their fast form, and what does not depend on the state computed here."""
    if jax.default_backend() != "cpu":
        return step
    closed, shape = jax.make_jaxpr(step, return_shape=True)(state)
    if not _has_convolution(closed.jaxpr):
        return step
    closed: Any = _rewrite(closed, None)
    known = dict(zip(closed.jaxpr.constvars, closed.consts))
    moved, rest, needed = _split(closed.jaxpr, set(known))
    _work(moved, known)
    known = {var: known[var] for var in (*closed.jaxpr.constvars, *needed)}

    def body(state):
        inside = known | dict(zip(closed.jaxpr.invars, jax.tree.leaves(state), strict=True))
        _work(rest, inside)
        return jax.tree.unflatten(jax.tree.structure(shape), [read(v, inside) for v in closed.jaxpr.outvars])

    return body


def _split(jaxpr: Any, fixed: set) -> tuple[list, list, list]:
    """Part the equations of a loop's body: those of fixed variables, the rest, and what the rest needs of the former.

    An equation that makes much of little (a broadcast) stays inside, where it costs no memory.
    """

    def size(atoms):
        shapes = [a.aval for a in atoms if not isinstance(a, jex.Literal) and hasattr(a.aval, "shape")]
        return sum(math.prod(a.shape) for a in shapes)

    moved, rest, made = [], [], set()
    for eqn in jaxpr.eqns:
        known = all(isinstance(a, jex.Literal) or a in fixed or a in made for a in eqn.invars)
        if known and not eqn.effects and size(eqn.outvars) <= 2 * size(eqn.invars):
            moved.append(eqn)
            made |= set(eqn.outvars)
        else:
            rest.append(eqn)
    used = [a for eqn in rest for a in eqn.invars] + list(jaxpr.outvars)
    return moved, rest, list(dict.fromkeys(a for a in used if not isinstance(a, jex.Literal) and a in made))


def _work(equations: list, known: dict) -> None:
    """Evaluate equations as they are, adding to what is known."""
    for eqn in equations:
        out = bind(eqn, [read(a, known) for a in eqn.invars], eqn.params)
        known.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))


def _has_convolution(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name == "conv_general_dilated"
        or any(_has_convolution(j) for value in eqn.params.values() for j in held(value))
        for eqn in jaxpr.eqns
    )


def _evaluate(jaxpr: Any, consts: Any, args: Any, form: str | None) -> list:
    """Evaluate a jaxpr in the current trace, convolutions in their fast form."""
    known: dict = {}

    known.update(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        values = [read(atom, known) for atom in eqn.invars]
        out = _equation(eqn, values, form)
        known.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))
    return [read(atom, known) for atom in jaxpr.outvars]


def _equation(eqn: Any, values: list, form: str | None) -> Any:
    name, params = eqn.primitive.name, eqn.params
    if name == "conv_general_dilated":
        return canonical_convolution(values[0], values[1], params, form)
    inner = [j for value in params.values() for j in held(value)]
    if any(_has_convolution(j) for j in inner):
        if name in _INLINE:
            closed = params.get("jaxpr", params.get("call_jaxpr"))
            return _evaluate(closed.jaxpr, closed.consts, values, form)
        if name in _INNER:
            params = params | {p: _rewrite(params[p], form) for p in _INNER[name]}
            if name == "while":
                values, params = _lightened(values, params)
    return bind(eqn, values, params)


def _lightened(values: list, params: dict) -> tuple[list, dict]:
    """Take what the body of a while loop computes from constants out of it."""
    closed, few = params["body_jaxpr"], params["body_nconsts"]
    at = params["cond_nconsts"] + few
    given = closed.jaxpr.invars
    known = dict(zip(closed.jaxpr.constvars, closed.consts))
    moved, rest, needed = _split(closed.jaxpr, set(known) | set(given[:few]))
    if not needed:
        return values, params
    outside = known | dict(zip(given[:few], values[params["cond_nconsts"] : at]))
    _work(moved, outside)

    def body(*args):
        inside = known | dict(zip([*given[:few], *needed, *given[few:]], args, strict=True))
        _work(rest, inside)
        return [read(v, inside) for v in closed.jaxpr.outvars]

    new = jax.make_jaxpr(body)(*(_like(v.aval) for v in [*given[:few], *needed, *given[few:]]))
    params = params | {"body_jaxpr": new, "body_nconsts": few + len(needed)}
    return [*values[:at], *(outside[v] for v in needed), *values[at:]], params


def _like(aval: Any) -> Any:
    over_devices = {"sharding": aval.sharding, "manual_axis_type": aval.manual_axis_type}  # shard_map checks the latter
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type, **over_devices)


def _rewrite(value: Any, form: str | None) -> Any:
    """Trace a held jaxpr anew, with its convolutions in their fast form."""
    if isinstance(value, (tuple, list)):
        return type(value)(_rewrite(v, form) for v in value)
    is_open = not hasattr(value, "consts")  # from jax 0.12 on every jaxpr holds its constants
    jaxpr, consts = (value, ()) if is_open else (value.jaxpr, value.consts)
    closed = jax.make_jaxpr(lambda *args: _evaluate(jaxpr, consts, args, form))(*(_like(v.aval) for v in jaxpr.invars))
    return closed.jaxpr if is_open else closed
