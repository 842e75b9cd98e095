"""DIAL: features in which attacked examples cannot be told from clean ones.

What lives here: the objective, the second head that it needs, the schedule of its reversal. What does not: branches and
gradient reversal (`models.branch`), and the search, which is that of TRADES.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxadv import losses, models
from jaxadv.core import Attack, Threat, Trainable, check
from jaxadv.models.branch import BRANCH
from jaxadv.train.objectives import Adversarial, adversarial, clean_logits, labels
from jaxadv.train.regularized import near

DISTANCES = {"kl": losses.minus_kl, "ce": losses.minus_cross_entropy}
"""What the search of DIAL maximizes and its loss counts: divergence from the clean prediction, or cross-entropy."""


def with_domains(key, trainable: Trainable, *, shape: Sequence[int], at: str, width: int = 100) -> Trainable:
    """Give a network the second head that `dial` trains: is this example clean (0), or was it attacked (1)?

    Dense, batch norm, ReLU, dense, on the features that a layer is given.

    Args:
      key: of the head's first weights.
      trainable: the network.
      shape: shape of one example.
      at: tap of the features, see `models.branched`: `'linear:in'` for residual networks (what their last layer reads),
        `'dense1:in'` for small convolutional ones (what their convolutions return).
      width: of the hidden layer.

    Returns:
      The network with the head as its branch; `models.trunk` takes the head away.

    References:
      Levi, Attias and Kontorovich 2021, Domain invariant adversarial learning, arXiv:2104.00322; code matanle51/DIAL.
    """

    def features():
        x = jnp.zeros((1, *shape))
        return trainable.apply(trainable.params, trainable.state, x, taps=(at,))[0][1][at]

    count = jax.eval_shape(features).size
    head = models.create("mlp", key, shape=(count,), classes=2, widths=(width,), norm="batch")
    return models.branched(trainable, head, at=at)


def reversal(step, *, steps: int):
    """Return `2 / (1 + exp(-10 q)) - 1` at progress `q = step / steps`: from 0 to 1, half of it after a ninth.

    Args:
      step: number of updates done, int `[b]` or a number.
      steps: number of updates of the run.

    Returns:
      The factor ρ of `models.grad_reverse`, shaped as `step`.

    References:
      Ganin and Lempitsky 2015, arXiv:1409.7495, section 4.
    """
    return jnp.tanh(5 * jnp.asarray(step, jnp.float32) / steps)


def _hints(batch, *, steps):
    count = batch["mask"].shape
    return {"reversal": jnp.ones(count) if steps is None else reversal(batch["step"], steps=steps)}


def _dial(logits, batch, *, beta, domain, distance):
    fit = losses.cross_entropy(logits["clean"], batch["y"])
    if distance == "kl":
        gap = losses.kl(logits["clean"], logits["robust"])
    else:
        gap = losses.cross_entropy(logits["robust"], batch["y"])
    zero = jnp.zeros_like(batch["y"])
    told = sum(
        losses.cross_entropy(logits[point, BRANCH], zero + kind) for kind, point in enumerate(("clean", "robust"))
    )
    return fit + beta * gap + domain * told


def dial(
    threat: Threat,
    *,
    beta: float = 8.0,
    domain: float = 6.0,
    distance: str = "kl",
    total_steps: int | None = None,
    steps: int = 10,
    step_size: Any = None,
    spread: float = 0.001,
    attack: Attack | None = None,
    **axes: Any,
) -> Adversarial:
    """DIAL: TRADES, and a head that tells attacked from clean examples while the features learn to prevent it.

    CE(f(x), y) + beta max KL(p(x) || p(x')) + domain (CE(d(x), 0) + CE(d(x'), 1)), where the gradient of the last term
    reaches the features times -ρ. Trains networks made by `with_domains`.

    | case | result |
    | --- | --- |
    | `domain = 0` | the losses and gradients of `trades` with `running=('clean', 'robust')` |
    | `distance = 'ce'` | `CE(f(x'), y)` in the place of the divergence, in the search, too (DIAL_CE) |

    Args:
      threat: the allowed set.
      beta: weight of the divergence; 8 for CIFAR-10, 6 for CIFAR-100 and MNIST.
      domain: weight of the head's loss, the authors' r; 6 for CIFAR-10, 0.1 for MNIST (with `'ce'`).
      distance: one of `DISTANCES`.
      total_steps: of the run; ρ then rises as `reversal` says. None is ρ = 1 from the first step.
      steps: gradient steps of the search.
      step_size: their length; None is `2.5 eps / steps`. Published: 0.007 at 0.031.
      spread: standard deviation of the first point.
      attack: another search in the place of all that; its loss must take what `distance` asks for.
      **axes: `running`, `growth`, `bn_attack` (default and published `'eval'`), `bn`: see `adversarial`.

    Returns:
      The objective; metrics `clean` and `robust`.

    Raises:
      ValueError: on impossible settings.

    References:
      Levi, Attias and Kontorovich 2021, Domain invariant adversarial learning, arXiv:2104.00322, eq. 5 and 6; code
      matanle51/DIAL, whose ρ counts batches where it means examples and so changes once an epoch.
    """
    for name, value in {"beta": beta, "domain": domain}.items():
        if value:
            check.positive(name, value, "0 leaves the term out.")
    if total_steps is not None:
        check.whole("total_steps", total_steps)
    guides: dict[str, Callable] = {"kl": clean_logits, "ce": labels}
    guided = check.choice("distance", distance, DISTANCES)
    search = near(threat, steps=steps, step_size=step_size, spread=spread, name="dial", loss=guided, criterion=guided)
    return adversarial(
        search if attack is None else attack,
        partial(_dial, beta=beta, domain=domain, distance=distance),
        guide=guides[distance],
        taps=(BRANCH,),
        hints=partial(_hints, steps=total_steps),
        **axes,
    )
