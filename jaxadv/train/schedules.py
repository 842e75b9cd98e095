"""Learning-rate schedules of the published recipes, as optax schedules: from the count of updates to a rate.

What lives here: the four shapes that the recipes name, given by the total number of steps. What does not: anything
optax has under a plain name already (pass any optax schedule to any optax optimizer).
"""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
import optax

from jaxadv.core import check


def triangular(lr_max: float, steps: int, *, peak: float = 0.5) -> optax.Schedule:
    """Rise linearly from 0 to `lr_max` and fall linearly back to 0.

    Args:
      lr_max: the rate at the peak.
      steps: number of updates of the whole run; the rate is 0 from there on.
      peak: where the peak lies, as a fraction of the steps: 1/2 for CIFAR-10 in Wong et al., 2/5 for MNIST and in
        GradAlign.

    Returns:
      The schedule. Update number t (counted from 0) uses the rate at t; the authors' MNIST code uses the rate at t + 1.

    Raises:
      ValueError: if `lr_max` or `steps` is not positive, or `peak` is outside [0, 1].

    References:
      Wong, Rice and Kolter 2020, Fast is better than free, arXiv:2001.03994, section 4.1.
    """
    check.positive("lr_max", lr_max)
    check.whole("steps", steps)
    check.fraction("peak", peak)
    top = round(peak * steps)
    if top == 0:
        return optax.linear_schedule(lr_max, 0.0, steps)
    if top == steps:
        return optax.linear_schedule(0.0, lr_max, steps)
    parts = [optax.linear_schedule(0.0, lr_max, top), optax.linear_schedule(lr_max, 0.0, steps - top)]
    return optax.join_schedules(parts, [top])


def piecewise(
    lr: float, steps: int, *, drops: Sequence[tuple[float, float]] = ((0.5, 0.1), (0.75, 0.1))
) -> optax.Schedule:
    """Multiply the rate by a factor at given fractions of the run.

    Args:
      lr: the first rate.
      steps: number of updates of the whole run.
      drops: pairs (fraction of the steps, factor). The default is that of Rice et al.: a tenth at one half, again at
        three quarters.

    Returns:
      The schedule; the update at a drop already uses the smaller rate.

    Raises:
      ValueError: if `lr` or `steps` is not positive, or a fraction is outside [0, 1].

    References:
      Rice, Wong and Kolter 2020, Overfitting in adversarially robust deep learning, arXiv:2002.11569, section 3.
    """
    check.positive("lr", lr)
    check.whole("steps", steps)
    for where, factor in drops:
        check.fraction("the place of a drop", where)
        check.positive("the factor of a drop", factor)
    return optax.piecewise_constant_schedule(lr, {round(where * steps): factor for where, factor in drops})


def cosine(lr_max: float, steps: int, *, warmup: float = 0.0) -> optax.Schedule:
    """Rise linearly to `lr_max`, then fall to 0 along half a cosine.

    Args:
      lr_max: the rate at the peak.
      steps: number of updates of the whole run.
      warmup: how long the rise takes, as a fraction of the steps; 0 starts at the peak.

    Returns:
      The schedule.

    Raises:
      ValueError: if `lr_max` or `steps` is not positive, or `warmup` is not in [0, 1).

    References:
      Loshchilov and Hutter 2017, SGDR, arXiv:1608.03983; with warm-up as in Gowal et al. 2020, arXiv:2010.03593.
    """
    check.positive("lr_max", lr_max)
    check.whole("steps", steps)
    check.fraction("warmup", warmup)
    rise = round(warmup * steps)
    if rise == steps:
        raise ValueError(f"warmup must leave steps to train; got warmup={warmup} of {steps} steps. Lower warmup.")
    return optax.warmup_cosine_decay_schedule(0.0 if rise else lr_max, lr_max, rise, steps)


def constant(lr: float, steps: int | None = None) -> optax.Schedule:
    """Keep the rate.

    Args:
      lr: the rate.
      steps: ignored; there so that all schedules are called alike.

    Returns:
      The schedule.

    Raises:
      ValueError: if `lr` is not positive.
    """
    check.positive("lr", lr)
    return optax.constant_schedule(lr)


def growth(steps: int) -> optax.Schedule:
    """Rise linearly from 1 / steps to 1 and stay there: the share of an attack's budget in the first steps of training.

    Args:
      steps: how many steps the rise takes.

    Returns:
      The schedule; step number t (counted from 0) has the share min(1, (t + 1) / steps).

    Raises:
      ValueError: if `steps` is not a whole number of at least 1.
    """
    check.whole("steps", steps)
    return partial(_growth, steps=steps)


def _growth(t, *, steps):
    return jnp.minimum(1.0, (t + 1) / steps)


SCHEDULES = {"triangular": triangular, "piecewise": piecewise, "cosine": cosine, "constant": constant}
"""Name to `schedule(lr, steps, ...)`."""
