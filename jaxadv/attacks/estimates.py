"""Attacks that follow gradients, without gradients: backward passes as differences of logits (NES, SPSA, ZOO).

`estimating` is a `model -> model` whose derivatives are estimates, with one key for each row; `estimated` does that to
each step of an attack, with keys of the row and the step. So any attack of the library that asks for gradients at one
point of each row becomes one on logits alone; NES, SPSA and ZOO are three wirings.

Elsewhere: `square` (`blackbox`), searches that use logits otherwise (`scores`), or decisions alone (`decisions`).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxadv import losses
from jaxadv.attacks.gradient import pgd
from jaxadv.attacks.judge import ask
from jaxadv.attacks.minimum import ball
from jaxadv.attacks.optimizers import adam_pgd
from jaxadv.attacks.tradeoff import carlini
from jaxadv.core import Attack, Result, Threat, check, pytree, static, step_keys
from jaxadv.core.rows import flat

DIRECTIONS = ("normal", "signs", "coordinates")
_NOISE = 0x6E6F6973


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Estimate:
    """How a gradient is estimated; `directions` is one of `DIRECTIONS`."""

    directions: str
    samples: int
    at_once: int


def _directions(how: Estimate, keys, number, chosen, point):
    """The directions with these numbers, `[a, b, ...]`, and what each is weighed with."""
    if how.directions == "coordinates":
        at = jnp.moveaxis(chosen, 1, 0)[number]
        n = flat(point).shape[1]
        return jax.nn.one_hot(at, n, dtype=point.dtype).reshape(-1, *point.shape), n
    law = jax.random.normal if how.directions == "normal" else jax.random.rademacher

    def one(i):
        return jax.vmap(lambda k: law(jax.random.fold_in(k, i), point.shape[1:], point.dtype))(keys)

    return jax.vmap(one)(number), 1


@jax.custom_vjp
def _asked(how: Estimate, model, keys, sigma, point):
    return ask(model, point)


def _asked_forward(how, model, keys, sigma, point):
    return ask(model, point), (how, model, keys, sigma, point)


def _asked_backward(kept, pull):
    """The estimate of `J^T pull`: the mean over directions of the slope of `pull . logits` along each, times it."""
    how, model, keys, sigma, point = kept
    if keys.shape[0] != point.shape[0]:
        raise ValueError(
            f"an estimate needs one key for each row; got {keys.shape[0]} keys and {point.shape[0]} rows. "
            "Does the attack ask at several points of a row at once? Such attacks cannot be estimated."
        )
    chosen = None
    if how.directions == "coordinates":
        draw = jax.vmap(lambda k: jax.random.uniform(k, (flat(point).shape[1],)))(keys)
        chosen = lax.top_k(draw, how.samples)[1]

    def group(number, total):
        several = number * how.at_once + jnp.arange(how.at_once)
        along, weight = _directions(how, keys, several, chosen, point)
        far = sigma * along
        both = jnp.stack([point[None] + far, point[None] - far])
        logits = ask(model, both.reshape(-1, *point.shape[1:]))
        up, down = logits.reshape(2, how.at_once, point.shape[0], -1)
        slope = weight * jnp.sum(pull[None] * (up - down), axis=-1) / (2 * sigma)
        slope = jnp.where(jnp.isfinite(slope), slope, 0).astype(point.dtype)  # NaN is no guide
        return total + jnp.sum(slope.reshape(slope.shape + (1,) * (point.ndim - 1)) * along, axis=0)

    total = lax.fori_loop(0, how.samples // how.at_once, group, jnp.zeros_like(point))
    return None, None, None, None, total / how.samples


_asked.defvjp(_asked_forward, _asked_backward)


def estimating(model, keys, *, directions: str = "normal", samples: int = 50, sigma: Any = 1e-3, at_once: int = 1):
    """Return a model with the same logits whose gradients are estimated from logits.

    The gradient of a loss is its derivative with respect to the logits, times an estimate of the Jacobian: the mean
    over random directions `v` of `v (f(x + sigma v) - f(x - sigma v)) / (2 sigma)`. It is unbiased for a model that is
    linear or quadratic; its squared error on a linear one, as a share of `|g|^2`, is `(n + 1) / samples` for normal
    directions, `(n - 1) / samples` for signs, `n / samples - 1` for coordinates.

    Args:
      model: logits from a batch; it is only called.
      keys: `[b]` typed keys, one for each row; the same keys give the same directions.
      directions: `"normal"`, `"signs"` (of +-1), or `"coordinates"` (features, without repetition).
      samples: number of directions; each costs two queries of a row.
      sigma: length of the difference, in the units of `x`.
      at_once: directions that are asked in one call of the model, a divisor of `samples`: 1 where the batch is large.

    Returns:
      A callable pytree; reverse-mode derivatives only, on batches of as many rows as there are keys.

    Raises:
      ValueError: on settings out of range.
    """
    check.choice("directions", directions, DIRECTIONS)
    check.whole("samples", samples)
    check.whole("at_once", at_once)
    check.positive("sigma", sigma)
    if samples % at_once:
        raise ValueError(f"at_once must divide samples; got {at_once} and {samples}. 1 always does.")
    return jax.tree_util.Partial(_asked, Estimate(directions, samples, at_once), model, keys, sigma)


class EstimatedState(NamedTuple):
    """The state of the attack inside, and what the directions are drawn from."""

    inner: Any
    keys: Any
    step: Int[Array, " b"]


@pytree
class Estimated(Attack):
    """An attack that follows gradients, on estimates of them; built by `estimated`."""

    threat: Threat
    inner: Attack
    sigma: Any
    name: str = static()
    max_steps: int = static()
    early: bool = static()
    directions: str = static()
    samples: int = static()
    at_once: int = static()

    def _model(self, model, keys, step):
        how: dict[str, Any] = {"directions": self.directions, "samples": self.samples, "at_once": self.at_once}
        return estimating(model, step_keys(keys, step), sigma=self.sigma, **how)

    def init(self, keys, model, x, y) -> EstimatedState:
        """Begin the attack inside."""
        noise = jax.vmap(lambda k: jax.random.fold_in(k, _NOISE))(keys)
        step = jnp.zeros_like(flat(jnp.asarray(x))[:, 0]).astype(jnp.int32)
        inner = self.inner.init(keys, self._model(model, noise, step), x, y)
        return EstimatedState(inner=inner, keys=noise, step=step + 1)

    def step(self, state: EstimatedState, model, x, y) -> EstimatedState:
        """A step of the attack inside, with directions of this step."""
        inner = self.inner.step(state.inner, self._model(model, state.keys, state.step), x, y)
        return state._replace(inner=inner, step=state.step + 1)

    def done(self, state: EstimatedState) -> Bool[Array, " b"]:
        """A row is done when the attack inside is."""
        return self.inner.done(state.inner)

    def result(self, state: EstimatedState, model, x, y) -> Result:
        """The answer of the attack inside, each of its gradients counted as the queries that it took."""
        found = self.inner.result(state.inner, model, x, y)
        none = jnp.zeros_like(found.grads)
        flags = found.flags | {"zero_gradient": none > 0}
        return found._replace(queries=found.queries + 2 * self.samples * found.grads, grads=none, flags=flags)


def estimated(
    attack: Attack,
    *,
    directions: str = "normal",
    samples: int = 50,
    sigma: Any = 1e-3,
    at_once: int = 1,
    name: str | None = None,
) -> Estimated:
    """Return an attack that follows gradients as one that asks for logits only: gradients become estimates.

    Args:
      attack: any attack that asks for gradients at one point of each row: `pgd`, `apgd_ce`, `fmn`, `carlini`, ...
      directions: `"normal"` (NES), `"signs"` (SPSA) or `"coordinates"` (ZOO).
      samples: directions of an estimate; each costs two queries.
      sigma: length of the difference, in the units of `x`. Points on the way may leave the bounds by it.
      at_once: directions that are asked in one call of the model, a divisor of `samples`.
      name: enters the random keys; `"estimated_"` and the name of the attack by default.

    Returns:
      The attack. `Result.queries` counts every row that the model was asked, `grads` is 0.

    Raises:
      ValueError: on settings out of range.

    References:
      Ilyas et al. 2018, Black-box adversarial attacks with limited queries and information, sec. 2.1, arXiv:1804.08598;
      Uesato et al. 2018, Adversarial risk and the dangers of evaluating against weak attacks, alg. 2, arXiv:1802.05666.
      Differs: differences are taken of the logits, not of the loss, so an estimate is one of the Jacobian and the loss
      is differentiated as it is.
    """
    estimating(None, None, directions=directions, samples=samples, sigma=sigma, at_once=at_once)  # only the checks
    return Estimated(
        threat=attack.threat,
        inner=attack,
        sigma=sigma,
        name=f"estimated_{attack.name}" if name is None else name,
        max_steps=attack.max_steps,
        early=attack.early,
        directions=directions,
        samples=samples,
        at_once=at_once,
    )


def _steps(queries: int, samples: int) -> int:
    """The steps that a budget pays, each of two queries a sample and one at the point itself."""
    check.whole("queries", queries)
    check.whole("samples", samples)
    each = 2 * samples + 1
    if queries < each:
        raise ValueError(
            f"queries must pay at least one step of {each} queries; got {queries}. Raise queries or take fewer samples."
        )
    return queries // each


def nes(
    threat: Threat,
    *,
    queries: int = 5000,
    samples: int = 50,
    sigma: Any = 1e-3,
    at_once: int = 1,
    early: bool = True,
    name: str = "nes",
    **settings: Any,
) -> Estimated:
    """Return the attack by natural evolution strategies: PGD on gradients estimated along normal directions.

    Args:
      threat: the allowed set.
      queries: rows asked in the steps, at most; `Result.queries` counts three more.
      samples: pairs of points of an estimate.
      sigma: standard deviation of the differences, in the units of `x`.
      at_once: pairs that are asked in one call of the model.
      early: stop a row once it is broken.
      name: enters the random keys.
      **settings: further settings of `pgd` (`step_size`, `loss`, `start`, ...); the start is the example by default.

    Returns:
      The attack.

    Raises:
      ValueError: on settings out of range, or a budget that does not pay one step.

    References:
      Ilyas et al. 2018, Black-box adversarial attacks with limited queries and information, alg. 1, arXiv:1804.08598.
      Differs: no momentum and no schedule of the step size unless asked for.
    """
    inner = pgd(threat, **{"steps": _steps(queries, samples), "start": "zero", "early": early} | settings)
    return estimated(inner, samples=samples, sigma=sigma, at_once=at_once, name=name)


def spsa(
    threat: Threat,
    *,
    queries: int = 10_000,
    samples: int = 128,
    sigma: Any = 0.01,
    step_size: Any = 0.01,
    at_once: int = 1,
    early: bool = True,
    name: str = "spsa",
    **settings: Any,
) -> Estimated:
    """Return SPSA: Adam on the margin, with gradients estimated along random signs, projected after each step.

    Args:
      threat: a norm ball `linf` or `l2`.
      queries: rows asked in the steps, at most; `Result.queries` counts three more.
      samples: pairs of points of an estimate.
      sigma: length of the difference in each feature, in the units of `x`.
      step_size: of Adam, in the units of `x`.
      at_once: pairs that are asked in one call of the model.
      early: stop a row once it is broken.
      name: enters the random keys.
      **settings: further settings of `pgd`; the loss is the margin, the start the example by default.

    Returns:
      The attack.

    Raises:
      ValueError: on settings out of range, a threat of another norm, or a budget that does not pay one step.

    References:
      Uesato et al. 2018, Adversarial risk and the dangers of evaluating against weak attacks, alg. 2, arXiv:1802.05666.
    """
    ball(threat, ("linf", "l2"), name, fences=True)
    wiring = {"steps": _steps(queries, samples), "start": "zero", "loss": losses.margin, "early": early}
    inner = adam_pgd(threat, **wiring | {"step_size": step_size} | settings)
    return estimated(inner, directions="signs", samples=samples, sigma=sigma, at_once=at_once, name=name)


def zoo(
    threat: Threat,
    *,
    queries: int = 50_000,
    samples: int = 128,
    sigma: Any = 1e-3,
    rounds: int = 1,
    constant: float = 1.0,
    at_once: int = 1,
    name: str = "zoo",
    **settings: Any,
) -> Estimated:
    """Return ZOO: the attack of Carlini and Wagner with differences along random features in the place of gradients.

    Args:
      threat: a norm ball `l2`.
      queries: rows asked in the steps of all rounds, at most; `Result.queries` counts three more.
      samples: features whose derivative is taken in a step, at most all of them.
      sigma: length of the difference, in the units of `x`.
      rounds: constants that are tried.
      constant: the first constant.
      at_once: features that are asked in one call of the model.
      name: enters the random keys.
      **settings: further settings of `carlini` (`rate`, `confidence`, ...).

    Returns:
      The attack.

    Raises:
      ValueError: on settings out of range, a threat of another norm, or a budget that does not pay one step a round.

    References:
      Chen et al. 2017, ZOO: zeroth order optimization based black-box attacks to deep neural networks without training
      substitute models, alg. 1 and 2, arXiv:1708.03999. Differs: one Adam for all features (theirs steps only those
      that were asked, with counters of their own); margins of logits, not of log-probabilities; no reduction of the
      dimension and no importance sampling.
    """
    ball(threat, ("l2",), name)
    check.whole("rounds", rounds)
    steps = _steps(queries // rounds, samples)
    inner = carlini(threat, **{"steps": steps, "rounds": rounds, "constant": constant, "rate": 0.01} | settings)
    return estimated(inner, directions="coordinates", samples=samples, sigma=sigma, at_once=at_once, name=name)
