"""Norm balls around an example, cut with the box of allowed values: linf, l2, l1, l0, and unions of them.

Every function is batched and row by row. Nothing here sorts inside a step except l0 (which counts): the l1 projection
solves its one-dimensional equation by Newton's method, the exact l2 projection by bisection. `eps` is data: a number, a
traced scalar, or `[b]` for a budget of its own for each example.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxadv.core import check, edges, pytree, static, tolerance
from jaxadv.core.types import Threat

_BISECTIONS = 40
_INWARD = 1 - 2.0**-21
"""What is moved onto a sphere stops a few roundings short of it, so that it is feasible in float64, too."""
_NAMES = {math.inf: "linf", 2.0: "l2", 1.0: "l1", 0.0: "l0"}


def _rows(value: Any, x: Any) -> Any:
    """Shape a scalar or `[b]` value so that it broadcasts over the features of `x`."""
    value = jnp.asarray(value, x.dtype)
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != x.shape[0]):
        raise ValueError(
            f"eps must be a number or one number for each of the {x.shape[0]} examples; got shape {value.shape}. "
            "To sweep radii use jax.vmap over eps."
        )
    return jnp.broadcast_to(value, x.shape[:1]).reshape(x.shape[:1] + (1,) * (x.ndim - 1))


def _sum(a):
    return jnp.sum(a, axis=tuple(range(1, a.ndim)), keepdims=True)


def _max(a):
    return jnp.max(a, axis=tuple(range(1, a.ndim)), keepdims=True)


def _l2(a):
    """Euclidean norm of each row, safe against underflow; zero rows give zero."""
    top = _max(jnp.abs(a))
    scale = jnp.where(top > 0, top, 1)
    return scale * jnp.sqrt(_sum(jnp.square(a / scale)))


def _largest(value, count):
    """Mark the `count` largest entries of each row; the first win ties. `count` may be traced and is rounded down."""
    flat = value.reshape(value.shape[0], -1)
    rank = jnp.argsort(jnp.argsort(-flat, axis=-1, stable=True), axis=-1, stable=True)
    return (rank < jnp.floor(count).reshape(-1, 1)).reshape(value.shape)


def _uniform(keys, x, low: float = 0.0):
    draw = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype, low, 1.0))
    return draw(keys)


@pytree
class Ball(Threat):
    """The points within `eps` of `x` in a p-norm that stay inside `bounds`; made by `linf`, `l2`, `l1`, `l0`."""

    eps: Any
    bounds: tuple[Any, Any]
    p: float = static()
    exact: bool = static(default=False)
    spread: float = static(default=0.0)

    @property
    def norm(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The name of the norm: `linf`, `l2`, `l1` or `l0`."""
        return _NAMES[self.p]

    @property
    def sparse(self) -> bool:
        """Whether steepest directions move few features, so that features stuck at a bound must be left out."""
        return self.p < 2

    def budget(self, x: Any, xp: Any = jnp) -> Any:
        """Return the largest size that counts as feasible: `eps` plus one rounding of each coordinate.

        Args:
          x: `[b, ...]` examples, for the number of features.
          xp: `numpy` for a verdict in float64, or `jax.numpy`.

        Returns:
          A number or `[b]`.
        """
        features = math.prod(x.shape[1:])
        eps = xp.asarray(self.eps, np.float64) if xp is np else jnp.asarray(self.eps)
        return eps + tolerance(self, features, self.p)

    def size(self, point, x):
        """Return the p-norm of `point - x` for each row, in the precision of the arrays.

        Args:
          point: `[b, ...]`.
          x: `[b, ...]`.

        Returns:
          `[b]`; for l0 the number of features that differ.
        """
        xp = np if isinstance(point, np.ndarray) and isinstance(x, np.ndarray) else jnp
        move = xp.abs(point - x)
        axes = tuple(range(1, move.ndim))
        if self.p == math.inf:
            return xp.max(move, axis=axes)
        if self.p == 0:
            return xp.sum(move > 0, axis=axes).astype(move.dtype)
        if self.p == 1:
            return xp.sum(move, axis=axes)
        return xp.sqrt(xp.sum(xp.square(move), axis=axes)) if xp is np else _l2(move).reshape(move.shape[0])

    def project(self, point: Float[Array, "b ..."], x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return a feasible point near `point`.

        linf, l1 and l0 return the nearest feasible point in Euclidean distance. l2 clips to the bounds and then shrinks
        toward `x`, as is usual; with `exact=True` it bisects for the nearest point.

        Args:
          point: `[b, ...]` any points.
          x: `[b, ...]` the examples, inside the bounds.

        Returns:
          `[b, ...]`.
        """
        low, high = edges(self.bounds, x)
        eps = _rows(self.eps, x)
        if self.p == math.inf:
            return jnp.clip(point, jnp.maximum(x - eps, low), jnp.minimum(x + eps, high))
        if self.p == 0:
            return self._project_l0(point, x, eps, low, high)
        move = (self._project_l2 if self.p == 2 else self._project_l1)(point, x, eps, low, high)
        return jnp.clip(x + move, low, high)

    def _project_l2(self, point, x, eps, low, high):
        move = jnp.clip(point, low, high) - x
        if not self.exact:
            length = _l2(move)
            return move * jnp.where(length > eps, _INWARD * eps / jnp.where(length > 0, length, 1), 1)
        want = point - x

        def clipped(s):
            return jnp.clip(x + s * want, low, high) - x

        return clipped(_share_within(lambda s: _l2(clipped(s)), eps))

    def _project_l1(self, point, x, eps, low, high):
        want = point - x
        size, room = jnp.abs(want), jnp.where(want > 0, high - x, x - low)
        most = jnp.minimum(room, eps)  # what `size` loses to rounding from one fused pass to the next stays within
        return jnp.sign(want) * jnp.clip(size - _shrinkage(size, room, eps), 0, most)

    def _project_l0(self, point, x, eps, low, high):
        inside = jnp.clip(point, low, high)
        want = point - x
        gain = jnp.square(want) - jnp.square(point - inside)  # how much nearer to `point` this feature brings us
        keep = _largest(jnp.where(inside != x, gain, -jnp.inf), eps)
        return jnp.where(keep, inside, x)

    def sample(self, keys, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return a random feasible point for each row.

        linf: uniform in the cube, then clipped (Madry et al. 2018). l2, l1: a random direction (Gaussian, Laplace) with
        a uniform radius (as Rice et al. 2020 do for l2), then projected. l0: `eps` random features at random values.

        Args:
          keys: `[b]` typed keys.
          x: `[b, ...]` the examples.

        Returns:
          `[b, ...]`.
        """
        low, high = edges(self.bounds, x)
        eps = _rows(self.eps, x)
        if self.p == math.inf:
            return self.project(x + eps * _uniform(keys, x, -1.0), x)
        first, second = (jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys) for i in range(2))
        if self.p == 0:
            keep = _largest(_uniform(first, x), eps)
            return jnp.where(keep, low + (high - low) * _uniform(second, x), x)
        law = jax.random.normal if self.p == 2 else jax.random.laplace
        direction = jax.vmap(lambda k: law(k, x.shape[1:], x.dtype))(first)
        length = _l2(direction) if self.p == 2 else _sum(jnp.abs(direction))
        radius = jax.vmap(lambda k: jax.random.uniform(k, (), x.dtype))(second)
        return self.project(x + _rows(radius, x) * eps * direction / length, x)

    def steepest(self, grad: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return the direction of p-norm one that raises the linear function `grad` the most; zero for zero rows.

        | norm | direction | gain |
        | --- | --- | --- |
        | linf | `sign(g)` | `||g||_1` |
        | l2 | `g / ||g||_2` | `||g||_2` |
        | l1 | `sign(g)` on the largest feature, or on a share `spread` of them | `||g||_inf` |
        | l0 | `g / max|g|`: the budget counts features and says nothing of how far they move | |

        Args:
          grad: `[b, ...]`, of any scale.

        Returns:
          `[b, ...]`.
        """
        if self.p == math.inf:
            return jnp.sign(grad)
        top = _max(jnp.abs(grad))
        unit = grad / jnp.where(top > 0, top, 1)
        if self.p == 0:
            return unit
        if self.p == 2:
            length = _l2(unit)
            return unit / jnp.where(length > 0, length, 1)
        count = max(math.ceil(self.spread * math.prod(grad.shape[1:])), 1)
        least = lax.top_k(jnp.abs(unit).reshape(unit.shape[0], -1), count)[0][:, -1]
        chosen = jnp.where(jnp.abs(unit) >= _rows(least, unit), jnp.sign(unit), 0)
        return chosen / jnp.maximum(_sum(jnp.abs(chosen)), 1)


@jax.custom_jvp
def _shrinkage(size, room, eps):
    """Return the least `t` for which `clip(size - t, 0, room)` sums to no more than just short of `eps`.

    The sum falls piecewise linearly in `t`. Newton's method finds its root in a few steps; a bracket, halved at every
    fourth step, makes it safe where the caps bend the sum the other way. A row that has arrived stays as it is, so rows
    do not depend on one another. The answer is always on the feasible side.
    """
    unit = jnp.finfo(size.dtype).eps
    goal, top = _INWARD * eps, _max(size)
    aim = (1 - 16 * unit) * goal  # the middle of what is accepted

    def ask(t):
        left = size - t
        return _sum(jnp.clip(left, 0, room)), _sum((left > 0) & (left < room)).astype(size.dtype)

    def step(state):
        number, low, high, total, t, arrived = state
        new, slope = ask(t)
        fits = new <= goal
        now = ~arrived
        low, high = jnp.where(now & ~fits, t, low), jnp.where(now & fits, t, high)
        total = jnp.where(now & fits, new, total)
        ahead = t + (new - aim) / jnp.where(slope > 0, slope, 1)
        ahead = jnp.where(fits, jnp.minimum(ahead, t - unit * t), jnp.maximum(ahead, t + unit * t))
        safe = (ahead > low) & (ahead < high) & (slope > 0) & (number % 4 < 3)
        t = jnp.where(safe, ahead, low + (high - low) / 2)
        return number + 1, low, high, total, t, arrived | enough(low, high, total)

    def enough(low, high, total):
        return (total >= (1 - 32 * unit) * goal) | (high - low <= 2 * unit * high)

    none = jnp.zeros_like(top)
    first, slope = ask(none)
    whole = first <= eps
    guess = jnp.minimum((first - aim) / jnp.maximum(slope, 1), top)
    begin = (jnp.max(none).astype(jnp.int32), none, top, none, guess, whole | enough(none, top, none))
    high = lax.while_loop(lambda s: ~jnp.all(s[-1]) & (s[0] < 4 * _BISECTIONS), step, begin)[2]
    return jnp.where(whole, 0, high)


@_shrinkage.defjvp
def _shrinkage_jvp(given, moved):
    """The derivative of the root: what the free features gain and the capped ones are given, shared by the free."""
    size, room, _ = given
    t = _shrinkage(*given)
    free, capped = (size > t) & (size - t < room), (size - t >= room) & (room > 0)
    gain = _sum(jnp.where(free, moved[0], 0) + jnp.where(capped, moved[1], 0)) - _INWARD * moved[2]
    count = _sum(free.astype(size.dtype))
    return t, jnp.where((t > 0) & (count > 0), gain / jnp.where(count > 0, count, 1), 0)


def _share_within(size: Callable, eps):
    """Return 1 where `size(1)` is within `eps`, else the largest share whose size is just short of it, by bisection."""
    whole = size(jnp.ones_like(eps)) <= eps
    low = jnp.where(whole, jnp.ones_like(eps), jnp.zeros_like(eps))
    high = jnp.maximum(low, jnp.where(whole, low, 1))  # starts from data too, as shard_map asks of a carry

    def half(_, ends):
        low, high = ends
        middle = (low + high) / 2
        ok = size(middle) <= _INWARD * eps
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    share = lax.fori_loop(0, _BISECTIONS, half, (low, high))[0]
    return jnp.where(whole, 1, share)


@pytree
class Union(Threat):
    """The points that at least one member allows. Sizes are shares of a member's budget, so the union's budget is 1."""

    members: tuple[Threat, ...]

    norm = "union"
    sparse = False

    @property
    def eps(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Always 1: the size is measured in budgets of the members."""
        return 1.0

    @property
    def bounds(self) -> tuple[Any, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The bounds of the first member; `union` checks that all agree."""
        return self.members[0].bounds

    def budget(self, x: Any, xp: Any = jnp) -> Any:
        """Return the largest size that counts as feasible: one, and the largest rounding of a member in its budgets."""
        shares = [m.budget(x, xp) / xp.asarray(m.eps) for m in self.members]
        return xp.max(xp.stack([xp.asarray(s) for s in shares]), axis=0)

    def size(self, point, x):
        """Return `min over members of size / eps`, `[b]`."""
        xp = np if isinstance(point, np.ndarray) and isinstance(x, np.ndarray) else jnp
        return xp.min(xp.stack([_share(m.size(point, x), xp.asarray(m.eps), xp) for m in self.members]), axis=0)

    def contains(self, point, x):
        """Return `[b]`, whether at least one member allows the point."""
        xp = np if isinstance(point, np.ndarray) and isinstance(x, np.ndarray) else jnp
        return xp.any(xp.stack([m.contains(point, x) for m in self.members]), axis=0)

    def project(self, point: Float[Array, "b ..."], x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return the nearest of the members' projections (Euclidean distance)."""
        found = jnp.stack([m.project(point, x) for m in self.members])
        far = jnp.stack([_l2(f - point).reshape(-1) for f in found])
        return _pick(found, jnp.argmin(far, axis=0))

    def sample(self, keys, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return a point of a member that is drawn uniformly for each row."""
        which = jax.vmap(lambda k: jax.random.randint(jax.random.fold_in(k, 0), (), 0, len(self.members)))(keys)
        inner = jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys)
        return _pick(jnp.stack([m.sample(inner, x) for m in self.members]), which)

    def steepest(self, grad: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Return the best of the members' steepest moves, each scaled to its budget.

        Args:
          grad: `[b, ...]`.

        Returns:
          `[b, ...]`, for a step size in budgets.

        References:
          Tramèr and Boneh 2019, Adversarial training and robustness for multiple perturbations, arXiv:1904.13000.
        """
        moves = jnp.stack([m.steepest(grad) * _rows(m.eps, grad) for m in self.members])
        gain = jnp.sum(moves * grad[None], axis=tuple(range(2, moves.ndim)))
        return _pick(moves, jnp.argmax(gain, axis=0))


def _share(size, eps, xp):
    """Divide a size by a budget; nothing of nothing is 0, something of nothing infinite."""
    none = xp.where(size > 0, xp.inf, 0)
    return xp.where(eps > 0, size / xp.where(eps > 0, eps, 1), none)


def _pick(stacked, which):
    return jax.vmap(lambda column, i: column[i], in_axes=(1, 0))(stacked, which)


def _ball(name: str, eps: Any, bounds: tuple[Any, Any], p: float, **settings: Any) -> Ball:
    unit = "features" if p == 0 else "the units of x (8/255 for images in [0, 1], not 8)"
    check.positive("eps", eps, f"The budget of {name} is in {unit}; for no attack at all report the clean accuracy.")
    if not isinstance(bounds, tuple) or len(bounds) != 2:
        raise ValueError(f"bounds must be a pair (lowest, highest); got {bounds!r}. Images in [0, 1]? Pass (0.0, 1.0).")
    low, high = (check.concrete(b) for b in bounds)
    if low is not None and high is not None and not np.all(low < high):
        raise ValueError(f"bounds must be (lowest, highest) with lowest < highest; got {bounds}. Swap them?")
    return Ball(eps=eps, bounds=bounds, p=p, **settings)


def linf(eps: Any, bounds: tuple[Any, Any] = (0.0, 1.0)) -> Ball:
    """Return the set of inputs whose features each differ by at most `eps`, inside `bounds`.

    Args:
      eps: largest change of a feature, in units of `x`; a number, `[b]`, or traced. 8/255 is usual for CIFAR, 0.3 for
        MNIST.
      bounds: lowest and highest allowed value of a feature, numbers or arrays that broadcast over an example.

    Returns:
      The threat.

    Raises:
      ValueError: if `eps` is known and not positive, or `bounds` is no pair.

    References:
      Madry et al. 2018, Towards deep learning models resistant to adversarial attacks, arXiv:1706.06083.
    """
    return _ball("linf", eps, bounds, math.inf)


def l2(eps: Any, bounds: tuple[Any, Any] = (0.0, 1.0), *, exact: bool = False) -> Ball:
    """Return the set of inputs within Euclidean distance `eps` that stay inside `bounds`.

    Args:
      eps: radius in units of `x`; a number, `[b]`, or traced. 0.5 is usual for CIFAR.
      bounds: lowest and highest allowed value of a feature.
      exact: project to the nearest feasible point (by bisection) instead of clipping and shrinking.

    Returns:
      The threat.

    Raises:
      ValueError: if `eps` is known and not positive, or `bounds` is no pair.
    """
    return _ball("l2", eps, bounds, 2.0, exact=exact)


def l1(eps: Any, bounds: tuple[Any, Any] = (0.0, 1.0), *, spread: float = 0.0) -> Ball:
    """Return the set of inputs whose features differ by at most `eps` in sum, inside `bounds`.

    Args:
      eps: largest sum of absolute changes, in units of `x`; a number, `[b]`, or traced. 12 is usual for CIFAR.
      bounds: lowest and highest allowed value of a feature.
      spread: share of the features that a steepest step moves together; 0 moves the single best feature, which is the
        exact steepest direction, 0.01 to 0.05 is faster on images.

    Returns:
      The threat.

    Raises:
      ValueError: if `eps` is known and not positive, `bounds` is no pair, or `spread` is outside [0, 1].

    References:
      Tramèr and Boneh 2019, Adversarial training and robustness for multiple perturbations, sec. 4, arXiv:1904.13000
      (the spread step); Croce and Hein 2021, Mind the box, prop. 2.1, arXiv:2103.01208 (the projection).
    """
    if not 0 <= spread <= 1:
        raise ValueError(f"spread must be a share in [0, 1]; got {spread}. Pass 0.05 for 5 % of the features.")
    return _ball("l1", eps, bounds, 1.0, spread=spread)


def l0(eps: Any, bounds: tuple[Any, Any] = (0.0, 1.0)) -> Ball:
    """Return the set of inputs of which at most `eps` features differ, inside `bounds`.

    Args:
      eps: how many features may change; a number, `[b]`, or traced.
      bounds: lowest and highest allowed value of a feature.

    Returns:
      The threat. A feature is one number: a pixel of a color image has three.

    Raises:
      ValueError: if `eps` is known and less than 1, or `bounds` is no pair.
    """
    known = check.concrete(eps)
    if known is not None and known.size and np.any(known < 1):
        raise ValueError(
            f"eps of l0 counts features and must be at least 1; got {eps}. Pass how many features may change."
        )
    return _ball("l0", eps, bounds, 0.0)


def union(*members: Threat) -> Union:
    """Return the set of inputs that at least one of several threats allows.

    Args:
      *members: two or more threats with the same bounds.

    Returns:
      The threat. Its sizes and steps are shares of the members' budgets.

    Raises:
      ValueError: with fewer than two members, or with different bounds.

    References:
      Maini, Wong and Kolter 2020, Adversarial robustness against the union of multiple perturbation models,
      arXiv:1909.04068.
    """
    if len(members) < 2:
        raise ValueError(
            f"union needs at least two threats; got {len(members)}. Pass them one by one: union(linf(..), l2(..))."
        )
    known = [tuple(check.concrete(b) for b in m.bounds) for m in members]
    same = all(a is None or b is None or np.array_equal(a, b) for pair in known[1:] for a, b in zip(pair, known[0]))
    if not same:
        raise ValueError(
            f"the members of a union must have the same bounds; got {[m.bounds for m in members]}. "
            "Pass the same pair to each."
        )
    return Union(members=members)


THREATS: dict[str, Callable[..., Threat]] = {"linf": linf, "l2": l2, "l1": l1, "l0": l0}
"""Threats by name, each a function of `eps` and `bounds`."""
