"""Rows: features in a line, one number for each row, a choice between rows."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv.core import rows, select


def test_flat_and_wide_meet_on_the_features():
    x = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(rows.flat(jnp.asarray(x)), x.reshape(2, 12))
    scale = jnp.asarray([2.0, -1.0])
    np.testing.assert_array_equal(rows.wide(scale, jnp.asarray(x)) * x, np.stack([2 * x[0], -x[1]]))


def test_select_takes_whole_rows_of_every_leaf_keys_too():
    keys, others = jax.random.split(jax.random.key(0), 2), jax.random.split(jax.random.key(1), 2)
    mixed = select(jnp.asarray([True, False]), (jnp.ones((2, 3)), keys), (jnp.zeros((2, 3)), others))
    np.testing.assert_array_equal(mixed[0], [[1, 1, 1], [0, 0, 0]])
    assert mixed[1][0] == keys[0] and mixed[1][1] == others[1]
