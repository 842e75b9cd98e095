"""A model that is a host function: the same answers, everywhere where a model is asked, and no gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import core, models
from jaxadv.attacks import pgd, square
from jaxadv.threats import linf

KEY = jax.random.key(0)


class Service:
    """A linear classifier on the host that counts the rows it was asked."""

    def __init__(self, seed=0, n=12, classes=3):
        self.w = np.random.default_rng(seed).normal(size=(n, classes)).astype(np.float32)
        self.rows = 0

    def __call__(self, x):
        assert isinstance(x, np.ndarray)
        self.rows += len(x)
        return x.reshape(len(x), -1) @ self.w


def data(service, b=6, n=12):
    x = np.random.default_rng(1).uniform(0.2, 0.8, (b, n)).astype(np.float32)
    return x, (x @ service.w).argmax(-1).astype(np.int32)


def test_it_answers_under_jit_vmap_and_loops_and_counts_what_it_was_asked():
    service = Service()
    x, _ = data(service)
    model = models.black_box(service, 3)
    np.testing.assert_allclose(model(x), x @ service.w, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(model, x), x @ service.w, rtol=1e-6)
    assert service.rows == 12
    np.testing.assert_allclose(jax.vmap(model)(x.reshape(3, 2, 12)), (x @ service.w).reshape(3, 2, 3), rtol=1e-6)
    last = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, z: model(x) + 0 * z, jnp.zeros((6, 3))))(x)
    np.testing.assert_allclose(last, x @ service.w, rtol=1e-6)
    assert model(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_square_runs_on_it_in_one_batch_and_from_slots_and_tells_its_queries():
    service = Service()
    x, y = data(service)
    x = x.reshape(6, 2, 6, 1)
    attack, model = square(linf(0.02), queries=7, early=False), models.black_box(service, 3)
    found = jax.jit(lambda x, y: attack.run(KEY, model, x, y))(x, y)
    jax.block_until_ready(found)
    assert service.rows == found.queries.sum() == 6 * 9
    served = core.serve(attack, KEY, model, x, y, slots=3)
    np.testing.assert_allclose(served.x, found.x, atol=1e-6)


def test_a_gradient_is_refused_and_so_are_wrong_functions():
    service = Service()
    x, y = data(service)
    model = models.black_box(service, 3)
    with pytest.raises(TypeError, match="no gradient|has none.*estimated"):
        pgd(linf(0.1), steps=2).run(KEY, model, x, y)
    with pytest.raises(TypeError, match="fn must be callable.*Arguments swapped"):
        models.black_box(3, 3)
    with pytest.raises(ValueError, match="classes must be"):
        models.black_box(service, 1)
    with pytest.raises(Exception, match="must return logits of shape"):
        jax.block_until_ready(models.black_box(service, 4)(x))
