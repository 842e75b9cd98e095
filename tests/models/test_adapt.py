"""The doors: each against the framework's own application; one compiled program for all weights."""

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxadv import models
from jaxadv.models.adapt import Static, apply, flatten, unflatten


class Foreign(nnx.Module):
    """A user's NNX network with flax's own batch norm, dropout and a list of layers."""

    def __init__(self, rngs, width=6):
        self.first = nnx.Linear(4, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(width, width, rngs=rngs), nnx.Linear(width, 3, rngs=rngs)])

    def __call__(self, x):
        x = self.dropout(jax.nn.relu(self.norm(self.first(x))))
        for layer in self.rest:
            x = layer(x)
        return x


@pytest.fixture
def x(key):
    return jax.random.normal(key, (8, 4))


def assert_one_trace(make, x):
    """New weights of `make(seed)` must run in the program of the first, under jit and inside a scan."""

    @jax.jit
    @chex.assert_max_traces(n=1)
    def ask(model, x):
        return jax.lax.scan(lambda c, _: (c + model(x).sum(), None), 0.0, length=2)[0]

    chex.clear_trace_counter()
    answers = [float(ask(make(seed), x)) for seed in range(3)]
    assert len(set(answers)) == 3


@pytest.mark.parametrize("name", models.NETS)
def test_new_weights_have_the_same_structure_and_other_networks_another(name):
    small = {"depth": 10, "width": 1}
    residual = {"preact_resnet18": {"width": 2}, "resnet50": {"width": 2, "depths": (1,)}}
    options = (residual | {"wide_resnet": small, "wide_resnet_private": small}).get(name, {})

    def built(seed, classes=3):
        def make(key):
            return models.model(models.create(name, key, shape=(8, 8, 1), classes=classes, **options))

        return jax.tree.structure(jax.eval_shape(make, jax.random.key(seed)))

    assert built(0) == built(1) and hash(built(0)) == hash(built(1)) and built(0) != built(0, classes=4)


@pytest.mark.parametrize(("name", "options"), [("cnn_small", {}), ("wide_resnet", {"depth": 10, "width": 1})])
def test_new_weights_share_the_compiled_program(name, options):
    make = jax.jit(lambda k: models.model(models.create(name, k, shape=(8, 8, 1), classes=3, **options)))
    assert_one_trace(lambda seed: make(jax.random.key(seed)), jnp.ones((2, 8, 8, 1)))


def test_new_weights_of_foreign_networks_share_the_compiled_program(x):
    assert_one_trace(lambda seed: models.from_nnx(Foreign(nnx.Rngs(seed))), x)
    linen = nn.Dense(3)
    assert_one_trace(lambda seed: models.from_linen(linen, linen.init(jax.random.key(seed), x)), x)
    assert_one_trace(lambda seed: models.from_equinox(eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(seed))), x)
    assert_one_trace(
        lambda seed: models.pure(affine, {"w": jax.random.normal(jax.random.key(seed), (4, 3)), "b": jnp.zeros(3)}), x
    )


def test_apply_is_a_leafless_hashable_pytree(x):
    one, two = (models.trainable(Foreign(nnx.Rngs(seed))) for seed in (0, 1))
    assert jax.tree.leaves(one.apply) == [] and one.apply.func is apply
    assert jax.tree.structure(one.apply) == jax.tree.structure(two.apply)
    assert hash(jax.tree.structure(one.apply)) == hash(jax.tree.structure(two.apply)) and hash(one.apply)
    assert Static(1, "a") == Static(1, "a") != Static(2, "a") and hash(Static(1)) == hash(Static(1))
    assert Static(1) != 1 and repr(Static(1)) == "Static(int)"

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(net, x):
        return net.apply(net.params, net.state, x, bn="train")

    chex.clear_trace_counter()
    for net in (one, two):
        step(net, x)


def test_flax_layers_follow_the_mode(x):
    module = Foreign(nnx.Rngs(0))
    net = models.trainable(module)
    module.eval()
    before = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
    np.testing.assert_allclose(models.from_nnx(module)(x), module(x), atol=1e-6)
    same, state = net.apply(net.params, net.state, x)
    np.testing.assert_allclose(same, module(x), atol=1e-6)
    assert state is net.state

    module.train()
    module.dropout.deterministic = True
    local, state = net.apply(net.params, net.state, x, bn="local")
    assert state is net.state
    train, state = net.apply(net.params, net.state, x, bn="train")
    np.testing.assert_allclose(train, module(x), atol=1e-6)
    np.testing.assert_array_equal(local, train)
    after = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
    chex.assert_trees_all_close(state, after, atol=1e-6)
    assert np.abs(after["norm"]["mean"] - before["norm"]["mean"]).max() > 1e-3
    assert net.params["rest"].keys() == {"0", "1"}  # string keys, whatever the container


def test_flax_dropout_is_random_if_and_only_if_there_is_a_key(x, key):
    net = models.trainable(Foreign(nnx.Rngs(0)))

    def run(key=None, **settings):
        return net.apply(net.params, net.state, x, key=key, **settings)[0]

    np.testing.assert_array_equal(run(bn="local"), run(bn="local"))
    one, two = run(key), run(jax.random.key(5))
    np.testing.assert_array_equal(one, run(key))
    assert np.abs(one - two).max() > 1e-3 and np.abs(one - run()).max() > 1e-3
    shards = jax.vmap(lambda x: net.apply(net.params, net.state, x, key=key, axis_name="d")[0], axis_name="d")(
        jnp.stack([x, x])
    )
    assert np.abs(shards[0] - shards[1]).max() > 1e-3


def test_flax_batch_norm_is_synchronized_over_an_axis_and_refuses_the_rest(x):
    net = models.trainable(Foreign(nnx.Rngs(0)))
    want, after = net.apply(net.params, net.state, x, bn="train")
    shard = jax.vmap(
        lambda x: net.apply(net.params, net.state, x, bn="train", axis_name="data"),
        axis_name="data",
        out_axes=(0, None),
    )
    got, state = shard(x.reshape(4, 2, 4))
    np.testing.assert_allclose(got.reshape(8, 3), want, atol=1e-5)
    chex.assert_trees_all_close(state, after, atol=1e-5)
    with pytest.raises(ValueError, match="Use jaxadv.models.BatchNorm in its place"):
        net.apply(net.params, net.state, x, bn="train", bn_groups=2)
    net.apply(net.params, net.state, x, bn_groups=2, mask=jnp.ones(8, bool))  # evaluation asks nothing of it


def test_streams_of_several_shapes_are_rebuilt(x, key):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=7))

        def __call__(self, x):
            return jnp.concatenate([self.a(x), self.b(x)], -1)

    net = models.trainable(Two(nnx.Rngs(0)))
    assert net.params == {} and net.state == {}
    out = net.apply({}, {}, jnp.ones((50, 4)), key=key)[0]
    assert (out[:, :4] != out[:, 4:]).any()  # streams of their own


def test_layers_of_ours_fit_into_a_users_network(x):
    net = models.trainable(nnx.Sequential(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), models.BatchNorm(5)))
    out, state = net.apply(net.params, net.state, x, bn="train", bn_groups=2, mask=jnp.arange(8) > 2)
    assert out.shape == (8, 5)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(net.state)))


def test_apply_refuses_what_it_cannot_mean(x):
    net = models.trainable(Foreign(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="unknown bn mode 'training'. Did you mean 'train'"):
        net.apply(net.params, net.state, x, bn="training")
    with pytest.raises(ValueError, match="bn_groups must be a whole number"):
        net.apply(net.params, net.state, x, bn_groups=0)
    with pytest.raises(ValueError, match=r"mask must be bool\[8\].*got float32\[8\]"):
        net.apply(net.params, net.state, x, mask=jnp.ones(8))
    with pytest.raises(ValueError, match=r"missing \['first\.bias', 'first\.kernel'\]"):
        net.apply({k: v for k, v in net.params.items() if k != "first"}, net.state, x)
    with pytest.raises(TypeError, match="must be a flax NNX module; got function"):
        models.trainable(affine)


def test_unhashable_attributes_are_refused():
    class Odd(nnx.Module):
        def __init__(self):
            self.setting = {1, 2}

        def __call__(self, x):
            return x

    with pytest.raises(TypeError, match=r"static attributes of Odd must be hashable.*Use tuples"):
        models.trainable(Odd())


def test_the_module_itself_is_not_changed_and_traces_do_not_leak(x):
    module = Foreign(nnx.Rngs(0))
    net = models.trainable(module)
    with jax.checking_leaks():
        jax.jit(lambda p, s, x: net.apply(p, s, x, bn="train", key=jax.random.key(1)))(net.params, net.state, x)
    assert module.norm.use_running_average is False and module.dropout.deterministic is False
    assert (module.norm.mean[...] == 0).all()


def affine(params, x):
    return x @ params["w"] + params["b"][None]


def affine_apply(params, state, x, *, bn="eval", bn_groups=1, axis_name=None, mask=None, key=None):
    return affine(params, x) * (1 if bn == "eval" else 2), state


def test_pure_is_the_function_with_its_variables(x):
    params = {"w": jnp.arange(12.0).reshape(4, 3), "b": jnp.ones(3)}
    model = models.pure(affine, params)
    np.testing.assert_array_equal(model(x), affine(params, x))
    np.testing.assert_array_equal(models.pure(jnp.tanh)(x), jnp.tanh(x))
    with pytest.raises(TypeError, match="fn must be callable.*Arguments swapped"):
        models.pure(params, affine)


def test_model_takes_a_trainable_with_a_plain_function(x):
    from jaxadv.core import Trainable

    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    model = models.model(Trainable(affine_apply, params, {}))
    np.testing.assert_array_equal(jax.jit(model)(x), affine(params, x))
    assert len(jax.tree.leaves(model)) == 2


class LinenNet(nn.Module):
    """A linen network with batch norm and dropout."""

    widths: tuple = (6,)

    @nn.compact
    def __call__(self, x, train: bool):
        for width in self.widths:
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(width)(x)))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def test_linen_is_its_own_application(x, key):
    module = LinenNet()
    variables = module.init(key, x, train=False)
    stats = jax.tree.map(lambda a: a + 0.3, variables["batch_stats"])
    variables = {"params": variables["params"], "batch_stats": stats}
    model = models.from_linen(module, variables, train=False)
    np.testing.assert_allclose(jax.jit(model)(x), module.apply(variables, x, train=False), atol=1e-6)
    grad = jax.grad(lambda z: model(z).sum())(x)
    np.testing.assert_allclose(grad, jax.grad(lambda z: module.apply(variables, z, train=False).sum())(x), atol=1e-6)


def test_linen_refuses_what_is_no_evaluation(x, key):
    module = nn.Dense(3)
    variables = module.init(key, x)
    with pytest.raises(ValueError, match="must not change variables"):
        models.from_linen(module, variables, mutable=["batch_stats"])
    with pytest.raises(ValueError, match=r"got \['bias', 'kernel'\].*Pass \{'params': variables\}"):
        models.from_linen(module, variables["params"])
    with pytest.raises(TypeError, match="NNX\\? Use from_nnx"):
        models.from_linen(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), {})
    with pytest.raises(TypeError, match="must be hashable"):
        models.from_linen(module, variables, setting=np.ones(3))


def test_equinox_per_example_and_batched(x, key):
    module = eqx.nn.MLP(4, 3, 8, 2, key=key)
    want = jnp.stack([module(row) for row in x])
    np.testing.assert_allclose(models.from_equinox(module)(x), want, atol=1e-6)

    class Batched(eqx.Module):
        inner: eqx.nn.MLP

        def __call__(self, x):
            return jax.vmap(self.inner)(x)

    np.testing.assert_allclose(models.from_equinox(Batched(module), per_example=False)(x), want, atol=1e-6)


def test_equinox_images_and_dropout(key):
    module = eqx.nn.Sequential(
        [eqx.nn.Conv2d(2, 3, 3, key=key), eqx.nn.Lambda(jnp.ravel), eqx.nn.Dropout(0.5), eqx.nn.Linear(12, 3, key=key)]
    )
    x = jax.random.normal(key, (5, 4, 4, 2))
    quiet = eqx.nn.inference_mode(module)
    want = jnp.stack([quiet(row.transpose(2, 0, 1)) for row in x])
    np.testing.assert_allclose(models.from_equinox(module, channels_first=True)(x), want, atol=1e-6)


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_equinox_state(key, x, mode):
    class Net(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        last: eqx.nn.Linear

        def __init__(self, key):
            self.first, self.last = eqx.nn.Linear(4, 6, key=key), eqx.nn.Linear(6, 3, key=key)
            self.norm = eqx.nn.BatchNorm(6, "batch", mode=mode)

        def __call__(self, x, state):
            x, state = self.norm(self.first(x), state)
            return self.last(jax.nn.relu(x)), state

    module, state = eqx.nn.make_with_state(Net)(key)
    with pytest.raises(ValueError, match="must come with its state"):
        models.from_equinox(module)
    train = jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    for _ in range(3):
        _, state = train(x + 1, state)
    want = jnp.stack([eqx.nn.inference_mode(module)(row, state)[0] for row in x])
    model = models.from_equinox(module, state)
    np.testing.assert_allclose(jax.jit(model)(x), want, atol=1e-6)
    assert np.abs(want - train(x, state)[0]).max() > 1e-3  # it is the inference mode


def test_equinox_refuses_other_things():
    with pytest.raises(TypeError, match="must be an equinox module; got function"):
        models.from_equinox(affine)


def test_flatten_and_unflatten_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert unflatten(flatten(tree)) == tree
