"""Noise without direction, as much of it as it takes: salt and pepper.

Its step is one query, as in `decisions`, whose base it shares.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxadv.attacks.decisions import Decision
from jaxadv.attacks.minimum import State, ball
from jaxadv.core import Threat, check, edges, pytree, static
from jaxadv.core.rows import flat, wide


@pytree
class SaltAndPepper(Decision):
    """Draws ever more features to the ends of their range, and fewer once that fails; built by `salt_and_pepper`."""

    across: bool = static()

    class Own(NamedTuple):
        """The share of features that is drawn next, the range that it sweeps, and how fast."""

        share: Float[Array, " b"]
        least: Float[Array, " b"]
        most: Float[Array, " b"]
        stride: Float[Array, " b"]

    def _own(self, logits, x, y):
        none = jnp.zeros_like(flat(x)[:, 0])
        stride = none + 1 / self.max_steps
        return self.Own(share=stride, least=none, most=none + 1, stride=stride)

    def _learn(self, state: State, fails, nearer, x):
        own = state.own
        left = (self.max_steps - state.step).astype(own.share.dtype)
        least = jnp.where(nearer, own.share / 2, own.least)
        most = jnp.where(nearer, jnp.minimum(own.share * 1.2, 1), own.most)
        stride = jnp.where(nearer, (most - least) / jnp.maximum(left, 1), own.stride)
        begin = jnp.where(nearer | (own.share == own.most), least, own.share)
        return self.Own(share=jnp.minimum(begin + stride, most), least=least, most=most, stride=stride)

    def _propose(self, own, keys, x):
        low, high = edges(self.threat.bounds, x)
        shape = (*x.shape[1:-1], 1) if self.across and x.ndim > 2 else x.shape[1:]
        draw = jax.vmap(lambda k: jax.random.uniform(k, shape, x.dtype))(keys)
        half = wide(own.share / 2, x)
        return jnp.where(draw < half, low, jnp.where(draw >= 1 - half, high, x))


def salt_and_pepper(
    threat: Threat,
    *,
    queries: int = 1000,
    across: bool = True,
    early: bool = False,
    name: str = "salt_and_pepper",
) -> SaltAndPepper:
    """Return salt-and-pepper noise, raised until it breaks a row, then swept again below what has broken it.

    Args:
      threat: a norm ball `l0`, `l1` or `l2`, in whose norm the nearest point is chosen.
      queries: points that are asked. `Result.queries` counts two more: the example, and the verification in the end.
      across: whether all channels of a pixel change together.
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: if `queries` is not at least 1, or on a threat of another norm.

    References:
      Rauber et al. 2020, Foolbox Native, doi:10.21105/joss.02607, whose sweep it follows: after a failure at share p,
      from p / 2 to 1.2 p over the queries that are left. Differs: noise is a row's own.
    """
    ball(threat, ("l0", "l1", "l2"), name)
    check.whole("queries", queries)
    return SaltAndPepper(threat=threat, name=name, max_steps=queries, early=early, across=across)
