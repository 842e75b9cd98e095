"""The stored networks of PyTorch, made by `benchmarks/parity/models.py`."""

import json
from pathlib import Path

import numpy as np
import pytest

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
