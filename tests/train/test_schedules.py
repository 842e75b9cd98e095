"""Schedules against values computed by hand and against numpy."""

import numpy as np
import optax
import pytest

from jaxadv.train import SCHEDULES, schedules


def values(schedule, steps):
    return np.asarray([float(schedule(t)) for t in range(steps + 1)])


@pytest.mark.parametrize("peak", [0.0, 0.4, 0.5, 1.0])
def test_triangular_is_linear_interpolation(peak):
    got = values(schedules.triangular(0.2, 50, peak=peak), 50)
    want = np.interp(np.arange(51) / 50, [0, peak, 1], [0, 0.2, 0])
    if peak == 0:
        want = np.interp(np.arange(51) / 50, [0, 1], [0.2, 0])
    if peak == 1:
        want = np.interp(np.arange(51) / 50, [0, 1], [0, 0.2])
    np.testing.assert_allclose(got, want, atol=1e-7)


def test_piecewise_drops_at_the_stated_steps():
    got = values(schedules.piecewise(0.1, 200), 200)
    np.testing.assert_allclose(got, [0.1] * 100 + [0.01] * 50 + [0.001] * 51, rtol=1e-6)
    moved = values(schedules.piecewise(1.0, 10, drops=[(0.3, 0.5)]), 10)
    np.testing.assert_allclose(moved, [1.0] * 3 + [0.5] * 8, rtol=1e-6)


def test_cosine_is_half_a_cosine_after_a_linear_rise():
    plain = values(schedules.cosine(0.4, 20), 20)
    np.testing.assert_allclose(plain, 0.2 * (1 + np.cos(np.pi * np.arange(21) / 20)), atol=1e-7)
    warm = values(schedules.cosine(0.4, 20, warmup=0.25), 20)
    np.testing.assert_allclose(warm[:6], 0.4 * np.arange(6) / 5, atol=1e-7)
    np.testing.assert_allclose(warm[5:], 0.2 * (1 + np.cos(np.pi * np.arange(16) / 15)), atol=1e-7)


def test_constant_and_the_table():
    assert values(schedules.constant(0.3), 3).tolist() == pytest.approx([0.3] * 4)
    assert sorted(SCHEDULES) == ["constant", "cosine", "piecewise", "triangular"]
    for build in SCHEDULES.values():
        optax.sgd(build(0.1, 10)).init({"w": np.zeros(2, np.float32)})


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: schedules.triangular(0.1, 10, peak=4.0), "peak must be a fraction"),
        (lambda: schedules.triangular(0.0, 10), "lr_max must be finite and greater than 0"),
        (lambda: schedules.triangular(0.1, 0), "steps must be a whole number"),
        (lambda: schedules.piecewise(0.1, 10, drops=[(100.0, 0.1)]), "place of a drop must be a fraction"),
        (lambda: schedules.cosine(0.1, 10, warmup=1.0), "warmup must leave steps"),
    ],
)
def test_impossible_schedules_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_growth_rises_to_one_and_stays():
    rise = schedules.growth(4)
    np.testing.assert_allclose([rise(t) for t in range(6)], [0.25, 0.5, 0.75, 1, 1, 1])
    np.testing.assert_allclose(rise(np.arange(3)), [0.25, 0.5, 0.75])
    with pytest.raises(ValueError, match="steps must be"):
        schedules.growth(0)
