"""The pure part of training: a state, one step, and the seams between objective, gradient, averages and precision.

What lives here: `TrainState`, `grad_fn` (objective to summed gradients and count), gradient accumulation, the step that
every executor compiles, verdicts on a batch, the collapse rule. What does not: anything with a host side (`driver.py`),
files (`checkpoint.py`, `record.py`), or robustness (`objectives.py`).

Two rules: sums and counts are added over shards and divided once; randomness is `fold_in(key, step)`, then the dataset
index. Hence a step does not depend on the number of devices, on padding, or on when a run was interrupted.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxadv import parallel
from jaxadv.core import (
    Attack,
    Objective,
    PyTree,
    Trainable,
    canonical,
    check,
    example_keys,
    rematerialized,
    robust,
    rows,
)
from jaxadv.train.objectives import frozen

PRECISIONS = {"float32": None, "bfloat16": jnp.bfloat16}
"""Name to the dtype that parameters and inputs are cast to inside the network; None leaves them."""


class TrainState(NamedTuple):
    """Everything that the next step needs, and all that a checkpoint holds.

    Attributes:
      step: int32 number of updates done.
      key: typed key of the run; step t uses `fold_in(key, t)`.
      params: float32 parameters.
      state: other variables of the network (running statistics).
      opt_state: of the optax optimizer.
      ema: average of the parameters, or None.
      carry: what gradient functions such as `free` keep for each row of a batch from step to step, `[batch_size, ...]`,
        or None. Every device holds all of it; row i belongs to place i of the global batch.
    """

    step: Any
    key: Any
    params: PyTree
    state: PyTree
    opt_state: PyTree
    ema: PyTree
    carry: PyTree = None


class Gradient(NamedTuple):
    """What a gradient function returns: sums over the rows of one shard, never means.

    Attributes:
      total: summed gradients, a pytree as the parameters.
      count: float32 number of rows that are not padding.
      state: the network's other variables after the pass.
      sums: name to the sum over rows of a metric; `loss` among them.
      carry: what the local rows hand on to the next step, or None; they were given theirs as `batch["carry"]`.
    """

    total: PyTree
    count: Any
    state: PyTree
    sums: dict[str, Any]
    carry: PyTree = None


def purpose(key, name: str):
    """Derive a key for a purpose.

    Args:
      key: a typed key.
      name: the purpose; different names give independent keys.

    Returns:
      The key.
    """
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _cast(tree: PyTree, dtype) -> PyTree:
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(jnp.result_type(a), jnp.floating) else a, tree)


def in_precision(apply: Callable, precision: str = "float32", bn_groups: int = 1) -> Callable:
    """Let a network compute in another precision; parameters, statistics and logits stay float32.

    Args:
      apply: of a `Trainable`.
      precision: one of `PRECISIONS`.
      bn_groups: number of groups of the batch that batch statistics are taken over.

    Returns:
      An `apply` that casts parameters and inputs on the way in and logits and state on the way out.

    Raises:
      ValueError: if the precision is unknown.
    """
    dtype = check.choice("precision", precision, PRECISIONS)

    def applied(params, state, x, *, bn="eval", **settings):
        if bn != "eval" and bn_groups != 1:
            settings["bn_groups"] = bn_groups
        if dtype is None:
            return apply(params, state, x, bn=bn, **settings)
        out, new = apply(_cast(params, dtype), state, x.astype(dtype), bn=bn, **settings)
        return _cast(out, jnp.float32), jax.tree.map(lambda a, b: a.astype(jnp.result_type(b)), new, state)

    return applied


def bind(apply: Callable, mask, axis_name) -> Callable:
    """Tell batch norm about padding and shards, where it looks at the batch at all.

    Padding rows are normalized with the statistics of the others, so their logits are cut off from the gradient: else
    an attack that sums its loss over all rows would move real rows on behalf of padding.

    Args:
      apply: of a `Trainable`.
      mask: bool `[b]`, False where a row is padding.
      axis_name: the mapped axis of the executor, or None.

    Returns:
      `apply(params, state, x, *, bn, key, taps, hints)` as objectives call it.
    """

    def bound(params, state, x, *, bn="eval", key=None, **settings):
        if bn == "eval":
            return apply(params, state, x, bn=bn, key=key, **settings)
        out, new = apply(params, state, x, bn=bn, key=key, mask=mask, axis_name=axis_name, **settings)
        return rows.select(mask, out, lax.stop_gradient(out)), new

    return bound


def summed(objective: Objective, apply, params, state, batch, key, axis_name=None):
    """Sum an objective over the local rows that are not padding: what gradient functions differentiate.

    Args:
      objective: per-example losses; see `core.Objective`.
      apply: of a `Trainable`.
      params: the parameters, marked as varying over the mapped axis.
      state: the network's other variables.
      batch: the local rows.
      key: of the step.
      axis_name: the mapped axis of the executor, or None.

    Returns:
      (summed loss, (new state, summed metrics with the loss)).

    Raises:
      ValueError: if the objective does not return one loss for each row.
    """
    mask = batch["mask"]
    losses, (new, metrics) = objective(bind(apply, mask, axis_name), params, state, batch, key)
    if losses.shape != mask.shape:
        raise ValueError(
            f"an objective must return one loss for each of the {mask.shape[0]} rows; "
            f"got shape {losses.shape}. Leave out the mean: the trainer divides by the number of rows."
        )
    sums = {name: jnp.sum(jnp.where(mask, value, 0)) for name, value in {"loss": losses, **metrics}.items()}
    return sums["loss"], (new, sums)


def counted(mask):
    """Count the rows that are not padding.

    Args:
      mask: bool `[b]`.

    Returns:
      float32 scalar.
    """
    return jnp.sum(mask.astype(jnp.float32))


def grad_fn(objective: Objective) -> Callable[..., Gradient]:
    """Turn an objective into a function that gives summed gradients and a count: the trainer's seam.

    Other ways to a gradient (private, weight-perturbed) are functions of the same form.

    Args:
      objective: per-example losses; see `core.Objective`.

    Returns:
      `gradient(apply, params, state, batch, key, *, axis_name=None) -> Gradient`, sums over the local rows whose `mask`
      is True. The parameters are marked as varying over the mapped axis before they are differentiated, so that under
      `shard_map` the gradient is that of the local rows, too.
    """

    def gradient(apply, params, state, batch, key, *, axis_name=None) -> Gradient:
        def total(params):
            return summed(objective, apply, params, state, batch, key, axis_name)

        grads, (new, sums) = jax.grad(total, has_aux=True)(parallel.varying(params, axis_name))
        return Gradient(grads, counted(batch["mask"]), new, sums)

    return gradient


def accumulated(gradient: Callable[..., Gradient], parts: int) -> Callable[..., Gradient]:
    """Compute a gradient in several parts of the batch, one after another, to save memory.

    Without batch statistics the sums are those of the whole batch, to rounding; batch norm takes its statistics in each
    part.

    Args:
      gradient: as `grad_fn` returns it.
      parts: number of parts; each shard's rows must divide into them. 1 changes nothing.

    Returns:
      A function of the same form.

    Raises:
      ValueError: if `parts` is not positive; when called, if it does not divide the rows.
    """
    check.whole("accumulate", parts)
    if parts == 1:
        return gradient

    def whole(apply, params, state, batch, key, *, axis_name=None) -> Gradient:
        rows = batch["mask"].shape[0]
        if rows % parts:
            raise ValueError(
                f"accumulate must divide the {rows} rows of a shard; got {parts}. Change batch_size or accumulate."
            )

        def split(a):  # every shard keeps a share of every part
            return jnp.swapaxes(a.reshape(rows // parts, parts, *a.shape[1:]), 0, 1)

        def one(params, state, part, key):
            return gradient(apply, params, state, part, key, axis_name=axis_name)

        micro = jax.tree.map(split, batch)
        first = jax.tree.map(lambda a: a[0], micro)
        shapes = jax.eval_shape(one, params, state, first, key)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (shapes.total, shapes.count, shapes.sums))
        sums = parallel.varying(zeros, axis_name)

        def body(carry, part):
            state, sums = carry
            got = one(params, state, part, key)
            return (got.state, jax.tree.map(jnp.add, sums, (got.total, got.count, got.sums))), got.carry

        (state, (total, count, metrics)), carry = lax.scan(body, (state, sums), micro)
        carry = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).reshape(rows, *a.shape[2:]), carry)
        return Gradient(total, count, state, metrics, carry)

    return whole


def averaged(ema: PyTree, params: PyTree, step, decay: float, warmup: bool) -> PyTree:
    """Move an average of the parameters one step.

    Args:
      ema: the average so far.
      params: the new parameters.
      step: number of updates done before this one.
      decay: weight of the old average.
      warmup: use `min(decay, (1 + t) / (10 + t))`, so that the start is forgotten soon.

    Returns:
      `d * ema + (1 - d) * params`.

    References:
      The warm-up is that of Gowal et al. 2020, arXiv:2010.03593, and of De et al. 2022, arXiv:2204.13650.
    """
    t = jnp.asarray(step, jnp.float32)
    d = jnp.minimum(decay, (1 + t) / (10 + t)) if warmup else jnp.float32(decay)
    return jax.tree.map(lambda a, p: (d * a + (1 - d) * p).astype(a.dtype), ema, params)


def _own(carry: PyTree, rows: int, axis_name) -> PyTree:
    """The part of what rows carry that belongs to this shard."""
    if axis_name is None:
        return carry
    first = parallel.axis_index(axis_name) * rows
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, rows), carry)


def _whole(carry: PyTree, like: PyTree, rows: int, axis_name) -> PyTree:
    """The parts of all shards, on every shard: a sum of what is zero elsewhere."""
    if axis_name is None:
        return carry
    first = parallel.axis_index(axis_name) * rows
    empty = parallel.varying(jax.tree.map(jnp.zeros_like, like), axis_name)
    placed = jax.tree.map(lambda a, part: lax.dynamic_update_slice_in_dim(a, part, first, 0), empty, carry)
    return parallel.psum(placed, axis_name)


def init(
    key, trainable: Trainable, optimizer: optax.GradientTransformation, *, ema: bool = False, carry: PyTree = None
) -> TrainState:
    """Return the state before the first step. It owns its buffers: nothing aliases the trainable or another leaf.

    Args:
      key: a typed key.
      trainable: the network.
      optimizer: any optax transformation.
      ema: whether an average of the parameters is kept.
      carry: what rows carry before the first step, see `TrainState`.

    Returns:
      The state at step 0.
    """
    fresh = TrainState(
        step=jnp.zeros((), jnp.int32),
        key=purpose(key, "train"),
        params=trainable.params,
        state=trainable.state,
        opt_state=optimizer.init(trainable.params),
        ema=trainable.params if ema else None,
        carry=carry,
    )
    return copy(fresh)


def trained(trainable: Trainable, state: TrainState) -> Trainable:
    """Return the network with the weights of a training state: the average where one was kept.

    Args:
      trainable: the network that was given to training.
      state: what `fit` returned.

    Returns:
      The network to evaluate (`models.model`) or to save (`models.save`).
    """
    params = state.params if state.ema is None else state.ema
    return trainable._replace(params=params, state=state.state)


def copy(state: PyTree) -> PyTree:
    """Copy every leaf, so that donating one state does not delete the other.

    Args:
      state: a pytree of arrays.

    Returns:
      The same values in buffers of their own.
    """
    return parallel.replicate(state)


def make_step(
    apply: Callable,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    gradient: Callable[[Objective], Callable[..., Gradient]] = grad_fn,
    accumulate: int = 1,
    precision: str = "float32",
    bn_groups: int = 1,
    ema: float | None = None,
    ema_warmup: bool = True,
    augment: Callable | None = None,
    replays: int = 1,
    remat: bool = False,
    divisor: float | None = None,
) -> Callable:
    """Build the step of training, a pure function of one shard that every executor can compile.

    Args:
      apply: of a `Trainable`.
      objective: what to minimize.
      optimizer: any optax transformation; it gets the mean gradient over all rows of all shards.
      gradient: objective to gradient function.
      accumulate: see `accumulated`.
      precision: see `in_precision`.
      bn_groups: see `in_precision`.
      ema: decay of the average of the parameters, in (0, 1); None keeps none.
      ema_warmup: see `averaged`.
      augment: `(key, x) -> x` for ONE example, drawn anew at every step, or for every minibatch that is replayed.
      replays: number of steps in a row that get the same minibatch.
      remat: whether backward passes keep only what blocks hand on; see `core.rematerialized`.
      divisor: what summed gradients are divided by; None is the number of rows that are not padding. Private training
        divides by the expected number, which is public.

    Returns:
      `step(state, batch, *, axis_name=None) -> (state, metrics)`; metrics are means over all rows, and `gradient_norm`.

    Raises:
      ValueError: on unknown or impossible settings.
    """
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"ema must be a decay between 0 and 1; got {ema}. 0.999 is usual; None keeps no average.")
    applied = in_precision(rematerialized(apply) if remat else apply, precision, bn_groups)
    compute = accumulated(gradient(objective), accumulate)

    def step(state: TrainState, batch, *, axis_name=None):
        key = jax.random.fold_in(state.key, state.step)
        batch = batch | {"step": jnp.broadcast_to(state.step, batch["mask"].shape)}
        if augment is not None:
            drawn = key if replays == 1 else jax.random.fold_in(state.key, state.step // replays * replays)
            batch = batch | {"x": jax.vmap(augment)(example_keys(drawn, "augment", batch["index"]), batch["x"])}
        count = batch["mask"].shape[0]
        if state.carry is not None:
            batch = batch | {"carry": _own(state.carry, count, axis_name)}

        def gradients(params, state, batch):
            return compute(applied, params, state, batch, key, axis_name=axis_name)

        got = canonical(gradients)(state.params, state.state, batch)
        carry = None if got.carry is None else _whole(got.carry, state.carry, count, axis_name)
        total, alive, sums = parallel.psum((got.total, got.count, got.sums), axis_name)
        rows = jnp.maximum(alive, 1)
        over = rows if divisor is None else divisor
        grads = jax.tree.map(lambda g: g / over, total)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = None if ema is None else averaged(state.ema, params, state.step, ema, ema_warmup)
        metrics = {name: value / rows for name, value in sums.items()} | {"gradient_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, state.key, params, got.state, opt_state, average, carry), metrics

    return step


class Judged(NamedTuple):
    """What a verdict needs of a network: parameters, other variables, and the key of the attack."""

    params: PyTree
    state: PyTree
    key: Any


def make_judge(apply: Callable, attack: Attack) -> Callable:
    """Build a step that counts correct and robust rows of a batch, in float32 with running statistics.

    Args:
      apply: of a `Trainable`.
      attack: decides which rows are robust.

    Returns:
      `judge(judged, batch, *, axis_name=None) -> (judged, counts)` with counts `clean`, `robust` and `count`; a row is
      robust if it is classified correctly and the attack fails.
    """

    def judge(judged: Judged, batch, *, axis_name=None):
        model = frozen(apply, judged.params, judged.state)
        found = attack.run(judged.key, model, batch["x"], batch["y"], index=batch["index"])
        clean = robust(model(batch["x"]), batch["y"])
        rows = {"clean": clean, "robust": clean & ~found.success, "count": jnp.ones_like(clean)}
        return judged, parallel.psum({k: jnp.sum(v & batch["mask"]) for k, v in rows.items()}, axis_name)

    return judge


def co_detector(acc_prev: float, acc_now: float, threshold: float = 0.2) -> bool:
    """Tell whether training has collapsed: the robust accuracy on training data fell by more than a threshold.

    Args:
      acc_prev: robust accuracy before, as a fraction.
      acc_now: robust accuracy now.
      threshold: the largest fall that counts as noise.

    Returns:
      True if it fell by more.

    References:
      Wong, Rice and Kolter 2020, Fast is better than free, arXiv:2001.03994, section 5 (catastrophic overfitting).
    """
    return bool(acc_prev - acc_now > threshold)
