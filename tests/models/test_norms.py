"""Batch statistics in every mode and executor, against numpy and against the global batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxadv import models
from jaxadv.models.norms import BN_MODES, NORMS, Call, Layer, NoNorm, configure

ROWS, SHAPE, CHANNELS = 8, (3, 3), 5


class OneNorm(nnx.Module):
    """A norm alone, so that logits are its output."""

    def __init__(self, norm):
        self.norm = norm

    def __call__(self, x):
        return self.norm(x)


def batch_norm(**settings):
    made = models.trainable(OneNorm(models.BatchNorm(CHANNELS, **settings)))
    params = {"norm": {"scale": jnp.linspace(0.5, 2, CHANNELS), "bias": jnp.linspace(-1, 1, CHANNELS)}}
    state = {"norm": {"mean": jnp.linspace(0, 1, CHANNELS), "var": jnp.linspace(1, 2, CHANNELS)}}
    assert jax.tree.structure(params) == jax.tree.structure(made.params)
    return made._replace(params=params, state=state)


@pytest.fixture
def x(key):
    return 2 + 3 * jax.random.normal(key, (ROWS, *SHAPE, CHANNELS))


def by_hand(net, x):
    """float64 batch normalization and the running statistics after it."""
    x = np.asarray(x, np.float64)
    axes = tuple(range(x.ndim - 1))
    mean, var, n = x.mean(axes), x.var(axes), x[..., 0].size
    p, s = net.params["norm"], net.state["norm"]
    out = (x - mean) / np.sqrt(var + 1e-5) * np.asarray(p["scale"]) + np.asarray(p["bias"])
    return out, {
        "mean": 0.9 * np.asarray(s["mean"]) + 0.1 * mean,
        "var": 0.9 * np.asarray(s["var"]) + 0.1 * var * n / (n - 1),
    }


def close(a, b, tolerance=2e-6):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance), a, b)


def test_train_mode_is_the_formula_and_updates_unbiased_statistics(x):
    net = batch_norm()
    out, state = jax.jit(lambda p, s, x: net.apply(p, s, x, bn="train"))(net.params, net.state, x)
    want, after = by_hand(net, x)
    close(out, want.astype(np.float32), 1e-5)
    close(state["norm"], after)


def test_the_biased_choice_updates_by_the_biased_variance(x):
    net = batch_norm(unbiased=False, momentum=0.0)
    _, state = net.apply(net.params, net.state, x, bn="train")
    close(state["norm"]["var"], np.var(np.asarray(x, np.float64), axis=(0, 1, 2)))


def test_local_mode_normalizes_as_train_and_changes_nothing(x):
    net = batch_norm()
    train, _ = net.apply(net.params, net.state, x, bn="train")
    local, state = net.apply(net.params, net.state, x, bn="local")
    np.testing.assert_array_equal(local, train)
    assert state is net.state


def test_eval_mode_uses_running_statistics_and_changes_nothing(x):
    net = batch_norm()
    out, state = net.apply(net.params, net.state, x)
    s, p = net.state["norm"], net.params["norm"]
    mean, var, scale, bias = (np.asarray(v) for v in (s["mean"], s["var"], p["scale"], p["bias"]))
    close(out, (np.asarray(x) - mean) / np.sqrt(var + 1e-5) * scale + bias, 1e-5)
    assert state is net.state
    np.testing.assert_array_equal(net.apply(net.params, net.state, x[:1])[0], out[:1])  # rows do not see each other


def test_two_groups_are_two_half_batches(x):
    net = batch_norm()
    out, state = net.apply(net.params, net.state, x, bn="train", bn_groups=2)
    first, one = net.apply(net.params, net.state, x[:4], bn="train")
    second, two = net.apply(net.params, net.state, x[4:], bn="train")
    close(out, jnp.concatenate([first, second]))
    close(state, jax.tree.map(lambda a, b: (a + b) / 2, one, two))
    whole, _ = net.apply(net.params, net.state, x, bn="train")
    assert np.abs(whole - out).max() > 1e-2  # and that is another thing than the whole batch


def over_shards(fn, how, shards=4):
    """Run `fn(params, state, x, mask)` on shards of x and mask; states come back once."""
    if how == "vmap":

        def run(params, state, x, mask):
            cut = [a.reshape(shards, -1, *a.shape[1:]) for a in (x, mask)]
            out, new = jax.vmap(fn, (None, None, 0, 0), axis_name="data")(params, state, *cut)
            for leaf in jax.tree.leaves(new):
                assert (leaf == leaf[:1]).all()
            return out.reshape(-1, *out.shape[2:]), jax.tree.map(lambda a: a[0], new)

        return run
    mesh = jax.make_mesh((shards,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P(), P(), P("data"), P("data"))
    return jax.jit(
        jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=(P("data"), P()), check_vma=how == "shard_map checked")
    )


EXECUTORS = ("vmap", "shard_map", "shard_map checked")


@pytest.mark.parametrize("how", EXECUTORS)
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_four_shards_are_the_global_batch(how, groups, masked, key):
    x = 2 + 3 * jax.random.normal(key, (16, *SHAPE, CHANNELS))
    mask = jnp.arange(16) % 3 != 1 if masked else jnp.ones(16, bool)
    net = batch_norm()

    def shard(params, state, x, mask):
        return net.apply(
            params, state, x, bn="train", bn_groups=groups, axis_name="data", mask=mask if masked else None
        )

    whole = jax.jit(partial(net.apply, bn="train", bn_groups=groups))
    want = whole(net.params, net.state, x, mask=mask if masked else None)
    out, state = over_shards(shard, how)(net.params, net.state, x, mask)
    np.testing.assert_allclose(out, want[0], atol=2e-6, rtol=2e-6)
    close(state, want[1], 1e-6)


@pytest.mark.parametrize("how", EXECUTORS[:2])
def test_input_gradients_on_four_shards_are_those_of_the_global_batch(how, key):
    x = jax.random.normal(key, (16, *SHAPE, CHANNELS))
    weight = jax.random.normal(jax.random.fold_in(key, 1), x.shape)
    net = batch_norm()

    def shard(params, state, x, w):
        grad = jax.grad(lambda z: (w * net.apply(params, state, z, bn="local", axis_name="data")[0]).sum())(x)
        return grad, {}

    got, _ = over_shards(shard, how)(net.params, net.state, x, weight)
    want = jax.grad(lambda z: (weight * net.apply(net.params, net.state, z, bn="local")[0]).sum())(x)
    np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf])
def test_masked_rows_with_garbage_change_nothing(x, groups, garbage):
    net = batch_norm()
    mask = jnp.array([True, True, False, True, True, True, True, False])
    dirty = jnp.where(mask[:, None, None, None], x, garbage)

    def run(x):
        return net.apply(net.params, net.state, x, bn="train", bn_groups=groups, mask=mask)

    (out, state), (got, after) = run(x), run(dirty)
    np.testing.assert_array_equal(out[mask], got[mask])
    close(after, state, 0)
    if groups == 1:
        want, alone = net.apply(net.params, net.state, x[np.asarray(mask)], bn="train")
        close(out[mask], want)
        close(state, alone)
    grad = jax.grad(
        lambda p: jnp.where(
            mask[:, None, None, None], net.apply(p, net.state, dirty, bn="train", mask=mask)[0], 0
        ).sum()
    )
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grad(net.params)))


def test_a_group_without_rows_leaves_the_running_statistics_to_the_others(x):
    net = batch_norm()
    mask = jnp.arange(ROWS) < 4
    out, state = net.apply(net.params, net.state, x, bn="train", bn_groups=2, mask=mask)
    want, alone = net.apply(net.params, net.state, x[:4], bn="train")
    close(out[:4], want)
    close(state, alone)
    _, untouched = net.apply(net.params, net.state, x, bn="train", mask=jnp.zeros(ROWS, bool))
    close(untouched, net.state, 0)


def test_statistics_stay_float32_in_half_precision(x):
    net = batch_norm()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), net.params)
    out, state = net.apply(half, net.state, x.astype(jnp.bfloat16), bn="train")
    assert out.dtype == jnp.float32 and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
    _, after = by_hand(net, x.astype(jnp.bfloat16))
    close(state["norm"], after)  # computed in float32 from the rounded inputs, not in bfloat16
    layer = models.BatchNorm(CHANNELS)
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("groups", [3, 5])
def test_groups_that_do_not_divide_the_batch_are_refused(x, groups):
    net = batch_norm()
    with pytest.raises(ValueError, match=rf"bn_groups={groups} for 1 shard\(s\) of 8 rows"):
        net.apply(net.params, net.state, x, bn="train", bn_groups=groups)


def test_groups_that_span_shards_are_refused(x):
    net = batch_norm()

    def shard(x):
        return net.apply(net.params, net.state, x, bn="train", bn_groups=2, axis_name="data")[0]

    with pytest.raises(ValueError, match="multiple of the number of shards"):
        jax.vmap(shard, axis_name="data")(x.reshape(4, 2, *x.shape[1:]))


def test_group_norm_is_the_formula_and_sees_one_row(x):
    layer = models.GroupNorm(6, groups=4)  # the largest divisor of 6 not above 4 is 3
    assert layer.groups == 3
    x = jnp.concatenate([x, x[..., :1]], -1)
    z = np.asarray(x, np.float64).reshape(ROWS, 9, 3, 2)
    want = (z - z.mean((1, 3), keepdims=True)) / np.sqrt(z.var((1, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(x), want.reshape(x.shape), atol=2e-6)
    np.testing.assert_allclose(layer(x[:1]), layer(x)[:1], atol=1e-6)
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    scale, bias = np.linspace(-1, 2, 6, dtype=np.float32), np.linspace(0, 1, 6, dtype=np.float32)
    moved = models.group_norm(x, scale, bias, groups=4)
    np.testing.assert_allclose(moved, want.reshape(x.shape) * scale + bias, atol=5e-6)


def test_dropout_belongs_to_the_row_of_the_global_batch(key):
    net = models.trainable(OneNorm(models.Dropout(0.3, tag=2)))
    x = jnp.ones((4000, 7))
    assert net.apply({}, {}, x)[0] is x or (net.apply({}, {}, x)[0] == x).all()  # no key, no dropout
    out, _ = net.apply({}, {}, x, key=key)
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / 0.7)}
    assert abs(float((out == 0).mean()) - 0.3) < 5 * np.sqrt(0.21 / x.size)
    shards = jax.vmap(lambda z: net.apply({}, {}, z, key=key, axis_name="data")[0], axis_name="data")(
        x.reshape(4, 1000, 7)
    )
    np.testing.assert_array_equal(shards.reshape(x.shape), out)
    other = models.trainable(OneNorm(models.Dropout(0.3, tag=3))).apply({}, {}, x, key=key)[0]
    assert abs(float((other == out).mean()) - (0.7**2 + 0.3**2)) < 0.02  # another layer draws independently
    with pytest.raises(ValueError, match=r"probability in \[0, 1\)"):
        models.Dropout(1.0)


def test_an_unconfigured_layer_evaluates_and_no_norm_is_the_identity(x):
    assert set(NORMS) == {"batch", "group", "none"} and BN_MODES == ("eval", "train", "local")
    layer = models.BatchNorm(CHANNELS)
    assert layer.call == Call() and isinstance(layer, Layer)
    np.testing.assert_allclose(layer(x), x / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert NORMS["none"](3)(x) is x and NoNorm()(x) is x


def test_configure_reaches_flax_layers_and_refuses_what_they_cannot_do(x):
    module = nnx.Sequential(nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    configure(module, Call("local", axis_name="data"))
    norm, dropout = module.layers[0], module.layers[1]
    assert (norm.use_running_average, norm.axis_name, dropout.deterministic) == (False, "data", True)
    configure(module, Call("eval", 4, None, jnp.ones(ROWS, bool), jax.random.key(0)))
    assert (norm.use_running_average, norm.axis_name, dropout.deterministic) == (True, None, False)
    with pytest.raises(ValueError, match=r"bn_groups=2, mask None.*jaxadv.models.BatchNorm"):
        configure(module, Call("train", 2))
    with pytest.raises(ValueError, match="mask given"):
        configure(module, Call("train", mask=jnp.ones(ROWS, bool)))
