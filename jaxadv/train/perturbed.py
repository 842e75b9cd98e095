"""Adversaries of the weights: gradients taken where a small change of the parameters hurts the most.

What lives here: adversarial weight perturbation (AWP) around any objective. What does not: searches for inputs, and
noise on weights that is no adversary.

An adversary of the weights needs the gradient of the whole batch, of all shards, before the gradient that counts. So it
is a gradient function, the trainer's seam, and not an objective: `fit(..., gradient=partial(awp, gamma=0.01))`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxadv import parallel
from jaxadv.core import Objective, PyTree, check
from jaxadv.train.objectives import halves
from jaxadv.train.trainer import Gradient, bind, grad_fn


def kernels(path: tuple[Any, ...], leaf: Any) -> bool:
    """Select the kernels of convolutions and dense layers: every parameter with more than one axis.

    Args:
      path: of the leaf, as `jax.tree_util.tree_map_with_path` gives it.
      leaf: the parameter.

    Returns:
      False for biases and for the scales of norms.
    """
    del path
    return jnp.ndim(leaf) > 1


def weight_perturbation(grads: PyTree, params: PyTree, gamma: Any, select: Callable = kernels) -> PyTree:
    """Return the step that raises the loss, as large in each selected tensor as its share of the tensor's own norm.

    `v_l = gamma ||θ_l|| g_l / ||g_l||`, zero elsewhere.

    | case | result |
    | --- | --- |
    | `gamma = 0` | zeros |
    | a gradient of zeros | zeros for that tensor, no NaN |
    | gradients times any positive number | the same |

    Args:
      grads: gradient of the loss, of any scale, a pytree like `params`.
      params: the parameters θ.
      gamma: size relative to the norm of each tensor.
      select: `(path, leaf) -> bool`, which tensors move.

    Returns:
      A pytree like `params`.
    """

    def leaf(path, p, g):
        if not select(path, p):
            return jnp.zeros_like(p)
        top = jnp.max(jnp.abs(g))
        unit = g / jnp.where(top > 0, top, 1)  # squares of small gradients would underflow
        size = jnp.sqrt(jnp.sum(jnp.square(unit)))
        return gamma * jnp.sqrt(jnp.sum(jnp.square(p))) * unit / jnp.where(size > 0, size, 1)

    return jax.tree_util.tree_map_with_path(leaf, params, grads)


def awp(
    objective: Objective, *, gamma: float = 0.01, start: int = 0, select: Callable = kernels
) -> Callable[..., Gradient]:
    """Adversarial weight perturbation: the gradient of an objective at the worst weights nearby.

    The points are searched at the parameters θ themselves; with them held constant, the gradient at θ says where the
    weights are moved, `weight_perturbation`, and the gradient there, at `θ + v`, is what the optimizer gets, which
    moves θ. Costs one more gradient than the objective. The first gradient leaves running statistics alone.

    | case | result |
    | --- | --- |
    | `gamma = 0` | the gradient of the objective, to the bit |
    | an objective without a search (`standard`) | the same around clean examples |
    | `accumulate > 1` | each part of the batch moves the weights for itself |
    | private training | cannot be had: the perturbation mixes examples; a step takes one gradient function |

    Args:
      objective: any.
      gamma: size of the perturbation relative to the norm of each tensor; 0.01 for adversarial training, 0.005 for
        TRADES.
      start: number of the step from which on the weights are perturbed (the authors train TRADES for 10 epochs
        without).
      select: which tensors move; the default is all kernels, as published.

    Returns:
      A gradient function as `trainer.grad_fn` returns it; the losses and metrics are those at `θ + v`.

    Raises:
      ValueError: if `gamma` is negative or `start` no step.

    References:
      Wu, Xia and Wang 2020, Adversarial weight perturbation helps robust generalization, arXiv:2004.05884, eqs. 8 to
      10; code csdongxian/AWP. The authors take the direction from a step of SGD on a copy, which rounds it; here it is
      the gradient. Their decay acts at `θ + v`, an optax optimizer's at θ.
    """
    if gamma:
        check.positive("gamma", gamma, "0 perturbs nothing; 0.01 is usual.")
    check.whole("start", start, least=0)
    find, loss = halves(objective)
    at = grad_fn(loss)

    def gradient(apply, params, state, batch, key, *, axis_name=None) -> Gradient:
        own = parallel.varying(params, axis_name)
        batch = find(bind(apply, batch["mask"], axis_name), own, state, batch, key)
        total = parallel.psum(at(apply, params, state, batch, key, axis_name=axis_name).total, axis_name)
        share = jnp.where(batch["step"][0] >= start, gamma, 0.0) if start else gamma
        moved = jax.tree.map(jnp.add, params, weight_perturbation(total, params, share, select))
        return at(apply, moved, state, batch, key, axis_name=axis_name)

    return gradient
