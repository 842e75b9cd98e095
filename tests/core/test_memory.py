"""Rematerialization: the same numbers, and less that waits for the backward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import core, losses, models

NETS = {
    "wide_resnet": {"depth": 10, "width": 1},
    "wide_resnet_private": {"depth": 10, "width": 1},
    "vit": {"depth": 3, "width": 16},
}
X = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32)


def network(name, **options):
    return models.create(name, jax.random.key(0), shape=(16, 16, 3), classes=4, **options)


def kept(apply, net, x):
    """How many numbers a forward pass keeps for the backward pass, beside parameters and inputs at most."""
    back = jax.eval_shape(lambda p, x: jax.vjp(lambda p: apply(p, net.state, x, bn="local")[0], p)[1], net.params, x)
    return sum(a.size for a in jax.tree.leaves(back)) - sum(a.size for a in jax.tree.leaves((net.params, x)))


@pytest.mark.parametrize("name", NETS)
def test_only_what_blocks_hand_on_is_kept(name):
    net = network(name, **NETS[name])
    assert 0 < kept(core.rematerialized(net.apply), net, X) < kept(net.apply, net, X) / 3
    program = str(jax.make_jaxpr(lambda x: net.apply(net.params, net.state, x)[0])(X))
    assert program.count("jaxadv.block") == 3


def test_gradients_and_statistics_stay_the_same():
    net, x, y = network("wide_resnet", depth=10, width=1), jax.random.uniform(jax.random.key(1), X.shape), jnp.arange(8)
    again = core.rematerialized(net.apply)

    def total(apply, params, x):
        logits, state = apply(params, net.state, x, bn="train")
        return losses.cross_entropy(logits, y % 4).sum(), state

    slopes = [jax.jit(jax.grad(partial(total, apply), (0, 1), has_aux=True)) for apply in (net.apply, again)]
    for a, b in zip(*(jax.tree.leaves(slope(net.params, x)) for slope in slopes), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-4, atol=2e-5 * float(np.abs(a).max()))
    assert again == core.rematerialized(net.apply) and hash(again) == hash(core.rematerialized(net.apply))


def test_a_network_without_marks_keeps_nothing_and_is_computed_again_as_a_whole():
    net, x = models.create("mlp", jax.random.key(0), shape=(6,), classes=3, widths=(64, 64)), jnp.ones((32, 6))
    assert kept(core.rematerialized(net.apply), net, x) <= 0 < kept(net.apply, net, x)
