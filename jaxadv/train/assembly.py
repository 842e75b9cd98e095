"""What all recipes are put together from: the arguments of `fit`, sized for the data and open to overrides.

What lives here: holding validation data out, `assemble`, and the parts that recipes with and without privacy share.
What does not: any published setting (`recipes.py`, `private_recipes.py`).
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from jaxadv import attacks, models, threats
from jaxadv import data as data_room
from jaxadv.core import Threat, Trainable, check
from jaxadv.train.driver import fit

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)

_VALIDATION = 500


def hold_out(data: Any, n: int = 1000) -> tuple[Any, Any]:
    """Take a fixed, class-balanced part of the training data away for validation.

    Args:
      data: a `Source`.
      n: examples to hold out, at most a tenth of the data.

    Returns:
      (training source, validation source), disjoint.
    """
    held = data_room.balanced_order(data.y, 0)[: max(1, min(n, len(data) // 10))]
    rest = np.ones(len(data), bool)
    rest[held] = False
    return data.subset(rest), data.subset(np.sort(held))


def assemble(
    data: Any,
    validation: Any,
    overrides: dict[str, Any],
    *,
    steps: Callable[[int, int], int],
    batch_size: int | Callable[[int], int],
    **settings: Any,
) -> dict[str, Any]:
    """Put the arguments of `fit` together: hold out validation data, size the run, apply overrides.

    Args:
      data: training source.
      validation: source for choosing weights; None holds a part of `data` out.
      overrides: arguments of `fit` that win over the settings; what they replace is not made.
      steps: from the number of examples and the batch size.
      batch_size: a number, or one from the number of examples.
      **settings: other arguments of `fit`; `trainable` a function of the data, `objective` and `optimizer` of the
        steps, `private` of the number of examples, the batch size and the steps.

    Returns:
      The arguments of `fit`.

    Raises:
      ValueError: if an override is no argument of `fit`.
    """
    valid = [name for name in inspect.signature(fit).parameters if name != "key"]
    for name in overrides:
        if name not in valid:
            check.choice("setting of fit", name, valid)
    if validation is None:
        data, validation = hold_out(data)
    n = len(data)
    size = overrides.get("batch_size", batch_size(n) if callable(batch_size) else batch_size)
    count = overrides.get("steps")
    count = steps(n, size) if count is None else count
    late = {"trainable": (data,), "objective": (count,), "optimizer": (count,), "private": (n, size, count)}
    made = {k: v(*late[k]) if k in late else v for k, v in settings.items() if k not in overrides}
    validation = data_room.evaluation_subset(validation, min(_VALIDATION, len(validation)))
    return {"data": data, "validation": validation, "batch_size": size, "steps": count} | made | overrides


def network(name: str, seed: int, **options: Any) -> Callable[[Any], Trainable]:
    """Return how a recipe makes its network.

    Args:
      name: one of `models.NETS`.
      seed: of the weights.
      **options: of the network.

    Returns:
      The function of the data that makes it.
    """
    key = jax.random.key(seed)
    return lambda data: models.create(name, key, shape=data.shape, classes=data.classes, **options)


def passes(epochs: float, poisson: bool = False) -> Callable[[int, int], int]:
    """Return how many steps so many passes over the data take.

    Args:
      epochs: passes, above 0.
      poisson: whether the size of a batch is an expected one; otherwise a last batch that is not full is left out.

    Returns:
      Number of examples and batch size to a number of steps, at least 1.
    """
    check.positive("epochs", epochs)
    return lambda n, size: max(1, round(epochs * (n / size if poisson else data_room.steps_per_epoch(n, size))))


def linf(eps: float | None, default: float, data: Any) -> Threat:
    """Return the linf ball of a recipe within the bounds of its data.

    Args:
      eps: budget, or None.
      default: the budget of the recipe.
      data: source with `bounds`.

    Returns:
      The threat.
    """
    return threats.linf(default if eps is None else eps, (float(data.bounds[0]), float(data.bounds[1])))


def judge(threat: Threat, steps: int = 20) -> Any:
    """Return the attack that chooses weights: PGD from a random start, cheap enough to run ten times in a run.

    Args:
      threat: the set of allowed inputs.
      steps: of PGD.

    Returns:
      The attack.
    """
    return attacks.pgd(threat, steps=steps, name="validation")


def torch_sgd(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    """Return PyTorch's SGD: decay of all parameters coupled into the gradient, momentum 0.9, the rate applied last.

    Args:
      rate: the schedule of the learning rate.
      decay: of the parameters.

    Returns:
      The optimizer.
    """
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9))
