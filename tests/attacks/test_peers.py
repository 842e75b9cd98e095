"""Beside ART, torchattacks and adv-lib: the same weights, the same examples, budgets that are equal on both sides."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks.parity import autoattack as parity
from jaxadv.attacks import Affine, carlini, ddn, ead, jsma, universal, worst_of
from jaxadv.core import Targets
from jaxadv.threats import behind, l0, l1, l2, linf, semantic

FIXTURES = Path(__file__).parents[1] / "fixtures"
NET = "mnist_standard"
SEEDS, PASSES, SHARE = 3, 3, 0.98

pytestmark = pytest.mark.slow


@jax.jit
def go(attack, model, x, y):
    return attack.run(jax.random.key(0), model, x, y)


def stored():
    """The model, the examples, and what others have found."""
    arrays, found = np.load(FIXTURES / f"autoattack_{NET}.npz"), np.load(FIXTURES / "peers_torch.npz")
    theirs = {k.split("/", 1)[1]: found[k] for k in found if k.startswith(f"{NET}/")}
    return parity.forward(arrays, NET), found["x"].astype(np.float32) / 255, found["y"], theirs


def test_turns_and_shifts_fool_as_many_as_those_of_art():
    """At ART's grid, which shifts first; it tells what fools most examples at once, ours what is worst for each."""
    affine = Affine(20.0, 2.0)
    k, angle = (v.ravel() for v in np.meshgrid([-2, 0, 2], np.linspace(-20, 20, 5), indexing="ij"))
    listed = np.stack([angle, -k * np.sin(np.radians(angle)), k * np.cos(np.radians(angle))], axis=1)
    threat = semantic(affine, (28, 28, 1))
    every = jax.jit(lambda model, x: lax.map(lambda v: model(affine(x, jnp.tile(v[None], (len(x), 1)))), listed))
    model, x, y, theirs = stored()
    fooled = np.asarray(every(model, x)).argmax(-1) != y
    worst = go(worst_of(threat, listed), behind(threat, model), np.asarray(threat.pack(x)), y)
    np.testing.assert_array_equal(worst.success, fooled.any(0))
    linear, cubic = theirs["spatial/linear"], theirs["spatial/cubic"]
    assert (fooled == linear).mean() > 0.99  # the same arithmetic, but for the outermost pixels
    for other in (linear, cubic):
        assert fooled.any(0).mean() >= SHARE * other.any(0).mean()
        assert fooled.mean(1).max() >= SHARE * other.mean(1).max() > 0


def test_a_universal_perturbation_fools_as_many_as_that_of_art():
    """Mean over seeds, after as many passes with DeepFool of as many steps."""
    model, x, y, theirs = stored()
    search = universal(linf(float(theirs["universal/linf/eps"])), epochs=PASSES, goal=1.0, steps=10)
    run = jax.jit(lambda key, search, model, x, y: search.run(key, model, x, y).rate)
    ours = [run(jax.random.key(seed), search, model, x, y) for seed in range(SEEDS)]
    assert np.mean(ours) >= SHARE * theirs["universal/linf"].mean() > 0


ELASTIC: dict = {"steps": 100, "rounds": 6, "constant": 0.1, "beta": 0.01, "abort": False}
NEAREST = {  # attack, how many examples
    "jsma/l0": (jsma(l0(784.0), steps=40), 25),
    "ddn/l2": (ddn(l2(1e3), steps=100), 50),
    "carlini/l2": (carlini(l2(1e3), steps=100, rounds=1, constant=10.0, abort=False), 50),
    "ead/l1": (ead(l1(1e3), **ELASTIC), 50),
    "ead/en": (ead(l1(1e3), rule="en", **ELASTIC), 50),
}


@pytest.mark.parametrize("search", NEAREST)
def test_distances_are_those_of_torchattacks_and_adv_lib_or_smaller(search):
    """As many are found, and the median of those that the other has found is no larger."""
    attack, rows = NEAREST[search]
    model, x, y, found = stored()
    x, y, theirs = x[:rows], y[:rows], np.sort(found[search][:rows])
    got = go(attack, model, x, Targets(y, (y + 1) % 10) if search == "jsma/l0" else y)
    move = np.asarray(got.x - x).reshape(rows, -1)
    size = got.size if search != "ead/en" else (move**2).sum(1) + ELASTIC["beta"] * np.abs(move).sum(1)
    ours, count = np.sort(np.where(got.success, size, np.inf)), np.isfinite(theirs).sum()
    assert count > 10 and np.isfinite(ours).sum() >= SHARE * count
    assert ours[count // 2] <= 1.02 * theirs[count // 2]
