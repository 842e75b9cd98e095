"""Adaptive attacks: what to do to a model so that attacks on it meet the defense and not its disguise.

Each part is a function `model -> model` (or a loss), and they compose with each other, with `eot` of randomized models
and with ensembles:

| the defense | the cure |
| --- | --- |
| preprocessing without useful gradients | `bpda`, with any stand-in for the backward pass |
| any part without useful gradients, or saturated logits | `straight`, `rescaled`, `smoothed` |
| random choices | `eot` |
| a detector beside the classifier | `rejecting`, with targets or `sweep`; `evading` (in `detectors`) |
| purification, optimization at test time | `unrolled` (all gradients), `bpda`, or `straight` with the static network |
| anything that hides the logits but not the features | `matched`, `feature_distance` |

What lives here: transforms without arithmetic of attacks. What does not: randomized models (`draws`), ensembles
(`transferable`), the attack computed on a stand-in and judged on the model (`autoattack.transfer`).

References:
  Tramèr et al. 2020, On adaptive attacks to adversarial example defenses, arXiv:2002.08347; Athalye et al. 2018,
  Obfuscated gradients give a false sense of security, arXiv:1802.00420.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxadv.attacks.draws import Partial, asked, by_parts, eot, folded, noisy
from jaxadv.core import Attack, Model, Result, Targets, as_callable, check, joined, run
from jaxadv.core.rows import flat


def identity(x):
    """Return the input: the usual stand-in of `bpda`.

    Args:
      x: anything.

    Returns:
      `x`.
    """
    return x


@jax.custom_vjp
def _forward(forward, backward, keys, x):
    del backward
    return asked(forward, x, keys)


def _forward_fwd(forward, backward, keys, x):
    return asked(forward, x, keys), (backward, keys, x)


def _forward_bwd(kept, grad):
    backward, keys, x = kept
    out, pull = jax.vjp(lambda point: asked(backward, point, keys), x)
    if out.shape != grad.shape:
        raise ValueError(
            f"the stand-in must return what the forward pass returns, of shape {grad.shape}; got {out.shape}. "
            "Does the preprocessing change the shape? Then pass backward= with the same change."
        )
    return None, None, None, pull(grad.astype(out.dtype))[0]


_forward.defvjp(_forward_fwd, _forward_bwd)


@by_parts
def _straight(forward, backward, x, keys=None):
    return _forward(forward, backward, keys, x)


def straight(forward: Any, backward: Any = identity) -> Model:
    """Return a function with the values of one function and the gradients of another.

    Args:
      forward: `[b, ...]` to anything, exactly what is returned; it need not be differentiable.
      backward: a function with outputs of the same shape, whose gradients at the same input are taken. Of a whole
        model: a smooth version of it, the static network without the defense, `matched`, or an ensemble.

    Returns:
      A callable pytree; randomized where one of them is. With other weights of the same structure it does not
      recompile, if `forward` and `backward` are callable pytrees or module-level functions.

    Raises:
      ValueError: when gradients are asked for, if the shapes differ.

    References:
      Athalye et al. 2018, Obfuscated gradients give a false sense of security, sec. 4.1.2, arXiv:1802.00420.
    """
    return Partial(_straight, as_callable(forward, "forward"), as_callable(backward, "backward"))


@by_parts
def _preprocessed(forward, model, x, keys=None):
    return asked(model, asked(forward, x, folded(keys, 0)), folded(keys, 1))


def preprocessed(model: Any, forward: Any) -> Model:
    """Return the model behind a preprocessing, with the gradients of both.

    Args:
      model: logits from a batch.
      forward: `[b, ...]` to what the model takes; for unrolled purification see `unrolled`.

    Returns:
      A model; randomized where one of them is.
    """
    return Partial(_preprocessed, as_callable(forward, "forward"), as_callable(model))


def bpda(model: Any, forward: Any, backward: Any = identity) -> Model:
    """Return the model behind a preprocessing that gradients pass as if it were another one.

    Args:
      model: logits from a batch.
      forward: the preprocessing: quantization, compression, a median, a purifier; exactly what the model sees.
      backward: its differentiable stand-in, the identity by default; any function of the same shapes.

    Returns:
      A model with the logits of `model(forward(x))`; randomized where one of the parts is.

    References:
      Athalye et al. 2018, Obfuscated gradients give a false sense of security, sec. 4.1, arXiv:1802.00420.
    """
    return preprocessed(model, straight(forward, backward))


@by_parts
def _rescaled(model, factor, x, keys=None):
    return asked(model, x, keys) * factor


def rescaled(model: Any, factor: Any) -> Model:
    """Return the model with logits times a positive factor: the same predictions, other gradients of the cross-entropy.

    Args:
      model: logits from a batch.
      factor: below 1 for logits so large that softmax saturates; may be traced.

    Returns:
      A model.

    Raises:
      ValueError: if a known factor is not positive.

    References:
      Carlini and Wagner 2016, Defensive distillation is not robust to adversarial examples, arXiv:1607.04311.
    """
    check.positive("factor", factor, "A usual value is 1 over the median gap of the logits.")
    return Partial(_rescaled, as_callable(model), factor)


def smoothed(model: Any, key: Any, *, sigma: Any, samples: int = 16, mean: str = "logits") -> Model:
    """Return the model with the gradients of its Gaussian smoothing, for gradients that are shattered by noise.

    Args:
      model: logits from a batch; its own are returned.
      key: a typed key of the noise.
      sigma: standard deviation of the noise, in the units of `x`.
      samples: number of draws.
      mean: what is averaged over the draws, see `eot`: `"logits"` or `"probabilities"`.

    Returns:
      A model.

    Raises:
      ValueError: on settings out of range.

    References:
      Athalye et al. 2018, Obfuscated gradients give a false sense of security, arXiv:1802.00420, for the problem.
    """
    check.choice("mean", mean, ("logits", "probabilities"))
    return straight(model, eot(noisy(model, sigma), key, samples=samples, mean=mean))


@by_parts
def _unrolled(step, numbers, x, keys=None):
    @jax.checkpoint
    def once(point, number):
        return asked(step, point, folded(keys, number)), None

    return jax.lax.scan(once, x, numbers)[0]


def unrolled(step: Any, steps: int) -> Model:
    """Return a purifier that takes a step several times, and through which gradients pass all the way.

    Memory holds one point for each step; what happens inside a step is computed again in the backward pass.

    Args:
      step: `[b, ...]` to `[b, ...]`, e.g. a gradient step of the purifier's own loss; takes `keys=` if it is random.
      steps: how many times.

    Returns:
      A function for `preprocessed`, or for `bpda` where gradients through all steps are of no use.

    Raises:
      ValueError: if `steps` is not at least 1.

    References:
      Croce et al. 2022, Evaluating the adversarial robustness of adaptive test-time defenses, arXiv:2202.13711.
    """
    check.whole("steps", steps)
    return Partial(_unrolled, as_callable(step, "step"), np.arange(steps))


@by_parts
def _rejecting(model, detector, threshold, factor, x, keys=None):
    logits, score = asked(model, x, folded(keys, 0)), asked(detector, x, folded(keys, 1))
    if score.shape != logits.shape[:1]:
        raise ValueError(
            f"a detector must return one score for each row, [{logits.shape[0]}]; got {list(score.shape)}. "
            "Higher is more suspicious; take the column that says so."
        )
    alarm = jnp.max(logits, axis=-1) + factor * (score - threshold)
    return jnp.concatenate([logits, alarm[:, None].astype(logits.dtype)], axis=-1)


def rejecting(model: Any, detector: Any, *, threshold: Any = 0.0, factor: Any = 1.0) -> Model:
    """Return the model with one more class, "rejected", which wins exactly where the detector raises the alarm.

    The alarm's logit is `max_i z_i + factor (h(x) - threshold)`. Aiming at a class (`Targets`) must beat the other
    classes and the detector at once; the margin loss works on the worse of the two. For plain labels use `sweep`: an
    untargeted attack would take a rejected input for a success.

    Args:
      model: logits `[b, k]` from a batch.
      detector: `[b]` from a batch, higher is more suspicious.
      threshold: the alarm is raised above it; choose it for a rate of false alarms on clean data.
      factor: of the alarm, so that gradients of both parts are of one size.

    Returns:
      A model of `k + 1` classes.

    Raises:
      ValueError: on a factor that is not positive; when called, if the detector returns another shape.

    References:
      Carlini and Wagner 2017, Adversarial examples are not easily detected, sec. 4.3, arXiv:1705.07263. Theirs is
      `(D(x) + 1) max_i z_i`, which asks for positive logits.
    """
    check.positive("factor", factor, "It scales the detector's score to the size of the logits.")
    return Partial(_rejecting, as_callable(model), as_callable(detector, "detector"), threshold, factor)


def sweep(attack: Attack, key: Any, model: Any, x: Any, y: Any, *, classes: int, index: Any = None) -> Result:
    """Aim an attack at every class but the label in turn, and keep the worst case of every row.

    Args:
      attack: one that takes `Targets`, such as `pgd`; a margin loss suits `rejecting`.
      key: a typed key.
      model: logits from a batch; with `rejecting` the last class is never aimed at.
      x: `[b, ...]` examples.
      y: int `[b]` labels.
      classes: number of classes to aim at or come from.
      index: int `[b]` dataset indices; defaults to `arange(b)`.

    Returns:
      The best result of each row by (success, lowest score). Success means that the model puts the row into a class
      of these other than its label.

    Raises:
      ValueError: with fewer than two classes, or labels that are none of them.

    References:
      Tramèr et al. 2020, On adaptive attacks to adversarial example defenses, arXiv:2002.08347 (multi-targeted).
    """
    check.whole("classes", classes, least=2)
    check.labels(y, x.shape[0], classes)
    y = jnp.asarray(y)

    def aimed(turn):
        return run(attack, key, model, x, Targets(y, (y + turn) % classes), index=index, restart=turn - 1)

    return jax.lax.fori_loop(2, classes, lambda turn, best: joined(best, aimed(turn)), aimed(1))


@by_parts
def _matched(features, stored, labels, classes, x, keys=None):
    seen = flat(asked(features, x, keys))
    inner = jnp.matmul(seen, stored.T, precision="highest")
    far = jnp.sum(jnp.square(seen), -1, keepdims=True) - 2 * inner + jnp.sum(jnp.square(stored), -1)[None]
    own = labels[None] == classes[:, None]
    return -jnp.min(jnp.where(own[None], jnp.maximum(far, 0)[:, None], jnp.inf), axis=-1)


def matched(features: Any, x: Any, y: Any, *, classes: int) -> Model:
    """Return the classifier of the nearest example in a space of features: a stand-in that aims at features.

    Its logits are minus the squared distances to the nearest example of each class, so that the margin loss brings the
    features to those of the nearest example of another class. Give it to `straight` as the gradient of a model, to
    `transfer` as a surrogate, or attack it by itself.

    Args:
      features: `[b, ...]` from a batch, e.g. `models.features(trainable, at='linear:in')`.
      x: `[n, ...]` examples.
      y: int `[n]` their classes, each at least once.
      classes: number of classes.

    Returns:
      A model.

    Raises:
      ValueError: if a class has no example.

    References:
      Sabour et al. 2016, Adversarial manipulation of deep representations, arXiv:1511.05122; Tramèr et al. 2020,
      arXiv:2002.08347 (feature-level attacks). Differs: the example to match is the nearest one, at every step anew.
    """
    check.labels(y, x.shape[0], classes)
    lacking = sorted(set(range(classes)) - set(np.unique(np.asarray(y)).tolist()))
    if lacking:
        raise ValueError(f"each of the {classes} classes needs an example; got none of {lacking[:5]}. Pass more of x.")
    features = as_callable(features, "features")
    return Partial(_matched, features, flat(features(jnp.asarray(x))), jnp.asarray(y), np.arange(classes))


def feature_distance(features: Float[Array, "b d"], y: Float[Array, "b d"]) -> Float[Array, " b"]:
    """Return the squared distance to given features, an attack loss for a model that returns features.

    Args:
      features: `[b, d]` what the model returned.
      y: `[b, d]` the features to reach, `features(x_target)`.

    Returns:
      `[b]`, what the attacker minimizes; give it as `loss` and as `criterion`.

    References:
      Sabour et al. 2016, Adversarial manipulation of deep representations, eq. 1, arXiv:1511.05122.
    """
    return jnp.sum(jnp.square(features - y), axis=-1)
