"""The loop door: in the graph and from the host it is the hand-written loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import parallel
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


def test_a_loop_over_a_convolution_inside_a_checked_shard_map_is_that_outside():
    """Traced anew, its body must still know what varies over devices."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 5, 5, 1), (3, 3, 1, 1)))

    def go(x, kernel, total=lambda v: v):
        layout = ("NHWC", "HWIO", "NHWC")

        def step(v):
            return x + jnp.tanh(jax.lax.conv_general_dilated(v, kernel, (1, 1), "SAME", dimension_numbers=layout))

        return total(jnp.sum(loop(step, x, 2)))

    rows, same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mesh = parallel.make_mesh(4)
    each = jax.shard_map(
        lambda x, kernel: go(x, kernel, lambda v: jax.lax.psum(v, "data")),
        mesh=mesh,
        in_specs=(rows, same),
        out_specs=same,
    )
    np.testing.assert_allclose(jax.jit(each)(x, kernel), jax.jit(go)(x, kernel), rtol=1e-5)


@pytest.mark.parametrize("n", [-1, 1.5, True])
def test_counts_must_be_whole(n):
    with pytest.raises(
        Exception, match=r"n must be a whole number of at least 0; got|violates type hint|parameter 'n'"
    ):
        loop(step, start(), n)
