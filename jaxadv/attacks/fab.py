"""Attacks that look for the nearest failing point: FAB and its targeted form, in linf, l2 and l1.

A step linearizes the network at the current point and goes to the nearest point of the linear decision boundary inside
the box; the projections onto a hyperplane within a box are exact, batched, and free of sorting. As in `apgd`, one
attack is one state machine whose rounds (restarts, targets) are looked up from the row's own step counter.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxadv.attacks.apgd import NORMS, largest_where
from jaxadv.attacks.judge import ask, dead, judge, unfenced
from jaxadv.core import (
    Attack,
    Result,
    Targets,
    Threat,
    check,
    edges,
    is_labels,
    pytree,
    select,
    static,
    step_keys,
)
from jaxadv.core.rows import flat, wide

_NEWTON = 24
"""Steps of the search for a piece, at most; three to eight are usual."""


def _length(move, norm: str):
    """The norm of each row, `[b]`."""
    move = jnp.abs(flat(move))
    if norm == "linf":
        return jnp.max(move, axis=-1)
    if norm == "l1":
        return jnp.sum(move, axis=-1)
    top = jnp.max(move, axis=-1)
    scale = jnp.where(top > 0, top, 1)
    return scale * jnp.sqrt(jnp.sum((move / scale[:, None]) ** 2, axis=-1))


def _dual(move, norm: str):
    return _length(move, {"linf": "l1", "l2": "l2", "l1": "linf"}[norm])


def to_hyperplane(
    point: Float[Array, "b ..."],
    normal: Float[Array, "b ..."],
    offset: Float[Array, " b"],
    bounds: tuple[Any, Any],
    norm: str,
) -> Float[Array, "b ..."]:
    """Return the shortest move, in a norm, that reaches a hyperplane without leaving the box.

    The move lowers `normal . u - (normal . point - offset)` to zero. linf and l2: the length of the move solves a
    piecewise linear, concave, increasing equation, by Newton's method from zero (it never overshoots and ends at the
    exact root after finitely many pieces). l1: the features with the largest weights go to their bounds, the last ones
    in part.

    Args:
      point: `[b, ...]`, inside the bounds.
      normal: `[b, ...]`, of any scale; rows of zeros do not move.
      offset: `[b]`, the value `normal . point - c` that is to become zero, of either sign.
      bounds: lowest and highest value of a feature.
      norm: `"linf"`, `"l2"` or `"l1"`.

    Returns:
      `[b, ...]`, the move; where the hyperplane does not meet the box, the move to the corner nearest to it.

    References:
      Croce and Hein 2020, Minimally distorted adversarial examples with a fast adaptive boundary attack, sec. 3.1,
      arXiv:1907.02044. Their code sorts.
    """
    check.choice("norm", norm, NORMS)
    top = jnp.max(jnp.abs(flat(normal)), axis=-1)
    scale = jnp.where(top > 0, top, 1)
    turn = jnp.where(offset < 0, -1, 1) / scale
    low, high = edges(bounds, point)
    slope = normal * wide(turn, point)
    room = flat(jnp.where(slope > 0, point - low, high - point))
    slope, need = flat(slope), jnp.abs(offset) / scale
    weight = jnp.abs(slope)
    room = jnp.where(weight > 0, jnp.maximum(room, 0), 0)
    if norm == "l1":
        move = _heaviest(weight, room, need)
    else:
        move = _nearest(weight, room, need, jnp.ones_like(weight) if norm == "linf" else weight)
    beyond = jnp.sum(weight * room, axis=-1) <= need
    move = jnp.where(beyond[:, None], room, move)
    return (-jnp.sign(slope) * move).reshape(point.shape)


def _nearest(weight, room, need, speed):
    """Move every feature at its speed up to its room, until `weight . move` is what is needed.

    A row stands still from the step on that finds it in the piece of the step before, so its answer does not depend on
    how long others take.
    """

    def newton(state):
        count, time, before, live = state
        free = time[:, None] * speed < room
        gained = jnp.sum(weight * jnp.where(free, time[:, None] * speed, room), axis=-1)
        rate = jnp.sum(jnp.where(free, weight * speed, 0), axis=-1)
        gain = jnp.where(live & (rate > 0), jnp.maximum(need - gained, 0) / jnp.where(rate > 0, rate, 1), 0)
        return count + 1, time + gain, rate, live & (rate != before)

    begin = (0, need * 0, need * 0 - 1, need * 0 < 1)
    time = lax.while_loop(lambda state: (state[0] < _NEWTON) & jnp.any(state[3]), newton, begin)[1]
    return jnp.minimum(time[:, None] * speed, room)


def _heaviest(weight, room, need):
    """Move the features with the largest weights to their room, those at the threshold by the share still needed."""

    def enough(least):
        return jnp.sum(jnp.where(weight >= least[:, None], weight * room, 0), axis=-1) >= need

    least = largest_where(enough, jnp.max(weight, axis=-1))[:, None]
    above = jnp.sum(jnp.where(weight > least, weight * room, 0), axis=-1)
    at = jnp.sum(jnp.where(weight == least, weight * room, 0), axis=-1)
    share = jnp.clip((need - above) / jnp.where(at > 0, at, 1), 0, 1)
    return jnp.where(weight > least, room, jnp.where(weight == least, share[:, None] * room, 0))


class State(NamedTuple):
    """What the next step needs; every leaf is `[b, ...]`."""

    keys: Any
    step: Int[Array, " b"]
    point: Float[Array, "b ..."]
    best: Float[Array, "b ..."]  # nearest failing point; before there is one, the latest point
    distance: Float[Array, " b"]  # of the nearest failing point
    score: Float[Array, " b"]  # of the clean point
    wrong: Bool[Array, " b"]  # the clean point fails
    broken: Bool[Array, " b"]
    order: Int[Array, "b t"]  # targets, by falling clean logit
    nonfinite: Bool[Array, " b"]
    zero_gradient: Bool[Array, " b"]
    infeasible: Bool[Array, " b"]


@pytree
class FAB(Attack):
    """Fast adaptive boundary attack; built by `fab` and `fab_t`. `threat` is data, everything else is structure."""

    threat: Threat
    name: str = static()
    max_steps: int = static()
    rounds: int = static()
    targets: int = static()
    alpha_max: float = static()
    overshoot: float = static()
    backward: float = static()
    stop: bool = static()

    @property
    def start(self) -> str:
        """Where rounds begin: `"zero"` if all do at the clean point, else `"random"` (restarts)."""
        return "zero" if self.rounds == max(self.targets, 1) else "random"

    @property
    def early(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a row may be done before `max_steps`: once it is broken, or where there are too few classes."""
        return self.stop or self.targets > 0

    def init(self, keys, model, x, y) -> State:
        """Judge the clean point and, if targeted, order the targets by its logits."""
        if isinstance(y, Targets) or not is_labels(y):
            raise ValueError(
                f"{self.name} looks for any failure, so y must be integer labels; got {type(y).__name__}. "
                "To reach given classes use apgd."
            )
        x = jnp.asarray(x)
        nothing = jnp.zeros_like(flat(x)[:, 0])
        none = nothing > 1
        low, high = edges(self.threat.bounds, x)
        logits = ask(model, x)
        score, broken, finite = judge(logits, y)
        targets = min(self.targets, logits.shape[-1] - 1)
        return State(
            keys=keys,
            step=nothing.astype(jnp.int32),
            point=x,
            best=x,
            distance=jnp.where(broken, 0, jnp.inf).astype(x.dtype),
            score=score,
            wrong=broken,
            broken=broken,
            order=lax.top_k(logits, targets + 1)[1][:, 1:].astype(jnp.int32),
            nonfinite=~finite,
            zero_gradient=none,
            infeasible=jnp.any(flat((x < low) | (x > high)), axis=-1),
        )

    def step(self, state: State, model, x, y) -> State:
        """Linearize, go to the nearer boundary of the linear model with a pull to the clean point, ask there."""
        norm, (low, high) = self.threat.norm, edges(self.threat.bounds, x)
        point = self._begun(state, x)
        if self.targets:
            gap, normal, lost = self._to_target(state, model, point, y)
        else:
            gap, normal, lost = self._to_nearest(model, point, y)
        normal = jnp.nan_to_num(normal, nan=0.0, posinf=0.0, neginf=0.0)
        gap = jnp.nan_to_num(gap, nan=0.0, posinf=0.0, neginf=0.0)

        clean = gap + jnp.sum(flat(normal * (x - point)), axis=-1)
        both = to_hyperplane(
            jnp.concatenate([point, x]),
            jnp.concatenate([normal, normal]),
            jnp.concatenate([gap, clean]),
            self.threat.bounds,
            norm,
        )
        here, there = jnp.split(both, 2)
        near, far = (jnp.maximum(_length(move, norm), 1e-8) for move in (here, there))
        alpha = wide(jnp.minimum(near / (near + far), self.alpha_max), x)
        point = (1 - alpha) * (point + self.overshoot * here) + alpha * (x + self.overshoot * there)
        point = jnp.clip(point, low, high)

        eps = jnp.broadcast_to(jnp.asarray(self.threat.eps, x.dtype), x.shape[:1])
        within = _length(point - x, norm) <= eps * (1 + 1e-6)
        # Skipped where nobody is within; other rows discard it anyhow.
        inside = lax.cond(jnp.any(within), lambda: self.threat.project(point, x), lambda: point)
        point = select(within, inside, point)
        _, fails, finite = judge(ask(model, point), y)
        distance = _length(point - x, norm)
        nearer = (fails & (distance < state.distance)) | (~fails & jnp.isinf(state.distance))
        return state._replace(
            step=state.step + 1,
            point=select(fails, x + self.backward * (point - x), point),
            best=select(nearer, point, state.best),
            distance=jnp.where(fails, jnp.minimum(distance, state.distance), state.distance),
            broken=state.broken | (fails & within),
            nonfinite=state.nonfinite | ~finite,
            zero_gradient=state.zero_gradient | lost,
        )

    def done(self, state: State) -> Bool[Array, " b"]:
        """A row is done after its rounds (no more than there are targets), or, with `stop`, once it is broken."""
        rounds = self.rounds if not self.targets else self.rounds // self.targets * state.order.shape[1]
        over = state.step >= self.max_steps // self.rounds * rounds
        return over | state.broken if self.stop else over

    def result(self, state: State, model, x, y) -> Result:
        """Project the nearest failing point into the budget and ask the model there; else return the better point."""
        point = select(state.wrong, x, self.threat.project(state.best, x))
        logits = ask(model, point)
        score, fails, finite = judge(logits, y)
        passes = 1 if self.targets else logits.shape[-1] - 1  # backward passes of a step
        better = fails | (score < state.score)
        return Result(
            x=select(better, point, x),
            score=jnp.where(better, score, state.score),
            success=fails,
            size=self.threat.size(select(better, point, x), x),
            queries=2 * state.step + 2,
            grads=state.step * passes,
            flags={
                "nonfinite": state.nonfinite | ~finite,
                "zero_gradient": state.zero_gradient,
                "infeasible": state.infeasible,
            },
        )

    def _begun(self, state: State, x):
        """Rounds begin at the clean point; restarts half the smaller of budget and nearest distance away from it."""
        length = self.max_steps // self.rounds
        begin = state.step % length == 0
        if self.start == "zero":
            return select(begin, x, state.point)
        again = begin & (state.step // length % (self.rounds // max(self.targets, 1)) > 0)

        def drawn():
            keys = step_keys(state.keys, state.step)
            if self.threat.norm == "linf":
                draw = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype, -1.0, 1.0))(keys)
            else:
                draw = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
            eps = jnp.broadcast_to(jnp.asarray(self.threat.eps, x.dtype), x.shape[:1])
            radius = jnp.minimum(eps, state.distance) / 2 / _length(draw, self.threat.norm)
            low, high = edges(self.threat.bounds, x)
            return jnp.clip(x + wide(radius, x) * draw, low, high)

        # Drawn only when some row begins a restart. This saves work and decides nothing: other rows discard it.
        start = select(again, lax.cond(jnp.any(again), drawn, lambda: x), x)
        return select(begin, start, state.point)

    def _to_target(self, state: State, model, point, y):
        """Gap and normal of the boundary between the label and the target of the row's round."""
        rounds = state.step // (self.max_steps // self.rounds)
        which = jnp.minimum(rounds // (self.rounds // self.targets), state.order.shape[1] - 1)
        target = jnp.take_along_axis(state.order, which[:, None], axis=1)

        def total(point):
            logits = ask(model, point)
            gap = (jnp.take_along_axis(logits, target, axis=1) - jnp.take_along_axis(logits, y[:, None], axis=1))[:, 0]
            return jnp.sum(gap), gap

        normal, gap = jax.grad(total, has_aux=True)(point)
        return gap, normal, dead(normal)

    def _to_nearest(self, model, point, y):
        """Gap and normal of the boundary that is nearest in the linearization, over all wrong classes in turn."""
        logits, pull = jax.vjp(lambda p: ask(model, p), point)
        classes = logits.shape[-1]
        label = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]

        def one(carry, number):
            nearest, gap, normal, lost = carry
            other = number + (number >= y)  # [b]; skips the label
            weights = jax.nn.one_hot(other, classes, dtype=logits.dtype)
            new = jnp.sum(jnp.where(weights > 0, logits, 0), axis=-1) - label
            (grad,) = pull(weights - jax.nn.one_hot(y, classes, dtype=logits.dtype))
            away = jnp.abs(new) / (_dual(grad, self.threat.norm) + 1e-12)
            first = away < nearest
            kept = select(first, (new, grad), (gap, normal))
            return (jnp.where(first, away, nearest), *kept, lost & dead(grad)), None

        none = jnp.zeros_like(label)
        begin = (none + jnp.inf, none, jnp.zeros_like(point), none < 1)
        (_, gap, normal, lost), _ = lax.scan(one, begin, jnp.arange(classes - 1))
        return gap, normal, lost


def _built(threat: Threat, targets: int, steps: int, restarts: int, settings: dict[str, Any], name: str) -> FAB:
    if threat.norm not in NORMS:
        raise ValueError(
            f"threat must be a norm ball linf, l2 or l1 for {name}; got {threat.norm}. "
            "For other threats use pgd; for a union attack each member."
        )
    unfenced(threat, name)
    check.whole("steps", steps)
    check.whole("restarts", restarts)
    rounds = restarts * max(targets, 1)
    return FAB(threat=threat, name=name, max_steps=rounds * steps, rounds=rounds, targets=targets, **settings)


def fab(
    threat: Threat,
    *,
    steps: int = 100,
    restarts: int = 1,
    alpha_max: float = 0.1,
    overshoot: float = 1.05,
    backward: float = 0.9,
    early: bool = True,
    name: str = "fab",
) -> FAB:
    """Return FAB: steps to the nearest boundary of the linearized network, pulled toward the clean point.

    A step costs one forward pass with a backward pass for each wrong class, and one more forward pass. To measure
    distances rather than to break a budget, pass a threat with a large one and `early=False`: the size of the result is
    then the smallest that was found.

    Args:
      threat: a norm ball `linf`, `l2` or `l1`.
      steps: steps of a round.
      restarts: rounds; the first begins at the clean point, others at random points near it.
      alpha_max: largest weight of the pull toward the clean point, in [0, 1].
      overshoot: how far beyond the linear boundary to go, 1 is onto it.
      backward: share of the way that is kept after a failing point was found, in (0, 1).
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on counts that are not positive, or a threat of another norm.

    References:
      Croce and Hein 2020, Minimally distorted adversarial examples with a fast adaptive boundary attack, alg. 1,
      arXiv:1907.02044. Differs from the authors' code: projections are solved without sorting and at any scale of the
      gradient; restarts begin within the smaller of budget and nearest distance, as the paper has it (the code takes
      the budget); rows have random numbers of their own; rows without a failing point within the budget get back the
      nearest failing point projected into it, where its margin is lower than the clean one; a row stops where it
      breaks (`early`). As in the code, there is no final search on the segment.
    """
    settings = {"alpha_max": alpha_max, "overshoot": overshoot, "backward": backward, "stop": early}
    return _built(threat, 0, steps, restarts, settings, name)


def fab_t(
    threat: Threat,
    *,
    targets: int = 9,
    steps: int = 100,
    restarts: int = 1,
    alpha_max: float = 0.1,
    overshoot: float = 1.05,
    backward: float = 0.9,
    early: bool = True,
    name: str = "fab_t",
) -> FAB:
    """Return targeted FAB: a round toward the boundary to each of the likeliest wrong classes.

    A step costs one gradient and one more forward pass, whatever the number of classes.

    Args:
      threat: a norm ball `linf`, `l2` or `l1`.
      targets: number of classes to go to, in the order of the clean logits; at most `k - 1` are there.
      steps: steps of a round.
      restarts: rounds for each target.
      alpha_max: largest weight of the pull toward the clean point, in [0, 1].
      overshoot: how far beyond the linear boundary to go, 1 is onto it.
      backward: share of the way that is kept after a failing point was found, in (0, 1).
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on counts that are not positive, or a threat of another norm.

    References:
      Croce and Hein 2020, Reliable evaluation of adversarial robustness, sec. 5, arXiv:2003.01690; see `fab`.
    """
    check.whole("targets", targets)
    settings = {"alpha_max": alpha_max, "overshoot": overshoot, "backward": backward, "stop": early}
    return _built(threat, targets, steps, restarts, settings, name)
