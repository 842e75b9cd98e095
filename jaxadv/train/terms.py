"""What is put around any objective: penalties on gradients, Jacobians and weights, masked inputs, soft or mixed labels.

What lives here: `plus`, the terms, GradAlign as their wiring, pixel masking, label smoothing of chosen rows, CutMix.
What does not: objectives of the logits alone (`regularized.py`).

A term is `(apply, params, state, batch, key) -> [b]` and leaves running statistics alone. Like a loss it belongs to
examples and is never averaged here; a penalty on weights is the same for each row.

Soft labels: a batch may hold probabilities as `target` float `[b, k]`. The search still sees integer labels as `y`, of
the class with the largest probability, so any attack works (one guided by `objectives.targets` follows the
probabilities); the loss sees the probabilities as `y`, so objectives built on the cross-entropy to `y` can be wrapped:
`standard`, `pgd_at` and its wirings, `trades`, `advlc`. Others need integer labels.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import losses
from jaxadv.core import Objective, PyTree, Threat, check, example_keys, rows
from jaxadv.train.augment import box
from jaxadv.train.objectives import Adversarial, check_smoothing, fgsm_at, halves
from jaxadv.train.perturbed import kernels
from jaxadv.train.regularized import partners


def _sum(apply, params, state, batch, key, *, loss, term, weight, name):
    values, (new, metrics) = loss(apply, params, state, batch, key)
    extra = term(apply, params, state, batch, key)
    return values + weight * extra, (new, metrics | {name: extra})


def plus(objective: Objective, term: Callable, weight: float, *, name: str = "penalty") -> Adversarial:
    """Add a term to the loss of an objective.

    Args:
      objective: any.
      term: `(apply, params, state, batch, key) -> [b]`; `batch` holds what the objective's search found as `found`.
      weight: factor of the term; 0 leaves the objective as it is.
      name: of the metric that reports the term, unweighted.

    Returns:
      The objective.

    Raises:
      ValueError: if `weight` is negative.
    """
    if weight:
        check.positive("weight", weight, "0 leaves the term out.")
    find, loss = halves(objective)
    return Adversarial(find, partial(_sum, loss=loss, term=term, weight=weight, name=name) if weight else loss)


def input_gradient(apply, params, state, x, batch, bn: str):
    """Return the gradient of the cross-entropy at some points, row by row; differentiable.

    Args:
      apply: of a `Trainable`.
      params: its parameters.
      state: its state.
      x: `[b, ...]` the points.
      batch: with the labels `y`.
      bn: batch norm, `'local'` or `'eval'`.

    Returns:
      `[b, ...]`.
    """

    def total(x):
        return jnp.sum(losses.cross_entropy(apply(params, state, x, bn=bn)[0], batch["y"]))

    return jax.grad(total)(x)


def _unit(a):
    """Rows of length one, zero rows as they are, and which rows are not zero; no NaN in any derivative."""
    a = rows.flat(a)
    top = lax.stop_gradient(jnp.max(jnp.abs(a), axis=-1, keepdims=True))
    alive = top > 0
    a = jnp.where(alive, a / jnp.where(alive, top, 1), 1)
    return a / jnp.sqrt(jnp.sum(jnp.square(a), axis=-1, keepdims=True)), alive[:, 0]


def _anywhere(threat, keys, x):
    return dataclasses.replace(threat, bounds=(-jnp.inf, jnp.inf)).sample(keys, x)


def _alignment(apply, params, state, batch, key, *, threat, start, bn):
    near = start(threat, example_keys(key, "alignment", batch["index"]), batch["x"])
    first, some = _unit(lax.stop_gradient(input_gradient(apply, params, state, batch["x"], batch, bn)))
    second, more = _unit(input_gradient(apply, params, state, near, batch, bn))
    return jnp.where(some & more, 1 - jnp.sum(first * second, axis=-1), 0)


def alignment(threat: Threat, *, start: Callable = _anywhere, bn: str = "local") -> Callable:
    """Return the term that asks the input gradients at an example and near it to point the same way.

    `1 - cos(∇CE(f(x), y), ∇CE(f(x + η), y))`; only the second gradient is differentiated.

    | case | result |
    | --- | --- |
    | the model is linear in `x`, two classes | 0 |
    | one of the gradients is zero | 0 for that row |

    Args:
      threat: where η comes from.
      start: `(threat, keys, x) -> x + η`; by default random in the threat and not cut to the bounds, as published.
      bn: batch norm, `'local'` (as published) or `'eval'`.

    Returns:
      The term, in [0, 2].

    References:
      Andriushchenko and Flammarion 2020, Understanding and improving fast adversarial training, arXiv:2007.02617, eq.
      5. The authors average over the rows whose gradients are not zero; here those rows count with 0.
    """
    check.choice("bn", bn, ("local", "eval"))
    return partial(_alignment, threat=threat, start=start, bn=bn)


def grad_align(threat: Threat, *, weight: float | None = None, bn_attack: str = "local", **axes: Any) -> Adversarial:
    """GradAlign: FGSM training that keeps input gradients aligned, which holds off catastrophic overfitting.

    Args:
      threat: linf, with its budget.
      weight: of the term; None is the authors' rule for CIFAR-10, `0.02 * 10^(eps * 255 / 8)`: 0.2 at 8/255, 2 at
        16/255.
      bn_attack: batch norm of the attack and of the term, which does not move running statistics (the authors' does).
      **axes: further arguments of `fgsm_at`.

    Returns:
      The objective; metrics `robust` and `misalignment`.

    Raises:
      ValueError: if `weight` is negative, or not given for a budget above 16/255.

    References:
      Andriushchenko and Flammarion 2020, arXiv:2007.02617; code tml-epfl/understanding-fast-adv-training. The authors
      take the gradient at `x` from the attack; here it is written twice and left to the compiler.
    """
    if weight is None and not threat.eps <= 0.07:
        raise ValueError(
            f"weight must be given for budgets above 16/255, where the authors' rule ends; got eps {threat.eps}. "
            "0.2 is usual at 8/255 on CIFAR-10."
        )
    share = float(0.02 * 10 ** (threat.eps * 255 / 8)) if weight is None else weight
    base = fgsm_at(threat, bn_attack=bn_attack, **axes)
    seen = "local" if bn_attack == "train" else bn_attack  # terms leave running statistics alone
    return plus(base, alignment(threat, bn=seen), share, name="misalignment")


def _jacobian(apply, params, state, batch, key, *, projections, bn):
    def forward(x):
        return apply(params, state, x, bn=bn)[0]

    logits, pull = jax.vjp(forward, batch["x"])
    classes = logits.shape[-1]
    if projections is None:
        eye = jnp.eye(classes, dtype=logits.dtype)
        draws = [jnp.broadcast_to(eye[k], logits.shape) for k in range(classes)]
        scale = 1.0
    else:
        keys = example_keys(key, "jacobian", batch["index"])
        number = range(projections)
        normal = [
            jax.vmap(lambda k, i=i: jax.random.normal(jax.random.fold_in(k, i), (classes,)))(keys) for i in number
        ]
        draws = [(v / jnp.linalg.norm(v, axis=-1, keepdims=True)).astype(logits.dtype) for v in normal]
        scale = classes / projections
    return scale * sum(jnp.sum(jnp.square(rows.flat(pull(v)[0])), axis=-1) for v in draws)


def jacobian(*, projections: int | None = 1, bn: str = "local") -> Callable:
    """Return the term `||∂z / ∂x||_F^2`, the squared norm of the Jacobian of the logits at the examples.

    Args:
      projections: random directions of an unbiased estimate, `K / n sum ||∂(v . z) / ∂x||^2` with v uniform on the
        sphere; None computes it exactly with one gradient for each class.
      bn: batch norm, `'local'` or `'eval'`.

    Returns:
      The term, at least 0, in units of logits squared per units of `x` squared.

    Raises:
      ValueError: if `projections` is not positive.

    References:
      Hoffman, Roberts and Yaida 2019, Robust learning with Jacobian regularization, arXiv:1908.02729, algorithm 1. The
      first part of J-SIGR (Liu et al. 2022, arXiv:2207.13036) is this term.
    """
    if projections is not None:
        check.whole("projections", projections)
    check.choice("bn", bn, ("local", "eval"))
    return partial(_jacobian, projections=projections, bn=bn)


def _of_weights(apply, params, state, batch, key, *, penalty):
    del apply, state, key
    return jnp.broadcast_to(penalty(params), batch["mask"].shape)


def of_weights(penalty: Callable) -> Callable:
    """Return the term that is a number of the parameters, the same for each row; its mean over rows is that number.

    Args:
      penalty: `params -> scalar`.

    Returns:
      The term.
    """
    return partial(_of_weights, penalty=penalty)


def hoyer(a):
    """Return Hoyer's sparseness `(√n - ||a||_1 / ||a||_2) / (√n - 1)`, free of scale.

    Args:
      a: an array of n > 1 entries.

    Returns:
      1 for a single nonzero entry, 0 where all are of one size (and for zeros), about 0.2 for Gaussian ones.
    """
    size = jnp.sqrt(jnp.sum(jnp.square(a)))
    root = math.sqrt(a.size)
    return jnp.where(size > 0, (root - jnp.sum(jnp.abs(a)) / jnp.where(size > 0, size, 1)) / (root - 1), 0)


def minmax(params: PyTree, select: Callable = kernels) -> Any:
    """Return minus the sum of `hoyer` over kernels: a penalty that asks for few large weights among many small ones.

    Args:
      params: the parameters.
      select: `(path, leaf) -> bool`, which tensors count.

    Returns:
      A scalar, at most 0; give it to `of_weights`.

    References:
      The Min-Max property of Shen et al. 2021, Adversarial learning with cost-sensitive classes, arXiv:2101.12372; we
      read the abstract only, and the measure is ours.
    """
    chosen = [a for path, a in jax.tree_util.tree_leaves_with_path(params) if select(path, a)]
    return -sum(hoyer(a) for a in chosen)


def _seen(apply, batch, key, ratio):
    """The network behind a mask: `ratio` of the pixels of each example are zero whatever the point."""
    shape = (*batch["x"].shape[1:-1], 1) if batch["x"].ndim > 2 else batch["x"].shape[1:]
    keys = example_keys(key, "mask", batch["index"])
    keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - ratio, shape))(keys)

    def masked(params, state, x, **settings):
        return apply(params, state, jnp.where(keep, x, 0), **settings)

    return masked


def _masked_find(apply, params, state, batch, key, *, find, ratio):
    return find(_seen(apply, batch, key, ratio), params, state, batch, key)


def _masked_loss(apply, params, state, batch, key, *, loss, ratio):
    return loss(_seen(apply, batch, key, ratio), params, state, batch, key)


def masked(objective: Objective, ratio: float = 0.4) -> Adversarial:
    """Hide a random share of the pixels of each example from the network, in the search and in the loss.

    One of the tricks that keep FGSM training from collapsing: `masked(fgsm_at(threat))`.

    Args:
      objective: any that asks for logits row by row.
      ratio: probability that a pixel with all its channels (or a feature, where there are no images) is zero; drawn
        anew at every step.

    Returns:
      The objective.

    Raises:
      ValueError: if `ratio` is outside [0, 1].

    References:
      Li et al. 2022, Bag of tricks for FGSM adversarial training, arXiv:2209.02684 (the share is ours).
    """
    check.fraction("ratio", ratio)
    find, loss = halves(objective)
    return Adversarial(partial(_masked_find, find=find, ratio=ratio), partial(_masked_loss, loss=loss, ratio=ratio))


def _aimed_find(apply, params, state, batch, key, *, find, aim):
    return find(apply, params, state, aim(batch, key), key)


def _aimed_loss(apply, params, state, batch, key, *, loss):
    if "target" not in batch:
        raise ValueError(
            "soft labels are made in the search of an objective; got a batch without target. A gradient function that "
            "skips the search (train.free)? Use one that runs it."
        )
    return loss(apply, params, state, batch | {"y": batch["target"]}, key)


def _aimed(objective: Objective, aim: Callable) -> Adversarial:
    """Let `aim`, `(batch, key) -> batch` with a target, come before the search."""
    find, loss = halves(objective)
    return Adversarial(partial(_aimed_find, find=find, aim=aim), partial(_aimed_loss, loss=loss))


def _target(batch, classes):
    """The probabilities that a batch is learned with."""
    return batch["target"] if "target" in batch else jax.nn.one_hot(batch["y"], classes, dtype=batch["x"].dtype)


def _soft(batch, key, *, classes, smoothing, since):
    del key
    share = jnp.where(batch["index"] >= since, smoothing, 0.0).astype(batch["x"].dtype)[:, None]
    return batch | {"target": (1 - share) * _target(batch, classes) + share / classes}


def softened(objective: Objective, classes: int, smoothing: float = 0.1, *, since: int = 0) -> Objective:
    """Smooth the labels of some rows: of generated data, say, whose labels were guessed.

    | case | result |
    | --- | --- |
    | `smoothing = 0` | the objective itself |
    | `since = 0` | all rows, as `label_smoothing` of the objectives does |

    Args:
      objective: one that takes probabilities in the place of labels; see the module.
      classes: number of classes.
      smoothing: weight of the uniform distribution, in [0, 1).
      since: dataset index from which on rows are smoothed; that of a `data.blend` is its attribute `since`.

    Returns:
      The objective.

    Raises:
      ValueError: on impossible settings.

    References:
      Gowal et al. 2020, Uncovering the limits of adversarial training, arXiv:2010.03593; code
      google-deepmind/deepmind-research, adversarial_robustness (0.1, on extra data only).
    """
    check.whole("classes", classes, least=2)
    check.whole("since", since, least=0)
    if not check_smoothing(smoothing):
        return objective
    return _aimed(objective, partial(_soft, classes=classes, smoothing=smoothing, since=since))


def _cut(batch, key, *, classes, share, shared):
    x, index = batch["x"], batch["index"]
    if x.ndim != 4:
        raise ValueError(f"cutmix must get images [b, h, w, c]; got x of shape {x.shape}. Leave it out for other data.")
    keys = example_keys(key, "box", index * 0 if shared else index)
    inside = jax.vmap(lambda k: box(k, *x.shape[1:3]))(keys)
    if share < 1:
        drawn = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 3), share))(keys)
        inside = inside & drawn[:, None, None]
    other = partners(example_keys(key, "partner", index), batch["mask"])
    own = 1 - jnp.mean(inside, axis=(1, 2), dtype=x.dtype)[:, None]
    target = _target(batch, classes)
    target = own * target + (1 - own) * target[other]
    y = jnp.argmax(target, axis=-1).astype(batch["y"].dtype)
    return batch | {"x": jnp.where(inside[..., None], x[other], x), "y": y, "target": target}


def cutmix(objective: Objective, classes: int, *, share: float = 1.0, shared: bool = False) -> Objective:
    """CutMix: put a box of another example into each, and mix their labels by what is seen of both.

    `x' = x` outside a box and `x_j` inside, `y' = λ y + (1 - λ) y_j`, λ the share of the image outside the box after it
    was cut at the borders (`augment.box`). The search starts from the mixed images, and every loss is taken at them.

    | case | result |
    | --- | --- |
    | `share = 0` | the objective itself |
    | a box of no pixels (λ = 1) | that row's loss, to rounding |
    | a single row | is its own partner: nothing changes |
    | private training | refuses it: a row's loss depends on another row |

    Args:
      objective: one that takes probabilities in the place of labels; see the module. For the attack to follow them
        too, give it the guide `objectives.targets` and the loss `objectives.minus_soft_cross_entropy`.
      classes: number of classes.
      share: probability that an example gets a box.
      shared: whether the rows of a step have one box for all, as published, or each its own.

    Returns:
      The objective; metrics count the class with the largest share.

    Raises:
      ValueError: on impossible settings; when called, if the examples are no images.

    References:
      Yun et al. 2019, CutMix, arXiv:1905.04899, algorithm A1; for adversarial training Rebuffi et al. 2021, Fixing data
      augmentation to improve adversarial robustness, arXiv:2103.01946. The authors draw a permutation, which may leave
      rows alone, for each of four parts of a batch; here the rows form one random cycle that does not depend on their
      order. Partners come from the same part of an accumulated batch, and under `shard_map`, `pmap` and `vmap` from the
      same shard.
    """
    check.whole("classes", classes, least=2)
    check.fraction("share", share)
    if not share:
        return objective
    return _aimed(objective, partial(_cut, classes=classes, share=share, shared=shared))
