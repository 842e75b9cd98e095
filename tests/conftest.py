"""Test-wide settings: eight CPU devices, shape and type checks on, implicit promotion of ranks refused."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

_HOOK = install_import_hook("jaxadv", "beartype.beartype")  # wraps every module of the package as it is imported

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
    """A typed key; tests that need several split it."""
    return jax.random.key(0)


@pytest.fixture
def data_root():
    """The folder of real data, or a skip that says what is missing."""
    root = os.environ.get("JAXADV_DATA")
    if not root:
        pytest.skip("needs real data: set JAXADV_DATA to a folder with mnist/ and cifar10_jpeg/")
    return root
