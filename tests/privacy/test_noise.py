import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxadv import parallel
from jaxadv.privacy import NOISES, Gaussian, add_noise, banded

TREE = {"a": jnp.zeros((300, 40)), "b": jnp.ones(5000), "c": jnp.zeros((), jnp.bfloat16)}


def test_the_variance_is_the_one_asked_for_and_leaves_are_independent(key):
    draw = jax.jit(add_noise)
    noisy = draw(key, TREE, 2.5)
    a, b = np.asarray(noisy["a"]).ravel(), np.asarray(noisy["b"]) - 1
    for sample in (a, b):
        assert abs(sample.mean()) < 5 * 2.5 / np.sqrt(len(sample))
        assert abs(sample.std() / 2.5 - 1) < 5 / np.sqrt(2 * len(sample))
    assert abs(np.corrcoef(a[:5000], b)[0, 1]) < 5 / np.sqrt(5000)
    assert noisy["c"].dtype == jnp.float32  # rounding to bfloat16 would not be the accounted mechanism
    np.testing.assert_array_equal(draw(key, {"b": TREE["b"]}, 2.5)["b"], noisy["b"])  # other leaves do not matter
    np.testing.assert_array_equal(draw(key, TREE, 0.0)["b"], TREE["b"])


def test_a_stage_draws_anew_at_each_update_and_repeats_after_a_resume(key):
    stage = Gaussian()(1.0, key)
    zeros = {"a": jnp.zeros(4000)}
    state, seen, update = stage.init(zeros), [], jax.jit(stage.update)
    for _ in range(3):
        before = state
        noisy, state = update(zeros, state)
        seen.append(np.asarray(noisy["a"]))
    assert abs(np.corrcoef(seen) - np.eye(3)).max() < 5 / np.sqrt(4000)
    np.testing.assert_array_equal(update(zeros, before)[0]["a"], seen[2])  # same key, same counter: same bits
    assert int(state.count) == 3 and Gaussian().bands == 1 and NOISES["gaussian"]() == Gaussian()


@pytest.mark.parametrize("how", ["jit", "shard_map", "vmap"])
def test_one_draw_for_all_devices(how, key):
    """Every executor adds the noise of one device, once, whatever the number of devices."""
    stage = Gaussian()(1.0, key)
    chain = optax.chain(stage, optax.identity())

    def step(state, batch, *, axis_name=None):
        total = parallel.psum(jax.tree.map(lambda a: a.sum(0), batch), axis_name)
        noisy, state = chain.update(total, state)
        return state, noisy

    batch = {"w": jnp.ones((16, 50))}
    run = parallel.compile_step(step, how=how, mesh=parallel.make_mesh(8), donate=False)
    _, noisy = run(chain.init({"w": jnp.zeros(50)}), batch)
    alone, _ = stage.update({"w": jnp.full(50, 16.0)}, stage.init(None))
    np.testing.assert_allclose(noisy["w"], alone["w"], rtol=1e-6)


def test_parts_of_a_parameter_draw_their_own_noise(key):
    mesh = parallel.make_mesh(8)
    parts = PartitionSpec("data")

    @partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), parts), out_specs=parts)
    def drawn(key, leaf):
        return add_noise(key, leaf, 1.0, axis_name="data")

    out = np.asarray(jax.jit(drawn)(key, jnp.zeros(8 * 500))).reshape(8, 500)
    assert abs(np.corrcoef(out) - np.eye(8)).max() < 5 / np.sqrt(500) and abs(out.std() - 1) < 0.06
    whole = jax.device_put(jnp.zeros(4000), NamedSharding(mesh, parts))  # under jit one draw is shared out
    np.testing.assert_allclose(
        jax.jit(partial(add_noise, std=1.0))(key, whole), add_noise(key, jnp.zeros(4000), 1.0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("coefficients", [3, [1.0, -0.4]])
def test_correlated_noise_has_the_covariance_of_its_matrix(coefficients, key):
    steps, n, std = 8, 20_000, 0.7
    stage = banded(coefficients, steps)
    first = np.zeros(steps)
    first[: stage.bands] = stage.coefficients
    strategy = np.array([[first[i - j] if i >= j else 0 for j in range(steps)] for i in range(steps)])
    strategy /= np.linalg.norm(strategy, axis=0)  # columns of norm 1: the sensitivity of one participation
    made = stage(std, key)
    zeros = jnp.zeros(n)
    _, noise = jax.lax.scan(lambda s, _: made.update(zeros, s)[::-1], made.init(zeros), None, steps)
    inverse = np.linalg.inv(strategy)
    expected = std**2 * inverse @ inverse.T
    spread = np.sqrt(expected**2 + np.outer(np.diag(expected), np.diag(expected)))
    assert (abs(np.cov(np.asarray(noise)) - expected) < 5 * spread / np.sqrt(n)).all()
    assert stage == NOISES["banded"](coefficients, steps)


def test_bands_of_the_square_root_of_prefix_sums():
    made = np.array(banded(4, 9).coefficients)
    np.testing.assert_allclose(made / made[0], [1, 1 / 2, 3 / 8, 5 / 16], rtol=1e-12)
    assert np.linalg.norm(made) == pytest.approx(1)


def test_refusals(monkeypatch, key):
    for coefficients in ([], [0.0, 1.0], [1.0, 0.5, 0.2]):
        with pytest.raises(ValueError, match="coefficients must be"):
            banded(coefficients, 2)
    monkeypatch.setitem(sys.modules, "jax_privacy", None)
    with pytest.raises(ImportError, match=r"jax-privacy.*jaxadv\[privacy\]"):
        banded(2, 4)(1.0, key)
