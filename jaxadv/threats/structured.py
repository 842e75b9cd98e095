"""Threats with structure beside a norm: features that stay, features that weigh, groups, and changes without a mean.

| builder | what it adds to a ball |
| --- | --- |
| `masked` | features that never move |
| `patch` | nothing moves but a rectangle |
| `weighted` | a size in which each feature has a unit of its own |
| `tabular` | counts and missing values that stay as they are, changes that are small beside the value itself |
| `categorical` | groups of one-hot columns, of which a few may change their category |
| `zero_mean` | changes whose sum is zero, for denoisers |

The first four build a `Fenced` ball. The gradient engine with its wirings, APGD and FMN take it as they take the ball,
and leave what cannot move out of gradients *before* they take the steepest direction; other attacks, whose moves know
of no such limits, refuse it.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxadv.core import check, edges, pytree, static, tolerance
from jaxadv.core.types import Threat
from jaxadv.threats.balls import Ball, l2

_HALVINGS = 40
_SHORT = 1 - 2.0**-21
_LEAP = 1e4
"""How far a steepest step goes in a group: so far that the largest gradient decides, wherever the step begins."""


def _over(value: Any, x: Any, xp: Any = jnp) -> Any:
    """Shape an array over features so that it broadcasts over a batch."""
    return edges((value, value), x, xp)[0]


def _library(*arrays: Any) -> Any:
    return np if all(isinstance(a, np.ndarray) for a in arrays) else jnp


# -------------------------------------------------------------------------------------------------------- fenced balls


@pytree
class Fenced(Ball):
    """A ball in which features have limits of their own; built by `masked`, `weighted`, `patch` and `tabular`.

    What is allowed: `||(point - x) / weights||_p <= eps`, `|point - x| <= room(x)` feature by feature, and the bounds.
    Each field is an array over the features of an example, or None.
    """

    free: Any = None  # whether a feature may move
    weights: Any = None  # the unit of each feature in the norm
    default: Any = None  # the value that means "missing"; NaN for none
    relative: Any = None  # largest change as a share of the value itself
    origin: Any = None  # where the value itself is zero, in units of x

    def movable(self, x: Any) -> Any:
        """Tell which features may move at all.

        Args:
          x: `[b, ...]` the examples, or points of the threat: what may not move says the same of both.

        Returns:
          bool `[b, ...]`.
        """
        xp = _library(x)
        free = xp.ones(x.shape, bool)
        if self.free is not None:
            free = free & (_over(self.free, x, xp) > 0)
        if self.default is not None:
            free = free & (x != _over(self.default, x, xp))
        return free

    def room(self, x: Any) -> Any:
        """Return how far each feature may move, apart from the norm and the bounds; 0 where it may not, or infinity.

        Args:
          x: `[b, ...]` the examples.

        Returns:
          `[b, ...]`.
        """
        xp, room = _library(x), math.inf
        if self.relative is not None:
            room = _over(self.relative, x, xp) * xp.abs(x - (0 if self.origin is None else _over(self.origin, x, xp)))
        return xp.where(self.movable(x), room, 0).astype(x.dtype)

    def _units(self, x, xp: Any = jnp) -> Any:
        return 1 if self.weights is None else _over(self.weights, x, xp)

    def _plain(self, bounds=None) -> Ball:
        """The ball without its fences."""
        bounds = self.bounds if bounds is None else bounds
        return Ball(eps=self.eps, bounds=bounds, p=self.p, exact=self.exact, spread=self.spread)

    def budget(self, x: Any, xp: Any = jnp) -> Any:
        """Return the largest size that counts as feasible: that of the ball, roundings in the smallest unit."""
        features = math.prod(x.shape[1:])
        eps = xp.asarray(self.eps, np.float64) if xp is np else jnp.asarray(self.eps)
        unit = 1 if self.weights is None else xp.minimum(xp.min(xp.asarray(self.weights)), 1)
        return eps + tolerance(self, features, self.p) / unit

    def size(self, point, x):
        """Return `||(point - x) / weights||_p` for each row; infinite where a feature has left its room.

        Args:
          point: `[b, ...]`.
          x: `[b, ...]`.

        Returns:
          `[b]`.
        """
        xp = _library(point, x)
        move, room = point - x, self.room(x)
        room = room * (1 + 2.0**-22) + xp.where((room > 0) & xp.isfinite(room), 2.0**-23 * xp.abs(x), 0)
        kept = xp.all((xp.abs(move) <= room).reshape(len(x), -1), axis=-1)
        scaled = move / self._units(x, xp)
        return xp.where(kept, self._plain().size(scaled, xp.zeros_like(scaled)), xp.inf)

    def project(self, point: Float[Array, "b ..."], x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return a feasible point near `point`, as the ball does in units of the weights.

        Args:
          point: `[b, ...]` any points.
          x: `[b, ...]` the examples, inside the bounds.

        Returns:
          `[b, ...]`; what may not move is that of `x`, to the bit.
        """
        low, high = edges(self.bounds, x)
        room = self.room(x)
        low, high = jnp.maximum(x - room, low), jnp.minimum(x + room, high)
        if self.weights is None:
            found = self._plain((low, high)).project(point, x)
        else:
            units = self._units(x)
            around = self._plain(((low - x) / units, (high - x) / units))
            move = around.project((point - x) / units, jnp.zeros_like(x)) * units * (1 if self.p == 0 else _SHORT)
            found = jnp.clip(x + move, low, high)
        if self.default is not None:  # what is known does not become missing
            default = _over(self.default, x)
            found = jnp.where((found == default) & (x != default), jnp.nextafter(found, x), found)
        return found

    def sample(self, keys, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return a random feasible point for each row: a point of the ball, projected.

        Args:
          keys: `[b]` typed keys.
          x: `[b, ...]` the examples.

        Returns:
          `[b, ...]`.
        """
        if self.weights is None:
            return self.project(self._plain().sample(keys, x), x)
        free = self._plain((-jnp.inf, jnp.inf))
        return self.project(x + self._units(x) * free.sample(keys, jnp.zeros_like(x)), x)

    def steepest(self, grad: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return the direction of size one, in units of the weights, that raises the linear function `grad` the most.

        Features that are never free have no part in it. Which ones are missing depends on the example: attacks of the
        gradient engine ask `movable` first.

        Args:
          grad: `[b, ...]`.

        Returns:
          `[b, ...]`.
        """
        if self.free is not None:
            grad = jnp.where(_over(self.free, grad) > 0, grad, 0)
        units = self._units(grad)
        return units * self._plain().steepest(units * grad)


def _fenced(threat: Any, **fences: Any) -> Fenced:
    """Add fences to a ball, or to one that has some already."""
    if not isinstance(threat, Ball):
        raise ValueError(
            f"threat must be a ball (linf, l2, l1, l0); got {type(threat).__name__}. "
            "Fence the members of a union one by one."
        )
    names = ("free", "weights", "default", "relative", "origin")
    own = {name: getattr(threat, name, None) for name in names} | fences
    return Fenced(threat.eps, threat.bounds, threat.p, threat.exact, threat.spread, **own)


def _known(name: str, value: Any, holds: Any, what: str) -> None:
    known = check.concrete(value)
    if known is not None and not np.all(holds(known)):
        raise ValueError(f"{name} must be {what}; got {known if known.size < 9 else f'shape {known.shape}'}.")


def masked(threat: Any, free: Any) -> Fenced:
    """Return the threat in which some features never move.

    >>> import jax.numpy as jnp
    >>> from jaxadv.threats import linf, masked
    >>> threat = masked(linf(0.1), jnp.array([True, False]))
    >>> threat.project(jnp.array([[0.9, 0.9]]), jnp.array([[0.5, 0.5]])).tolist()
    [[0.6000000238418579, 0.5]]

    Args:
      threat: a ball.
      free: bool, over the features of an example (or what broadcasts): whether a feature may move.

    Returns:
      The threat.

    Raises:
      ValueError: if no feature may move, or the threat is no ball.
    """
    _known("free", free, lambda v: v.any(), "True for at least one feature")
    before = getattr(threat, "free", None)
    return _fenced(threat, free=jnp.asarray(free) if before is None else jnp.logical_and(before, free))


def patch(threat: Any, shape: Sequence[int], top: int, left: int, height: int, width: int) -> Fenced:
    """Return the threat in which the pixels of a rectangle may move and no others.

    Args:
      threat: a ball; `linf(1.0)` leaves the rectangle free.
      shape: of an image, `(h, w, c)`.
      top: first row of the rectangle.
      left: its first column.
      height: number of its rows.
      width: number of its columns.

    Returns:
      The threat.

    Raises:
      ValueError: if the rectangle is empty or leaves the image.

    References:
      Brown et al. 2017, Adversarial patch, arXiv:1712.09665, for one image and a known place; for all images and
      places see `attacks.patch`.
    """
    free = np.zeros(tuple(shape), bool)
    free[max(top, 0) : top + height, max(left, 0) : left + width] = True
    if len(shape) != 3 or height < 1 or width < 1 or free[..., 0].sum() != height * width:
        raise ValueError(
            f"the rectangle must lie inside the image, of shape {tuple(shape)}; "
            f"got rows {top} to {top + height} and columns {left} to {left + width}."
        )
    return masked(threat, free)


def weighted(threat: Any, weights: Any) -> Fenced:
    """Return the threat with a unit of its own for each feature: `||(point - x) / weights||_p <= eps`.

    Args:
      threat: a ball `linf`, `l2` or `l1`.
      weights: positive, over the features of an example; with linf feature i may move by `eps * weights[i]`.

    Returns:
      The threat.

    Raises:
      ValueError: if a known weight is not positive, or the threat counts features.
    """
    if getattr(threat, "p", 2) == 0:
        raise ValueError("threat must measure moves (linf, l2, l1) to be weighted; got l0, which counts. Use masked.")
    check.positive("weights", weights, "Features that never move are for masked.")
    return _fenced(threat, weights=weights)


def tabular(
    threat: Any,
    *,
    whole: Any = None,
    default: Any = None,
    relative: Any = None,
    shift: Any = 0.0,
    scale: Any = 1.0,
) -> Fenced:
    """Return the threat for tables of physical quantities, standardized as `x = (value - shift) / scale`.

    Args:
      threat: a ball, its bounds in units of `x`; arrays give each feature its own.
      whole: bool over features: counts and other whole numbers, which stay as they are.
      default: over features, the value (in units of `x`) that means "missing", NaN where there is none. Entries that
        equal it to the bit stay; others never come to equal it. Scale it in the same arithmetic as the data.
      relative: largest change as a share of the physical value, a number or over features.
      shift: what is subtracted from physical values, a number or over features; `relative` needs it.
      scale: what they are divided by.

    Returns:
      The threat.

    Raises:
      ValueError: if no feature may move, or `relative` or `scale` is not positive.

    References:
      Stein et al. 2022, Improving robustness of jet tagging algorithms with adversarial training, sec. 3,
      arXiv:2203.13890 (whole numbers and defaults are reset after the step, changes are limited). Differs: a
      projection, so that attacks of many steps keep what the first point said.
    """
    fences: dict[str, Any] = {}
    if whole is not None:
        free = jnp.logical_not(jnp.asarray(whole))
        _known("whole", free, lambda v: v.any(), "False for at least one feature")
        before = getattr(threat, "free", None)
        fences["free"] = free if before is None else jnp.logical_and(before, free)
    if default is not None:
        known = check.concrete(default)
        fences["default"] = default if known is None else known.astype(np.float32)  # as data is stored
    if relative is not None:
        check.positive("relative", relative, "It is a share of the value; 0.1 is ten percent.")
        check.positive("scale", scale, "Pass the standard deviations that the data was divided by.")
        fences |= {"relative": relative, "origin": -np.asarray(shift) / np.asarray(scale)}
    return _fenced(threat, **fences)


# ------------------------------------------------------------------------------------------------------------ zero mean


def _mean(move, xp: Any = jnp):
    return xp.mean(move.reshape(move.shape[0], -1), axis=-1).reshape((-1,) + (1,) * (move.ndim - 1))


@pytree
class ZeroMean(Threat):
    """Changes within `eps` in l2 whose mean over all features is zero; built by `zero_mean`."""

    eps: Any
    bounds: tuple[Any, Any]

    norm = "zero_mean"
    sparse = False

    def _ball(self) -> Ball:
        return Ball(eps=self.eps, bounds=self.bounds, p=2.0)

    def budget(self, x: Any, xp: Any = jnp) -> Any:
        """Return the budget of the l2 ball."""
        return self._ball().budget(x, xp)

    def size(self, point, x):
        """Return the Euclidean norm of each change; infinite where its mean is more than roundings away from zero.

        Args:
          point: `[b, ...]`.
          x: `[b, ...]`.

        Returns:
          `[b]`.
        """
        xp = _library(point, x)
        far = xp.abs(_mean(point - x, xp)).reshape(-1) > 4 * tolerance(self, 1, math.inf)
        return xp.where(far, xp.inf, self._ball().size(point, x))

    def project(self, point: Float[Array, "b ..."], x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return the nearest point in the bounds whose change has no mean, shrunk toward `x` where it is too far.

        Args:
          point: `[b, ...]` any points.
          x: `[b, ...]` the examples, inside the bounds.

        Returns:
          `[b, ...]`.
        """
        low, high = edges(self.bounds, x)

        def moved(level):
            return jnp.clip(point - level, low, high) - x

        def half(_, ends):
            below, above = ends
            middle = (below + above) / 2
            over = _mean(moved(middle)) > 0
            return jnp.where(over, middle, below), jnp.where(over, above, middle)

        gap = point - x
        axes = tuple(range(1, x.ndim))
        ends = jnp.min(gap, axis=axes, keepdims=True), jnp.max(gap, axis=axes, keepdims=True)
        below, above = jax.lax.fori_loop(0, _HALVINGS, half, ends)
        move = moved((below + above) / 2)
        already = jnp.all((point >= low) & (point <= high), axis=axes, keepdims=True)
        still = already & (jnp.abs(_mean(gap)) <= tolerance(self, 1, math.inf))
        return self._ball().project(jnp.where(still, point, x + move), x)

    def sample(self, keys, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return a random feasible point for each row: one of the l2 ball, projected."""
        return self.project(self._ball().sample(keys, x), x)

    def steepest(self, grad: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return the direction of length one without a mean along which `grad` rises the most."""
        return self._ball().steepest(grad - _mean(grad))


def zero_mean(eps: Any, bounds: tuple[Any, Any] = (0.0, 1.0)) -> ZeroMean:
    """Return the set of inputs within Euclidean distance `eps` whose change sums to zero, inside `bounds`.

    What a denoiser is asked to keep is the mean brightness; a change of it would be a change of the clean image.

    Args:
      eps: radius in units of `x`; a number, `[b]`, or traced. The authors take `5 / 255 * sqrt(n)` for n features.
      bounds: lowest and highest allowed value of a feature.

    Returns:
      The threat.

    Raises:
      ValueError: if `eps` is known and not positive, or `bounds` is no pair.

    References:
      Yan et al. 2022, Towards adversarially robust deep image denoising, sec. 3, arXiv:2201.04397. Differs from the
      authors' code: the bounds and the mean are met at once (theirs clips in the end, which moves the mean).
    """
    ball = l2(eps, bounds)
    return ZeroMean(eps=ball.eps, bounds=ball.bounds)


# ----------------------------------------------------------------------------------------------------------- categories


@pytree
class Categorical(Threat):
    """Rows of which some columns are one-hot groups and the rest lie in a ball; built by `categorical`.

    Sizes are shares of budgets, as in a union: the larger of the ball's share and of changed groups by allowed ones.
    """

    base: Fenced
    changes: Any
    groups: tuple[tuple[int, ...], ...] = static()

    norm = "categorical"
    sparse = False

    @property
    def eps(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Always 1: the size is measured in budgets."""
        return 1.0

    @property
    def bounds(self) -> tuple[Any, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The bounds of the ball."""
        return self.base.bounds

    def budget(self, x: Any, xp: Any = jnp) -> Any:
        """Return one, and the rounding of the ball in its budget."""
        eps = xp.asarray(self.base.eps)
        return xp.where(eps > 0, self.base.budget(x, xp) / xp.where(eps > 0, eps, 1), 1)

    def _groups(self) -> list[np.ndarray]:
        return [np.array(group) for group in self.groups]

    def _held(self, point, x):
        """The point with the groups of `x`: what the ball is asked about."""
        return _put(_library(point, x).array(point), np.concatenate(self._groups()), x)

    def changed(self, point: Any, x: Any) -> Bool[Any, "b g"]:
        """Tell which groups have another category than in the examples.

        Args:
          point: `[b, n]`.
          x: `[b, n]`.

        Returns:
          bool `[b, g]`.
        """
        xp = _library(point, x)
        return xp.stack([xp.any(point[:, g] != x[:, g], axis=-1) for g in self._groups()], axis=-1)

    def size(self, point, x):
        """Return the larger share of a budget; infinite where a changed group is not one-hot.

        Args:
          point: `[b, n]`.
          x: `[b, n]`.

        Returns:
          `[b]`.
        """
        xp = _library(point, x)
        changed = self.changed(point, x)
        parts = [point[:, group] for group in self._groups()]
        hot = xp.stack([xp.all((p == 0) | (p == 1), -1) & (xp.sum(p == 1, -1) == 1) for p in parts], axis=-1)
        count = xp.sum(changed, axis=-1).astype(point.dtype)
        far = self.base.size(self._held(point, x), x)
        shares = [_share(far, xp.asarray(self.base.eps), xp), _share(count, xp.asarray(self.changes), xp)]
        return xp.where(xp.all(hot | ~changed, axis=-1), xp.maximum(*shares), xp.inf)

    def project(self, point: Float[Array, "b n"], x: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """Return the ball's projection, with the category of the largest entry in the groups that gain the most.

        Args:
          point: `[b, n]` any points.
          x: `[b, n]` the examples, one-hot in the groups.

        Returns:
          `[b, n]`.
        """
        found = self.base.project(self._held(point, x), x)
        best, gain = [], []
        for group in self._groups():
            part, own = point[:, group], x[:, group]
            best.append(jax.nn.one_hot(jnp.argmax(part, axis=-1), len(group), dtype=x.dtype))
            gain.append(jnp.sum(part * (best[-1] - own), axis=-1))  # half of how much nearer the new category is
        gain = jnp.stack(gain, axis=-1)
        rank = jnp.argsort(jnp.argsort(-gain, axis=-1, stable=True), axis=-1, stable=True)
        allowed = jnp.broadcast_to(jnp.floor(jnp.asarray(self.changes, x.dtype)), x.shape[:1])[:, None]
        taken = (rank < allowed) & (gain > 0)
        for i, group in enumerate(self._groups()):
            found = found.at[:, group].set(jnp.where(taken[:, i : i + 1], best[i], x[:, group]))
        return found

    def sample(self, keys, x: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """Return a random point of the ball with random categories in as many groups as may change."""
        first, second = (jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys) for i in range(2))
        noise = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype))(second)
        return self.project(_put(self.base.sample(first, x), np.concatenate(self._groups()), 2 * noise), x)

    def steepest(self, grad: Float[Array, "b n"]) -> Float[Array, "b n"]:
        """Return the ball's steepest move of the whole budget; in groups a leap, after which the gradient decides.

        Args:
          grad: `[b, n]`.

        Returns:
          `[b, n]`, for a step size in budgets.
        """
        inside = self.base.steepest(self._held(grad, jnp.zeros_like(grad)))
        eps = jnp.broadcast_to(jnp.asarray(self.base.eps, grad.dtype), grad.shape[:1])[:, None]
        top = jnp.max(jnp.abs(grad), axis=-1, keepdims=True)
        leap = _LEAP * grad / jnp.where(top > 0, top, 1)
        return _put(eps * inside, np.concatenate(self._groups()), leap)


def _put(rows: Any, at: np.ndarray, other: Any) -> Any:
    """Take some columns of another batch, in NumPy (into a copy that is ours) or in JAX."""
    if isinstance(rows, np.ndarray):
        rows[:, at] = other[:, at]
        return rows
    return rows.at[:, at].set(other[:, at])


def _share(size, budget, xp):
    """Divide a size by a budget; nothing of nothing is 0, something of nothing infinite."""
    return xp.where(budget > 0, size / xp.where(budget > 0, budget, 1), xp.where(size > 0, xp.inf, 0))


def categorical(threat: Any, groups: Sequence[Sequence[int]], *, changes: Any = 1) -> Categorical:
    """Return the threat of rows in which a few groups of one-hot columns may change their category.

    A step of an attack goes to the categories with the largest gradient, whatever its length: what PGD does in the
    groups is a greedy search, and its best point is kept.

    Args:
      threat: a ball for all other columns, possibly fenced; its bounds hold for the groups, too, so they must let them
        be 0 and 1.
      groups: for each group its columns, at least two; no column in two groups.
      changes: how many groups may change; may be traced.

    Returns:
      The threat, of `[b, n]` rows.

    Raises:
      ValueError: on groups that overlap or have one column, `changes` that is not positive, or a threat that is no
        ball.
    """
    groups = tuple(tuple(int(i) for i in group) for group in groups)
    columns = [i for group in groups for i in group]
    if not groups or min(map(len, groups)) < 2 or len(set(columns)) != len(columns) or min(columns) < 0:
        raise ValueError(f"groups must be lists of two or more columns that share none; got {groups}.")
    check.positive("changes", changes, "It is how many groups may change; without any use masked.")
    return Categorical(base=_fenced(threat), changes=changes, groups=groups)
