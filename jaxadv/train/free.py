"""Free adversarial training: one backward pass moves the weights and the perturbations, which live from step to step.

What lives here: `free`, a gradient function that carries perturbations. What does not: how a state carries rows
(`trainer.py`), and the replay of minibatches (`fit(..., replays=8)`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxadv import parallel
from jaxadv.core import Objective, Threat, check, rows
from jaxadv.train.objectives import halves
from jaxadv.train.trainer import Gradient, counted, summed


@dataclasses.dataclass(frozen=True)
class Free:
    """An objective to a gradient function that carries perturbations; built by `free`.

    Attributes:
      threat: the allowed set.
      alpha: step length of the perturbations.
    """

    threat: Threat
    alpha: Any

    def carry(self, shape: tuple[int, ...]):
        """Return the perturbations before the first step: none."""
        return jnp.zeros(shape)

    def __call__(self, objective: Objective) -> Callable[..., Gradient]:
        """Return the gradient function; the objective's own search is not run."""
        _, loss = halves(objective)

        def gradient(apply, params, state, batch, key, *, axis_name=None) -> Gradient:
            x = batch["x"]
            found = self.threat.project(x + batch["carry"], x)

            def total(params, found):
                return summed(loss, apply, params, state, batch | {"found": found}, key, axis_name)

            both = jax.grad(total, argnums=(0, 1), has_aux=True)(parallel.varying(params, axis_name), found)
            (grads, rise), (new, sums) = both
            moved = self.threat.project(found + self.alpha * self.threat.steepest(rise), x) - x
            carry = rows.select(batch["mask"], moved, batch["carry"])
            return Gradient(grads, counted(batch["mask"]), new, sums, carry)

        return gradient


def free(threat: Threat, *, alpha: Any = None) -> Free:
    """Free adversarial training: each step's backward pass also moves the perturbations, by one step of their own.

    `x' = Π(x + δ)`; the weights follow the gradient of the loss at x', and `δ <- Π(x' + alpha * steepest(∇_x')) - x`.
    δ belongs to places of the batch and not to examples: the next minibatch begins where the last one ended. As each
    minibatch is replayed m times, that is m updates of the weights and m steps of the attack for m backward passes.

    `fit(key, net, train.pgd_at(attacks.fgsm(threat)), ..., gradient=train.free(threat), replays=8, steps=8 * n)`

    | case | result |
    | --- | --- |
    | the first step | the gradient of `standard`, and the perturbations of `fgsm_at` |
    | another objective | its loss at x' (`trades`: the divergence from x to x'); its search is not run |

    Args:
      threat: the allowed set.
      alpha: step length; None is eps.

    Returns:
      What `fit` takes as `gradient`.

    Raises:
      ValueError: if `alpha` is not positive.

    References:
      Shafahi et al. 2019, Adversarial training for free!, arXiv:1904.12843, algorithm 1; code
      ashafahi/free_adv_train. Here a perturbation is cut to the bounds of the new example before it is used.
    """
    alpha = threat.eps if alpha is None else alpha
    check.positive("alpha", alpha, "None stands for eps.")
    return Free(threat, alpha)
