"""Normalization and noise layers whose behavior is chosen at the call, not stored in the network.

What lives here: batch normalization in the modes that robust training needs, group normalization, no normalization,
dropout, and `Call`, the settings of one call. What does not: networks (`nets.py`, `resnets.py`) and the door that
turns a module into a pure function (`adapt.py`).

How a mode reaches a layer: `adapt` rebuilds the module for each call and hands every layer one `Call` through
`configure`. So the layers are called as `layer(x)`, fit into any NNX container (also a user's own), and nothing
outlives the call. A layer that nobody configured behaves as in evaluation.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxadv.core import check

BN_MODES = ("eval", "train", "local")
"""`eval`: running statistics; `train`: batch statistics, running ones move; `local`: batch statistics, those stay."""


@dataclass(frozen=True)
class Call:
    """The settings of one call of a network; the fields are the keywords of `Trainable.apply`.

    Attributes:
      bn: one of `BN_MODES`.
      groups: number of groups that the (global) batch is cut into for batch statistics.
      axis_name: mapped axis (or tuple of axes) over which batch statistics are global; None for none.
      mask: bool `[b]`, rows that are False stay out of batch statistics; None for all rows.
      key: typed key of dropout; None switches dropout off.
      hints: what an objective tells the layers that ask for it, by name.
    """

    bn: str = "eval"
    groups: int = 1
    axis_name: Any = None
    mask: Any = None
    key: Any = None
    hints: Mapping[str, Any] = field(default_factory=dict)


class Layer(nnx.Module):
    """A layer that reads the settings of the call it takes part in from `self.call`."""

    call = Call()  # of the class, so that it is no part of a module's static graph


def configure(module: nnx.Module, call: Call) -> None:
    """Hand the settings of one call to every layer of a freshly merged module, flax's own layers included.

    Layers of this file take the whole `Call`. Of flax's own, every layer with `deterministic` is random only if there
    is a key, and `nnx.BatchNorm` follows `bn` and `axis_name`; it cannot leave rows out or work in groups.

    Args:
      module: a module that lives for this call only; it is changed in place.
      call: the settings.

    Raises:
      ValueError: if flax's `nnx.BatchNorm` is asked for masked or grouped batch statistics.
    """
    for _, part in list(nnx.iter_modules(module)):
        if isinstance(part, Layer):
            object.__setattr__(part, "call", call)
            continue
        if "deterministic" in vars(part):
            setattr(part, "deterministic", call.key is None)  # noqa: B010 (no attribute of Module)
        if isinstance(part, nnx.BatchNorm):
            part.use_running_average = call.bn == "eval"
            part.axis_name = call.axis_name
            if call.bn != "eval" and (call.groups > 1 or call.mask is not None):
                asked = f"bn_groups={call.groups}, mask {'given' if call.mask is not None else 'None'}"
                raise ValueError(
                    f"flax's nnx.BatchNorm must see whole, ungrouped batches in bn={call.bn!r}; got {asked}. "
                    "Use jaxadv.models.BatchNorm in its place, or full batches without mask and bn_groups=1."
                )


def _columns(vector, ndim: int):
    """Reshape `[c]` to `[1, ..., 1, c]`."""
    return vector.reshape((1,) * (ndim - 1) + (-1,))


class BatchNorm(Layer):
    """Batch normalization over all axes but the last.

    Statistics are computed and kept in float32 whatever the dtype of `x`; the output has the dtype of `x`. With n
    values of a channel, the batch is normalized by the biased variance (divided by n), while the running variance
    takes the unbiased one (divided by n - 1), as PyTorch does; `unbiased=False` makes it take the biased one, as flax
    does. The choice shows only for tiny n.

    | `call` | effect |
    | --- | --- |
    | `groups=g` | contiguous groups of b/g rows, each normalized on its own; running statistics take their mean |
    | `axis_name` | statistics are those of the global batch; g counts its groups, none of which spans shards |
    | `mask` | masked rows weigh nothing; a group without any row does not touch the running statistics |

    Args:
      features: number of channels.
      momentum: share of the old running statistics in the new ones; 0.9 is PyTorch's 0.1.
      eps: added to the variance.
      unbiased: which variance the running statistics take.

    References:
      Ioffe and Szegedy 2015, Batch normalization, arXiv:1502.03167. Groups: Hoffer et al. 2017, Train longer,
      generalize better, arXiv:1705.08741, who call it ghost batch normalization.
    """

    def __init__(self, features: int, *, momentum: float = 0.9, eps: float = 1e-5, unbiased: bool = True):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.momentum, self.eps, self.unbiased = momentum, eps, unbiased

    def __call__(self, x):
        """Normalize `x` `[b, ..., c]` in the mode of the call."""
        z = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale, bias = (_columns(v[...].astype(z.dtype), x.ndim) for v in (self.scale, self.bias))
        if self.call.bn == "eval":
            mean, var = (_columns(v[...], x.ndim) for v in (self.mean, self.var))
            return ((z - mean) * lax.rsqrt(var + self.eps) * scale + bias).astype(x.dtype)
        groups = self._local_groups(x.shape[0])
        z = z.reshape(groups, x.shape[0] // groups, *x.shape[1:])
        mean, var, count = self._statistics(z)
        if self.call.bn == "train":
            self._update(mean, var, count)
        spread = (groups,) + (1,) * (x.ndim - 1) + (-1,)
        z = (z - mean.reshape(spread)) * lax.rsqrt(var.reshape(spread) + self.eps)
        return (z.reshape(x.shape) * scale + bias).astype(x.dtype)

    def _local_groups(self, rows: int) -> int:
        """Return how many of the groups lie on this shard."""
        groups, axis = self.call.groups, self.call.axis_name
        shards = 1 if axis is None or groups == 1 else lax.psum(1, axis)
        if groups % shards or rows % (groups // shards):
            raise ValueError(
                "bn_groups must cut each shard's rows into equal groups; "
                f"got bn_groups={groups} for {shards} shard(s) of {rows} rows. "
                "Choose bn_groups as a multiple of the number of shards that divides the global batch."
            )
        return groups // shards

    def _total(self, value, grouped: bool):
        """Sum over shards where a quantity belongs to all of them."""
        spans = self.call.axis_name is not None and (self.call.groups > 1) == grouped
        return lax.psum(value, self.call.axis_name) if spans else value

    def _statistics(self, z):
        """Return mean `[g, c]`, biased variance `[g, c]` and count of values `[g]` for `z` `[g, rows, ..., c]`."""
        groups, rows = z.shape[:2]
        axes, each = tuple(range(1, z.ndim - 1)), math.prod(z.shape[2:-1])
        mask = self.call.mask
        keep = jnp.ones((groups, rows), bool) if mask is None else mask.reshape(groups, rows)
        count = self._total(keep.sum(1).astype(z.dtype), grouped=False) * each
        known = jnp.maximum(count, 1)[:, None]
        keep = keep.reshape(groups, rows, *(1,) * (z.ndim - 2))
        mean = self._total(jnp.where(keep, z, 0).sum(axes), grouped=False) / known
        center = mean.reshape(groups, *(1,) * (z.ndim - 2), -1)
        var = self._total(jnp.where(keep, jnp.square(z - center), 0).sum(axes), grouped=False) / known
        return mean, var, count

    def _update(self, mean, var, count) -> None:
        """Move the running statistics towards the mean over the groups that hold any row."""
        mean, var = lax.stop_gradient((mean, var))
        if self.unbiased:
            var = var * (count / jnp.maximum(count - 1, 1))[:, None]
        alive = (count > 0).astype(mean.dtype)
        groups = self._total(alive.sum(), grouped=True)
        for old, new in ((self.mean, mean), (self.var, var)):
            new = self._total((new * alive[:, None]).sum(0), grouped=True) / jnp.maximum(groups, 1)
            moved = self.momentum * old[...] + (1 - self.momentum) * new
            old[...] = jnp.where(groups > 0, moved, old[...]).astype(old[...].dtype)


def _even(groups: int, channels: int) -> int:
    """The largest number of groups of one size that is not above the one asked for."""
    return max(g for g in range(1, min(groups, channels) + 1) if channels % g == 0)


def group_norm(x: Any, scale: Any, bias: Any, *, groups: int, eps: float = 1e-5) -> Any:
    """Normalize each row over space and the channels of a group: `GroupNorm` as a function of its arrays.

    Args:
      x: `[b, ..., c]`.
      scale: `[c]`.
      bias: `[c]`.
      groups: the largest divisor of c that is not above this is used.
      eps: added to the variance.

    Returns:
      An array like `x`; computed in float32 at least.
    """
    z = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    channels = x.shape[-1]
    z = z.reshape(x.shape[0], -1, channels)
    groups = _even(groups, channels)
    same = jnp.kron(jnp.eye(groups, dtype=z.dtype), jnp.full((channels // groups,) * 2, groups / channels, z.dtype))

    def mean(values):  # over space first, then over the channels of a group: on CPU sums along rows of memory are fast
        return jnp.matmul(values.mean(1), same, precision=lax.Precision.HIGHEST)[:, None]

    scale, bias = (_columns(v.astype(z.dtype), 3) for v in (scale, bias))
    center = z - mean(z)
    z = center * (lax.rsqrt(mean(jnp.square(center)) + eps) * scale) + bias
    return z.reshape(x.shape).astype(x.dtype)


class GroupNorm(Layer):
    """Group normalization: each example on its own, over space and the channels of a group. No state; fit for DP.

    Args:
      features: number of channels.
      groups: the largest divisor of `features` that is not above this is used (16, the default, is that of De et al.).
      eps: added to the variance.

    References:
      Wu and He 2018, Group normalization, arXiv:1803.08494; De et al. 2022, arXiv:2204.13650.
    """

    def __init__(self, features: int, *, groups: int = 16, eps: float = 1e-5):
        check.whole("groups", groups)
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.groups, self.eps = _even(groups, features), eps

    def __call__(self, x):
        """Normalize each row of `x` `[b, ..., c]`."""
        return group_norm(x, self.scale[...], self.bias[...], groups=self.groups, eps=self.eps)


class NoNorm(Layer):
    """The identity, in the place of a normalization."""

    def __call__(self, x):
        """Return `x`."""
        return x


class Dropout(Layer):
    """Dropout whose randomness belongs to the row of the global batch, so every executor drops the same values.

    Active if and only if the call has a key. Inside a mapped axis the rows of shard s are counted from s times the
    rows of a shard.

    Args:
      rate: probability that a value is dropped, in [0, 1).
      tag: number of this layer in its network; different layers drop independently.
    """

    def __init__(self, rate: float, tag: int = 0):
        if not 0 <= rate < 1:
            raise ValueError(f"dropout must be a probability in [0, 1); got {rate}. Use 0 for none.")
        self.rate, self.tag = rate, tag

    def __call__(self, x):
        """Drop values of `x` `[b, ...]` and scale the others by 1 / (1 - rate)."""
        if self.call.key is None or self.rate == 0:
            return x
        first = 0 if self.call.axis_name is None else lax.axis_index(self.call.axis_name) * x.shape[0]
        key = jax.random.fold_in(self.call.key, self.tag)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(x.shape[0]))
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


NORMS = {"batch": BatchNorm, "group": GroupNorm, "none": lambda features: NoNorm()}
"""Name of a normalization to its builder, which takes the number of channels."""
