"""PGD against a classifier with a detector beside it: two gradients, of which a step follows one.

A weighted sum of both losses lets one undo what the other has won. Here a step follows the gradient of the classifier
until it is fooled and that of the detector from then on, as it is (`selective`) or without its part along the other
one (`orthogonal`). What lives here: that step. What does not: the model with a detector (`adaptive.rejecting`), and the
sweep over targets (`adaptive.sweep`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxadv import losses
from jaxadv.attacks.gradient import GradientAttack, State, pgd
from jaxadv.attacks.judge import ask, judge
from jaxadv.attacks.minimum import mended
from jaxadv.core import Targets, Threat, check, pytree, select, static
from jaxadv.core.rows import flat, wide

WAYS = ("selective", "orthogonal")


def without(grad: Float[Array, "b ..."], other: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Return a gradient without its part along another one, row by row.

    Args:
      grad: `[b, ...]`.
      other: `[b, ...]`; where it is zero nothing is taken away.

    Returns:
      `[b, ...]`, orthogonal to `other`.
    """
    size = jnp.sum(flat(other * other), axis=-1)
    share = jnp.sum(flat(grad * other), axis=-1) / jnp.where(size > 0, size, 1)
    return grad - wide(jnp.where(size > 0, share, 0), grad) * other


@pytree
class Evading(GradientAttack):
    """Follows the classifier's gradient or the detector's; built by `evading`."""

    way: str = static()

    def init(self, keys, model, x, y) -> State:
        """Check that there are targets; then as in the engine."""
        if not isinstance(y, Targets):
            raise ValueError(
                f"y must be Targets for {self.name}; got {type(y).__name__}. With labels a rejected input would count "
                "as a success: use attacks.sweep, which aims at every class in turn."
            )
        return super().init(keys, model, x, y)

    def _ask(self, state: State, model, x, y):
        def parts(point):
            logits = ask(model, point)
            alarm = logits[:, -1] - jnp.max(logits[:, :-1], axis=-1)
            return (losses.margin(logits[:, :-1], y), alarm), logits

        (gap, alarm), pull, logits = jax.vjp(parts, state.point, has_aux=True)
        one, none = jnp.ones_like(gap), jnp.zeros_like(gap)
        fool, hide = mended(pull((one, none))[0]), mended(pull((none, one))[0])
        if self.way == "orthogonal":
            fool, hide = without(fool, hide), without(hide, fool)
        return select(gap < 0, hide, fool), judge(logits, y, self.criterion), state.memory

    def _cost(self, model) -> tuple[int, int]:
        return 1, 2


def evading(threat: Threat, *, steps: int = 100, way: str = "orthogonal", name: str = "evading", **settings: Any):
    """Return PGD on a model that `rejecting` has made: fool the classifier and keep the detector quiet.

    Args:
      threat: the allowed set.
      steps: number of steps; each costs two gradients.
      way: `"selective"` follows the gradient of the margin to the target until the classifier is fooled, then that of
        the alarm; `"orthogonal"` takes the part along the other one out of each.
      name: enters the random keys.
      **settings: further settings of `pgd`.

    Returns:
      The attack; it takes `Targets`, see `sweep` for labels.

    Raises:
      ValueError: on another way, or what `pgd` refuses.

    References:
      Bryniarski et al. 2022, Evading adversarial example detection defenses with orthogonal projected gradient descent,
      eq. 5 to 8, arXiv:2106.15023. Differs: losses are the margin to the target and the alarm above the best logit; the
      best point of both is kept.
    """
    check.choice("way", way, WAYS)
    base = pgd(threat, **{"steps": steps, "loss": losses.margin, "criterion": losses.margin, "name": name} | settings)
    return Evading(**vars(base), way=way)
