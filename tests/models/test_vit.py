"""The vision transformer against numpy, its size, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxadv import models
from jaxadv.models.vit import NORMS, Attention, EncoderBlock, LayerNorm, ViT

SETTINGS = {"patch": 2, "width": 6, "depth": 1, "heads": 2}


def dense(x, p):
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)


def layer_norm(x, p):
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return z * np.asarray(p["scale"]) + np.asarray(p["bias"])


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_it_is_its_hand_written_forward_and_trains(key, filled):
    net = filled("vit", (4, 6, 2), **SETTINGS)
    x = jax.random.uniform(key, (3, 4, 6, 2))
    p, block = net.params, net.params["blocks"]["0"]
    z = np.asarray(x, np.float64).reshape(3, 2, 2, 3, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(3, 6, 8)
    kernel = np.asarray(p["patches"]["kernel"]).reshape(8, 6)
    z = z @ kernel + np.asarray(p["patches"]["bias"]) + np.asarray(p["positions"])
    qkv = dense(layer_norm(z, block["norm1"]), block["attention"]["qkv"]).reshape(3, 6, 3, 2, 3)
    heads = []
    for head in range(2):
        q, k, v = (qkv[:, :, i, head] for i in range(3))
        weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(3))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v)
    z = z + dense(np.concatenate(heads, -1), block["attention"]["out"])
    z = z + dense(gelu(dense(layer_norm(z, block["norm2"]), block["inner"])), block["outer"])
    want = dense(layer_norm(z, p["norm"]).mean(1), p["linear"])
    run = jax.jit(lambda p: (net.apply(p, net.state, x)[0], jax.grad(lambda p: net.apply(p, {}, x)[0].sum())(p)))
    logits, grads = run(p)
    np.testing.assert_allclose(logits, want, atol=1e-5)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads)) and net.state == {}
    half = jax.eval_shape(lambda p: net.apply(p, {}, x)[0], jax.tree.map(lambda a: a.astype(jnp.bfloat16), p))
    assert half.dtype == jnp.float32


def test_it_has_the_published_size():
    make = {"shape": (224, 224, 3), "classes": 1000, "patch": 16, "width": 192, "depth": 12, "heads": 3}
    made = jax.eval_shape(lambda k: models.create("vit", k, **make), jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(made.params))
    assert size == 5_717_416 - 2 * 192  # ViT-Ti/16, less the class token and its position


def test_impossible_settings_are_refused(key):
    for options, message in (
        ({"patch": 3}, "patch must divide the sides of the image; got 3 for 4 x 8"),
        ({"heads": 5}, "heads must divide width; got 5 heads for 64"),
        ({"depth": 0}, "depth must be a whole number"),
        ({"norm": "batch"}, "unknown norm 'batch'"),
    ):
        with pytest.raises(ValueError, match=message):
            models.create("vit", key, shape=(4, 8, 1), classes=3, **options)
    assert set(NORMS) == {"layer", "none"} and issubclass(ViT, nnx.Module)
    parts = LayerNorm(4), Attention(4, 2, init="torch", rngs=nnx.Rngs(0))
    assert all(part(jnp.ones((1, 2, 4))).shape == (1, 2, 4) for part in parts)
    block = EncoderBlock(4, 2, norm="none", init="torch", rngs=nnx.Rngs(0))
    assert block(jnp.ones((1, 2, 4))).shape == (1, 2, 4)
