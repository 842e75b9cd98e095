"""Adversaries of the weights: closed forms, identities, the same step in every executor."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, parallel, threats, train
from jaxadv.train import trainer
from jaxadv.train.perturbed import kernels, weight_perturbation


def weights(seed):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (3, 4), "conv": (2, 2, 1, 3), "bias": (4,), "scale": ()}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def test_the_perturbation_has_its_size_and_the_largest_gain():
    params, grads, gamma = weights(0), weights(1), 0.02
    v = weight_perturbation(grads, params, gamma)
    size = {name: float(jnp.linalg.norm(a.reshape(-1))) for name, a in v.items()}
    norm = {name: float(jnp.linalg.norm(a.reshape(-1))) for name, a in params.items()}
    assert size["bias"] == size["scale"] == 0
    for name in ("kernel", "conv"):
        assert size[name] == pytest.approx(gamma * norm[name], rel=1e-6)
    # on a loss that is linear in the weights, <g, v> = gamma sum ||θ|| ||g||
    gain = sum(float(jnp.vdot(grads[name], v[name])) for name in v)
    best = sum(gamma * norm[name] * float(jnp.linalg.norm(grads[name].reshape(-1))) for name in ("kernel", "conv"))
    assert gain == pytest.approx(best, rel=1e-6)
    for factor in (1e-30, 1e30):
        scaled = weight_perturbation(jax.tree.map(lambda g, f=factor: f * g, grads), params, gamma)
        for name in v:
            np.testing.assert_allclose(scaled[name], v[name], rtol=1e-5, atol=1e-9)
    still = weight_perturbation(jax.tree.map(jnp.zeros_like, grads), params, gamma)
    assert all(not np.any(a) for a in jax.tree.leaves(still))
    chosen = weight_perturbation(grads, params, gamma, lambda path, leaf: path[0].key == "bias")
    assert np.any(chosen["bias"]) and not np.any(chosen["kernel"])
    assert kernels((), params["kernel"]) and not kernels((), params["bias"])


def pictures(kit, n=8, padded=0):
    x = np.random.default_rng(0).uniform(0, 1, (n, 4, 4, 1))
    mask = jnp.arange(n) < n - padded
    return dict(kit.rows(n), x=jnp.asarray(x, jnp.float32), mask=mask, step=jnp.zeros(n, jnp.int32))


def test_the_gradient_is_the_one_at_the_moved_weights_with_the_points_of_the_old(kit, key):
    net, batch = kit.mlp("batch"), pictures(kit)
    objective = train.trades(threats.l2(0.5), steps=2)
    got = jax.jit(partial(train.awp(objective, gamma=0.05), net.apply))(net.params, net.state, batch, key)
    found = jax.jit(partial(objective.find, net.apply))(net.params, net.state, batch, key)
    slope = jax.jit(partial(train.grad_fn(objective.loss), net.apply))
    first = slope(net.params, net.state, found, key)
    moved = jax.tree.map(jnp.add, net.params, weight_perturbation(first.total, net.params, 0.05))
    want = slope(moved, net.state, found, key)
    for a, b in zip(kit.leaves(got), kit.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert float(got.sums["loss"]) > float(first.sums["loss"]) + 0.1  # it is an adversary


def test_no_budget_and_no_step_yet_are_the_objective_itself(kit, key):
    net, batch = kit.mlp(), pictures(kit)
    for objective in (train.standard(), train.pgd_at(attacks.pgd(threats.linf(0.1), steps=2, keep="last"))):
        plain = train.grad_fn(objective)(net.apply, net.params, net.state, batch, key)
        nothing = train.awp(objective, gamma=0.0)(net.apply, net.params, net.state, batch, key)
        assert kit.same_bits(nothing, plain)
    later = train.awp(train.standard(), gamma=0.05, start=3)
    plain = train.grad_fn(train.standard())(net.apply, net.params, net.state, batch, key)
    at = [later(net.apply, net.params, net.state, batch | {"step": batch["step"] + t}, key) for t in (2, 3)]
    assert kit.same_bits(at[0], plain)
    always = train.awp(train.standard(), gamma=0.05)(net.apply, net.params, net.state, batch, key)
    assert kit.same_bits(at[1], always) and not kit.same_bits(at[1].total, plain.total)


def test_a_step_with_no_rate_changes_no_parameter(kit, key):
    net, sgd = kit.mlp("batch"), optax.sgd(0.0)
    step = train.make_step(net.apply, train.standard(), sgd, gradient=partial(train.awp, gamma=0.1))
    state, metrics = step(trainer.init(key, net, sgd), pictures(kit))
    assert kit.same_bits(state.params, net.params) and float(metrics["gradient_norm"]) > 0


HOWS = [("jit", 4), ("shard_map", 4), ("pmap", 4), ("vmap", 4)]


@pytest.mark.parametrize(("how", "devices"), [HOWS[1], *(pytest.param(*h, marks=pytest.mark.slow) for h in HOWS)])
def test_every_executor_moves_the_weights_alike(kit, key, how, devices):
    """Four shards with padding: the direction is that of the whole batch, not of each shard."""
    net, sgd = kit.mlp(), optax.sgd(0.1)
    objective = train.pgd_at(attacks.pgd(threats.l2(0.5), steps=2, keep="last"))
    step = train.make_step(net.apply, objective, sgd, gradient=partial(train.awp, gamma=0.05, start=0))

    def run(how, devices):
        settings = {"devices": devices} if how == "vmap" else {"mesh": parallel.make_mesh(devices)}
        state, metrics = parallel.compile_step(step, how=how, **settings)(
            trainer.init(key, net, sgd), pictures(kit, padded=3)
        )
        return kit.leaves(state), float(metrics["loss"])

    (want, loss), (got, also) = run("jit", 1), run(how, devices)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert also == pytest.approx(loss, abs=1e-5)


def test_padding_is_bound_to_the_network_and_cut_off_from_the_gradient(kit):
    net, batch = kit.mlp("batch"), pictures(kit, padded=3)
    bound = trainer.bind(net.apply, batch["mask"], None)
    garbage = jnp.where(batch["mask"][:, None, None, None], batch["x"], 0.9)
    one, two = (bound(net.params, net.state, x, bn="train") for x in (batch["x"], garbage))
    np.testing.assert_array_equal(one[0][:5], two[0][:5])
    assert kit.same_bits(one[1], two[1])


@pytest.mark.parametrize(("settings", "words"), [({"gamma": -1.0}, "gamma must be"), ({"start": -1}, "start must be")])
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        train.awp(train.standard(), **settings)
