"""LADDER: examples moved across the border of two classes in the latent space of a trained network, and decoded.

What lives here: what separates the latents of two classes (a linear support vector machine with attention), the loss
that trains a decoder, the search that moves latents and decodes them, the objective that learns from what it finds.
What does not: the encoder, which is `models.features` of any trained network.

The order of work: train a network; `encoder = models.features(net, at=...)`; train a decoder by `fit` with
`reconstruction(encoder)`; `separators` of the latents of a few hundred examples; `fit` the network again, or another,
with `ladder(Ladder(...))`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxadv import losses, threats
from jaxadv.attacks.judge import ask, judge
from jaxadv.core import Attack, Model, Objective, Result, Threat, check, pytree, robust, rows, static
from jaxadv.train.objectives import Adversarial, adversarial


class Separator(NamedTuple):
    """What tells two classes of latents apart: `score(z) = weight . (z * attention(z)) + bias`.

    Attributes:
      weight: `[d]`.
      bias: scalar.
      mix: `[d, d]` of the attention, or None where it is constant.
      shift: `[d]` of the attention, or None.
    """

    weight: Any
    bias: Any
    mix: Any = None
    shift: Any = None


def attention(separator: Separator, z):
    """Return `exp(softmax(tanh(z mix + shift)))`; without a mix the constant `exp(1 / d)`.

    With more than a few features it hardly differs from 1: the softmax spreads a sum of 1 over all of them.

    Args:
      separator: the weights.
      z: `[b, d]` latents.

    Returns:
      `[b, d]`, between 1 and e.
    """
    if separator.mix is None:
        return jnp.full_like(z, np.exp(1 / z.shape[-1]))
    return jnp.exp(jax.nn.softmax(jnp.tanh(z @ separator.mix + separator.shift[None])))


def score(separator: Separator, z):
    """Return how far latents lie on the side of the second class.

    Args:
      separator: the weights.
      z: `[b, d]` latents.

    Returns:
      `[b]`, above 0 for the second class.
    """
    return (z * attention(separator, z)) @ separator.weight + separator.bias


def _fit(key, z, side, *, cost, rate, epochs, attend) -> Separator:
    """Stochastic gradient descent on `cost * hinge + mean(weight^2)`, one latent at a time."""
    n, d = z.shape
    start, order = jax.random.split(key)
    bound = 1 / np.sqrt(d)
    draws = zip(jax.random.split(start, 4), ((d,), (), (d, d), (d,)))
    drawn = [jax.random.uniform(k, shape, z.dtype, -bound, bound) for k, shape in draws]
    first = Separator(*drawn if attend else drawn[:2])

    def loss(separator, row, y):
        return cost * jnp.maximum(0, 1 - y * score(separator, row[None])[0]) + jnp.mean(separator.weight**2)

    def step(separator, place):
        slope = jax.grad(loss)(separator, z[place], side[place])
        return jax.tree.map(lambda a, g: a - rate * g, separator, slope), None

    places = jax.vmap(lambda k: jax.random.permutation(k, n))(jax.random.split(order, epochs)).reshape(-1)
    return lax.scan(step, first, places)[0]


def separators(
    key,
    z,
    y,
    *,
    classes: int,
    most: int = 200,
    cost: float = 0.01,
    rate: float = 0.01,
    epochs: int = 10,
    attend: bool = True,
) -> Separator:
    """Fit what separates each two classes of latents.

    Args:
      key: a typed key.
      z: `[n, d]` latents.
      y: int `[n]` labels.
      classes: number of classes k.
      most: latents of a class that are used, the first ones; all classes use as many as the smallest has.
      cost: weight of the hinge loss against `mean(weight^2)`.
      rate: of the descent.
      epochs: of the descent.
      attend: whether there is attention. It costs `d^2` numbers for each pair of classes.

    Returns:
      A `Separator` whose leaves have a leading axis of `k (k - 1) / 2` pairs (s, t), s < t, in the order of
      `numpy.triu_indices(k, 1)`; t is the second class.

    Raises:
      ValueError: if a class has no latents.

    References:
      Zhou, Tsang and Yin 2022, LADDER: latent boundary-guided adversarial training, arXiv:2206.03717, section 3.2; code
      zhouxiaowei1120/LADDER (svm_atten.py), whose settings are the defaults.
    """
    z, y = np.asarray(z), np.asarray(y)
    check.labels(y, len(z), classes)
    m = min(most, int(np.bincount(y, minlength=classes).min()))
    if m < 1:
        raise ValueError(f"each of the {classes} classes must have latents; got labels {np.unique(y).tolist()}.")
    of_class = np.stack([z[y == k][:m] for k in range(classes)])
    first, second = np.triu_indices(classes, 1)
    both = jnp.concatenate([of_class[first], of_class[second]], axis=1)
    side = jnp.repeat(jnp.asarray([-1.0, 1.0], both.dtype), m)
    fit = partial(_fit, cost=cost, rate=rate, epochs=epochs, attend=attend)
    return jax.jit(jax.vmap(fit, (0, 0, None)))(jax.random.split(key, len(first)), both, side)


def _reconstruction(apply, params, state, batch, key, *, encoder, norm, bn):
    made, state = apply(params, state, encoder(batch["x"]), bn=bn, key=key)
    gap = jnp.abs(rows.flat(made) - rows.flat(batch["x"]))
    loss = jnp.mean(gap if norm == "l1" else jnp.square(gap), axis=-1)
    return loss, (state, {"gap": jnp.max(gap, axis=-1)})


def reconstruction(encoder: Model, *, norm: str = "l1", bn: str = "train") -> Objective:
    """Return the objective that trains a decoder: the mean over features of `|g(φ(x)) - x|`, or of its square.

    The network that is trained takes latents and returns as many numbers as an example has features, e.g.
    `create('mlp', key, shape=(d,), classes=784)`.

    Args:
      encoder: latents `[b, d]` from a batch; it is not trained.
      norm: `'l1'` or `'l2'`.
      bn: batch norm of the decoder.

    Returns:
      The objective; metric `gap`, the largest error of an example.

    Raises:
      ValueError: on another norm.
    """
    check.choice("norm", norm, ("l1", "l2"))
    return partial(_reconstruction, encoder=encoder, norm=norm, bn=bn)


class State(NamedTuple):
    """A climb: latents, their direction, the rung to try next, the point of the last one, whether the model fails."""

    z: Any
    move: Any
    step: Any
    point: Any
    broken: Any


@pytree
class Ladder(Attack):
    """Move latents towards another class, drawn at random, and decode them; further until the model fails.

    `z' = z ± eps a(z) * w`, `x' = clip(g(z'))`. The points are feasible in the bounds and in nothing else: they may lie
    far from the example, and beyond the first rungs their label may be doubtful.

    Attributes:
      threat: the bounds; its budget is their width.
      encoder: latents `[b, d]` from a batch.
      decoder: features `[b, n]` of examples from latents.
      separators: what `separators` returns.
      eps: `[r]` lengths to try, rising.
      unit: whether directions have length 1; published without, which makes lengths of 0.5 to 25 usual.
      name: enters the random keys.
      max_steps: r, the number of rungs.
      early: rows end when the model fails.
    """

    threat: Threat
    encoder: Any
    decoder: Any
    separators: Separator
    eps: Any
    unit: bool = static()
    name: str = static()
    max_steps: int = static()
    early: bool = static()

    def init(self, keys, model, x, y) -> State:
        """Latents of the examples, and the way towards a random other class."""
        del model
        z, k = self.encoder(x), _classes(self.separators)
        draw = jax.vmap(lambda key: jax.random.randint(key, (), 1, k, jnp.int32))(keys)
        target = (y + draw) % k
        one, two = jnp.minimum(y, target), jnp.maximum(y, target)
        pair = one * (2 * k - one - 1) // 2 + two - one - 1
        own = jax.tree.map(lambda leaf: leaf[pair], self.separators)
        weight = jax.vmap(lambda separator, z: attention(separator, z[None])[0])(own, z) * own.weight
        move = jnp.where(target > y, 1.0, -1.0)[:, None] * weight
        if self.unit:
            move = move / jnp.linalg.norm(move, axis=-1, keepdims=True)
        none = jnp.zeros(x.shape[0], jnp.int32)
        return State(z, move, none, x, none > 0)

    def step(self, state: State, model, x, y) -> State:
        """Try the next rung."""
        length = jnp.asarray(self.eps, x.dtype)[jnp.minimum(state.step, self.max_steps - 1)]
        low, high = self.threat.bounds
        made = self.decoder(state.z + length[:, None] * state.move)
        point = jnp.clip(made.reshape(x.shape), low, high).astype(x.dtype)
        return state._replace(step=state.step + 1, point=point, broken=~robust(ask(model, point), y))

    def done(self, state: State):
        """A row is done when the model fails, or after the last rung."""
        return state.broken | (state.step >= self.max_steps)

    def result(self, state: State, model, x, y) -> Result:
        """Judge the last point."""
        value, broken, finite = judge(ask(model, state.point), y)
        flags = {"nonfinite": ~finite, "zero_gradient": jnp.zeros_like(broken), "infeasible": jnp.zeros_like(broken)}
        size = self.threat.size(state.point, x)
        return Result(state.point, value, broken, size, state.step + 1, jnp.zeros_like(state.step), flags)


def _classes(separators: Separator) -> int:
    return int((1 + np.sqrt(1 + 8 * separators.bias.shape[0])) / 2)


def climb(
    encoder: Model,
    decoder: Model,
    separators: Separator,
    *,
    eps: float | Sequence[float] = (0.5, 2.0, 5.0, 10.0),
    unit: bool = False,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Ladder:
    """Build the search of LADDER.

    Args:
      encoder: latents `[b, d]` from a batch, e.g. `models.features(net, at='dense2:in')`; it stays as it is.
      decoder: examples' features `[b, n]` from latents, e.g. `models.model` of what `reconstruction` trained.
      separators: what `separators` returns.
      eps: one length, or rising ones of which the first is taken at which the model fails.
      unit: whether lengths are measured in latent space; published without.
      bounds: lowest and highest value of a feature.

    Returns:
      The attack. Its arrays become constants of a training step.

    Raises:
      ValueError: on lengths that are not positive or do not rise.

    References:
      Zhou, Tsang and Yin 2022, arXiv:2206.03717, algorithm 1. The authors make all examples once, and climb until the
      network that encodes fails; here they are made anew at every step and the network that is trained decides.
    """
    lengths = np.atleast_1d(np.asarray(eps, np.float32))
    check.positive("eps", lengths)
    if np.any(np.diff(lengths) <= 0):
        raise ValueError(f"eps must rise from rung to rung; got {lengths.tolist()}. One number is one rung.")
    threat = threats.linf(bounds[1] - bounds[0], bounds)
    return Ladder(threat, encoder, decoder, separators, lengths, unit, "ladder", len(lengths), True)


def _ladder(logits, batch, *, weight):
    clean, moved = (losses.cross_entropy(logits[point], batch["y"]) for point in ("clean", "robust"))
    return (1 - weight) * clean + weight * moved


def ladder(attack: Attack, *, weight: float = 0.5, **axes: Any) -> Adversarial:
    """LADDER: cross-entropy on the examples and on those that a climb in latent space makes of them.

    `weight CE(f(x'), y) + (1 - weight) CE(f(x), y)`. With an attack in input space it is the even mixture of
    Goodfellow et al. 2015.

    Args:
      attack: `climb(...)`, or any other.
      weight: share of the attacked examples, in [0, 1].
      **axes: `running`, `growth` (not with `climb`, which has no budget), `bn_attack`, `bn`: see `adversarial`.

    Returns:
      The objective; metrics `clean` and `robust`.

    Raises:
      ValueError: on impossible settings.

    References:
      Zhou, Tsang and Yin 2022, LADDER: latent boundary-guided adversarial training, arXiv:2206.03717; code
      zhouxiaowei1120/LADDER.
    """
    check.fraction("weight", weight)
    return adversarial(attack, partial(_ladder, weight=weight), **axes)
