"""Wirings of the gradient engine with another optimizer in the place of the steepest direction."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxadv.attacks.gradient import GradientAttack, pgd
from jaxadv.attacks.minimum import ball
from jaxadv.core import Threat


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
def _adam(decay: float, square: float) -> optax.GradientTransformation:
    """Cached, so that equal attacks share one compiled program."""
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
    return pgd(threat, **{"transform": _adam(float(decay), float(square)), "steep": False, "name": name} | settings)
