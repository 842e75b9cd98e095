"""Randomized smoothing: PREDICT and CERTIFY with exact binomial bounds.

Everything here speaks of the *smoothed* classifier `g(x) = argmax_c P(f(x + e) = c)` with Gaussian noise `e` of
deviation `sigma` in each coordinate, not of the network `f` that is asked. The radius holds in the l2 norm, in units of
`x`, without regard to bounds (noise is never clipped), and with probability `1 - alpha` over the noise of CERTIFY.

Noise belongs to (dataset index, number of the sample): counts do not depend on the batch, on how many samples are asked
for at once, or on the order of the examples. The bound is a function of a whole number, so it is computed on the host
in float64 for all counts at once and looked up in the compiled program; what is stored in float32 is rounded down.

What does not live here: training with noise, and other certificates.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxadv.core import Model, Threat, as_callable, check, example_keys, label_of, loop

ABSTAIN = -1
"""The label of an example about which nothing is claimed."""


class Certificate(NamedTuple):
    """What CERTIFY claims, one row for each example.

    Attributes:
      label: int `[b]` the class of the smoothed classifier, or `ABSTAIN`.
      radius: `[b]` l2 radius within which it does not change; 0 for an abstention.
      p_lower: `[b]` lower confidence bound on the probability of the class under noise.
      counts: int `[b, k]` votes of the estimation sample; noisy copies with logits that are not finite vote for none.
    """

    label: Int[Array, " b"]
    radius: Float[Array, " b"]
    p_lower: Float[Array, " b"]
    counts: Int[Array, "b k"]


def clopper_pearson_lower(hits: Any, n: int, alpha: float) -> Any:
    """Return the exact one-sided lower confidence bound of a probability.

    Args:
      hits: successes among `n` trials, a number or an array of whole numbers in [0, n].
      n: number of trials.
      alpha: probability with which the bound may be wrong, in (0, 1).

    Returns:
      float64, the `alpha` quantile of Beta(hits, n - hits + 1); 0 for no hits.

    Raises:
      ValueError: if `n` or `alpha` is out of range.

    >>> round(float(clopper_pearson_lower(990, 1000, 0.001)), 10)
    0.9760361872

    References:
      Clopper and Pearson 1934, Biometrika 26.
    """
    from scipy.stats import beta

    check.whole("n", n)
    _level(alpha)
    hits = np.asarray(hits)
    some = np.maximum(hits, 1)
    return np.where(hits > 0, beta.ppf(alpha, some, n - some + 1), 0.0)


def _level(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1); got {alpha}. It is a probability of error, usually 0.001.")


def _down(values: np.ndarray) -> np.ndarray:
    """Round to float32 toward minus infinity."""
    near = values.astype(np.float32)
    return np.where(near > values, np.nextafter(near, np.float32(-np.inf)), near)


@lru_cache(maxsize=16)
def _bounds(n: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Bound and radius / sigma for every count from 0 to n; a radius below zero becomes -1, an abstention."""
    from scipy.special import ndtri

    lower = clopper_pearson_lower(np.arange(n + 1), n, alpha)
    return _down(lower), _down(np.where(lower >= 0.5, ndtri(lower), -1.0))


@lru_cache(maxsize=16)
def _fewest(n: int, alpha: float) -> np.ndarray:
    """For every total from 0 to n, the fewest votes of the first class that the binomial test calls a majority."""
    from scipy.stats import binom

    total = np.arange(n + 1)
    return (binom.isf(alpha / 2, total, 0.5) + 1).astype(np.int32)


def sample_counts(
    key, model: Any, x: Any, *, sigma: Any, n: int, index=None, stage: int = 0, batch_size: int = 1000
) -> Int[Array, "b k"]:
    """Count what the model says about noisy copies.

    Args:
      key: a typed key.
      model: logits `[m, k]` from a batch `[m, ...]`.
      x: `[b, ...]` examples.
      sigma: deviation of the noise in units of `x`, a number or traced.
      n: copies of each example.
      index: int `[b]` dataset indices, from which the noise comes; defaults to `arange(b)`.
      stage: samples of different stages are independent.
      batch_size: rows of a forward pass, about; it changes speed and memory, never the noise.

    Returns:
      int32 `[b, k]`; rows sum to `n` where all logits were finite.

    Raises:
      ValueError: if `n`, `sigma` or shapes are out of range.
    """
    check.inputs(x)
    check.whole("n", n)
    check.whole("batch_size", batch_size)
    check.positive("sigma", sigma, "It is in the units of x; 0.25 is usual for images in [0, 1].")
    x = jnp.asarray(x)
    b, per = x.shape[0], max(1, min(batch_size // x.shape[0], n))
    keys = example_keys(key, "smoothing", jnp.arange(b) if index is None else jnp.asarray(index), stage)
    out = jax.eval_shape(model, jax.ShapeDtypeStruct((b * per, *x.shape[1:]), x.dtype))
    check.logits(out, b * per)
    classes = out.shape[1]

    def ask(carry):
        number, counts = carry
        sample = number[:, None] + jnp.arange(per, dtype=jnp.int32)[None]
        noise = jax.vmap(jax.vmap(lambda k, j: jax.random.normal(jax.random.fold_in(k, j), x.shape[1:], x.dtype),
                                  (None, 0)))(keys, sample)  # fmt: skip
        logits = model((x[:, None] + sigma * noise).astype(x.dtype).reshape(b * per, *x.shape[1:]))
        vote = jnp.where(jnp.all(jnp.isfinite(logits), axis=-1), jnp.argmax(logits, axis=-1), ABSTAIN)
        vote = jnp.where(sample < n, vote.reshape(b, per), ABSTAIN)  # the last pass may ask for more than there are
        cast = vote[..., None] == jnp.arange(classes)[None, None]
        return number + per, counts + jnp.sum(cast, axis=1, dtype=jnp.int32)

    none = jnp.zeros_like(x.reshape(b, -1)[:, 0], jnp.int32)
    start = (none, jnp.broadcast_to(none[:, None], (b, classes)))
    return loop(ask, start, -(-n // per))[1]


def certify(
    key,
    model: Any,
    x: Any,
    *,
    sigma: Any,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    index=None,
    batch_size: int = 1000,
) -> Certificate:
    """Return CERTIFY: the class of the smoothed classifier and an l2 radius within which it does not change.

    One sample of noise chooses the class, a fresh one bounds its probability from below (exactly, one-sided); the
    radius is `sigma * Phi^-1(bound)`, an abstention where the bound is below one half. Pure: jit, vmap or shard it.

    Args:
      key: a typed key.
      model: the base classifier, logits from a batch, in evaluation mode.
      x: `[b, ...]` examples.
      sigma: deviation of the noise in units of `x`, the one the classifier was trained with.
      n0: copies that choose the class.
      n: copies that bound its probability.
      alpha: probability with which a claim may be wrong, for each example.
      index: int `[b]` dataset indices; defaults to `arange(b)`.
      batch_size: rows of a forward pass, about.

    Returns:
      The certificate. `radius` is at most `sigma * Phi^-1(alpha^(1 / n))`, 3.81 sigma with the defaults.

    Raises:
      ValueError: if a setting is out of range.

    References:
      Cohen, Rosenfeld and Kolter 2019, Certified adversarial robustness via randomized smoothing, sec. 3.2.2,
      arXiv:1902.02918. Differs from the authors' code: all examples of a batch at once, noise from the dataset index,
      logits that are not finite vote for no class, radii rounded down.
    """
    _level(alpha)
    settings = {"sigma": sigma, "index": index, "batch_size": batch_size}
    chosen = jnp.argmax(sample_counts(key, model, x, n=n0, stage=0, **settings), axis=-1).astype(jnp.int32)
    counts = sample_counts(key, model, x, n=n, stage=1, **settings)
    hits = jnp.take_along_axis(counts, chosen[:, None], axis=-1)[:, 0]
    lower, share = (jnp.asarray(table)[hits] for table in _bounds(n, alpha))
    sure = share >= 0
    radius = jnp.where(sure, jnp.nextafter(jnp.asarray(sigma, jnp.float32) * share, jnp.zeros_like(share)), 0)
    return Certificate(jnp.where(sure, chosen, ABSTAIN), radius, lower, counts)


def predict(
    key,
    model: Any,
    x: Any,
    *,
    sigma: Any,
    n: int = 1000,
    alpha: float = 0.001,
    index=None,
    batch_size: int = 1000,
) -> Int[Array, " b"]:
    """Return PREDICT: the class of the smoothed classifier, or an abstention where the two first are too close.

    Args:
      key: a typed key.
      model: the base classifier, logits from a batch.
      x: `[b, ...]` examples.
      sigma: deviation of the noise.
      n: noisy copies of each example.
      alpha: probability with which the answer may be another class than the smoothed classifier's.
      index: int `[b]` dataset indices; defaults to `arange(b)`.
      batch_size: rows of a forward pass, about.

    Returns:
      int `[b]`, `ABSTAIN` where the exact two-sided binomial test of the two largest counts has a p-value above
      `alpha`.

    Raises:
      ValueError: if a setting is out of range.

    References:
      Cohen, Rosenfeld and Kolter 2019, sec. 3.2.1, arXiv:1902.02918.
    """
    _level(alpha)
    counts = sample_counts(key, model, x, sigma=sigma, n=n, index=index, stage=2, batch_size=batch_size)
    top, order = jax.lax.top_k(counts, 2)
    sure = top[:, 0] >= jnp.asarray(_fewest(n, alpha))[top[:, 0] + top[:, 1]]
    return jnp.where(sure, order[:, 0].astype(jnp.int32), ABSTAIN)


def certified_accuracy(certificate: Certificate, y: Any, radii: Any) -> np.ndarray:
    """Return the share of examples that are right and certified beyond each radius; abstentions count as wrong.

    Args:
      certificate: of all examples.
      y: int `[n]` labels.
      radii: `[r]` radii.

    Returns:
      float64 `[r]`.
    """
    right = np.asarray(certificate.label) == np.asarray(y)
    radius, wanted = np.asarray(certificate.radius, np.float64), np.asarray(radii, np.float64)
    return np.mean(right[None] & (radius[None] >= wanted.reshape(-1, 1)), axis=1)


def average_certified_radius(certificate: Certificate, y: Any) -> float:
    """Return the mean over all examples of the radius, counted as 0 where the label is wrong or absent.

    Args:
      certificate: of all examples.
      y: int `[n]` labels.

    Returns:
      The average certified radius.

    References:
      Zhai et al. 2020, MACER, sec. 3.3, arXiv:2001.02378.
    """
    right = np.asarray(certificate.label) == np.asarray(y)
    return float(np.mean(right * np.asarray(certificate.radius, np.float64)))


def guaranteed_accuracy(accuracy: float, n: int, *, alpha: float = 0.001, rho: float = 0.001) -> float:
    """Return a lower bound on certified accuracy that holds with probability `1 - rho` although claims may be wrong.

    Args:
      accuracy: certified accuracy as measured.
      n: number of examples.
      alpha: probability with which the claim about one example may be wrong.
      rho: probability with which this bound may be wrong.

    Returns:
      `accuracy - alpha - sqrt(alpha (1 - alpha) ln(1 / rho) / n) - ln(1 / rho) / (3 n)`.

    References:
      Cohen, Rosenfeld and Kolter 2019, appendix (Bernstein's inequality), arXiv:1902.02918.
    """
    surprise = np.log(1 / rho)
    return float(accuracy - alpha - np.sqrt(alpha * (1 - alpha) * surprise / n) - surprise / (3 * n))


@dataclasses.dataclass(frozen=True)
class _Average:
    """The arithmetic of `smoothed`; hashable, so that equal settings share one program."""

    n: int
    votes: bool

    def __call__(self, model, key, sigma, x):
        """Return the log of mean probabilities, or the share of votes."""

        @jax.checkpoint  # pyright: ignore[reportPrivateImportUsage]
        def ask(carry):
            number, total = carry
            noise = jax.random.normal(jax.random.fold_in(key, number), x.shape[1:], x.dtype)
            logits = model((x + sigma * noise[None]).astype(x.dtype))
            if self.votes:
                share = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=total.dtype)
                share = jnp.where(jnp.all(jnp.isfinite(logits), -1, keepdims=True), share, jnp.nan)
            else:
                share = jax.nn.softmax(logits)
            return number + 1, total + share.astype(total.dtype)

        out = jax.eval_shape(model, x)
        total = jnp.zeros(out.shape, out.dtype) + 0 * x.reshape(x.shape[0], -1)[:, :1].astype(out.dtype)
        total = loop(ask, (jnp.int32(0), total), self.n)[1] / self.n
        return total if self.votes else jnp.log(total + jnp.finfo(total.dtype).tiny)


def smoothed(key, model: Any, *, sigma: Any, n: int = 64, votes: bool = False) -> Model:
    """Return a deterministic stand-in for the smoothed classifier, to be evaluated and attacked.

    The exact smoothed classifier cannot be computed. This model averages over `n` draws of noise that are fixed by
    `key` and shared by all inputs. Its gradient is that of the averaged probabilities, which is the attack on smoothed
    classifiers of the reference.

    Args:
      key: a typed key.
      model: the base classifier, logits from a batch.
      sigma: deviation of the noise.
      n: draws; an evaluation costs `n` forward passes.
      votes: return the share of votes of each class, as the smoothed classifier is defined (no gradient), instead of
        the log of mean probabilities.

    Returns:
      A model.

    Raises:
      ValueError: if `n` or `sigma` is out of range.

    References:
      Salman et al. 2019, Provably robust deep learning via adversarially trained smoothed classifiers, eq. 6,
      arXiv:1906.04584.
    """
    check.whole("n", n)
    check.positive("sigma", sigma, "It is in the units of x.")
    return Model(_Average(n, votes), as_callable(model), key, sigma)


def certificate(*, n0: int = 100, n: int = 10_000, alpha: float = 0.001, batch_size: int = 1000) -> Callable:
    """Return a function that tells which examples of a smoothed model are certified, for the evaluation's lower bound.

    Evaluate `smoothed(key, model, sigma=...)` with it: the certificate is about the smoothed classifier, never about
    the base model, so it takes base model and noise from there. What it says of an example is true of the exact
    smoothed classifier with probability `1 - alpha`; the model under attack is a finite average, which may differ from
    it where the two first classes are close.

    Args:
      n0: copies that choose the class.
      n: copies that bound its probability.
      alpha: probability of a wrong claim, for each example.
      batch_size: rows of a forward pass, about.

    Returns:
      `certified(key, model, x, y, threat, index) -> bool [b]`: right, and the radius covers the budget of the threat
      with its rounding. It raises ValueError for a model that is not smoothed, or another norm than l2.
    """

    def certified(key, model: Any, x, y, threat: Threat, index) -> Array:
        if not isinstance(getattr(model, "func", None), _Average):
            raise ValueError(
                "a smoothing certificate needs a model made by smoothing.smoothed, since it speaks of the smoothed "
                f"classifier and not of the base; got {type(model).__name__}. Evaluate smoothed(key, model, sigma=...)."
            )
        if threat.norm != "l2":
            raise ValueError(f"Gaussian smoothing certifies l2 balls; got {threat.norm}. Use threats.l2.")
        base, _, sigma = model.args
        return _certified(key, base, sigma, x, y, threat.budget(x), index, n0, n, alpha, batch_size)

    certified.__name__ = f"smoothing(n={n}, alpha={alpha:g})"
    return certified


@jax.jit(static_argnums=(7, 8, 9, 10))
def _certified(key, base, sigma, x, y, budget, index, n0, n, alpha, batch_size):
    found = certify(key, base, x, sigma=sigma, n0=n0, n=n, alpha=alpha, index=index, batch_size=batch_size)
    return (found.label == label_of(y)) & (found.radius > budget)
