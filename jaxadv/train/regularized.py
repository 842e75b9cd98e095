"""Objectives whose loss looks at the clean and at the attacked example: TRADES, MART.

What lives here: the losses of logits at both points, and the published methods as wirings of `objectives.adversarial`.
What does not: the machinery, and penalties on gradients or weights.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxadv import attacks, losses
from jaxadv.core import Attack, Threat, check
from jaxadv.train import starts
from jaxadv.train.objectives import Adversarial, adversarial, check_smoothing, clean_logits, smoothed_cross_entropy


def trades_loss(clean, robust, y, *, beta: float, smoothing: float = 0.0):
    """Return `CE(clean, y) + beta KL(p(clean) || p(robust))`; gradients flow through both.

    Args:
      clean: `[b, k]` logits at the examples.
      robust: `[b, k]` logits at the attacked examples.
      y: int `[b]`.
      beta: weight of the divergence.
      smoothing: of the labels, see `smoothed_cross_entropy`.

    Returns:
      `[b]`.
    """
    return smoothed_cross_entropy(clean, y, smoothing) + beta * losses.kl(clean, robust)


def mart_loss(clean, robust, y, *, weight: float):
    """Return `BCE(robust, y) + weight KL(p(clean) || p(robust)) (1 - p_y(clean))`; gradients flow through all of it.

    `BCE = -log p_y - log(1 - max_{k != y} p_k)`, at the attacked example. The constants that keep the logarithms finite
    are the authors': `1.0001` and `1e-12` in the second term, `1e-12` in the divergence, `1.0000001` in the weight.

    Args:
      clean: `[b, k]` logits at the examples.
      robust: `[b, k]` logits at the attacked examples.
      y: int `[b]`.
      weight: of the divergence, the authors' λ.

    Returns:
      `[b]`.
    """
    p, q = jax.nn.softmax(clean), jax.nn.softmax(robust)
    own = jax.nn.one_hot(y, p.shape[-1], dtype=p.dtype)
    rival = jnp.max(jnp.where(own > 0, -jnp.inf, q), axis=-1)
    bce = losses.cross_entropy(robust, y) - jnp.log(1.0001 - rival + 1e-12)
    gap = jnp.sum(p * (jax.nn.log_softmax(clean) - jnp.log(q + 1e-12)), axis=-1)
    return bce + weight * gap * (1.0000001 - jnp.sum(own * p, axis=-1))


def _both(logits, y, *, loss):
    return loss(logits["clean"], logits["robust"], y)


def near(threat: Threat, *, steps: int, step_size: Any, spread: float, name: str, **settings: Any) -> Attack:
    """Return PGD from a point close to the example, as TRADES and its heirs search.

    Args:
      threat: the allowed set.
      steps: gradient steps.
      step_size: length of each; None is `2.5 eps / steps`.
      spread: see `starts.gaussian`.
      name: enters the random keys.
      **settings: further settings of `attacks.pgd`.

    Returns:
      The attack.
    """
    attack = attacks.pgd(threat, steps=steps, step_size=step_size, start="zero", keep="last", name=name, **settings)
    return starts.started(attack, starts.gaussian(spread))


def trades(
    threat: Threat,
    *,
    beta: float = 6.0,
    steps: int = 10,
    step_size: Any = None,
    spread: float = 0.001,
    attack: Attack | None = None,
    label_smoothing: float = 0.0,
    running: Sequence[str] = ("clean", "robust", "clean"),
    **axes: Any,
) -> Adversarial:
    """TRADES: cross-entropy on the examples, plus the largest divergence of the prediction around them.

    CE(f(x), y) + beta max over the threat of KL(p(x) || p(x')), the maximum found from `x + spread N(0, 1)`.

    | case | result |
    | --- | --- |
    | `beta = 0` | the losses and gradients of `standard` |
    | `spread = 0` | the search follows rounding errors: at `x` the divergence has no slope |

    Args:
      threat: the allowed set.
      beta: weight of the divergence; 6 for CIFAR-10, 1 for MNIST.
      steps: gradient steps of the search; 10 for CIFAR-10, 40 for MNIST.
      step_size: their length; None is `2.5 eps / steps`. Published: 0.007 at 0.031, 0.01 at 0.3 (MNIST).
      spread: standard deviation of the first point, in units of `x`.
      attack: another search in the place of all that; its loss and its criterion get the clean logits (`[b, k]`) beside
        those at the point, so `losses.minus_kl` suits.
      label_smoothing: of the cross-entropy; see `smoothed_cross_entropy`.
      running: the passes that move the running statistics; the default is that of the authors, who call the network on
        the clean batch twice. `('robust',)` is that of Gowal et al. 2020.
      **axes: `growth`, `bn_attack` (default and published `'eval'`), `bn`: see `adversarial`.

    Returns:
      The objective; metrics `clean` and `robust`.

    Raises:
      ValueError: on impossible settings.

    References:
      Zhang et al. 2019, Theoretically principled trade-off between robustness and accuracy, arXiv:1901.08573,
      algorithm 1; code yaodongyu/TRADES. The authors stop after 76 epochs, right after the rate falls. In l2 the
      authors replace a vanishing gradient by noise; here such a row stays where it is.
    """
    _weight("beta", beta)
    loss = {"loss": losses.minus_kl, "criterion": losses.minus_kl}
    search = near(threat, steps=steps, step_size=step_size, spread=spread, name="trades", **loss)
    total = partial(trades_loss, beta=beta, smoothing=check_smoothing(label_smoothing))
    return adversarial(
        search if attack is None else attack, partial(_both, loss=total), guide=clean_logits, running=running, **axes
    )


def mart(
    threat: Threat,
    *,
    weight: float = 5.0,
    steps: int = 10,
    step_size: Any = None,
    spread: float = 0.001,
    attack: Attack | None = None,
    **axes: Any,
) -> Adversarial:
    """MART: a boosted cross-entropy at the attacked examples, plus a divergence that counts where the clean one fails.

    BCE(p(x'), y) + weight KL(p(x) || p(x')) (1 - p_y(x)); the points maximize the cross-entropy, from
    `x + spread N(0, 1)`. See `mart_loss`.

    Judge it by AutoAttack: its accuracy under PGD with cross-entropy lies well above that (7 points for WRN-34-10).

    Args:
      threat: the allowed set.
      weight: of the divergence, the authors' λ: 5 in their script, 6 in their function.
      steps: gradient steps of the search.
      step_size: their length; None is `2.5 eps / steps`. Published: 0.007 at 0.031.
      spread: standard deviation of the first point, in units of `x`.
      attack: another search in the place of all that.
      **axes: `running` (default `('clean', 'robust')`, as published), `growth`, `bn_attack` (default and published
        `'eval'`), `bn`: see `adversarial`.

    Returns:
      The objective; metrics `clean` and `robust`.

    Raises:
      ValueError: on impossible settings.

    References:
      Wang et al. 2020, Improving adversarial robustness requires revisiting misclassified examples, ICLR, eq. 11; code
      YisenWang/MART (published with a low rate, 0.01, and a high decay, 3.5e-3).
    """
    _weight("weight", weight)
    search = near(threat, steps=steps, step_size=step_size, spread=spread, name="mart")
    loss = partial(_both, loss=partial(mart_loss, weight=weight))
    return adversarial(search if attack is None else attack, loss, **axes)


def _weight(name: str, value: float) -> None:
    if value:
        check.positive(name, value, "0 leaves the term out.")
