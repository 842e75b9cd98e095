"""What every attack asks: the logits, how near to failing, whether failing, whether a gradient is of any use.

What lives here: `ask`, `judge` and `dead`; `better` and `Stepped`, the one rule of what is kept and when a row ends;
`held` and `unfenced` for features that may not move. What does not: the verdict that counts (`evaluate.verdict`, with a
forward pass of its own); this one steers a search.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxadv import losses
from jaxadv.core import Attack, check, is_labels, robust, rows


def ask(model, point) -> Float[Array, "b k"]:
    """Return the logits at a point, in at least the precision of the point.

    Args:
      model: logits from a batch.
      point: `[b, ...]`.

    Returns:
      `[b, k]`.

    Raises:
      ValueError: if the model gives no `[b, k]`.
    """
    logits = model(point)
    check.logits(logits)
    return logits.astype(jnp.promote_types(logits.dtype, point.dtype))


def judge(
    logits: Float[Array, "..."], y: Any, criterion: Callable = losses.margin
) -> tuple[Float[Array, " b"], Bool[Array, " b"], Bool[Array, " b"]]:
    """Return score, verdict and finiteness of each row.

    Args:
      logits: `[b, k]`.
      y: what the attack was given: labels, `Targets`, or anything else that `criterion` reads.
      criterion: `(logits, y) -> [b]`, lower is nearer to failing.

    Returns:
      `(score, fails, finite)`, each `[b]`: a score that is not finite ranks as minus infinity; logits that are not
      finite fail; where `y` is no label only they do.

    Raises:
      ValueError: if the model gave no `[b, k]`.
    """
    check.logits(logits)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    score = criterion(logits, y)
    score = jnp.where(jnp.isfinite(score) & finite, score, -jnp.inf)
    return score, ~robust(logits, y) if is_labels(y) else ~finite, finite


def better(
    score: Float[Array, " b"],
    broken: Bool[Array, " b"],
    best: Float[Array, " b"],
    known: Bool[Array, " b"],
    stop: bool = False,
) -> Bool[Array, " b"]:
    """Tell which rows have a better point than the one they keep: the first by (fails, lowest score).

    Args:
      score: `[b]` of the new point.
      broken: `[b]` whether it fails.
      best: `[b]` score of the point that is kept.
      known: `[b]` whether that one fails.
      stop: what fails stays as it was found, a wrong clean prediction too.

    Returns:
      bool `[b]`.
    """
    taken = (broken & ~known) | ((broken == known) & (score < best))
    return taken & ~known if stop else taken


class Stepped(Attack):
    """What attacks share whose states count steps in `step`; `_found` says which rows need no more of them."""

    def done(self, state) -> Bool[Array, " b"]:
        """A row is done after `max_steps`, or, with `early`, once it has found what it looks for."""
        over = state.step >= self.max_steps
        return over | self._found(state) if self.early else over

    def _found(self, state) -> Bool[Array, " b"]:
        """By default a failing point (within the budget)."""
        return state.broken


def dead(grad: Float[Array, "b ..."]) -> Bool[Array, " b"]:
    """Tell which rows have a gradient without any entry that is finite and not zero.

    Args:
      grad: `[b, ...]`.

    Returns:
      `[b]`.
    """
    return jnp.all(rows.flat((grad == 0) | ~jnp.isfinite(grad)), axis=-1)


def held(threat: Any, grad: Float[Array, "b ..."], point: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Leave out of a gradient what the threat never lets move, before anybody takes its norm.

    Args:
      threat: any threat; one with `movable` (see `threats.structured`) says what may.
      grad: `[b, ...]`.
      point: `[b, ...]` a point of the threat.

    Returns:
      `[b, ...]`.
    """
    return jnp.where(threat.movable(point), grad, 0) if hasattr(threat, "movable") else grad


def unfenced(threat: Any, name: str) -> None:
    """Check that an attack, whose moves know of no limits of single features, is not given any.

    Args:
      threat: the threat.
      name: of the attack.

    Raises:
      ValueError: if the threat has fences.
    """
    if hasattr(threat, "movable"):
        raise ValueError(
            f"threat must be a norm ball without fences for {name}; got a fenced {threat.norm}. "
            "pgd and its kin, apgd and fmn take fences."
        )
