"""Attacks that see the predicted class alone: Boundary, HopSkipJump, GeoDA, SignOPT, and salt-and-pepper noise.

All look for the nearest failing point. A step is one query of each row, so a budget of queries is the number of steps,
and a row that bisects shares a batch with one that estimates a normal: what a row asks next follows from its own phase.

| phase | asks at | and then |
| --- | --- | --- |
| start | given points, then noise, fine, in blocks, in stripes | bisects from the first that fails |
| bisect | a blend of the example and a failing point | probes, once it is near enough to the boundary |
| probe | around the boundary point | has a direction, once it has asked enough |
| stride | along the direction | bisects from the failing point that it has found |

Logits that are not finite are no failure here. What does not live here: searches that use logits (`scores`,
`estimates`, `blackbox`), and minimum-norm attacks with gradients (`minimum`).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxadv.attacks.judge import ask
from jaxadv.attacks.minimum import MinimumNorm, State, ball
from jaxadv.attacks.waves import cosines
from jaxadv.core import Result, Threat, check, edges, pytree, select, static, step_keys
from jaxadv.core.rows import flat, wide

START, BISECT, PROBE, STRIDE = range(4)
_FINEST = 2.0**-22
_HALVINGS = 50


@pytree
class Decision(MinimumNorm):
    """A minimum-norm attack that asks once a step; a subclass gives `_own`, `_learn` and `_propose`."""

    start = "random"
    strict = True

    def init(self, keys, model, x, y) -> State:
        """Judge the clean point and choose the first query."""
        state = super().init(keys, model, x, y)
        return state._replace(point=self._propose(state.own, step_keys(keys, state.step), jnp.asarray(x)))

    def step(self, state: State, model, x, y) -> State:
        """Ask, learn, choose the next query."""
        seen, fails = self._seen(state, ask(model, state.point), x, y)
        own = self._learn(state, fails, seen.distance < state.distance, x)
        step = state.step + 1
        point = self._propose(own, step_keys(state.keys, step), x)
        return seen._replace(own=own, point=point, step=step, spent=step)

    def result(self, state: State, model, x, y) -> Result:
        """Project the nearest failing point into the budget and ask there; else keep the better."""
        return self._answer(state, model, x, y, 2)

    def _passes(self, state: State) -> tuple[int, int]:
        return 1, 0

    def _learn(self, state: State, fails, nearer, x) -> Any:
        """What is remembered of the answer at `state.point`."""
        raise TypeError(f"{type(self).__name__} must define _learn")

    def _propose(self, own, keys, x) -> Any:
        """The next point to ask at."""
        raise TypeError(f"{type(self).__name__} must define _propose")


class Own(NamedTuple):
    """Where a row is on its walk; every leaf is `[b, ...]`."""

    phase: Int[Array, " b"]
    tick: Int[Array, " b"]  # queries in this phase
    round: Int[Array, " b"]  # how often the boundary was reached
    low: Float[Array, " b"]  # share of the way to `outer` that holds
    high: Float[Array, " b"]  # and one that fails
    outer: Float[Array, "b ..."]  # failing point to bisect from
    reach: Float[Array, " b"]  # its size
    at: Float[Array, "b ..."]  # failing point next to the boundary
    pro: Float[Array, "b ..."]  # sum of the directions that failed
    con: Float[Array, "b ..."]  # and of those that held
    yes: Float[Array, " b"]  # how many failed
    normal: Float[Array, "b ..."]
    length: Float[Array, " b"]
    more: Any


@pytree
class Walk(Decision):
    """A walk along the boundary in four phases; a subclass says how it probes and strides.

    It gives `_around` (where to probe), `_ahead` (where to stride), `_strode` (what follows), and where they differ
    `_count` (probes of a round), `_aim` (direction from the probes), `_reached` (what follows a bisection) and
    `_finest` (share at which it ends).
    """

    starts: Any  # pyright: ignore[reportGeneralTypeIssues]

    def _own(self, logits, x, y):
        nothing = jnp.zeros_like(flat(x)[:, 0])
        zero, origin = nothing.astype(jnp.int32), jnp.zeros_like(x)
        return Own(
            phase=zero,
            tick=zero,
            round=zero,
            low=nothing,
            high=nothing + 1,
            outer=x,
            reach=nothing,
            at=x,
            pro=origin,
            con=origin,
            yes=nothing,
            normal=origin,
            length=nothing,
            more=self._more(x),
        )

    def _more(self, x) -> Any:
        return ()

    def _learn(self, state: State, fails, nearer, x) -> Own:
        own, point = state.own, state.point
        own = own._replace(tick=own.tick + 1)
        after = (
            lambda own: select(fails, self._from(own, point, x), own),
            lambda own: self._halved(own, fails, x),
            lambda own: self._probed(own, fails, point, x),
            lambda own: self._strode(own, fails, point, x),
        )
        for phase, new in enumerate(after):
            own = _where(state.own.phase == phase, new, own)
        return own

    def _from(self, own: Own, point, x) -> Own:
        """Bisect from a failing point."""
        size = self.threat.size(point, x)
        none, one = jnp.zeros_like(own.low), jnp.ones_like(own.high)
        phase = jnp.full_like(own.phase, BISECT)
        return own._replace(phase=phase, tick=own.tick * 0, low=none, high=one, outer=point, reach=size)

    def _halved(self, own: Own, fails, x) -> Own:
        middle = (own.low + own.high) / 2
        own = own._replace(low=jnp.where(fails, own.low, middle), high=jnp.where(fails, middle, own.high))

        def reached(own):
            own = own._replace(at=self._blend(own, own.high, x), round=own.round + 1)
            return self._reached(own, x)

        return _where(own.high - own.low <= max(self._finest(x), _FINEST), reached, own)

    def _reached(self, own: Own, x) -> Own:
        return self._probing(own)

    def _probing(self, own: Own) -> Own:
        """Begin to probe around the boundary point."""
        none = jnp.zeros_like(own.pro)
        phase = jnp.full_like(own.phase, PROBE)
        return own._replace(phase=phase, tick=own.tick * 0, pro=none, con=none, yes=own.yes * 0)

    def _probed(self, own: Own, fails, point, x) -> Own:
        """Add a probe to the sums; after the last one take the direction that follows from them."""
        move = point - own.at
        own = own._replace(
            pro=own.pro + jnp.where(wide(fails, x), move, 0),
            con=own.con + jnp.where(wide(fails, x), 0, move),
            yes=own.yes + fails,
        )

        def aimed(own):
            return self._aim(own, x)._replace(phase=jnp.full_like(own.phase, STRIDE), tick=own.tick * 0)

        return _where(own.tick >= self._count(own), aimed, own)

    def _voted(self, own: Own):
        """The direction that the probes point to: the mean of `(vote - mean vote) * move`, or of `vote * move`."""
        asked = own.tick.astype(own.yes.dtype)
        mean = jnp.where(asked > 0, (2 * own.yes - asked) / jnp.maximum(asked, 1), 0)
        total = wide(1 - mean, own.pro) * own.pro - wide(1 + mean, own.pro) * own.con
        return select(jnp.abs(mean) == 1, own.pro - own.con, total)

    def _propose(self, own: Own, keys, x):
        noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
        middle = self._blend(own, (own.low + own.high) / 2, x)
        point = select(own.phase == BISECT, middle, self._around(own, noise, x))
        point = _where(own.phase == START, lambda _: self._drawn(own, noise, x), point)
        point = _where(own.phase == STRIDE, lambda _: self._ahead(own, noise, x), point)
        return jnp.clip(point, *edges(self.threat.bounds, x))

    def _drawn(self, own: Own, noise, x):
        """A point to start from: one of those that were given, or noise: fine, or blocks or stripes at the ends."""
        low, high = edges(self.threat.bounds, x)
        share = _uniform(noise)
        rough = stripes = jnp.round(share)
        if x.ndim == 4:
            down, right = (jnp.arange(n) // max(n // 4, 1) * max(n // 4, 1) for n in x.shape[1:3])
            rough, stripes = rough[:, down][:, :, right], jnp.broadcast_to(stripes[:, :1], x.shape)
        given = 0 if self.starts is None else len(self.starts)
        kind = (own.tick - given) % 3
        ends = 0.01 + 0.98 * select(kind == 1, rough, stripes)  # probes can go both ways from there
        share = select(kind == 0, share, ends)
        point = low + (high - low) * share
        if given:
            pool = jnp.asarray(self.starts, x.dtype)[jnp.minimum(own.tick, given - 1)]
            point = select(own.tick < given, pool, point)
        return point

    def _blend(self, own: Own, share, x):
        """The point at a share of the way from the example to `outer`; in linf the cube of that share clips it."""
        if self.threat.norm == "linf":
            far = wide(share * own.reach, x)
            return jnp.clip(own.outer, x - far, x + far)
        return x + wide(share, x) * (own.outer - x)

    def _finest(self, x) -> float:
        return 1e-3

    def _count(self, own: Own) -> Any:
        return jnp.full_like(own.tick, 1)

    def _aim(self, own: Own, x) -> Own:
        return own._replace(normal=self._voted(own))

    def _around(self, own: Own, noise, x) -> Any:
        raise TypeError(f"{type(self).__name__} must define _around")

    def _ahead(self, own: Own, noise, x) -> Any:
        raise TypeError(f"{type(self).__name__} must define _ahead")

    def _strode(self, own: Own, fails, point, x) -> Own:
        raise TypeError(f"{type(self).__name__} must define _strode")


def _where(mine, new, old):
    """The rows of `new(old)` where they are meant, which is not computed where none is."""
    return lax.cond(jnp.any(mine), lambda: select(mine, new(old), old), lambda: old)


def _uniform(noise):
    """Uniform numbers in [0, 1] of normal ones."""
    return (1 + lax.erf(noise / math.sqrt(2))) / 2


def _length(value):
    return jnp.sqrt(jnp.sum(jnp.square(flat(value)), axis=-1))


def _unit(value):
    """Rows of Euclidean length one; rows of zeros stay."""
    length = _length(value)
    return value / wide(jnp.where(length > 0, length, 1), value)


def _spread(threat: Threat, x):
    """The width of the bounds where they are widest."""
    low, high = edges(threat.bounds, x)
    return jnp.max(high - low)


def _given(threat: Threat, norms: tuple[str, ...], name: str, queries: int, starts: Any) -> None:
    """Check what all walks take."""
    ball(threat, norms, name)
    check.whole("queries", queries)
    if starts is not None and (getattr(starts, "ndim", 0) < 2 or len(starts) == 0):
        raise ValueError(
            f"starts must be points [m, ...], like x, that every row tries; got {getattr(starts, 'shape', starts)}. "
            "A single point? Pass point[None]."
        )


# --------------------------------------------------------------------------------------------------------- HopSkipJump


@pytree
class HopSkipJump(Walk):
    """Estimates the normal of the boundary, strides along it, bisects back; built by `hopskipjump`."""

    gamma: float = static()
    probes: tuple[int, int] = static()

    def _finest(self, x) -> float:
        d = flat(x).shape[1]
        return self.gamma / (d * math.sqrt(d) if self.threat.norm == "l2" else d * d)

    def _count(self, own: Own):
        first, most = self.probes
        return jnp.minimum(jnp.floor(first * jnp.sqrt(own.round.astype(own.low.dtype))), most).astype(jnp.int32)

    def _around(self, own: Own, noise, x):
        along = _unit(noise if self.threat.norm == "l2" else 2 * _uniform(noise) - 1)
        far = jnp.where(own.round == 1, 0.1 * _spread(self.threat, x), self.gamma * own.reach / flat(x).shape[1])
        return own.at + wide(far, x) * along

    def _aim(self, own: Own, x) -> Own:
        ahead = self.threat.steepest(self._voted(own))
        size = self.threat.size(own.at, x)
        return own._replace(normal=ahead, length=size / jnp.sqrt(own.round.astype(x.dtype)))

    def _ahead(self, own: Own, noise, x):
        return own.at + wide(own.length, x) * own.normal

    def _strode(self, own: Own, fails, point, x) -> Own:
        shorter = own._replace(length=own.length / 2)
        again = self._probing(own._replace(round=own.round + 1, reach=self.threat.size(own.at, x)))
        return select(fails, self._from(own, point, x), select(own.tick >= _HALVINGS, again, shorter))


def hopskipjump(
    threat: Threat,
    *,
    queries: int = 10_000,
    gamma: float = 1.0,
    probes: tuple[int, int] = (100, 10_000),
    starts: Any = None,
    early: bool = False,
    name: str = "hopskipjump",
) -> HopSkipJump:
    """Return HopSkipJump: the normal of the boundary by random probes, a stride along it, bisection back.

    Args:
      threat: a norm ball `l2` or `linf`.
      queries: points that are asked. `Result.queries` counts two more: the example, and the verification in the end.
      gamma: how fine the bisection is, and how far a probe goes: shares `gamma / n^1.5` (linf: `gamma / n^2`) and
        `gamma / n` of the distance, for n features.
      probes: of the first round, and at most; they grow with the root of the round.
      starts: `[m, ...]` points that every row tries before noise, e.g. examples of other classes; None is none.
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on settings out of range, or a threat of another norm.

    References:
      Chen, Jordan and Wainwright 2020, HopSkipJumpAttack: a query-efficient decision-based attack, alg. 2,
      arXiv:1904.02144. As in the authors' code the first probes go a tenth of the range, and later ones a share of the
      distance before the bisection. Differs: rows have budgets of their own, down to single queries; starts are also
      blocks and stripes; every failing point that was asked may be the answer; a stride is halved at most 50
      times.
    """
    _given(threat, ("l2", "linf"), name, queries, starts)
    check.positive("gamma", gamma)
    for what, value in zip(("probes[0]", "probes[1]"), probes, strict=True):
        check.whole(what, value)
    return HopSkipJump(
        threat=threat,
        starts=starts,
        name=name,
        max_steps=queries,
        early=early,
        gamma=float(gamma),
        probes=(*probes,),
    )


# --------------------------------------------------------------------------------------------------------------- GeoDA


@pytree
class GeoDA(Walk):
    """Estimates the normal of a boundary that is nearly flat, and goes along it from the example; built by `geoda`."""

    counts: tuple[int, ...] = static()
    sigma: float = static()
    waves: int = static()

    def _finest(self, x) -> float:
        return 1e-4

    def _count(self, own: Own):
        return jnp.asarray(self.counts, jnp.int32)[jnp.clip(own.round - 1, 0, len(self.counts) - 1)]

    def _around(self, own: Own, noise, x):
        if x.ndim == 4 and self.waves < max(x.shape[1:3]):
            down, right = (jnp.asarray(cosines(n, self.waves), x.dtype) for n in x.shape[1:3])
            noise = jnp.einsum("bijc,ih,jw->bhwc", noise[:, : len(down), : len(right)], down, right)
        return own.at + wide(self.sigma * self._away(own, x), x) * _unit(noise)

    def _away(self, own: Own, x):
        return _length(own.at - x)

    def _aim(self, own: Own, x) -> Own:
        ahead = self._voted(own) / wide(jnp.maximum(self._away(own, x), 1e-12), x)
        return own._replace(normal=own.normal + ahead, length=self.threat.size(own.at, x))

    def _ahead(self, own: Own, noise, x):
        return x + wide(own.length, x) * self.threat.steepest(own.normal)

    def _strode(self, own: Own, fails, point, x) -> Own:
        farther = own._replace(length=own.length * 1.02)
        again = self._probing(own._replace(round=own.round + 1))
        return select(fails, self._from(own, point, x), select(own.tick >= _HALVINGS, again, farther))


def geoda(
    threat: Threat,
    *,
    queries: int = 4000,
    rounds: int = 10,
    decay: float = 0.6,
    sigma: float = 0.01,
    waves: int = 75,
    starts: Any = None,
    early: bool = False,
    name: str = "geoda",
) -> GeoDA:
    """Return GeoDA: the normal of a nearly flat boundary by probes of low frequency; the example moves along it.

    Args:
      threat: a norm ball `l2` or `linf`.
      queries: points that are asked. `Result.queries` counts two more: the example, and the verification in the end.
      rounds: how often the normal is estimated; round i gets a share of the queries that grows as `decay^(-2 i / 3)`.
      decay: in (0, 1].
      sigma: how far a probe goes, as a share of the distance.
      waves: frequencies of each axis of images that probes are made of; as many as pixels for all.
      starts: `[m, ...]` points that every row tries before noise; None is none.
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on settings out of range, or a threat of another norm.

    References:
      Rahmati et al. 2020, GeoDA: a geometric framework for black-box adversarial attacks, alg. 1 and sec. 3.3,
      arXiv:2003.06468. As in the authors' code normals add up over the rounds. Differs: the walk along the normal
      begins at the distance that is known and grows by a fiftieth, at most 50 times; probes have a length that follows
      the distance (theirs a fixed one); votes are centered by their mean.
    """
    _given(threat, ("l2", "linf"), name, queries, starts)
    check.whole("rounds", rounds)
    check.whole("waves", waves)
    check.positive("sigma", sigma)
    if not 0 < decay <= 1:
        raise ValueError(f"decay must lie in (0, 1]; got {decay}. The authors take 0.6; 1 gives all rounds the same.")
    weights = [decay ** (-2 * (i + 1) / 3) for i in range(rounds)]
    free = max(queries - 20 * rounds, rounds)  # a round spends about so many on the way
    counts = tuple(max(int(free * w / sum(weights)), 1) for w in weights)
    return GeoDA(
        threat=threat,
        starts=starts,
        name=name,
        max_steps=queries,
        early=early,
        counts=counts,
        sigma=float(sigma),
        waves=waves,
    )


# ------------------------------------------------------------------------------------------------------------- SignOPT


@pytree
class SignOPT(Walk):
    """Descends on the distance to the boundary as a function of the direction; built by `signopt`."""

    probes: int = static()
    sigma: float = static()

    def _more(self, x):
        return jnp.zeros_like(flat(x)[:, 0]) > 1  # whether this round has come nearer

    def _finest(self, x) -> float:
        return 1e-4

    def _count(self, own: Own):
        return jnp.full_like(own.tick, self.probes)

    def _along(self, own: Own, push, x):
        """The point as far as `at`, in its direction pushed aside."""
        far = _length(own.at - x)
        return x + wide(far, x) * _unit(_unit(own.at - x) + push)

    def _around(self, own: Own, noise, x):
        return self._along(own, self.sigma * _unit(noise), x)

    def _aim(self, own: Own, x) -> Own:
        return own._replace(normal=_unit(self._voted(own)), more=own.more & False)

    def _ahead(self, own: Own, noise, x):
        return self._along(own, wide(own.length, x) * own.normal, x)

    def _reached(self, own: Own, x) -> Own:
        """After the start, probe; after a stride, double it and stride again."""
        first = own._replace(length=jnp.full_like(own.length, 0.2))
        phase = jnp.full_like(own.phase, STRIDE)
        more = own._replace(phase=phase, tick=own.tick * 0, length=2 * own.length, more=own.more | True)
        return select(own.round == 1, self._probing(first), more)

    def _strode(self, own: Own, fails, point, x) -> Own:
        shorter = own._replace(length=own.length / 2)
        over = own.more | (own.tick >= 10)
        return select(fails, self._from(own, point, x), select(over, self._probing(shorter), shorter))


def signopt(
    threat: Threat,
    *,
    queries: int = 10_000,
    probes: int = 200,
    sigma: float = 1e-3,
    starts: Any = None,
    early: bool = False,
    name: str = "signopt",
) -> SignOPT:
    """Return Sign-OPT: descent on the distance to the boundary along a direction, from signs of its change.

    One query tells whether the boundary is nearer along a direction beside the current one.

    Args:
      threat: a norm ball `l2`.
      queries: points that are asked. `Result.queries` counts two more: the example, and the verification in the end.
      probes: queries of one estimate.
      sigma: how far a probe turns the direction, in radians.
      starts: `[m, ...]` points that every row tries before noise; None is none.
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on settings out of range, or a threat of another norm.

    References:
      Cheng et al. 2020, Sign-OPT: a query-efficient hard-label adversarial attack, alg. 1 and 2, arXiv:1909.10773.
      Differs: the line search goes on from the nearer point along the same estimate, and the last length is where the
      next one begins; the direction is the first failing noise, not the best of a hundred; bisection to a share of
      1e-4; votes are centered by their mean.
    """
    _given(threat, ("l2",), name, queries, starts)
    check.whole("probes", probes)
    check.positive("sigma", sigma)
    return SignOPT(
        threat=threat,
        starts=starts,
        name=name,
        max_steps=queries,
        early=early,
        probes=probes,
        sigma=float(sigma),
    )


# ------------------------------------------------------------------------------------------------------------ Boundary


@pytree
class Boundary(Walk):
    """A random walk over spheres around the example, each a little smaller; built by `boundary`."""

    spherical: float = static()
    source: float = static()
    adaptation: float = static()
    every: int = static()
    windows: tuple[int, int] = static()

    class More(NamedTuple):
        """Lengths of both steps, the latest verdicts on each (-1: none yet), and whether `outer` is on the sphere."""

        spherical: Float[Array, " b"]
        source: Float[Array, " b"]
        around: Float[Array, "b n"]
        inward: Float[Array, "b m"]
        held: Any

    def _more(self, x):
        nothing = jnp.zeros_like(flat(x)[:, 0])
        around, inward = (nothing[:, None] - jnp.ones((1, n), x.dtype) for n in self.windows)
        return self.More(nothing + self.spherical, nothing + self.source, around, inward, nothing > 1)

    def _reached(self, own: Own, x) -> Own:
        return self._probing(own)

    def _sphere(self, own: Own, noise, x):
        """A point as far from the example as `at`, a random step aside of it."""
        back = x - own.at
        far = _length(back)
        inward = _unit(back)
        aside = noise - wide(jnp.sum(flat(noise * inward), axis=-1), x) * inward
        aside = wide(own.more.spherical * far, x) * _unit(aside)
        point = x + (aside - back) / wide(jnp.sqrt(jnp.square(own.more.spherical) + 1), x)
        return jnp.clip(point, *edges(self.threat.bounds, x))

    def _around(self, own: Own, noise, x):
        """From the sphere inward."""
        far = _length(own.at - x)
        sphere = select(own.more.held, own.outer, self._sphere(own, noise, x))
        away = _length(sphere - x)
        inward = jnp.maximum(own.more.source * far + away - far, 0) / jnp.where(away > 0, away, 1)
        return sphere + wide(inward, x) * (x - sphere)

    def _ahead(self, own: Own, noise, x):
        return self._sphere(own, noise, x)

    def _strode(self, own: Own, fails, point, x) -> Own:
        """The sphere itself was asked: remember the verdict, and ask at the same place farther in."""
        more = own.more._replace(around=_latest(own.more.around, fails), held=own.more.held | True)
        return own._replace(phase=jnp.full_like(own.phase, PROBE), outer=point, tick=own.tick - 1, more=more)

    def _probed(self, own: Own, fails, point, x) -> Own:
        nearer = fails & (_length(point - x) < _length(own.at - x))
        judged = own.more._replace(inward=_latest(own.more.inward, fails))
        more: Any = select(own.more.held, self._adapted(judged), own.more)._replace(held=own.more.held & False)
        due = own.tick % self.every == self.every - 1
        phase = jnp.where(due, STRIDE, PROBE).astype(own.phase.dtype)
        return own._replace(at=select(nearer, point, own.at), more=more, phase=phase)

    def _adapted(self, more: Any):
        """Longer steps where the boundary looks flat, shorter ones where it does not."""

        def factor(verdicts, low, high):
            full = jnp.all(verdicts >= 0, axis=-1)
            mean = jnp.mean(verdicts, axis=-1)
            up, down = full & (mean > high), full & (mean < low)
            scale = jnp.where(up, self.adaptation, jnp.where(down, 1 / self.adaptation, 1))
            return scale.astype(verdicts.dtype), jnp.where((up | down)[:, None], -1, verdicts)

        one, around = factor(more.around, 0.2, 0.5)
        two, inward = factor(more.inward, 0.1, 0.25)
        return more._replace(
            spherical=more.spherical * one, source=more.source * one * two, around=around, inward=inward
        )


def _latest(window, fails):
    return jnp.concatenate([window[:, 1:], fails[:, None].astype(window.dtype)], axis=1)


def boundary(
    threat: Threat,
    *,
    queries: int = 25_000,
    spherical: float = 0.01,
    source: float = 0.01,
    adaptation: float = 1.5,
    every: int = 10,
    windows: tuple[int, int] = (100, 30),
    starts: Any = None,
    early: bool = False,
    name: str = "boundary",
) -> Boundary:
    """Return the boundary attack: a random walk among failing points, ever nearer to the example.

    Args:
      threat: a norm ball `l2`.
      queries: points that are asked. `Result.queries` counts two more: the example, and the verification in the end.
      spherical: length of the first steps on the sphere around the example, as a share of the distance.
      source: length of the first steps toward the example, as a share of the distance.
      adaptation: factor by which steps grow or shrink.
      every: after so many steps the point on the sphere is asked, too, and the steps are adapted.
      windows: how many of the latest verdicts on the sphere, and farther in, decide that.
      starts: `[m, ...]` points that every row tries before noise; None is none.
      early: stop a row once a failing point within the budget is found.
      name: enters the random keys.

    Returns:
      The attack.

    Raises:
      ValueError: on settings out of range, or a threat of another norm.

    References:
      Brendel, Rauber and Bethge 2018, Decision-based adversarial attacks, alg. 1, arXiv:1712.04248. Steps are adapted
      as in Foolbox: longer where more than half of the verdicts on the sphere fail (a quarter of those farther in),
      shorter below a fifth (a tenth). Differs from it: noise, steps and windows are a row's own; the start is bisected;
      points nearer to the example than `at` count even on the sphere.
    """
    _given(threat, ("l2",), name, queries, starts)
    check.positive("spherical", spherical)
    check.positive("source", source)
    check.whole("every", every, least=2)
    for what, value in zip(("windows[0]", "windows[1]"), windows, strict=True):
        check.whole(what, value)
    if not 1 < adaptation < math.inf:
        raise ValueError(f"adaptation must be a finite factor above 1; got {adaptation}. Foolbox takes 1.5.")
    return Boundary(
        threat=threat,
        starts=starts,
        name=name,
        max_steps=queries,
        early=early,
        spherical=float(spherical),
        source=float(source),
        adaptation=float(adaptation),
        every=every,
        windows=(*windows,),
    )
