"""Per-example clipping: the sum of gradients in which no single example has more than a known influence.

What lives here: the clipped sum (`clipped_grads`), what it promises (`Clipped.sensitivity`), bounds that are one
number, one for each group of parameters, automatic or adapted, and losses over several views of one example. What does
not: how the sum is computed (`methods.py`, `uses.py`), noise, sampling, accounting, and the training loop. The order of
a private step is: clip and sum here, `parallel.psum` over the shards, add noise once, divide by the *expected* batch
size, then the optimizer.

The clipped sum is right only if the gradient of an example is that of this example alone. Inside `jax.shard_map` that
needs `parallel.varying` on whatever is differentiated before `jax.grad`: without it jax sums, before the clipping and
without an error, the gradients of the examples with the same place on all devices, and the noise no longer covers what
one example can do.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from jaxadv import core, parallel
from jaxadv.core import PyTree, check
from jaxadv.privacy.methods import METHODS, ClipPlan, describe

RELATIONS = {"add_or_remove_one": 1, "replace_special": 1, "replace_one": 2}
"""Which data sets are neighbors, and how many clipped gradients they differ by."""


@dataclass(frozen=True)
class Automatic:
    """Automatic clipping: `g / (|g| + gamma)`, which has no bound to choose and keeps some of the gradient's size.

    Args:
      gamma: positive; 0.01 as published.

    References:
      Bu et al. 2023, Automatic clipping: differentially private deep learning made easier and stronger,
      arXiv:2206.07136 (AUTO-S).
    """

    gamma: float = 0.01

    def __post_init__(self):
        """Refuse a gamma that is not positive."""
        check.positive("gamma", self.gamma)


@dataclass(frozen=True, eq=False)
class Clipped:
    """A clipped sum of gradients; made by `clipped_grads`, which says what it computes.

    Attributes:
      loss_fn: the loss of one example.
      clip_norm: a number, a tree of numbers, or `Automatic`.
      rescale: whether clipped gradients are divided by their bound.
      method: one of `METHODS`.
      microbatch: rows at a time, or None.
    """

    loss_fn: Callable[[PyTree, PyTree, Any], Any]
    clip_norm: Any
    rescale: bool
    method: str
    microbatch: int | None

    def sensitivity(self, relation: str = "add_or_remove_one") -> Any:
        """Return how far the sum over all shards can move, in the l2 norm, between neighboring data sets.

        It holds for a loss that sees one example only: no batch statistics, no mixing of examples.

        Args:
          relation: one of `RELATIONS`, or an enum whose `name` is one in capitals (dp-accounting's).

        Returns:
          One for `Automatic`; else the root of the sum of the squared bounds (1 each, if rescaled); twice that where
          one example is replaced by another. A traced bound gives a traced number.
        """
        name = str(getattr(relation, "name", relation)).lower()
        times = check.choice("relation", name, RELATIONS)
        if isinstance(self.clip_norm, Automatic):
            return float(times)
        bounds = [1.0 if self.rescale else bound for bound in jax.tree.leaves(self.clip_norm)]
        if any(check.concrete(b) is None for b in bounds):
            return times * jnp.sqrt(sum(jnp.square(b) for b in bounds))
        return times * math.hypot(*(float(b) for b in bounds))

    def plan(self, params: PyTree, batch: PyTree, keys: PyTree = None) -> ClipPlan:
        """Tell how each parameter is treated; print it.

        Args:
          params: parameters.
          batch: pytree of `[b, ...]`.
          keys: typed keys `[b]`, or None.

        Returns:
          The plan; parameters whose uses are not known say `other`, and have their gradients formed row by row.
        """
        return describe(self.method, self.loss_fn, params, batch, keys)

    def __call__(
        self,
        params: PyTree,
        batch: PyTree,
        mask: Bool[Array, " b"] | None = None,
        keys: PyTree = None,
        axis_name: parallel.AxisName = None,
    ) -> tuple[PyTree, dict[str, Array]]:
        """Return the clipped sum over the rows of this shard, and norms and losses; see `clipped_grads`."""
        groups, bounds = _groups(self.clip_norm, params)
        own = parallel.varying(params, axis_name)  # before grad: see the module's docstring
        size = jax.tree.leaves(batch)[0].shape[0]

        def part(batch, mask, keys):
            def weigh(norms):
                members = [[n for n, g in zip(norms, groups) if g == group] for group in range(len(bounds))]
                factors = [self._factor(_combined(ns), bound) for ns, bound in zip(members, bounds) if ns]
                used = sorted(set(groups))
                counts = jnp.isfinite(_combined(norms)) if mask is None else jnp.isfinite(_combined(norms)) & mask
                return [factors[used.index(g)] for g in groups], counts

            run = METHODS[self.method]
            sums, norms, losses = run(self.loss_fn, own, batch, keys, axis_name, weigh)
            shown = {"norms": _combined(norms), "losses": losses.astype(jnp.float32)}
            if mask is not None:
                shown = {name: jnp.where(mask, value, 0) for name, value in shown.items()}
            return sums, shown

        part = core.canonical(part)
        if self.microbatch is None or size <= self.microbatch:
            return part(batch, mask, keys)
        return _in_parts(part, batch, mask, keys, size, self.microbatch, own)

    def _factor(self, norms: Array, bound: Any) -> Array:
        """What each gradient is multiplied by."""
        if isinstance(bound, Automatic):
            return 1 / (norms + bound.gamma)
        kept = jnp.where(norms > 0, 1.0, 0.0)  # what is too small to have a norm contributes nothing
        factor = jnp.where(norms > bound, bound / norms, kept)
        return factor / bound if self.rescale else factor


def clipped_grads(
    loss_fn: Callable[[PyTree, PyTree, Any], Any],
    *,
    clip_norm: Any,
    rescale: bool = False,
    method: str = "auto",
    microbatch: int | None = None,
) -> Clipped:
    """Return a function that sums per-example gradients, each clipped to norm at most `clip_norm` over the whole tree.

    `g_i = grad loss(params; example_i)`, `n_i = sqrt(sum over leaves of |g_i|^2)`, result `sum_i g_i min(1, C / n_i)`.

    **Sensitivity** of the sum over all shards (this function's result after one `parallel.psum`), in the l2 norm, is
    what `.sensitivity(relation)` of the result says, so that a noise level is never typed twice:

    | neighbors | `rescale=False` | `rescale=True`, `Automatic` |
    | --- | --- | --- |
    | add or remove one example; replace one by a row that does not count | `C` | 1 |
    | replace one example by another | `2 C` | 2 |

    With a bound for each group of parameters, `C` is the root of the sum of their squares, and 1 becomes the root of
    the number of groups. It holds for a `loss_fn` that sees one example only: no batch statistics, no mixing of
    examples.

    | case | result |
    | --- | --- |
    | the gradient is zero | contributes zeros, no NaN |
    | `clip_norm = 0` | zeros |
    | `clip_norm = inf` | the sum of the gradients, unclipped (no finite sensitivity) |
    | the gradient has NaN or infinity, or its norm overflows float32 | that example contributes exactly 0 |
    | `mask` False | the row contributes exactly 0, whatever it holds |
    | no rows, or all masked | zeros |
    | bfloat16 or float16 leaves | norm, product, sum and result are float32: rounding could pass the bound |

    All methods give the same sum up to rounding; see `methods.py` for what each does. `'auto'` is the fastest: one
    backward pass, gradients of examples only where they are smaller than what they are made of, or where no formula
    spares them. Nothing needs to be known about the model: what is not a matrix product, a convolution or a table
    look-up has its gradients formed row by row, as `'vmap'` does for everything; `.plan(params, batch)` tells which. A
    value made of parameters alone (weight standardization, a mask, a product of factors) is taken as a layer's weight,
    and gradients of examples are brought through its derivative, exactly. `'two_pass'` and `'ghost'` need one bound for
    all and parameters of at least 32 bits, and round to the precision in which the loss uses the parameters. Gram
    matrices do not see gradients smaller than about 1e-19.

    Args:
      loss_fn: `loss_fn(params, example, key) -> scalar` for one example, without a batch axis.
      clip_norm: the bound `C` in [0, inf], a number or a traced scalar; or a tree of them with the top of the structure
        of `params` (a dict by the names of layers, say), each bounding what stands below it on its own; or `Automatic`.
        The same on all shards.
      rescale: divide the clipped gradients by `C`, so that their norm is at most 1 and the learning rate does not
        depend on `C`. Needs `0 < C < inf`.
      method: one of `METHODS`: `'auto'`, `'mixed'`, `'book_keeping'`, `'ghost'`, `'two_pass'`, `'vmap'`.
      microbatch: so many rows at a time, in a loop; None takes all at once. Bounds the memory, changes rounding only.

    Returns:
      `f(params, batch, mask, keys, axis_name=None) -> (grads, aux)`. `batch`: pytree of `[b, ...]`; `mask`: bool `[b]`
      or None for all; `keys`: one typed key for each row, or None; `axis_name`: as the executor gave it to the step.
      `grads`: the sum over the rows **of this shard** (so that microbatches can be added up first): pass it through
      `parallel.psum` once. `aux`: `norms` `[b]` before clipping and `losses` `[b]`, float32, zero where the mask is
      False; they are private data, and non-finite where the example's are.

    Raises:
      ValueError: if a bound is negative or NaN, or `rescale` is asked for with 0, infinity or `Automatic`.

    References:
      Abadi et al. 2016, Deep learning with differential privacy, algorithm 1, arXiv:1607.00133.
      De et al. 2022, Unlocking high-accuracy differentially private image classification through scale,
      arXiv:2204.13650 (`rescale`).
    """
    check.choice("method", method, METHODS)
    if microbatch is not None:
        check.whole("microbatch", microbatch)
    automatic = isinstance(clip_norm, Automatic)
    for bound in [] if automatic else jax.tree.leaves(clip_norm):
        known = check.concrete(bound)
        if known is not None and (known.ndim or not known >= 0):
            raise ValueError(
                f"clip_norm must be a number of at least 0; got {bound}. For a bound for each layer pass a dict of "
                "numbers by the names of the layers; 1.0 with rescale=True is a usual start."
            )
        if known is not None and rescale and not 0 < known < float("inf"):
            raise ValueError(
                f"clip_norm must be finite and greater than 0 with rescale=True; got {bound}. Drop rescale."
            )
    if automatic and rescale:
        raise ValueError("rescale must be False with Automatic, which is at most 1 by itself; got True. Drop rescale.")
    return Clipped(loss_fn, clip_norm, rescale, method, microbatch)


def mean_over_views(loss_fn: Callable) -> Callable:
    """Return the loss of an example that stands for several views of it: the mean of theirs, to be clipped once.

    Args:
      loss_fn: `loss_fn(params, view, key) -> scalar`.

    Returns:
      The same for an example whose leaves are `[K, ...]`, one entry for each view. The views' keys are split from the
      example's. Sensitivity and accounting are those of one view.

    References:
      De et al. 2022, arXiv:2204.13650, section 3.2 (augmentation multiplicity).
    """

    def loss(params, example, key):
        count = jax.tree.leaves(example)[0].shape[0]
        keys = None if key is None else jax.random.split(key, count)
        return jax.vmap(loss_fn, in_axes=(None, 0, 0))(params, example, keys).mean()

    return loss


@dataclass(frozen=True)
class AdaptiveBound:
    """A bound that follows a quantile of the norms: `C <- C exp(-rate (b - quantile))`, `b` the private share below C.

    The share comes from a count to which each example adds 1/2 or -1/2, so that its sensitivity is 1/2. It is a second
    release of private data in each step; `gradient_noise` tells how much more noise the gradient needs for it.

    Args:
      quantile: of the norms that C shall follow, in (0, 1); 0.5 as published.
      rate: of the geometric update; 0.2 as published.
      noise: standard deviation of the noise on the count; a twentieth of the expected batch size as published.
      expected: the expected batch size, which is public.
      bounds: least and greatest C.

    References:
      Andrew et al. 2021, Differentially private learning with adaptive clipping, arXiv:1905.03871, algorithm 1,
      theorem 1.
    """

    noise: float
    expected: float
    quantile: float = 0.5
    rate: float = 0.2
    bounds: tuple[float, float] = (1e-8, 1e8)

    def __post_init__(self):
        """Refuse impossible settings."""
        for name in ("expected", "rate"):
            check.positive(name, getattr(self, name))
        if not self.noise >= 0 or not 0 < self.quantile < 1:
            raise ValueError(
                f"noise must be at least 0 and quantile within (0, 1); got {self.noise} and {self.quantile}."
            )

    def update(
        self,
        clip_norm: Any,
        norms: Array,
        mask: Bool[Array, " b"] | None = None,
        *,
        draw: Callable[[], Any],
        axis_name: parallel.AxisName = None,
    ) -> Array:
        """Return the next bound.

        Args:
          clip_norm: the present bound, a scalar: the state.
          norms: `[b]` before clipping, as `clipped_grads` returns them; one that is not finite counts as above.
          mask: bool `[b]`, rows that count; None for all.
          draw: returns one number from the standard normal distribution, the same on all shards, from a key that is
            used for nothing else.
          axis_name: as the executor gave it to the step.

        Returns:
          The bound for the next step, a scalar.
        """
        side = jnp.where(norms <= clip_norm, 0.5, -0.5)  # not a number: above
        count = parallel.psum((side if mask is None else jnp.where(mask, side, 0)).sum(), axis_name)
        share = (count + self.noise * draw()) / self.expected + 0.5
        return jnp.clip(clip_norm * jnp.exp(-self.rate * (share - self.quantile)), *self.bounds)

    def gradient_noise(self, multiplier: float) -> float:
        """Return the noise multiplier of the gradient with which both releases cost what one with `multiplier` costs.

        Args:
          multiplier: z, which the accountant is told.

        Returns:
          `(z^-2 - (2 noise)^-2)^(-1/2)`, the count having sensitivity 1/2.

        Raises:
          ValueError: unless `2 noise > z`, since the count alone would cost more.
        """
        if multiplier == 0:
            return 0.0
        if not 2 * self.noise > multiplier:
            raise ValueError(
                f"noise on the count must exceed half the multiplier {multiplier}; got {self.noise}. "
                "A twentieth of the expected batch size is usual."
            )
        return (multiplier**-2 - (2 * self.noise) ** -2) ** -0.5


# --------------------------------------------------------------------------------------------------------- parts


def _groups(clip_norm: PyTree, params: PyTree) -> tuple[list[int], list]:
    """The group of each leaf of the parameters, and the bounds of the groups."""
    if isinstance(clip_norm, Automatic):
        return [0] * len(jax.tree.leaves(params)), [clip_norm]
    bounds, tree = jax.tree.flatten(clip_norm)
    try:
        below = tree.flatten_up_to(params)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"clip_norm must be a number or have the top of the structure of params; got {tree}. "
            f"Name every layer of {jax.tree.structure(params)}."
        ) from error
    return [group for group, part in enumerate(below) for _ in jax.tree.leaves(part)], bounds


def _combined(norms: list) -> Array:
    """The norm `[b]` over several parts; the squares of small norms do not underflow."""
    stacked = jnp.stack([n.astype(jnp.float32) for n in norms])
    top = stacked.max(0)
    unit = jnp.where((top > 0) & (top < 1), top, 1)
    return unit * jnp.sqrt(jnp.square(stacked / unit[None]).sum(0))


def _in_parts(part: Callable, batch, mask, keys, size: int, rows: int, like: PyTree) -> tuple[PyTree, dict]:
    """Add up parts of the batch in a loop; the last is filled with rows that do not count."""
    count = -(-size // rows)
    mask = jnp.ones(size, bool) if mask is None else mask
    place = jnp.minimum(jnp.arange(count * rows), size - 1)
    real = (jnp.arange(count * rows) < size).reshape(count, rows)
    cut = jax.tree.map(lambda a: a[place].reshape(count, rows, *a.shape[1:]), (batch, mask, keys))
    zeros = jax.tree.map(lambda a: jnp.zeros_like(a, jnp.promote_types(a.dtype, jnp.float32)), like)

    def body(sums, given):
        (batch, mask, keys), real = given
        more, shown = part(batch, mask & real, keys)
        return jax.tree.map(jnp.add, sums, more), shown

    sums, shown = lax.scan(body, zeros, (cut, real))
    return sums, jax.tree.map(lambda a: a.reshape(-1)[:size], shown)
