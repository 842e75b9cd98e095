"""The two verdicts: allowed, and robust."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv.core import Targets, edges, feasible, is_labels, label_of, robust, tolerance
from jaxadv.threats import l0, l1, l2, linf

UNIT = 2.0**-24


@pytest.mark.parametrize(("make", "power", "spread"), [(linf, np.inf, 1), (l2, 2, 3), (l1, 1, 9), (l0, 0, 0)])
def test_tolerance_is_one_rounding_in_each_coordinate(make, power, spread):
    assert tolerance(make(1.0, (-3.0, 2.0)), 9, power) == spread * UNIT * 3
    assert tolerance(make(1.0), 9, power) == spread * UNIT


@pytest.mark.parametrize("make", [linf, l2, l1])
def test_the_verdict_is_float64_and_sharp(make):
    threat, x = make(0.25), np.full((3, 4), 0.5)
    limit = 0.25 + tolerance(threat, 4, threat.p)
    point = x.copy()
    point[:, 0] += np.array([limit - 1e-12, limit + 1e-12, 0.0])
    np.testing.assert_array_equal(feasible(threat, point, x), [True, False, True])
    large = np.full((1, 10_000), np.float32(0.5))
    moved = large + np.float32(1e-4)
    total = (moved.astype(float) - large).sum()
    assert feasible(l1(total), moved, large).all() and not feasible(l1(total * 0.999), moved, large).any()


def test_the_box_is_exact_and_points_must_be_finite():
    x = np.full((5, 2), 0.5, np.float32)
    point = x.copy()
    point[0, 0], point[1, 0], point[2, 0] = np.nextafter(np.float32(1), np.float32(2)), -1e-30, 1.0
    point[3, 1], point[4, 1] = np.nan, np.inf
    np.testing.assert_array_equal(feasible(linf(0.6), point, x), [False, False, True, False, False])
    traced = jax.jit(lambda p: feasible(linf(0.6), p, jnp.asarray(x)))(point)
    np.testing.assert_array_equal(np.asarray(traced)[[0, 2, 3, 4]], [False, True, False, False])


def test_eps_and_bounds_of_each_row():
    x = np.full((2, 2), 0.5, np.float32)
    point = x + np.float32(0.2)
    np.testing.assert_array_equal(feasible(linf(np.array([0.1, 0.3])), point, x), [False, True])
    low, high = edges((np.zeros(2), np.array([1.0, 0.6])), x, np)
    assert low.shape == high.shape == (1, 2)
    assert not feasible(linf(0.3, (np.zeros(2), np.array([1.0, 0.6]))), point, x).any()


def test_robust_needs_finite_logits_and_the_first_largest():
    z = jnp.asarray([[1, 1, 0], [0, 1, 1], [np.nan, 1, 0], [0, np.inf, 0], [0, 0, 2], [0, 2, -np.inf]], jnp.float32)
    y = jnp.asarray([0, 2, 1, 1, 2, 1])
    np.testing.assert_array_equal(robust(z, y), [True, False, False, False, True, False])
    aim = Targets(label=y, target=jnp.asarray([1, 1, 2, 2, 2, 0]))
    np.testing.assert_array_equal(robust(z, aim), [True, False, False, False, False, False])


def test_what_counts_as_labels():
    y = jnp.arange(3)
    aim = Targets(label=y, target=y + 1)
    assert is_labels(y) and is_labels(aim) and label_of(aim) is y and label_of(y) is y
    assert not is_labels(jnp.zeros(3)) and not is_labels(jnp.zeros((3, 2), jnp.int32)) and not is_labels(None)
    assert dataclasses.is_dataclass(linf(0.1))
