"""Per-example losses of attacks and of training, all of the form `loss(logits [b, k], y) -> [b]`.

Sign convention: an attack loss is what the attacker **minimizes**. Papers print the opposite ("bigger is more
adversarial"); the conversion happens here, once. Margin losses are below zero exactly where the prediction is wrong.
Given `core.Targets` in the place of labels, a label loss is negated at the target: minimizing it moves toward the
target class.

What does not live here: anything that reduces over the batch, and verdicts (see `core.robust`).
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxadv.core import Targets, check


def _label_loss(loss: Callable) -> Callable:
    """Check that `y` holds integer labels, and turn a loss around at the target where `y` is `Targets`."""

    @wraps(loss)
    def labeled(logits, y: Any):
        check.logits(logits)
        if isinstance(y, Targets):
            return -labeled(logits, y.target)
        check.labels(y, logits.shape[0], logits.shape[1])
        return loss(logits, y)

    return labeled


def _at(logits, y):
    return jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]


def _best_other(logits, y):
    taken = jnp.arange(logits.shape[-1])[None, :] == y[:, None]
    return jnp.max(jnp.where(taken, -jnp.inf, logits), axis=-1)


def cross_entropy(logits: Float[Array, "b k"], y: Any) -> Float[Array, " b"]:
    """Return the cross-entropy that training minimizes: `logsumexp(z) - z_y`.

    Args:
      logits: `[b, k]`.
      y: int `[b]` labels, or float `[b, k]` probabilities (soft labels, mixup).

    Returns:
      `[b]`, at least 0 for labels.

    Raises:
      ValueError: if the logits or the labels have a wrong shape.
      TypeError: if labels of shape `[b]` are not integers.
    """
    check.logits(logits)
    if getattr(y, "ndim", 1) == 2:
        return -jnp.sum(y * jax.nn.log_softmax(logits), axis=-1)
    check.labels(y, logits.shape[0], logits.shape[1])
    return jax.nn.logsumexp(logits, axis=-1) - _at(logits, y)


@_label_loss
def minus_cross_entropy(logits: Float[Array, "b k"], y: Any) -> Float[Array, " b"]:
    """Return the negative cross-entropy, the attacker's usual guide: `z_y - logsumexp(z)`.

    Args:
      logits: `[b, k]`.
      y: int `[b]` labels, or `Targets` (then the cross-entropy to the target).

    Returns:
      `[b]`, what the attacker minimizes.

    References:
      Madry et al. 2018, Towards deep learning models resistant to adversarial attacks, sec. 2, arXiv:1706.06083.
    """
    return -cross_entropy(logits, y)


@_label_loss
def margin(logits: Float[Array, "b k"], y: Any) -> Float[Array, " b"]:
    """Return the logit margin `z_y - max_{i != y} z_i`, below zero exactly where another class wins.

    Args:
      logits: `[b, k]`.
      y: int `[b]` labels, or `Targets` (then `max_{i != t} z_i - z_t`).

    Returns:
      `[b]`, what the attacker minimizes.

    References:
      Carlini and Wagner 2017, Towards evaluating the robustness of neural networks, sec. V (f_6 with confidence 0),
      arXiv:1608.04644.
    """
    return _at(logits, y) - _best_other(logits, y)


@_label_loss
def dlr(logits: Float[Array, "b k"], y: Any) -> Float[Array, " b"]:
    """Return the difference of logits ratio, `(z_y - max_{i != y} z_i) / (z_(1) - z_(3) + 1e-12)`.

    Invariant under `z -> a z + b` with `a > 0`, so that saturated logits do not hide the gradient.

    Args:
      logits: `[b, k]` with `k >= 3`; `z_(i)` is the i-th largest.
      y: int `[b]` labels, or `Targets` (then the negative at the target; the paper's own targeted form is
        `dlr_targeted`).

    Returns:
      `[b]`, what the attacker minimizes; at most 1.

    Raises:
      ValueError: with fewer than three classes.

    References:
      Croce and Hein 2020, Reliable evaluation of adversarial robustness, eq. 6, arXiv:2003.01690.
    """
    if logits.shape[-1] < 3:
        raise ValueError(
            f"dlr needs at least 3 classes; got logits of shape {logits.shape}. Use losses.margin for two."
        )
    top = lax.top_k(logits, 3)[0]
    return (_at(logits, y) - _best_other(logits, y)) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Float[Array, "b k"], y: Targets) -> Float[Array, " b"]:
    """Return the targeted difference of logits ratio, `(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)`.

    Args:
      logits: `[b, k]` with `k >= 4`.
      y: `Targets`; both the label and the target enter.

    Returns:
      `[b]`, what the attacker minimizes.

    Raises:
      ValueError: with fewer than four classes, or plain labels instead of `Targets`.

    References:
      Croce and Hein 2020, Reliable evaluation of adversarial robustness, eq. 7, arXiv:2003.01690.
    """
    check.logits(logits)
    if not isinstance(y, Targets):
        raise ValueError(
            f"dlr_targeted needs core.Targets(label, target); got {type(y).__name__}. Untargeted? Use losses.dlr."
        )
    if logits.shape[-1] < 4:
        raise ValueError(
            f"dlr_targeted needs at least 4 classes; got logits of shape {logits.shape}. Use losses.margin."
        )
    check.labels(y.label, logits.shape[0], logits.shape[1], name="label")
    check.labels(y.target, logits.shape[0], logits.shape[1], name="target")
    top = lax.top_k(logits, 4)[0]
    return (_at(logits, y.label) - _at(logits, y.target)) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def kl(p_logits: Float[Array, "b k"], q_logits: Float[Array, "b k"]) -> Float[Array, " b"]:
    """Return the divergence `KL(p || q) = sum_k p_k log(p_k / q_k)` of two softmax distributions.

    Args:
      p_logits: `[b, k]` logits of the reference `p` (the clean prediction in TRADES).
      q_logits: `[b, k]` logits of `q`.

    Returns:
      `[b]`, at least 0. Gradients flow through both.
    """
    check.logits(p_logits, name="p_logits")
    check.logits(q_logits, p_logits.shape[0], name="q_logits")
    log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def minus_kl(logits: Float[Array, "b k"], y: Float[Array, "b k"]) -> Float[Array, " b"]:
    """Return `-KL(p || q)` with `p` from the clean logits given as `y`: the inner loss of TRADES.

    Args:
      logits: `[b, k]` at the attacked point.
      y: `[b, k]` the logits at the clean point.

    Returns:
      `[b]`, what the attacker minimizes.

    References:
      Zhang et al. 2019, Theoretically principled trade-off between robustness and accuracy, eq. 5, arXiv:1901.08573.
    """
    return -kl(y, logits)


LOSSES: dict[str, Callable] = {
    "minus_cross_entropy": minus_cross_entropy,
    "margin": margin,
    "dlr": dlr,
    "dlr_targeted": dlr_targeted,
    "minus_kl": minus_kl,
}
"""Attack losses by name."""
