"""The recipe behind the robust networks of 2020 to 2021: a wide network, TRADES, averages, CutMix, generated data.

What lives here: its settings, with their source, and its optimizer. What does not: shorter recipes (`recipes.py`, which
lists this one beside its own) and any mechanism.
"""

import dataclasses
from functools import lru_cache, partial
from typing import Any

import jax
import optax

from jaxadv import attacks, losses
from jaxadv import data as data_room
from jaxadv.core import PyTree, Threat, check
from jaxadv.train import augment, objectives, schedules, terms
from jaxadv.train.assembly import CIFAR10_MEAN, CIFAR10_STD, assemble, hold_out, linf, network, passes
from jaxadv.train.regularized import trades


def decayed(params: PyTree) -> PyTree:
    """Tell which parameters weight decay is for: weights and biases, but not those of normalization.

    Args:
      params: the parameters; a layer that has a `scale` normalizes.

    Returns:
      The same tree of booleans.
    """
    norms = {path[:-1] for path, _ in jax.tree_util.tree_leaves_with_path(params) if _name(path) == "scale"}
    return jax.tree_util.tree_map_with_path(lambda path, _: path[:-1] not in norms, params)


def _name(path) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True)


def nesterov(rate: optax.Schedule, decay: float = 5e-4, momentum: float = 0.9) -> optax.GradientTransformation:
    """SGD with Nesterov's momentum on the loss plus `decay / 2` times the squares of the `decayed` parameters.

    Args:
      rate: the schedule of the learning rate.
      decay: weight of the squares.
      momentum: share of the old direction that is kept.

    Returns:
      The optimizer.
    """
    squares = optax.add_decayed_weights(decay, mask=decayed)
    return optax.chain(squares, optax.sgd(rate, momentum=momentum, nesterov=True))


@lru_cache
def _falling(*drops: tuple[int, float]) -> optax.Schedule:
    """Factors of an attack's step; cached, so that equal attacks share one compiled program."""
    return optax.piecewise_constant_schedule(1.0, dict(drops))


def _adam(threat: Threat, steps: int, *drops: tuple[int, float], loss, **more: Any) -> Any:
    return attacks.adam_pgd(threat, steps=steps, step_size=0.1, schedule=_falling(*drops), loss=loss, **more)


def _objective(threat: Threat, *, beta: float, steps: int, classes: int, mix: bool) -> Any:
    """TRADES as Gowal et al. wire it; mixed examples are driven away from their labels, others from the prediction."""
    loss = objectives.minus_soft_cross_entropy if mix else losses.minus_kl
    drop = (max(1, steps // 2), 0.1)
    search = _adam(threat, steps, drop, loss=loss, criterion=loss, keep="last", name="trades_adam")
    made = trades(threat, beta=beta, attack=search, running=("robust",), bn_attack="local")
    if not mix:
        return made
    guided = dataclasses.replace(made, find=partial(made.find, guide=objectives.targets))
    return terms.cutmix(guided, classes)


def trades_cifar10_wrn28_10(
    data,
    *,
    seed: int = 0,
    eps=None,
    extra=None,
    share: float = 0.3,
    smoothing: float = 0.1,
    mix: bool = True,
    beta: float = 6.0,
    attack_steps: int = 10,
    epochs: float = 400,
    lr: float | None = None,
    net="wide_resnet",
    depth: int = 28,
    width: int = 10,
    validation=None,
    **overrides,
) -> dict[str, Any]:
    """TRADES on CIFAR-10 with a WRN-28-10, averaged weights, CutMix and, where there are any, generated data.

    As published: SiLU, eps 8/255, beta 6, batch 1024 for as many steps as make 400 passes over the real data, learning
    rate 0.4 (0.1 for each 256 rows) after a rise over 1/40 of the steps along a cosine to 0, Nesterov momentum 0.9,
    squares of weights and biases outside normalization in the loss (5e-4), average of the weights with a decay of
    min(0.995, (1 + t) / (10 + t)), crop and flip. The attack: 10 steps of Adam, 0.1 and then 0.01 from the sixth on,
    from a uniform start, away from the prediction for the clean example or, with CutMix, from the mixed label. Batch
    norm takes statistics of the batch in the attack and for clean examples; only the attacked ones move the running
    statistics. Generated data: 70 % of each batch, labels smoothed by 0.1. Weights are the best on held-out data under
    40 steps of Adam on the margin.

    | published: extra data | CutMix | network | clean | AutoAttack, 8/255, 10,000 test images |
    | --- | --- | --- | --- | --- |
    | 1M generated (DDPM) | yes | WRN-28-10 | 87.33 % | 60.75 % |
    | 1M generated (DDPM) | yes | WRN-70-16 | 88.54 % | 64.25 % |
    | none | no (`mix=False`) | WRN-70-16 (`depth=70, width=16`) | 85.29 % | 57.20 % |

    These figures are the authors'; the recipe has not been run here at that size. Ours: statistics of the whole batch,
    running ones with a momentum of 0.9 (theirs 0.99), PyTorch's initialization (theirs: variance 1 / fan-in, and a last
    layer of zeros), Adam's epsilon 1e-8 (1e-9); each example has a box and each batch examples of its own (theirs: on
    one machine each real image stands four times in a batch, augmented apart, and a quarter of the batch shares one
    box). Wang et al. 2023 (arXiv:2302.04638) reach 92.44 % and 67.31 % with the WRN-28-10 and at least 20M better
    generated images, beta 5 and a rate of 0.2.

    Args:
      data: training source, the real data.
      seed: of the initial weights.
      eps: budget; default 8/255.
      extra: source of generated data, see `data.blend`; None trains on the real data alone.
      share: of the real data in a batch, where there are others.
      smoothing: of the labels of generated data.
      mix: whether examples are mixed by `cutmix`.
      beta: weight of the divergence.
      attack_steps: of the attack; its step falls to a tenth after half of them.
      epochs: steps, counted in passes over the real data of batches of this size.
      lr: highest learning rate; None is 0.1 for each 256 rows of a batch, at least 0.1.
      net: network, see `models.NETS`; one that has an `activation`.
      depth: of the wide network.
      width: of the wide network.
      validation: see `recipes.standard_mnist`.
      **overrides: any argument of `fit`. The batch is 1024 or a tenth of smaller data.

    Returns:
      The arguments of `fit`.

    Raises:
      ValueError: on impossible settings, or extra data that do not fit.

    References:
      Gowal et al. 2020, Uncovering the limits of adversarial training against norm-bounded adversarial examples,
      arXiv:2010.03593. Rebuffi et al. 2021, Fixing data augmentation to improve adversarial robustness,
      arXiv:2103.01946; code google-deepmind/deepmind-research, adversarial_robustness/jax/experiment.py.
    """
    threat = linf(eps, 8 / 255, data)
    check.whole("attack_steps", attack_steps)
    if validation is None:
        data, validation = hold_out(data)  # of the real ones only
    real, classes = len(data), data.classes
    size = overrides.get("batch_size", min(1024, max(1, real // 10)))
    peak = 0.1 * max(size / 256, 1) if lr is None else lr
    objective = _objective(threat, beta=beta, steps=attack_steps, classes=classes, mix=mix)
    if extra is not None:
        data = data_room.blend(data, extra, share=share)
        objective = terms.softened(objective, classes, smoothing, since=data.since)
    options: dict[str, Any] = {"depth": depth, "width": width} if net == "wide_resnet" else {}
    if data.shape[-1] == len(CIFAR10_MEAN):
        options |= {"mean": CIFAR10_MEAN, "std": CIFAR10_STD}
    return assemble(
        data,
        validation,
        overrides,
        steps=lambda _, size: passes(epochs)(real, size),
        trainable=network(net, seed, activation="silu", **options),
        objective=lambda _: objective,
        optimizer=lambda steps: nesterov(schedules.cosine(peak, steps, warmup=1 / 40)),
        batch_size=size,
        attack=_adam(threat, 40, (20, 0.1), (30, 0.01), loss=losses.margin, name="validation"),
        augment=augment.chain(augment.crop(4), augment.flip()),
        ema=0.995,
        keep="best",
    )
