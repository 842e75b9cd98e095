"""Typed shardings at the door of an attack: `AxisType.Explicit`, what `jax.make_mesh` gives if not told otherwise.

What lives here: `untyped`. What does not: meshes and executors (room `parallel`).
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxadv.core.types import Result

_Run = TypeVar("_Run", bound=Callable[..., Result])


def untyped(run: _Run) -> _Run:
    """Let a search take examples whose sharding is part of their type.

    Typed shardings have no rule for much that a search does (rows of a table that rows choose, draws beside rows), and
    the user's network may have no rules either. So inside the compiler decides, as it does without types, and what
    comes out is typed again: the rows lie where those of `x` did.

    Args:
      run: `run(attack, key, model, x, y, **settings)`, pure; every leaf of its answer has the rows of `x`.

    Returns:
      The same function.
    """

    @functools.wraps(run)
    def at_the_door(attack, key, model, x, y, **settings):
        if not isinstance(x, jax.Array) or not (axes := _typed(jax.typeof(x).sharding.mesh)):
            return run(attack, key, model, x, y, **settings)
        where: Any = jax.typeof(x).sharding
        leaves, form = jax.tree.flatten((attack, key, model, x, y, settings))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

        def inside(*arrays):
            for i, array in zip(places, arrays):
                leaves[i] = array
            *given, named = form.unflatten(leaves)
            return run(*given, **named)

        rows = NamedSharding(where.mesh, PartitionSpec(where.spec[0]))
        decided: Any = jax.sharding.auto_axes(inside, axes=axes, out_sharding=rows)
        return decided(*(leaves[i] for i in places))

    return at_the_door  # pyright: ignore[reportReturnType]


def _typed(mesh: Any) -> tuple[str, ...]:
    """The axes of a mesh that are part of types."""
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types or ()) if kind == AxisType.Explicit)
