"""J-SIGR: the grid, occlusion and the selective penalty in closed form, finite differences, reductions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import train
from jaxadv.core import Trainable
from jaxadv.train import saliency, terms


def curved(params, state, x, *, bn="eval", key=None, **_):
    return jnp.tanh(x.reshape(len(x), -1) @ params["kernel"]) @ params["head"], state


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    x = rng.uniform(0.2, 1, (6, 4, 5, 2)).astype(np.float32)
    batch = {"x": x, "y": rng.integers(0, 3, 6).astype(np.int32), "index": np.arange(6), "mask": np.ones(6, bool)}
    params = {"kernel": rng.normal(size=(40, 7)) / 3, "head": rng.normal(size=(7, 3))}
    net = Trainable(curved, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params), {})
    return net, jax.tree.map(jnp.asarray, batch)


def test_patches_are_numbered_row_by_row():
    np.testing.assert_array_equal(saliency.patches((5,), 2), [0, 0, 1, 1, 2])
    want = [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    np.testing.assert_array_equal(saliency.patches((3, 5, 7), 2)[..., 0], want)
    assert saliency.patches((3, 5, 7), 2).shape == (3, 5, 1) and saliency.patches((2, 4, 1), 9).max() == 0


def test_occlusion_is_what_hiding_each_patch_by_hand_changes(images):
    net, batch = images
    got = jax.jit(functools.partial(saliency.occlusion, net.apply, size=2, fill=0.1))(net.params, {}, batch)
    x, y, number = np.asarray(batch["x"]), np.asarray(batch["y"]), 0

    def chance(x):
        kernel, head = (np.asarray(net.params[name], np.float64) for name in ("kernel", "head"))
        z = np.exp(np.tanh(x.reshape(6, -1) @ kernel) @ head)
        return (z / z.sum(-1, keepdims=True))[np.arange(6), y]

    assert got.shape == (6, 6)
    for top in (0, 2):
        for left in (0, 2, 4):
            hidden = x.copy()
            hidden[:, top : top + 2, left : left + 2] = 0.1
            np.testing.assert_allclose(got[:, number], abs(chance(x) - chance(hidden)), atol=1e-6)
            number += 1


@pytest.mark.parametrize("top", [0.0, 0.5, 1.0])
def test_the_selective_penalty_spares_the_patches_that_matter(images, key, top):
    net, batch = images
    got = jax.jit(functools.partial(saliency.selective(top=top, size=2), net.apply))(net.params, {}, batch, key)
    slope = np.abs(terms.input_gradient(net.apply, net.params, {}, batch["x"], batch, "eval"))
    ranked = np.argsort(-np.asarray(saliency.occlusion(net.apply, net.params, {}, batch, size=2)), -1)
    want, grid = [], saliency.patches((4, 5, 2), 2)
    for row, order in zip(slope, ranked):
        spared = np.isin(grid, order[: round(6 * top)])
        want.append(np.where(spared, 0, row).sum())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert (np.asarray(got) > 0).all() == (top < 1)


def test_on_a_linear_model_the_penalty_is_known(kit, key):
    """Logits (0, w . x + b): the input gradient is (p_1 - y) w, whatever is hidden."""
    model, batch = kit.linear(), kit.rows()
    got = saliency.selective(top=0.4, size=1)(model.apply, model.params, {}, batch, key)
    w, x = np.asarray(model.params["w"]), np.asarray(batch["x"])
    chance = 1 / (1 + np.exp(-(x @ w + 0.3)))
    hidden = 1 / (1 + np.exp(-(x @ w + 0.3)[:, None] + x * w))
    order = np.argsort(-abs(chance[:, None] - hidden), -1)
    rest = np.ones_like(x)
    np.put_along_axis(rest, order[:, :2], 0, -1)
    np.testing.assert_allclose(got, abs(chance - np.asarray(batch["y"])) * (rest * abs(w)).sum(-1), rtol=1e-4)


def test_the_gradient_of_the_penalty_against_finite_differences(images, key):
    """With the mask held constant, as it is by definition."""
    net, batch = images
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: a.astype(jnp.float64), net.params)
        batch = batch | {"x": batch["x"].astype(jnp.float64)}
        term = saliency.selective(top=0.5, size=2)
        go = jax.jit(lambda p: term(net.apply, p, {}, batch, key).sum())
        slope = jax.jit(jax.grad(go))(params)
        for name, place in (("kernel", (3, 2)), ("head", (4, 1))):
            step = jnp.zeros_like(params[name]).at[place].set(1e-6)
            ends = [float(go(params | {name: params[name] + s * step})) for s in (1, -1)]
            np.testing.assert_allclose(slope[name][place], (ends[0] - ends[1]) / 2e-6, rtol=1e-5)


def test_jsigr_is_its_objective_and_two_terms(kit, images, key):
    net, batch = images
    go = lambda objective: objective(net.apply, net.params, {}, batch, key)  # noqa: E731
    plain = go(train.standard())
    assert kit.same_bits(go(train.jsigr(weight_jacobian=0.0, weight_saliency=0.0)), plain)
    got, (_, metrics) = go(train.jsigr(weight_jacobian=0.3, weight_saliency=0.2, size=2, top=0.5))
    np.testing.assert_allclose(got, plain[0] + 0.3 * metrics["jacobian"] + 0.2 * metrics["saliency"], rtol=1e-5)
    one, two = terms.jacobian(), saliency.selective(size=2, top=0.5)
    for name, term in {"jacobian": one, "saliency": two}.items():
        np.testing.assert_allclose(metrics[name], term(net.apply, net.params, {}, batch, key), rtol=1e-5)


@pytest.mark.parametrize("settings", [{"top": 1.5}, {"size": 0}, {"bn": "train"}, {"weight_saliency": -1.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="top|size|bn|weight"):
        train.jsigr(**settings)
