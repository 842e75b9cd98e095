"""Carlini and Wagner's attacks in linf and l0: descents that tighten what is allowed whenever they succeed.

A descent minimizes `c * max(margin, 0)` beside a penalty, in a variable without bounds. Where it meets a failing point
that the penalty is content with, less is allowed from then on (a lower ceiling of changes in linf, fewer features in
l0), and the next descent begins there; where it does not, the constant grows. Every row does so at its own pace, so one
step costs one gradient, and rows live alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxadv import losses
from jaxadv.attacks.minimum import State
from jaxadv.attacks.tradeoff import Rounds, adam
from jaxadv.core import Threat, check, edges, pytree, select, static
from jaxadv.core.rows import flat, wide


class Own(NamedTuple):
    """What is allowed now, and the descent; every leaf is `[b, ...]`."""

    constant: Float[Array, " b"]
    ceiling: Float[Array, " b"]  # linf: changes beyond it are penalized
    free: Bool[Array, "b ..."]  # l0: which features may move
    base: Float[Array, "b ..."]  # where the descent has begun
    w: Float[Array, "b ..."]
    opt: Any
    place: Int[Array, " b"]  # steps of this descent
    ended: Bool[Array, " b"]


@pytree
class Tightening(Rounds):
    """Descents that allow less after each success; a subclass says what is penalized and what is tightened."""

    largest: float = static()
    growth: float = static()
    transform: optax.GradientTransformation = static()

    def _own(self, logits, x, y):
        nothing = jnp.zeros_like(flat(x)[:, 0])
        w, opt = self._begin(x)
        return Own(
            constant=nothing + self.constant,
            ceiling=nothing + self._highest(x),
            free=x == x,
            base=x,
            w=w,
            opt=opt,
            place=nothing.astype(jnp.int32),
            ended=nothing > 1,
        )

    def _begin(self, base):
        w = self._unbound(base)
        return w, jax.vmap(self.transform.init)(w)

    def _highest(self, x):
        low, high = edges(self.threat.bounds, x)
        return jnp.max(high - low)

    def _found(self, state: State) -> Bool[Array, " b"]:
        return super()._found(state) | state.own.ended  # it can be tightened no more

    def step(self, state: State, model, x, y) -> State:
        """Ask at the point of `w`; where it succeeds tighten, else one step of Adam."""
        own = state.own
        state = state._replace(point=jnp.where(own.free, self._bound(own.w), x))
        state, ok, gap, grad = self._look(state, model, x, y, losses.margin)
        excess = jnp.maximum(gap + self.confidence, 0)
        penalty, pull = self._penalty(own, state.point, x)
        pushed = wide(jnp.where(excess > 0, own.constant, 0), x) * grad
        half, spread = self._middle(x)[1], jnp.tanh(own.w)
        rise = jnp.where(own.free, (pushed + pull) * half * (1 - spread * spread), 0)
        updates, opt = jax.vmap(self.transform.update)(rise, own.opt)
        walked = own._replace(w=own.w + updates, opt=opt, place=own.place + 1)

        content = ok & self._content(own, penalty)
        tight = self._tightened(own, state.point, pushed, x)
        spent = walked.place >= self.length
        again = own._replace(
            constant=own.constant * self.growth, ended=own.ended | (own.constant * self.growth > self.largest)
        )
        following = select(content, tight, again)
        base = select(content, state.point, own.base)
        w, opt = self._begin(base)
        fresh = following._replace(base=base, w=w, opt=opt, place=own.place * 0)
        return state._replace(own=select(content | spent, fresh, walked))

    def _penalty(self, own: Own, point, x) -> tuple[Any, Any]:
        """What is minimized beside the margin, `[b]`, and its gradient with respect to the point."""
        raise TypeError(f"{type(self).__name__} must define _penalty")

    def _content(self, own: Own, penalty) -> Any:
        """Whether the penalty lets a failing point count."""
        return penalty < jnp.inf

    def _tightened(self, own: Own, point, pushed, x) -> Own:
        """Allow less, after a success at the point."""
        raise TypeError(f"{type(self).__name__} must define _tightened")


@pytree
class CarliniLinf(Tightening):
    """Penalizes changes beyond a ceiling that sinks with every success; built by `carlini_linf`."""

    shrink: float = static()
    least: float = static()

    def _penalty(self, own: Own, point, x):
        move = point - x
        over = jnp.abs(move) - wide(own.ceiling, x)
        return jnp.sum(flat(jnp.maximum(over, 0)), axis=-1), jnp.where(over > 0, jnp.sign(move), 0)

    def _content(self, own: Own, penalty):
        return penalty < 1e-4 * own.constant

    def _tightened(self, own: Own, point, pushed, x) -> Own:
        ceiling = self.shrink * jnp.minimum(own.ceiling, jnp.max(jnp.abs(flat(point - x)), axis=-1))
        return own._replace(ceiling=ceiling, ended=own.ended | (ceiling < self.least))


@pytree
class CarliniL0(Tightening):
    """Descends in l2 on ever fewer features; built by `carlini_l0`."""

    def _penalty(self, own: Own, point, x):
        move = point - x
        return jnp.sum(flat(move * move), axis=-1), 2 * move

    def _tightened(self, own: Own, point, pushed, x) -> Own:
        """Freeze the free features of which the move matters least: the change times the gradient."""
        free = flat(own.free)
        worth = jnp.where(free, jnp.abs(flat(point - x) * flat(pushed)), jnp.inf)
        worth = jnp.where(free, worth + 1e-12 * jnp.abs(flat(point - x)), jnp.inf)  # where no gradient tells
        count = jnp.sum(free, axis=-1)
        drop = jnp.maximum(jnp.floor(0.3 * jnp.sqrt(count.astype(x.dtype))), 1).astype(jnp.int32)
        rank = jnp.argsort(jnp.argsort(worth, axis=-1, stable=True), axis=-1, stable=True)
        left = free & (rank >= drop[:, None])
        return own._replace(free=left.reshape(x.shape), ended=own.ended | ~jnp.any(left, axis=-1))


def _built(kind: Any, threat: Threat, norm: str, name: str, *, rate, largest, growth, early, **settings: Any) -> Any:
    """Check the settings that both share, and make the attack."""
    check.positive("rate", rate)
    check.positive("largest", largest)
    if not growth > 1:
        raise ValueError(f"growth must be more than 1; got {growth}. The authors double the constant.")
    own = {"largest": float(largest), "growth": float(growth), "transform": adam(float(rate))}
    return kind.build(threat, norm, name, early=True, stop=early, **own, **settings)


def carlini_linf(
    threat: Threat,
    *,
    steps: int = 100,
    rounds: int = 20,
    rate: float = 5e-3,
    constant: float = 1e-3,
    largest: float = 20.0,
    growth: float = 2.0,
    confidence: float = 0.0,
    shrink: float = 0.9,
    least: float = 1 / 256,
    early: bool = False,
    name: str = "carlini_linf",
) -> CarliniLinf:
    """Return the attack of Carlini and Wagner in linf: `c * max(margin, 0) + sum max(|x' - x| - ceiling, 0)` by Adam.

    Args:
      threat: a norm ball `linf`.
      steps: steps of a descent without success, after which the constant grows; each costs one gradient. The authors
        take 1,000.
      rounds: `steps * rounds` steps are taken in all, unless a row ends before.
      rate: step size of Adam.
      constant: the first constant.
      largest: a row ends once its constant is beyond.
      growth: factor of the constant.
      confidence: the margin, in logits, by which a point has to fail.
      shrink: the next ceiling, as a share of the largest change of a success.
      least: a row ends once its ceiling is below, in the units of `x`.
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on counts or settings out of range, or a threat of another norm.

    References:
      Carlini and Wagner 2017, Towards evaluating the robustness of neural networks, sec. VI.C, arXiv:1608.04644.
      Differs from the authors' code: the nearest failing point on the way counts, whatever the ceiling; the first
      constant is 1e-3 (theirs: 1e-5) and a descent has 100 steps.
    """
    for what, value in (("shrink", shrink), ("least", least)):
        if not 0 < value < 1:
            raise ValueError(f"{what} must lie in (0, 1); got {value}. The authors take 0.9 and 1/256.")
    return _built(
        CarliniLinf, threat, "linf", name, steps=steps, rounds=rounds, rate=rate, constant=constant, largest=largest,
        growth=growth, confidence=confidence, early=early, shrink=float(shrink), least=float(least),
    )  # fmt: skip


def carlini_l0(
    threat: Threat,
    *,
    steps: int = 100,
    rounds: int = 20,
    rate: float = 0.05,
    constant: float = 1e-2,
    largest: float = 2e6,
    growth: float = 4.0,
    confidence: float = 0.0,
    early: bool = False,
    name: str = "carlini_l0",
) -> CarliniL0:
    """Return the attack of Carlini and Wagner in l0: l2 descents on ever fewer features.

    After each success the features whose changes matter least (times their gradients) are frozen at the example.

    Args:
      threat: a norm ball `l0`.
      steps: steps of a descent without success, after which the constant grows; each costs one gradient.
      rounds: `steps * rounds` steps are taken in all, unless a row ends before.
      rate: step size of Adam.
      constant: the first constant.
      largest: a row ends once its constant is beyond.
      growth: factor of the constant.
      confidence: the margin, in logits, by which a point has to fail.
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on counts or settings out of range, or a threat of another norm.

    References:
      Carlini and Wagner 2017, Towards evaluating the robustness of neural networks, sec. VI.B, arXiv:1608.04644. As in
      the authors' code about `0.3 sqrt(n)` of the n free features are frozen at a time. Differs: features are numbers,
      not pixels of three; the gradient is the one at the success.
    """
    return _built(
        CarliniL0, threat, "l0", name, steps=steps, rounds=rounds, rate=rate, constant=constant, largest=largest,
        growth=growth, confidence=confidence, early=early,
    )  # fmt: skip
