"""What every attack asks: the logits, how near to failing, whether failing, whether a gradient is of any use.

What lives here: `ask`, `judge` and `dead`. What does not: the verdict that counts (`evaluate.verdict`, with a forward
pass of its own); this one steers a search.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxadv import losses
from jaxadv.core import check, is_labels, robust, rows


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


def dead(grad: Float[Array, "b ..."]) -> Bool[Array, " b"]:
    """Tell which rows have a gradient without any entry that is finite and not zero.

    Args:
      grad: `[b, ...]`.

    Returns:
      `[b]`.
    """
    return jnp.all(rows.flat((grad == 0) | ~jnp.isfinite(grad)), axis=-1)
