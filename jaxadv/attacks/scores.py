"""Searches on logits alone that make a proposal, ask, and keep what is better: SimBA, one-pixel.

A step is one query of each row, so a budget of queries is the number of steps. A kind of search is what it remembers
and how it proposes.

Elsewhere: `square` (`blackbox`), estimated gradients (`estimates`), attacks on the predicted class alone (`decisions`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxadv import losses
from jaxadv.attacks.judge import Stepped, ask, better, judge
from jaxadv.attacks.minimum import ball
from jaxadv.attacks.waves import cosines
from jaxadv.core import Result, Threat, check, edges, pytree, select, static, step_keys
from jaxadv.core.rows import flat, wide

_ORDER = 0x6F726465


class State(NamedTuple):
    """What the next query needs; every leaf is `[b, ...]`."""

    keys: Any
    step: Int[Array, " b"]
    point: Float[Array, "b ..."]  # to be asked next
    best: Float[Array, "b ..."]
    value: Float[Array, " b"]  # of the loss at the best point
    broken: Bool[Array, " b"]
    nonfinite: Bool[Array, " b"]
    infeasible: Bool[Array, " b"]
    own: Any


@pytree
class Search(Stepped):
    """A search that asks once a step: a subclass gives `_own`, `_learn` and `_propose`.

    A point is better if it fails and the best one does not, or else if its loss is lower. Logits that are not finite
    make no point better.
    """

    threat: Threat
    name: str = static()
    max_steps: int = static()
    loss: Callable = static()
    early: bool = static()

    def init(self, keys, model, x, y) -> State:
        """Ask at the example and make the first proposal."""
        x = jnp.asarray(x)
        self._fits(x)
        low, high = edges(self.threat.bounds, x)
        logits = ask(model, x)
        value, broken, finite = self._judged(logits, y)
        value = value.astype(x.dtype)
        state = State(
            keys=keys,
            step=jnp.zeros_like(broken, jnp.int32),
            point=x,
            best=x,
            value=value,
            broken=broken | ~finite,
            nonfinite=~finite,
            infeasible=jnp.any(flat((x < low) | (x > high)), axis=-1),
            own=self._own(keys, x),
        )
        own, point = self._propose(state, x)
        return state._replace(own=own, point=point)

    def step(self, state: State, model, x, y) -> State:
        """Ask at the proposal, keep it if it is better, make the next one."""
        value, fails, finite = self._judged(ask(model, state.point), y)
        value = value.astype(x.dtype)
        taken = better(value, fails, state.value, state.broken)
        best, value_kept = select(taken, (state.point, value), (state.best, state.value))
        state = state._replace(
            own=self._learn(state, value, taken),
            best=best,
            value=value_kept,
            broken=state.broken | fails,
            nonfinite=state.nonfinite | ~finite,
            step=state.step + 1,
        )
        own, point = self._propose(state, x)
        return state._replace(own=own, point=point)

    def result(self, state: State, model, x, y) -> Result:
        """Ask the model again at the best point."""
        score, fails, finite = judge(ask(model, state.best), y, self.loss)
        none = jnp.zeros_like(state.step)
        flags = {"nonfinite": state.nonfinite | ~finite, "zero_gradient": none > 0, "infeasible": state.infeasible}
        size = self.threat.size(state.best, x)
        return Result(
            x=state.best, score=score, success=fails, size=size, queries=state.step + 2, grads=none, flags=flags
        )

    def _judged(self, logits, y):
        """Loss, verdict and finiteness, where logits that are not finite hold and are worth nothing."""
        value, fails, finite = judge(logits, y, self.loss)
        return jnp.where(finite, value, jnp.inf), fails & finite, finite

    def _fits(self, x) -> None:
        """Refuse inputs that the search cannot work on."""

    def _own(self, keys, x) -> Any:
        raise TypeError(f"{type(self).__name__} must define _own")

    def _learn(self, state: State, value, better) -> Any:
        """What is remembered of the answer at `state.point`."""
        raise TypeError(f"{type(self).__name__} must define _learn")

    def _propose(self, state: State, x) -> tuple[Any, Any]:
        """What is remembered, and the next point."""
        raise TypeError(f"{type(self).__name__} must define _propose")


# --------------------------------------------------------------------------------------------------------------- SimBA

BASES = ("features", "waves")


@pytree
class SimBA(Search):
    """Tries one direction of an orthonormal basis after the other, up and down; built by `simba`."""

    step_size: Any  # pyright: ignore[reportGeneralTypeIssues]
    basis: str = static()
    share: float = static()

    class Own(NamedTuple):
        """The order of the directions, the place in it, and whether the way down is tried."""

        order: Int[Array, "b m"]
        place: Int[Array, " b"]
        down: Bool[Array, " b"]

    def _fits(self, x) -> None:
        if self.basis == "waves" and x.ndim != 4:
            raise ValueError(f"basis='waves' asks for images [b, h, w, c]; got {x.shape}. Use basis='features'.")

    def _waves(self, x):
        return [cosines(n, max(round(self.share * n), 1)) for n in x.shape[1:3]]

    def _own(self, keys, x):
        count = math.prod(x.shape[1:])
        if self.basis == "waves":
            count = math.prod(len(w) for w in self._waves(x)) * x.shape[3]
        order = jax.vmap(lambda k: jax.random.permutation(jax.random.fold_in(k, _ORDER), count))(keys)
        none = jnp.zeros_like(flat(x)[:, 0])
        return self.Own(order=order.astype(jnp.int32), place=none.astype(jnp.int32), down=none > 0)

    def _learn(self, state: State, value, better):
        own = state.own
        on = better | own.down
        return own._replace(place=own.place + on, down=~on)

    def _propose(self, state: State, x):
        own = state.own
        which = jnp.take_along_axis(own.order, (own.place % own.order.shape[1])[:, None], axis=1)[:, 0]
        size = jnp.broadcast_to(jnp.asarray(self.step_size, x.dtype), x.shape[:1])
        move = wide(jnp.where(own.down, -size, size), x) * self._direction(which, x)
        return own, self.threat.project(state.best + move, x)

    def _direction(self, which, x):
        if self.basis == "features":
            return jax.nn.one_hot(which, math.prod(x.shape[1:]), dtype=x.dtype).reshape(x.shape)
        down, right = (jnp.asarray(w, x.dtype) for w in self._waves(x))
        c = x.shape[3]
        place, channel = which // c, which % c
        wave = down[place // len(right)][:, :, None] * right[place % len(right)][:, None, :]
        return wave[..., None] * jax.nn.one_hot(channel, c, dtype=x.dtype)[:, None, None, :]


def simba(
    threat: Threat,
    *,
    queries: int = 5000,
    step_size: Any = None,
    basis: str = "features",
    share: float = 0.125,
    loss: Callable = losses.margin,
    early: bool = True,
    name: str = "simba",
) -> SimBA:
    """Return SimBA: one direction of an orthonormal basis after the other, in random order, up and then down.

    A proposal that lowers the loss stays. After the last direction the order begins anew.

    Args:
      threat: a norm ball `linf` or `l2`; proposals are projected into it.
      queries: points that are asked. `Result.queries` counts two more: the example, and the verification in the end.
      step_size: length of a move, in the units of `x`; by default the whole budget in linf, 0.2 in l2.
      basis: `"features"`, or `"waves"`: low frequencies of images (SimBA-DCT).
      share: of the frequencies of each axis that are used, from the lowest, in (0, 1].
      loss: what is to fall, `(logits, y) -> [b]`, and the score; `losses.minus_cross_entropy` falls with the
        probability of the label.
      early: stop a row once it is broken.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on settings out of range, a threat of another norm, or (when it is run) waves for what is no image.

    References:
      Guo et al. 2019, Simple black-box adversarial attacks, alg. 1, arXiv:1905.07121. Differs: the perturbation stays
      within the budget (theirs ends with the queries), and the margin falls (theirs: the probability of the label).
    """
    ball(threat, ("linf", "l2"), name)
    check.whole("queries", queries)
    check.choice("basis", basis, BASES)
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1]; got {share}. The authors take an eighth of the frequencies.")
    if step_size is None:
        step_size = threat.eps if threat.norm == "linf" else 0.2
    check.positive("step_size", step_size, "It is in the units of x.")
    return SimBA(
        threat=threat,
        step_size=step_size,
        name=name,
        max_steps=queries,
        loss=loss,
        early=early,
        basis=basis,
        share=float(share),
    )


# ----------------------------------------------------------------------------------------------------------- one pixel


@pytree
class OnePixel(Search):
    """Differential evolution over the places and values of a few pixels; built by `one_pixel`."""

    pixels: int = static()
    population: int = static()
    factor: float = static()

    class Own(NamedTuple):
        """Members, what each is worth, and the one that is asked; genes lie in [0, 1): place, then values."""

        genes: Float[Array, "b p g"]
        worth: Float[Array, "b p"]
        trial: Float[Array, "b g"]

    def _fits(self, x) -> None:
        if x.ndim != 4:
            raise ValueError(f"{self.name} asks for images [b, h, w, c]; got {x.shape}. For features use jsma or fmn.")
        eps = check.concrete(self.threat.eps)
        if eps is not None and (eps < self.pixels * x.shape[3]).any() and (eps > 0).all():
            raise ValueError(
                f"an l0 budget must hold {self.pixels} pixels of {x.shape[3]} channels for {self.name}; got eps={eps}. "
                "It counts features, not pixels."
            )

    def _own(self, keys, x):
        nothing = jnp.zeros_like(flat(x)[:, 0])
        members = nothing[:, None] + jnp.zeros(self.population, x.dtype)[None]
        genes = members[..., None] + jnp.zeros(self.pixels * (2 + x.shape[3]), x.dtype)[None, None]
        return self.Own(genes=genes, worth=members + jnp.inf, trial=genes[:, 0])

    def _learn(self, state: State, value, better):
        own, member = state.own, state.step % self.population
        mine = jnp.arange(self.population)[None] == member[:, None]
        won = mine & (value[:, None] <= own.worth)
        genes = jnp.where(won[..., None], own.trial[:, None], own.genes)
        return own._replace(genes=genes, worth=jnp.where(won, value[:, None], own.worth))

    def _propose(self, state: State, x):
        own, keys = state.own, step_keys(state.keys, state.step)
        draw = jax.vmap(lambda k: jax.random.uniform(k, (self.population + own.trial.shape[1],), x.dtype))(keys)
        fresh, order = draw[:, self.population :], draw[:, : self.population]
        mine = jnp.arange(self.population)[None] == (state.step % self.population)[:, None]
        three = lax.top_k(jnp.where(mine, -1, order), 3)[1]
        one, two, other = jnp.moveaxis(jnp.take_along_axis(own.genes, three[..., None], axis=1), 1, 0)
        mutant = one + self.factor * (two - other)
        mutant = jnp.where((mutant >= 0) & (mutant < 1), mutant, fresh)
        trial = select(state.step < self.population, fresh, mutant)
        return own._replace(trial=trial), self._painted(trial, x)

    def _painted(self, genes, x):
        """The examples with the pixels that the genes tell, where the budget allows as many."""
        b, h, w, c = x.shape
        low, high = edges(self.threat.bounds, x)
        point = x
        for gene in jnp.moveaxis(genes.reshape(b, self.pixels, 2 + c), 1, 0):
            down, right = (
                jnp.arange(n)[None] == jnp.minimum(jnp.floor(gene[:, i] * n), n - 1)[:, None]
                for i, n in enumerate((h, w))
            )
            here = down[:, :, None, None] & right[:, None, :, None]
            point = jnp.where(here, low + (high - low) * gene[:, 2:].reshape(b, 1, 1, c), point)
        enough = jnp.broadcast_to(jnp.asarray(self.threat.eps), (b,)) >= self.pixels * c
        return select(enough, point, x)


def one_pixel(
    threat: Threat,
    *,
    queries: int = 40_000,
    pixels: int = 1,
    population: int = 400,
    factor: float = 0.5,
    loss: Callable = losses.margin,
    early: bool = True,
    name: str = "one_pixel",
) -> OnePixel:
    """Return the one-pixel attack: differential evolution over the place and the values of a pixel, or of a few.

    A step asks for one child, made of three other members, which takes the place of its parent if its loss is not
    higher. There is no crossover.

    Args:
      threat: a norm ball `l0`, whose budget must hold the channels of all pixels.
      queries: points that are asked, the first members among them. `Result.queries` counts two more.
      pixels: how many may change.
      population: number of members, at least 4.
      factor: by which a child differs: `a + factor (b - c)`.
      loss: what is to fall, `(logits, y) -> [b]`, and the score; `losses.minus_cross_entropy` falls with the
        probability of the label.
      early: stop a row once it is broken.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on settings out of range, a threat of another norm, or (when it is run) inputs that are no images or
        a budget that does not hold the pixels.

    References:
      Su et al. 2019, One pixel attack for fooling deep neural networks, sec. III, arXiv:1710.08864. Differs: a child
      takes its parent's place at once, not after a generation; first values are uniform within the bounds; a gene that
      leaves its range is drawn anew; the margin falls (theirs: the probability of the label).
    """
    ball(threat, ("l0",), name)
    check.whole("queries", queries)
    check.whole("pixels", pixels)
    check.whole("population", population, least=4)
    check.positive("factor", factor)
    return OnePixel(
        threat=threat,
        name=name,
        max_steps=queries,
        loss=loss,
        early=early,
        pixels=pixels,
        population=population,
        factor=float(factor),
    )
