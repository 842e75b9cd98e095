"""Networks for these tests: the stored ones of PyTorch (`benchmarks/parity/models.py`), and ones filled by numpy."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import models

FIXTURE = Path(__file__).resolve().parent.parent / "fixtures" / "models_torch.npz"


@pytest.fixture(scope="session")
def stored():
    """All arrays of the fixture by name."""
    with np.load(FIXTURE) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture
def torch_case(stored):
    """A function from a case's name to its spec and state dict, without what the variant does not have."""

    def case(name):
        spec = json.loads(str(stored[f"{name}/spec"]))
        home = f"weights/{json.loads(str(stored[f'{name}/weights']))}/"
        arrays = {k.removeprefix(home): v for k, v in stored.items() if k.startswith(home)}
        if not spec["options"].get("final_norm", True):
            arrays = {k: v for k, v in arrays.items() if not k.startswith("bn.")}
        return spec, arrays

    return case


@pytest.fixture
def filled():
    """A function that builds a network with weights from numpy: nothing to compile, no value left at 0 or 1."""

    def fill(name, shape=(8, 8, 1), seed=0, classes=3, **options):
        rng = np.random.default_rng(seed)

        def leaf(path, like):
            if path[-1].key in ("scale", "var"):
                return jnp.asarray(rng.uniform(0.5, 1.5, like.shape), like.dtype)
            bound = 1 / math.sqrt(math.prod(like.shape[:-1])) if like.ndim > 1 else 0.2
            return jnp.asarray(rng.uniform(-bound, bound, like.shape), like.dtype)

        def make(key):
            return models.create(name, key, shape=shape, classes=classes, **options)

        net = jax.eval_shape(make, jax.random.key(0))
        params, state = jax.tree_util.tree_map_with_path(leaf, (net.params, net.state))
        return net._replace(params=params, state=state)

    return fill
