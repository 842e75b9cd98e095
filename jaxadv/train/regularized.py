"""Published objectives that change the loss of adversarial training, or what its search maximizes.

What lives here: TRADES, MART, AdvLC (losses of the logits at both points), cost-sensitive training, A3T (another guide
of the search), interpolated training (mixed inputs). What does not: the machinery (`objectives.py`), and penalties on
gradients or weights (`terms.py`).

AdvLC and interpolated training mix the rows of a batch, and with several devices those of a shard: not for private
training.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import attacks, losses
from jaxadv.core import Attack, Threat, check, example_keys, robust, rows
from jaxadv.train import starts
from jaxadv.train.objectives import (
    BN,
    POINTS,
    Adversarial,
    adversarial,
    begun,
    check_smoothing,
    clean_logits,
    frozen,
    pgd_at,
    smoothed_cross_entropy,
)


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

    Raises:
      ValueError: if the labels are probabilities, as inside `cutmix`.
    """
    check.labels(y, len(clean), clean.shape[-1])
    p, q = jax.nn.softmax(clean), jax.nn.softmax(robust)
    own = jax.nn.one_hot(y, p.shape[-1], dtype=p.dtype)
    rival = jnp.max(jnp.where(own > 0, -jnp.inf, q), axis=-1)
    bce = losses.cross_entropy(robust, y) - jnp.log(1.0001 - rival + 1e-12)
    gap = jnp.sum(p * (jax.nn.log_softmax(clean) - jnp.log(q + 1e-12)), axis=-1)
    return bce + weight * gap * (1.0000001 - jnp.sum(own * p, axis=-1))


def _both(logits, batch, *, loss):
    return loss(logits["clean"], logits["robust"], batch["y"])


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


def consistency(clean, robust, mask, *, top: float = 0.1):
    """Return the sum of the changed logits of each row, counting only the largest share of the whole batch's.

    The mean over rows is the authors' `1/B sum of the top share of |z - z'|`; over a batch, not over a row.

    Args:
      clean: `[b, k]` logits at the examples.
      robust: `[b, k]` logits at the attacked examples.
      mask: bool `[b]`; rows that are False are not among the batch.
      top: share of the entries that count, in [0, 1]; 1 is the l1 norm of each row.

    Returns:
      `[b]`. Entries that tie with the last one that counts count, too.
    """
    change = jnp.abs(clean - robust)
    if top == 1:
        return jnp.sum(change, axis=-1)
    ranked = jnp.sort(jnp.where(mask[:, None], jax.lax.stop_gradient(change), -1).reshape(-1), descending=True)
    count = jnp.floor(jnp.sum(mask) * change.shape[-1] * top + 1e-3).astype(jnp.int32)
    least = jnp.where(count > 0, ranked[jnp.maximum(count - 1, 0)], jnp.inf)
    return jnp.sum(jnp.where(change >= least, change, 0), axis=-1)


def _advlc(logits, batch, *, weight, top):
    change = consistency(logits["clean"], logits["robust"], batch["mask"], top=top)
    return losses.cross_entropy(logits["robust"], batch["y"]) + weight * change


def advlc(
    attack: Attack, *, weight: float = 0.3, top: float = 0.1, bn_attack: str = "local", **axes: Any
) -> Adversarial:
    """Adversarial training with logit consistency: `CE(f(x'), y)` plus the largest changes of logits (`consistency`).

    Args:
      attack: finds the points; published: 10 steps of 2/255 at 8/255.
      weight: of the term; 0.3, or 0.4 with averaged weights.
      top: share of the entries of the batch that count.
      bn_attack: see `adversarial`.
      **axes: `running` (default and published `('clean', 'robust')`), `growth`, `bn`: see `adversarial`.

    Returns:
      The objective; metrics `clean` and `robust`.

    Raises:
      ValueError: on impossible settings.

    References:
      Li and Spratling 2023, Understanding and combating robust overfitting via input loss landscape analysis and
      regularization, Pattern Recognition; code TreeLLi/Combating-RO-AdvLC. The authors' code starts its search at the
      input gradient, through the order of its arguments; here the attack decides. Over several devices each shard
      chooses its largest share.
    """
    _weight("weight", weight)
    check.fraction("top", top)
    return adversarial(attack, partial(_advlc, weight=weight, top=top), bn_attack=bn_attack, **axes)


def cost_sensitive_loss(logits, y, costs, *, weight: float):
    """Return `w_y CE(z, y) + weight sum_k C_yk p_k`, with `w_y` the mean cost of mistaking class y.

    Args:
      logits: `[b, k]`.
      y: int `[b]`.
      costs: `[k, k]`, `C_jk` the cost of taking j for k, zero on the diagonal.
      weight: of the expected cost.

    Returns:
      `[b]`. With costs of 1 it is the cross-entropy plus `weight (1 - p_y)`.

    Raises:
      ValueError: if the labels are probabilities, as inside `cutmix`.
    """
    check.labels(y, len(logits), logits.shape[-1])
    row = jnp.asarray(costs, logits.dtype)[y]
    mean = jnp.sum(row, axis=-1) / (row.shape[-1] - 1)
    return mean * losses.cross_entropy(logits, y) + weight * jnp.sum(row * jax.nn.softmax(logits), axis=-1)


def _cost_sensitive(logits, batch, *, costs, weight):
    return cost_sensitive_loss(logits["robust"], batch["y"], costs, weight=weight)


def cost_sensitive(attack: Attack, costs: Any, *, weight: float = 1.0, **axes: Any) -> Adversarial:
    """Adversarial training where some mistakes cost more; see `cost_sensitive_loss`.

    With `terms.plus(..., terms.of_weights(terms.minmax), τ)` it asks for the Min-Max property as well.

    Args:
      attack: finds the points.
      costs: `[k, k]`, at least 0, zero on the diagonal; to protect class j, rows and columns j above 1.
      weight: of the expected cost.
      **axes: see `pgd_at`.

    Returns:
      The objective; metric `robust`.

    Raises:
      ValueError: if the costs are no such matrix.

    References:
      Shen et al. 2021, Adversarial learning with cost-sensitive classes, arXiv:2101.12372. We read the abstract only:
      the form of the loss is ours.
    """
    _weight("weight", weight)
    table = np.asarray(costs, np.float32)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or np.any(table < 0) or np.any(np.diag(table) != 0):
        raise ValueError(
            f"costs must be a square matrix, at least 0 and zero on the diagonal; got shape {table.shape}. "
            "1 - numpy.eye(k) is every mistake alike."
        )
    return adversarial(attack, partial(_cost_sensitive, costs=table, weight=weight), points=("robust",), **axes)


A3T_MODES = ("from_prediction", "toward_label", "clean")
"""What `a3t` does with an example that is classified wrongly before the attack."""


def directed(logits, guide):
    """Return `sign * (z_l - logsumexp(z))`: minus the cross-entropy to a label, or the cross-entropy itself.

    Args:
      logits: `[b, k]`.
      guide: `label` int `[b]` and `sign` float `[b]`: 1 drives away from the label, -1 toward it, 0 nowhere.

    Returns:
      `[b]`, what the attacker minimizes.
    """
    return guide["sign"] * losses.minus_cross_entropy(logits, guide["label"])


def _a3t_guide(model, batch, *, mode):
    said = jnp.argmax(model(batch["x"]), axis=-1).astype(batch["y"].dtype)
    right = jnp.where(said == batch["y"], 1.0, 0.0)
    if mode == "from_prediction":
        return {"label": said, "sign": jnp.ones_like(right)}
    return {"label": batch["y"], "sign": 2 * right - 1 if mode == "toward_label" else right}


def _a3t_clean(apply, params, state, batch, key, *, find, bn_attack):
    """Take the points of the search where the prediction was right, and the examples elsewhere."""
    right = robust(frozen(apply, params, state, bn=bn_attack)(batch["x"]), batch["y"])
    found = find(apply, params, state, batch, key)
    return found | {"found": rows.select(right, found["found"], batch["x"])}


def a3t(
    threat: Threat,
    *,
    mode: str = "from_prediction",
    steps: int = 10,
    step_size: Any = None,
    start: str = "random",
    bn_attack: str = "local",
    **axes: Any,
) -> Adversarial:
    """Adversarial training that does not make examples harder that are classified wrongly already.

    | `mode` | an example that is classified wrongly is moved |
    | --- | --- |
    | `'from_prediction'` | away from the class that it was taken for |
    | `'toward_label'` | toward its label |
    | `'clean'` | not at all |

    Others are attacked as in `pgd_at`; all are learned with their true label.

    Args:
      threat: the allowed set.
      mode: one of `A3T_MODES`.
      steps: gradient steps of the search.
      step_size: their length; None is `2.5 eps / steps`.
      start: first point of the search, see `attacks.pgd`.
      bn_attack: see `adversarial`.
      **axes: further arguments of `pgd_at`.

    Returns:
      The objective; metric `robust`.

    Raises:
      ValueError: on a mode that does not exist.

    References:
      Altinisik et al. 2023, A3T: accuracy aware adversarial training, arXiv:2211.16316. We read abstract and figures
      only: the three readings of the method are ours.
    """
    check.choice("mode", mode, A3T_MODES)
    settings = {"steps": steps, "step_size": step_size, "start": start, "keep": "last", "name": "a3t"}
    attack = attacks.pgd(threat, loss=directed, criterion=directed, **settings)
    made = pgd_at(attack, guide=partial(_a3t_guide, mode=mode), bn_attack=bn_attack, **axes)
    if mode != "clean":
        return made
    return Adversarial(partial(_a3t_clean, find=made.find, bn_attack=bn_attack), made.loss)


def partners(keys, mask):
    """Pair every row with another one by a random cycle through the rows that count.

    The pairing depends on the keys and not on the order of rows or on padding.

    Args:
      keys: `[b]` typed keys of the examples.
      mask: bool `[b]`; rows that are False are paired with themselves.

    Returns:
      int `[b]`, the place of each row's partner; of a single row, itself.
    """
    draw = jax.vmap(jax.random.uniform)(keys)
    order = jnp.argsort(jnp.where(mask, draw, 2.0))
    place, count = jnp.argsort(order), jnp.sum(mask)
    return order[jnp.where(place < count, (place + 1) % jnp.maximum(count, 1), place)]


def _shares(keys, alpha: float):
    """One draw of Beta(alpha, alpha) for each key; that with alpha 1 is uniform, and a beta is dear to compile."""
    if not alpha:
        return jnp.ones(keys.shape)
    draw = jax.random.uniform if alpha == 1 else partial(jax.random.beta, a=alpha, b=alpha)
    return jax.vmap(lambda k: draw(jax.random.fold_in(k, 1)))(keys)


def _interpolated(apply, params, state, batch, key, *, weight, alpha, bn):
    check.labels(batch["y"])
    total, metrics, state = 0.0, {}, begun(state, batch)
    for number, (name, share) in enumerate({"clean": weight, "robust": 1 - weight}.items()):
        if not share:
            continue
        x, y, noise = batch[POINTS[name]], batch["y"], jax.random.fold_in(key, 1 + number)
        keys = example_keys(noise, "mixup", batch["index"])
        own = _shares(keys, alpha).astype(x.dtype)
        with_ = partners(keys, batch["mask"])
        mixed = rows.wide(own, x) * x + rows.wide(1 - own, x) * x[with_]
        logits, state = apply(params, state, mixed, bn=bn, key=jax.random.fold_in(noise, batch["index"][0]))
        check.logits(logits, x.shape[0])
        fit = own * losses.cross_entropy(logits, y) + (1 - own) * losses.cross_entropy(logits, y[with_])
        total = total + share * fit
        metrics[name] = own * robust(logits, y) + (1 - own) * robust(logits, y[with_])
    return total, (state, metrics)


def iat(attack: Attack, *, weight: float = 0.5, alpha: float = 1.0, bn: str = "train", **axes: Any) -> Adversarial:
    """Interpolated adversarial training: mixup of the examples and, apart from that, mixup of the attacked examples.

    `weight L_mix(x, y) + (1 - weight) L_mix(x', y)`; x' is made of examples that are not mixed, and `L_mix` is the
    cross-entropy at `λ x + (1 - λ) x_j` against `λ y + (1 - λ) y_j`, `λ ~ Beta(alpha, alpha)`.

    Judge it by AutoAttack: networks trained on mixed inputs have fooled weaker attacks.

    Args:
      attack: finds the points; published: 7 steps of 2/255 at 8/255.
      weight: share of the examples as they are, in [0, 1].
      alpha: of the Beta distribution; 0 mixes nothing.
      bn: batch norm of the training passes.
      **axes: `growth`, `bn_attack` (default `'eval'`): see `adversarial`.

    Returns:
      The objective; metrics `clean` and `robust`: accuracy on the mixed inputs, by the shares of their labels.

    Raises:
      ValueError: on impossible settings.

    References:
      Lamb et al. 2019, Interpolated adversarial training: achieving robust neural networks without sacrificing too much
      accuracy, arXiv:1906.06784, algorithm 1. The authors draw one λ for a batch and a permutation that may leave rows
      alone; here each example draws its λ and the rows form one cycle, so that neither depends on their order. Over
      several devices partners come from the same shard.
    """
    check.fraction("weight", weight)
    _weight("alpha", alpha)
    check.choice("bn", bn, BN)
    find = pgd_at(attack, **axes).find
    return Adversarial(find, partial(_interpolated, weight=weight, alpha=alpha, bn=bn))


def _weight(name: str, value: float) -> None:
    if value:
        check.positive(name, value, "0 leaves the term out.")
