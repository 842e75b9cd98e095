"""Free training: the hand loop, its first step, every executor, accumulation, exact resume in the midst of a replay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, losses, parallel, threats, train
from jaxadv.train import trainer

EPS = 0.1


def images(n=8, seed=0, padded=0):
    rng = np.random.default_rng(seed)
    x, mask = rng.uniform(size=(n, 4, 4, 1)).astype(np.float32), np.arange(n) < n - padded
    return {"x": x, "y": np.arange(n, dtype=np.int32) % 3, "index": np.arange(n, dtype=np.int32), "mask": mask}


def objective(threat):
    return train.pgd_at(attacks.fgsm(threat))


def test_three_steps_are_those_of_the_hand_loop(kit, key):
    """Weights move at the old perturbation, perturbations by the old weights; a new minibatch inherits them."""
    net, threat, sgd = kit.mlp(), threats.linf(EPS), optax.sgd(0.5)
    step = jax.jit(train.make_step(net.apply, objective(threat), sgd, gradient=train.free(threat, alpha=0.07)))
    state = trainer.init(key, net, sgd, carry=jnp.zeros((8, 4, 4, 1)))
    params, delta = net.params, np.zeros((8, 4, 4, 1), np.float32)

    @jax.jit
    def both(params, found, y):
        def loss(params, found):
            return losses.cross_entropy(net.apply(params, net.state, found)[0], y).sum()

        return jax.grad(loss, (0, 1))(params, found)

    first, second = images(), images(seed=1)
    for batch in (first, first, second):
        x = batch["x"]
        found = np.clip(x + np.clip(delta, -EPS, EPS), 0, 1)
        slope, rise = both(params, found, batch["y"])
        params = jax.tree.map(lambda p, g: p - 0.5 * g / 8, params, slope)
        delta = np.clip(np.clip(found - x + 0.07 * np.sign(rise), -EPS, EPS) + x, 0, 1) - x
        state, metrics = step(state, batch)
        np.testing.assert_allclose(state.carry, delta, atol=1e-6)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params)):
            np.testing.assert_allclose(a, b, atol=1e-6)
    assert {"loss", "robust", "gradient_norm"} <= set(metrics)


def test_the_first_step_is_standard_and_finds_what_fgsm_finds(kit, key):
    net, threat = kit.mlp("batch"), threats.linf(EPS)
    batch = jax.tree.map(jnp.asarray, images() | {"carry": np.zeros((8, 4, 4, 1), np.float32)})
    go = jax.jit(functools.partial(train.free(threat)(objective(threat)), net.apply))
    got = go(net.params, net.state, batch, key)
    plain = jax.jit(functools.partial(train.grad_fn(train.standard()), net.apply))(net.params, net.state, batch, key)
    for a, b in zip(kit.leaves((got.total, got.state)), kit.leaves((plain.total, plain.state))):
        np.testing.assert_allclose(a, b, atol=1e-6)
    found = jax.jit(functools.partial(train.fgsm_at(threat).find, net.apply))(net.params, net.state, batch, key)
    np.testing.assert_allclose(batch["x"] + got.carry, found["found"], atol=1e-6)


def run(kit, key, how, devices, accumulate=1, norm="batch"):
    net, threat, sgd = kit.mlp(norm), threats.l2(0.5), optax.sgd(0.1)
    step = train.make_step(net.apply, objective(threat), sgd, gradient=train.free(threat), accumulate=accumulate)
    settings = {"devices": devices} if how == "vmap" else {"mesh": parallel.make_mesh(devices)}
    compiled = parallel.compile_step(step, how=how, **settings)
    state = trainer.init(key, net, sgd, carry=jnp.zeros((8, 4, 4, 1)))
    for batch in (images(padded=1), images(padded=1), images(seed=1)):
        state, _ = compiled(state, batch)
    return kit.leaves(jax.device_get(state))


SLOW = [pytest.param(*e, marks=pytest.mark.slow) for e in (("pmap", 4), ("vmap", 4))]


@pytest.mark.parametrize(("how", "devices"), [("shard_map", 4), ("jit", 4), *SLOW])
def test_every_executor_carries_the_same(kit, key, how, devices):
    for a, b in zip(run(kit, key, how, devices), run(kit, key, "jit", 1), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_accumulation_carries_each_row_to_its_own_place(kit, key):
    for a, b in zip(run(kit, key, "shard_map", 2, 2, "none"), run(kit, key, "jit", 1, 1, "none"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def arguments(kit, folder, steps, **more):
    threat = threats.linf(EPS)
    given = {"trainable": kit.mlp(), "objective": objective(threat), "optimizer": optax.adam(1e-2), "data": kit.blobs()}
    given |= {"steps": steps, "batch_size": 32, "gradient": train.free(threat), "replays": 3, "checkpoint": folder}
    given["augment"] = train.flip()
    return given | {"save_every": 4} | more


def test_a_run_killed_in_the_midst_of_a_replay_goes_on_with_its_bits(kit, key, tmp_path):
    """Step 4 is the second look at the second minibatch; the perturbations are in the checkpoint."""
    whole = train.fit(key, **arguments(kit, tmp_path / "a", 8))
    resumed = train.fit(key, **arguments(kit, tmp_path / "a", 8, resume=4))
    assert kit.same_bits(whole, resumed) and whole.carry.shape == (32, 4, 4, 1)
    assert float(jnp.abs(whole.carry).max()) == pytest.approx(EPS, abs=1e-6)
    again = train.fit(key, **arguments(kit, None, 8))
    assert kit.same_bits(whole, again)


def test_a_replayed_minibatch_is_the_same_with_its_augmentation(kit, key):
    net, seen = kit.mlp(), []

    def spy(objective):
        inner = train.grad_fn(objective)

        def gradient(apply, params, state, batch, key, *, axis_name=None):
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch["x"])
            return inner(apply, params, state, batch, key, axis_name=axis_name)

        return gradient

    settings = {"steps": 6, "batch_size": 16, "gradient": spy, "replays": 2, "augment": train.flip()}
    state = train.fit(key, net, train.standard(), optax.sgd(0.0), kit.blobs(), **settings)
    jax.block_until_ready(state.params)
    jax.effects_barrier()
    assert len(seen) == 6
    equal = [np.array_equal(a, b) for a, b in zip(seen, seen[1:])]
    assert equal == [True, False, True, False, True]


def test_impossible_settings_are_refused(kit, key):
    with pytest.raises(ValueError, match="alpha must be"):
        train.free(threats.linf(EPS), alpha=0.0)
    with pytest.raises(ValueError, match="replays must be"):
        train.fit(key, **arguments(kit, None, 2, replays=0))
