"""Attacks on outputs that are no classes: regression, denoising, segmentation.

An attack needs a model that returns `[b, k]` numbers and a loss that reads them beside `y`, any pytree whose leaves
begin with `[b]`. So images, maps and masks go through `flattened`, and the losses below (or your own, a module-level
function) stand in the places of `loss` and `criterion`:

>>> import jax, jax.numpy as jnp
>>> from jaxadv import attacks, threats
>>> def blur(v):
...     return (v + jnp.roll(v, 1, axis=1)) / 2
>>> clean = jnp.linspace(0.2, 0.8, 8).reshape(2, 4)
>>> attack = attacks.pgd(threats.linf(0.1), loss=attacks.minus_squared_error, criterion=attacks.minus_squared_error)
>>> found = attack.run(jax.random.key(0), attacks.flattened(blur), clean, clean)
>>> bool((found.score < attacks.minus_squared_error(blur(clean), clean)).all())
True

Such rows have no verdict: `success` says that the model returned something that is not finite, `score` what was
reached. What lives here: these losses and their wirings. What does not: losses of classes (`jaxadv.losses`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxadv.attacks.adaptive import feature_distance
from jaxadv.attacks.draws import Partial, asked, by_parts
from jaxadv.attacks.gradient import GradientAttack, pgd
from jaxadv.core import Model, Threat, as_callable, check
from jaxadv.core.rows import flat


@by_parts
def _flattened(model, x, keys=None):
    return flat(asked(model, x, keys))


def flattened(model: Any) -> Model:
    """Return a model whose output, of any shape `[b, ...]`, is laid out as `[b, k]`.

    Args:
      model: a callable pytree or a function of a batch.

    Returns:
      A model; what it is compared with is laid out by the losses here.
    """
    return Partial(_flattened, as_callable(model))


def minus_squared_error(output: Float[Array, "b k"], y: Any) -> Float[Array, " b"]:
    """Return minus the squared distance to what should be returned: an attack on regression and denoising.

    Args:
      output: `[b, k]` what the model returned.
      y: `[b, ...]` what it should return.

    Returns:
      `[b]`, what the attacker minimizes.
    """
    return -feature_distance(output, flat(y).astype(output.dtype))


def pixel_margin(output: Float[Array, "b k"], y: Any) -> Float[Array, " b"]:
    """Return how far the pixels of a segmentation are from wrong: the sum of their margins, those below zero cut.

    Args:
      output: `[b, pixels * classes]`, the classes of a pixel side by side.
      y: int `[b, ...]` the class of each pixel.

    Returns:
      `[b]`, what the attacker minimizes; zero where every pixel is wrong.

    Raises:
      ValueError: if the numbers of outputs and pixels do not fit.
    """
    y = flat(y)
    pixels = y.shape[1]
    if output.shape[1] % pixels or output.shape[1] < 2 * pixels:
        raise ValueError(
            f"output must hold two or more logits for each of the {pixels} pixels of y; got {output.shape[1]}. "
            "Is the model flattened, with classes last?"
        )
    logits = output.reshape(*y.shape, -1)
    own = jax.nn.one_hot(y, logits.shape[-1]) > 0
    label = jnp.sum(jnp.where(own, logits, 0), axis=-1)
    other = jnp.max(jnp.where(own, -jnp.inf, logits), axis=-1)
    return jnp.sum(jnp.maximum(label - other, 0), axis=-1)


def obs_atk(
    threat: Threat,
    *,
    steps: int = 5,
    step_size: Any = None,
    loss: Callable = minus_squared_error,
    name: str = "obs_atk",
    **settings: Any,
) -> GradientAttack:
    """Return ObsAtk, the attack on denoisers: the largest error that a change without a mean can make.

    Run it on `flattened(denoiser)`, the noisy images as `x` and the clean ones as `y`.

    Args:
      threat: `threats.zero_mean`.
      steps: number of gradient steps.
      step_size: Euclidean length of a step; `0.3 eps` by default, or `eps` for a single step.
      loss: what to minimize and to choose the best point by.
      name: enters the random keys.
      **settings: further settings of `pgd`.

    Returns:
      The attack.

    Raises:
      ValueError: if the threat lets the mean move.

    References:
      Yan et al. 2022, Towards adversarially robust deep image denoising, alg. 1, arXiv:2201.04397. Differs from the
      authors' code: changes stay in the bounds and without a mean at once, and the best point is kept.
    """
    check.whole("steps", steps)
    if threat.norm != "zero_mean":
        raise ValueError(f"threat must be zero_mean for {name}; got {threat.norm}. For other threats use pgd.")
    step_size = threat.eps * (1.0 if steps == 1 else 0.3) if step_size is None else step_size
    wiring = {"steps": steps, "step_size": step_size, "start": "zero", "loss": loss, "criterion": loss, "name": name}
    return pgd(threat, **wiring | settings)
