"""The two verdicts that every number rests on: is the point allowed, and does the model still hold there?

Both are used by attacks, evaluation, reports and tests; nobody else decides these questions.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxadv.core.types import Targets, Threat


def tolerance(threat: Threat, features: int, power: float) -> Any:
    """Return by how much rounding may carry a point over the budget.

    Args:
      threat: its `bounds` give the largest magnitude of a coordinate.
      features: number of features `n`.
      power: the `p` of the norm (`inf` for linf, 0 for l0).

    Returns:
      `n^(1/p) * 2^-24 * max|bounds|`: one rounding to float32 in each coordinate; zero for l0, which counts.
    """
    if power == 0:
        return 0.0
    spread = 1.0 if math.isinf(power) else features ** (1.0 / power)
    low, high = threat.bounds
    xp = np if _known(low, high) else jnp
    return spread * 2.0**-24 * xp.maximum(xp.max(xp.abs(xp.asarray(low))), xp.max(xp.abs(xp.asarray(high))))


def _known(*values: Any) -> bool:
    return all(isinstance(v, (int, float, np.ndarray, np.generic)) for v in values)


def edges(bounds: tuple[Any, Any], x: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """Shape the bounds so that they broadcast over a batch without promotion of ranks.

    Args:
      bounds: lowest and highest value, numbers or arrays over the features of one example.
      x: `[b, ...]` examples, for dtype and number of axes.
      xp: `numpy` or `jax.numpy`.

    Returns:
      The two bounds, numbers or `[1, ...]`, in the dtype of `x`.
    """
    low, high = (xp.asarray(b, x.dtype) for b in bounds)
    low, high = (b.reshape((1,) * (x.ndim - b.ndim) + b.shape) if b.ndim else b for b in (low, high))
    return low, high


def feasible(threat: Threat, point, x) -> Any:
    """Decide whether points are allowed: `size <= eps + tolerance`, and inside the bounds exactly.

    Given concrete numpy arrays the size is computed in float64, which is how evaluation and reports decide. Under a
    transformation it is computed in the dtype of the arrays, but at least float32.

    Args:
      threat: the allowed set.
      point: `[b, ...]` the points to judge.
      x: `[b, ...]` the examples they belong to.

    Returns:
      bool `[b]`. A point that is not finite is not allowed.
    """
    if members := getattr(threat, "members", ()):  # each with its own rounding
        verdicts = [feasible(member, point, x) for member in members]
        return (np if isinstance(verdicts[0], np.ndarray) else jnp).stack(verdicts).any(axis=0)
    if isinstance(point, np.ndarray) and isinstance(x, np.ndarray):
        xp, dtype = np, np.float64
    else:
        xp, dtype = jnp, jnp.promote_types(point.dtype, jnp.float32)
    axes = tuple(range(1, point.ndim))
    low, high = edges(threat.bounds, point, xp)
    boxed = xp.all((point >= low) & (point <= high), axis=axes)
    size = threat.size(point.astype(dtype), x.astype(dtype))
    return boxed & (size <= threat.budget(point, xp)) & xp.isfinite(size)


def robust(logits: Float[Array, "b k"], y: Any) -> Bool[Array, " b"]:
    """Decide whether the model holds: all logits finite and the first largest one belongs to the label.

    Args:
      logits: `[b, k]`.
      y: int `[b]` labels, or `Targets`: then a row is robust unless its target class is reached.

    Returns:
      bool `[b]`.
    """
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    best = jnp.argmax(logits, axis=-1)
    if isinstance(y, Targets):
        return finite & (best != y.target)
    return finite & (best == y)


def is_labels(y: Any) -> bool:
    """Tell whether `y` is something that `robust` can judge (labels or targets), not a logit vector or another guide.

    Args:
      y: what the loss takes beside the logits.

    Returns:
      True for integer labels `[b]` and for `Targets`.
    """
    if isinstance(y, Targets):
        return True
    return hasattr(y, "dtype") and y.ndim == 1 and jnp.issubdtype(y.dtype, jnp.integer)


def label_of(y: Any) -> Int[Array, " b"]:
    """Return the true labels of plain labels or of `Targets`.

    Args:
      y: int `[b]` or `Targets`.

    Returns:
      int `[b]`.
    """
    return y.label if isinstance(y, Targets) else y
