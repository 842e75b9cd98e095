"""Minimum-norm attacks that minimize `distance + c * loss` and search for `c`: Carlini-Wagner, EAD, L-BFGS.

One attack is one state machine: a round is a descent with one constant, and the next constant follows from whether the
round has met a failing point. Rounds are looked up from the row's own step counter, so every row has a constant, an
optimizer, a line search and an end of its own, and every step costs one gradient.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxadv import losses
from jaxadv.attacks.judge import ask, dead
from jaxadv.attacks.minimum import MinimumNorm, State, aim, ball, mended, slope
from jaxadv.attacks.optimizers import from_data
from jaxadv.core import Threat, check, edges, pytree, select, static
from jaxadv.core.rows import flat, wide

_MEMORY = 10
_LARGEST = 1e10
_SHORTEST = 1e-8


class Own(NamedTuple):
    """The search for the constant, and the descent of this round; every leaf is `[b, ...]`."""

    constant: Float[Array, " b"]
    low: Float[Array, " b"]  # largest constant that has failed to break the row
    high: Float[Array, " b"]  # smallest one that has broken it
    hit: Bool[Array, " b"]  # a failing point was met in this round
    last: Float[Array, " b"]  # the objective at the last check for progress
    descent: Any


@pytree
class Rounds(MinimumNorm):
    """What descents of `length` steps share, of which each has a constant; with `stop` a row ends within the budget."""

    length: int = static()
    constant: float = static()
    confidence: float = static()  # pyright: ignore[reportIncompatibleVariableOverride]
    stop: bool = static()

    @classmethod
    def build(
        cls, threat: Threat, norm: str, name: str, *, steps: int, rounds: int, constant, confidence, stop, **own: Any
    ):
        """Check the settings that all share, and make the attack, with fields of its `own`."""
        ball(threat, (norm,), name)
        check.whole("steps", steps)
        check.whole("rounds", rounds)
        check.positive("constant", constant)
        check.not_negative("confidence", confidence, "0 asks for any failure.")
        shared = {"length": steps, "constant": float(constant), "confidence": float(confidence), "stop": stop}
        return cls(threat=threat, name=name, max_steps=steps * rounds, **shared, **own)

    def _found(self, state: State) -> Bool[Array, " b"]:
        return state.broken & self.stop

    def _middle(self, x) -> tuple[Any, Any]:
        """The center of the bounds, and half their distance."""
        low, high = edges(self.threat.bounds, x)
        return (low + high) / 2, (high - low) / 2

    def _unbound(self, x):
        """The variable without bounds of a point: `x = center + half * tanh(w)`."""
        center, half = self._middle(x)
        return jnp.arctanh(0.999999 * jnp.clip((x - center) / half, -1, 1))

    def _bound(self, w):
        """And back."""
        center, half = self._middle(w)
        return jnp.clip(center + half * jnp.tanh(w), *edges(self.threat.bounds, w))


@pytree
class Tradeoff(Rounds):
    """Rounds of descent on `distance + c * loss`; a subclass says how a descent begins and steps.

    A subclass gives `_fresh` and `_restart`, the first states of the first descent and of later ones, and `step`, which
    begins with `_begun` and ends with `_ended`.
    """

    abort: bool = static()

    def _own(self, logits, x, y):
        nothing = jnp.zeros_like(flat(x)[:, 0])
        return Own(
            constant=nothing + self.constant,
            low=nothing,
            high=nothing + jnp.inf,
            hit=nothing > 1,
            last=nothing + jnp.inf,
            descent=self._fresh(x, logits, y),
        )

    def _fresh(self, x, logits, y) -> Any:
        raise TypeError(f"{type(self).__name__} must define _fresh")

    def _restart(self, descent, x) -> Any:
        """The first state of a descent in a later round."""
        raise TypeError(f"{type(self).__name__} must define _restart")

    def _begun(self, state: State, x, at=None) -> State:
        """Where a round begins: the next constant by bisection, or ten times the last one, and a descent from `at`."""
        begin = state.step % self.length == 0
        at = x if at is None else at

        def following():
            new = self._following(state, x)
            return select(begin, new, state.own), select(begin, at, state.point)

        own, point = lax.cond(jnp.any(begin), following, lambda: (state.own, state.point))
        return state._replace(own=own, point=point)

    def _following(self, state: State, x) -> Own:
        """The next round: its constant, and a fresh descent."""
        own, rounds = state.own, self.max_steps // self.length
        low = jnp.where(own.hit, own.low, jnp.maximum(own.low, own.constant))
        high = jnp.where(own.hit, jnp.minimum(own.high, own.constant), own.high)
        constant = jnp.where(jnp.isinf(high), jnp.minimum(own.constant * 10, _LARGEST), (low + high) / 2)
        if rounds >= 10:  # the last round repeats the best constant
            again = (state.step == self.max_steps - self.length) & jnp.isfinite(high)
            constant = jnp.where(again, high, constant)
        first = state.step == 0
        return Own(
            constant=jnp.where(first, own.constant, constant),
            low=jnp.where(first, own.low, low),
            high=jnp.where(first, own.high, high),
            hit=own.hit & False,
            last=jnp.full_like(own.last, jnp.inf),
            descent=self._restart(own.descent, x),
        )

    def _ended(self, state: State, before: State, ok, value, halt=None) -> State:
        """Count the step; with `abort` a descent without progress over a tenth of its steps skips the rest of it."""
        own = state.own._replace(hit=state.own.hit | ok)
        step = before.step + 1
        if self.abort:
            check_now = before.step % self.length % -(-self.length // 10) == 0
            stalled = check_now & ~(value <= 0.9999 * own.last)
            stalled = stalled if halt is None else stalled | halt
            own = own._replace(last=jnp.where(check_now, value, own.last))
            step = jnp.where(stalled, (before.step // self.length + 1) * self.length, step)
        return state._replace(own=own, step=step, spent=before.spent + 1)


# ------------------------------------------------------------------------------------------------------ Carlini-Wagner


@lru_cache
def adam(rate: float) -> optax.GradientTransformation:
    """Return Adam for the rows of an attack; cached, so that equal attacks share one compiled program.

    Args:
      rate: step size.

    Returns:
      The transformation.
    """
    return from_data(optax.adam(rate))


class Unbounded(NamedTuple):
    """A descent in the variable `w` of `x = center + half * tanh(w)`."""

    w: Float[Array, "b ..."]
    opt: Any


@pytree
class Carlini(Tradeoff):
    """Adam on the squared distance and a hinge of the margin, in a variable without bounds; built by `carlini`."""

    transform: optax.GradientTransformation = static()

    def _fresh(self, x, logits, y):
        return self._restart(None, x)

    def _restart(self, descent, x):
        w = self._unbound(x)
        return Unbounded(w=w, opt=jax.vmap(self.transform.init)(w))

    def step(self, state: State, model, x, y) -> State:
        """Ask at the point of `w`, then one step of Adam."""
        home = self._bound(self._unbound(x))
        before = state = self._begun(state, x, home)
        descent, constant = state.own.descent, state.own.constant
        state, ok, gap, grad = self._look(state, model, x, y, losses.margin)
        excess = jnp.maximum(gap + self.confidence, 0)
        move = state.point - home
        value = jnp.sum(flat(move * move), axis=-1) + constant * excess
        rise = 2 * move + wide(jnp.where(excess > 0, constant, 0), x) * grad
        rise = rise * self._middle(x)[1] / jnp.cosh(descent.w) ** 2
        updates, opt = jax.vmap(self.transform.update)(rise, descent.opt)
        w = descent.w + updates
        state = state._replace(own=state.own._replace(descent=Unbounded(w=w, opt=opt)), point=self._bound(w))
        return self._ended(state, before, ok, value)


def carlini(
    threat: Threat,
    *,
    steps: int = 1000,
    rounds: int = 9,
    rate: float = 0.01,
    constant: float = 1e-3,
    confidence: float = 0.0,
    abort: bool = True,
    early: bool = False,
    name: str = "carlini",
) -> Carlini:
    """Return the attack of Carlini and Wagner in l2: `||x' - x||^2 + c * max(margin + confidence, 0)` by Adam.

    Args:
      threat: a norm ball `l2`.
      steps: steps of a round; each costs one gradient. The authors take 10,000.
      rounds: constants that are tried.
      rate: step size of Adam.
      constant: the first constant; ten times more until it breaks the row, then bisection.
      confidence: the margin, in logits, by which a point has to fail.
      abort: a round without progress over a tenth of its steps ends.
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on counts or settings out of range, or a threat of another norm.

    References:
      Carlini and Wagner 2017, Towards evaluating the robustness of neural networks, sec. VI, arXiv:1608.04644. As in
      the authors' code the distance in the objective is to the example mapped there and back. Differs: progress is
      judged for each example (theirs: the sum over the batch); 1,000 steps instead of 10,000; sizes are to the example
      itself.
    """
    check.positive("rate", rate)
    return Carlini.build(
        threat, "l2", name, steps=steps, rounds=rounds, constant=constant, confidence=confidence, stop=early,
        early=early or abort, abort=abort, transform=adam(float(rate)),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- EAD


@pytree
class EAD(Tradeoff):
    """Accelerated shrinkage on a hinge of the margin, the squared distance and the sum of changes; built by `ead`."""

    rate: float = static()
    beta: float = static()
    rule: str = static()

    def _fresh(self, x, logits, y):
        return x  # where the gradient is taken

    def _restart(self, descent, x):
        return x

    def _passes(self, state: State) -> tuple[int, int]:
        return 2, 1

    def _far(self, point, x) -> Any:
        move = flat(point - x)
        total = jnp.sum(jnp.abs(move), axis=-1)
        return total if self.rule == "l1" else self.beta * total + jnp.sum(move * move, axis=-1)

    def step(self, state: State, model, x, y) -> State:
        """A gradient step ahead of the point, shrunk toward `x` by `beta` and clipped; then ask at the new point."""
        low, high = edges(self.threat.bounds, x)
        before = state = self._begun(state, x)
        ahead, constant = state.own.descent, state.own.constant
        place = (state.step % self.length).astype(x.dtype)
        gap, _, raw = slope(losses.margin, model, ahead, y)
        excess = jnp.maximum(gap + self.confidence, 0)
        value = jnp.sum(flat((ahead - x) ** 2), axis=-1) + constant * excess
        rise = 2 * (ahead - x) + wide(jnp.where(excess > 0, constant, 0), x) * mended(raw)
        move = ahead - wide(self.rate * jnp.sqrt(1 - place / self.length), x) * rise - x
        move = jnp.sign(move) * jnp.maximum(jnp.abs(move) - self.beta, 0)
        point = jnp.clip(x + move, low, high)
        state, ok = self._seen(state, ask(model, point), x, y, point)
        state = state._replace(
            point=point,
            own=state.own._replace(descent=point + wide(place / (place + 3), x) * (point - state.point)),
            zero_gradient=state.zero_gradient | dead(raw),
        )
        return self._ended(state, before, ok, value)


def ead(
    threat: Threat,
    *,
    steps: int = 1000,
    rounds: int = 9,
    rate: float = 0.01,
    beta: float = 1e-3,
    constant: float = 1e-3,
    confidence: float = 0.0,
    rule: str = "l1",
    abort: bool = True,
    early: bool = False,
    name: str = "ead",
) -> EAD:
    """Return EAD, the elastic-net attack: `c * max(margin + confidence, 0) + ||x' - x||^2 + beta ||x' - x||_1`.

    Args:
      threat: a norm ball `l1`.
      steps: steps of a round; each costs one gradient and one more forward pass.
      rounds: constants that are tried.
      rate: the first step size; it falls as the square root of the steps that are left.
      beta: weight of the sum of changes, and what every change is shrunk by.
      constant: the first constant; ten times more until it breaks the row, then bisection.
      confidence: the margin, in logits, by which a point has to fail.
      rule: which failing point is the best one, `"l1"` (the nearest) or `"en"` (the least elastic net).
      abort: a round without progress over a tenth of its steps ends.
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on counts or settings out of range, or a threat of another norm.

    References:
      Chen et al. 2018, EAD: elastic-net attacks to deep neural networks via adversarial examples, alg. 1,
      arXiv:1709.04114. As in the authors' code changes are shrunk by `beta` whatever the step size. Differs: progress
      is judged for each example.
    """
    check.positive("rate", rate)
    check.not_negative("beta", beta, "The authors take 1e-3.")
    check.choice("rule", rule, ("l1", "en"))
    return EAD.build(
        threat, "l1", name, steps=steps, rounds=rounds, constant=constant, confidence=confidence, stop=early,
        early=early or abort, abort=abort, rate=float(rate), beta=float(beta), rule=rule,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- L-BFGS


class Quasi(NamedTuple):
    """A quasi-Newton descent in a box: the accepted point, the line that is searched, and the memory of curvature."""

    base: Float[Array, "b ..."]
    value: Float[Array, " b"]  # at the base; infinite before the first one
    grad: Float[Array, "b ..."]
    line: Float[Array, "b ..."]
    time: Float[Array, " b"]  # how far along the line the next trial is
    moves: Float[Array, "b m d"]  # the newest last; zeros where there is none yet
    turns: Float[Array, "b m d"]
    target: Int[Array, " b"]


@pytree
class LBFGS(Tradeoff):
    """Box-constrained L-BFGS on the squared distance and the cross-entropy of a target; built by `lbfgs`."""

    def _fresh(self, x, logits, y):
        nothing = jnp.zeros_like(flat(x)[:, 0])
        memory = jnp.zeros((x.shape[0], _MEMORY, flat(x).shape[1]), x.dtype) + nothing[:, None, None]
        return Quasi(
            base=x,
            value=nothing + jnp.inf,
            grad=jnp.zeros_like(x),
            line=jnp.zeros_like(x),
            time=nothing,
            moves=memory,
            turns=memory,
            target=aim(logits, y),
        )

    def _restart(self, descent, x):
        none = jnp.zeros_like(descent.moves)
        return descent._replace(
            base=x,
            value=jnp.full_like(descent.value, jnp.inf),
            grad=jnp.zeros_like(x),
            line=jnp.zeros_like(x),
            time=jnp.zeros_like(descent.time),
            moves=none,
            turns=none,
        )

    def step(self, state: State, model, x, y) -> State:
        """Ask at a trial point; take it and choose a new line where the objective has fallen, else go half as far."""
        low, high = edges(self.threat.bounds, x)
        before = state = self._begun(state, x)
        old, constant = state.own.descent, state.own.constant
        entropy, logits, raw = slope(losses.cross_entropy, model, state.point, old.target)
        state, ok = self._seen(state, logits, x, y)
        value = constant * entropy + jnp.sum(flat((state.point - x) ** 2), axis=-1)
        grad = wide(constant, x) * mended(raw) + 2 * (state.point - x)

        gained = jnp.sum(flat(old.grad * (state.point - old.base)), axis=-1)
        taken = jnp.isinf(old.value) | (value <= old.value + 1e-4 * gained)
        new = _turned(old, state.point, value, grad, low, high)
        descent = select(taken, new, old._replace(time=old.time / 2))
        point = jnp.clip(descent.base + wide(descent.time, x) * descent.line, low, high)
        halt = jnp.max(jnp.abs(flat(point - descent.base)), axis=-1) <= _SHORTEST
        state = state._replace(
            point=point, own=state.own._replace(descent=descent), zero_gradient=state.zero_gradient | dead(raw)
        )
        return self._ended(state, before, ok, descent.value, halt)


def _turned(old: Quasi, point, value, grad, low, high) -> Quasi:
    """Accept a point: remember the curvature on the way to it, and choose the next line inside the box."""
    move, turn = flat(point - old.base), flat(grad - old.grad)
    curved = jnp.isfinite(old.value) & (jnp.sum(move * turn, axis=-1) > 1e-10 * jnp.sum(turn * turn, axis=-1))
    moves, turns = (
        jnp.where(curved[:, None, None], jnp.concatenate([kept[:, 1:], new[:, None]], axis=1), kept)
        for kept, new in ((old.moves, move), (old.turns, turn))
    )
    stuck = ((point <= low) & (grad > 0)) | ((point >= high) & (grad < 0))
    free = flat(jnp.where(stuck, 0, grad))
    line = -jnp.where(flat(stuck), 0, _inverse(free, moves, turns))
    downhill = jnp.sum(line * free, axis=-1) < 0
    line = jnp.where(downhill[:, None], line, -free)
    length = jnp.sqrt(jnp.sum(free * free, axis=-1))
    known = jnp.any(moves[:, -1] != 0, axis=-1) & downhill
    time = jnp.where(known, 1, 1 / jnp.maximum(length, 1))
    return old._replace(
        base=point, value=value, grad=grad, line=line.reshape(point.shape), time=time, moves=moves, turns=turns
    )


def _inverse(grad, moves, turns):
    """Multiply by the inverse Hessian that the memory holds: the two loops, over pairs from new to old and back."""
    inner = jnp.sum(moves * turns, axis=-1)
    share = jnp.where(inner > 0, 1 / jnp.where(inner > 0, inner, 1), 0)
    kept = []
    for i in reversed(range(_MEMORY)):
        alpha = share[:, i] * jnp.sum(moves[:, i] * grad, axis=-1)
        grad = grad - alpha[:, None] * turns[:, i]
        kept.append(alpha)
    newest = jnp.sum(turns[:, -1] ** 2, axis=-1)
    scale = jnp.where(newest > 0, inner[:, -1] / jnp.where(newest > 0, newest, 1), 1)
    grad = grad * scale[:, None]
    for i, alpha in enumerate(reversed(kept)):
        beta = share[:, i] * jnp.sum(turns[:, i] * grad, axis=-1)
        grad = grad + (alpha - beta)[:, None] * moves[:, i]
    return grad


def lbfgs(
    threat: Threat,
    *,
    steps: int = 100,
    rounds: int = 9,
    constant: float = 1e-2,
    confidence: float = 0.0,
    abort: bool = True,
    early: bool = False,
    name: str = "lbfgs",
) -> LBFGS:
    """Return box-constrained L-BFGS: `||x' - x||^2 + c * cross_entropy(x', target)` with a search over `c`.

    Every example has a memory of ten pairs and a line search of its own. Given labels it aims at the likeliest wrong
    class, and any failure counts; given `Targets` it aims at the target.

    Args:
      threat: a norm ball `l2`.
      steps: trial points of a round; each costs one gradient.
      rounds: constants that are tried.
      constant: the first constant; ten times more until it breaks the row, then bisection.
      confidence: the margin, in logits, by which a point has to fail.
      abort: a round ends where it has converged, or has made no progress over a tenth of its steps.
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on counts or settings out of range, or a threat of another norm.

    References:
      Szegedy et al. 2014, Intriguing properties of neural networks, sec. 4.1, arXiv:1312.6199. The constant stands on
      the loss and the distance is squared, as in CleverHans; features at a bound whose gradient pushes outward are left
      out of a line, and lines are bent at the bounds (backtracking by halves, Armijo's condition), where SciPy's
      L-BFGS-B searches for the Cauchy point.
    """
    return LBFGS.build(
        threat, "l2", name, steps=steps, rounds=rounds, constant=constant, confidence=confidence, stop=early,
        early=early or abort, abort=abort,
    )  # fmt: skip
