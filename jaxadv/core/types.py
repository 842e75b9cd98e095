"""The value types that all rooms share: models, trainables, threats, attacks and their results.

What lives here: shapes of data and the five-function protocol of an attack. What does not: any arithmetic of attacks,
threats or losses. The one rule behind every type: *a row of the batch lives alone*. Each leaf of an attack's state and
of a result carries the batch on its first axis, so rows can be refilled, padded, reordered and moved between devices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Model = jax.tree_util.Partial
"""A callable pytree, `Partial(function, *variables)`: logits `[b, k]` from a batch `[b, ...]`, and nothing else."""

PyTree = Any
_T = TypeVar("_T")


def as_callable(fn: Any, what: str = "model") -> Any:
    """Return a pytree that can be called, as jitted functions take it.

    Args:
      fn: such a pytree, or a plain function, which becomes one (its arrays then count as constants: a new function
        compiles anew).
      what: what it is, for the message.

    Returns:
      The pytree.

    Raises:
      TypeError: if it cannot be called.
    """
    if not callable(fn):
        cure = "Make one of it with models.model." if isinstance(fn, Trainable) else "Arguments in another order?"
        raise TypeError(
            f"{what} must be a function of a batch, or a pytree that is one; got {type(fn).__name__}. {cure}"
        )
    leaves = jax.tree.leaves(fn)
    return Model(fn) if len(leaves) == 1 and leaves[0] is fn else fn


@dataclass_transform(frozen_default=True, eq_default=False)
def pytree(cls: type[_T]) -> type[_T]:
    """Make a frozen dataclass a pytree; fields declared with `static()` become part of its structure.

    Args:
      cls: a class whose annotated fields hold arrays, pytrees, or (marked `static()`) hashable settings.

    Returns:
      The frozen dataclass, registered with jax.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    meta = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if not f.metadata.get("static")]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)


def static(**settings: Any) -> Any:
    """Declare a field of a `pytree` class as a hashable setting that belongs to the structure, not to the data.

    Args:
      **settings: what `dataclasses.field` takes, e.g. `default`.

    Returns:
      The dataclass field.
    """
    return dataclasses.field(metadata={"static": True}, **settings)


class Trainable(NamedTuple):
    """A network as training sees it: a pure `apply` with its parameters and its mutable state.

    `apply(params, state, x, *, bn='eval', bn_groups=1, axis_name=None, mask=None, key=None, taps=(), hints=None) ->
    (logits [b, k], state)`.

    | `bn` | statistics used | running statistics |
    | --- | --- | --- |
    | `'eval'` | running | unchanged |
    | `'train'` | of the batch | updated |
    | `'local'` | of the batch | unchanged |

    Batch statistics are global over `axis_name` (a mapped axis, or None) unless `bn_groups` > 1 asks for groups; rows
    whose `mask` is False stay out of them. `key` feeds dropout and other noise; None means none. With `taps`, names of
    layers, the pair (logits, name to value) stands in the place of the logits; `hints` tells something to layers that
    ask for it. A user's own `apply` needs the last two only where an objective uses them.
    """

    apply: Callable[..., tuple[Array, PyTree]]
    params: PyTree
    state: PyTree


class Targets(NamedTuple):
    """What a targeted attack aims at, given to it in the place of `y`.

    `label` int `[b]` is the true class (reported, never used by the search) and `target` int `[b]` the class to reach.
    """

    label: Int[Array, " b"]
    target: Int[Array, " b"]


class Result(NamedTuple):
    """What an attack found, one row for each example.

    Attributes:
      x: `[b, ...]` the returned points, feasible and in the range of the data.
      score: `[b]` the value of the attack's criterion at `x`, lower is worse for the model. It orders candidates and
        decides nothing; a non-finite score ranks as minus infinity.
      success: `[b]` whether the model, asked again in float32 at `x`, fails there (see `core.robust`).
      size: `[b]` the size of the perturbation in the norm of the threat.
      queries: `[b]` forward passes that the search spent on this row.
      grads: `[b]` gradients that the search spent on this row.
      flags: name to `[b]`: `nonfinite` (logits with NaN or infinity were met), `zero_gradient` (an exactly zero
        gradient was met), `infeasible` (the given example lies outside the bounds).
    """

    x: Float[Array, "b ..."]
    score: Float[Array, " b"]
    success: Bool[Array, " b"]
    size: Float[Array, " b"]
    queries: Int[Array, " b"]
    grads: Int[Array, " b"]
    flags: dict[str, Bool[Array, " b"]]


class Threat:
    """The set of inputs that an attacker may present in place of `x`. All functions are batched, first axis `[b]`.

    A threat is a pytree: `eps` (the budget, in units of `x`, scalar or `[b]`) and `bounds` (lowest and highest value of
    a feature) are data, so that new budgets do not recompile and may be traced.

    | member | promise |
    | --- | --- |
    | `project(point, x)` | a feasible point near `point`; feasible points stay where they are |
    | `size(point, x)` | `[b]` perturbation in the norm of the threat; numpy float64 in gives float64 out |
    | `budget(x)` | the largest size that counts as feasible, rounding included |
    | `contains(point, x)` | `[b]` feasibility as `core.feasible` defines it |
    | `sample(keys, x)` | a random feasible point, one typed key for each row |
    | `steepest(grad)` | the direction of size one that raises the linear function `grad` the most |
    """

    norm: str
    eps: Any
    bounds: tuple[Any, Any]

    def project(self, point: Float[Array, "b ..."], x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return a feasible point near `point`."""
        raise TypeError(f"{type(self).__name__} must define project")

    def size(self, point, x):
        """Return the size `[b]` of the perturbation `point - x`."""
        raise TypeError(f"{type(self).__name__} must define size")

    def budget(self, x, xp: Any = jnp) -> Any:
        """Return the largest size that counts as feasible: `eps` and the rounding that `core.tolerance` allows."""
        raise TypeError(f"{type(self).__name__} must define budget")

    def contains(self, point, x):
        """Return `[b]`, whether each point is allowed."""
        from jaxadv.core.feasible import feasible

        return feasible(self, point, x)

    def sample(self, keys, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return a random feasible point for each row."""
        raise TypeError(f"{type(self).__name__} must define sample")

    def steepest(self, grad: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return the direction of size one along which `grad` rises the most."""
        raise TypeError(f"{type(self).__name__} must define steepest")


class Attack:
    """A search for a failing input: four pure functions over a state whose every leaf is `[b, ...]`.

    Subclasses are frozen dataclass pytrees (`core.pytree`); budgets and step sizes are leaves, so one compiled program
    serves all of them. A new subclass is for a new *kind of step*; everything else is an argument.

    | member | promise |
    | --- | --- |
    | `threat` | the allowed set, data |
    | `name` | static; enters the keys, so two attacks never share randomness |
    | `max_steps` | static; a row is done after at most so many steps |
    | `init(keys, model, x, y)` | the state before the first step; one typed key for each row |
    | `step(state, model, x, y)` | one step of every row; what it does to rows that are done is discarded |
    | `done(state)` | `[b]`, whether a row needs no more steps |
    | `result(state, model, x, y)` | the answer, verified by asking the model again at the returned point |
    | `early` | static; whether a row may be done before `max_steps` |
    """

    threat: Threat
    name: str
    max_steps: int
    early: bool

    def init(self, keys, model, x, y) -> PyTree:
        """Return the state before the first step."""
        raise TypeError(f"{type(self).__name__} must define init")

    def step(self, state, model, x, y) -> PyTree:
        """Return the state after one more step of every row."""
        raise TypeError(f"{type(self).__name__} must define step")

    def done(self, state) -> Bool[Array, " b"]:
        """Return which rows need no more steps."""
        raise TypeError(f"{type(self).__name__} must define done")

    def result(self, state, model, x, y) -> Result:
        """Return the verified answer for every row."""
        raise TypeError(f"{type(self).__name__} must define result")

    def run(self, key, model, x, y, *, index=None, restart: int = 0) -> Result:
        """Run the search to its end on one batch; see `core.run.run`."""
        from jaxadv.core.run import run

        return run(self, key, model, x, y, index=index, restart=restart)


Objective = Callable[[Callable, PyTree, PyTree, dict[str, Array], Array], tuple[Array, tuple[PyTree, dict[str, Array]]]]
"""`(apply, params, state, batch, key) -> (losses [b], (state, metrics))`: what training minimizes."""
