"""A second network that reads a layer of the first: two heads on one body.

What lives here: `branched`, its way back (`trunk`), gradient reversal. What does not: what the second head is for
(`train.domains`).
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxadv.core import Trainable, rows
from jaxadv.models.adapt import Partial, Static

BRANCH = "branch"
"""The tap that asks for the branch's logits."""


def grad_reverse(x, rho):
    """Return `x`, and let gradients pass back through it times `-rho`.

    Args:
      x: `[b, ...]`.
      rho: a number, or `[b]`.

    Returns:
      `x`, to the bit.

    References:
      Ganin and Lempitsky 2015, Unsupervised domain adaptation by backpropagation, arXiv:1409.7495, section 3.2.
    """
    still, rho = lax.stop_gradient(x), jnp.asarray(rho, x.dtype)
    return still - (rows.wide(rho, x) if rho.ndim else rho) * (x - still)


def _apply(trunk, branch, at: Static, params, state, x, *, taps=(), hints=None, **settings):
    more = {"hints": hints} if hints else {}
    (name,) = at.values
    asked = BRANCH in taps
    rest = tuple(tap for tap in taps if tap != BRANCH)
    wanted = (*rest, name) if asked and name not in rest else rest
    if wanted:
        more["taps"] = wanted
    out, new = trunk(params["trunk"], state["trunk"], x, **settings, **more)
    if not asked:
        return out, {"trunk": new, "branch": state["branch"]}
    logits, seen = out
    features = seen[name].reshape(x.shape[0], -1)
    if hints and "reversal" in hints:
        features = grad_reverse(features, hints["reversal"])
    side, other = branch(params["branch"], state["branch"], features, **settings)
    kept = {tap: value for tap, value in seen.items() if tap != name or name in rest}
    return (logits, kept | {BRANCH: side}), {"trunk": new, "branch": other}


def branched(trunk: Trainable, branch: Trainable, *, at: str) -> Trainable:
    """Let a second network read what passes through a layer of the first.

    The logits are those of the first, and unless they are asked for by the tap `'branch'`, those of the second are not
    computed. The hint `reversal`, a number or `[b]`, reverses the gradient that the second sends into the first, see
    `grad_reverse`.

    Args:
      trunk: the network; its `apply` must know `taps`, as those of `create` and `trainable` do.
      branch: a network of flat features `[b, d]`, e.g. `create('mlp', key, shape=(d,), classes=2, widths=(100,))`.
      at: tap of the trunk, one layer: `'linear:in'`.

    Returns:
      The trainable; `params` and `state` hold those of both under `'trunk'` and `'branch'`.
    """
    fns = (fn if isinstance(fn, Partial) else Partial(fn) for fn in (trunk.apply, branch.apply))
    both = ({"trunk": getattr(trunk, part), "branch": getattr(branch, part)} for part in ("params", "state"))
    return Trainable(Partial(_apply, *fns, Static(at)), *both)


def trunk(trainable: Trainable) -> Trainable:
    """Return the first of the networks that `branched` put together, with its weights as they are now.

    Args:
      trainable: what `branched` returned, perhaps trained since.

    Returns:
      The network alone, to be saved or evaluated.

    Raises:
      TypeError: if there is no branch.
    """
    fn: Any = trainable.apply
    if not isinstance(fn, Partial) or fn.func is not _apply:
        raise TypeError("trunk needs a network with a branch; got another one. It is what models.branched returns.")
    return Trainable(fn.args[0], trainable.params["trunk"], trainable.state["trunk"])
