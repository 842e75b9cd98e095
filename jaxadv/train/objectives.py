"""What training minimizes: pure functions from parameters and a batch to one loss for each example.

What lives here: `standard`, adversarial training (`pgd_at`) and its single-step wiring (`fgsm_rs`). What does not:
optimizers, averages and devices (`trainer.py`), and the attacks themselves.

An objective is `(apply, params, state, batch, key) -> (losses [b], (state, metrics))`. It never averages over the
batch: padding, devices and private training need the loss of each example. Its randomness belongs to examples: attacks
get the step's key and the dataset index, so the iterates do not depend on the order of rows or on the number of
devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import attacks, losses
from jaxadv.core import Attack, Model, Objective, Threat, check, robust

ATTACK_BN = ("eval", "local")
"""Batch norm inside the attack: running statistics, or those of the batch without updating the running ones."""


def frozen(apply, params, state, *, bn: str = "eval") -> Model:
    """Return the model as the attack sees it: constant parameters, so that only input gradients are computed.

    Args:
      apply: of a `Trainable`.
      params: its parameters.
      state: its state.
      bn: one of `ATTACK_BN`.

    Returns:
      Logits from a batch, as a callable pytree.
    """

    def forward(params, state, x):
        return apply(params, state, x, bn=bn)[0]

    return Model(forward, lax.stop_gradient(params), lax.stop_gradient(state))


def smoothed_cross_entropy(logits, y, smoothing: float):
    """Return the cross-entropy against labels that keep `1 - smoothing` and spread the rest over all classes.

    Args:
      logits: `[b, k]`.
      y: int `[b]`.
      smoothing: weight of the uniform distribution, in [0, 1); 0 is plain cross-entropy, to the bit.

    Returns:
      `[b]`.
    """
    plain = losses.cross_entropy(logits, y)
    if not smoothing:
        return plain
    return (1 - smoothing) * plain - smoothing * jax.nn.log_softmax(logits, axis=-1).mean(-1)


def _fit(apply, params, state, x, batch, key, bn: str, smoothing: float, metric: str):
    """The loss and verdict of each row at the given points; `key` feeds dropout, anew in each part of a batch."""
    noise = jax.random.fold_in(jax.random.fold_in(key, 1), batch["index"][0])
    logits, state = apply(params, state, x, bn=bn, key=noise)
    check.logits(logits, x.shape[0])
    loss = smoothed_cross_entropy(logits, batch["y"], smoothing)
    return loss, (state, {metric: robust(logits, batch["y"]).astype(jnp.float32)})


def _standard(apply, params, state, batch, key, *, bn, label_smoothing):
    return _fit(apply, params, state, batch["x"], batch, key, bn, label_smoothing, "clean")


def _pgd_at(apply, params, state, batch, key, *, attack, growth, bn_attack, bn, label_smoothing):
    model = frozen(apply, params, state, bn=bn_attack)
    if growth is not None:
        attack = attacks.scaled(attack, growth(batch["step"]))
    x = lax.stop_gradient(attack.run(key, model, batch["x"], batch["y"], index=batch["index"]).x)
    return _fit(apply, params, state, x, batch, key, bn, label_smoothing, "robust")


def _smoothing(value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1); got {value}. 0.1 is usual, 0 switches it off.")


def standard(*, bn: str = "train", label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy on the examples as they are.

    Args:
      bn: mode of batch norm, `'train'`, `'local'` or `'eval'`.
      label_smoothing: see `smoothed_cross_entropy`.

    Returns:
      The objective; metric `clean`, whether the example is classified correctly.

    Raises:
      ValueError: on a mode or a smoothing that does not exist.
    """
    check.choice("bn", bn, ("train", "local", "eval"))
    _smoothing(label_smoothing)
    return partial(_standard, bn=bn, label_smoothing=label_smoothing)


def pgd_at(
    attack: Attack,
    *,
    growth: Callable | None = None,
    bn_attack: str = "eval",
    bn: str = "train",
    label_smoothing: float = 0.0,
) -> Objective:
    """Adversarial training: cross-entropy at the points that an attack finds.

    min over the parameters of E[max over the threat of CE(f(x'), y)]; the maximum is whatever `attack` returns, held
    constant.

    Args:
      attack: finds the points; it sees frozen parameters.
      growth: number of the step (int `[b]`) to the share of budget and step size that the attack has there, above 0;
        `schedules.growth` rises linearly to 1. None attacks with the whole budget from the first step.
      bn_attack: batch norm inside the attack: `'eval'` (running statistics, as TRADES does) or `'local'` (statistics of
        the batch, as Madry's, Wong's and Rice's codes; they also update the running statistics at every attack step,
        which is an artifact and not offered: the attack's gradients do not depend on it).
      bn: batch norm of the training pass.
      label_smoothing: see `smoothed_cross_entropy`.

    Returns:
      The objective; metric `robust`, whether the attacked example is classified correctly.

    Raises:
      ValueError: on a mode or a smoothing that does not exist.
      TypeError: if `attack` cannot be run.

    References:
      Madry et al. 2018, Towards deep learning models resistant to adversarial attacks, arXiv:1706.06083, eq. 2.1.
    """
    if not hasattr(attack, "run"):
        raise TypeError(
            f"attack must be an attack, built from a threat; got {type(attack).__name__}. "
            "For example attacks.pgd(threats.linf(0.3))."
        )
    if bn_attack == "train":
        raise ValueError(
            "bn_attack must be 'eval' or 'local'; got 'train'. 'local' gives the same attack (statistics of the batch) "
            "without changing the running statistics at every attack step."
        )
    check.choice("bn_attack", bn_attack, ATTACK_BN)
    check.choice("bn", bn, ("train", "local", "eval"))
    _smoothing(label_smoothing)
    return partial(_pgd_at, attack=attack, growth=growth, bn_attack=bn_attack, bn=bn, label_smoothing=label_smoothing)


def fgsm_rs(
    threat: Threat,
    *,
    alpha: Any = None,
    start: str = "random",
    growth: Callable | None = None,
    bn_attack: str = "local",
    bn: str = "train",
    label_smoothing: float = 0.0,
) -> Objective:
    """Fast adversarial training: one signed step of length `alpha` from a uniform random start.

    δ0 ~ U(-eps, eps), by default clipped to the bounds; δ = Π(δ0 + α sign ∇CE(f(x + δ0))); a wiring of `pgd_at`.

    Args:
      threat: linf, with its budget.
      alpha: step length in units of `x`; None is 1.25 eps. Twice the budget collapses; so may long runs and large
        budgets.
      start: `'random'` within the bounds, as in the authors' CIFAR-10 code, or `'unclipped'`, as in their MNIST code.
        Where many features stand at a bound (the black of MNIST) that decides between robust and not at all.
      growth: see `pgd_at`.
      bn_attack: see `pgd_at`; published with statistics of the batch.
      bn: batch norm of the training pass.
      label_smoothing: see `smoothed_cross_entropy`.

    Returns:
      The objective; metric `robust`.

    Raises:
      ValueError: if `alpha` is not positive, or `start` is unknown.

    References:
      Wong, Rice and Kolter 2020, Fast is better than free: revisiting adversarial training, arXiv:2001.03994, algorithm
      3.
    """
    alpha = 1.25 * threat.eps if alpha is None else alpha
    check.positive("alpha", alpha, "None stands for 1.25 eps.")
    check.choice("start", start, ("random", "unclipped"))
    attack = attacks.fgsm(threat, start=start, step_size=alpha, keep="last", name="fgsm_rs")
    return pgd_at(attack, growth=growth, bn_attack=bn_attack, bn=bn, label_smoothing=label_smoothing)


OBJECTIVES = {"standard": standard, "pgd_at": pgd_at, "fgsm_rs": fgsm_rs}
"""Name to a function that builds the objective from its settings."""
