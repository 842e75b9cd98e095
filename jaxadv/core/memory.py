"""Rematerialization: a backward pass that keeps only what blocks of a network hand on, and computes the rest again.

What lives here: the mark at the end of a block, and the door that makes an `apply` keep marked values only. What does
not: networks (`models/`), which mark their blocks, and the setting `remat` of training.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_MARK = "jaxadv.block"


def landmark(x: Any) -> Any:
    """Mark what a block of a network hands on as worth keeping; without `rematerialized` it does nothing.

    Args:
      x: an array.

    Returns:
      The same.
    """
    return checkpoint_name(x, _MARK)


@dataclasses.dataclass(frozen=True)
class _Rematerialized:
    apply: Callable

    def __call__(self, params, state, x, **settings):
        def applied(params, state, x):
            return self.apply(params, state, x, **settings)

        policy = jax.checkpoint_policies.save_only_these_names(_MARK)
        return jax.checkpoint(applied, policy=policy)(params, state, x)


def rematerialized(apply: Callable) -> Callable:
    """Let the backward pass of a network keep only what its blocks hand on (`landmark`) and compute the rest again.

    It costs one more forward pass for each backward pass, also in the gradients of attacks, and changes no number but
    by rounding. A network that marks nothing is computed again as a whole, which saves nothing.

    Args:
      apply: of a `Trainable`.

    Returns:
      The same function.

    References:
      Chen et al. 2016, Training deep nets with sublinear memory cost, arXiv:1604.06174.
    """
    return _Rematerialized(apply)
