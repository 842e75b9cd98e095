"""Published recipes of private training, and a rule for scaling them down.

What lives here: settings, with their source. What does not: recipes without a budget (`recipes.py`, which lists these
beside its own) and any mechanism.
"""

import dataclasses
from typing import Any

import optax

from jaxadv import privacy
from jaxadv.train import augment, objectives
from jaxadv.train.assembly import assemble, judge, linf, network, passes

DP_MEAN = (0.49139968, 0.48215841, 0.44653091)
DP_STD = (0.24703223, 0.24348513, 0.26158784)

WRN_STEPS = {1.0: 875, 2.0: 1125, 3.0: 1593, 4.0: 1687, 6.0: 1843, 8.0: 2468}
"""Published number of steps of WRN-16-4 by epsilon."""


def _private(
    data, validation, overrides, *, size, budget, devices, threat, lr, views, clip_norm, accumulate=1, **more
) -> dict[str, Any]:
    """What the private recipes share: a plan for the data, SGD without momentum, an average that forgets its start."""

    def plan(n, size, steps):
        multiple = overrides.get("accumulate", accumulate) * devices
        return privacy.plan(
            n, size=size, steps=steps, clip_norm=clip_norm, rescale=True, views=views, multiple=multiple, **budget
        )

    return assemble(
        data,
        validation,
        overrides,
        batch_size=lambda n: min(size, max(1, n // 10)),
        objective=lambda _: objectives.standard(),
        optimizer=lambda _: optax.sgd(lr),
        attack=judge(threat, 10),
        ema=0.999,
        private=plan,
        accumulate=accumulate,
        **more,
    )


def _budget(epsilon, delta, noise_multiplier, accountant) -> dict[str, Any]:
    return {"epsilon": epsilon, "delta": delta, "noise_multiplier": noise_multiplier, "accountant": accountant}


def dp_mnist(
    data,
    *,
    seed: int = 0,
    epsilon: float | None = 8.0,
    delta: float = 1e-5,
    noise_multiplier: float | None = None,
    accountant: str = "rdp",
    eps=None,
    epochs: float | None = None,
    lr: float = 0.5,
    clip_norm: float = 0.1,
    views: int = 1,
    net="cnn_small",
    devices: int = 1,
    validation=None,
    **overrides,
) -> dict[str, Any]:
    """Private training of the small MNIST network: DP-SGD with rescaled clipping and an average of the weights.

    The ingredients are those of De et al. (rescaled clipping, no momentum, constant rate, average with warm-up); batch,
    rate and network are settings of this library: Poisson samples of 512 (or a tenth of smaller data), 20 epochs.

    Args:
      data: training source.
      seed: of the initial weights.
      epsilon: privacy budget, for which the noise is found; None needs `noise_multiplier`.
      delta: of the budget, below one over the number of examples.
      noise_multiplier: noise in the place of what the budget asks for.
      accountant: `'rdp'` as the papers, or `'pld'`, which asks for less noise.
      eps: budget of the attack that validation reports; default 0.3.
      epochs: expected passes over the training data; None is 20.
      lr: learning rate.
      clip_norm: bound of the gradient of an example.
      views: copies of each example over which its loss is averaged; of use with `augment`.
      net: network, see `models.NETS`; without batch norm.
      devices: rows of a batch are a multiple of this.
      validation: see `standard_mnist`; held-out examples are not covered by the budget, and decide nothing.
      **overrides: any argument of `fit`.

    Returns:
      The arguments of `fit`.

    References:
      Abadi et al. 2016, Deep learning with differential privacy, arXiv:1607.00133. De et al. 2022, arXiv:2204.13650.
    """
    return _private(
        data,
        validation,
        overrides,
        trainable=network(net, seed),
        size=512,
        steps=passes(20 if epochs is None else epochs, poisson=True),
        budget=_budget(epsilon, delta, noise_multiplier, accountant),
        devices=devices,
        threat=linf(eps, 0.3, data),
        lr=lr,
        views=views,
        clip_norm=clip_norm,
    )


def dp_cifar10_wrn16_4(
    data,
    *,
    seed: int = 0,
    epsilon: float | None = 8.0,
    delta: float = 1e-5,
    noise_multiplier: float | None = None,
    accountant: str = "rdp",
    eps=None,
    epochs: float | None = None,
    lr: float = 2.0,
    views: int = 16,
    width: int = 4,
    devices: int = 1,
    validation=None,
    **overrides,
) -> dict[str, Any]:
    """Private training of a WRN-16-4 on CIFAR-10 from scratch, as De et al.

    As published: group norm and weight standardization, Poisson samples of 4096, 16 augmented views of each example
    (mirror padding, crop, flip) whose loss is averaged before one clip at norm 1, SGD at rate 2.0 without momentum or
    decay, an average of the weights (0.999, with warm-up), steps by `WRN_STEPS`, epsilon by Rényi accounting.
    Ours: truly Poisson samples (theirs come from a shuffle buffer), the noise that the budget asks for at the size of
    these data in the place of their rounded one, a batch of a tenth of the data where these are few, and gradients
    accumulated in 64 parts.

    Args:
      data: training source.
      seed: of the initial weights.
      epsilon: privacy budget; steps are the published ones of the nearest epsilon.
      delta: see `dp_mnist`.
      noise_multiplier: see `dp_mnist`.
      accountant: see `dp_mnist`.
      eps: budget of the attack that validation reports; default 8/255.
      epochs: expected passes over the training data in the place of the published number of steps.
      lr: learning rate.
      views: augmented copies of each example; 1 draws one.
      width: factor of the channels.
      devices: see `dp_mnist`.
      validation: see `dp_mnist`.
      **overrides: any argument of `fit`.

    Returns:
      The arguments of `fit`.

    References:
      De, Berrada, Hayes, Smith and Balle 2022, Unlocking high-accuracy differentially private image classification
      through scale, arXiv:2204.13650; code google-deepmind/jax_privacy.
    """
    nearest = min(WRN_STEPS, key=lambda known: abs(known - (8.0 if epsilon is None else epsilon)))
    return _private(
        data,
        validation,
        overrides,
        trainable=network("wide_resnet_private", seed, depth=16, width=width, mean=DP_MEAN, std=DP_STD),
        size=4096,
        steps=(lambda n, size: WRN_STEPS[nearest]) if epochs is None else passes(epochs, poisson=True),
        budget=_budget(epsilon, delta, noise_multiplier, accountant),
        devices=devices,
        threat=linf(eps, 8 / 255, data),
        lr=lr,
        views=views,
        clip_norm=1.0,
        augment=augment.chain(augment.crop(4, mirror=True), augment.flip()),
        accumulate=64,
    )


def scale_config(arguments: dict[str, Any], size: int) -> dict[str, Any]:
    """Scale a private run down for cheap tuning: batch over noise, and the steps, stay; so training looks alike.

    Its epsilon explodes; the scaled plan has no budget, and its ledger states what it spends. Tune small, then run the
    original once.

    Args:
      arguments: of `fit`, with `private`, as a private recipe returns them.
      size: the smaller expected batch size.

    Returns:
      The arguments with the scaled plan.

    References:
      Sander, Stock and Sablayrolles 2023, TAN without a burn: scaling laws of DP-SGD, arXiv:2210.03403.
    """
    plan = arguments["private"]
    known = plan.sampler
    sampler = privacy.poisson(known.n, size, multiple=arguments.get("accumulate", 1), cycle=known.cycle)
    noise = plan.noise_multiplier * size / plan.size
    scaled = dataclasses.replace(plan, sampler=sampler, noise_multiplier=noise, epsilon=None)
    return arguments | {"private": scaled, "batch_size": size}
