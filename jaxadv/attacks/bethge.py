"""The attack of Brendel and Bethge: along the boundary toward the example, each step the optimum of a small problem.

What lives here: the attack in l2, linf, l1 and l0, and the solver of its steps. What does not: walks along the boundary
that see predicted classes only (`decisions`), and the projections of FAB, which know of no trust region (`fab`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxadv import losses
from jaxadv.attacks.judge import dead
from jaxadv.attacks.minimum import MinimumNorm, State, ball, falling
from jaxadv.core import Threat, check, edges, pytree, select, static, step_keys
from jaxadv.core.rows import flat, wide
from jaxadv.threats import l2

_HALVINGS = 40
_TRIALS = 25
_COARSE = 18  # trials where features are counted
_BEYOND = 0.01
"""How far behind the boundary a step aims, as a share of its trust region."""
_LEAST = 1e-4
"""The least that it aims behind it, as a share of the distance: a point on the boundary itself fails by chance."""
_FLAT = {"l1": 30.0, "l0": 4.0}
"""The largest weight of nearness over length, in sizes of the largest change."""


def _halve(ok: Callable, low, high, times: int):
    """The largest value for which `ok` holds, by bisection; `low` is taken to be one."""

    def half(_, ends):
        low, high = ends
        middle = (low + high) / 2
        good = ok(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    return lax.fori_loop(0, times, half, (low, high))[0]


def on_plane(
    start: Float[Array, "b d"], normal: Float[Array, "b d"], low: Float[Array, "b d"], high: Float[Array, "b d"], level
) -> Float[Array, "b d"]:
    """Return the point of a plane and a box that is nearest to a start: `clip(start + t normal)` for the right t.

    Args:
      start: `[b, d]`.
      normal: `[b, d]` of the plane; Euclidean length one.
      low: `[b, d]` lower ends of the box.
      high: `[b, d]` upper ends.
      level: `[b]`, the plane is `normal . point = level`.

    Returns:
      `[b, d]`; where the box does not meet the plane, a corner that is nearest to it.
    """

    def at(t):
        return jnp.clip(start + t[:, None] * normal, low, high)

    span = jnp.sqrt(jnp.sum(jnp.square(high - low), axis=-1)) + jnp.sqrt(jnp.sum(jnp.square(start), axis=-1))
    reach = 64 * (span + jnp.abs(level))
    return at(_halve(lambda t: jnp.sum(normal * at(t), axis=-1) <= level, -reach, reach, _HALVINGS))


def _spread(norm: str, back, normal, low, high, level) -> Callable:
    """What trades length for nearness in l1 or l0: `share [b] -> move [b, d]` on the plane, the shortest one for 0.

    The Lagrangian of the problem splits into features. With multipliers as lengths, `t` of the plane and `s` of the
    trust region, its minimum in l1 is `back` clipped to `[t n - s, t n + s]`; in l0 it is `back` where the square of
    the way to `t n` grows by no more than `2 s^2` thereby, and `t n` elsewhere; both clipped to the box.
    """
    size = jnp.max(jnp.abs(back), axis=-1)
    reach = 64 * (jnp.sqrt(jnp.sum(jnp.square(high - low), axis=-1)) + jnp.abs(level) + size)
    nothing = jnp.zeros_like(back)

    def near(t, s):
        aim, s = t[:, None] * normal, s[:, None]
        if norm == "l1":
            return jnp.clip(jnp.clip(back, aim - s, aim + s), low, high)
        free = jnp.clip(aim, low, high)
        return jnp.where((back - free) * (back + free - 2 * aim) <= 2 * jnp.square(s), back, free)

    def move(share):
        s = _FLAT[norm] * size * jnp.square(share)
        most = reach + s / jnp.maximum(jnp.max(jnp.abs(normal), axis=-1), 1e-6)
        halvings = _HALVINGS if norm == "l1" else 30
        t = _halve(lambda t: jnp.sum(normal * near(t, s), axis=-1) <= level, -most, most, halvings)
        if norm == "l1":
            return near(t, s)
        # a jump over the plane: the feature that jumps is free, and the free ones meet the plane
        step = 1e-5 * (jnp.abs(t) + s)
        kept = (near(t - step, s) == back) & (near(t + step, s) == back)
        return on_plane(nothing, normal, jnp.where(kept, back, low), jnp.where(kept, back, high), level)

    return move


def nearer(
    norm: str,
    back: Float[Array, "b d"],
    normal: Float[Array, "b d"],
    low: Float[Array, "b d"],
    high: Float[Array, "b d"],
    level: Float[Array, " b"],
    radius: Float[Array, " b"],
) -> Float[Array, "b d"]:
    """Return the move onto a plane, within a trust region and a box, that brings a point nearest to its example.

    `argmin ||back - move||` with `normal . move = level`, `||move||_2 <= radius` and `low <= move <= high`.

    Args:
      norm: `"l2"`, `"linf"`, `"l1"` or `"l0"`, of what is minimized. In l0 the problem is not convex, and the answer
        that of its Lagrangian, which may change a feature more than the best one.
      back: `[b, d]` the move that leads to the example, inside the box.
      normal: `[b, d]` of the plane; Euclidean length one.
      low: `[b, d]` at most zero.
      high: `[b, d]` at least zero.
      level: `[b]`.
      radius: `[b]` Euclidean; where the plane is farther, the shortest move onto it is taken.

    Returns:
      `[b, d]`.
    """
    nothing, none = jnp.zeros_like(back), jnp.zeros_like(level)

    def short(move):
        return jnp.sum(jnp.square(move), axis=-1) <= jnp.square(radius)

    def met(move):
        return jnp.abs(jnp.sum(normal * move, axis=-1) - level) <= 1e-5 * (jnp.abs(level) + radius)

    if norm == "l2":

        def drawn(share):
            return on_plane(share[:, None] * back, normal, low, high, level)

        whole = drawn(none + 1)
        return select(short(whole), whole, drawn(_halve(lambda s: short(drawn(s)), none, none + 1, _TRIALS)))

    size, most = jnp.max(jnp.abs(back), axis=-1), none + 1

    def within(gain):  # by how much the largest change is less
        left = (size - gain)[:, None]
        inside = jnp.clip(jnp.maximum(low, back - left), low, high), jnp.clip(jnp.minimum(high, back + left), low, high)
        return on_plane(nothing, normal, *inside, level)

    if norm == "linf":
        move, most = within, size
    else:
        move = _spread(norm, back, normal, low, high, level)

    def good(much):
        found = move(much)
        return short(found) & met(found)

    return move(_halve(good, none, most, _COARSE if norm == "l0" else _TRIALS))


class Own(NamedTuple):
    """The way to the boundary: a first failing point, and the bisection toward it; every leaf is `[b, ...]`."""

    met: Bool[Array, " b"]
    tick: Int[Array, " b"]  # bisections
    low: Float[Array, " b"]  # share of the way that holds
    high: Float[Array, " b"]  # and one that fails
    outer: Float[Array, "b ..."]
    slope: Float[Array, "b ..."]  # running mean of the gradients along the boundary


@pytree
class BrendelBethge(MinimumNorm):
    """Crosses the boundary, bisects back to it, then follows it toward the example; built by `brendel_bethge`."""

    bisections: int = static()
    rates: tuple[float, float] = static()
    momentum: float = static()
    second: int = static()  # the step after which the walk from noise begins
    draws: int = static()

    start = "random"

    @property
    def _up(self) -> Threat:
        """The norm in which the first failing point is looked for: few features may never reach one."""
        return self.threat if self.threat.norm in ("l2", "linf") else l2(1.0)

    def _own(self, logits, x, y):
        nothing = jnp.zeros_like(flat(x)[:, 0])
        tick = nothing.astype(jnp.int32)
        return Own(met=nothing > 1, tick=tick, low=nothing, high=nothing + 1, outer=x, slope=jnp.zeros_like(x))

    def step(self, state: State, model, x, y) -> State:
        """Ask at the point; then draw, jump, halve, or take the best step along the boundary."""
        place, keys = state.step, step_keys(state.keys, state.step)
        low, high = edges(self.threat.bounds, x)
        state, fails, gap, grad = self._look(state, model, x, y, losses.margin)
        gap, own = jnp.where(jnp.isfinite(gap), gap, 0), state.own

        first = fails & ~own.met
        halving = own.met & (own.tick < self.bisections)
        walking = own.met & ~halving
        middle = (own.low + own.high) / 2
        halved = own._replace(
            tick=own.tick + 1, low=jnp.where(fails, own.low, middle), high=jnp.where(fails, middle, own.high)
        )
        mean = self.momentum * own.slope + (1 - self.momentum) * grad
        new = select(halving, halved, select(first, own._replace(met=own.met | True, outer=state.point), own))
        begun = jnp.any(flat(own.slope) != 0, axis=-1)
        new = new._replace(slope=select(walking & begun, mean, grad))
        share = jnp.where(new.tick < self.bisections, (new.low + new.high) / 2, new.high)

        up = self._up.steepest(grad)
        dual = jnp.sum(flat(grad * up), axis=-1)
        away = 1.1 * jnp.maximum(gap, 0) / jnp.where(dual > 0, dual, 1) + 1e-3
        jump = jnp.clip(state.point - wide(away, x) * up, low, high)
        along = self._along(state, place, gap, select(walking, new.slope, grad), x)
        onto = halving | first if self.bisections else halving
        on = select(new.met, select(onto, self._blend(new.outer, share, x), along), jump)
        if self.second == self.max_steps:
            return state._replace(point=jnp.clip(on, low, high), own=new)

        # the second walk: from noise, or where that does not fail, from the nearest point of the first one
        fresh = self._own(None, x, y)
        new = select(place + 1 == self.second, fresh, new)
        later = place + 1 - self.second
        drawing = (later >= 0) & (later < self.draws) & ~new.met
        noise = low + (high - low) * jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype))(keys)
        noise = jnp.where(jnp.isfinite(noise), noise, x)  # nothing to draw from without bounds
        over, known = (later == self.draws) & ~new.met, jnp.isfinite(state.distance)
        back = fresh._replace(met=known, tick=fresh.tick + self.bisections, outer=state.best)
        on = select(drawing, noise, select(over, select(known, state.best, x), on))
        return state._replace(point=jnp.clip(on, low, high), own=select(over, back, new))

    def _blend(self, outer, share, x):
        """The point at a share of the way to `outer`, which the ball of that share holds in l1, l2 and linf."""
        way = outer - x
        most, part = wide(jnp.max(jnp.abs(flat(way)), axis=-1), x), wide(share, x)
        if self.threat.norm == "linf":
            return x + jnp.clip(way, -part * most, part * most)
        if self.threat.norm == "l1":
            return x + jnp.sign(way) * jnp.maximum(jnp.abs(way) - (1 - part) * most, 0)
        if self.threat.norm == "l0":
            return jnp.where(jnp.abs(way) >= (1 - part) * most, outer, x)
        return x + part * way

    def _changes(self, point, x, low, high):
        """What the trust region is measured by; in l0 a changed feature counts with all that it could change by."""
        changes = flat(point - x)
        if self.threat.norm != "l0":
            return changes
        most = flat(jnp.maximum(high - x, x - low))
        return jnp.where((changes != 0) & jnp.isfinite(most), most, changes)

    def _along(self, state: State, place, gap, grad, x):
        """The best point along the boundary, as the gradient sees it; the point itself without a gradient."""
        low, high = edges(self.threat.bounds, x)
        point, slope = state.point, flat(grad)
        length = jnp.sqrt(jnp.sum(jnp.square(slope), axis=-1))
        scale = jnp.where(length > 0, length, 1)
        reach = jnp.sqrt(jnp.sum(jnp.square(self._changes(state.best, x, low, high)), axis=-1))
        again = place >= self.second
        done, length = place - again * self.second, jnp.where(again, self.max_steps - self.second, self.second)
        most, least = self.rates
        radius = reach * (most * (least / most) ** (done / jnp.maximum(length, 1))).astype(x.dtype)
        level = -gap / scale - jnp.maximum(_BEYOND * radius, _LEAST * reach)
        box = flat(jnp.broadcast_to(low, x.shape) - point), flat(jnp.broadcast_to(high, x.shape) - point)
        move = nearer(self.threat.norm, flat(x - point), slope / scale[:, None], *box, level, radius)
        return select(dead(grad), point, point + move.reshape(x.shape))


RATES = {"l2": (1.0, 1e-3), "linf": (0.3, 1e-4), "l1": (1.0, 1e-3), "l0": (1.0, 0.3)}
"""First and last radius of the trust region, chosen on two MNIST networks."""


def brendel_bethge(
    threat: Threat,
    *,
    steps: int = 200,
    bisections: int = 10,
    rates: tuple[float, float] | None = None,
    momentum: float = 0.8,
    noise: float = 0.6,
    draws: int = 5,
    early: bool = False,
    name: str = "brendel_bethge",
) -> BrendelBethge:
    """Return the attack of Brendel and Bethge: start beyond the boundary, and follow it toward the example.

    Every step solves for the move that comes nearest to the example, stays on the linearized boundary, in the bounds
    and in a trust region. A step costs one gradient. There are two walks, and the nearest point of both counts: one
    from where steps over the linearized boundary lead, and one from noise, which arrives where such steps get stuck.

    Args:
      threat: a norm ball.
      steps: number of steps of both walks, those to and onto the boundary among them.
      bisections: of the way between the example and the first failing point.
      rates: first and last radius of the trust region, as shares of the Euclidean distance of the nearest failing point
        (in l0 of all that its changed features could change by), falling geometrically; None takes `RATES`.
      momentum: of the running mean of gradients that stands for the boundary's normal.
      noise: share of the steps that the walk from noise takes; 0 for none.
      draws: how often noise is drawn for a point that fails; in vain, the second walk goes on from the first one's.
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on counts or settings out of range, or no norm ball.

    References:
      Brendel et al. 2019, Accurate, reliable and fast robustness evaluation, sec. 3 and eq. 4, arXiv:1907.01003.
      Differs from the authors' code: there one walk starts at noise or a given point; trust regions here are shares of
      the distance, and the steps are solved by nested bisection, for all rows at once and exactly but for l0, see
      `nearer` (theirs: a dual solver for each row on the host).
    """
    ball(threat, ("l2", "linf", "l1", "l0"), name)
    check.whole("steps", steps)
    check.whole("bisections", bisections, least=0)
    check.whole("draws", draws)
    rates = RATES[threat.norm] if rates is None else rates
    falling("rates", rates)
    check.fraction("noise", noise)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be a share in [0, 1); got {momentum}. 0 takes each gradient by itself.")
    return BrendelBethge(
        threat=threat, name=name, max_steps=steps, early=early, bisections=bisections, rates=(*rates,),
        momentum=momentum, second=steps - round(noise * steps), draws=draws,
    )  # fmt: skip
