"""Taps, branches and gates: values of layers, two heads on one body, closed forms of the gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxadv import models
from jaxadv.models import channels
from jaxadv.models.adapt import apply
from jaxadv.models.branch import BRANCH
from jaxadv.models.norms import Call, configure
from jaxadv.models.taps import GIVEN, layers, recorded

X = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 8, 8, 1)), jnp.float32)


def test_taps_are_what_layers_are_given_and_return(filled):
    net = filled("mlp", widths=(5, 4), norm="batch")
    taps = ("layers.*", "layers.2" + GIVEN, "norms.0")
    plain, _ = net.apply(net.params, net.state, X, bn="train")
    (logits, seen), state = jax.jit(lambda *a: net.apply(*a, bn="train", taps=taps))(net.params, net.state, X)
    np.testing.assert_allclose(logits, plain, atol=1e-6)
    assert set(seen) == {"layers.0", "layers.1", "layers.2", "layers.2:in", "norms.0"}
    kernel, bias = (net.params["layers"]["0"][name] for name in ("kernel", "bias"))
    np.testing.assert_allclose(seen["layers.0"], X.reshape(3, -1) @ kernel + bias[None], rtol=1e-5)
    last = net.params["layers"]["2"]
    np.testing.assert_allclose(seen["layers.2:in"] @ last["kernel"] + last["bias"][None], logits, rtol=1e-5)
    np.testing.assert_array_equal(seen["layers.2"], logits)
    moved = net.apply(net.params, net.state, X, bn="train")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, moved)  # and taps change no state


def test_the_layers_of_a_users_own_module_can_be_tapped():
    class Own(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x, twice=False):
            x = self.inner(x)
            return self.inner(x) if twice else x

    module = Own(nnx.Rngs(0))
    assert set(layers(module)) == {"inner"}
    own = models.trainable(module)
    (logits, seen), _ = apply(*own.apply.args, own.params, own.state, jnp.ones((3, 2)), taps=("inner:in", "inner"))
    np.testing.assert_array_equal(seen["inner"], logits)
    np.testing.assert_array_equal(seen["inner:in"], jnp.ones((3, 2)))
    with recorded(module, ("inner",)) as values:
        module(jnp.ones((3, 2)), twice=True)
    with pytest.raises(ValueError, match="called exactly once"):
        values()
    assert isinstance(module.inner, nnx.Linear)  # as it was before


def test_a_tap_that_matches_nothing_is_refused(filled):
    net = filled("cnn_small")
    with pytest.raises(ValueError, match=r"must name a layer; got 'dense_2:in'. Did you mean 'dense2'"):
        net.apply(net.params, net.state, X, taps=("dense_2:in",))


@pytest.fixture
def two(filled):
    trunk, head = filled("cnn_small", norm="batch"), filled("mlp", shape=(100,), classes=2, widths=(3,), norm="batch")
    return trunk, head, models.branched(trunk, head, at="dense2:in")


def test_a_branch_reads_the_features_and_leaves_the_trunk_as_it_is(two):
    trunk, head, both = two
    plain, moved = trunk.apply(trunk.params, trunk.state, X, bn="train")
    (logits, seen), state = both.apply(both.params, both.state, X, bn="train", taps=(BRANCH, "dense2"))
    features = trunk.apply(trunk.params, trunk.state, X, bn="train", taps=("dense2:in",))[0][1]["dense2:in"]
    side, other = head.apply(head.params, head.state, features, bn="train")
    assert set(seen) == {BRANCH, "dense2"}
    for got, want in ((logits, plain), (seen[BRANCH], side), (state, {"trunk": moved, "branch": other})):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
    np.testing.assert_allclose(models.model(both)(X), models.model(trunk)(X), atol=1e-6)
    assert both.apply(both.params, both.state, X, bn="train")[1]["branch"] is both.state["branch"]  # not asked for
    back = models.trunk(both)
    assert jax.tree.structure(back) == jax.tree.structure(trunk)
    jax.tree.map(np.testing.assert_array_equal, back.params, trunk.params)
    with pytest.raises(TypeError, match="needs a network with a branch"):
        models.trunk(trunk)


def test_the_gradient_of_the_branch_comes_back_reversed(two):
    *_, both = two

    def told(params, rho):
        (_, seen), _ = both.apply(params, both.state, X, bn="train", taps=(BRANCH,), hints={"reversal": rho})
        return seen[BRANCH][:, 0].sum()

    slope = jax.jit(jax.grad(told))
    plain, half, each = (slope(both.params, rho) for rho in (jnp.full(3, -1.0), jnp.full(3, 0.5), 0.5))
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(same, half["branch"], plain["branch"])
    jax.tree.map(same, half["trunk"], jax.tree.map(lambda a: -0.5 * a, plain["trunk"]))
    jax.tree.map(same, each, half)
    assert max(float(jnp.abs(a).max()) for a in jax.tree.leaves(plain["trunk"])) > 1e-3


def test_reversal_is_the_identity_and_its_derivative_minus_rho():
    x = jnp.float32([1e-30, 0.1, -3.7e8])
    out, pull = jax.vjp(lambda x: models.grad_reverse(x, 0.3), x)
    np.testing.assert_array_equal(out, x)
    np.testing.assert_allclose(pull(jnp.float32([1, 2, 3]))[0], [-0.3, -0.6, -0.9], rtol=1e-6)


def gate(seed=0, hidden=None, classes=4, width=6):
    keys = nnx.Rngs(seed)
    made = channels.Gate(width, classes, hidden=hidden, dense=lambda a, b: nnx.Linear(a, b, rngs=keys))
    rng = np.random.default_rng(seed)
    for layer in (made.out, made.hidden):
        if layer is not None:
            layer.kernel[...] = jnp.asarray(rng.normal(size=layer.kernel.shape), jnp.float32)
            layer.bias[...] = jnp.asarray(rng.normal(size=layer.bias.shape), jnp.float32)
    return made, jnp.asarray(rng.normal(size=(5, 3, 3, width)), jnp.float32)


def test_the_weights_of_a_linear_gate_are_the_softmax_of_two_columns():
    """The published identity: they depend on the features through the two classes alone."""
    made, x = gate()
    kernel = made.out.kernel[...]
    scores = x.mean((1, 2)) @ kernel + made.out.bias[...][None]
    first, second = jnp.argsort(-scores, axis=-1)[:, :2].T
    label = jnp.asarray([0, 1, 2, 3, 0])
    for told, one in ((None, first), (label, label)):
        configure(made, Call(hints={} if told is None else {"label": told}))
        want = jax.nn.softmax((kernel[:, one] + kernel[:, second]).T)
        np.testing.assert_allclose(made.weights(x.mean((1, 2)), told), want, atol=1e-6)
        np.testing.assert_allclose(made(x), x * want[:, None, None], atol=1e-6)
        np.testing.assert_allclose(want.sum(-1), 1, rtol=1e-6)


def test_gradients_stop_at_the_gate_in_training_only():
    made, x = gate(hidden=7)
    fixed = made.weights(x.mean((1, 2)))[:, None, None]

    def slope(hints):
        configure(made, Call(hints=hints))
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(made(x)))))(x)

    best = jnp.argmax(made.probe(x.mean((1, 2))), -1)
    detached = jax.grad(lambda x: jnp.sum(jnp.sin(x * fixed)))(x)
    np.testing.assert_allclose(slope({"label": best}), detached, atol=1e-6)
    assert float(jnp.abs(slope({}) - detached).max()) > 1e-3


RESIDUAL = pytest.param("preact_resnet18", {"width": 2}, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "options"), [("cnn_small", {}), RESIDUAL])
def test_what_attacks_get_differentiates_through_the_gates(filled, name, options):
    """Finite differences in float64 of the network's own logits, gates and all."""
    with jax.enable_x64(True):
        net = filled(name, gated=True, activation="silu", **options)
        net = jax.tree.map(lambda a: a.astype(jnp.float64), net)
        x = X[:1].astype(jnp.float64)
        total = jax.jit(lambda x: models.model(net)(x)[0, 0])
        slope, move = jax.jit(jax.grad(total))(x), jnp.asarray(np.random.default_rng(1).normal(size=x.shape))
        numeric = (total(x + 1e-5 * move) - total(x - 1e-5 * move)) / 2e-5
        np.testing.assert_allclose(jnp.sum(slope * move), numeric, rtol=1e-6)
        (_, seen), _ = net.apply(net.params, net.state, x, taps=(channels.SCORES,))
        assert set(seen) == {"gates.0.scores", "gates.1.scores"} and all(z.shape == (1, 3) for z in seen.values())
    plain = filled(name, activation="silu", **options)
    assert "gates" not in plain.params  # and without the option there is nothing of them
    with pytest.raises(ValueError, match="must name a layer"):
        plain.apply(plain.params, plain.state, X, taps=(channels.SCORES,))
