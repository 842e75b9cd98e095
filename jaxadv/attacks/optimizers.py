"""Other optimizers in the place of steepest steps: Adam in the gradient engine, conjugate directions in AutoPGD."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxadv import losses
from jaxadv.attacks.apgd import APGD, State, apgd, plan
from jaxadv.attacks.gradient import GradientAttack, pgd
from jaxadv.attacks.minimum import ball
from jaxadv.core import Threat, check, pytree, select
from jaxadv.core.rows import flat, wide


def from_data(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let the state of an optimizer start from data, as `shard_map` asks of the carry of a loop.

    Args:
      transform: whose first state may hold constants, such as a count of 0.

    Returns:
      The same with a first state of the same values.
    """

    def init(params):
        nothing = jnp.zeros_like(params).reshape(-1)[0]
        return jax.tree.map(lambda leaf: leaf + nothing.astype(leaf.dtype), transform.init(params))

    return optax.GradientTransformation(init, transform.update)


@lru_cache
def row_adam(decay: float, square: float) -> optax.GradientTransformation:
    """Return the direction of Adam, made once, so that equal attacks share one compiled program.

    Args:
      decay: share of the running mean of gradients that is kept.
      square: share of the running mean of their squares that is kept.

    Returns:
      The transformation, with a first state that is made from data.
    """
    return from_data(optax.scale_by_adam(b1=decay, b2=square))


def adam_pgd(
    threat: Threat, *, decay: float = 0.9, square: float = 0.999, name: str = "adam_pgd", **settings: Any
) -> GradientAttack:
    """Return PGD with Adam: each feature moves by its own running ratio of gradient and gradient size, then projected.

    Args:
      threat: a norm ball `linf` or `l2`.
      decay: share of the running mean of gradients that is kept (beta 1), in [0, 1).
      square: share of the running mean of their squares that is kept (beta 2), in [0, 1).
      name: enters the random keys.
      **settings: further settings of `pgd`; the step size is the largest change of a feature in a first step.

    Returns:
      The attack.

    Raises:
      ValueError: on settings out of range, or a threat of another norm.

    References:
      Kingma and Ba 2015, Adam: a method for stochastic optimization, alg. 1, arXiv:1412.6980, on the loss of Madry et
      al. 2018, arXiv:1706.06083. Every row has an optimizer of its own.
    """
    ball(threat, ("linf", "l2"), name, fences=True)
    for what, value in (("decay", decay), ("square", square)):
        if not 0 <= value < 1:
            raise ValueError(f"{what} must be a share in [0, 1); got {value}. Adam's own are 0.9 and 0.999.")
    return pgd(threat, **{"transform": row_adam(float(decay), float(square)), "steep": False, "name": name} | settings)


# -------------------------------------------------------------------------------------------------- conjugate gradients


def conjugate(
    line: Float[Array, "b ..."], before: Float[Array, "b ..."], grad: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """Return the next conjugate direction of descent, by the rule of Hestenes and Stiefel, row by row.

    Args:
      line: `[b, ...]` the last direction.
      before: `[b, ...]` the gradient that it was followed from.
      grad: `[b, ...]` the gradient now.

    Returns:
      `[b, ...]`: `-grad + beta line`, with beta 0 where the rule divides by zero.
    """
    turned = grad - before
    share, scale = (jnp.sum(flat(a * turned), axis=-1) for a in (grad, line))
    beta = jnp.where(scale != 0, share / jnp.where(scale != 0, scale, 1), 0)
    return wide(jnp.where(jnp.isfinite(beta), beta, 0), grad) * line - grad


@pytree
class ACG(APGD):
    """AutoPGD along conjugate directions, without momentum; built by `acg`."""

    def init(self, keys, model, x, y) -> State:
        """Begin without any direction."""
        state = super().init(keys, model, x, y)
        return state._replace(memory=(jnp.zeros_like(state.point), jnp.zeros_like(state.point)))

    def step(self, state: State, model, x, y) -> State:
        """A step of AutoPGD; then the direction of the next one, which goes back to the best point with it."""
        whole = plan(self.threat.norm, self.steps, self.large_eps)
        begin = jnp.asarray(whole.begin)[state.step % len(whole.begin)]
        new = super().step(state, model, x, y)
        better = begin | (new.best_loss < state.best_loss)
        back = ~begin & (new.length < state.length)
        grad = select(better, new.best_grad, new.grad)  # at the point that was asked at, where it matters
        line = select(begin, -grad, conjugate(state.memory[0], state.grad, grad))
        best = select(better, line, state.memory[1])
        return new._replace(memory=(select(back, best, line), best))

    def _move(self, state: State, threat, second, x):
        del second
        return threat.project(state.point + wide(state.length, x) * threat.steepest(state.memory[0]), x)


def acg(threat: Threat, *, steps: int = 100, name: str = "acg", **settings: Any) -> ACG:
    """Return auto conjugate gradient: AutoPGD whose steps follow conjugate directions in the place of momentum.

    Args:
      threat: a norm ball `linf` or `l2`.
      steps: moves of a round.
      name: enters the random keys.
      **settings: further settings of `apgd` (`loss`, `restarts`, `rho`, ...); the loss is the margin by default.

    Returns:
      The attack.

    Raises:
      ValueError: on settings out of range, or a threat of another norm.

    References:
      Yamamura et al. 2022, Diversified adversarial attacks based on conjugate gradient method, alg. 1,
      arXiv:2206.09628. Differs: a random start (theirs is the clean point or one of the multi-targeted runs); the
      differences from the published AutoPGD are those of `apgd`.
    """
    ball(threat, ("linf", "l2"), name, fences=True)
    if settings.get("compat") is not None:
        raise ValueError(f"compat must be None for {name}, which has no published form here; got {settings['compat']}.")
    check.whole("steps", steps)
    base = apgd(threat, **{"steps": steps, "loss": losses.margin, "name": name} | settings)
    return ACG(**vars(base))
