"""One engine for attacks that follow the gradient: FGSM, R+FGSM, BIM, PGD and MI-FGSM are wirings of it.

A step: the gradient of the loss at the current point, through an optax transformation (momentum, normalization, Adam;
`vmap`-ped, so that rows share nothing), to the steepest direction of the threat, times the step size, projected.
Targeted attack: `Targets` in the place of labels. Another norm: another threat. Radius sweep: `jax.vmap` over `eps`.
Restarts: `best_of`. EOT, BPDA and ensembles: another model.

Bookkeeping: the clean point counts as a candidate, so an attack never does worse than nothing; the best point is the
first by (fails, lowest criterion); success is judged in the end by asking the model again at the returned point.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxadv import losses
from jaxadv.attacks.draws import descend
from jaxadv.attacks.judge import Stepped, better, dead, held, judge
from jaxadv.core import Result, Threat, check, edges, pytree, select, static
from jaxadv.core.rows import flat, wide

STARTS = ("zero", "random", "sign", "unclipped")


class State(NamedTuple):
    """What the next step needs; every leaf is `[b, ...]`."""

    point: Float[Array, "b ..."]
    best: Float[Array, "b ..."]
    score: Float[Array, " b"]
    broken: Bool[Array, " b"]
    opt: Any
    step: Int[Array, " b"]
    nonfinite: Bool[Array, " b"]
    zero_gradient: Bool[Array, " b"]
    infeasible: Bool[Array, " b"]
    memory: Any = ()  # of a wiring that asks for gradients in its own way


@pytree
class GradientAttack(Stepped):
    """Projected descent of an attack loss inside a threat; built by `fgsm`, `pgd` and their kin.

    `threat` and `step_size` are data (new budgets do not recompile); everything else is structure.
    """

    threat: Threat
    step_size: Any
    name: str = static()
    max_steps: int = static()
    loss: Callable = static()
    criterion: Callable = static()
    transform: optax.GradientTransformation = static()
    steep: bool = static()
    start: str = static()
    early: bool = static()
    keep: str = static()
    schedule: Callable | None = static()

    def init(self, keys, model, x, y) -> State:
        """Start at `x`, at a random point of the threat, or half a budget along random signs."""
        x = jnp.asarray(x)
        nothing = jnp.zeros_like(flat(x)[:, 0])
        none = nothing > 1
        low, high = edges(self.threat.bounds, x)
        infeasible = jnp.any((x < low) | (x > high), axis=tuple(range(1, x.ndim)))
        state = State(
            point=self._start(keys, x),
            best=x,
            score=nothing,
            broken=none,
            opt=jax.vmap(self.transform.init)(x),
            step=nothing.astype(jnp.int32),
            nonfinite=none,
            zero_gradient=none,
            infeasible=infeasible,
        )
        if self.keep == "last":
            return state
        score, broken, finite = judge(model(x), y, self.criterion)
        return state._replace(score=score, broken=broken, nonfinite=~finite)

    def step(self, state: State, model, x, y) -> State:
        """Judge the current point, then move it along the transformed gradient and project."""
        grad, (score, broken, finite), memory = self._ask(state, model, x, y)
        lost = dead(grad)
        rise = -jnp.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)
        state = self._remember(state, score, broken)
        update: Callable[..., Any] = jax.vmap(self.transform.update)
        rise, opt = update(rise, state.opt, state.point)
        if self.steep:
            rise = self.threat.steepest(self._movable(rise, state.point))
        point = self.threat.project(state.point + self._length(state, x) * rise, x)
        if self.early:
            point = select(state.broken, state.point, point)
        return state._replace(
            point=point,
            opt=opt,
            step=state.step + 1,
            nonfinite=state.nonfinite | ~finite,
            zero_gradient=state.zero_gradient | lost,
            memory=memory,
        )

    def result(self, state: State, model, x, y) -> Result:
        """Judge the last point, keep the better one, and ask the model again at what is returned."""
        if self.keep == "best":
            score, broken, finite = judge(model(state.point), y, self.criterion)
            state = self._remember(state, score, broken)._replace(nonfinite=state.nonfinite | ~finite)
            point = state.best
        else:
            point = state.point
        score, broken, finite = judge(model(point), y, self.criterion)
        flags = {
            "nonfinite": state.nonfinite | ~finite,
            "zero_gradient": state.zero_gradient,
            "infeasible": state.infeasible,
        }
        queries, grads = self._cost(model)
        return Result(
            x=point,
            score=score,
            success=broken,
            size=self.threat.size(point, x),
            queries=state.step * queries + (3 if self.keep == "best" else 1),
            grads=state.step * grads,
            flags=flags,
        )

    def _ask(self, state: State, model, x, y):
        """Return the gradient to follow, the verdict on the current point, and the memory of the next state."""
        loss, verdict = (lambda z: self.loss(z, y)), (lambda z: judge(z, y, self.criterion))
        grad, _, judged = descend(model, state.point, loss, verdict)
        return grad, judged, state.memory

    def _cost(self, model) -> tuple[int, int]:
        """Forward passes and gradients of a step."""
        del model
        return 1, 1

    def _length(self, state: State, x):
        """Length of the step, `[b, 1, ...]`."""
        size = self.step_size if self.schedule is None else self.step_size * jax.vmap(self.schedule)(state.step)
        return wide(jnp.broadcast_to(jnp.asarray(size, x.dtype), x.shape[:1]), x)

    def _start(self, keys, x):
        if self.start == "zero":
            return x
        if self.start == "random":
            return self.threat.sample(keys, x)
        if self.start == "unclipped":
            return self._around(keys, x)
        draw = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
        half = jnp.broadcast_to(jnp.asarray(self.threat.eps, x.dtype) / 2, x.shape[:1])
        return self.threat.project(x + wide(half, x) * self.threat.steepest(draw), x)

    def _around(self, keys, point, factor: float = 1.0):
        """A random point within so many budgets of a point, whatever the bounds."""
        free: Any = self.threat
        eps = free.eps if factor == 1 else free.eps * factor
        return dataclasses.replace(free, eps=eps, bounds=(-jnp.inf, jnp.inf)).sample(keys, point)

    def _remember(self, state: State, score, broken) -> State:
        """Keep the better of the best point so far and the current one."""
        if self.keep == "last":
            return state._replace(broken=broken)
        taken = better(score, broken, state.score, state.broken, self.early)
        best, score = select(taken, (state.point, score), (state.best, state.score))
        return state._replace(best=best, score=score, broken=state.broken | broken)

    def _movable(self, rise, point):
        """Leave out what may not move; where steps move few features also what stands at a bound and pushes outward."""
        rise = held(self.threat, rise, point)
        if not getattr(self.threat, "sparse", False):
            return rise
        low, high = edges(self.threat.bounds, point)
        return jnp.where(((point <= low) & (rise < 0)) | ((point >= high) & (rise > 0)), 0, rise)


_IDENTITY = optax.identity()


@lru_cache
def _momentum(decay: float) -> optax.GradientTransformation:
    """Accumulate L1-normalized gradients. Cached, so that equal attacks share one compiled program."""

    def normalize(grad, params=None):
        del params
        size = jnp.sum(jnp.abs(grad))
        return grad / jnp.where(size > 0, size, 1)

    return optax.chain(optax.stateless(normalize), optax.trace(decay=decay))


def pgd(
    threat: Threat,
    *,
    steps: int = 40,
    step_size: Any = None,
    loss: Callable = losses.minus_cross_entropy,
    criterion: Callable = losses.margin,
    start: str = "random",
    early: bool = False,
    keep: str = "best",
    transform: optax.GradientTransformation | None = None,
    steep: bool = True,
    schedule: Callable | None = None,
    name: str = "pgd",
) -> GradientAttack:
    """Return projected gradient descent: `x <- project(x + step_size * steepest(-grad loss))`.

    Args:
      threat: the allowed set.
      steps: number of gradient steps.
      step_size: length of a step in the norm of the threat, a number, `[b]` or traced; `2.5 eps / steps` by
        default (Madry et al.: the steps together can cross the ball).
      loss: what to minimize, `(logits, y) -> [b]`; a module-level function, so that equal attacks share one compiled
        program.
      criterion: what the best point is chosen by; success never depends on it.
      start: `"random"` (feasible), `"zero"`, `"sign"` (half a budget along a steepest random direction), or
        `"unclipped"`: random within the budget but not within the bounds until the first step, only with `keep="last"`.
      early: stop a row once it is broken and return it as it was found; a wrong clean prediction comes back unchanged.
      keep: `"best"` point seen, the clean one included, or `"last"` point, as in training (spends no extra forward
        pass).
      transform: optax transformation of the gradient before the steepest direction, `vmap`-ped over rows; a
        module-level object.
      steep: take the steepest direction of the threat; False uses the transformed gradient as it is (Adam).
      schedule: step number to a factor of the step size.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on unknown settings, or `steps` or a known `step_size` that is not positive.

    References:
      Madry et al. 2018, Towards deep learning models resistant to adversarial attacks, sec. 2.1, arXiv:1706.06083.
      Differs from the authors' code: keeps the best point instead of the last one unless `keep="last"`.
    """
    check.whole("steps", steps)
    check.choice("start", start, STARTS)
    check.choice("keep", keep, ("best", "last"))
    if start == "unclipped" and (keep != "last" or not hasattr(threat, "p")):
        raise ValueError(
            "start='unclipped' leaves the bounds, so it must go with keep='last' and a norm ball; "
            f"got keep={keep!r} and {threat.norm}. Use start='random'."
        )
    if step_size is None:
        step_size = (
            2.5 * jnp.asarray(threat.eps, jnp.float32) / steps if not _number(threat.eps) else 2.5 * threat.eps / steps
        )
    check.positive("step_size", step_size, "It is in the units of eps; a usual value is 2.5 * eps / steps.")
    return GradientAttack(
        threat=threat,
        step_size=step_size,
        name=name,
        max_steps=steps,
        loss=loss,
        criterion=criterion,
        transform=_IDENTITY if transform is None else transform,
        steep=steep,
        start=start,
        early=early,
        keep=keep,
        schedule=schedule,
    )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float))


def fgsm(
    threat: Threat, *, loss: Callable = losses.minus_cross_entropy, name: str = "fgsm", **settings: Any
) -> GradientAttack:
    """Return the fast gradient (sign) method: one step of the whole budget from the clean point.

    Args:
      threat: the allowed set.
      loss: what to minimize.
      name: enters the random keys.
      **settings: further settings of `pgd` (`start`, `step_size`, `keep`, ...).

    Returns:
      The attack.

    References:
      Goodfellow et al. 2015, Explaining and harnessing adversarial examples, sec. 4, arXiv:1412.6572. With
      `start="random"` and `step_size=1.25 * eps` it is the step of Wong et al. 2020 (FGSM-RS), arXiv:2001.03994, as
      in their CIFAR-10 code; their MNIST code starts `"unclipped"`.
    """
    return pgd(threat, **{"steps": 1, "step_size": threat.eps, "start": "zero", "loss": loss, "name": name} | settings)


def r_fgsm(threat: Threat, *, name: str = "r_fgsm", **settings: Any) -> GradientAttack:
    """Return R+FGSM: half the budget along random signs, then one gradient step with the other half.

    In norms other than linf the signs become the steepest direction of the same random draw.

    Args:
      threat: the allowed set.
      name: enters the random keys.
      **settings: further settings of `pgd`.

    Returns:
      The attack.

    References:
      Tramèr et al. 2018, Ensemble adversarial training, sec. 3.3, arXiv:1705.07204 (with their alpha = eps / 2).
    """
    half = threat.eps / 2
    return pgd(threat, **{"steps": 1, "step_size": half, "start": "sign", "name": name} | settings)


def bim(threat: Threat, *, steps: int = 10, name: str = "bim", **settings: Any) -> GradientAttack:
    """Return the basic iterative method: PGD from the clean point.

    Args:
      threat: the allowed set.
      steps: number of gradient steps.
      name: enters the random keys.
      **settings: further settings of `pgd`.

    Returns:
      The attack.

    References:
      Kurakin et al. 2017, Adversarial examples in the physical world, sec. 2.2, arXiv:1607.02533. The authors tie step
      size and number of steps to 8-bit images; here both are arguments.
    """
    return pgd(threat, **{"steps": steps, "start": "zero", "name": name} | settings)


def mi_fgsm(
    threat: Threat, *, steps: int = 10, decay: float = 1.0, name: str = "mi_fgsm", **settings: Any
) -> GradientAttack:
    """Return the momentum iterative method: `g <- decay g + grad / ||grad||_1`, a step along `steepest(g)`.

    Args:
      threat: the allowed set.
      steps: number of gradient steps.
      decay: factor of the accumulated gradient; 0 is BIM.
      name: enters the random keys.
      **settings: further settings of `pgd`; the step size is `eps / steps` by default.

    Returns:
      The attack.

    References:
      Dong et al. 2018, Boosting adversarial attacks with momentum, alg. 1, arXiv:1710.06081.
    """
    wiring = {
        "steps": steps,
        "step_size": threat.eps / steps,
        "start": "zero",
        "name": name,
        "transform": _momentum(decay),
    }
    return pgd(threat, **wiring | settings)
