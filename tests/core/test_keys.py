"""Keys belong to examples."""

import binascii

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv.core import example_keys, step_keys

KEY = jax.random.key(7)
bits = lambda keys: np.asarray(jax.random.key_data(keys))  # noqa: E731


def test_reference_derivation_by_crc32():
    index = jnp.asarray([3, 0, 2**31 - 1, 5], jnp.int32)
    for name in ("pgd", "a", "mi_fgsm", "x" * 40):
        got = bits(example_keys(KEY, name, index, restart=2))
        for row, i in zip(got, index.tolist()):
            want = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, binascii.crc32(name.encode())), i), 2)
            np.testing.assert_array_equal(row, bits(want))


def test_a_key_depends_on_index_name_and_restart_and_on_nothing_else():
    index = jnp.arange(6)
    order = np.array([4, 2, 0, 5, 1, 3])
    whole = bits(example_keys(KEY, "pgd", index))
    np.testing.assert_array_equal(bits(example_keys(KEY, "pgd", index[order])), whole[order])
    np.testing.assert_array_equal(bits(example_keys(KEY, "pgd", index[3:4])), whole[3:4])
    families = [
        whole,
        bits(example_keys(KEY, "fgsm", index)),
        bits(example_keys(KEY, "pgd", index, restart=1)),
        bits(example_keys(jax.random.key(8), "pgd", index)),
        bits(step_keys(example_keys(KEY, "pgd", index), jnp.zeros(6, jnp.int32))),
    ]
    assert len(np.unique(np.concatenate(families), axis=0)) == 30


def test_restarts_may_differ_by_row_be_traced_and_padding_has_a_key():
    index, restart = jnp.asarray([1, 1, -1]), jnp.asarray([0, 3, 0])
    got = bits(jax.jit(lambda r: example_keys(KEY, "pgd", index, r))(restart))
    np.testing.assert_array_equal(got[1], bits(example_keys(KEY, "pgd", index[:1], 3))[0])
    assert len(np.unique(got, axis=0)) == 3


def test_step_keys_fold_the_rows_own_step():
    keys = example_keys(KEY, "pgd", jnp.arange(3))
    got = step_keys(keys, jnp.asarray([0, 5, 2]))
    for i, s in enumerate((0, 5, 2)):
        np.testing.assert_array_equal(bits(got[i]), bits(jax.random.fold_in(keys[i], s)))
