"""Logits and input gradients of both ODE networks against torchdiffeq, on equal weights and grids."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxadv import continuous, losses, models
from jaxadv.continuous import SolveCfg
from jaxadv.models.adapt import flatten, unflatten

FIXTURE = np.load(Path(__file__).parent.parent / "fixtures" / "ode_torchdiffeq.npz")
FIXED = ("euler", "midpoint", "rk38")


def loaded(name):
    spec = json.loads(str(FIXTURE[f"{name}/spec"]))
    net = models.from_spec(spec, jax.random.key(0), nets=continuous.NETS)
    start = f"{name}/weights/"
    given = {tuple(key[len(start) :].split(".")): FIXTURE[key] for key in FIXTURE.files if key.startswith(start)}
    own = flatten(net.params)
    assert {path: leaf.shape for path, leaf in given.items()} == {path: leaf.shape for path, leaf in own.items()}
    return continuous.ode_model(net._replace(params=unflatten(given))), FIXTURE[f"{name}/x"], FIXTURE[f"{name}/y"]


def answers(model, x, y, cfgs):
    """Logits and gradients under each configuration, from one program."""

    def one(cfg):
        solved = continuous.with_cfg(model, cfg)

        def total(x):
            logits = solved(x)
            return losses.cross_entropy(logits, y).sum(), logits

        grad, logits = jax.grad(total, has_aux=True)(x)
        return logits, grad

    return jax.jit(lambda: {name: one(cfg) for name, cfg in cfgs.items()})()


@pytest.mark.parametrize("name", ["odenet_mnist", "odenet_tis"])
def test_fixed_grids_are_those_of_torchdiffeq(name):
    model, x, y = loaded(name)
    found = answers(model, x, y, {method: SolveCfg(method, "fixed", n_steps=4) for method in FIXED})
    for method, (logits, grad) in found.items():
        np.testing.assert_allclose(logits, FIXTURE[f"{name}/{method}/logits"], atol=2e-5, err_msg=method)
        want = FIXTURE[f"{name}/{method}/grad"]
        np.testing.assert_allclose(grad, want, atol=2e-4 * np.abs(want).max(), err_msg=method)


@pytest.mark.slow
def test_adaptive_steps_of_a_whole_batch_agree_within_the_tolerance():
    """Grids differ (first step, step control), so gradients through a field with kinks agree in direction only."""
    model, x, y = loaded("odenet_tis")
    cfg = SolveCfg("dopri5", rtol=1e-4, atol=1e-4, batching="joint")
    ((logits, grad),) = answers(model, x, y, {"dopri5": cfg}).values()
    np.testing.assert_allclose(logits, FIXTURE["odenet_tis/dopri5/logits"], atol=1e-3)
    want = FIXTURE["odenet_tis/dopri5/grad"]
    assert (grad * want).sum() > 0.97 * np.linalg.norm(grad) * np.linalg.norm(want)
