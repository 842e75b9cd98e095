"""One card about robustness beyond small perturbations: corruptions, geometry, occlusion, shape and texture.

What lives here: accuracy of a model under the fifteen common corruptions, under the worst of a grid of rotations,
shifts and scales, behind a gray square, on shuffled patches, on edge maps and silhouettes; and the summaries mCE and
relative mCE. What does not: the corruptions (room `corruptions`), searches (room `attacks`), the report about a threat
(`report.py`).

References:
  Borji 2022, Is current research on adversarial robustness addressing the right problem?, arXiv:2208.00539: asks for
  such a card.
  Hendrycks and Dietterich 2019, arXiv:1903.12261: corruptions, mCE and relative mCE.
  Engstrom et al. 2019, Exploring the landscape of spatial robustness, arXiv:1712.02779: the worst of a grid.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxadv.core import as_callable, check, example_keys, robust
from jaxadv.corruptions import BENCHMARK, CORRUPTIONS, SEVERITIES, affine_warp
from jaxadv.corruptions.image import luma
from jaxadv.evaluate.intervals import clopper_pearson
from jaxadv.evaluate.verdict import batches

ALEXNET = dict(
    zip(
        BENCHMARK,
        (0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572, 0.819324, 0.564592,
         0.853204, 0.646056, 0.717840, 0.606500),
    )
)  # fmt: skip
"""Mean errors of AlexNet on ImageNet-C, by which errors are divided there (Hendrycks and Dietterich 2019)."""

GRID = {
    "rotations": tuple(float(v) for v in np.linspace(-30, 30, 9)),
    "shifts": (-0.1, 0.0, 0.1),
    "scales": (0.9, 1.0, 1.1),
}
"""Degrees, shares of the size, and factors of the worst-of-grid geometry; every combination is tried."""


class Card(NamedTuple):
    """What was measured; accuracies in [0, 1].

    Attributes:
      n: number of examples.
      clean: accuracy without any change.
      corruptions: type to the accuracies at severities 1 to 5.
      geometry: `worst` (right under every map of the grid), `mean` over the maps, and `maps`, their number.
      occlusion: (side of the square as a share of the image, mean accuracy over its places, accuracy at the worst).
      shuffle: (patches on each side, accuracy); high means that the model reads texture rather than shape.
      shape: `edges` and `silhouette`, accuracy on those images alone.
    """

    n: int
    clean: float
    corruptions: dict[str, list[float]]
    geometry: dict[str, float]
    occlusion: list[tuple[float, float, float]]
    shuffle: list[tuple[int, float]]
    shape: dict[str, float]

    def errors(self) -> dict[str, list[float]]:
        """Return the errors at severities 1 to 5, as `mce` takes them."""
        return {name: [1 - value for value in values] for name, values in self.corruptions.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the card as plain values, with the mean corruption error and intervals of the single figures."""

        def share(value: float) -> list[float]:
            return list(clopper_pearson(round(value * self.n), self.n))

        intervals = {"clean": share(self.clean), "geometry_worst": share(self.geometry["worst"])}
        return {**self._asdict(), "mean_corruption_error": mce(self.errors()), "intervals": intervals}

    def rows(self) -> list[tuple[str, float]]:
        """Return the card as lines: what was done, accuracy."""
        lines = [("no change", self.clean), ("corruptions, mean", 1 - mce(self.errors()))]
        lines += [(name.replace("_", " "), float(np.mean(values))) for name, values in self.corruptions.items()]
        lines += [(f"worst of {self.geometry['maps']:.0f} rotations, shifts, scales", self.geometry["worst"])]
        lines += [(f"a gray square of side {side:g}, worst place", worst) for side, _, worst in self.occlusion]
        lines += [(f"shuffled patches, {g} x {g}", value) for g, value in self.shuffle]
        return lines + [(f"{name} alone", value) for name, value in self.shape.items()]


def mce(errors: Mapping[str, Sequence[float]], baseline: Mapping[str, float] | None = None) -> float:
    """Return the mean corruption error.

    Args:
      errors: type to its errors at the five severities.
      baseline: type to the mean error by which each is divided, e.g. `ALEXNET` for ImageNet-C; None leaves errors as
        they are, the custom on CIFAR.

    Returns:
      The mean over types of `sum_s E_s / sum_s B_s`.

    Raises:
      ValueError: if a type has not five errors, or has no baseline.
    """
    return _mean(errors, 0.0, baseline, 0.0)


def relative_mce(
    errors: Mapping[str, Sequence[float]], clean: float, baseline: Mapping[str, float], baseline_clean: float
) -> float:
    """Return the relative mean corruption error: how much is lost by corruption, against what the baseline loses.

    Args:
      errors: type to its errors at the five severities.
      clean: error without corruption.
      baseline: type to the mean error of the baseline.
      baseline_clean: error of the baseline without corruption.

    Returns:
      The mean over types of `sum_s (E_s - clean) / sum_s (B_s - baseline_clean)`.

    Raises:
      ValueError: as `mce`.
    """
    return _mean(errors, clean, baseline, baseline_clean)


def _mean(
    errors: Mapping[str, Any], clean: float, baseline: Mapping[str, float] | None, baseline_clean: float
) -> float:
    found = []
    for name, values in errors.items():
        if np.shape(values) != (len(SEVERITIES),):
            raise ValueError(f"errors of {name!r} must be five, one for each severity; got shape {np.shape(values)}.")
        by = 1.0 if baseline is None else check.choice("baseline of a corruption", name, baseline) - baseline_clean
        found.append((np.mean(values) - clean) / by)
    return float(np.mean(found))


# ------------------------------------------------------------------------------------------------- changes of a batch

Change = Callable[[Array, Array, Any], Array]
"""`(x [b, h, w, c], index [b], setting) -> x`: what is done to a batch; the setting is data."""


@functools.cache
def _corrupted(name: str) -> Change:
    return lambda x, index, at: CORRUPTIONS[name](at[0], x, at[1], index=index)


@functools.cache
def _shuffled(g: int) -> Change:
    return lambda x, index, key: shuffle_patches(key, x, g, index=index)


def _same(x, index, at):
    return x


def _warped(x, index, matrix):
    return jax.vmap(affine_warp, (0, None))(x, matrix)


def occlude(x: Float[Array, "b h w c"], row, column, side) -> Float[Array, "b h w c"]:
    """Cover a square with gray.

    Args:
      x: `[b, h, w, c]`.
      row: its first row, as a share of the height.
      column: its first column, as a share of the width.
      side: as a share of the height and of the width.

    Returns:
      The images with 0.5 there.
    """
    h, w = x.shape[1:3]
    down, right = jnp.arange(h)[None, :, None, None] / h, jnp.arange(w)[None, None, :, None] / w
    inside = (down >= row - 1e-6) & (down < row + side - 1e-6) & (right >= column - 1e-6)
    return jnp.where(inside & (right < column + side - 1e-6), 0.5, x)


def shuffle_patches(key: Any, x: Float[Array, "b h w c"], g: int, *, index: Any) -> Float[Array, "b h w c"]:
    """Cut images into patches and lay these in a random order: texture stays, shape goes.

    Args:
      key: a typed key.
      x: `[b, h, w, c]`.
      g: patches along each side; what is left where a side is no multiple of it stays in place.
      index: int `[b]` dataset indices, from which the random orders come.

    Returns:
      Of the shape of `x`.
    """
    h, w = x.shape[1] // g, x.shape[2] // g

    def one(key, image):
        patches = image[: g * h, : g * w].reshape(g, h, g, w, -1).swapaxes(1, 2).reshape(g * g, h, w, -1)
        patches = patches[jax.random.permutation(key, g * g)]
        laid = patches.reshape(g, g, h, w, -1).swapaxes(1, 2).reshape(g * h, g * w, -1)
        return image.at[: g * h, : g * w].set(laid)

    return jax.vmap(one)(example_keys(key, f"patches {g}", index), x)


def outlines(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Return how fast the brightness changes at each pixel: the size of the Sobel gradient, largest value one.

    Args:
      x: `[b, h, w, c]`, gray or RGB.

    Returns:
      Of the shape of `x`, the same in every channel; differentiable almost everywhere.
    """
    gray = jnp.pad(luma(x), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    smooth = gray[:, :-2] + 2 * gray[:, 1:-1] + gray[:, 2:], gray[:, :, :-2] + 2 * gray[:, :, 1:-1] + gray[:, :, 2:]
    right, down = smooth[0][:, :, 2:] - smooth[0][:, :, :-2], smooth[1][:, 2:] - smooth[1][:, :-2]
    size = jnp.sqrt(right**2 + down**2 + 1e-12)
    return jnp.broadcast_to(size / jnp.maximum(jnp.max(size, (1, 2, 3), keepdims=True), 1e-5), x.shape)


def silhouettes(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Return one where an image is brighter than its mean, else zero.

    Args:
      x: `[b, h, w, c]`, gray or RGB.

    Returns:
      Of the shape of `x`, the same in every channel.
    """
    gray = luma(x)
    return jnp.broadcast_to((gray > jnp.mean(gray, (1, 2, 3), keepdims=True)).astype(x.dtype), x.shape)


def _outlined(x, index, at):
    return outlines(x)


def _silhouette(x, index, at):
    return silhouettes(x)


def warps(
    shape: Sequence[int], rotations: Iterable[float], shifts: Iterable[float], scales: Iterable[float]
) -> np.ndarray:
    """Return the maps of a grid of rotations, shifts in both directions and scales, as `affine_warp` takes them.

    Args:
      shape: `(h, w)`.
      rotations: degrees, clockwise.
      shifts: shares of the size, of both axes.
      scales: factors; above one enlarges.

    Returns:
      float32 `[m, 2, 3]`.
    """
    shifts = tuple(shifts)
    found = []
    for turn in np.deg2rad(tuple(rotations)):
        for scale in scales:
            linear = np.asarray([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / scale
            moves = [(-shape[0] * a, -shape[1] * b) for a in shifts for b in shifts]
            found += [np.column_stack([linear, linear @ np.asarray(move)]) for move in moves]
    return np.asarray(found, np.float32)


# ------------------------------------------------------------------------------------------------------------ the card


@functools.partial(jax.jit, static_argnums=0)
def _right(change, model, x, y, index, at):
    return robust(model(change(x, index, at)), y)


def report_card(
    key: Any,
    model: Any,
    x: Any,
    y: Any,
    *,
    index: Any = None,
    names: Sequence[str] = BENCHMARK,
    grid: Mapping[str, Sequence[float]] | None = None,
    sides: Sequence[float] = (0.25, 0.5),
    patches: Sequence[int] = (2, 4),
    batch_size: int = 500,
    progress: Callable[[int, int, str], Any] | None = None,
) -> Card:
    """Measure a model's card.

    Args:
      key: a typed key.
      model: logits `[b, k]` from a batch.
      x: `[n, h, w, c]` images in [0, 1], gray or RGB.
      y: int `[n]` labels.
      index: int `[n]` dataset indices, from which the random keys come; defaults to `arange(n)`.
      names: of corruptions.
      grid: `rotations`, `shifts`, `scales` of the geometry; default `GRID`.
      sides: of the gray squares, as shares of the image; each is tried at five by five places.
      patches: numbers of patches along each side.
      batch_size: images of a forward pass; the last batch is padded.
      progress: called with done, total, and a word.

    Returns:
      The card. It depends on nothing but the key, the model and the examples with their indices.

    Raises:
      ValueError: on inputs that are no images in [0, 1], or unknown names.
    """
    x, y = np.asarray(x, np.float32), np.asarray(y, np.int32)
    if x.ndim != 4 or x.shape[-1] not in (1, 3):
        raise ValueError(
            f"a card needs images, gray or RGB, [n, h, w, c]; got {x.shape}. Use evaluate for other inputs."
        )
    check.inputs(x, (0.0, 1.0))
    check.labels(y, len(x))
    for name in names:
        check.choice("corruption", name, CORRUPTIONS)
    index = np.arange(len(x), dtype=np.int32) if index is None else np.asarray(index, np.int32)
    model, n, batch = as_callable(model), len(x), min(batch_size, len(x))
    every = np.arange(n)

    def right(change: Change, at: Any, rows: np.ndarray = every) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            parts = [
                np.asarray(_right(change, model, x[part], y[part], index[part], at))[:m]
                for part, m in batches(rows, batch)
            ]
        return np.concatenate(parts)

    def tell(done: int, word: str) -> None:
        if progress is not None:
            progress(done, len(names) + 4, word)

    clean = right(_same, None)
    accuracies = {}
    for done, name in enumerate(names):
        tell(done, name.replace("_", " "))
        accuracies[name] = [float(right(_corrupted(name), (key, np.int32(s))).mean()) for s in SEVERITIES]
    tell(len(names), "geometry")
    seen = np.stack([right(_warped, matrix) for matrix in warps(x.shape[1:3], **(GRID if grid is None else grid))])
    geometry = {"worst": float(seen.all(0).mean()), "mean": float(seen.mean()), "maps": float(len(seen))}
    tell(len(names) + 1, "occlusion")
    hidden = []
    for side in sides:
        places = np.linspace(0, 1 - side, 5)
        seen = np.stack([right(_hidden, np.asarray((a, b, side), np.float32)) for a in places for b in places])
        hidden.append((float(side), float(seen.mean()), float(seen.all(0).mean())))
    tell(len(names) + 2, "patches")
    shuffled = [(int(g), float(right(_shuffled(int(g)), key).mean())) for g in patches]
    tell(len(names) + 3, "shape")
    shape = {"edges": float(right(_outlined, None).mean()), "silhouette": float(right(_silhouette, None).mean())}
    tell(len(names) + 4, "done")
    return Card(n, float(clean.mean()), accuracies, geometry, hidden, shuffled, shape)


def _hidden(x, index, at):
    return occlude(x, at[0], at[1], at[2])
