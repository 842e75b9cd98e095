"""Where the search of an objective begins: another first point for any attack that follows the gradient.

What lives here: `started` and the two starts that published objectives use. What does not: the attacks and their own
starts (zero, uniform in the threat, signs).

A start is `(threat, keys, x) -> point [b, ...]`, which nothing obliges to be feasible.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from jaxadv.attacks import GradientAttack
from jaxadv.core import Attack, Threat, check, pytree, static


@pytree
class Started(Attack):
    """An attack with another first point; built by `started`. Everything else, the keys too, is the inner attack's."""

    attack: Any
    start: Callable = static()

    @property
    def threat(self) -> Threat:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The allowed set of the inner attack."""
        return self.attack.threat

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner attack's name."""
        return self.attack.name

    @property
    def max_steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner attack's number of steps."""
        return self.attack.max_steps

    @property
    def early(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the inner attack may end early."""
        return self.attack.early

    def init(self, keys, model, x, y):
        """The inner attack's state, at the point that `start` chooses."""
        state = self.attack.init(keys, model, x, y)
        return state._replace(point=self.start(self.threat, keys, x))

    def step(self, state, model, x, y):
        """A step of the inner attack."""
        return self.attack.step(state, model, x, y)

    def done(self, state):
        """Whether the inner attack is done."""
        return self.attack.done(state)

    def result(self, state, model, x, y):
        """The inner attack's answer."""
        return self.attack.result(state, model, x, y)


def started(attack: Attack, start: Callable) -> Started:
    """Let an attack begin elsewhere.

    Args:
      attack: of the gradient engine (`attacks.pgd`, `attacks.fgsm`, ...).
      start: `(threat, keys, x) -> point [b, ...]`, given the attack's threat and one typed key for each row.

    Returns:
      The attack; its own start is not used.

    Raises:
      TypeError: if the attack is not of the gradient engine.
    """
    if not isinstance(attack, GradientAttack):
        raise TypeError(
            f"started needs an attack of the gradient engine; got {type(attack).__name__}. Use attacks.pgd or its kin."
        )
    return Started(attack, start)


def _gaussian(threat, keys, x, *, spread):
    del threat
    return x + spread * jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)


def gaussian(spread: float = 0.001) -> Callable:
    """Start at `x + spread * N(0, 1)`, not cut to the bounds, as TRADES and MART do.

    Args:
      spread: standard deviation in units of `x`. At 0 a search for the largest divergence would follow rounding
        errors: at `x` it has no slope.

    Returns:
      The start.
    """
    return partial(_gaussian, spread=spread)


def _uniform(threat, keys, x, *, share):
    return dataclasses.replace(threat, eps=share * threat.eps).sample(keys, x)


def uniform(share: float = 1.0) -> Callable:
    """Start at a random feasible point of the threat with `share` times its budget.

    Args:
      share: factor of the budget, at least 0.

    Returns:
      The start; with 1 it is the attacks' own random start, to the bit.

    Raises:
      ValueError: if `share` is negative or not finite.
    """
    if share:
        check.positive("share", share, "0 starts at x.")
    return partial(_uniform, share=share)
