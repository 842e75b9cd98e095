"""The loop door: in the graph and from the host it is the hand-written loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv.core import loop


def step(s):
    return {"i": s["i"] + 1, "v": jnp.cos(s["v"]) + 0.1 * s["i"][:, None]}


def start():
    return {"i": jnp.zeros(3, jnp.int32), "v": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)}


def slow(s):
    return s["i"] >= jnp.asarray([2, 4, 3])


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("until", [None, slow])
@pytest.mark.parametrize("host", [False, True])
def test_loop_is_the_hand_loop(n, until, host):
    want = start()
    for _ in range(n):
        if until is not None and bool(until(want).all()):
            break
        want = step(want)
    got = loop(step, start(), n, until=until, host=host)
    np.testing.assert_array_equal(got["i"], want["i"])
    np.testing.assert_allclose(got["v"], want["v"], atol=1e-6)
    assert int(got["i"][0]) == (min(n, 4) if until else n)


def test_a_loop_is_differentiable_under_jit():
    def end(v, n=4):
        return loop(lambda s: jnp.sin(s) * 1.5, v, n).sum()

    v = jnp.float32([0.3, -0.8])
    want = jax.grad(lambda v: (lambda f: f(f(f(f(v)))))(lambda s: jnp.sin(s) * 1.5).sum())(v)
    np.testing.assert_allclose(jax.jit(jax.grad(end))(v), want, rtol=1e-5)


@pytest.mark.parametrize("n", [-1, 1.5, True])
def test_counts_must_be_whole(n):
    with pytest.raises(
        Exception, match=r"n must be a whole number of at least 0; got|violates type hint|parameter 'n'"
    ):
        loop(step, start(), n)
