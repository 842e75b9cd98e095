"""J-SIGR: small Jacobians, and input gradients only where the prediction really depends on the input.

What lives here: saliency by occlusion, the selective penalty on input gradients, the objective as a wiring of both.
What does not: the Jacobian's norm and other terms (`terms.py`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxadv.core import Objective, canonical, check, rows
from jaxadv.train.objectives import Adversarial, standard
from jaxadv.train.terms import input_gradient, jacobian, plus


def patches(shape: tuple[int, ...], size: int) -> np.ndarray:
    """Number the patches of a grid over an example.

    Args:
      shape: of one example: `(..., channels)`, or `(features,)`.
      size: side of a patch; those at the far edges may be smaller.

    Returns:
      int, `(..., 1)` or `(features,)`: the number of the patch in which each position lies.
    """
    check.whole("size", size)
    number = np.zeros((), int)
    for axis in shape[:-1] if len(shape) > 1 else shape:
        number = number[..., None] * -(-axis // size) + np.arange(axis) // size
    return number[..., None] if len(shape) > 1 else number


def occlusion(apply, params, state, batch, *, size: int, fill: float = 0.0, bn: str = "local"):
    """Measure how much the probability of the label changes when a patch is hidden; one forward pass for each patch.

    Args:
      apply: of a `Trainable`.
      params: its parameters.
      state: its state.
      batch: with `x` `[b, ...]` and `y` `[b]`.
      size: see `patches`.
      fill: value of hidden features.
      bn: batch norm, `'local'` or `'eval'`.

    Returns:
      `[b, n]`, `|p_y(x) - p_y(x without patch i)|`; no gradient flows through it.
    """
    check.labels(batch["y"])
    number = patches(batch["x"].shape[1:], size)

    def sure(x):
        chances = jax.nn.softmax(apply(params, state, x, bn=bn)[0])
        return jnp.take_along_axis(chances, batch["y"][:, None], axis=-1)[:, 0]

    def without(i):
        return sure(jnp.where((number == i)[None], fill, batch["x"]))

    change = sure(batch["x"])[:, None] - lax.map(canonical(without), jnp.arange(number.max() + 1)).T
    return lax.stop_gradient(jnp.abs(change))


def _selective(apply, params, state, batch, key, *, top, size, fill, bn):
    del key
    number = patches(batch["x"].shape[1:], size)
    saliency = occlusion(apply, params, state, batch, size=size, fill=fill, bn=bn)
    place = jnp.argsort(jnp.argsort(-saliency, axis=-1), axis=-1)
    spared = (place < round(top * saliency.shape[-1]))[:, number]
    slope = input_gradient(apply, params, state, batch["x"], batch, bn)
    return jnp.sum(rows.flat(jnp.where(spared, 0, jnp.abs(slope))), axis=-1)


def selective(*, top: float = 0.15, size: int = 7, fill: float = 0.0, bn: str = "local"):
    """Return the term `||(1 - M) * ∇CE(f(x), y)||_1`: input gradients where they should not be.

    M marks the patches on which the prediction depends the most, by `occlusion`.

    | `top` | the term |
    | --- | --- |
    | 0 | the l1 norm of the input gradient |
    | 1 | 0 |

    Args:
      top: share of the patches that are spared, in [0, 1]; rounded to whole patches.
      size: side of a patch. A step costs a forward pass for each patch: 16 of 7 x 7 pixels on MNIST.
      fill: value of hidden features.
      bn: batch norm, `'local'` or `'eval'`.

    Returns:
      The term, at least 0.

    Raises:
      ValueError: on impossible settings.
    """
    check.fraction("top", top)
    check.whole("size", size)
    check.choice("bn", bn, ("local", "eval"))
    return partial(_selective, top=top, size=size, fill=fill, bn=bn)


def jsigr(
    objective: Objective | None = None,
    *,
    weight_jacobian: float = 0.01,
    weight_saliency: float = 0.01,
    projections: int | None = 1,
    top: float = 0.15,
    size: int = 7,
    fill: float = 0.0,
    bn: str = "local",
) -> Adversarial:
    """J-SIGR: an objective, the norm of the Jacobian, and selective regularization of input gradients.

    `L + λ_J ||∂z / ∂x||_F^2 + λ_S ||(1 - M) * ∇CE||_1`. Published for robustness against transferred examples.

    Args:
      objective: the loss L; None is `standard`. `fgsm_at` trains on examples of the fast gradient sign method.
      weight_jacobian: λ_J, see `terms.jacobian`.
      weight_saliency: λ_S, see `selective`. With both weights 0 it is the objective itself.
      projections: see `terms.jacobian`.
      top: see `selective`.
      size: see `selective`.
      fill: see `selective`.
      bn: batch norm of both terms.

    Returns:
      The objective; beside its own metrics `jacobian` and `saliency`, the terms unweighted.

    Raises:
      ValueError: on impossible settings.

    References:
      Liu et al. 2022, Jacobian norm with selective input gradient regularization for improved and interpretable
      adversarial defense, arXiv:2207.13036. We read the abstract only, and the authors have not published the training
      code: masks by patches and all defaults are ours.
    """
    base = plus(
        standard() if objective is None else objective,
        jacobian(projections=projections, bn=bn),
        weight_jacobian,
        name="jacobian",
    )
    return plus(base, selective(top=top, size=size, fill=fill, bn=bn), weight_saliency, name="saliency")
