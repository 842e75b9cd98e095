"""From mechanisms to numbers: epsilon, delta, and the noise or the number of steps that a budget allows.

What lives here: thin doors to `dp-accounting` (Rényi and privacy-loss-distribution accountants), with names that say
what is neighbor to what. What does not: any accountant of our own, and the question whether a run did what its event
says (`plan.py` binds the two).

Everything is plain Python in float64, outside of jit. Needs the extra `privacy`, and imports it when it is used.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxadv.core import check

ACCOUNTANTS = ("pld", "rdp")
"""`'pld'`: privacy loss distributions, the tighter one. `'rdp'`: Rényi divergences, quicker, the papers' of 2022."""

RELATIONS = ("add_or_remove_one", "replace_special", "replace_one")
"""Which data sets are neighbors: one example more or less; one replaced by a row that does not count; one replaced by
any other. The last costs about twice the epsilon."""


def library() -> Any:
    """Import the accounting library.

    Returns:
      Its parts: `dp_event`, `mechanism_calibration`, `privacy_accountant`, `pld`, `rdp`, `gaussian_mechanism`.

    Raises:
      ImportError: if it is not installed; the message names the extra.
    """
    try:
        from dp_accounting import dp_event, gaussian_mechanism, mechanism_calibration, pld, privacy_accountant, rdp
    except ImportError as error:
        raise ImportError(missing("counting epsilon", "dp-accounting")) from error
    parts = (dp_event, gaussian_mechanism, mechanism_calibration, pld, privacy_accountant, rdp)
    return SimpleNamespace(**{part.__name__.rpartition(".")[2]: part for part in parts})


def missing(what: str, name: str) -> str:
    """Say that an optional library is not installed.

    Args:
      what: what needs it.
      name: the library.

    Returns:
      The message of the error.
    """
    return f"{what} needs {name}, which is not installed; it comes with the extra: pip install 'jaxadv[privacy]'"


def gaussian_event(noise_multiplier: float, *, rate: float = 1.0, n: int | None = None, rows: int | None = None) -> Any:
    """Describe one release of a clipped sum with Gaussian noise, on a random part of the data.

    Args:
      noise_multiplier: standard deviation of the noise over the largest norm that one example contributes.
      rate: probability that an example takes part, each by its own coin.
      n: number of examples; needed with `rows`.
      rows: the most examples that take part; of more, a random subset does. None is no such limit.

    Returns:
      A `DpEvent` for one step.

    Raises:
      ValueError: if a number is out of its range.
      ImportError: without the extra `privacy`.
    """
    if not noise_multiplier >= 0:
        raise ValueError(f"noise_multiplier must be at least 0; got {noise_multiplier}. 1.0 is a usual start.")
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be a probability in (0, 1]; got {rate}. It is the batch size over the data's.")
    events = library().dp_event
    if rows is not None:
        if n is None:
            raise ValueError("n must be given with rows; got None. It is the number of examples.")
        return events.TruncatedSubsampledGaussianDpEvent(
            dataset_size=n, sampling_probability=rate, truncated_batch_size=rows, noise_multiplier=noise_multiplier
        )
    release = events.GaussianDpEvent(noise_multiplier)
    return release if rate == 1 else events.PoissonSampledDpEvent(rate, release)


def _orders() -> np.ndarray:
    return np.concatenate([np.linspace(1.01, 8, 50), np.arange(8, 64), np.linspace(65, 512, 10)])


def _accountant(accountant: str, relation: str) -> Any:
    check.choice("accountant", accountant, ACCOUNTANTS)
    check.choice("relation", relation, RELATIONS)
    parts = library()
    neighbors = parts.privacy_accountant.NeighboringRelation[relation.upper()]
    if accountant == "pld":
        return parts.pld.PLDAccountant(neighbors)
    return parts.rdp.RdpAccountant(_orders(), neighbors)


class _Quiet(logging.Filter):
    """Drops the accountant's words on orders that it leaves out, which only loosens the bound."""

    def filter(self, record):
        """Tell whether to show a line."""
        return "failed to converge" not in str(record.msg)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    log, quiet = logging.getLogger("absl"), _Quiet()
    log.addFilter(quiet)
    try:
        yield
    finally:
        log.removeFilter(quiet)


def _composed(event: Any, steps: int, accountant: str, relation: str) -> Any:
    check.whole("steps", steps, least=0)
    made = _accountant(accountant, relation)
    try:
        with _quiet():
            return made.compose(event, steps) if steps else made
    except library().privacy_accountant.UnsupportedEventError as error:
        raise ValueError(
            f"the accountant must know the mechanism; {accountant!r} with neighbors {relation!r} does not: "
            f"{' '.join(str(error).split())[:300]}. Take accountant='pld' and relation='replace_special'."
        ) from error


@functools.lru_cache(maxsize=256)
def _epsilon(event: Any, delta: float, steps: int, accountant: str, relation: str) -> float:
    composed = _composed(event, steps, accountant, relation)
    return float(composed.get_epsilon(delta)) if steps else 0.0


def epsilon(
    event: Any, delta: float, *, steps: int = 1, accountant: str = "pld", relation: str = "add_or_remove_one"
) -> float:
    """Return the epsilon of a mechanism that is run several times.

    | case | result |
    | --- | --- |
    | no steps | 0 |
    | no noise | infinity |
    | `steps` runs of a Gaussian | that of one Gaussian with the noise over `sqrt(steps)` |

    Args:
      event: of one step, from `gaussian_event` or from dp-accounting.
      delta: the probability that the bound may fail with; below one over the number of examples.
      steps: number of runs.
      accountant: one of `ACCOUNTANTS`.
      relation: one of `RELATIONS`.

    Returns:
      An upper bound of epsilon.

    Raises:
      ValueError: if the accountant does not know the event under this relation.
      ImportError: without the extra `privacy`.

    References:
      Mironov, Talwar and Zhang 2019, Rényi differential privacy of the sampled Gaussian mechanism, arXiv:1908.10530.
      Doroshenko et al. 2022, Connect the dots, arXiv:2207.04380. Numbers are those of dp-accounting.
    """
    return _epsilon(event, delta, steps, accountant, relation)


def delta(
    event: Any, epsilon: float, *, steps: int = 1, accountant: str = "pld", relation: str = "add_or_remove_one"
) -> float:
    """Return the delta of a mechanism that is run several times.

    Args:
      event: see `epsilon`.
      epsilon: at least 0.
      steps: see `epsilon`.
      accountant: see `epsilon`.
      relation: see `epsilon`.

    Returns:
      An upper bound of delta.

    Raises:
      ValueError: if the accountant does not know the event under this relation.
      ImportError: without the extra `privacy`.
    """
    composed = _composed(event, steps, accountant, relation)
    return float(composed.get_delta(epsilon)) if steps else 0.0


def calibrate_noise(
    epsilon: float,
    delta: float,
    *,
    rate: float,
    steps: int,
    n: int | None = None,
    rows: int | None = None,
    accountant: str = "pld",
    relation: str = "add_or_remove_one",
    tolerance: float = 1e-3,
) -> float:
    """Return the least noise that keeps a run within a budget.

    Args:
      epsilon: the budget, above 0.
      delta: see `epsilon`.
      rate: probability that an example takes part in a step.
      steps: number of steps.
      n: see `gaussian_event`.
      rows: see `gaussian_event`.
      accountant: one of `ACCOUNTANTS`.
      relation: one of `RELATIONS`.
      tolerance: by which share the answer may lie above the least.

    Returns:
      The noise multiplier; its epsilon is at most the budget.

    Raises:
      ValueError: if the budget is none, or the accountant does not know the mechanism.
      ImportError: without the extra `privacy`.
    """
    check.positive("epsilon", epsilon, "8, 3 and 1 are usual.")
    check.whole("steps", steps)

    def event(noise):
        return gaussian_event(noise, rate=rate, n=n, rows=rows)

    def keeps(noise):
        return _epsilon(event(noise), delta, steps, accountant, relation) <= epsilon

    plain = (accountant, relation, rows) == ("rdp", "add_or_remove_one", None)
    high = 1.0
    if not plain:  # quick to find, and near
        high = calibrate_noise(epsilon, delta, rate=rate, steps=steps, accountant="rdp", tolerance=tolerance)
    step = 2.0 if plain else 1.2
    while not keeps(high):
        high *= step
        if high > 2**20:
            raise ValueError(f"epsilon must be within reach of some noise; got {epsilon} at delta {delta}. Raise it.")
    low = high / step
    while keeps(low):
        high, low = low, low / step
    search = library().mechanism_calibration
    with _quiet():
        found = search.calibrate_dp_mechanism(
            lambda: _accountant(accountant, relation),
            lambda noise: library().dp_event.SelfComposedDpEvent(event(noise), steps),
            epsilon,
            delta,
            search.ExplicitBracketInterval(low, high),
            tol=tolerance * low,
        )
    return float(found)


def calibrate_steps(
    epsilon: float,
    delta: float,
    *,
    rate: float,
    noise_multiplier: float,
    n: int | None = None,
    rows: int | None = None,
    accountant: str = "pld",
    relation: str = "add_or_remove_one",
) -> int:
    """Return the most steps that stay within a budget.

    Args:
      epsilon: the budget, above 0.
      delta: see `epsilon`.
      rate: probability that an example takes part in a step.
      noise_multiplier: see `gaussian_event`.
      n: see `gaussian_event`.
      rows: see `gaussian_event`.
      accountant: one of `ACCOUNTANTS`.
      relation: one of `RELATIONS`.

    Returns:
      The number of steps; 0 if not even one fits.

    Raises:
      ValueError: if the budget is none, or the accountant does not know the mechanism.
      ImportError: without the extra `privacy`.
    """
    check.positive("epsilon", epsilon, "8, 3 and 1 are usual.")
    event = gaussian_event(noise_multiplier, rate=rate, n=n, rows=rows)

    def fits(steps):
        return _epsilon(event, delta, steps, accountant, relation) <= epsilon

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if high > 2**40:
            raise ValueError(f"epsilon must be reached by some number of steps; got {epsilon}, more than {high} fit.")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def of_gaussian(mu: float, delta: float) -> float:
    """Return the epsilon of telling two Gaussians apart, a distance of `mu` standard deviations from each other.

    Args:
      mu: the distance; one release with noise multiplier s has `1 / s`.
      delta: in (0, 1).

    Returns:
      Epsilon; 0 for `mu <= 0`, infinity for infinite `mu`.

    Raises:
      ImportError: without the extra `privacy`.

    References:
      Balle and Wang 2018, Improving the Gaussian mechanism for differential privacy, arXiv:1805.06530, theorem 8.
    """
    if mu <= 0:
        return 0.0
    return float(library().gaussian_mechanism.get_epsilon_gaussian(0.0 if math.isinf(mu) else 1 / mu, delta))
