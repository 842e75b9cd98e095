"""Published training recipes of networks of continuous depth, and of those that are read as solvers.

What lives here: settings, with their source, and what the source measured. What does not: networks and losses (room
`continuous`), other recipes (`recipes.py`).
"""

from typing import Any

import jax
import optax

from jaxadv import continuous
from jaxadv.train import augment, objectives, schedules
from jaxadv.train.assembly import CIFAR10_MEAN, CIFAR10_STD, assemble, judge, linf, passes, torch_sgd


def _ode(
    data, name, options, threat, *, seed, validation, epochs, optimizer, objective, overrides, batch_size=128, **more
) -> dict[str, Any]:
    """What the recipes of continuous depth share: a network of that room, and a short attack for validation."""

    def trainable(data):
        return continuous.create(name, jax.random.key(seed), shape=data.shape, classes=data.classes, **options)

    return assemble(
        data,
        validation,
        overrides,
        steps=passes(epochs),
        trainable=trainable,
        objective=objective,
        optimizer=optimizer,
        batch_size=batch_size,
        attack=judge(threat, 10),
        **more,
    )


TIS_OPTIONS: dict[str, Any] = {"time": False, "cfg": {"method": "euler", "mode": "fixed", "n_steps": 20}}
"""Options of the network of `tisode_mnist`: a field without time, and Euler steps of 0.05."""


def odenet_mnist(
    data, *, seed: int = 0, eps=None, epochs: float = 160, lr: float = 0.1, validation=None, **overrides
) -> dict[str, Any]:
    """Standard training of the ODE network of torchdiffeq's MNIST example.

    As published: Dormand-Prince at tolerances of 1e-3 with gradients through the solver, SGD with momentum 0.9 at 0.1
    for batch 128, a tenth of the rate after 60, 100 and 140 of 160 epochs, random crops of images padded by 4. Ours: a
    batch is solved by rows, so that no example depends on the others.

    Args:
      data: training source.
      seed: of the initial weights.
      eps: budget of the attack that validation reports; default 0.3.
      epochs: passes over the training data.
      lr: first learning rate.
      validation: see `standard_mnist`.
      **overrides: any argument of `fit`.

    Returns:
      The arguments of `fit`.

    References:
      Chen et al. 2018, Neural ordinary differential equations, arXiv:1806.07366; code rtqichen/torchdiffeq,
      examples/odenet_mnist.py.
    """
    drops = ((60 / 160, 0.1), (100 / 160, 0.1), (140 / 160, 0.1))
    made = _ode(
        data,
        "odenet_mnist",
        {},
        linf(eps, 0.3, data),
        seed=seed,
        validation=validation,
        epochs=epochs,
        optimizer=lambda steps: torch_sgd(schedules.piecewise(lr, steps, drops=drops), 0.0),
        objective=lambda _: objectives.standard(),
        overrides=overrides,
    )
    return {"augment": augment.crop(4)} | made


def tisode_mnist(
    data, *, seed: int = 0, eps=None, weight: float = 0.01, window: tuple[float, float] = (1.0, 1.5),
    epochs: float = 100, lr: float = 1e-3, validation=None, **overrides,
) -> dict[str, Any]:  # fmt: skip
    """Standard training of TisODE: a field without time, and a penalty on motion after the answer.

    As published: Euler steps of 0.05, Adam at 1e-3 with coupled decay 5e-4, a fifth of the rate after 30, 60 and 90 of
    100 epochs, batch 128, the penalty from the fifth epoch on. Ours: the window begins at the time of the answer (their
    code: 0.75), and images are not made noisy.

    Args:
      data: training source.
      seed: of the initial weights.
      eps: budget of the attack that validation reports; default 0.3.
      weight: of the motion.
      window: times between which motion counts.
      epochs: passes over the training data.
      lr: first learning rate.
      validation: see `standard_mnist`.
      **overrides: any argument of `fit`.

    Returns:
      The arguments of `fit`.

    References:
      Yan et al. 2020, On robustness of neural ordinary differential equations, arXiv:1910.05513; code HanshuYAN/TisODE.
    """
    drops = ((0.3, 0.2), (0.6, 0.2), (0.9, 0.2))

    def optimizer(steps):
        rate = schedules.piecewise(lr, steps, drops=drops)
        return optax.chain(optax.add_decayed_weights(5e-4), optax.adam(rate))

    return _ode(
        data,
        "odenet_tis",
        TIS_OPTIONS,
        linf(eps, 0.3, data),
        seed=seed,
        validation=validation,
        epochs=epochs,
        optimizer=optimizer,
        objective=lambda steps: continuous.tisode(weight, window=window, after=round(0.04 * steps)),
        overrides=overrides,
    )


def zerosnet_cifar10(
    data, *, seed: int = 0, eps=None, coefficients="opt", epochs: float = 160, lr: float = 0.1, width: int = 16,
    validation=None, **overrides,
) -> dict[str, Any]:  # fmt: skip
    """Standard training of ZeroSNet-20 on CIFAR-10.

    As published: batch 128, SGD with momentum 0.9 and coupled decay 5e-4, learning rate 0.1 divided by 10 at one half
    and three quarters of 160 epochs, crop and flip. The authors judge under noise alone; ours reports PGD too.

    Args:
      data: training source.
      seed: of the initial weights.
      eps: budget of the attack that validation reports; default 8/255.
      coefficients: of the blocks, see `continuous.ZeroSNet`.
      epochs: passes over the training data.
      lr: first learning rate.
      width: channels of the first stage; the others have 2 and 4 times as many.
      validation: see `standard_mnist`.
      **overrides: any argument of `fit`.

    Returns:
      The arguments of `fit`.

    References:
      Chen, Jin and Shang 2022, Zero stability well predicts performance of convolutional neural networks,
      arXiv:2206.13100; code LongJin-lab/ZeroSNet, where the flag for the decay has no effect.
    """
    options = {"mean": CIFAR10_MEAN, "std": CIFAR10_STD, "widths": (width, 2 * width, 4 * width)}

    def trainable(data):
        made = {"shape": data.shape, "classes": data.classes, "coefficients": coefficients, **options}
        return continuous.zerosnet(jax.random.key(seed), **made)

    return assemble(
        data,
        validation,
        overrides,
        steps=passes(epochs),
        trainable=trainable,
        objective=lambda _: objectives.standard(),
        optimizer=lambda steps: torch_sgd(schedules.piecewise(lr, steps), 5e-4),
        batch_size=128,
        attack=judge(linf(eps, 8 / 255, data), 10),
        augment=augment.chain(augment.crop(4), augment.flip()),
    )


def ltnode_mnist(
    data, *, seed: int = 0, eps=None, estimator: str = "quadrature", epochs: float = 90, lr: float = 0.1,
    validation=None, **overrides,
) -> dict[str, Any]:  # fmt: skip
    """Standard training of LT-NODE: one distribution of the end time for all examples.

    As published: Dormand-Prince at tolerances of 1e-2 to a time of at most 3, ten end times a batch, SGD with momentum
    0.9 and decay 1e-4 at 0.1 for batch 256, a tenth of the rate after 40 and 70 of 90 epochs. Ours: the estimator,
    because under the published one the posterior can leave the times that are solved (see `continuous.latent`), with
    the divergence weighted by one over the number of examples; first weights of PyTorch's kind. The paper's figures are
    curves under noise and attacks, without a table for MNIST.

    Args:
      data: training source.
      seed: of the initial weights.
      eps: budget of the attack that validation reports; default 0.3.
      estimator: one of `continuous.ESTIMATORS`.
      epochs: passes over the training data.
      lr: first learning rate.
      validation: see `standard_mnist`.
      **overrides: any argument of `fit`.

    Returns:
      The arguments of `fit`.

    References:
      Anumasa and Srijith 2022, Latent time neural ordinary differential equations, arXiv:2112.12728; code
      srinivas-quan/LTNODE.
    """
    return _random_time(data, {}, estimator, seed, eps, epochs, lr, validation, overrides)


def altnode_mnist(
    data, *, seed: int = 0, eps=None, estimator: str = "quadrature", epochs: float = 90, lr: float = 0.1,
    validation=None, **overrides,
) -> dict[str, Any]:  # fmt: skip
    """Standard training of ALT-NODE: each example has a distribution of the end time, read off it by an encoder.

    As published, and ours: as `ltnode_mnist`; published with one end time for each example.

    Args:
      data: training source.
      seed: of the initial weights.
      eps: budget of the attack that validation reports; default 0.3.
      estimator: one of `continuous.ESTIMATORS`.
      epochs: passes over the training data.
      lr: first learning rate.
      validation: see `standard_mnist`.
      **overrides: any argument of `fit`.

    Returns:
      The arguments of `fit`.

    References:
      Anumasa and Srijith 2022, Latent time neural ordinary differential equations, arXiv:2112.12728; code
      srinivas-quan/LTNODE.
    """
    return _random_time(data, {"encoder": True}, estimator, seed, eps, epochs, lr, validation, overrides)


def _random_time(data, options, estimator, seed, eps, epochs, lr, validation, overrides) -> dict[str, Any]:
    """What LT-NODE and ALT-NODE share."""
    objective = continuous.latent_time(estimator=estimator, kl_weight=1 / len(data))
    drops = ((40 / 90, 0.1), (70 / 90, 0.1))
    return _ode(
        data, "lt_node", options, linf(eps, 0.3, data), seed=seed, validation=validation, epochs=epochs, batch_size=256,
        optimizer=lambda steps: torch_sgd(schedules.piecewise(lr, steps, drops=drops), 1e-4),
        objective=lambda _: objective, overrides=overrides,
    )  # fmt: skip


def sodef_mnist(
    data, *, seed: int = 0, eps=None, weights: dict[str, float] | None = None, epochs: float = 20, lr: float = 1e-3,
    validation=None, **overrides,
) -> dict[str, Any]:  # fmt: skip
    """Training of SODEF: features of an example are made a stable equilibrium of the field that they enter.

    As published: the field, its end time and tolerance, the weights of the terms, Adam with the larger second moment
    kept (amsgrad), batch 128. Ours: all is trained at once on clean images, where they freeze a robust network and
    train in stages; so figures do not compare. Theirs, CIFAR-10 at 8/255 on a TRADES network: 57.8 % under AutoAttack
    (53.7 % without it), of which Square alone leaves 62.2 % and APGD-CE 70.9 %: gradients are masked. On another
    network AutoAttack leaves 71.3 %, points carried over from that network 64.2 % (RobustBench flags it as unreliable).
    Judge it with `--protocol ode`.

    Args:
      data: training source.
      seed: of the initial weights.
      eps: budget of the attack that validation reports; default 0.3.
      weights: of the terms, see `continuous.sodef`; None are the published ones.
      epochs: passes over the training data.
      lr: learning rate.
      validation: see `standard_mnist`.
      **overrides: any argument of `fit`.

    Returns:
      The arguments of `fit`.

    References:
      Kang et al. 2021, Stable neural ODE with Lyapunov-stable equilibrium points for defending against adversarial
      attacks, arXiv:2110.12976; code kangqiyu/SODEF.
    """
    objective = continuous.sodef() if weights is None else continuous.sodef(weights)
    return _ode(
        data, "sodef", {}, linf(eps, 0.3, data), seed=seed, validation=validation, epochs=epochs,
        optimizer=lambda _: optax.amsgrad(lr), objective=lambda _: objective, overrides=overrides,
    )  # fmt: skip


def lyanet_mnist(
    data, *, seed: int = 0, eps=None, points: int = 512, kappa: float = 10.0, epochs: float = 20, lr: float = 1e-3,
    validation=None, **overrides,
) -> dict[str, Any]:  # fmt: skip
    """Training of LyaNet: the cross-entropy shall fall exponentially along every solution; nothing is solved.

    As published: the condition at 512 random states for each example, rate 10. Ours: network, Adam, batch and number of
    epochs; the paper's figures are for other networks and data.

    Args:
      data: training source.
      seed: of the initial weights.
      eps: budget of the attack that validation reports; default 0.3.
      points: states for each example.
      kappa: rate at which the cross-entropy is to fall.
      epochs: passes over the training data.
      lr: highest learning rate.
      validation: see `standard_mnist`.
      **overrides: any argument of `fit`.

    Returns:
      The arguments of `fit`.

    References:
      Rodriguez, Ames and Yue 2022, LyaNet: a Lyapunov framework for training neural ODEs, arXiv:2202.02526; code
      ivandariojr/LyapunovLearning.
    """
    return _ode(
        data, "lyanet", {}, linf(eps, 0.3, data), seed=seed, validation=validation, epochs=epochs,
        optimizer=lambda steps: optax.adam(schedules.triangular(lr, steps, peak=0.4)),
        objective=lambda _: continuous.lyanet(points=points, kappa=kappa), overrides=overrides,
    )  # fmt: skip


def sonet_cifar10(
    data,
    *,
    seed: int = 0,
    eps=None,
    epochs: float = 100,
    lr: float = 0.1,
    width: int = 64,
    validation=None,
    **overrides,
) -> dict[str, Any]:
    """Standard training of SONet on CIFAR-10, a defense that hides its gradients.

    As published: skew fields in the block and the last layer, Dormand-Prince at tolerances of 0.1, no adversarial
    training. Ours: convolutions in front where theirs are residual stages, steps of each row's own, optimizer and
    schedule. Theirs with 64 channels, linf 8/255, steps of 0.003: clean 89.4 %, PGD with 20 steps 61.6 %, with 1000
    steps 24.3 %. Judge it with `--protocol ode`.

    Args:
      data: training source.
      seed: of the initial weights.
      eps: budget of the attack that validation reports; default 8/255.
      epochs: passes over the training data.
      lr: first learning rate, divided by 10 at one half and three quarters.
      width: channels of the feature maps, rounded up to a multiple of 8.
      validation: see `standard_mnist`.
      **overrides: any argument of `fit`.

    Returns:
      The arguments of `fit`.

    References:
      Huang et al. 2020, Adversarial robustness of stabilized neural ODEs might be from obfuscated gradients,
      arXiv:2009.13145; code yao-lab/SONet.
    """
    options = {"mean": CIFAR10_MEAN, "std": CIFAR10_STD, "channels": -(-width // 8) * 8}
    return _ode(
        data, "sonet", options, linf(eps, 8 / 255, data), seed=seed, validation=validation, epochs=epochs,
        optimizer=lambda steps: torch_sgd(schedules.piecewise(lr, steps), 5e-4),
        objective=lambda _: objectives.standard(), overrides=overrides,
        augment=augment.chain(augment.crop(4), augment.flip()),
    )  # fmt: skip
