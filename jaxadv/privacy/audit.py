"""Audits: lower bounds of epsilon by experiment, and membership inference by likelihood ratios.

What lives here: the white-box audit of one step with its Gaussian bound, canaries, auditing in one run (through
jax-privacy), LiRA. What does not: upper bounds (`accounting.py`). An audit can show that a claim is false; it can never
show that it is true.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Bool, Float

from jaxadv.core import PyTree, check
from jaxadv.privacy import accounting
from jaxadv.privacy.accounting import missing


@dataclasses.dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
      epsilon: lower bound, at the given confidence.
      claimed: what the accountant says.
      delta: of both.
      mu: lower bound of the distance of the two answers in standard deviations.
      errors: upper bounds of the rates of the two errors: taken for in while out, for out while in.
      trials: runs with and runs without the canary, each.
      confidence: of the bound.
    """

    epsilon: float
    claimed: float
    delta: float
    mu: float
    errors: tuple[float, float]
    trials: int
    confidence: float

    @property
    def leaks(self) -> bool:
        """Whether the claim is refuted."""
        return self.epsilon > self.claimed


def _at_most(hits: int, trials: int, confidence: float) -> float:
    """Clopper-Pearson's upper bound of a probability."""
    from scipy import stats

    return 1.0 if hits >= trials else float(stats.beta.ppf(confidence, hits + 1, trials - hits))


def gaussian_bound(
    inside: Float[np.ndarray, " n"],
    outside: Float[np.ndarray, " m"],
    *,
    threshold: float,
    delta: float,
    confidence: float = 0.99,
) -> tuple[float, float, tuple[float, float]]:
    """Bound epsilon from below by how well a threshold tells two kinds of runs apart.

    `mu = z(1 - FPR) + z(1 - FNR)` with Clopper-Pearson's upper bounds of both errors, each at half of what the
    confidence leaves; epsilon is that of two Gaussians at this distance. It is a valid bound for mechanisms whose
    trade-off curve is Gaussian, as that of one step with Gaussian noise and without sampling.

    Args:
      inside: scores of runs with the canary.
      outside: scores of runs without.
      threshold: larger scores are taken for "in"; **chosen before** the scores are seen.
      delta: of the bound.
      confidence: of the bound.

    Returns:
      (epsilon, mu, (bound of the false positive rate, of the false negative rate)); scores that are not finite are
      taken for "in".

    Raises:
      ValueError: if the confidence is none.
      ImportError: without the extra `privacy`.

    References:
      Nasr et al. 2023, Tight auditing of differentially private machine learning, arXiv:2302.07956, section 4.
    """
    from scipy import stats

    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence must lie between 0.5 and 1; got {confidence}. 0.99 is usual.")
    share = 1 - (1 - confidence) / 2
    false_positive = _at_most(int(np.sum(~(np.asarray(outside) <= threshold))), len(outside), share)
    false_negative = _at_most(int(np.sum(np.asarray(inside) <= threshold)), len(inside), share)
    mu = float(stats.norm.isf(false_positive) + stats.norm.isf(false_negative))
    mu = mu if math.isfinite(mu) else 0.0
    return accounting.of_gaussian(mu, delta), mu, (false_positive, false_negative)


def scores(release: Callable[[Any, Any], PyTree], canary: PyTree, keys, included: bool, *, batch: int = 1000):
    """Run a release many times and project each answer onto the canary.

    Args:
      release: `release(key, included) -> pytree`, what one run publishes; `included` is a bool scalar.
      canary: what the canary adds to the answer, of any length: a pytree of the same form.
      keys: typed keys `[n]`, one for each run.
      included: whether the canary takes part.
      batch: runs at once.

    Returns:
      `[n]` scores `<answer, canary> / |canary|`.
    """
    direction, _ = ravel_pytree(canary)
    direction = direction / jnp.linalg.norm(direction)

    def one(key):
        return ravel_pytree(release(key, jnp.asarray(included)))[0] @ direction

    return np.asarray(jax.jit(lambda keys: lax.map(one, keys, batch_size=batch))(keys))


def white_box(
    key,
    release: Callable[[Any, Any], PyTree],
    canary: PyTree,
    *,
    claimed: float,
    delta: float,
    trials: int = 20_000,
    confidence: float = 0.99,
    middle: float | None = None,
) -> Audit:
    """Audit one release by running it many times with and without a canary, with full view of the answer.

    | release | result |
    | --- | --- |
    | honest | `epsilon` comes close to `claimed` from below |
    | too little noise, a canary that is not clipped, noise missing on a shard | `epsilon` is above `claimed` |

    Args:
      key: a typed key.
      release: see `scores`; the same data but for the canary, fresh noise for each key.
      canary: what the canary adds to the answer if all is right, such as its clipped gradient.
      claimed: epsilon of one release as the accountant states it.
      delta: of both.
      trials: runs with and runs without the canary, each.
      confidence: of the bound.
      middle: threshold of the scores; None takes the middle between the answers' expected scores, estimated from a
        tenth as many runs of their own.

    Returns:
      The audit; `leaks` says whether the claim is refuted.

    Raises:
      ValueError: if a number is out of range.
      ImportError: without the extra `privacy`.
    """
    check.whole("trials", trials, least=100)
    runs = [jax.random.split(jax.random.fold_in(key, i), trials) for i in range(2)]
    if middle is None:
        pilot = jax.random.split(jax.random.fold_in(key, 2), trials // 10)
        middle = float(np.mean([scores(release, canary, pilot, held).mean() for held in (True, False)]))
    inside, outside = (scores(release, canary, keys, held) for keys, held in zip(runs, (True, False)))
    epsilon, mu, errors = gaussian_bound(inside, outside, threshold=middle, delta=delta, confidence=confidence)
    return Audit(epsilon, claimed, delta, mu, errors, trials, confidence)


# -------------------------------------------------------------------------------------------------- auditing in one run


def gradient_canaries(key, params: PyTree, count: int, norm: float) -> PyTree:
    """Return gradients that stand for examples which do not exist: each one coordinate, with the norm of the clip.

    Args:
      key: a typed key.
      params: whose gradients they are.
      count: number of canaries, at most the number of parameters; no two share a coordinate.
      norm: length of each.

    Returns:
      A pytree like `params` with leaves `[count, ...]`.

    Raises:
      ValueError: if there are fewer parameters than canaries.

    References:
      Steinke, Nasr and Jagielski 2023, Privacy auditing with one (1) training run, arXiv:2305.08846, section 6.
    """
    flat, back = ravel_pytree(params)
    check.whole("count", count)
    if count > flat.size:
        raise ValueError(f"count must be at most the {flat.size} parameters; got {count}. Take fewer canaries.")
    first, second = jax.random.split(key)
    places = jax.random.choice(first, flat.size, (count,), replace=False)
    signs = jax.random.rademacher(second, (count,), jnp.float32)
    rows = jnp.zeros((count, flat.size)).at[jnp.arange(count), places].set(norm * signs)
    return jax.vmap(back)(rows)


def one_run(
    inside: Float[np.ndarray, " n"], outside: Float[np.ndarray, " m"], *, delta: float, confidence: float = 0.95
) -> float:
    """Bound epsilon from below by one run in which each canary took part by a fair coin.

    Args:
      inside: scores of canaries that took part.
      outside: scores of canaries that did not.
      delta: of the bound.
      confidence: of the bound.

    Returns:
      A valid and usually loose bound, by jax-privacy.

    Raises:
      ImportError: without the extra `privacy`.

    References:
      Steinke, Nasr and Jagielski 2023, arXiv:2305.08846.
    """
    try:
        from jax_privacy import auditing
    except ImportError as error:
        raise ImportError(missing("auditing in one run", "jax-privacy")) from error
    return float(auditing.CanaryScoreAuditor(inside, outside).epsilon_one_run(1 - confidence, delta))


# ------------------------------------------------------------------------------------------------- membership inference


def confidence_scores(logits: Float[jax.Array, "*b k"], y) -> Float[jax.Array, "*b"]:
    """Return the logit of the probability of the label: `log p_y - log sum over k != y of p_k`, without cancellation.

    Args:
      logits: `[..., k]`.
      y: int `[...]`.

    Returns:
      `[...]`, nearly Gaussian over networks.
    """
    own = jnp.take_along_axis(logits, y[..., None], -1)[..., 0]
    others = jnp.where(jax.nn.one_hot(y, logits.shape[-1], dtype=bool), -jnp.inf, logits)
    return own - jax.nn.logsumexp(others, -1)


def lira_scores(
    phi: Float[np.ndarray, "M n a"],
    member: Bool[np.ndarray, "M n"],
    phi_target: Float[np.ndarray, "n a"],
    *,
    online: bool = True,
    fixed_variance: bool = False,
) -> Float[np.ndarray, " n"]:
    """Score how likely each example was in the training data of a network, by Gaussians over shadow networks.

    Args:
      phi: `confidence_scores` of M shadow networks on n examples, a augmented views each.
      member: which examples each shadow network was trained on.
      phi_target: scores of the network that is attacked.
      online: log-density ratio of "in" to "out"; False uses "out" alone: `-log P[Z > phi]`, which ranks as `1 - P`.
      fixed_variance: one variance for all examples, better below 64 shadow networks.

    Returns:
      `[n]`, larger for members; the mean over views.

    Raises:
      ValueError: if an example has fewer than two shadow networks of a kind that is needed.

    References:
      Carlini et al. 2022, Membership inference attacks from first principles, arXiv:2112.03570, sections 4 and 5.
    """
    from scipy import stats

    few = min(int((~member).sum(0).min()), int(member.sum(0).min()) if online else len(member))
    if few < 2:
        raise ValueError(
            f"every example must be in and out of at least 2 shadow networks; got {few}. Train each on a random half."
        )

    def gaussian(chosen):
        held = np.where(chosen[..., None], phi.astype(np.float64), np.nan)
        mean, spread = np.nanmean(held, 0), np.nanstd(held, 0)
        spread = np.sqrt(np.nanmean((held - mean) ** 2, (0, 1)))[None] if fixed_variance else spread
        return mean, np.maximum(spread, 1e-12)

    out = gaussian(~member)
    if not online:
        return -stats.norm.logsf(phi_target, *out).mean(-1)
    return (stats.norm.logpdf(phi_target, *gaussian(member)) - stats.norm.logpdf(phi_target, *out)).mean(-1)


def tpr_at_fpr(scores: Float[np.ndarray, " n"], member: Bool[np.ndarray, " n"], fpr: float) -> float:
    """Return the share of members found by the threshold that takes at most so many others for members.

    Args:
      scores: larger for members.
      member: the truth.
      fpr: allowed share of the others, in [0, 1); 0.001 is usual.

    Returns:
      The true positive rate.

    Raises:
      ValueError: if the rate is none, or there are no members or no others.
    """
    others = np.sort(scores[~member])[::-1]
    if not 0 <= fpr < 1 or not len(others) or not member.any():
        raise ValueError(
            f"fpr must lie in [0, 1), with members and others; got {fpr}, {int(member.sum())} of {len(member)} members."
        )
    return float(np.mean(scores[member] > others[int(fpr * len(others))]))
