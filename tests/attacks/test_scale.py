"""An attack at another budget is the attack that would have been built for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxadv import attacks, threats


def linear(w, x):
    return x.reshape(x.shape[0], -1) @ w


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    x = jnp.asarray(rng.uniform(0.3, 0.7, (4, 6)), jnp.float32)
    return Partial(linear, w), x, jnp.argmax(x @ w, -1).astype(jnp.int32)


def test_twice_the_budget(problem, key):
    model, x, y = problem
    got = attacks.scaled(attacks.pgd(threats.linf(0.05), steps=5), 2.0)
    want = attacks.pgd(threats.linf(0.1), steps=5)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    np.testing.assert_allclose(got.run(key, model, x, y).x, want.run(key, model, x, y).x, atol=1e-6)


def test_a_budget_for_each_example(problem, key):
    model, x, y = problem
    attack = attacks.pgd(threats.l2(0.2), steps=5, step_size=0.1, start="zero")
    found = jax.jit(lambda f: attacks.scaled(attack, f).run(key, model, x, y))(jnp.asarray([0.25, 0.5, 1.0, 0.5]))
    np.testing.assert_allclose(found.size, [0.05, 0.1, 0.2, 0.1], rtol=1e-4)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_factors_that_leave_no_budget(factor):
    with pytest.raises(ValueError, match="factor must be finite and greater than 0"):
        attacks.scaled(attacks.fgsm(threats.linf(0.1)), factor)
