"""Exact confidence intervals for accuracies.

What lives here: how far a share measured on n examples may lie from the truth. What does not: the accuracies themselves
(those are counted in `engine`). The interval is Clopper and Pearson's: it inverts the binomial test, so its coverage is
at least the stated level for every n and every true share, also at 0 and at n of n, where the normal approximation has
width zero.

| case | result |
| --- | --- |
| 0 of n | low = 0, high = 1 - (alpha/2)^(1/n) |
| n of n | low = (alpha/2)^(1/n), high = 1 |
"""

from jaxadv.core import check


def clopper_pearson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a share.

    Args:
      hits: how many of the `n` examples count, from 0 to `n`.
      n: number of examples, at least 1.
      level: confidence level in (0, 1).

    Returns:
      `(low, high)`, both in [0, 1], with `low <= hits / n <= high`.

    Raises:
      ValueError: if `n` is not at least 1, `hits` is not in [0, n], or `level` is not in (0, 1).

    >>> low, high = clopper_pearson(0, 10)
    >>> low, round(high, 6)
    (0.0, 0.308497)

    References:
      Clopper and Pearson 1934, The use of confidence or fiducial limits illustrated in the case of the binomial,
      Biometrika 26.
    """
    from scipy.stats import binomtest

    check.whole("n", n)
    check.whole("hits", hits, least=0)
    if hits > n:
        raise ValueError(f"hits must be at most n; got {hits} of {n}. Counts of another selection of the examples?")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie in (0, 1); got {level}. Pass 0.95 for 95 %.")
    interval = binomtest(int(hits), int(n)).proportion_ci(confidence_level=level, method="exact")
    return float(interval.low), float(interval.high)


def share(hits: int, n: int, level: float = 0.95) -> tuple[float, tuple[float, float]]:
    """Return an accuracy with its interval.

    Args:
      hits: how many of the `n` examples count.
      n: number of examples.
      level: confidence level in (0, 1).

    Returns:
      `(hits / n, (low, high))`.
    """
    return hits / n, clopper_pearson(hits, n, level)


def mcnemar(one: int, two: int) -> float:
    """Test whether two models differ, from the examples on which one alone is right.

    Args:
      one: examples that the first model alone gets right.
      two: examples that the second model alone gets right.

    Returns:
      The two-sided p-value of the exact (binomial) McNemar test; 1 where they never differ.

    References:
      McNemar 1947, Note on the sampling error of the difference between correlated proportions.
    """
    from scipy.stats import binomtest

    return float(binomtest(one, one + two, 0.5).pvalue) if one + two else 1.0
