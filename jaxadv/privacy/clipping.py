"""Per-example clipping: the sum of gradients in which no single example has more than a known influence.

What lives here: the clipped sum and its norms, by `vmap`, the method that all others are measured against. What does
not: noise, sampling, accounting, and the training loop. The order of a private step is: clip and sum here,
`parallel.psum` over the shards, add noise once, divide by the *expected* batch size, then the optimizer.

The clipped sum is right only if the gradient of an example is that of this example alone. Inside `jax.shard_map` that
needs `parallel.varying` on the parameters before `jax.grad`: without it jax sums, before the clipping and without an
error, the gradients of the examples with the same place on all devices, and the noise no longer covers what one example
can do.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxadv import parallel
from jaxadv.core import PyTree, check


def clipped_grads(
    loss_fn: Callable[[PyTree, PyTree, Any], Any], *, clip_norm: Any, rescale: bool = False
) -> Callable[..., tuple[PyTree, dict[str, Array]]]:
    """Return a function that sums per-example gradients, each clipped to norm at most `clip_norm` over the whole tree.

    `g_i = grad loss(params; example_i)`, `n_i = sqrt(sum over leaves of |g_i|^2)`, result `sum_i g_i min(1, C / n_i)`.

    **Sensitivity** of the sum over all shards (this function's result after one `parallel.psum`), in the l2 norm:

    | neighbors | `rescale=False` | `rescale=True` |
    | --- | --- | --- |
    | add or remove one example; replace one by a row that does not count | `C` | 1 |
    | replace one example by another | `2 C` | 2 |

    It holds for a `loss_fn` that sees one example only: no batch statistics, no mixing of examples.

    | case | result |
    | --- | --- |
    | the gradient is zero | contributes zeros, no NaN |
    | `clip_norm = 0` | zeros |
    | `clip_norm = inf` | the sum of the gradients, unclipped (no finite sensitivity) |
    | the gradient has NaN or infinity, or its norm overflows float32 | that example contributes exactly 0 |
    | `mask` False | the row contributes exactly 0, whatever it holds |
    | no rows, or all masked | zeros |
    | bfloat16 or float16 leaves | norm, product, sum and result are float32: rounding could pass the bound |

    Args:
      loss_fn: `loss_fn(params, example, key) -> scalar` for one example, without a batch axis.
      clip_norm: the bound `C` in [0, inf], a number or a traced scalar; the same on all shards.
      rescale: divide the clipped gradients by `C`, so that their norm is at most 1 and the learning rate does not
        depend on `C`. Needs `0 < C < inf`.

    Returns:
      `f(params, batch, mask, keys, axis_name=None) -> (grads, aux)`. `batch`: pytree of `[b, ...]`; `mask`: bool `[b]`
      or None for all; `keys`: one typed key for each row, or None; `axis_name`: as the executor gave it to the step.
      `grads`: the sum over the rows **of this shard** (so that microbatches can be added up first): pass it through
      `parallel.psum` once. `aux`: `norms` `[b]` before clipping and `losses` `[b]`, float32, zero where the mask is
      False; they are private data, and non-finite where the example's are.

    Raises:
      ValueError: if `clip_norm` is negative or NaN, or `rescale` is asked for with 0 or infinity.

    References:
      Abadi et al. 2016, Deep learning with differential privacy, algorithm 1, arXiv:1607.00133.
      De et al. 2022, Unlocking high-accuracy differentially private image classification through scale,
      arXiv:2204.13650 (`rescale`).
    """
    known = check.concrete(clip_norm)
    if known is not None and (known.ndim or not known >= 0):
        raise ValueError(
            f"clip_norm must be a number of at least 0; got {clip_norm}. A norm per layer is not meant here; "
            "1.0 with rescale=True is a usual start."
        )
    if known is not None and rescale and not 0 < known < float("inf"):
        raise ValueError(
            f"clip_norm must be finite and greater than 0 with rescale=True; got {clip_norm}. Drop rescale."
        )

    def clipped(
        params: PyTree,
        batch: PyTree,
        mask: Bool[Array, " b"] | None = None,
        keys: PyTree = None,
        axis_name: parallel.AxisName = None,
    ) -> tuple[PyTree, dict[str, Array]]:
        own = parallel.varying(params, axis_name)  # before grad: see the module's docstring
        losses, grads = jax.vmap(jax.value_and_grad(loss_fn), in_axes=(None, 0, 0))(own, batch, keys)
        norms = _norms(grads)
        kept = jnp.where(norms > 0, 1.0, 0.0)  # what is too small to have a norm contributes nothing
        factor = jnp.where(norms > clip_norm, clip_norm / norms, kept)
        if rescale:
            factor = factor / clip_norm
        counts = jnp.isfinite(norms) if mask is None else jnp.isfinite(norms) & mask

        def total(leaf):
            rows = (-1,) + (1,) * (leaf.ndim - 1)
            scaled = _wide(leaf) * factor.reshape(rows)
            return jnp.where(counts.reshape(rows), scaled, 0).sum(0)  # where, not times 0: NaN * 0 is NaN

        shown = {"norms": norms, "losses": losses.astype(jnp.float32)}
        if mask is not None:
            shown = {name: jnp.where(mask, value, 0) for name, value in shown.items()}
        return jax.tree.map(total, grads), shown

    return clipped


def _wide(leaf: Array) -> Array:
    """At least float32."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _norms(grads: PyTree) -> Array:
    """The l2 norm `[b]` of each row over all leaves, in float32; the squares of small gradients do not underflow."""
    leaves = [_wide(leaf).reshape(leaf.shape[0], math.prod(leaf.shape[1:])) for leaf in jax.tree.leaves(grads)]
    top = jnp.stack([jnp.abs(leaf).max(-1, initial=0).astype(jnp.float32) for leaf in leaves]).max(0)
    unit = jnp.where((top > 0) & (top < 1), top, 1)
    squares = [jnp.square(leaf / unit[:, None]).sum(-1).astype(jnp.float32) for leaf in leaves]
    return unit * jnp.sqrt(sum(squares, start=jnp.zeros_like(unit)))
