"""Attacks that look for the nearest failing point: DeepFool, DDN, FMN and NewtonFool, and what all such attacks share.

A step asks at the current point, remembers it where it is the nearest failing one so far, and moves on. The budget of
the threat does not enter the search: it decides, in the end, whether the nearest point counts as a success, and where
it does not, what is returned is that point projected into the budget. To measure distances, pass a threat with a
large budget. `within` and `nearest` convert between distances and budgets.

Elsewhere: `fab` (its own file), `tradeoff` (Carlini-Wagner and its kin), `sparse` (few features).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxadv import losses
from jaxadv.attacks.judge import Stepped, ask, dead, held, judge, unfenced
from jaxadv.core import Attack, Result, Targets, Threat, check, edges, is_labels, pytree, select, static, step_keys
from jaxadv.core.rows import flat, wide
from jaxadv.threats import l2

_TINY = 1e-12


class State(NamedTuple):
    """What the next step needs; every leaf is `[b, ...]`."""

    keys: Any
    step: Int[Array, " b"]  # place in the schedule
    spent: Int[Array, " b"]  # steps taken; fewer where a row has skipped some
    point: Float[Array, "b ..."]
    best: Float[Array, "b ..."]  # nearest failing point; before there is one, the latest point
    distance: Float[Array, " b"]  # of the nearest failing point
    score: Float[Array, " b"]  # of the clean point
    wrong: Bool[Array, " b"]  # the clean point fails
    broken: Bool[Array, " b"]  # a failing point within the budget is known
    nonfinite: Bool[Array, " b"]
    zero_gradient: Bool[Array, " b"]
    infeasible: Bool[Array, " b"]
    own: Any  # what this method alone remembers


_S = TypeVar("_S", bound="MinimumNorm")


@pytree
class MinimumNorm(Stepped):
    """What attacks share that look for the nearest failing point; a kind of step is added by a subclass.

    A subclass gives `step`, and where it needs them `_own` (its part of the first state), `_far` (what is to be small,
    by default the size in the norm of the threat), `_passes` (cost of a step) and `_found` (what `early` waits for).
    """

    threat: Threat
    name: str = static()
    max_steps: int = static()
    early: bool = static()

    start = "zero"
    targeted = True
    confidence = 0.0  # the margin by which a point has to fail
    strict = False  # whether logits that are not finite hold, on the way

    def init(self, keys, model, x, y) -> State:
        """Judge the clean point, from which the search begins."""
        if not is_labels(y) or (isinstance(y, Targets) and not self.targeted):
            kinds = "integer labels or Targets" if self.targeted else "integer labels (the attack aims at no class)"
            raise ValueError(
                f"y must be {kinds} for {self.name}; got {type(y).__name__}. To reach given classes use fmn."
            )
        x = jnp.asarray(x)
        nothing = jnp.zeros_like(flat(x)[:, 0])
        none = nothing > 1
        low, high = edges(self.threat.bounds, x)
        logits = ask(model, x)
        score, wrong, finite = judge(logits, y)
        return State(
            keys=keys,
            step=nothing.astype(jnp.int32),
            spent=nothing.astype(jnp.int32),
            point=x,
            best=x,
            distance=jnp.where(wrong, 0, jnp.inf).astype(x.dtype),
            score=score,
            wrong=wrong,
            broken=wrong,
            nonfinite=~finite,
            zero_gradient=none,
            infeasible=jnp.any(flat((x < low) | (x > high)), axis=-1),
            own=self._own(logits, x, y),
        )

    def result(self, state: State, model, x, y) -> Result:
        """Judge the last point, project the nearest failing one into the budget and ask there; else keep the better."""
        state, _ = self._seen(state, ask(model, state.point), x, y)
        return self._answer(state, model, x, y, 3)

    def _answer(self, state: State, model, x, y, beside: int) -> Result:
        """The answer from what is remembered; `beside` forward passes were not those of steps."""
        point = select(state.wrong, x, self.threat.project(state.best, x))
        score, fails, finite = judge(ask(model, point), y)
        better = fails | (score < state.score)
        point = select(better, point, x)
        forward, backward = self._passes(state)
        return Result(
            x=point,
            score=jnp.where(better, score, state.score),
            success=fails,
            size=self.threat.size(point, x),
            queries=forward * state.spent + beside,
            grads=backward * state.spent,
            flags={
                "nonfinite": state.nonfinite | ~finite,
                "zero_gradient": state.zero_gradient,
                "infeasible": state.infeasible,
            },
        )

    def _own(self, logits, x, y) -> Any:
        return ()

    def _passes(self, state: State) -> tuple[int, int]:
        """Forward and backward passes of a step."""
        return 1, 1

    def _far(self, point, x) -> Any:
        return self.threat.size(point, x)

    def _seen(self, state: State, logits, x, y, point=None) -> tuple[State, Any]:
        """Remember a point that was asked at, by default the current one; tell which rows fail there."""
        point = state.point if point is None else point
        score, fails, finite = judge(logits, y)
        fails = fails & (score <= -self.confidence) & (finite | (not self.strict))
        distance = self._far(point, x)
        nearer = (fails & (distance < state.distance)) | (~fails & jnp.isinf(state.distance))
        inside = self.threat.size(point, x) <= jnp.broadcast_to(jnp.asarray(self.threat.eps, x.dtype), x.shape[:1])
        seen = state._replace(
            best=select(nearer, point, state.best),
            distance=jnp.where(fails, jnp.minimum(distance, state.distance), state.distance),
            broken=state.broken | (fails & inside),
            nonfinite=state.nonfinite | ~finite,
        )
        return seen, fails

    def _look(self, state: State, model, x, y, loss: Callable) -> tuple[State, Any, Any, Any]:
        """Ask at the current point and remember it; return the state, who fails, the loss and its gradient."""
        value, logits, grad = slope(loss, model, state.point, y)
        seen, fails = self._seen(state, logits, x, y)
        seen = seen._replace(zero_gradient=seen.zero_gradient | dead(grad), step=state.step + 1, spent=state.spent + 1)
        return seen, fails, value, held(self.threat, mended(grad), state.point)


def slope(loss: Callable, model, point, y):
    """Return a loss at a point, the logits, and the gradient with respect to the point.

    Args:
      loss: `(logits, y) -> [b]`.
      model: logits from a batch.
      point: `[b, ...]`.
      y: what the loss takes.

    Returns:
      `(value [b], logits [b, k], gradient [b, ...])`.
    """

    def total(point):
        logits = ask(model, point)
        value = loss(logits, y)
        return jnp.sum(value), (value, logits)

    grad, (value, logits) = jax.grad(total, has_aux=True)(point)
    return value, logits, grad


def mended(grad: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Return a gradient with zeros where it is not finite.

    Args:
      grad: `[b, ...]`.

    Returns:
      `[b, ...]`.
    """
    return jnp.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)


def cosine(step: Int[Array, " b"], steps: int, first: float, last: float) -> Float[Array, " b"]:
    """Return a value that falls along half a cosine.

    Args:
      step: `[b]`, from 0.
      steps: after so many it would be `last`.
      first: value at step 0.
      last: value at the end.

    Returns:
      `[b]`.
    """
    return last + (first - last) * (1 + jnp.cos(math.pi * step / steps)) / 2


def ball(threat: Threat, norms: tuple[str, ...], name: str, *, fences: bool = False) -> None:
    """Check that an attack takes a threat.

    Args:
      threat: the threat.
      norms: the norms that the attack works in.
      name: of the attack.
      fences: whether it works with limits of single features, too (`threats.masked` and its kin).

    Raises:
      ValueError: if the threat is no ball of one of these norms, or has fences that the attack does not know.
    """
    if not fences:
        unfenced(threat, name)
    if threat.norm not in norms:
        raise ValueError(
            f"threat must be a norm ball {' or '.join(norms)} for {name}; got {threat.norm}. "
            "Every norm is served by fmn, a union member by member."
        )


def falling(name: str, pair: tuple[float, float]) -> None:
    """Check a first and a last value of what falls along a cosine.

    Args:
      name: of the setting.
      pair: its values.

    Raises:
      ValueError: if it is no falling pair of positive numbers.
    """
    if len(pair) != 2 or not pair[0] >= pair[1] > 0:
        raise ValueError(f"{name} must be a falling pair of positive numbers; got {pair}. Swap them?")


def rivals(logits: Float[Array, "b k"], y: Int[Array, " b"], count: int) -> Int[Array, "b c"]:
    """Return the likeliest wrong classes, by falling logit.

    Args:
      logits: `[b, k]`.
      y: int `[b]`.
      count: at most so many; there are `k - 1`.

    Returns:
      int32 `[b, min(count, k - 1)]`.
    """
    others = jnp.where(jax.nn.one_hot(y, logits.shape[-1]) > 0, -jnp.inf, logits)
    return lax.top_k(others, min(count, logits.shape[-1] - 1))[1].astype(jnp.int32)


def aim(logits: Float[Array, "b k"], y: Any) -> Int[Array, " b"]:
    """Return the class to reach.

    Args:
      logits: `[b, k]` of the clean point.
      y: int `[b]`, or `Targets`.

    Returns:
      int32 `[b]`: the target, or the likeliest wrong class.
    """
    return y.target.astype(jnp.int32) if isinstance(y, Targets) else rivals(logits, y, 1)[:, 0]


# ------------------------------------------------------------------------------------------------------------ DeepFool


def nearest_boundary(model, point, y, order, steepest: Callable):
    """Linearize the network and return the nearest of its boundaries.

    Args:
      model: logits from a batch.
      point: `[b, ...]`.
      y: int `[b]`, the class that the point is on the side of.
      order: int `[b, c]`, the classes on the other side.
      steepest: the unit direction along which a linear function rises the most, `Threat.steepest`.

    Returns:
      `(logits [b, k], away [b], normal [b, ...], lost [b])`: the distance to the nearest boundary in the
      linearization, its normal toward the other class, and whether no boundary has a gradient.
    """
    logits, pull = jax.vjp(lambda p: ask(model, p), point)
    label = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]

    def one(carry, other):
        nearest, normal, lost = carry
        weights = jax.nn.one_hot(other, logits.shape[-1], dtype=logits.dtype)
        gap = label - jnp.sum(jnp.where(weights > 0, logits, 0), axis=-1)
        (raw,) = pull(weights - jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype))
        grad = mended(raw)
        dual = jnp.sum(flat(grad * steepest(grad)), axis=-1)
        away = jnp.where(dual > 0, jnp.abs(gap) / jnp.where(dual > 0, dual, 1), jnp.inf)
        first = away < nearest
        return (jnp.where(first, away, nearest), select(first, grad, normal), lost & dead(raw)), None

    none = jnp.zeros_like(label)
    (away, normal, lost), _ = lax.scan(one, (none + jnp.inf, jnp.zeros_like(point), none < 1), order.T)
    return logits, away, normal, lost


@pytree
class DeepFool(MinimumNorm):
    """Steps onto the nearest boundary of the linearized network; built by `deepfool`."""

    candidates: int = static()
    overshoot: float = static()

    targeted = False

    class Own(NamedTuple):
        """Sum of the steps, and the classes that are tried, by falling clean logit."""

        total: Float[Array, "b ..."]
        order: Int[Array, "b c"]

    def _own(self, logits, x, y):
        return self.Own(total=jnp.zeros_like(x), order=rivals(logits, y, self.candidates - 1))

    def _passes(self, state: State) -> tuple[int, int]:
        return 1, state.own.order.shape[1]

    def step(self, state: State, model, x, y) -> State:
        """Ask; where the point holds, add the step onto the nearest boundary and go a little farther than the sum."""
        low, high = edges(self.threat.bounds, x)
        logits, away, normal, lost = nearest_boundary(model, state.point, y, state.own.order, self.threat.steepest)
        state, _ = self._seen(state, logits, x, y)
        away = jnp.where(jnp.isfinite(away), away, 0)
        total = state.own.total + wide(away + 1e-4, x) * self.threat.steepest(normal)
        point = jnp.clip(x + (1 + self.overshoot) * total, low, high)
        arrived = jnp.isfinite(state.distance)
        return state._replace(
            step=state.step + 1,
            spent=state.spent + 1,
            point=select(arrived, state.point, point),
            own=state.own._replace(total=select(arrived, state.own.total, total)),
            zero_gradient=state.zero_gradient | lost,
        )

    def _found(self, state: State) -> Bool[Array, " b"]:
        return jnp.isfinite(state.distance)  # a boundary is crossed


def deepfool(
    threat: Threat,
    *,
    steps: int = 50,
    candidates: int = 10,
    overshoot: float = 0.02,
    early: bool = True,
    name: str = "deepfool",
) -> DeepFool:
    """Return DeepFool: step onto the nearest boundary of the linearized network until one is crossed.

    A step costs one forward pass and a backward pass for each class that is tried.

    Args:
      threat: a norm ball `l2` or `linf`.
      steps: at most so many.
      candidates: how many of the likeliest classes are tried, the label among them.
      overshoot: by which share to go beyond the sum of the steps.
      early: stop a row where it has crossed; False lets every row take all steps, at the same cost, and changes no
        answer.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on counts that are too small, a negative overshoot, or a threat of another norm.

    References:
      Moosavi-Dezfooli et al. 2016, DeepFool: a simple and accurate method to fool deep neural networks, alg. 2 and
      sec. 3.3 (linf), arXiv:1511.04599. As in the authors' code 1e-4 is added to each step, and each point is tried at
      the overshoot (the paper multiplies once, in the end). Differs: points are clipped to the bounds.
    """
    ball(threat, ("l2", "linf"), name)
    check.whole("steps", steps)
    check.whole("candidates", candidates, least=2)
    check.not_negative("overshoot", overshoot, "The authors take 0.02.")
    return DeepFool(
        threat=threat, name=name, max_steps=steps, early=early, candidates=candidates, overshoot=float(overshoot)
    )


# ----------------------------------------------------------------------------------------------------------------- DDN


def _farthest(threat: Threat, x) -> Any:
    """The largest size of any move within the bounds, `[b]`."""
    low, high = edges(threat.bounds, x)
    return threat.size(jnp.where(x - low > high - x, low, high), x)


@pytree
class DDN(MinimumNorm):
    """Gradient steps on a sphere whose radius shrinks where the point fails and grows where not; built by `ddn`."""

    radius: float = static()
    gamma: float = static()

    def _own(self, logits, x, y):
        return jnp.full_like(flat(x)[:, 0], self.radius)

    def step(self, state: State, model, x, y) -> State:
        """Step along the gradient, then scale the whole move to the radius that follows from the verdict."""
        low, high = edges(self.threat.bounds, x)
        rate = cosine(state.step, self.max_steps, 1.0, 0.01)
        keys = step_keys(state.keys, state.step)
        state, fails, _, grad = self._look(state, model, x, y, losses.minus_cross_entropy)
        lost = dead(grad)

        def drawn():
            return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)

        # Drawn only when some row has no gradient. This saves work and decides nothing: other rows discard it.
        grad = select(lost, lax.cond(jnp.any(lost), drawn, lambda: grad), grad)
        move = state.point - x - wide(rate.astype(x.dtype), x) * self.threat.steepest(grad)
        radius = jnp.minimum(state.own * jnp.where(fails, 1 - self.gamma, 1 + self.gamma), _farthest(self.threat, x))
        length = self.threat.size(move, jnp.zeros_like(move))
        move = move * wide(radius / jnp.maximum(length, _TINY), x)
        return state._replace(point=jnp.clip(x + move, low, high), own=radius)


def ddn(
    threat: Threat,
    *,
    steps: int = 100,
    radius: float = 1.0,
    gamma: float = 0.05,
    early: bool = False,
    name: str = "ddn",
) -> DDN:
    """Return DDN, the decoupled direction and norm attack: gradient steps on a sphere of changing radius.

    A step costs one gradient. A row without any gradient takes a random direction.

    Args:
      threat: a norm ball `l2`.
      steps: number of steps; the step size falls from 1 to 0.01 along a cosine.
      radius: the first radius, in the units of `x`.
      gamma: by which share the radius shrinks where the point fails, and grows where it does not, in (0, 1).
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on counts or settings out of range, or a threat of another norm.

    References:
      Rony et al. 2019, Decoupling direction and norm for efficient gradient-based l2 adversarial attacks and defenses,
      alg. 1, arXiv:1811.09600. Differs from the authors' code: points are not rounded to 256 levels; the last point is
      a candidate, too.
    """
    ball(threat, ("l2",), name)
    check.whole("steps", steps)
    check.positive("radius", radius)
    check.fraction("gamma", gamma)
    return DDN(threat=threat, name=name, max_steps=steps, early=early, radius=float(radius), gamma=float(gamma))


# ----------------------------------------------------------------------------------------------------------------- FMN


@pytree
class FMN(MinimumNorm):
    """Gradient steps projected onto a ball whose radius follows the distance to the boundary; built by `fmn`."""

    rates: tuple[float, float] = static()
    gammas: tuple[float, float] = static()

    def _own(self, logits, x, y):
        return jnp.ones_like(flat(x)[:, 0])  # the radius; only l0 reads the first one

    def step(self, state: State, model, x, y) -> State:
        """Adapt the radius to the verdict, step along the gradient, project onto the ball."""
        rate = cosine(state.step, self.max_steps, *self.rates)
        gamma = cosine(state.step, self.max_steps, *self.gammas)
        state, fails, gap, grad = self._look(state, model, x, y, losses.margin)
        radius = (
            self._l0_radius(state, fails, gamma)
            if self.threat.norm == "l0"
            else self._radius(state, fails, gap, grad, gamma, x)
        )
        radius = jnp.minimum(radius.astype(x.dtype), _farthest(self.threat, x))
        around: Any = dataclasses.replace(self.threat, eps=radius)  # pyright: ignore[reportArgumentType]
        move = wide(rate.astype(x.dtype), x) * l2(1.0).steepest(grad)
        point = around.project(state.point - move, x)
        if self.threat.norm in ("l2", "l1"):
            short = radius / jnp.maximum(self.threat.size(point, x), _TINY)
            stretch = jnp.where(jnp.isfinite(state.distance), 1, jnp.maximum(short, 1))
            point = jnp.clip(x + wide(stretch, x) * (point - x), *edges(self.threat.bounds, x))
        return state._replace(point=point, own=radius)

    def _radius(self, state: State, fails, gap, grad, gamma, x) -> Any:
        dual = jnp.sum(flat(grad * self.threat.steepest(grad)), axis=-1)
        away = self.threat.size(state.point, x) + jnp.abs(jnp.where(jnp.isfinite(gap), gap, 0)) / jnp.maximum(
            dual, _TINY
        )
        near = jnp.minimum(state.own * (1 - gamma), state.distance)
        return jnp.where(fails, near, jnp.where(jnp.isfinite(state.distance), state.own, away) * (1 + gamma))

    def _l0_radius(self, state: State, fails, gamma):
        less = jnp.minimum(jnp.minimum(state.own - 1, jnp.floor(state.own * (1 - gamma))), state.distance)
        more = jnp.maximum(state.own + 1, jnp.floor(state.own * (1 + gamma)))
        return jnp.maximum(jnp.where(fails, less, more), 0)


def fmn(
    threat: Threat,
    *,
    steps: int = 100,
    rates: tuple[float, float] = (1.0, 0.01),
    gammas: tuple[float, float] = (0.05, 0.001),
    early: bool = False,
    name: str = "fmn",
) -> FMN:
    """Return FMN, the fast minimum-norm attack, in every norm.

    The radius is the distance to the linearized boundary until a failing point is found; then it shrinks where the
    point fails and grows where it does not. A step costs one gradient.

    Args:
      threat: a norm ball `linf`, `l2`, `l1` or `l0`.
      steps: number of steps.
      rates: first and last Euclidean length of a step, along a cosine.
      gammas: first and last share by which the radius changes, along a cosine.
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on counts or settings out of range, or a threat of another norm.

    References:
      Pintor et al. 2021, Fast minimum-norm adversarial attacks through adaptive norm constraints, alg. 1,
      arXiv:2102.12827. Differs from the authors' code: until a failing point is found the radius is a share `gamma`
      beyond the linearized boundary (theirs is on it, and on a nearly linear network never crosses), and in l2 and l1 a
      move that falls short of it is stretched to it (steps alone stall where gradients are small); projections respect
      the bounds (l1, l0); no start from a given failing point; the last point is a candidate, too.
    """
    ball(threat, ("linf", "l2", "l1", "l0"), name, fences=True)
    check.whole("steps", steps)
    falling("rates", rates)
    falling("gammas", gammas)
    return FMN(threat=threat, name=name, max_steps=steps, early=early, rates=(*rates,), gammas=(*gammas,))


# ---------------------------------------------------------------------------------------------------------- NewtonFool


def _probability(logits, y):
    return jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), y[:, None], axis=-1)[:, 0]


@pytree
class NewtonFool(MinimumNorm):
    """Newton steps that bring the probability of the label down to chance; built by `newtonfool`."""

    eta: float = static()

    targeted = False

    def _own(self, logits, x, y):
        return jnp.full_like(logits[:, 0], 1 / logits.shape[-1])  # chance

    def step(self, state: State, model, x, y) -> State:
        """Where the point holds, step along the gradient of the label's probability, no farther than to chance."""
        low, high = edges(self.threat.bounds, x)
        state, fails, value, grad = self._look(state, model, x, y, _probability)
        nothing = jnp.zeros_like(x)
        length, reach = self.threat.size(grad, nothing), self.eta * self.threat.size(x, nothing)
        chance = (value - state.own) / jnp.where(length > 0, length, 1)
        far = jnp.where(fails | ~jnp.isfinite(value), 0, jnp.clip(chance, 0, reach))
        point = jnp.clip(state.point - wide(far, x) * self.threat.steepest(grad), low, high)
        return state._replace(point=point)

    def _found(self, state: State) -> Bool[Array, " b"]:
        return jnp.isfinite(state.distance)


def newtonfool(
    threat: Threat, *, steps: int = 100, eta: float = 0.01, early: bool = True, name: str = "newtonfool"
) -> NewtonFool:
    """Return NewtonFool: Newton steps on the probability of the label, each at most a share of the input's norm.

    Args:
      threat: a norm ball `l2`.
      steps: number of steps; each costs one gradient.
      eta: longest step as a share of the Euclidean norm of the example.
      early: stop a row at its first failing point; False lets every row take all steps and changes no answer.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on settings that are not positive, or a threat of another norm.

    References:
      Jang et al. 2017, Objective metrics and gradient descent algorithms for adversarial examples in machine learning,
      alg. 1, doi:10.1145/3134600.3134635. Differs from the paper: a row stops where it fails and points are clipped to
      the bounds; from Foolbox: norms, not their squares, bound the step, as the paper has it.
    """
    ball(threat, ("l2",), name)
    check.whole("steps", steps)
    check.positive("eta", eta)
    return NewtonFool(threat=threat, name=name, max_steps=steps, early=early, eta=float(eta))


# --------------------------------------------------------------------------------------------------------- conversions


def within(threat: Threat, found: Result) -> Bool[Array, " b"]:
    """Tell which rows a budget breaks, from the distances that a minimum-norm attack has found.

    Args:
      threat: a threat of the norm that the distances were measured in.
      found: the result of a search with a large budget.

    Returns:
      bool `[b]`.
    """
    return found.success & (found.size <= threat.budget(found.x))


def nearest(
    build: Callable[[Threat], Attack], threat: Threat, key, model, x, y, *, rounds: int = 10, index=None
) -> Result:
    """Make an attack with a budget into one that looks for the nearest failing point, by bisection on the budget.

    Args:
      build: the attack as a function of a threat, e.g. `attacks.pgd`.
      threat: a norm ball; its budget is the largest one tried.
      key: a typed key.
      model: logits from a batch.
      x: `[b, ...]` examples.
      y: labels, `Targets`, or what else the attack's loss takes.
      rounds: how often the interval is halved, each row's by its own verdicts.
      index: int `[b]` dataset indices; defaults to `arange(b)`.

    Returns:
      The nearest failing point found; rows that hold in the whole budget get the answer of the attack there. Queries
      and gradients are summed, flags joined.

    Raises:
      ValueError: if `rounds` is not at least 1.
    """
    check.whole("rounds", rounds)
    x = jnp.asarray(x)
    eps = jnp.broadcast_to(jnp.asarray(threat.eps, jnp.promote_types(x.dtype, jnp.float32)), x.shape[:1])

    def tried(eps):
        around: Any = dataclasses.replace(threat, eps=eps)  # pyright: ignore[reportArgumentType]
        return build(around).run(key, model, x, y, index=index)

    def halved(_, carry):
        low, high, best = carry
        middle = (low + high) / 2
        found = tried(middle)
        nearer = found.success & (found.size < best.size)
        kept: Result = select(nearer, found, best)
        kept = kept._replace(
            queries=best.queries + found.queries,
            grads=best.grads + found.grads,
            flags={name: best.flags[name] | found.flags[name] for name in best.flags},
        )
        high = jnp.where(found.success, jnp.minimum(middle, found.size), high)
        return jnp.where(found.success, low, middle), high, kept

    first = tried(eps)
    return lax.fori_loop(0, rounds, halved, (eps * 0, jnp.where(first.success, first.size, eps), first))[2]
