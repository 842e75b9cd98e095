"""What a step of training costs, counted in its program.

What lives here: the count. What does not: seconds, which depend on the machine (`benchmarks/speed/training.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxadv.core import Objective, Trainable, jaxprs
from jaxadv.train.trainer import grad_fn


class Parts(NamedTuple):
    """What a gradient of an objective consists of.

    Attributes:
      forward: passes through the network that nothing is derived from.
      searches: searches, each of as many input gradients as its attack has steps (one for single-step methods).
      input_gradients: input gradients beside those of the search.
      weight_gradients: points at which the loss asks for logits, and is derived by the parameters.
      second_order: input gradients that are derived by the parameters.
    """

    forward: int = 0
    searches: int = 1
    input_gradients: int = 0
    weight_gradients: int = 1
    second_order: int = 0


PARTS = {
    "standard": Parts(searches=0),
    "pgd_at": Parts(),
    "fgsm_at": Parts(),
    "fgsm_rs": Parts(),
    "n_fgsm": Parts(),
    "trades": Parts(forward=1, weight_gradients=2),
    "mart": Parts(weight_gradients=2),
    "a3t": Parts(forward=1),
    "grad_align": Parts(input_gradients=1, second_order=1),
    "iat": Parts(weight_gradients=2),
    "advlc": Parts(weight_gradients=2),
    "cost_sensitive": Parts(),
    "dial": Parts(forward=1, weight_gradients=2),
    "cifs": Parts(),
    "jsigr": Parts(searches=0, forward=1, second_order=2),
    "ladder": Parts(weight_gradients=2),
}
"""Name in `OBJECTIVES` to the parts of a gradient. The domain head of `dial` and the probes of `cifs` come on top;
`jsigr` also takes a forward pass for each patch. `awp` repeats all but forward passes and searches."""


class Cost(NamedTuple):
    """Multiplications in matrix products and convolutions, over those of one forward pass of the same rows.

    Attributes:
      step: a gradient of the objective, search included.
      input_gradient: a forward pass and the gradient of the inputs, what each step of an attack takes: 2 in theory.
      weight_gradient: a forward pass and the gradient of the parameters: 3 in theory, less the share of the first
        layer, which needs no gradient of its inputs.
      second_order: the gradient of the parameters through an input gradient, what terms with a derivative take.
    """

    step: float
    input_gradient: float
    weight_gradient: float
    second_order: float


def cost(
    objective: Objective, trainable: Trainable, batch: dict[str, Any], *, gradient: Callable[..., Any] = grad_fn
) -> Cost:
    """Count what a gradient of an objective costs, without running anything.

    Args:
      objective: for example `train.pgd_at(attacks.pgd(threats.linf(0.3), steps=10))`, which costs ten input gradients
        and one weight gradient.
      trainable: the network that it trains.
      batch: as `data.make_batch` makes it, with `step` int32 `[b]` beside it where a budget grows; arrays or
        `jax.ShapeDtypeStruct`.
      gradient: objective to gradient function, `grad_fn` or for example `partial(awp, gamma=0.01)`.

    Returns:
      The cost, in forward passes.

    Raises:
      ValueError: if a search runs until a condition holds, so that its length is not known.
    """
    apply, params, state, x = trainable.apply, trainable.params, trainable.state, batch["x"]
    made, key = gradient(objective), jax.random.key(0)

    def logits(params, x):
        return apply(params, state, x, bn="local", key=key)[0]

    def total(params, x):
        return jnp.sum(logits(params, x) ** 2)

    def slope(params, x):
        return jnp.sum(jax.grad(total, 1)(params, x) ** 2)

    def count(fn, *given):
        return jaxprs.products(jax.make_jaxpr(fn)(*given).jaxpr)

    unit = count(logits, params, x)
    counted = (
        count(lambda p, batch: made(apply, p, state, batch, key).total, params, batch),
        count(jax.grad(total, 1), params, x),
        count(jax.grad(total), params, x),
        count(jax.grad(slope), params, x),
    )
    return Cost(*(number / unit for number in counted))
