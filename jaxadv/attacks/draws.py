"""Models that draw random numbers: with whose keys they are asked, and what is made of several draws.

A *randomized model* takes `keys=` beside the batch: typed keys `[b]`, one for each row. `eot` makes a model out of it
that every attack can take. The draws of a row come from the bits of the row itself, so that a new point meets fresh
noise, the same point the same noise, and rows live alone. Where an attack follows a loss (`pgd` and its wirings, the
transfer family, `apgd`), it asks through `descend`, so that gradients of several draws are averaged without holding
more than one of them.

What does not live here: other defenses (`adaptive`), and certificates of smoothed models (`certify`).
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxadv.core import Model, as_callable, check, example_keys, pytree, robust, static
from jaxadv.core.rows import flat

Partial = jax.tree_util.Partial
MEANS = ("loss", "logits", "probabilities")


def takes_keys(model: Any) -> bool:
    """Tell whether a model is randomized by keys of its rows.

    Args:
      model: anything that can be called on a batch.

    Returns:
      Whether it takes `keys`; what is made of other models does where one of them does.
    """
    if isinstance(model, Partial) and getattr(model.func, "by_parts", False):
        return any(takes_keys(part) for part in model.args)
    try:
        return "keys" in inspect.signature(model).parameters
    except (TypeError, ValueError):
        return False


def by_parts(fn: Callable) -> Callable:
    """Mark `fn(*parts, x, keys=None)`: `Partial(fn, *parts)` is randomized exactly where a part is.

    Args:
      fn: a module-level function.

    Returns:
      The same function.
    """
    setattr(fn, "by_parts", True)  # noqa: B010
    return fn


def asked(model: Any, x: Any, keys: Any = None) -> Any:
    """Call a model, with keys where it takes them.

    Args:
      model: callable on a batch.
      x: `[b, ...]`.
      keys: typed keys `[b]`, or None for what the model does by itself.

    Returns:
      What the model returns.
    """
    return model(x, keys=keys) if keys is not None and takes_keys(model) else model(x)


def folded(keys: Any, number: Any) -> Any:
    """Derive keys from keys; None stays None.

    Args:
      keys: typed keys `[b]`, or None.
      number: what to fold in.

    Returns:
      Typed keys `[b]`, or None.
    """
    return None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def content_keys(key: Any, x: Float[Array, "b ..."]) -> Any:
    """Derive one key for each row from the bits of the row.

    Args:
      key: a typed key.
      x: `[b, ...]`.

    Returns:
      Typed keys `[b]`: equal rows have equal keys, and any other bit in a row changes its key.
    """
    wide = lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32)) + 0.0  # no difference between zeros
    bits = lax.bitcast_convert_type(wide, jnp.uint32).reshape(x.shape[0], -1)
    place = jnp.arange(bits.shape[1], dtype=jnp.uint32)[None] * jnp.uint32(0x9E3779B9)
    mixed = bits ^ place
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finalizer of MurmurHash3
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    word = jnp.sum(mixed ^ (mixed >> 16), axis=-1, dtype=jnp.uint32)
    return jax.vmap(lambda w: jax.random.fold_in(key, w))(word)


@pytree
class Expectation:
    """A randomized model averaged over its draws, built by `eot`; itself a model without randomness.

    `key` is one typed key, from which rows derive theirs by their content, or one for each row.
    """

    model: Any
    key: Any
    samples: int = static()
    mean: str = static()

    def __call__(self, x) -> Float[Array, "b k"]:
        """Return the mean logits, or the logarithms of the mean probabilities."""
        x = jnp.asarray(x)
        keys = self.keys(x)

        @jax.checkpoint
        def once(number):
            logits = asked(self.model, x, folded(keys, number))
            check.logits(logits)
            return logits if self.mean == "logits" else jax.nn.log_softmax(logits)

        add = jnp.add if self.mean == "logits" else jnp.logaddexp
        total = lax.scan(lambda total, i: (add(total, once(i)), None), once(0), jnp.arange(1, self.samples))[0]
        return total / self.samples if self.mean == "logits" else total - math.log(self.samples)

    def keys(self, x: Array) -> Any:
        """Return the keys `[b]` that the draws of each row derive from."""
        return content_keys(self.key, x) if self.key.ndim == 0 else self.key


def eot(model: Any, key: Any, *, samples: int = 16, mean: str = "loss") -> Expectation:
    """Return the expectation of a randomized model over its draws, as a model that any attack can take.

    | `mean` | attacks that follow a loss descend | logits |
    | --- | --- | --- |
    | `"loss"` | the mean of the losses of the draws: the mean of their gradients | log of the mean probabilities |
    | `"logits"` | the loss of the mean logits | mean logits |
    | `"probabilities"` | the loss of the mean probabilities | log of the mean probabilities |

    The noise at a point is fixed by the point, so an attack may fit the noise that it met: what it finds is to be
    judged by draws of another key, see `survival`. A query of this model counts as one, and costs `samples`.

    Args:
      model: takes `keys=`, typed keys `[b]`, beside the batch.
      key: a typed key.
      samples: number of draws.
      mean: `"loss"`, `"logits"` or `"probabilities"`.

    Returns:
      A model.

    Raises:
      ValueError: on settings out of range.
      TypeError: if the model takes no keys.

    References:
      Athalye et al. 2018, Synthesizing robust adversarial examples, arXiv:1707.07397; Obfuscated gradients give a false
      sense of security, sec. 4.2, arXiv:1802.00420.
    """
    check.whole("samples", samples)
    check.choice("mean", mean, MEANS)
    if not takes_keys(model):
        raise TypeError(
            f"eot needs a model that takes keys= beside the batch; got {type(model).__name__}, which does not. "
            "A model without randomness is its own expectation."
        )
    return Expectation(as_callable(model), key, samples, mean)


def majority(value: Array, verdicts: tuple[Array, Array, Array]) -> Any:
    """Make one of several draws: mean loss, mean score, the verdict of more than half, finite where all are.

    Args:
      value: `[n, b]` losses.
      verdicts: score, verdict and finiteness of each draw, each `[n, b]`; see `judge`.

    Returns:
      The same without the first axis.
    """
    score, broken, finite = verdicts
    return value.mean(axis=0), (score.mean(axis=0), 2 * jnp.sum(broken, axis=0) > len(broken), jnp.all(finite, axis=0))


def descend(
    model: Any, point: Float[Array, "b ..."], loss: Callable, verdict: Callable, pool: Callable | None = None
) -> tuple[Array, Array, Any]:
    """Return the gradient of the loss, row by row, the loss, and the verdict at a point.

    Args:
      model: logits from a batch. An `Expectation` of losses is asked draw by draw.
      point: `[b, ...]`.
      loss: logits to `[b]`.
      verdict: logits to what is to be known beside, leaves `[b]`.
      pool: what is made of the losses and verdicts of several draws, each `[n, b]`; by default mean losses, and the
        verdict on the model's answer.

    Returns:
      `(gradient [b, ...], loss [b], verdict)`.
    """

    def total(point, model, keys=None):
        logits = asked(model, point, keys)
        check.logits(logits)
        logits = logits.astype(jnp.promote_types(logits.dtype, point.dtype))
        value = loss(logits)
        return jnp.sum(value), (value, verdict(logits), logits)

    slope = jax.grad(total, has_aux=True)
    if not isinstance(model, Expectation) or model.mean != "loss":
        grad, (value, judged, _) = slope(point, model)
        return grad, value, judged
    keys = model.keys(point)

    def again(carry, number):
        grads, answer = carry
        grad, (value, judged, logits) = slope(point, model.model, folded(keys, number))
        return (grads + grad, jnp.logaddexp(answer, jax.nn.log_softmax(logits))), (value, judged)

    like = jax.eval_shape(lambda: total(point, model.model, keys)[1][2])
    none = jnp.broadcast_to(flat(point)[:, :1] * 0 - jnp.inf, like.shape).astype(like.dtype)
    (grads, answer), seen = lax.scan(again, (jnp.zeros_like(point), none), jnp.arange(model.samples))
    value, judged = pool(*seen) if pool else (seen[0].mean(axis=0), verdict(answer - math.log(model.samples)))
    return grads / model.samples, value, judged


def _noisy(model, sigma, x, *, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(folded(keys, 0))
    return asked(model, x + jnp.asarray(sigma, x.dtype) * noise, folded(keys, 1))


def noisy(model: Any, sigma: Any) -> Model:
    """Return a randomized model that sees each input with Gaussian noise.

    Args:
      model: logits from a batch.
      sigma: standard deviation of the noise, in the units of `x`; may be traced.

    Returns:
      A model that must be given `keys=`; with `eot` one for attacks.
    """
    return Partial(_noisy, as_callable(model), sigma)


def survival(key: Any, model: Any, x: Any, y: Any, *, samples: int = 100, index: Any = None) -> Float[Array, " b"]:
    """Return the share of fresh draws at which a randomized model holds.

    Args:
      key: a typed key, another one than the attack's.
      model: takes `keys=` beside the batch.
      x: `[b, ...]` what an attack found.
      y: int `[b]` labels, or `Targets`.
      samples: number of draws.
      index: int `[b]` dataset indices; defaults to `arange(b)`.

    Returns:
      `[b]`, in [0, 1].

    Raises:
      ValueError: if `samples` is not at least 1.

    References:
      Tramèr et al. 2020, On adaptive attacks to adversarial example defenses, arXiv:2002.08347.
    """
    check.whole("samples", samples)
    x = jnp.asarray(x)
    index = jnp.arange(x.shape[0], dtype=jnp.int32) if index is None else jnp.asarray(index, jnp.int32)

    def once(number) -> Bool[Array, " b"]:
        return robust(asked(model, x, example_keys(key, "survival", index, number)), y)

    return jnp.mean(lax.map(once, jnp.arange(samples)), axis=0)
