"""What steers a search: score, verdict, and gradients of no use."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import losses
from jaxadv.attacks import pgd, square
from jaxadv.attacks.judge import Stepped, better, dead, judge
from jaxadv.core import Targets
from jaxadv.threats import linf


def test_scores_fall_toward_failing_and_what_is_not_finite_fails():
    logits = jnp.asarray([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [jnp.nan, 0.0, 0.0], [5.0, -jnp.inf, 0.0]])
    score, fails, finite = judge(logits, jnp.zeros(4, jnp.int32))
    np.testing.assert_array_equal(score, [1.0, -3.0, -jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(fails, [False, True, True, True])
    np.testing.assert_array_equal(finite, [True, True, False, False])


def test_targets_and_other_criteria():
    logits = jnp.asarray([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    y = Targets(label=jnp.zeros(2, jnp.int32), target=jnp.asarray([2, 2]))
    score, fails, _ = judge(logits, y)
    np.testing.assert_array_equal(score, losses.margin(logits, y))
    np.testing.assert_array_equal(fails, [False, False])
    score, fails, _ = judge(logits, jnp.ones((2, 3)), lambda logits, y: jnp.sum(logits * y, -1))
    np.testing.assert_array_equal(score, [3.0, 4.0])
    assert not np.any(fails)
    with pytest.raises(ValueError, match="logits"):
        judge(logits[0], jnp.zeros(3, jnp.int32))


def test_a_gradient_is_dead_where_no_entry_is_finite_and_not_zero():
    grad = jnp.asarray([[[0.0, 0.0]], [[jnp.nan, 0.0]], [[jnp.inf, 1.0]], [[0.0, -1e-30]]])
    np.testing.assert_array_equal(dead(grad), [True, True, False, False])


def test_failing_comes_before_a_low_score_and_what_fails_may_stay():
    new, old = np.array([1.0, 1.0, -1.0, -2.0, 2.0, -1.0]), np.array([0.0, 2.0, 5.0, -1.0, 1.0, -2.0])
    fails, known = np.array([0, 0, 1, 1, 0, 1], bool), np.array([0, 0, 0, 1, 1, 1], bool)
    rows = [jnp.asarray(v) for v in (new, fails, old, known)]
    np.testing.assert_array_equal(better(*rows), [False, True, True, True, False, False])
    np.testing.assert_array_equal(better(*rows, stop=True), [False, True, True, False, False, False])


def test_a_row_ends_after_its_steps_or_where_it_breaks():
    class Seen(NamedTuple):
        step: jnp.ndarray
        broken: jnp.ndarray

    state = Seen(jnp.array([3, 4, 3]), jnp.array([True, False, False]))
    for early, want in ((True, [True, True, False]), (False, [False, True, False])):
        attack = pgd(linf(0.1), steps=4, early=early)
        assert isinstance(attack, Stepped) and isinstance(square(linf(0.1)), Stepped)
        np.testing.assert_array_equal(attack.done(state), want)
