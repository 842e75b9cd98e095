"""CIFS: networks whose channel gates are trained together with them, against attacks that know of the gates.

What lives here: the joint loss as logits, the objective, the model that an adaptive attack sees. What does not: the
gate and gated networks (`models.channels`, `models.create(..., gated=True)`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxadv import attacks, models
from jaxadv.core import Attack, Model, Threat, Trainable, check
from jaxadv.models.channels import SCORES
from jaxadv.train.objectives import Adversarial, adversarial


def joint(logits, scores, *, beta: float):
    """Return the logits whose entry y is minus the joint loss `3 / (β + 1) (CE(z, y) + β / L sum_l CE(z_l, y))`.

    Args:
      logits: `[b, k]` of the network.
      scores: those of its L gates, each `[b, k]`.
      beta: weight of the gates.

    Returns:
      `[b, k]`, at most 0.
    """
    mean = sum(jax.nn.log_softmax(z) for z in scores) / len(scores)
    return 3 / (beta + 1) * (jax.nn.log_softmax(logits) + beta * mean)


def of_label(logits, y):
    """Return the entry of the label: what an attacker minimizes who is given `joint` logits.

    Args:
      logits: `[b, k]`.
      y: int `[b]`.

    Returns:
      `[b]`.

    Raises:
      ValueError: if the labels are probabilities, as inside `train.cutmix`.
    """
    check.labels(y, len(logits), logits.shape[-1])
    return jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]


def _seen(apply, params, state, x, *, beta, **settings):
    (logits, scores), state = apply(params, state, x, taps=(SCORES,), **settings)
    return joint(logits, tuple(scores.values()), beta=beta), state


def joint_model(trainable: Trainable, *, beta: float = 2.0) -> Model:
    """Return a gated network as an attack should see it that maximizes the joint loss through the gates.

    Whether a point succeeds is judged by the network itself: `attack.run(key, joint_model(net), x, y).x` are candidates
    for `models.model(net)`.

    Args:
      trainable: a network with gates.
      beta: weight of the gates.

    Returns:
      `joint` logits from a batch; attacks on it take `of_label` as their loss.
    """
    return models.model(trainable._replace(apply=jax.tree_util.Partial(partial(_seen, beta=beta), trainable.apply)))


def _find(apply, params, state, batch, key, *, find, beta):
    return find(partial(_seen, apply, beta=beta), params, state, batch, key)


def _cifs(logits, batch, *, point, beta):
    scores = [value for name, value in logits.items() if isinstance(name, tuple)]
    return -of_label(joint(logits[point], scores, beta=beta), batch["y"])


def _hints(batch):
    return {"label": batch["y"]}


def cifs(
    threat: Threat,
    *,
    beta: float = 2.0,
    steps: int = 10,
    step_size: Any = None,
    attack: Attack | None = None,
    **axes: Any,
) -> Adversarial:
    """CIFS: adversarial training of a gated network and of the probes in its gates, on one joint loss.

    `3 / (β + 1) (CE(z(x'), y) + β / L sum_l CE(z_l(x'), y))`, which the search maximizes, too. In the training pass the
    gates know the label.

    Args:
      threat: the allowed set.
      beta: weight of the gates; 0 is `pgd_at` with three times its loss, and gates that nobody trains.
      steps: gradient steps of the search.
      step_size: their length; None is `2.5 eps / steps`. Published: 2/255 at 8/255.
      attack: another search in the place of all that; it is given `joint` logits, so `of_label` suits as its loss.
      **axes: `growth`, `bn_attack` (default and published `'eval'`), `bn`: see `adversarial`.

    Returns:
      The objective for networks created with `gated=True`; metric `robust`.

    Raises:
      ValueError: on impossible settings; when called, on a network without gates.

    References:
      Yan et al. 2021, CIFS, arXiv:2102.05311, eq. 4 and 5; code HanshuYAN/CIFS. The authors gate a residual network
      that activates after the sum; ours activate before. In their search gradients stop at the gates; in ours they flow
      through.
    """
    if beta:
        check.positive("beta", beta, "0 leaves the gates out.")
    loss: dict[str, Any] = {"loss": of_label, "criterion": of_label}
    if attack is None:
        attack = attacks.pgd(threat, steps=steps, step_size=step_size, keep="last", name="cifs", **loss)
    made = adversarial(
        attack, partial(_cifs, point="robust", beta=beta), points=("robust",), taps=(SCORES,), hints=_hints, **axes
    )
    return Adversarial(partial(_find, find=made.find, beta=beta), made.loss)
