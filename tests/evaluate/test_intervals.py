import numpy as np
import pytest
from scipy.stats import beta, binom, binomtest

from jaxadv.evaluate import clopper_pearson, intervals
from jaxadv.evaluate.intervals import share


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 10), (10, 10), (3, 10), (500, 1000), (9876, 10000)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_the_interval_is_the_quantiles_of_the_beta_law(hits, n, level):
    low, high = clopper_pearson(hits, n, level)
    tail = (1 - level) / 2
    assert low == pytest.approx(0.0 if hits == 0 else beta.ppf(tail, hits, n - hits + 1), abs=1e-9)
    assert high == pytest.approx(1.0 if hits == n else beta.ppf(1 - tail, hits + 1, n - hits), abs=1e-9)
    other = binomtest(hits, n).proportion_ci(level, method="exact")
    assert (low, high) == (other.low, other.high)


def test_the_ends_invert_the_binomial_test():
    low, high = clopper_pearson(7, 20)
    assert binom.sf(6, 20, low) == pytest.approx(0.025, abs=1e-8)
    assert binom.cdf(7, 20, high) == pytest.approx(0.025, abs=1e-8)


def test_none_and_all_have_closed_forms():
    assert clopper_pearson(0, 50) == (0.0, pytest.approx(1 - 0.025 ** (1 / 50)))
    assert clopper_pearson(50, 50) == (pytest.approx(0.025 ** (1 / 50)), 1.0)


def test_known_values_from_the_literature():
    # Agresti and Coull 1998 discuss 0 of 25: the exact interval ends at 0.137
    assert clopper_pearson(0, 25)[1] == pytest.approx(0.1372, abs=5e-5)
    assert np.diff(clopper_pearson(500, 1000))[0] == pytest.approx(0.0629, abs=5e-4)


def test_a_share_comes_with_its_interval():
    assert share(3, 4) == (0.75, clopper_pearson(3, 4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1, 0), "n must be"),
        ((-1, 3), "hits must be"),
        ((4, 3), "at most n"),
        ((1, 3, 1.0), "level"),
        ((0.5, 3), "hits"),
    ],
)
def test_impossible_counts_are_refused(arguments, words):
    with pytest.raises((ValueError, TypeError), match=words if arguments != (0.5, 3) else None):
        clopper_pearson(*arguments)


def test_mcnemar_is_the_binomial_test():
    assert intervals.mcnemar(0, 0) == 1.0
    assert intervals.mcnemar(3, 3) == 1.0
    assert intervals.mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert intervals.mcnemar(1, 7) == intervals.mcnemar(7, 1) == pytest.approx(2 * (1 + 8) / 2**8)
