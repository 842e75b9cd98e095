"""Attacks that turn, shift, bend and recolor images: transformations as components of a semantic threat.

What is attacked are the parameters (see `threats.semantic`): `behind(threat, model)` is a model of packed rows, and an
attack searches them as it would pixels, `pgd` along the gradient, `worst_of` over a grid or over draws:

    affine = Affine(degrees=30, pixels=3)
    threat = semantic(affine, shape)
    found = worst_of(threat, affine.grid(5, 5, 5)).run(key, behind(threat, model), threat.pack(x), y)
    images = threat.images(found.x)

What lives here: the components, `worst_of`, and `stadv` with its penalty. What does not: several components and their
order (`composite`), the threat itself (`threats.semantic`).
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxadv import losses
from jaxadv.attacks.gradient import GradientAttack, pgd
from jaxadv.attacks.gradient import State as Descent
from jaxadv.attacks.judge import Stepped, ask, better, judge
from jaxadv.attacks.optimizers import row_adam
from jaxadv.core import Result, check, edges, pytree, rows, select, static, step_keys
from jaxadv.core.rows import flat
from jaxadv.threats.semantic import Component, Semantic


def _still(values: Float[Array, "b m"], at: np.ndarray, made: Array, x: Array) -> Array:
    """The image to the bit where no parameter moved; gradients are those of the transformation everywhere."""
    same = jnp.all(values == jnp.asarray(at, values.dtype)[None], axis=-1)
    return select(same, jax.lax.stop_gradient(x) + (made - jax.lax.stop_gradient(made)), made)


def _images(x: Any, what: str, channels: int | None = None) -> None:
    if x.ndim != 4 or (channels is not None and x.shape[-1] != channels):
        kind = "images [b, h, w, c]" if channels is None else f"images [b, h, w, {channels}] in red, green and blue"
        raise ValueError(f"{what} needs {kind}; got {x.shape}. For data of another kind use another component.")


# ------------------------------------------------------------------------------------------------------------ geometry


def resample(x: Float[Array, "b h w c"], down: Float[Array, "b p q"], right: Float[Array, "b p q"]) -> Array:
    """Read images at other places, linearly between the four pixels around; outside them there is zero.

    Args:
      x: `[b, h, w, c]`.
      down: `[b, p, q]` row that each new pixel is read at, in pixels.
      right: `[b, p, q]` column.

    Returns:
      `[b, p, q, c]`; gradients pass to the places and to `x`.
    """
    down, right = down[:, None], right[:, None]
    row = jnp.floor(down) + jnp.array([0, 0, 1, 1], x.dtype).reshape(1, 4, 1, 1)
    column = jnp.floor(right) + jnp.array([0, 1, 0, 1], x.dtype).reshape(1, 4, 1, 1)
    weight = (1 - jnp.abs(down - row)) * (1 - jnp.abs(right - column))
    inside = (row >= 0) & (row < x.shape[1]) & (column >= 0) & (column < x.shape[2])
    row, column = jnp.clip(row, 0, x.shape[1] - 1), jnp.clip(column, 0, x.shape[2] - 1)
    place = flat((row * x.shape[2] + column).astype(jnp.int32))
    around = jnp.take_along_axis(x.reshape(x.shape[0], -1, x.shape[-1]), place[..., None], axis=1)
    return jnp.sum(jnp.where(inside, weight, 0)[..., None] * around.reshape(*row.shape, -1), axis=1)


def turn(degrees: Float[Array, " b"]) -> tuple[Array, Array]:
    """Return cosine and sine of angles, exactly 0, 1 or -1 at multiples of 90 degrees.

    Args:
      degrees: `[b]`.

    Returns:
      Two `[b]`.
    """
    quarter = jax.lax.stop_gradient(jnp.round(degrees / 90))
    angle = (degrees - 90 * quarter) * (math.pi / 180)
    cosine, sine, which = jnp.cos(angle), jnp.sin(angle), jnp.mod(quarter, 4)
    ahead = jnp.where(which == 0, 1.0, jnp.where(which == 2, -1.0, 0.0)).astype(degrees.dtype)
    aside = jnp.where(which == 1, 1.0, jnp.where(which == 3, -1.0, 0.0)).astype(degrees.dtype)
    return ahead * cosine - aside * sine, aside * cosine + ahead * sine


@dataclasses.dataclass(frozen=True)
class Affine(Component):
    """Rotation about the middle, anticlockwise, then translation; bilinear, with zeros from outside.

    Attributes:
      degrees: largest angle to either side. Parameter 0.
      pixels: largest shift down and to the right. Parameters 1 and 2; without any there is only the angle.

    References:
      Engstrom et al. 2019, Exploring the landscape of spatial robustness, sec. 2, arXiv:1712.02779 (30 degrees, 3
      pixels). The rotation is that of kornia with aligned corners.
    """

    degrees: float = 30.0
    pixels: float = 3.0

    def __post_init__(self):
        """Check the ranges."""
        for what in ("degrees", "pixels"):
            check.not_negative(what, getattr(self, what), "0 is no movement.")

    def ranges(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return lowest, identical and highest angle and shifts."""
        del shape
        high = np.array([self.degrees, *([self.pixels] * 2 if self.pixels else [])])
        return -high, 0 * high, high

    def grid(self, *counts: int) -> Float[np.ndarray, "n m"]:
        """Return all combinations of evenly spaced parameters, from end to end.

        Args:
          *counts: for each parameter how many values, e.g. `(5, 5, 5)`; one value is the middle.

        Returns:
          `[n, m]`, for `worst_of`.

        Raises:
          ValueError: unless there is one count for each parameter.
        """
        low, still, high = self.ranges(())
        if len(counts) != low.size:
            raise ValueError(f"grid needs one count for each of the {low.size} parameters; got {counts}.")
        lines = [np.linspace(a, c, n) if n > 1 else np.array([b]) for a, b, c, n in zip(low, still, high, counts)]
        return np.array(list(itertools.product(*lines)))

    def __call__(self, x, values):
        """Return the turned and shifted images."""
        _images(x, "Affine")
        cosine, sine = turn(values[:, 0])
        (h, w), shift = x.shape[1:3], values[:, 1:] if self.pixels else jnp.zeros_like(values[:, :1].repeat(2, 1))
        down = jnp.arange(h, dtype=x.dtype)[None, :, None] - (h - 1) / 2 - rows.wide(shift[:, 0], x)[..., 0]
        right = jnp.arange(w, dtype=x.dtype)[None, None, :] - (w - 1) / 2 - rows.wide(shift[:, 1], x)[..., 0]
        c, s = (rows.wide(v, x)[..., 0] for v in (cosine, sine))
        made = resample(x, s * right + c * down + (h - 1) / 2, c * right - s * down + (w - 1) / 2)
        return _still(values, self.ranges(x.shape[1:])[1], made, x)


@dataclasses.dataclass(frozen=True)
class Flow(Component):
    """A field of shifts, one for each pixel, or a coarse one that is interpolated between (smooth by construction).

    Attributes:
      pixels: largest shift of a pixel along either axis.
      grid: number of shifts along each axis, at least 2; 0 for one at each pixel.

    References:
      Xiao et al. 2018, Spatially transformed adversarial examples, eq. 1, arXiv:1801.02612. Differs: the field is kept
      within a range (and smooth by a coarse grid); `stadv` adds their penalty on differences.
    """

    pixels: float = 1.0
    grid: int = 0

    def __post_init__(self):
        """Check the settings."""
        if not (math.isfinite(self.pixels) and self.pixels > 0) or self.grid < 0 or self.grid == 1:
            raise ValueError(f"pixels must be positive and grid 0 or at least 2; got {self.pixels} and {self.grid}.")

    def _shape(self, shape):
        return (self.grid, self.grid, 2) if self.grid else (*shape[:2], 2)

    def ranges(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return lowest, identical and highest shifts, down and to the right at each place."""
        high = np.full(math.prod(self._shape(shape)), self.pixels)
        return -high, 0 * high, high

    def field(self, values: Float[Array, "b m"], shape: tuple[int, ...]) -> Float[Array, "b h w 2"]:
        """Return the shift of each pixel.

        Args:
          values: `[b, m]` parameters.
          shape: of an image.

        Returns:
          `[b, h, w, 2]`, down and to the right.
        """
        field = values.reshape(values.shape[0], *self._shape(shape))
        if not self.grid:
            return field
        blends = []
        for n in shape[:2]:
            place = np.linspace(0, self.grid - 1, n)[:, None]
            blends.append(jnp.asarray(np.maximum(1 - np.abs(place - np.arange(self.grid)[None]), 0), values.dtype))
        return jnp.einsum("pi,bijk,qj->bpqk", blends[0], field, blends[1], precision="highest")

    def __call__(self, x, values):
        """Return the bent images: each pixel is read where its shift points."""
        _images(x, "Flow")
        field = self.field(values, x.shape[1:])
        down = jnp.arange(x.shape[1], dtype=x.dtype)[None, :, None] + field[..., 0]
        right = jnp.arange(x.shape[2], dtype=x.dtype)[None, None, :] + field[..., 1]
        return _still(values, self.ranges(x.shape[1:])[1], resample(x, down, right), x)


# --------------------------------------------------------------------------------------------------------------- color


def to_hsv(x: Float[Array, "b h w 3"]) -> tuple[Array, Array, Array]:
    """Return hue in turns, saturation and value of colors in [0, 1], as `colorsys.rgb_to_hsv`.

    Args:
      x: `[b, h, w, 3]`.

    Returns:
      Three `[b, h, w]`; gray has hue 0. Gradients are finite everywhere.
    """
    r, g, b = x[..., 0], x[..., 1], x[..., 2]
    most, least = jnp.max(x, axis=-1), jnp.min(x, axis=-1)
    spread = most - least
    safe = jnp.where(spread > 0, spread, 1)
    sixth = jnp.where(r == most, (g - b) / safe, jnp.where(g == most, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = jnp.where(spread > 0, jnp.mod(sixth / 6, 1), 0)
    return hue, jnp.where(most > 0, spread / jnp.where(most > 0, most, 1), 0), most


def from_hsv(hue: Array, saturation: Array, value: Array) -> Float[Array, "b h w 3"]:
    """Return the colors of hue (in turns), saturation and value, as `colorsys.hsv_to_rgb`.

    Args:
      hue: `[b, h, w]`, any number.
      saturation: `[b, h, w]` in [0, 1].
      value: `[b, h, w]` in [0, 1].

    Returns:
      `[b, h, w, 3]`.
    """

    def channel(n):
        k = jnp.mod(n + 6 * hue, 6)
        return value - value * saturation * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

    return jnp.stack([channel(n) for n in (5, 3, 1)], axis=-1)


@dataclasses.dataclass(frozen=True)
class _Color(Component):
    low: float
    high: float
    still = 0.0

    def __post_init__(self):
        """Check the range."""
        if not self.low <= self.still <= self.high or not math.isfinite(self.high - self.low):
            raise ValueError(
                f"the range of {type(self).__name__} must hold {self.still}, which changes nothing; got "
                f"{self.low} to {self.high}."
            )

    def ranges(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return lowest, identical and highest value."""
        del shape
        return tuple(np.array([v], np.float64) for v in (self.low, self.still, self.high))  # pyright: ignore

    def __call__(self, x, values):
        """Return the recolored images."""
        _images(x, type(self).__name__, 3 if isinstance(self, (Hue, Saturation)) else None)
        made = self._made(x, rows.wide(values[:, 0], x))
        return _still(values, self.ranges(x.shape[1:])[1], made, x)

    def _made(self, x, value):
        raise TypeError(f"{type(self).__name__} must define _made")


@dataclasses.dataclass(frozen=True)
class Hue(_Color):
    """Turn the hue, in radians, as kornia does.

    References:
      Hsiung et al. 2023, Towards compositional adversarial robustness, sec. 3.1, arXiv:2202.04235.
    """

    low: float = -math.pi
    high: float = math.pi

    def _made(self, x, value):
        hue, saturation, most = to_hsv(x)
        return from_hsv(hue + value[..., 0] / (2 * math.pi), saturation, most)


@dataclasses.dataclass(frozen=True)
class Saturation(_Color):
    """Multiply the saturation, clipped to [0, 1], as kornia does.

    References:
      Hsiung et al. 2023, Towards compositional adversarial robustness, sec. 3.1, arXiv:2202.04235.
    """

    low: float = 0.7
    high: float = 1.3
    still = 1.0

    def _made(self, x, value):
        hue, saturation, most = to_hsv(x)
        return from_hsv(hue, jnp.clip(saturation * value[..., 0], 0, 1), most)


@dataclasses.dataclass(frozen=True)
class Brightness(_Color):
    """Add a number to every pixel, clipped to [0, 1].

    References:
      Hsiung et al. 2023, Towards compositional adversarial robustness, sec. 3.1, arXiv:2202.04235.
    """

    low: float = -0.2
    high: float = 0.2

    def _made(self, x, value):
        return jnp.clip(x + value, 0, 1)


@dataclasses.dataclass(frozen=True)
class Contrast(_Color):
    """Multiply every pixel, clipped to [0, 1]; about zero, not about the mean.

    References:
      Hsiung et al. 2023, Towards compositional adversarial robustness, sec. 3.1, arXiv:2202.04235.
    """

    low: float = 0.7
    high: float = 1.3
    still = 1.0

    def _made(self, x, value):
        return jnp.clip(x * value, 0, 1)


@dataclasses.dataclass(frozen=True)
class Pixels(Component):
    """Add a perturbation of its own to every pixel, clipped to [0, 1]: the cube linf as a component.

    Attributes:
      eps: largest change of a pixel.
    """

    eps: float = 8 / 255

    def __post_init__(self):
        """Check the budget."""
        check.positive("eps", self.eps, "It is in the units of pixels in [0, 1], a usual value is 8/255.")

    def ranges(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return lowest, identical and highest change of each pixel."""
        high = np.full(math.prod(shape), self.eps)
        return -high, 0 * high, high

    def __call__(self, x, values):
        """Return the perturbed images."""
        made = jnp.clip(x + values.reshape(x.shape), 0, 1)
        return _still(values, self.ranges(x.shape[1:])[1], made, x)


# -------------------------------------------------------------------------------------------------------- worst of many


class State(NamedTuple):
    """What the next step needs; every leaf is `[b, ...]`."""

    keys: Any
    best: Float[Array, "b d"]
    score: Float[Array, " b"]
    broken: Bool[Array, " b"]
    step: Int[Array, " b"]
    nonfinite: Bool[Array, " b"]
    infeasible: Bool[Array, " b"]


@pytree
class WorstOf(Stepped):
    """Asks at listed or drawn parameters and keeps the worst; built by `worst_of`."""

    threat: Semantic
    listed: Any
    name: str = static()
    max_steps: int = static()
    early: bool = static()

    def init(self, keys, model, x, y) -> State:
        """Begin with the row as it is."""
        x = jnp.asarray(x)
        score, broken, finite = judge(ask(model, x), y)
        low, high = edges(self.threat.bounds, x)
        outside = jnp.any((x < low) | (x > high), axis=-1)
        return State(keys, x, score, broken, score.astype(jnp.int32) * 0, ~finite, outside)

    def step(self, state: State, model, x, y) -> State:
        """Ask at the next parameters."""
        if self.listed is None:
            point = self.threat.sample(step_keys(state.keys, state.step), x)
        else:
            n = self.threat.count
            values = jnp.asarray(self.listed, x.dtype)[jnp.minimum(state.step, self.max_steps - 1)]
            point = self.threat.project(jnp.concatenate([x[:, :n], values, x[:, n + values.shape[1] :]], axis=-1), x)
        score, broken, finite = judge(ask(model, point), y)
        taken = better(score, broken, state.score, state.broken, self.early)
        best, score = select(taken, (point, score), (state.best, state.score))
        return state._replace(
            best=best,
            score=score,
            broken=state.broken | broken,
            step=state.step + 1,
            nonfinite=state.nonfinite | ~finite,
        )

    def result(self, state: State, model, x, y) -> Result:
        """Ask the model again at the worst row."""
        score, broken, finite = judge(ask(model, state.best), y)
        return Result(
            x=state.best,
            score=score,
            success=broken,
            size=self.threat.size(state.best, x),
            queries=state.step + 2,
            grads=state.step * 0,
            flags={
                "nonfinite": state.nonfinite | ~finite,
                "zero_gradient": state.nonfinite & False,
                "infeasible": state.infeasible,
            },
        )


def worst_of(
    threat: Semantic, listed: Any = None, *, draws: int = 10, early: bool = False, name: str = "worst_of"
) -> WorstOf:
    """Return the search over given parameters, a grid, or over random ones (worst of k).

    Args:
      threat: a semantic threat.
      listed: `[n, m]` parameters to try, such as `Affine(...).grid(5, 5, 5)`, the same for every row and brought into
        the ranges; None draws them.
      draws: number of draws where nothing is listed; orders are drawn, too.
      early: stop a row once it is broken.
      name: enters the random keys.

    Returns:
      The attack, of packed rows.

    Raises:
      ValueError: on parameters of another number than the threat has, or `draws` that is not at least 1.

    References:
      Engstrom et al. 2019, Exploring the landscape of spatial robustness, sec. 3, arXiv:1712.02779.
    """
    check.whole("draws", draws)
    if listed is not None:
        listed = np.asarray(listed, np.float32)
        m = sum(c.ranges(threat.shape)[0].size for c in threat.components)
        if listed.ndim != 2 or listed.shape[1] != m or not len(listed):
            raise ValueError(f"listed must hold rows of the {m} parameters of the threat; got shape {listed.shape}.")
    return WorstOf(
        threat=threat, listed=listed, name=name, max_steps=draws if listed is None else len(listed), early=early
    )


# --------------------------------------------------------------------------------------------------------------- stAdv


def roughness(field: Float[Array, "b h w 2"]) -> Float[Array, " b"]:
    """Return how much neighboring shifts differ: over pixels and their four neighbors, the lengths of differences.

    Args:
      field: `[b, h, w, 2]` shifts of pixels.

    Returns:
      `[b]`; each pair of neighbors counts twice, as in the paper. Gradients at equal shifts are zero.
    """
    total = jnp.zeros_like(field[:, 0, 0, 0])
    for axis in (1, 2):
        square = jnp.sum(jnp.square(jnp.diff(field, axis=axis)), axis=-1)
        length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        total = total + 2 * jnp.sum(length, axis=(1, 2))
    return total


@pytree
class StAdv(GradientAttack):
    """Descends the margin and the roughness of a flow at once; built by `stadv`."""

    tau: Any = dataclasses.field()

    def _rough(self, point):
        threat: Any = self.threat
        flow = threat.components[0]
        return roughness(flow.field(threat.values(point)[1][0], threat.shape))

    def _ask(self, state: Descent, model, x, y):
        """The margin pulls while the row holds, the roughness always."""
        grad, (score, broken, finite), memory = super()._ask(state, model, x, y)
        smooth = jax.grad(lambda point: jnp.sum(self._rough(point)))(state.point)
        return select(broken, jnp.zeros_like(grad), grad) + self.tau * smooth, (score, broken, finite), memory

    def _remember(self, state: Descent, score, broken) -> Descent:
        """Of failing points the smoothest is best."""
        return super()._remember(state, jnp.where(broken, self._rough(state.point), score), broken)


def stadv(
    threat: Semantic, *, tau: Any = 0.05, steps: int = 100, step_size: Any = 0.02, name: str = "stadv", **settings: Any
) -> StAdv:
    """Return stAdv: a flow that fools the model and bends as smoothly as it can, `margin + tau * roughness` by Adam.

    Run it on `behind(threat, model)`, as any attack of packed rows.

    Args:
      threat: `semantic(Flow(...), shape)`; its range bounds the shifts.
      tau: weight of the roughness; may be traced.
      steps: number of steps; each costs one gradient.
      step_size: largest change of a shift in a first step, in pixels.
      name: enters the random keys.
      **settings: further settings of `pgd`.

    Returns:
      The attack; of the failing points it has met it returns the smoothest.

    Raises:
      ValueError: if the threat is not that of a single flow, or `tau` is not positive.

    References:
      Xiao et al. 2018, Spatially transformed adversarial examples, eq. 2 to 4, arXiv:1801.02612. Differs: Adam in the
      place of L-BFGS; shifts have a range; the margin pulls no more once the row fails (their kappa is 0).
    """
    if not isinstance(threat, Semantic) or len(threat.components) != 1 or not isinstance(threat.components[0], Flow):
        raise ValueError(f"threat must be semantic(Flow(...), shape) for {name}; got {threat.norm}.")
    check.positive("tau", tau, "Without a penalty use pgd.")
    wiring = {"steps": steps, "step_size": step_size, "start": "zero", "loss": losses.margin, "steep": False}
    base = pgd(threat, **wiring | {"transform": row_adam(0.9, 0.999), "name": name} | settings)
    return StAdv(**vars(base), tau=tau)
