"""TisODE: a field without time whose motion after the answer is penalized, so that nearby curves end nearby.

What lives here: the loss as an objective. What does not: the network (`nets`, `odenet_tis` with `time=False`), and
training.
"""

from functools import partial

import jax.numpy as jnp

from jaxadv import losses
from jaxadv.core import Objective, check, robust


def _tisode(apply, params, state, batch, key, *, weight, window, after, bn):
    (logits, seen), state = apply(
        params, state, batch["x"], bn=bn, key=key, taps=("block.motion",), hints={"steady": window}
    )
    motion = seen["block.motion"]
    on = weight if after == 0 else jnp.where(batch["step"] >= after, weight, 0.0)
    metrics = {"clean": robust(logits, batch["y"]).astype(jnp.float32), "steady": motion}
    return losses.cross_entropy(logits, batch["y"]) + on * motion, (state, metrics)


def tisode(
    weight: float = 0.1, *, window: tuple[float, float] = (1.0, 1.5), after: int = 0, bn: str = "train"
) -> Objective:
    """Return the loss of TisODE: cross-entropy, and the motion of the features in a window of time.

    `CE(head(z(T)), y) + weight * mean over components of the integral of |f(z(t))| over the window`, along the curve
    that the answer lies on, from one solve of the state and its integral.

    | case | result |
    | --- | --- |
    | `weight` 0 | the cross-entropy, to the bit |
    | a field that is never negative (`odenet_tis`) | the integral is the mean of z(end) - z(begin) |
    | dz = -kz, z0 > 0 | z0 (exp(-k begin) - exp(-k end)) |

    Args:
      weight: of the motion; not negative.
      window: its begin and end; the end not before the solver's `t1`, both on its grid where steps are fixed.
      after: number of the step from which the motion counts.
      bn: mode of batch norm.

    Returns:
      The objective; metrics `clean` and `steady`, the motion of each example.

    Raises:
      ValueError: on a negative weight, or a window that does not begin before its end.

    References:
      Yan, Du, Tan and Feng 2020, On robustness of neural ordinary differential equations, arXiv:1910.05513. Their code
      takes weight 0.01 from the fifth epoch on and a window that begins before T (0.75 to 1.05, or 0.9 to 1.5); here it
      begins at T, as the bound on |z(T + d) - z(T)| asks.
    """
    if weight:
        check.positive("weight", weight, "0 leaves the motion out.")
    check.whole("after", after, least=0)
    if not window[0] < window[1]:
        raise ValueError(f"window must begin before it ends; got {window}. A usual one is (1.0, 1.5) for t1=1.")
    return partial(_tisode, weight=weight, window=(float(window[0]), float(window[1])), after=after, bn=bn)
