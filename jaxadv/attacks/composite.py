"""Several transformations one after the other, with parameters and order searched together.

A point is a packed row of `threats.semantic`, so the order is part of what is found, stored and replayed. Every step is
one gradient through the whole chain, in each row's own order, in one compiled program; the order may be fixed, random,
or scheduled by a soft permutation of each row.

What lives here: the search. What does not: the components (`spatial`), the set of allowed rows (`threats.semantic`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxadv.attacks.draws import folded
from jaxadv.attacks.gradient import GradientAttack, State, pgd
from jaxadv.core import Result, check, pytree, select, static, step_keys
from jaxadv.threats.semantic import Behind, Semantic

ORDERS = ("fixed", "random", "scheduled")
_SCHEDULE = 2**31 - 2
"""What the keys of an attack are folded with to make those of its schedule: no step and no start uses it."""


def sinkhorn(raised: Float[Array, "b n n"], turns: int = 20) -> Float[Array, "b n n"]:
    """Return the matrices whose rows and columns sum to one, by normalizing both in turn.

    Args:
      raised: `[b, n, n]` logarithms of positive weights.
      turns: of each.

    Returns:
      `[b, n, n]`.

    References:
      Mena et al. 2018, Learning latent permutations with Gumbel-Sinkhorn networks, arXiv:1802.08665.
    """

    def once(_, p):
        return jax.nn.log_softmax(jax.nn.log_softmax(p, axis=-2), axis=-1)

    return jnp.exp(lax.fori_loop(0, turns, once, raised))


def greedy(soft: Float[Array, "b n n"]) -> Float[Array, "b n"]:
    """Return the order that takes at each place the heaviest component that is left.

    Args:
      soft: `[b, n, n]` weights of the components at each place.

    Returns:
      `[b, n]`, a permutation in the dtype of `soft`.
    """
    places, left = [], jnp.ones_like(soft[:, 0])
    for place in range(soft.shape[1]):
        best = jnp.argmax(jnp.where(left > 0, soft[:, place], -jnp.inf), axis=-1)
        places.append(best.astype(soft.dtype))
        left = left * (1 - jax.nn.one_hot(best, soft.shape[1], dtype=soft.dtype))
    return jnp.stack(places, axis=-1)


@pytree
class Composite(GradientAttack):
    """Gradient steps on the parameters of all components, in an order that is searched, too; built by `composite`."""

    order: str = static()
    inner: int = static()

    def init(self, keys, model, x, y) -> State:
        """Start at parameters, and in an order, of the row's own."""
        if not isinstance(model, Behind):
            raise TypeError(
                f"composite needs a model of packed rows; got {type(model).__name__}. Pass behind(threat, model), and "
                "threat.pack(x) for the images."
            )
        state = super().init(keys, model, x, y)
        mine, n = folded(keys, _SCHEDULE), self._places
        if self.order == "random":
            return state
        if self.order == "fixed":
            return state._replace(point=self._ordered(state.point, x[:, :n]))
        soft = sinkhorn(jax.vmap(lambda key: jax.random.uniform(key, (n, n), x.dtype))(mine) + 0 * x[:, :1, None])
        return state._replace(point=self._ordered(state.point, greedy(soft)), memory=(mine, soft))

    def step(self, state: State, model, x, y) -> State:
        """Move all parameters; after every `inner` steps, let a scheduled row choose its order anew."""
        state = super().step(state, model, x, y)
        if self.order != "scheduled":
            return state
        due = (state.step % self.inner == 0) & (state.step < self.max_steps)
        if self.early:
            due = due & ~state.broken
        # Asked only when some row is due. This saves work and decides nothing: other rows discard it.
        point, soft = lax.cond(
            jnp.any(due),
            lambda s: self._schedule(s, model, y),
            lambda s: (s.point, s.memory[1]),
            state,
        )
        point, soft = select(due, (point, soft), (state.point, state.memory[1]))
        return state._replace(point=point, memory=(state.memory[0], soft))

    def result(self, state: State, model, x, y) -> Result:
        """Verify the best row, and count the gradients of the schedule, too."""
        found = super().result(state, model, x, y)
        if self.order != "scheduled":
            return found
        asked = jnp.minimum(state.step // self.inner, self.max_steps // self.inner - 1)
        return found._replace(queries=found.queries + asked, grads=found.grads + asked)

    @property
    def _places(self) -> int:
        threat: Any = self.threat
        return threat.count

    def _ordered(self, point, order):
        return jnp.concatenate([order, point[:, self._places :]], axis=-1)

    def _schedule(self, state: State, model, y):
        """Climb the soft order along the gradient at the mixed image; draw it anew where the order stays the same."""
        keys, soft = state.memory
        grad = jax.grad(lambda mix: jnp.sum(self.loss(model(state.point, mix), y)))(soft)
        rise = soft - jnp.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)
        mine, n = step_keys(keys, state.step), self._places
        noise = jax.vmap(lambda key: jax.random.uniform(key, (n, n), soft.dtype))(mine)
        risen, jolted = sinkhorn(rise), sinkhorn(rise + 2 * (n + 1) * noise)
        same = jnp.all(greedy(risen) == state.point[:, :n], axis=-1)
        soft = select(same, jolted, risen)
        return self._ordered(state.point, greedy(soft)), soft


def composite(
    threat: Any,
    *,
    order: str = "scheduled",
    outer: int = 5,
    inner: int = 10,
    early: bool = True,
    name: str = "composite",
    **settings: Any,
) -> Composite:
    """Return the composite adversarial attack: transformations in sequence, parameters by signs of gradients.

    Args:
      threat: a semantic threat of one or more components.
      order: `"fixed"`, that of the packed row, `threat.pack(x, order)`; `"random"`, one order for each row, drawn once;
        or `"scheduled"`, chosen anew after every `inner` steps along the gradient of a doubly stochastic matrix.
      outer: number of orders that a scheduled row tries; with another order the steps are as many.
      inner: steps in each, with the length `2.5 / inner` of half a range by default.
      early: stop a row once it is broken and return it as it was found.
      name: enters the random keys.
      **settings: further settings of `pgd`: `loss`, `criterion`, `start`, `step_size`, ...

    Returns:
      The attack, of packed rows (`threat.pack(x)`) and a model of them (`behind(threat, model)`); `threat.values` and
      `threat.images` read order, parameters and images off its result.

    Raises:
      ValueError: on unknown or impossible settings, or a threat of another kind.
      TypeError: when run, if the model is none of packed rows.

    References:
      Hsiung et al. 2023, Towards compositional adversarial robustness: generalizing adversarial training to composite
      semantic perturbations, alg. 1, arXiv:2202.04235. Differs from the authors' code: rows have orders of their own,
      where theirs share one in a batch; a step moves the parameters of all components through the whole chain, where
      theirs optimize one component after the other; the soft order is climbed at the current parameters; perturbed
      pixels start at random, too; and a row returns the best point seen.
    """
    if not isinstance(threat, Semantic):
        raise ValueError(
            f"{name} needs a semantic threat, no norm ball; got {threat.norm}. "
            "Build one: semantic((Hue(), Pixels()), shape)."
        )
    check.choice("order", order, ORDERS)
    check.whole("outer", outer)
    check.whole("inner", inner)
    steep = {"steps": outer * inner, "step_size": 2.5 * threat.eps / inner, "early": early, "name": name}
    base = pgd(threat, **steep | settings)
    known = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    return Composite(**known, order=order, inner=inner)
