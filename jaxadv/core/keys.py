"""Random keys that belong to examples, not to places in a batch.

`key -> crc32(attack name) -> dataset index -> restart -> step`: the randomness of an example is the same whatever
batch, order, padding, device or resumed process it is computed in.
"""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def example_keys(key, name: str, index: Int[Array, " b"], restart=0):
    """Derive one typed key for each example.

    Args:
      key: a typed key (`jax.random.key(seed)`).
      name: what the randomness is for (the attack's name); different names never share keys.
      index: `[b]` dataset index of each example.
      restart: number of the restart, a number or `[b]`.

    Returns:
      `[b]` typed keys, `fold_in(fold_in(fold_in(key, crc32(name)), index), restart)`.
    """
    named = jax.random.fold_in(key, zlib.crc32(name.encode()))
    restarts = jnp.zeros_like(index, jnp.uint32) + jnp.asarray(restart, jnp.uint32)  # laid out as the index
    return jax.vmap(lambda i, r: jax.random.fold_in(jax.random.fold_in(named, i), r))(index, restarts)


def step_keys(keys, step: Int[Array, " b"]):
    """Derive the keys of one step from the keys of the examples.

    Args:
      keys: `[b]` typed keys of the examples.
      step: `[b]` number of the step that each row is about to take.

    Returns:
      `[b]` typed keys.
    """
    return jax.vmap(jax.random.fold_in)(keys, step)
