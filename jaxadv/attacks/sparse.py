"""Attacks that change few features: JSMA (pairs of salient features) and SparseFool (few steps onto a flat boundary).

FMN in l0 is in `minimum`, EAD (few features by way of l1) in `tradeoff`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxadv.attacks.fab import to_hyperplane
from jaxadv.attacks.judge import ask, dead
from jaxadv.attacks.minimum import MinimumNorm, State, aim, ball, mended, nearest_boundary, rivals
from jaxadv.core import Threat, check, edges, pytree, select, static
from jaxadv.core.rows import flat, wide
from jaxadv.threats import l2


@pytree
class Sparse(MinimumNorm):
    """What both share: a row is done once its own search has ended, well or not."""

    def _found(self, state: State) -> Bool[Array, " b"]:
        return state.own.ended  # it fails, or can go no farther


# ---------------------------------------------------------------------------------------------------------------- JSMA


@pytree
class JSMA(Sparse):
    """Moves the pair of features that helps the target and hurts the other classes the most; built by `jsma`."""

    theta: float = static()
    pool: int = static()

    class Own(NamedTuple):
        """The class to reach, the features that may still move, and whether the search has ended."""

        target: Int[Array, " b"]
        free: Bool[Array, "b n"]
        ended: Bool[Array, " b"]

    def _own(self, logits, x, y):
        free = flat(jnp.isfinite(x))
        return self.Own(target=aim(logits, y), free=free, ended=free[:, 0] & False)

    def _passes(self, state: State) -> tuple[int, int]:
        return 1, 2

    def step(self, state: State, model, x, y) -> State:
        """Ask; where the point holds, move the pair with the largest saliency, if any pair has one."""
        low, high = edges(self.threat.bounds, x)
        logits, pull = jax.vjp(lambda p: ask(model, p), state.point)
        state, fails = self._seen(state, logits, x, y)
        aim = jax.nn.one_hot(state.own.target, logits.shape[-1], dtype=logits.dtype)
        raw = [pull(aim)[0], pull(1 - aim)[0]]
        alpha, beta = (flat(mended(grad)) * jnp.sign(self.theta) for grad in raw)
        room = flat(jnp.where(self.theta > 0, high - state.point, state.point - low)) > 0
        pair, found = _pair(alpha, beta, state.own.free & room, min(self.pool, alpha.shape[1]))
        ended = state.own.ended | fails | ~found
        moved = flat(state.point) + self.theta * pair
        point = jnp.clip(moved.reshape(x.shape), low, high)
        return state._replace(
            step=state.step + 1,
            spent=state.spent + 1,
            point=select(ended, state.point, point),
            own=state.own._replace(free=state.own.free & (~(pair > 0) | ended[:, None]), ended=ended),
            zero_gradient=state.zero_gradient | (dead(raw[0]) & dead(raw[1])),
        )


def _pair(alpha, beta, free, pool: int):
    """Mark the two free features with the largest `-(alpha sum) (beta sum)`, where the one is positive, the other not.

    Only the `pool` features with the largest `alpha - beta` are paired.
    """
    best = jnp.where(free, alpha - beta, -jnp.inf)
    chosen = lax.top_k(best, pool)[1]
    a, b, usable = (jnp.take_along_axis(v, chosen, axis=1) for v in (alpha, beta, free))
    gain, loss = a[:, :, None] + a[:, None, :], b[:, :, None] + b[:, None, :]
    apart = jnp.arange(pool)[:, None] < jnp.arange(pool)[None, :]
    valid = usable[:, :, None] & usable[:, None, :] & apart[None] & (gain > 0) & (loss < 0)
    score = jnp.where(valid, -gain * loss, 0).reshape(a.shape[0], -1)
    place = jnp.argmax(score, axis=-1)
    found = jnp.take_along_axis(score, place[:, None], axis=1)[:, 0] > 0
    ends = jnp.stack([place // pool, place % pool], axis=1)
    features = jnp.take_along_axis(chosen, ends, axis=1)
    marked = jnp.sum(jax.nn.one_hot(features, alpha.shape[1], dtype=alpha.dtype), axis=1)
    return marked * found[:, None], found


def jsma(
    threat: Threat, *, steps: int = 50, theta: float = 1.0, pool: int = 256, early: bool = True, name: str = "jsma"
) -> JSMA:
    """Return JSMA, the saliency-map attack: two features a step, chosen by the gradients of target and other classes.

    Given labels it aims at the likeliest wrong class, and any failure counts; given `Targets` it aims at the target. A
    row for which no pair helps stays where it is. A step costs one forward and two backward passes.

    Args:
      threat: a norm ball `l0`.
      steps: at most so many pairs; the authors allow `0.1 n / 2` (gamma = 0.1).
      theta: how far a feature moves, in the units of `x`; negative moves down. A feature moves once.
      pool: how many features are paired, those with the largest difference of the two gradients; all of them where
        there are no more.
      early: stop a row where it fails or no pair helps; False lets every row take all steps and changes no answer.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on counts or settings out of range, or a threat of another norm.

    References:
      Papernot et al. 2016, The limitations of deep learning in adversarial settings, alg. 2 and 3, arXiv:1511.07528.
      Gradients are of the logits, as in CleverHans.
    """
    ball(threat, ("l0",), name)
    check.whole("steps", steps)
    check.whole("pool", pool, least=2)
    if not 0 < abs(theta) < float("inf"):
        raise ValueError(f"theta must be finite and not zero; got {theta}. 1 moves a feature of images all the way up.")
    return JSMA(threat=threat, name=name, max_steps=steps, early=early, theta=float(theta), pool=pool)


# ---------------------------------------------------------------------------------------------------------- SparseFool


@pytree
class SparseFool(Sparse):
    """DeepFool to a point beyond the boundary, then the fewest features onto the plane there; built by `sparsefool`."""

    reach: float = static()
    overshoot: float = static()
    inner: int = static()

    targeted = False

    class Own(NamedTuple):
        """Where the inner search began, its sum of steps and their number, the classes, and whether all has ended."""

        anchor: Float[Array, "b ..."]
        total: Float[Array, "b ..."]
        taken: Int[Array, " b"]
        order: Int[Array, "b c"]
        ended: Bool[Array, " b"]

    def _own(self, logits, x, y):
        none = flat(x)[:, 0] * 0
        return self.Own(
            anchor=x,
            total=jnp.zeros_like(x),
            taken=none.astype(jnp.int32),
            order=rivals(logits, y, 9),
            ended=none > 1,
        )

    def _passes(self, state: State) -> tuple[int, int]:
        return 1, state.own.order.shape[1]

    def step(self, state: State, model, x, y) -> State:
        """Ask; inside the boundary a step of DeepFool, beyond it one sparse move from the anchor onto the plane."""
        low, high = edges(self.threat.bounds, x)
        steepest = l2(1.0).steepest
        logits, away, normal, lost = nearest_boundary(model, state.point, y, state.own.order, steepest)
        state, fails = self._seen(state, logits, x, y)
        own = state.own
        ended = own.ended | (fails & (own.taken == 0))

        total = own.total + wide(jnp.where(jnp.isfinite(away), away, 0) + 1e-4, x) * steepest(normal)
        deeper = jnp.clip(own.anchor + 1.02 * total, low, high)

        beyond = own.anchor + self.reach * (state.point - own.anchor)
        offset = jnp.sum(flat(normal * (own.anchor - beyond)), axis=-1)
        anchor = own.anchor + to_hyperplane(own.anchor, normal, offset, self.threat.bounds, "l1")
        sparse = jnp.clip(x + (1 + self.overshoot) * (anchor - x), low, high)

        arrive = (fails | (own.taken >= self.inner)) & (own.taken > 0)
        new: Any = select(
            arrive,
            (sparse, self.Own(jnp.clip(anchor, low, high), jnp.zeros_like(x), own.taken * 0, own.order, ended)),
            (deeper, self.Own(own.anchor, total, own.taken + 1, own.order, ended)),
        )
        point, own = select(ended, (state.point, own._replace(ended=ended)), new)
        return state._replace(
            step=state.step + 1,
            spent=state.spent + 1,
            point=point,
            own=own,
            zero_gradient=state.zero_gradient | lost,
        )


def sparsefool(
    threat: Threat,
    *,
    steps: int = 60,
    reach: float = 3.0,
    overshoot: float = 0.02,
    inner: int = 50,
    early: bool = True,
    name: str = "sparsefool",
) -> SparseFool:
    """Return SparseFool: DeepFool finds the plane of the boundary, and few features are moved onto it.

    A step costs one forward pass and a backward pass for each of the nine likeliest wrong classes.

    Args:
      threat: a norm ball `l0`.
      steps: linearizations in all, those of the inner DeepFool among them.
      reach: how far the plane is pushed beyond the boundary, as a multiple of the way to it (lambda); larger is faster
        and less sparse.
      overshoot: by which share to go beyond the sparse move.
      inner: most steps of one inner DeepFool.
      early: stop a row at its first sparse failing point; False lets every row take all steps and changes no answer.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on counts or settings out of range, or a threat of another norm.

    References:
      Modas et al. 2019, SparseFool: a few pixels make a big difference, alg. 1 and 2, arXiv:1811.02248. Differs from
      the authors' code: DeepFool begins at the overshot point and its points stay inside the bounds; the plane's normal
      is that of the nearest boundary there; features are moved all at once (largest weights first, the last in part),
      not one by one.
    """
    ball(threat, ("l0",), name)
    check.whole("steps", steps)
    check.whole("inner", inner)
    check.positive("reach", reach)
    check.not_negative("overshoot", overshoot, "The authors take 0.02.")
    return SparseFool(
        threat=threat,
        name=name,
        max_steps=steps,
        early=early,
        reach=float(reach),
        overshoot=float(overshoot),
        inner=inner,
    )
