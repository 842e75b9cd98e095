"""Threats that are not balls of pixels: the parameters of transformations, in ranges, and the order of several.

A point of such a threat is a *packed row* `[order | parameters | pixels]`: which component comes when, the parameters
of each, and the clean image, which never moves. So parameters are what an attack moves, every attack that asks a model
for logits or gradients works as it is, rows live alone, and what is stored can be verified and replayed: `contains`
reads ranges, order and pixels off the row, and `images` makes the attacked image from it, to the bit.

What lives here: the threat and its packing. What does not: the transformations (`attacks.spatial`), and the search for
an order (`attacks.composite`).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxadv.core import as_callable, check, pytree, rows, static
from jaxadv.core.types import Threat


class Component:
    """A transformation of images with parameters in ranges; a frozen dataclass, so that equal settings are equal.

    | member | promise |
    | --- | --- |
    | `ranges(shape)` | for images of a shape: lowest, identical and highest parameters, numpy `[m]` each |
    | `__call__(x, values)` | `[b, h, w, c]` and `[b, m]` to `[b, h, w, c]`; at the identity `x` itself, to the bit |
    """

    def ranges(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return lowest, identical and highest parameters."""
        raise TypeError(f"{type(self).__name__} must define ranges")

    def __call__(self, x, values):
        """Return the transformed images."""
        raise TypeError(f"{type(self).__name__} must define __call__")


def ranks(order: Any) -> Any:
    """Return the permutation that is ordered as these numbers are; a permutation of 0, 1, ... is its own.

    Args:
      order: `[b, n]`, numpy or jax; the first of equal numbers comes first.

    Returns:
      `[b, n]`, in the dtype of `order`.
    """
    first = np.tril(np.ones((order.shape[1], order.shape[1]), bool), -1)[None]
    mine, other = order[:, :, None], order[:, None]
    return ((other < mine) | ((other == mine) & first)).sum(axis=-1).astype(order.dtype)


@pytree
class Semantic(Threat):
    """Images that components make of `x` with parameters in their ranges, in any order; made by `semantic`.

    `eps` is the share of the ranges that may be used, 1 for all of them. `box` are the bounds of pixels.
    """

    eps: Any
    box: tuple[Any, Any]
    components: tuple[Any, ...] = static()
    shape: tuple[int, ...] = static()

    norm = "semantic"
    sparse = False

    @property
    def count(self) -> int:
        """Number of components, and of the first features of a packed row, which tell their order."""
        return len(self.components)

    def _table(self) -> np.ndarray:
        """Lowest, identical and highest parameters, `[3, m]`."""
        return np.concatenate([np.stack(c.ranges(self.shape)) for c in self.components], axis=-1).astype(np.float32)

    def _parts(self, point):
        """Order, parameters and pixels of packed rows."""
        a, b = self.count, self.count + self._table().shape[1]
        return point[:, :a], point[:, a:b], point[:, b:]

    @property
    def bounds(self) -> tuple[Any, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Lowest and highest value of each feature of a packed row."""
        low, _, high = self._table()
        order = np.zeros(self.count, np.float32), np.full(self.count, self.count - 1, np.float32)
        xp: Any = np if all(check.concrete(end) is not None for end in self.box) else jnp
        box = (xp.broadcast_to(xp.asarray(end, np.float32), self.shape).reshape(-1) for end in self.box)
        return tuple(xp.concatenate(part) for part in zip(order, (low, high), box))  # pyright: ignore

    def pack(self, x: Any, order: Any = None) -> Array:
        """Lay images out as packed rows that change nothing.

        Args:
          x: `[b, *shape]` images.
          order: int `[n]` or `[b, n]`, which component comes first, second, ...; None is the order of the threat. May
            be traced; one that is no permutation is then infeasible.

        Returns:
          `[b, n + m + d]`.

        Raises:
          ValueError: on images of another shape, or a known order that is no permutation of the components.
        """
        x = jnp.asarray(x)
        if x.shape[1:] != self.shape:
            raise ValueError(f"images must have the shape {self.shape} that the threat is for; got {x.shape[1:]}.")
        order = np.arange(self.count) if order is None else order
        known = check.concrete(order)
        if known is not None and (known.ndim not in (1, 2) or np.any(np.sort(known) != np.arange(known.shape[-1]))):
            raise ValueError(f"order must name each of the {self.count} components once, from 0; got {known.tolist()}.")
        if np.shape(order) not in ((self.count,), (len(x), self.count)):
            raise ValueError(
                f"order must have the shape [{self.count}] or [{len(x)}, {self.count}]; got {list(np.shape(order))}. "
                "Name every component."
            )
        parts = jnp.asarray(order), jnp.asarray(self._table()[1])
        still = [jnp.broadcast_to(part.astype(x.dtype), (x.shape[0], part.shape[-1])) for part in parts]
        return jnp.concatenate([*still, rows.flat(x)], axis=-1)

    def values(self, point: Any) -> tuple[Int[Array, "b n"], list[Array]]:
        """Read order and parameters off packed rows.

        Args:
          point: `[b, n + m + d]`.

        Returns:
          The order, int `[b, n]`: which component comes first, second, ...; and the parameters `[b, m]` of each
          component.
        """
        order, values, _ = self._parts(jnp.asarray(point))
        sizes = [c.ranges(self.shape)[0].size for c in self.components]
        return order.astype(jnp.int32), jnp.split(values, np.cumsum(sizes)[:-1], axis=-1)

    def images(self, point: Any, mix: Any = None) -> Array:
        """Replay packed rows: apply the components in each row's order.

        Gradients pass to parameters (and to `mix`) only.

        Args:
          point: `[b, n + m + d]`.
          mix: `[b, n, n]` weights of the components at each place, in the place of the order: then every place returns
            their mean (a doubly stochastic matrix is a soft order).

        Returns:
          `[b, *shape]`.
        """
        point = jnp.asarray(point)
        order, values = self.values(point)
        x = jax.lax.stop_gradient(self._parts(point)[2].reshape(-1, *self.shape))  # pixels do not move
        if self.count == 1:
            return self.components[0](x, values[0])
        for place in range(self.count):
            made = [c(x, v) for c, v in zip(self.components, values)]
            if mix is None:
                now = order[:, place]
                x = made[0]
                for i in range(1, self.count):
                    x = rows.select(now == i, made[i], x)
            else:
                x = sum((rows.wide(mix[:, place, i], m) * m for i, m in enumerate(made)), jnp.zeros_like(x))
        return x

    def budget(self, x: Any, xp: Any = jnp) -> Any:
        """Return `eps` and the rounding of parameters, in shares of their ranges."""
        low, still, high = self._table().astype(np.float64)
        room = np.maximum(high - still, still - low)
        rounding = 2.0**-23 * float(np.max(np.maximum(np.abs(low), np.abs(high)) / np.where(room > 0, room, 1)))
        eps = xp.asarray(self.eps, np.float64) if xp is np else jnp.asarray(self.eps)
        return eps + rounding

    def size(self, point, x):
        """Return the largest share of its range that a parameter of the row uses.

        Args:
          point: `[b, n + m + d]`.
          x: `[b, n + m + d]` the packed examples.

        Returns:
          `[b]`; infinite where pixels were changed or the order is none.
        """
        xp: Any = np if isinstance(point, np.ndarray) and isinstance(x, np.ndarray) else jnp
        order, values, pixels = self._parts(point)
        low, still, high = (xp.asarray(v, values.dtype)[None] for v in self._table())
        move = values - still
        room = xp.where(move > 0, high - still, still - low)
        share = xp.where(move == 0, 0, xp.abs(move) / xp.where(room > 0, room, 1))
        share = xp.where((room <= 0) & (move != 0), xp.inf, share)
        listed = xp.all(ranks(order) == order, axis=-1)
        kept = xp.all(pixels == self._parts(x)[2], axis=-1)
        return xp.where(listed & kept, xp.max(share, axis=-1), xp.inf)

    def _limits(self, x):
        low, still, high = (jnp.asarray(v, x.dtype)[None] for v in self._table())
        eps = jnp.broadcast_to(jnp.asarray(self.eps, x.dtype), x.shape[:1])[:, None]
        return jnp.maximum(still - eps * (still - low), low), jnp.minimum(still + eps * (high - still), high)

    def project(self, point: Float[Array, "b d"], x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """Return the row with parameters clipped to their ranges, the clean pixels, and the order of its order part."""
        order, values, _ = self._parts(point)
        low, high = self._limits(x)
        return jnp.concatenate([ranks(order), jnp.clip(values, low, high), self._parts(x)[2]], axis=-1)

    def sample(self, keys, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """Return rows with uniform parameters and a uniform order."""
        low, high = self._limits(x)
        m = low.shape[-1]
        draw = jax.vmap(lambda key: jax.random.uniform(key, (self.count + m,), x.dtype))(keys)
        values = low + (high - low) * draw[:, self.count :]
        return jnp.concatenate([ranks(draw[:, : self.count]), values, self._parts(x)[2]], axis=-1)

    def steepest(self, grad: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """Return the sign of each parameter's gradient times half its range; nothing else moves."""
        order, values, pixels = self._parts(grad)
        low, still, high = self._table()
        room = jnp.asarray(np.maximum(high - still, still - low), grad.dtype)[None]
        return jnp.concatenate([order * 0, jnp.sign(values) * room, pixels * 0], axis=-1)


def semantic(
    components: Any, shape: Sequence[int], *, eps: Any = 1.0, bounds: tuple[Any, Any] = (0.0, 1.0)
) -> Semantic:
    """Return the threat of transformations with parameters in their ranges.

    Args:
      components: a `Component`, or several in their first order.
      shape: of one image, `(h, w, c)`.
      eps: share of the ranges that may be used; may be traced or `[b]`.
      bounds: lowest and highest value of a pixel.

    Returns:
      The threat of packed rows; see `Semantic.pack`, `Semantic.images` and `behind`.

    Raises:
      ValueError: without components, or with a known `eps` that is not in (0, 1].
    """
    components = (components,) if isinstance(components, Component) else tuple(components)
    wrong = [type(c).__name__ for c in components if not isinstance(c, Component)]
    if wrong or not components:
        raise ValueError(f"a semantic threat needs components, such as Rotation(); got {wrong or 'none'}.")
    check.positive("eps", eps, "It is a share of the ranges; 1 is all of them.")
    known = check.concrete(eps)
    if known is not None and np.any(known > 1):
        raise ValueError(f"eps must be a share of the ranges, at most 1; got {eps}. Widen the components' ranges.")
    if len(shape) != 3 or math.prod(shape) < 1:
        raise ValueError(f"shape must be that of one image, (h, w, c); got {tuple(shape)}.")
    return Semantic(eps=eps, box=bounds, components=components, shape=tuple(int(n) for n in shape))


@pytree
class Behind:
    """A model that sees the image which a packed row makes; built by `behind`, itself a model of packed rows."""

    threat: Semantic
    model: Any

    def __call__(self, point, mix=None):
        """Return the logits `[b, k]`; `mix` is that of `Semantic.images`."""
        return self.model(self.threat.images(point, mix))


def behind(threat: Semantic, model: Any) -> Behind:
    """Return a model of packed rows: what the model says of the image that each row makes.

    Args:
      threat: a semantic threat.
      model: logits from images.

    Returns:
      The model that attacks on this threat are given.
    """
    return Behind(threat, as_callable(model))
