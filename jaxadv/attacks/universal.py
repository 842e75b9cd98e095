"""One change for a whole data set: universal perturbations and adversarial patches.

A search sees the data in minibatches, pass after pass, and keeps what fools most after a pass; in the end every image
is asked again. It is a pure function of key, model, data and labels. Inside `shard_map` it is given the rows of one
shard and `axis_name`, and finds what one device finds: the lanes that minibatches are drawn from are counted over all
shards, and what the rows of a minibatch ask for is summed over them.

These are no `Attack`s, whose rows live alone: here the rows of a data set share one answer.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxadv import losses
from jaxadv.attacks.draws import Partial, asked, descend, folded
from jaxadv.attacks.judge import ask
from jaxadv.attacks.minimum import ball, deepfool, mended
from jaxadv.attacks.spatial import resample, turn
from jaxadv.core import (
    Model,
    Targets,
    Threat,
    as_callable,
    canonical,
    check,
    edges,
    example_keys,
    pytree,
    robust,
    run,
    select,
    static,
)
from jaxadv.core.rows import wide
from jaxadv.parallel import AxisName, axis_index, psum, varying

_VERIFY = 2**31 - 1
"""The pass whose draws no search meets."""


class Found(NamedTuple):
    """What a search over a data set found.

    Attributes:
      change: `[...]` the perturbation, to be added to an example and clipped to the bounds, or the patch.
      rate: share of all rows that it fools, each asked again with fresh draws; over all shards.
      rates: `[epochs]` the share after each pass, NaN for passes that were not needed.
      fooled: `[b]` the rows of this shard that it fools: the class is another than without the change, or the target.
      wrong: `[b]` the rows whose class under the change is not the label.
    """

    change: Float[Array, "..."]
    rate: Float[Array, ""]
    rates: Float[Array, " e"]
    fooled: Bool[Array, " b"]
    wrong: Bool[Array, " b"]


def _taken(tree, at):
    return jax.tree.map(lambda leaf: leaf[at], tree)


@pytree
class Universal:
    """Passes over a data set for one change; a subclass says how it begins, is pulled and moves, and where it lies.

    A subclass gives `_first`, `_pull`, `_moved`, and `put` where the change is not added.
    """

    threat: Any
    name: str = static()
    epochs: int = static()
    batch_size: int = static()
    goal: float = static()

    targeted = True

    def put(self, change, x: Float[Array, "b ..."], keys: Any = None) -> Float[Array, "b ..."]:
        """Return the examples under the change, in the bounds; `keys` `[b]` are for what is drawn."""
        del keys
        return jnp.clip(x + change[None], *edges(self.threat.bounds, x))

    def _first(self, x) -> tuple[Any, Any]:
        """The first change, and what is remembered from one minibatch to the next."""
        raise TypeError(f"{type(self).__name__} must define _first")

    def _pull(self, change, model, x, y, clean, index, keys, counted) -> tuple[Any, Any]:
        """Which way the counted rows pull, summed, and how many of them do."""
        raise TypeError(f"{type(self).__name__} must define _pull")

    def _moved(self, change, memory, total, count) -> tuple[Any, Any]:
        """The next change, from the pull of all shards."""
        raise TypeError(f"{type(self).__name__} must define _moved")

    def run(self, key, model, x, y, *, index: Any = None, axis_name: AxisName = None) -> Found:
        """Search to the end. Pure: jit it; shard it with `axis_name`.

        Args:
          key: a typed key, the same on all shards.
          model: logits from a batch.
          x: `[b, ...]` examples (of one shard), inside the bounds.
          y: int `[b]` labels, or `Targets` to be reached.
          index: int `[b]` dataset indices, from which draws come; defaults to the place in the whole data.
          axis_name: the mapped axis or axes that the data set is sharded over, or None. With a number of examples that
            `batch_size` divides, the answer is that of one device, up to rounding.

        Returns:
          What was found; `change`, `rate` and `rates` are the same on every shard.

        Raises:
          ValueError: on inputs of a wrong shape or outside the bounds, targets where none can be aimed at, or a
            `batch_size` that the number of shards does not divide.
          TypeError: on inputs that are not real numbers, labels that are not integers, or a model that cannot be
            called.
        """
        model = as_callable(model)
        check.inputs(x, self.threat.bounds)
        x = jnp.asarray(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        rows = x.shape[0]
        if isinstance(y, Targets) and not self.targeted:
            raise ValueError(f"y must be integer labels for {self.name}, which aims at no class; got Targets.")
        for labels in y if isinstance(y, Targets) else (y,):
            check.labels(labels, rows)
        y = jax.tree.map(jnp.asarray, y)
        shards = 1 if axis_name is None else lax.axis_size(axis_name)
        if self.batch_size % shards:
            raise ValueError(
                f"batch_size must be a multiple of the number of shards; got {self.batch_size} for {shards} shards. "
                f"Take {shards * max(self.batch_size // shards, 1)}."
            )
        place = axis_index(axis_name) * rows + jnp.arange(rows)
        index = place.astype(jnp.int32) if index is None else jnp.asarray(index, jnp.int32)
        if index.shape != (rows,):
            raise ValueError(f"index must hold one dataset index for each of the {rows} examples; got {index.shape}.")

        def whole(key, x, y, index):
            return self._searched(key, model, x, y, index, shards, axis_name)

        return canonical(whole)(key, x, y, index)

    def _searched(self, key, model, x, y, index, shards: int, axis_name: AxisName) -> Found:
        rows, lanes = len(x), self.batch_size // shards
        length = -(-rows // lanes)
        lane = axis_index(axis_name) * lanes + jnp.arange(lanes)
        clean = jnp.argmax(_batched(lambda x: ask(model, x), lanes, x), axis=-1).astype(jnp.int32)
        aim = y if isinstance(y, Targets) else clean

        def logits(change, turn):
            def asked_at(x, keys):
                return ask(model, self.put(change, x, keys))

            return _batched(asked_at, lanes, x, example_keys(key, self.name, index, turn))

        def share(rows_of):
            return psum(jnp.sum(rows_of.astype(x.dtype)), axis_name) / (rows * shards)

        def epoch(carry):
            number, change, memory, best, most, rates = carry
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, number), i))(lane)
            order = jnp.argsort(jax.vmap(lambda k: jax.random.uniform(k, (length,)))(keys), axis=-1)
            places = (jnp.arange(lanes)[:, None] * length + order).T

            def minibatch(state, place):
                at = jnp.minimum(place, rows - 1)
                drawn = folded(example_keys(key, self.name, index[at], number), 1)
                mine = (x[at], _taken(y, at), clean[at], index[at], drawn, place < rows)
                pull = self._pull(varying(state[0], axis_name), model, *mine)
                return self._moved(*state, *psum(pull, axis_name)), None

            (change, memory), _ = lax.scan(minibatch, (change, memory), places)
            rate = share(~robust(logits(change, number), aim))
            better = rate > most
            best = jax.tree.map(lambda a, b: jnp.where(better, a, b), change, best)
            rates = rates.at[number].set(rate)
            return number + 1, change, memory, best, jnp.maximum(rate, most), rates

        first, memory = self._first(x)
        start = (jnp.int32(0), first, memory, first, jnp.asarray(-1, x.dtype), jnp.full(self.epochs, jnp.nan, x.dtype))
        *_, change, _, rates = lax.while_loop(lambda c: (c[0] < self.epochs) & (c[4] < self.goal), epoch, start)
        final = logits(varying(change, axis_name), _VERIFY)
        fooled, label = ~robust(final, aim), y.label if isinstance(y, Targets) else y
        return Found(change=change, rate=share(fooled), rates=rates, fooled=fooled, wrong=~robust(final, label))


def _batched(fn: Callable, size: int, *rows: Any) -> Array:
    """Call a function of rows in batches of one size."""
    count = len(rows[0])
    at = jnp.minimum(jnp.arange(-(-count // size) * size), count - 1).reshape(-1, size)
    out = lax.map(lambda at: fn(*_taken(rows, at)), at)
    return out.reshape(-1, *out.shape[2:])[:count]


# --------------------------------------------------------------------------------------------- universal perturbations


def _projected(threat: Any, change):
    """Into the budget, around zero and without a box."""
    free = dataclasses.replace(threat, bounds=(-jnp.inf, jnp.inf))
    return free.project(change[None], jnp.zeros_like(change)[None])[0]


@pytree
class UniversalDeepFool(Universal):
    """Adds what DeepFool needs for the rows that still hold; built by `universal`."""

    inner: Any = dataclasses.field()

    targeted = False

    def _first(self, x):
        return jnp.zeros(x.shape[1:], x.dtype), ()

    def _pull(self, change, model, x, y, clean, index, keys, counted):
        del y, keys
        start = self.put(change, x)
        found = run(self.inner, jax.random.key(0), model, start, clean, index=index)  # it draws nothing
        moved = found.success & (found.size > 0) & counted
        return jnp.sum(select(moved, found.x - start, jnp.zeros_like(x)), axis=0), jnp.sum(moved)

    def _moved(self, change, memory, total, count):
        del count
        return _projected(self.threat, change + total), memory


def universal(
    threat: Threat,
    *,
    epochs: int = 10,
    goal: float = 0.8,
    batch_size: int = 16,
    steps: int = 10,
    candidates: int = 10,
    overshoot: float = 0.02,
    name: str = "universal",
) -> UniversalDeepFool:
    """Return the search for a universal perturbation with DeepFool: no labels are used, only predictions.

    For every row of a minibatch that still has its clean class under the perturbation, DeepFool finds what is missing;
    the sum is added and projected onto the budget.

    Args:
      threat: a norm ball `linf` or `l2`; DeepFool works in its norm.
      epochs: at most so many passes.
      goal: share of fooled rows at which a pass is the last.
      batch_size: rows whose moves are added at once; 1 is the published algorithm.
      steps: of DeepFool for one row.
      candidates: how many of the likeliest classes DeepFool tries.
      overshoot: of DeepFool.
      name: enters the random keys.

    Returns:
      The search; see `Universal.run`.

    Raises:
      ValueError: on counts that are too small, a goal that is no share, or a threat of another norm.

    References:
      Moosavi-Dezfooli et al. 2017, Universal adversarial perturbations, alg. 1, arXiv:1610.08401. As in the authors'
      code a row counts where DeepFool has arrived. Differs: points are clipped to the bounds; the best pass is
      returned; minibatches.
    """
    ball(threat, ("linf", "l2"), name)
    _passes(epochs, goal, batch_size)
    around: Any = dataclasses.replace(threat, eps=math.inf)  # pyright: ignore[reportArgumentType]
    inner = deepfool(around, steps=steps, candidates=candidates, overshoot=overshoot)
    return UniversalDeepFool(
        name=name, epochs=epochs, batch_size=batch_size, goal=float(goal), threat=threat, inner=inner
    )


def _passes(epochs, goal, batch_size) -> None:
    check.whole("epochs", epochs)
    check.whole("batch_size", batch_size)
    if not 0 < goal <= 1:
        raise ValueError(f"goal must be a share of fooled rows in (0, 1]; got {goal}. The authors take 0.8.")


@pytree
class UniversalGradient(Universal):
    """Follows the mean gradient of minibatches; built by `universal_gradient`."""

    step_size: Any = dataclasses.field()
    loss: Callable = static()
    floor: float = static()
    transform: optax.GradientTransformation = static()

    def _first(self, x):
        change = jnp.zeros(x.shape[1:], x.dtype)
        return change, self.transform.init(change)

    def _pull(self, change, model, x, y, clean, index, keys, counted):
        """The gradient of each image, where it is finite, drawn back to the change."""
        del clean, index
        images, pull = jax.vjp(lambda change: self.put(change, x, keys), change)
        grad, _, _ = descend(model, images, lambda z: jnp.maximum(self.loss(z, y), self.floor), lambda z: ())
        (total,) = pull(select(counted, mended(grad), jnp.zeros_like(grad)))
        return total, jnp.sum(counted)

    def _moved(self, change, memory, total, count):
        mean = total / jnp.maximum(count, 1).astype(total.dtype)
        rise, memory = self.transform.update(-mean, memory, change)
        return self._placed(change + jnp.asarray(self.step_size, total.dtype) * self._toward(rise)), memory

    def _toward(self, rise):
        return self.threat.steepest(rise[None])[0]

    def _placed(self, change):
        return _projected(self.threat, change)


@lru_cache
def _momentum(decay: float) -> optax.GradientTransformation:
    """Cached, so that equal searches share one compiled program."""
    return optax.trace(decay=decay)


def universal_gradient(
    threat: Threat,
    *,
    epochs: int = 10,
    goal: float = 1.0,
    batch_size: int = 64,
    step_size: Any = None,
    decay: float = 0.9,
    loss: Callable = losses.minus_cross_entropy,
    floor: float = -9.0,
    name: str = "universal_gradient",
) -> UniversalGradient:
    """Return the search for a universal perturbation by gradients of a clipped loss over minibatches.

    Args:
      threat: a norm ball `linf`, `l2` or `l1`.
      epochs: at most so many passes.
      goal: share of fooled rows at which a pass is the last.
      batch_size: rows of a minibatch, over all shards.
      step_size: length of a step in the norm of the threat; a tenth of the budget by default. May be traced.
      decay: of the running sum of gradients.
      loss: what to minimize, `(logits, y) -> [b]`; a module-level function.
      floor: rows whose loss is below it pull no more, so that no single row outweighs the rest.
      name: enters the random keys.

    Returns:
      The search; see `Universal.run`. Given `Targets` it drives every row to its target.

    Raises:
      ValueError: on settings out of range, or a threat of another norm.

    References:
      Shafahi et al. 2020, Universal adversarial training, alg. 2 and eq. 3 (the clipped loss), arXiv:1811.11304.
      Differs: momentum and steepest steps of the norm in the place of plain or Adam's steps; the best pass is returned.
    """
    ball(threat, ("linf", "l2", "l1"), name)
    _passes(epochs, goal, batch_size)
    step_size = threat.eps / 10 if step_size is None else step_size
    check.positive("step_size", step_size, "It is in the units of eps; a usual value is eps / 10.")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be a share in [0, 1); got {decay}. 0 forgets at once.")
    return UniversalGradient(
        name=name,
        epochs=epochs,
        batch_size=batch_size,
        goal=float(goal),
        threat=threat,
        step_size=step_size,
        loss=loss,
        floor=float(floor),
        transform=_momentum(float(decay)),
    )


# --------------------------------------------------------------------------------------------------------------- patch


@pytree
class Placement:
    """Where a patch lies on an image: size, angle and place are drawn; built by `patch`.

    `mask` `[s, s]` is the shape of the patch, 1 where it covers; `scale` the smallest and largest side as a share of
    the image's shorter side; `degrees` the largest angle to either side.
    """

    mask: Any
    scale: Any
    degrees: Any

    def __call__(self, change: Float[Array, "s s c"], x: Float[Array, "b h w c"], keys: Any) -> Float[Array, "b h w c"]:
        """Lay a patch on images.

        Args:
          change: `[s, s, c]` the patch.
          x: `[b, h, w, c]` images.
          keys: `[b]` typed keys; each image draws by its own.

        Returns:
          `[b, h, w, c]`; gradients pass to both.
        """
        h, w = x.shape[1:3]
        side = change.shape[0]
        draws = jax.vmap(lambda key: jax.random.uniform(key, (4,), x.dtype))(keys).T
        low, high = (jnp.asarray(v, x.dtype) for v in self.scale)
        length = (low + (high - low) * draws[0]) * min(h, w)
        cosine, sine = turn(jnp.asarray(self.degrees, x.dtype) * (2 * draws[1] - 1))
        middle = [(length - 1) / 2 + (n - length) * draw for n, draw in zip((h, w), draws[2:])]
        down = jnp.arange(h, dtype=x.dtype)[None, :, None] - wide(middle[0], x)[..., 0]
        right = jnp.arange(w, dtype=x.dtype)[None, None, :] - wide(middle[1], x)[..., 0]
        c, s = (wide(v * side / length, x)[..., 0] for v in (cosine, sine))
        mask = jnp.asarray(self.mask, x.dtype)[..., None]
        sheet = jnp.concatenate([change * mask, mask], axis=-1)[None]
        seen = resample(
            jnp.broadcast_to(sheet, (len(x), *sheet.shape[1:])),
            c * down + s * right + (side - 1) / 2,
            c * right - s * down + (side - 1) / 2,
        )
        return x * (1 - seen[..., -1:]) + seen[..., :-1]


@pytree
class Patch(UniversalGradient):
    """Follows the mean gradient of a patch at drawn places; built by `patch`. Its threat holds the bounds alone."""

    placement: Any = dataclasses.field()

    def put(self, change, x, keys=None):
        """Return the images with the patch, at places that the keys draw."""
        return self.placement(change, x, keys)

    def _first(self, x):
        if x.ndim != 4:
            raise ValueError(f"a patch needs images [b, h, w, c]; got {x.shape}. For other data use universal.")
        low, high = edges(self.threat.bounds, x)
        side = len(self.placement.mask)
        change = jnp.full((side, side, x.shape[-1]), (low + high) / 2, x.dtype)
        return change, self.transform.init(change)

    def _toward(self, rise):
        return rise

    def _placed(self, change):
        return jnp.clip(change, *edges(self.threat.bounds, change[None])).reshape(change.shape)


@lru_cache
def _adam() -> optax.GradientTransformation:
    """Cached, so that equal searches share one compiled program."""
    return optax.scale_by_adam()


def patch(
    threat: Threat,
    side: int = 8,
    *,
    mask: Any = None,
    scale: tuple[float, float] = (0.3, 0.5),
    degrees: float = 20.0,
    epochs: int = 10,
    goal: float = 1.0,
    batch_size: int = 64,
    step_size: Any = 0.05,
    loss: Callable = losses.minus_cross_entropy,
    floor: float = -9.0,
    name: str = "patch",
) -> Patch:
    """Return the search for an adversarial patch that works wherever it is put, at any drawn size and angle.

    Every image of a minibatch draws a size, an angle and a place; Adam follows the mean gradient. The rate that is
    returned comes from draws that the search never met. For a patch at a place that is known and an image of its own,
    use `threats.patch` with any attack.

    Args:
      threat: gives the bounds, numbers; its budget plays no part.
      side: pixels of the patch along each side.
      mask: `[side, side]`, 1 where the patch covers; the disk in the square by default.
      scale: smallest and largest side on the image, as shares of the image's shorter side, in (0, 1].
      degrees: largest angle to either side.
      epochs: at most so many passes.
      goal: share of fooled rows at which a pass is the last.
      batch_size: rows of a minibatch, over all shards.
      step_size: largest change of a pixel in a first step.
      loss: what to minimize, `(logits, y) -> [b]`; a module-level function.
      floor: rows whose loss is below it pull no more.
      name: enters the random keys.

    Returns:
      The search; see `Universal.run`, and `patched` for a model behind the patch. Given `Targets` it drives every row
      to its target.

    Raises:
      ValueError: on settings out of range, a mask of another shape, or bounds that are no numbers.

    References:
      Brown et al. 2017, Adversarial patch, sec. 2, arXiv:1712.09665. Differs: rows of a minibatch draw once each; Adam.
    """
    check.whole("side", side)
    _passes(epochs, goal, batch_size)
    check.positive("step_size", step_size, "It is in the units of the bounds; a usual value is 0.05.")
    if any(np.ndim(end) for end in threat.bounds):
        raise ValueError("bounds must be numbers for a patch, which lies anywhere; got arrays. Pass the widest range.")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be a pair of shares with 0 < smallest <= largest <= 1; got {scale}. Swap them?")
    check.not_negative("degrees", degrees, "0 lets the patch stand upright.")
    if mask is None:
        place = np.arange(side) - (side - 1) / 2
        mask = (place[:, None] ** 2 + place[None] ** 2 <= (side / 2) ** 2).astype(np.float32)
    mask = np.asarray(mask, np.float32)
    if mask.shape != (side, side) or not ((mask >= 0) & (mask <= 1)).all() or not mask.any():
        raise ValueError(
            f"mask must be [{side}, {side}] with values in [0, 1], not all zero; got shape {mask.shape}. "
            "It says which pixels of the patch cover the image."
        )
    return Patch(
        name=name,
        epochs=epochs,
        batch_size=batch_size,
        goal=float(goal),
        threat=threat,
        step_size=step_size,
        loss=loss,
        floor=float(floor),
        transform=_adam(),
        placement=Placement(mask=mask, scale=scale, degrees=float(degrees)),
    )


def _patched(model, change, placement, x, *, keys):
    return asked(model, placement(change, x, folded(keys, 0)), folded(keys, 1))


def patched(model: Any, change: Float[Array, "s s c"], placement: Placement) -> Model:
    """Return a randomized model that sees each image with a patch at a place of its own draw.

    `survival` of it says at how many draws the model holds; with `eot` it is one that attacks can take.

    Args:
      model: logits from images.
      change: `[s, s, c]` the patch.
      placement: how it is laid, `Patch.placement`.

    Returns:
      A model that must be given `keys=`.
    """
    return Partial(_patched, as_callable(model), change, placement)


UNIVERSAL: dict[str, Callable[..., Universal]] = {
    "universal": universal,
    "universal_gradient": universal_gradient,
    "patch": patch,
}
"""Searches over a whole data set by name, each a function of a threat."""
