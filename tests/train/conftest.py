"""Small networks and data for the tests of training, handed out as the fixture `kit`."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import data, models
from jaxadv.core import Trainable


def linear_apply(params, state, x, *, bn="eval", key=None, **_):
    """Two classes, logits (0, w . x + b)."""
    score = x.reshape(x.shape[0], -1) @ params["w"] + params["b"]
    return jnp.stack([jnp.zeros_like(score), score], -1), state


def linear(seed=0, features=5):
    rng = np.random.default_rng(seed)
    return Trainable(
        linear_apply, {"w": jnp.asarray(rng.normal(size=features), jnp.float32), "b": jnp.float32(0.3)}, {}
    )


def rows(n=8, features=5, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, size=(n, features)).astype(np.float32)
    return {
        "x": jnp.asarray(x),
        "y": jnp.asarray(rng.integers(0, 2, n), jnp.int32),
        "index": jnp.arange(n, dtype=jnp.int32),
        "mask": jnp.ones(n, bool),
    }


def blobs(n=96, side=4, classes=3, seed=0):
    """Images whose class shows in their mean; enough to train on in a second."""
    rng = np.random.default_rng(seed)
    y = np.arange(n, dtype=np.int32) % classes
    x = np.clip(rng.normal(0.15 + 0.35 * y[:, None, None, None], 0.1, (n, side, side, 1)), 0, 1).astype(np.float32)
    return data.arrays(x, y, classes=classes, name="blobs")


def mlp(norm="none", seed=0, classes=3, side=4, widths=(16,)):
    key = jax.random.key(seed)
    return models.create("mlp", key, shape=(side, side, 1), classes=classes, widths=widths, norm=norm)


def leaves(tree):
    """Every leaf as numpy, typed keys as their data."""
    out = []
    for leaf in jax.tree.leaves(tree):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        out.append(np.asarray(jax.random.key_data(leaf) if is_key else leaf))
    return out


def same_bits(a, b):
    first, second = leaves(a), leaves(b)
    return len(first) == len(second) and all(
        u.dtype == v.dtype and u.shape == v.shape and u.tobytes() == v.tobytes() for u, v in zip(first, second)
    )


def quiet(records):
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "waiting")} for line in records]


@pytest.fixture(scope="session")
def kit():
    """The functions of this file."""
    return SimpleNamespace(
        linear=linear, rows=rows, blobs=blobs, mlp=mlp, leaves=leaves, same_bits=same_bits, quiet=quiet
    )
