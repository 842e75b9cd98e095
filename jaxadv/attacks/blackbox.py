"""Attacks that ask the model for logits only: Square, in linf, l2 and l1.

A step proposes one change of each row, asks the model once, and keeps what lowers the margin. Rows share nothing: each
has a step counter of its own, so windows of different sizes meet in one batch, and windows are masks (comparisons with
an iota) instead of slices.

What does not live here: gradients (`gradient.py` and its kin) and decision-based attacks.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxadv.attacks.judge import Stepped, judge, unfenced
from jaxadv.core import Result, Threat, check, edges, pytree, select, static, step_keys

NORMS = ("linf", "l2", "l1")
THRESHOLDS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After so many proposals the share of the image that a window covers is halved (Andriushchenko et al. 2020, 4.2)."""
_SPACE = (1, 2)


def window_sizes(norm: str, height: int, width: int, p_init: float = 0.8) -> tuple[int, ...]:
    """Return the side of the window at each of the ten stages of the schedule.

    Args:
      norm: `linf`, `l2` or `l1`.
      height: of the image, in pixels.
      width: of the image, in pixels.
      p_init: share of the image that the first windows cover.

    Returns:
      Ten sides in pixels, `round(sqrt(p height width))` for `p = p_init / 2^i`: at least 1 for linf; odd and at least 3
      for l2 and l1; never beyond the image.
    """
    sizes = []
    for stage in range(len(THRESHOLDS) + 1):
        side = round(math.sqrt(p_init / 2**stage * height * width))
        if norm == "linf":
            side = max(side, 1)
        else:
            side = max(side, 3) // 2 * 2 + 1
        sizes.append(min(side, height, width))
    return tuple(sizes)


class Profile(NamedTuple):
    """A bump of one size as the minimum of two profiles: `min(rows[i], columns[j]) * signs[i]`."""

    rows: np.ndarray
    columns: np.ndarray
    signs: np.ndarray

    def dense(self) -> np.ndarray:
        """Return the bump `[side, side]`."""
        return np.minimum(self.rows[:, None], self.columns[None]) * self.signs[:, None]


@lru_cache
def bump_profile(side: int, norm: str) -> Profile:
    """Return the bump of l2 and l1: two blobs that fall off from their centers, the upper positive, the lower negative.

    A blob on `r x side` pixels has at `(i, j)` the value `sum_{m=M}^{side // 2} (m + 1)^-q` with the distance
    `M = max(|i - r // 2|, |j - side // 2|)` and `q` = 2 for l2, 4 for l1; it depends on a maximum of two distances and
    falls, so it is the minimum of two one-dimensional profiles. Both blobs, then the whole, have norm one.

    Args:
      side: of the window, in pixels.
      norm: `l2` or `l1`.

    Returns:
      The profiles, float64 `[side]` each.

    References:
      Andriushchenko et al. 2020, Square attack, eq. 2, arXiv:1912.00049; the exponent of l1: Croce and Hein 2021, Mind
      the box, arXiv:2103.01208.
    """
    power, order = (2, 2) if norm == "l2" else (4, 1)
    tail = np.append(np.cumsum((np.arange(side // 2 + 1) + 1.0)[::-1] ** -power)[::-1], 0.0)
    at = np.arange(side)
    upper = side // 2
    columns = tail[np.abs(at - side // 2)]
    first, second = np.abs(at - upper // 2), np.abs(at - upper - (side - upper) // 2)
    rows = tail[np.where(at < upper, first, second)]
    blobs = np.abs(np.minimum(rows[:, None], columns[None])) ** order
    sizes = [part.sum() ** (1 / order) for part in (blobs[:upper], blobs[upper:])]
    whole = (sum(s > 0 for s in sizes)) ** (1 / order)
    signs = np.where(at < upper, 1 / (sizes[0] or 1.0), -1 / sizes[1]) / whole
    return Profile(rows, columns, signs)


class State(NamedTuple):
    """What the next step needs; every leaf is `[b, ...]`. `kept` is None unless there are restarts."""

    point: Float[Array, "b ..."]
    score: Float[Array, " b"]
    clean: Float[Array, " b"]
    broken: Bool[Array, " b"]
    keys: Any
    step: Int[Array, " b"]
    nonfinite: Bool[Array, " b"]
    infeasible: Bool[Array, " b"]
    kept: tuple[Array, Array] | None


@pytree
class SquareAttack(Stepped):
    """Random search over square windows; built by `square`. `threat` is data, everything else structure."""

    threat: Threat
    name: str = static()
    max_steps: int = static()
    queries: int = static()
    p_init: float = static()
    rescale_schedule: bool = static()
    early: bool = static()

    def init(self, keys, model, x, y) -> State:
        """Ask the model at `x` and draw the start; the first step evaluates it."""
        x = jnp.asarray(x)
        _image(x, self.threat.norm)
        score, broken, finite = judge(model(x), y)
        low, high = edges(self.threat.bounds, x)
        point = self._start(keys, x)
        score = score.astype(x.dtype)
        return State(
            point=point,
            score=jnp.full_like(score, jnp.inf),
            clean=score,
            broken=broken,
            keys=keys,
            step=jnp.zeros_like(broken, jnp.int32),
            nonfinite=~finite,
            infeasible=jnp.any((x < low) | (x > high), axis=(1, 2, 3)),
            kept=(x, score) if self.max_steps > self.queries else None,
        )

    def step(self, state: State, model, x, y) -> State:
        """Propose a change of one window (l2, l1: of two), ask the model once, and keep what is better."""
        local = state.step % self.queries
        first = local == 0
        keys = step_keys(state.keys, state.step)
        if self.max_steps > self.queries:
            state = self._again(state, keys, first & (state.step > 0), x)
        proposal = select(first, state.point, self._propose(keys, state.point, x, jnp.maximum(local - 1, 0)))
        score, broken, finite = judge(model(proposal), y)
        score = score.astype(x.dtype)
        better = first | (score < state.score)
        if self.early:
            better = better | broken
        point, score = select(better, (proposal, score), (state.point, state.score))
        return state._replace(
            point=point,
            score=score,
            broken=state.broken | broken,
            step=state.step + 1,
            nonfinite=state.nonfinite | ~finite,
        )

    def result(self, state: State, model, x, y) -> Result:
        """Ask the model again at the best point; the clean one stays where nothing better was found."""
        point, score = state.point, state.score
        if state.kept is not None:
            older = (state.kept[1] < score) & ~(state.broken & self.early)
            point, score = select(older, state.kept, (point, score))
        found = (state.step > 0) & ((score < state.clean) | (state.broken & self.early))
        point = select(found, point, x)
        score, broken, finite = judge(model(point), y)
        return Result(
            x=point,
            score=score,
            success=broken,
            size=self.threat.size(point, x),
            queries=state.step + 2,
            grads=jnp.zeros_like(state.step),
            flags={
                "nonfinite": state.nonfinite | ~finite,
                "zero_gradient": jnp.zeros_like(broken),
                "infeasible": state.infeasible,
            },
        )

    def _again(self, state: State, keys, anew, x) -> State:
        """Where a restart begins: store what was found, draw another start."""
        better = anew & (state.score < state.kept[1])  # pyright: ignore[reportOptionalSubscript]
        kept = select(better, (state.point, state.score), state.kept)
        fresh = lax.cond(jnp.any(anew), lambda: self._start(keys, x), lambda: state.point)
        return state._replace(point=select(anew, fresh, state.point), kept=kept)

    def _start(self, keys, x):
        """Vertical stripes for linf, a tiling of bumps for l2 and l1; feasible."""
        b, h, w, c = x.shape
        eps = _budget(self.threat, x)
        if self.threat.norm == "linf":
            bits = jax.vmap(lambda k: jax.random.bits(k, (1, w, c)))(keys)
            return self.threat.project(x + eps * _sign(bits, x.dtype), x)
        side = min(h, w) // 5
        (down, rows), (right, columns) = _tiles(h, side), _tiles(w, side)
        bits = jax.vmap(lambda k: jax.random.bits(k, (rows, columns, c + 1)))(keys)[:, down][:, :, right]
        upright, turned = (t[None, :, :, None] for t in jnp.asarray(_tiling(side, self.threat.norm, h, w), x.dtype))
        move = jnp.where(bits[..., c:] >> 31 > 0, turned, upright) * _sign(bits[..., :c], x.dtype)
        return self.threat.project(x + self._scaled(move, eps), x)

    def _propose(self, keys, point, x, number):
        """The proposal with this number, a feasible point."""
        _, h, w, c = x.shape
        norm, eps = self.threat.norm, _budget(self.threat, x)
        stage = jnp.sum(number[:, None] > jnp.asarray(self._thresholds(), jnp.int32)[None], axis=1)
        sizes = window_sizes(norm, h, w, self.p_init)
        side = jnp.asarray(sizes, jnp.int32)[stage]
        bits = jax.vmap(lambda k: jax.random.bits(k, (5 + c,)))(keys)
        room = jnp.asarray((h, w, h, w), jnp.int32)[None] - side[:, None]
        rows, columns, other_rows, other_columns = _offsets(bits[:, :4], room, norm).T
        sign = _sign(bits[:, 5:], x.dtype)[:, None, None]
        one = _window(rows, columns, side, x.shape)
        if norm == "linf":
            return self.threat.project(jnp.where(one, point + 2 * eps * sign, point), x)
        other = _window(other_rows, other_columns, side, x.shape)
        bump = _bumps(sizes, norm, stage, rows, columns, bits[:, 4] >> 31 > 0, x)
        move = point - x
        inside = jnp.where(one, move, 0)
        fresh = bump * sign + inside / _positive(self._length(inside, _SPACE))
        fresh = fresh / _positive(self._length(fresh, _SPACE))
        taken = self._length(jnp.where(one | other, move, 0), _SPACE)  # the budget that both windows hold, by channel
        whole = self._length(move, (1, 2, 3))
        if norm == "l2":
            free = jnp.maximum(jnp.square(eps) - jnp.square(whole), 0)
            fresh = fresh * jnp.sqrt(free / c + jnp.square(taken))
        else:
            fresh = fresh * (jnp.maximum(eps - whole, 0) + c * taken)
        move = jnp.where(one, fresh, jnp.where(other, 0, move))
        if norm == "l2" or c > 1:  # of colors, each gets all that is free and c times what it held
            return self.threat.project(x + self._scaled(move, eps), x)
        # The windows got what they held and what was free, so only rounding can exceed the budget: no search is needed.
        move = move * jnp.minimum(1, (1 - 2.0**-21) * eps / _positive(self._length(move, (1, 2, 3))))
        low, high = edges(self.threat.bounds, x)
        return jnp.clip(x + move, low, high)

    def _thresholds(self) -> tuple[int, ...]:
        """Numbers of proposals after which the window shrinks."""
        if not self.rescale_schedule:
            return THRESHOLDS
        return tuple(-(-(t + 1) * self.queries // 10_000) - 1 for t in THRESHOLDS)

    def _length(self, move, axes):
        if self.threat.norm == "l1":
            return jnp.sum(jnp.abs(move), axis=axes, keepdims=True)
        return jnp.sqrt(jnp.sum(jnp.square(move), axis=axes, keepdims=True))

    def _scaled(self, move, eps):
        """A move of l2 length `eps`; a move of l1 stays as it is, since its projection does not only scale."""
        if self.threat.norm == "l1":
            return move
        return eps * (move / _positive(self._length(move, (1, 2, 3))))


def _image(x, norm: str) -> None:
    if x.ndim != 4 or (norm != "linf" and min(x.shape[1:3]) < 5):
        least = "" if norm == "linf" else " of at least 5 x 5 pixels"
        raise ValueError(
            f"square needs images [b, h, w, c]{least} for {norm}; got shape {x.shape}. "
            "Features without places have no windows: reshape x, or use an attack that needs none."
        )


def _budget(threat: Threat, x):
    return jnp.broadcast_to(jnp.asarray(threat.eps, x.dtype), x.shape[:1])[:, None, None, None]


def _positive(value):
    return jnp.where(value > 0, value, 1)


def _sign(bits, dtype):
    return 1 - 2 * (bits >> 31).astype(dtype)


def _offsets(bits, room, norm: str):
    """Where windows begin: uniform over all places where they fit; in l2 and l1 the last of these never comes."""
    share = (bits >> 8).astype(jnp.float32) * 2.0**-24
    return jnp.minimum(jnp.floor(share * (room + (norm == "linf"))).astype(jnp.int32), room)


def _within(start, side, length: int):
    """Places counted from where the window begins, `[b, length]`, and whether they lie inside."""
    at = jnp.arange(length, dtype=jnp.int32)[None] - start[:, None]
    return at, (at >= 0) & (at < side[:, None])


def _window(rows, columns, side, shape):
    """Mark a window of each row, `[b, h, w, 1]`."""
    across, along = _within(rows, side, shape[1])[1], _within(columns, side, shape[2])[1]
    return across[:, :, None, None] & along[:, None, :, None]


def _bumps(sizes: tuple[int, ...], norm: str, stage, rows, columns, turned, x):
    """The bump of each row's size in its place, turned by a right angle where told, `[b, h, w, 1]`."""
    largest = max(sizes)
    tables = np.zeros((3, len(sizes), largest))
    for i, side in enumerate(sizes):
        tables[:, i, :side] = bump_profile(side, norm)
    profile, flat, signs = (jnp.asarray(t, x.dtype) for t in tables)
    side = jnp.asarray(sizes, jnp.int32)[stage]

    def axis(start, length, upright):
        at, inside = _within(start, side, length)
        at = (stage[:, None], jnp.clip(at, 0, largest - 1))
        upright = upright[:, None]
        value = jnp.where(inside, jnp.where(upright, profile[at], flat[at]), 0)
        return value, jnp.where(upright, signs[at], 1)

    down, down_sign = axis(rows, x.shape[1], ~turned)
    right, right_sign = axis(columns, x.shape[2], turned)
    value = jnp.minimum(down[:, :, None], right[:, None]) * down_sign[:, :, None] * right_sign[:, None]
    return value[..., None]


def _tiles(length: int, side: int) -> tuple[np.ndarray, int]:
    """Which tile each place belongs to (centered; -1 for none), and how many there are."""
    count = length // side
    tile = (np.arange(length) - (length - count * side) // 2) // side
    return np.where((tile >= 0) & (tile < count), tile, -1), count


def _tiling(side: int, norm: str, h: int, w: int) -> np.ndarray:
    """A bump on every tile, upright and turned, `[2, h, w]`."""
    bump = bump_profile(side, norm).dense()
    down, right = ((np.arange(n) - (n - n // side * side) // 2) % side for n in (h, w))
    covered = (_tiles(h, side)[0] >= 0)[:, None] & (_tiles(w, side)[0] >= 0)[None]
    return np.where(covered[None], np.stack([b[down][:, right] for b in (bump, bump.T)]), 0)


def square(
    threat: Threat,
    *,
    queries: int = 5000,
    p_init: float = 0.8,
    rescale_schedule: bool = False,
    restarts: int = 1,
    early: bool = True,
    name: str = "square",
) -> SquareAttack:
    """Return the Square attack: random search over windows, on logits alone.

    linf: the start is vertical stripes of `+-eps`; a proposal sets a square window to `+eps` or `-eps`, one sign for
    each channel. l2 and l1: the start is a tiling of bumps; a proposal empties one window and spends its budget, and
    what was free, on a bump in another. A proposal that lowers the margin stays.

    Args:
      threat: linf, l2 or l1, over images `[b, h, w, c]`; rectangular ones are fine.
      queries: forward passes that each restart spends on changed points, the start among them. `Result.queries` counts
        two more: the clean point, and the verification in the end.
      p_init: share of the image that the first windows cover, in (0, 1].
      rescale_schedule: stretch the schedule of the window, made for 10,000 queries, to `queries`, as the paper does.
      restarts: independent searches, one after another.
      early: stop a row once it is broken and return it as it was found; False goes on lowering its margin.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on another norm, settings out of range, or (when it is run) inputs that are not images.

    References:
      Andriushchenko, Croce, Flammarion and Hein 2020, Square attack, arXiv:1912.00049; as part of AutoAttack with a
      schedule that is not rescaled: Croce and Hein 2020, arXiv:2003.01690; l1: Croce and Hein 2021, arXiv:2103.01208.
      Differs from the official code: window, signs and orientation are drawn for each example instead of once for a
      batch; in linf, windows reach the last row and column as in the paper, which there they never do (it makes linf
      stronger); in l2 and l1 they stay away from it as there, because with them at the border the attack was weaker (74
      instead of 70 % robust on an MNIST network in l1); the tiles of the start are centered on both axes and sized by
      the shorter one; a row stops when the model is wrong, not at a margin of exactly zero; `queries` counts the start.
    """
    check.choice("norm for square", threat.norm, NORMS)
    unfenced(threat, name)
    check.whole("queries", queries)
    check.whole("restarts", restarts)
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init must lie in (0, 1]; got {p_init}. It is a share of the image, usually 0.8.")
    return SquareAttack(
        threat=threat,
        name=name,
        max_steps=queries * restarts,
        queries=queries,
        p_init=float(p_init),
        rescale_schedule=rescale_schedule,
        early=early,
    )
