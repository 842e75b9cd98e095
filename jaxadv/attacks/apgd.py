"""AutoPGD: projected gradient steps whose length halves by itself; cross-entropy, DLR and targeted DLR; linf, l2, l1.

One attack is one state machine. A run of `steps` iterations from a new start is a *round* (a restart, or a target of
`apgd_t`), and a round has one stage, or three with `large_eps`. Which round, stage and checkpoint a row stands at is
looked up from the row's own step counter, so rows that began at different times share one compiled program, and every
step costs exactly one value and gradient of the model (`eot` of them with expectation over transformation).

A randomized model (see `draws`) is given fresh keys at every pass.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxadv import losses
from jaxadv.attacks.draws import Expectation, asked, descend, majority, takes_keys
from jaxadv.attacks.judge import better, dead, held, judge, unfenced
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

NORMS = ("linf", "l2", "l1")


class Plan(NamedTuple):
    """What happens at each place of a round, arrays over its steps; built by `plan`."""

    begin: Any  # this step makes the start of a stage and does not move
    factor: Any  # budget of the stage in units of eps
    check: Any  # after this step the length of the steps is decided
    window: Any  # moves since the last check
    second: Any  # momentum has something to remember
    final: Any  # points of this stage are within the budget


@lru_cache
def plan(norm: str, steps: int, large_eps: bool = False) -> Plan:
    """Lay out a round: stages, their budgets, and the checkpoints of the step size.

    linf, l2: windows of `0.22 steps`, each `0.03 steps` shorter than the one before, at least `0.06 steps`: for 100
    steps checks after 22, 41, 57, 70, 80, 87, 93 and 99 moves. l1: a check every `0.04 steps`.

    Args:
      norm: `"linf"`, `"l2"` or `"l1"`.
      steps: moves of a round.
      large_eps: three stages with 3, 2 and 1 times the budget and 30, 30 and 40 % of the moves.

    Returns:
      The table, one row for each step of the round: a step at the start of each stage and one for each move.
    """
    share = math.ceil(0.3 * steps)
    stages = [(3, share), (2, share), (1, steps - 2 * share)] if large_eps else [(1, steps)]
    rows = []
    for factor, moves in stages:
        window, least, shorter = (max(int(part * moves), 1) for part in (0.22, 0.06, 0.03))
        if norm == "l1":
            window = least = max(int(0.04 * moves), 1)
        since = 0
        rows.append((True, factor, False, window, False, factor == 1))
        for move in range(moves):
            since += 1
            due = since == window
            rows.append((False, factor, due, window, move > 0, factor == 1))
            if due:
                window, since = max(window - shorter, least), 0
    kinds = (bool, np.int32, bool, np.int32, bool, bool)  # int32 whether or not float64 is enabled
    return Plan(*(np.asarray(column, kind) for column, kind in zip(zip(*rows), kinds)))


def largest_where(holds: Callable, top: Float[Array, " b"]) -> Float[Array, " b"]:
    """Return for each row the largest number in `[0, top]` at which a condition holds: exact, without sorting.

    Bisects over the bit patterns of floats, which are ordered like the numbers, so the answer is the very number at
    which the condition turns; subnormal numbers count as zero, as they do in the arithmetic of many devices.

    Args:
      holds: thresholds `[b]` to bool `[b]`; True at 0, and True below wherever it is True.
      top: `[b]`, at least 0.

    Returns:
      `[b]`.
    """
    kind = jnp.int64 if top.dtype.itemsize == 8 else jnp.int32
    high = lax.bitcast_convert_type(top, kind) + 1
    low = high * 0

    def half(_, ends):
        low, high = ends
        middle = low + (high - low) // 2
        ok = holds(lax.bitcast_convert_type(middle, top.dtype)) | (middle <= low)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low, _ = lax.fori_loop(0, 8 * top.dtype.itemsize, half, (low, high))
    found = lax.bitcast_convert_type(low, top.dtype)
    return jnp.where(found < jnp.finfo(top.dtype).tiny, 0, found)


class State(NamedTuple):
    """What the next step needs; every leaf is `[b, ...]`."""

    keys: Any
    step: Int[Array, " b"]
    point: Float[Array, "b ..."]  # where the next move starts
    previous: Float[Array, "b ..."]  # where the last move started
    grad: Float[Array, "b ..."]  # of the loss, at `point`
    best: Float[Array, "b ..."]  # lowest loss of the stage, with its gradient
    best_grad: Float[Array, "b ..."]
    best_loss: Float[Array, " b"]
    last_loss: Float[Array, " b"]
    falls: Int[Array, " b"]  # moves of the window that lowered the loss
    length: Float[Array, " b"]  # of a move
    halved: Bool[Array, " b"]  # at the last check
    checked: Float[Array, " b"]  # lowest loss at the last check
    share: Float[Array, " b"]  # l1: share of the features that a move changes
    support: Float[Array, " b"]  # l1: features changed by the best point at the last check
    found: Float[Array, "b ..."]  # what would be returned now
    score: Float[Array, " b"]
    broken: Bool[Array, " b"]
    order: Int[Array, "b t"]  # targets, by falling clean logit
    nonfinite: Bool[Array, " b"]
    zero_gradient: Bool[Array, " b"]
    infeasible: Bool[Array, " b"]
    memory: Any = ()  # of a kind that chooses its directions in its own way


def _changed(point, x):
    """How many features of each row differ."""
    return jnp.sum(flat(point != x), axis=-1).astype(x.dtype)


def _last(value, verdicts):
    """What the authors' code makes of several passes: loss and verdict of the last one."""
    score, broken, finite = verdicts
    return value[-1], (score.mean(axis=0), broken[-1], jnp.all(finite, axis=0))


@pytree
class APGD(Attack):
    """Projected descent with an adaptive step length and restarts from the best point; built by `apgd` and its kin.

    `threat` is data (new budgets do not recompile); everything else is structure.
    """

    threat: Threat
    name: str = static()
    max_steps: int = static()
    steps: int = static()
    rounds: int = static()
    targets: int = static()
    loss: Callable = static()
    rho: float = static()
    large_eps: bool = static()
    eot: int = static()
    compat: str | None = static()
    stop: bool = static()

    @property
    def early(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a row may be done before `max_steps`: once it is broken, or where there are too few classes."""
        return self.stop or self.targets > 0

    def init(self, keys, model, x, y) -> State:
        """Judge the clean point and, if targeted, order the targets by its logits."""
        if self.targets and (isinstance(y, Targets) or not is_labels(y)):
            raise ValueError(
                f"{self.name} chooses its targets itself, so y must be integer labels; got {type(y).__name__}. "
                "For targets of your own use apgd."
            )
        x = jnp.asarray(x)
        nothing = jnp.zeros_like(flat(x)[:, 0])
        none, zero = nothing > 1, nothing.astype(jnp.int32)
        low, high = edges(self.threat.bounds, x)
        logits = self._logits(model, x, step_keys(keys, zero + self.max_steps))
        score, broken, finite = judge(logits, y, self._criterion(y))
        targets = min(self.targets, logits.shape[-1] - 1)
        order = lax.top_k(logits, targets + 1)[1][:, 1:].astype(jnp.int32)
        return State(
            keys=keys,
            step=zero,
            point=x,
            previous=x,
            grad=jnp.zeros_like(x),
            best=x,
            best_grad=jnp.zeros_like(x),
            best_loss=nothing,
            last_loss=nothing,
            falls=zero,
            length=nothing,
            halved=~none,
            checked=nothing,
            share=nothing,
            support=nothing,
            found=x,
            score=score,
            broken=broken,
            order=order,
            nonfinite=~finite,
            zero_gradient=none,
            infeasible=jnp.any(flat((x < low) | (x > high)), axis=-1),
        )

    def step(self, state: State, model, x, y) -> State:
        """Move (or make the start of a stage), ask the model there once, and at a checkpoint decide the length."""
        whole = plan(self.threat.norm, self.steps, self.large_eps)
        here = state.step % len(whole.begin)
        now = Plan(*(jnp.asarray(column)[here] for column in whole))
        keys = step_keys(state.keys, state.step)
        threat, eps = self._stage(now.factor, x)

        point = self._move(state, threat, now.second, x)
        # Drawn only when some row begins a round. This saves work and decides nothing: other rows discard it.
        start = lax.cond(jnp.any(here == 0), lambda: self._start(keys, threat, eps, x), lambda: x)
        if self.large_eps:
            start = select(here == 0, start, threat.project(state.best, x))
        point = select(now.begin, start, point)
        previous = select(now.begin, point, state.point)

        loss, grad, (score, broken, finite) = self._ask(model, point, self._aim(state, y), y, keys)
        lost = dead(grad)
        grad = held(threat, jnp.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0), point)
        state = self._remember(state, point, score, broken & now.final, now.final)

        lower = now.begin | (loss < state.best_loss)
        best, best_grad, best_loss = select(lower, (point, grad, loss), (state.best, state.best_grad, state.best_loss))
        state = state._replace(
            point=point,
            previous=previous,
            grad=grad,
            best=best,
            best_grad=best_grad,
            best_loss=best_loss,
            last_loss=loss,
            falls=jnp.where(now.begin, 0, state.falls + (loss < state.last_loss)),
            step=state.step + 1,
            nonfinite=state.nonfinite | ~finite,
            zero_gradient=state.zero_gradient | lost,
        )
        return self._begun(self._checked(state, now, eps, x), now, here, eps, x)

    def done(self, state: State) -> Bool[Array, " b"]:
        """A row is done after its rounds (no more than there are targets), or, with `stop`, once it is broken."""
        rounds = self.rounds if not self.targets else self.rounds // self.targets * state.order.shape[1]
        over = state.step >= self.max_steps // self.rounds * rounds
        return over | state.broken if self.stop else over

    def result(self, state: State, model, x, y) -> Result:
        """Ask the model again at what is returned."""
        keys = step_keys(state.keys, state.step * 0 + self.max_steps + 1)
        score, broken, finite = judge(self._logits(model, state.found, keys), y, self._criterion(y))
        flags = {
            "nonfinite": state.nonfinite | ~finite,
            "zero_gradient": state.zero_gradient,
            "infeasible": state.infeasible,
        }
        return Result(
            x=state.found,
            score=score,
            success=broken,
            size=self.threat.size(state.found, x),
            queries=state.step * self.eot + 2,
            grads=state.step * self.eot,
            flags=flags,
        )

    @property
    def _official(self) -> bool:
        return self.compat == "official"

    def _stage(self, factor, x):
        """The threat with the budget of each row's stage, and that budget `[b]`."""
        eps = jnp.broadcast_to(jnp.asarray(self.threat.eps, x.dtype), x.shape[:1])
        if not self.large_eps:
            return self.threat, eps
        eps = eps * factor.astype(x.dtype)
        return dataclasses.replace(self.threat, eps=eps), eps  # pyright: ignore[reportArgumentType]

    def _start(self, keys, threat, eps, x):
        """linf, l2: a random point whose distance is the whole budget, then cut to the box. l1: noise, projected."""
        if self.threat.norm == "linf":
            draw = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype, -1.0, 1.0))(keys)
            draw = draw / wide(jnp.max(flat(jnp.abs(draw)), axis=-1), x)
        else:
            draw = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
            if self.threat.norm == "l1":
                return threat.project(x + draw, x)
            draw = draw / wide(jnp.sqrt(jnp.sum(flat(draw) ** 2, axis=-1)), x)
        return threat.project(x + wide(eps, x) * draw, x)

    def _move(self, state: State, threat, second, x):
        """One step of every row, with momentum in linf and l2, along the largest gradients in l1."""
        length = wide(state.length, x)
        if self.threat.norm == "l1":
            size = flat(jnp.abs(state.grad))
            drop = jnp.clip(jnp.floor((1 - state.share) * size.shape[1]), 0, size.shape[1] - 1)
            keep = size.shape[1] - drop

            def enough(least):
                return jnp.sum(size >= least[:, None], axis=-1) >= keep

            least = largest_where(enough, jnp.max(size, axis=-1))
            sign = -jnp.where(jnp.abs(state.grad) >= wide(least, x), jnp.sign(state.grad), 0)
            count = jnp.sum(flat(jnp.abs(sign)), axis=-1)
            return self._project(threat, state.point + length * sign / wide(jnp.maximum(count, 1), x), x)
        ahead = self._project(threat, state.point + length * self.threat.steepest(-state.grad), x)
        weight = wide(jnp.where(second, 0.75, 1.0).astype(x.dtype), x)
        move = weight * (ahead - state.point) + (1 - weight) * (state.point - state.previous)
        return self._project(threat, state.point + move, x)

    def _project(self, threat, point, x):
        if not self._official or self.threat.norm == "linf":
            return threat.project(point, x)
        low, high = edges(threat.bounds, x)
        want = point - x
        if self.threat.norm == "l1":  # features that return to x do so up to rounding
            return jnp.clip(point + ((threat.project(point, x) - x) - want), low, high)
        size = wide(jnp.sqrt(jnp.sum(flat(want) ** 2, axis=-1)), x)
        eps = wide(jnp.broadcast_to(jnp.asarray(threat.eps, x.dtype), x.shape[:1]), x)
        return jnp.clip(x + want / (size + 1e-12) * jnp.minimum(size, eps), low, high)

    def _checked(self, state: State, now: Plan, eps, x) -> State:
        """At a checkpoint: shorten the steps of rows that oscillate or stand still, and send them to their best."""
        if self.threat.norm == "l1":
            support = _changed(state.best, x)
            back = now.check & (support < 0.95 * state.support)
            length = jnp.where(back, eps, jnp.clip(state.length / 1.5, eps / 10, eps))
            state = state._replace(
                length=jnp.where(now.check, length, state.length),
                share=jnp.where(now.check, support / math.prod(x.shape[1:]) / 1.5, state.share),
                support=jnp.where(now.check, support, state.support),
            )
        else:
            enough = self.rho * now.window
            few = state.falls <= enough if self._official else state.falls < enough
            stuck = ~state.halved & (state.checked <= state.best_loss)
            back = now.check & (few | stuck)
            state = state._replace(
                length=jnp.where(back, state.length / 2, state.length),
                halved=jnp.where(now.check, back, state.halved),
                checked=jnp.where(now.check, state.best_loss, state.checked),
                falls=jnp.where(now.check, 0, state.falls),
            )
        point, grad = select(back, (state.best, state.best_grad), (state.point, state.grad))
        return state._replace(point=point, grad=grad)

    def _begun(self, state: State, now: Plan, here, eps, x) -> State:
        """Set up the rows that have just begun a stage."""
        features = math.prod(x.shape[1:])
        support = _changed(state.point, x) if self.large_eps else jnp.full_like(state.support, features)
        share = support / features / 1.5 if self.large_eps else jnp.full_like(state.share, 0.2)
        first = jnp.zeros_like(state.last_loss) if self._official else state.best_loss
        fresh = {
            "length": eps if self.threat.norm == "l1" else 2 * eps,
            "halved": jnp.ones_like(state.halved),
            "checked": state.best_loss,
            "last_loss": first,
            "share": share,
            "support": support,
        }
        kept = {name: getattr(state, name) for name in fresh}
        return state._replace(**select(now.begin, fresh, kept))

    def _aim(self, state: State, y):
        """What the loss is given: the labels, or the target of the row's round beside them."""
        if not self.targets:
            return y
        rounds = state.step // (self.max_steps // self.rounds)
        which = jnp.minimum(rounds // (self.rounds // self.targets), state.order.shape[1] - 1)
        return Targets(label=y, target=jnp.take_along_axis(state.order, which[:, None], axis=1)[:, 0])

    def _logits(self, model, point, keys):
        logits = asked(model, point, keys)
        check.logits(logits)
        return logits.astype(jnp.promote_types(logits.dtype, point.dtype))

    def _criterion(self, y) -> Callable:
        return losses.margin if is_labels(y) else self.loss

    def _ask(self, model, point, aim, y, keys):
        """Loss, its gradient and the verdict at a point; over several passes means and the verdict of the majority."""
        pool = None
        if self.eot > 1 or takes_keys(model):
            model, pool = Expectation(model, keys, self.eot, "loss"), _last if self._official else majority
        loss, verdict = (lambda z: self.loss(z, aim)), (lambda z: judge(z, y, self._criterion(y)))
        grad, value, judged = descend(model, point, loss, verdict, pool)
        return jnp.where(jnp.isfinite(value), value, jnp.inf), grad, judged

    def _remember(self, state: State, point, score, broken, final) -> State:
        """Keep the better of what was found so far and the current point, by (fails, lowest margin)."""
        taken = final & better(score, broken, state.score, state.broken, self.stop)
        found, score = select(taken, (point, score), (state.found, state.score))
        return state._replace(found=found, score=score, broken=state.broken | broken)


def dlr_or_margin(logits: Float[Array, "b k"], y: Any) -> Float[Array, " b"]:
    """Return the difference of logits ratio, or the margin where there are fewer than the three classes it needs.

    Args:
      logits: `[b, k]`.
      y: int `[b]` labels, or `Targets`.

    Returns:
      `[b]`, what the attacker minimizes.
    """
    return (losses.dlr if logits.shape[-1] >= 3 else losses.margin)(logits, y)


def dlr_targeted_or_margin(logits: Float[Array, "b k"], y: Targets) -> Float[Array, " b"]:
    """Return the targeted difference of logits ratio, or the margin to the target with fewer than four classes.

    Args:
      logits: `[b, k]`.
      y: `Targets`.

    Returns:
      `[b]`, what the attacker minimizes.
    """
    return (losses.dlr_targeted if logits.shape[-1] >= 4 else losses.margin)(logits, y)


def apgd(
    threat: Threat,
    *,
    steps: int = 100,
    loss: Callable = losses.minus_cross_entropy,
    restarts: int = 1,
    targets: int = 0,
    rho: float = 0.75,
    large_eps: bool = False,
    eot: int = 1,
    early: bool = True,
    compat: str | None = None,
    name: str = "apgd",
) -> APGD:
    """Return AutoPGD: momentum steps of length `2 eps` that halve when the loss oscillates or stands still.

    Returned is the first failing point, else the point with the lowest margin that was seen, the clean one included.

    Args:
      threat: a norm ball `linf`, `l2` or `l1`.
      steps: moves of a round; a round costs `steps + 1` gradients (`steps + 3` with `large_eps`).
      loss: what to minimize, `(logits, y) -> [b]`; a module-level function, so that equal attacks share one compiled
        program.
      restarts: rounds from other random starts, for each target if there are any.
      targets: attack this many classes in turn, the likeliest wrong one first, one round each (at most `k - 1`; the
        loss is then given `Targets`). 0 is untargeted.
      rho: share of the moves since the last check that must lower the loss, else the length halves (linf, l2).
      large_eps: begin with three times the budget and shrink to twice and once, each stage from the best point of
        the stage before, projected (made for l1).
      eot: gradients averaged in each step, for randomized models.
      early: stop a row once it is broken and return it as it was found; a wrong clean prediction comes back unchanged.
      compat: `"official"` reproduces the authors' code where it departs from the paper, for parity tests.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on unknown settings, numbers that are not positive, or a threat of another norm.

    References:
      Croce and Hein 2020, Reliable evaluation of adversarial robustness, alg. 1, arXiv:2003.01690; for l1 Croce and
      Hein 2021, Mind the box, arXiv:2103.01208. Differs from the authors' code (`compat="official"` undoes 1 to 5):
      (1) the first check compares the first move with the start, not with zero; (2) a window with exactly a share
      `rho` of successful moves does not halve; (3) l2 projections clip to the box first and then shrink; (4) in l1,
      features that return to their clean value do so exactly, so that they are not counted as changed; (5) over
      several passes, loss and verdict are mean and majority instead of those of the last pass; (6) rows have random
      numbers of their own; (7) rows that hold get back their closest call instead of the clean point; (8) a row stops
      where it breaks (`early`).
    """
    if threat.norm not in NORMS:
        raise ValueError(
            f"threat must be a norm ball linf, l2 or l1 for {name}; got {threat.norm}. "
            "For other threats use pgd; for a union attack each member."
        )
    check.whole("steps", steps, least=3 if large_eps else 1)
    for what, value in (("restarts", restarts), ("eot", eot)):
        check.whole(what, value)
    check.whole("targets", targets, least=0)
    if compat is not None:
        check.choice("compat", compat, ("official",))
        unfenced(threat, f"{name} as it was published")
    rounds = restarts * max(targets, 1)
    return APGD(
        threat=threat,
        name=name,
        max_steps=rounds * len(plan(threat.norm, steps, large_eps).begin),
        steps=steps,
        rounds=rounds,
        targets=targets,
        loss=loss,
        rho=rho,
        large_eps=large_eps,
        eot=eot,
        compat=compat,
        stop=early,
    )


def apgd_ce(threat: Threat, *, name: str = "apgd_ce", **settings: Any) -> APGD:
    """Return AutoPGD on the cross-entropy.

    Args:
      threat: a norm ball `linf`, `l2` or `l1`.
      name: enters the random keys.
      **settings: further settings of `apgd`.

    Returns:
      The attack.

    References:
      Croce and Hein 2020, Reliable evaluation of adversarial robustness, arXiv:2003.01690.
    """
    return apgd(threat, **{"loss": losses.minus_cross_entropy, "name": name} | settings)


def apgd_dlr(threat: Threat, *, name: str = "apgd_dlr", **settings: Any) -> APGD:
    """Return AutoPGD on the difference of logits ratio (the margin, with two classes).

    Args:
      threat: a norm ball `linf`, `l2` or `l1`.
      name: enters the random keys.
      **settings: further settings of `apgd`.

    Returns:
      The attack.

    References:
      Croce and Hein 2020, Reliable evaluation of adversarial robustness, eq. 6, arXiv:2003.01690.
    """
    return apgd(threat, **{"loss": dlr_or_margin, "name": name} | settings)


def apgd_t(threat: Threat, *, targets: int = 9, name: str = "apgd_t", **settings: Any) -> APGD:
    """Return AutoPGD on the targeted difference of logits ratio, one round for each of the likeliest wrong classes.

    Args:
      threat: a norm ball `linf`, `l2` or `l1`.
      targets: number of classes to aim at, in the order of the clean logits; at most `k - 1` are there. With fewer
        than four classes the loss is the margin to the target.
      name: enters the random keys.
      **settings: further settings of `apgd`.

    Returns:
      The attack.

    Raises:
      ValueError: if `targets` is not at least 1.

    References:
      Croce and Hein 2020, Reliable evaluation of adversarial robustness, eq. 7, arXiv:2003.01690.
    """
    check.whole("targets", targets)
    return apgd(threat, **{"loss": dlr_targeted_or_margin, "targets": targets, "name": name} | settings)
