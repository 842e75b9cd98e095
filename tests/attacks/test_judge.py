"""What steers a search: score, verdict, and gradients of no use."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import losses
from jaxadv.attacks.judge import dead, judge
from jaxadv.core import Targets


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
