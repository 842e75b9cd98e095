"""Carlini and Wagner in linf and l0: the distance of linear models, and the fewest features by enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxadv import core
from jaxadv.attacks import ATTACKS, CarliniL0, CarliniLinf, Tightening, carlini_l0, carlini_linf
from jaxadv.core import Targets
from jaxadv.threats import l0, l2, linf

KEY = jax.random.key(0)


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def linear(w, x):
    return (x - 0.5) @ w


def problem(n, b=16, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(n, classes)).astype(np.float32)
    x = rng.uniform(0.4, 0.6, (b, n)).astype(np.float32)
    return Partial(linear, jnp.asarray(w)), x, linear(w, x).argmax(-1).astype(np.int32), w


def test_the_distance_in_linf_of_a_linear_model():
    model, x, y, w = problem(8, classes=3)
    z = linear(w, x)
    gaps = z[np.arange(16), y][:, None] - z
    slopes = np.abs(w[:, y].T[:, None] - w.T[None]).sum(-1)
    want = np.where(np.arange(3) == y[:, None], np.inf, gaps / np.maximum(slopes, 1e-9)).min(-1)
    attack = carlini_linf(linf(0.9), shrink=0.95, least=1e-3, constant=0.05, rate=2e-3)
    assert isinstance(attack, CarliniLinf) and isinstance(attack, Tightening)
    labels = np.concatenate([y[:-1], (y[-1:] + 1) % 3])  # the last row is wrong from the start
    found = jax.device_get(go(attack, model, x, labels))
    assert found.success.all() and found.size[-1] == 0
    got, want = found.size[:-1], want[:-1]
    assert (got >= want - 1e-5).all() and core.feasible(linf(0.9), found.x, x).all()
    assert np.median(got / want) < 1.03 and (got < 1.1 * want + 2e-3).all()
    assert (found.queries <= attack.max_steps + 3).all() and found.queries.min() < found.queries.max()
    aimed = jax.device_get(go(attack, model, x, Targets(y, (y + 1) % 3)))
    np.testing.assert_array_equal(aimed.success, np.asarray(model(jnp.asarray(aimed.x))).argmax(-1) == (y + 1) % 3)
    far = (gaps / np.maximum(slopes, 1e-9))[np.arange(16), (y + 1) % 3]
    near = far < 0.3
    assert aimed.success[near].all() and (aimed.size >= far - 1e-5)[aimed.success].all()


def test_the_fewest_features_of_a_linear_model():
    rng = np.random.default_rng(1)
    slope = (rng.choice([-1, 1], 7) * rng.uniform(0.6, 1, 7)).astype(np.float32)
    x = (0.5 - np.sign(slope) * rng.uniform(0.05, 0.4, (16, 7))).astype(np.float32)  # one feature is not enough
    w, y = np.stack([-slope, slope], -1) / 2, np.zeros(16, np.int32)
    model = Partial(linear, jnp.asarray(w))
    gap = np.abs(linear(w, x) @ np.array([1, -1]))
    gain = -np.sort(-np.abs(slope) * np.where(slope > 0, 1 - x, x), -1)  # what a feature at its best end brings
    want = 1 + (np.cumsum(gain, -1) <= gap[:, None]).sum(-1)
    assert want.max() > 1
    found = jax.device_get(go(carlini_l0(l0(7.0), rounds=40), model, x, y))
    assert found.success.all() and (found.size >= want).all()
    assert (found.size == want).mean() > 0.6 and (found.size <= want + 1).all()  # what is frozen is never thawed
    assert isinstance(carlini_l0(l0(2.0)), CarliniL0)


def test_settings_are_checked_and_a_model_that_never_fails_gives_the_example_back():
    assert ATTACKS["carlini_linf"] is carlini_linf and ATTACKS["carlini_l0"] is carlini_l0
    for build, bad, words in (
        (carlini_linf, {"shrink": 1.0}, "shrink must lie in"),
        (carlini_linf, {"growth": 1.0}, "growth must be more than 1"),
        (carlini_linf, {"steps": 0}, "steps must be a whole number"),
        (carlini_linf, {"confidence": -1.0}, "confidence must be finite"),
        (carlini_linf, {"largest": 0.0}, "largest must be finite"),
    ):
        with pytest.raises(ValueError, match=words):
            build(linf(0.1), **bad)
    for build in (carlini_linf, carlini_l0):
        with pytest.raises(ValueError, match="norm ball"):
            build(l2(0.1))
    model, x, y, w = problem(8, classes=3)
    constant = Partial(linear, jnp.zeros_like(w))
    attack = carlini_linf(linf(0.9), shrink=0.95, least=1e-3, constant=0.05, rate=2e-3)  # the program of above
    found = jax.device_get(go(attack, constant, x, y * 0))
    assert not found.success.any() and np.isfinite(found.x).all() and (found.size == 0).all()
