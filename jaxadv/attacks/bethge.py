"""The attack of Brendel and Bethge: along the boundary toward the example, each step the optimum of a small problem.

What lives here: the attack in l2 and linf, and the solver of its steps. What does not: walks along the boundary that
see predicted classes only (`decisions`), and the projections of FAB, which know of no trust region (`fab`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxadv import losses
from jaxadv.attacks.judge import dead
from jaxadv.attacks.minimum import MinimumNorm, State, ball, cosine, falling
from jaxadv.core import Threat, check, edges, pytree, select, static
from jaxadv.core.rows import flat, wide

_HALVINGS = 40
_TRIALS = 25
_BEYOND = 0.01
"""How far behind the boundary a step aims, as a share of its trust region."""


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
      norm: `"l2"` or `"linf"`, of what is minimized.
      back: `[b, d]` the move that leads to the example.
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

    if norm == "l2":

        def drawn(share):
            return on_plane(share[:, None] * back, normal, low, high, level)

        whole = drawn(none + 1)
        return select(short(whole), whole, drawn(_halve(lambda s: short(drawn(s)), none, none + 1, _TRIALS)))

    size = jnp.max(jnp.abs(back), axis=-1)

    def within(gain):  # by how much the largest change is less
        left = (size - gain)[:, None]
        inside = jnp.clip(jnp.maximum(low, back - left), low, high), jnp.clip(jnp.minimum(high, back + left), low, high)
        return on_plane(nothing, normal, *inside, level)

    def good(gain):
        move = within(gain)
        missed = jnp.abs(jnp.sum(normal * move, axis=-1) - level)
        return short(move) & (missed <= 1e-5 * (jnp.abs(level) + radius))

    return within(_halve(good, none, size, _TRIALS))


class Own(NamedTuple):
    """The way to the boundary: a first failing point, and the bisection toward it; every leaf is `[b, ...]`."""

    met: Bool[Array, " b"]
    tick: Int[Array, " b"]  # bisections
    low: Float[Array, " b"]  # share of the way that holds
    high: Float[Array, " b"]  # and one that fails
    outer: Float[Array, "b ..."]


@pytree
class BrendelBethge(MinimumNorm):
    """Crosses the boundary, bisects back to it, then follows it toward the example; built by `brendel_bethge`."""

    bisections: int = static()
    rates: tuple[float, float] = static()

    def _own(self, logits, x, y):
        nothing = jnp.zeros_like(flat(x)[:, 0])
        return Own(met=nothing > 1, tick=nothing.astype(jnp.int32), low=nothing, high=nothing + 1, outer=x)

    def step(self, state: State, model, x, y) -> State:
        """Ask at the point; then jump, halve, or take the best step along the boundary."""
        own, place = state.own, state.step
        low, high = edges(self.threat.bounds, x)
        state, fails, gap, grad = self._look(state, model, x, y, losses.margin)
        gap = jnp.where(jnp.isfinite(gap), gap, 0)

        first = fails & ~own.met
        halving = own.met & (own.tick < self.bisections)
        middle = (own.low + own.high) / 2
        halved = own._replace(
            tick=own.tick + 1, low=jnp.where(fails, own.low, middle), high=jnp.where(fails, middle, own.high)
        )
        begun = own._replace(met=own.met | True, outer=state.point)
        new = select(halving, halved, select(first, begun, own))
        share = jnp.where(new.tick < self.bisections, (new.low + new.high) / 2, new.high)
        between = x + wide(share, x) * (new.outer - x)

        dual = jnp.sum(flat(grad * self.threat.steepest(grad)), axis=-1)
        away = 1.1 * jnp.maximum(gap, 0) / jnp.where(dual > 0, dual, 1) + 1e-3
        jump = state.point - wide(away, x) * self.threat.steepest(grad)
        along = state.point + self._along(state, place, gap, grad, x)
        on = select(new.met, select(halving | first, between, along), jump)
        if not self.bisections:
            on = select(first, along, on)
        return state._replace(point=jnp.clip(on, low, high), own=new)

    def _along(self, state: State, place, gap, grad, x):
        """The best move along the boundary, as the gradient sees it; none without a gradient."""
        low, high = edges(self.threat.bounds, x)
        point, slope = state.point, flat(grad)
        length = jnp.sqrt(jnp.sum(jnp.square(slope), axis=-1))
        scale = jnp.where(length > 0, length, 1)
        reach = jnp.sqrt(jnp.sum(jnp.square(flat(state.best - x)), axis=-1))
        radius = cosine(place, self.max_steps, *self.rates).astype(x.dtype) * reach
        level = -gap / scale - _BEYOND * radius
        box = flat(jnp.broadcast_to(low, x.shape) - point), flat(jnp.broadcast_to(high, x.shape) - point)
        move = nearer(self.threat.norm, flat(x - point), slope / scale[:, None], *box, level, radius)
        return select(dead(grad), jnp.zeros_like(x), move.reshape(x.shape))


def brendel_bethge(
    threat: Threat,
    *,
    steps: int = 100,
    bisections: int = 10,
    rates: tuple[float, float] = (0.5, 0.01),
    early: bool = False,
    name: str = "brendel_bethge",
) -> BrendelBethge:
    """Return the attack of Brendel and Bethge: start beyond the boundary, and follow it toward the example.

    Every step solves for the move that comes nearest to the example, stays on the linearized boundary, in the bounds
    and in a trust region. A step costs one gradient.

    Args:
      threat: a norm ball `l2` or `linf`.
      steps: number of steps, those to and onto the boundary among them.
      bisections: of the way between the example and the first failing point.
      rates: first and last radius of the trust region, as shares of the distance of the nearest failing point, along a
        cosine.
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on counts or settings out of range, or a threat of another norm.

    References:
      Brendel et al. 2019, Accurate, reliable and fast robustness evaluation, sec. 3 and eq. 4, arXiv:1907.01003.
      Differs from the authors' code: the first failing point comes from steps over the linearized boundary (theirs is
      given, or noise), trust regions are shares of the distance, and the steps are solved by nested bisection, exactly
      and for all rows at once (theirs: a dual solver for each row on the host).
    """
    ball(threat, ("l2", "linf"), name)
    check.whole("steps", steps)
    check.whole("bisections", bisections, least=0)
    falling("rates", rates)
    return BrendelBethge(threat=threat, name=name, max_steps=steps, early=early, bisections=bisections, rates=(*rates,))
