"""The card: accuracies by hand on models whose answer is known, mCE by its formula, changes of images by their laws."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxadv import corruptions
from jaxadv.evaluate import card as room
from jaxadv.evaluate.card import ALEXNET, GRID, Card, mce, relative_mce, report_card


def half(x):
    """Which half of the image is brighter: 0 left, 1 right."""
    w = x.shape[2] // 2
    return jnp.stack([x[:, :, :w].mean((1, 2, 3)), x[:, :, -w:].mean((1, 2, 3))], -1)


def images(n=6, size=16):
    """Images whose one half is dark and the other bright, and which."""
    y = np.arange(n) % 2
    x = np.full((n, size, size, 1), 0.2, np.float32)
    for i, right in enumerate(y):
        x[i, :, size // 2 * right : size // 2 * (right + 1)] = 0.7
    return x, y.astype(np.int32)


def test_mce_is_the_published_formula():
    assert tuple(ALEXNET) == corruptions.BENCHMARK
    errors = {name: [0.5 * base] * 5 for name, base in ALEXNET.items()}
    np.testing.assert_allclose(mce(errors, ALEXNET), 0.5)
    np.testing.assert_allclose(mce({"fog": [0.1, 0.2, 0.3, 0.4, 0.5], "snow": [0.1] * 5}), 0.2)
    two = {"fog": [0.4] * 5, "snow": [0.2, 0.3, 0.4, 0.5, 0.6]}
    got = relative_mce(two, 0.1, {"fog": 0.7, "snow": 0.9}, 0.5)
    np.testing.assert_allclose(got, (0.3 / 0.2 + 0.3 / 0.4) / 2)
    with pytest.raises(ValueError, match="must be five"):
        mce({"fog": [0.1, 0.2]})
    with pytest.raises(ValueError, match="unknown baseline"):
        mce({"rain": [0.1] * 5}, ALEXNET)


def test_the_card_by_hand():
    x, y = images()
    told = []
    card = report_card(
        jax.random.key(0), Partial(half), x, y, names=("contrast", "gaussian_noise"), batch_size=4, sides=(0.5,),
        grid={"rotations": (0.0, 180.0), "shifts": (0.0,), "scales": (1.0,)}, patches=(1, 2),
        progress=lambda done, total, word: told.append((done, total)),
    )  # fmt: skip
    assert isinstance(card, Card) and card.n == 6 and card.clean == 1.0
    assert card.corruptions == {"contrast": [1.0] * 5, "gaussian_noise": [1.0] * 5}
    assert card.geometry == {"worst": 0.0, "mean": 0.5, "maps": 2.0}  # half a turn swaps the halves
    # Gray on the upper part of the bright half leaves it brighter: (0.7 + 0.5) / 2 > 0.2.
    assert card.occlusion == [(0.5, 1.0, 1.0)] and card.shuffle[0] == (1, 1.0) and card.shuffle[1][1] < 1.0
    assert card.shape["silhouette"] == 1.0 and told[-1] == (6, 6)
    tree = json.loads(json.dumps(card.to_dict()))
    assert tree["mean_corruption_error"] == 0.0 and tree["intervals"]["clean"][1] == 1.0
    assert dict(card.rows())["worst of 2 rotations, shifts, scales"] == 0.0
    # Another order and other batches change nothing: keys come from the indices.
    order = np.asarray([3, 0, 5, 1, 4, 2])
    again = report_card(
        jax.random.key(0), Partial(half), x[order], y[order], index=order, names=("gaussian_noise",), batch_size=6,
        grid={"rotations": (0.0,), "shifts": (0.0,), "scales": (1.0,)}, sides=(), patches=(1, 2),
    )  # fmt: skip
    assert again.shuffle == card.shuffle


def test_shuffled_patches_are_the_same_patches():
    x = jnp.asarray(np.random.default_rng(0).random((3, 9, 8, 2)), jnp.float32)
    out = np.asarray(room.shuffle_patches(jax.random.key(0), x, 4, index=jnp.arange(3)))

    def pieces(image):
        return sorted(image[i : i + 2, j : j + 2].tobytes() for i in range(0, 8, 2) for j in range(0, 8, 2))

    for before, after in zip(np.asarray(x), out):
        assert pieces(before) == pieces(after) and not np.array_equal(before, after)
        np.testing.assert_array_equal(before[8], after[8])
    alone = room.shuffle_patches(jax.random.key(0), x[1:2], 4, index=jnp.asarray([1]))
    np.testing.assert_array_equal(alone[0], out[1])


def test_a_gray_square_lies_where_it_should():
    x = jnp.zeros((1, 8, 8, 1))
    out = np.asarray(room.occlude(x, 0.25, 0.5, 0.5))[0, ..., 0]
    want = np.zeros((8, 8))
    want[2:6, 4:8] = 0.5
    np.testing.assert_array_equal(out, want)


def test_outlines_are_sobels_and_silhouettes_the_figure():
    from scipy import ndimage

    x = np.random.default_rng(0).random((2, 9, 7, 3)).astype(np.float32)
    gray = x.astype(np.float64) @ (0.299, 0.587, 0.114)
    size = np.stack([np.hypot(ndimage.sobel(g, 0, mode="nearest"), ndimage.sobel(g, 1, mode="nearest")) for g in gray])
    want = size / size.max((1, 2), keepdims=True)
    out = np.asarray(room.outlines(jnp.asarray(x)))
    np.testing.assert_allclose(out, np.repeat(want[..., None], 3, -1), atol=1e-5)
    assert np.isfinite(room.outlines(jnp.zeros((1, 4, 4, 1)))).all()
    figures = np.asarray(room.silhouettes(jnp.asarray(x)))
    np.testing.assert_array_equal(figures[..., 0], gray > gray.mean((1, 2), keepdims=True))


def test_the_grid_holds_every_combination_and_its_maps_do_what_they_say():
    maps = room.warps((16, 16), **GRID)
    assert maps.shape == (9 * 9 * 3, 2, 3) and len(np.unique(maps.round(5), axis=0)) == len(maps)
    x = jnp.asarray(np.random.default_rng(0).random((10, 10, 1)), jnp.float32)
    (down,) = room.warps((10, 10), (0.0,), (0.2,), (1.0,))
    moved = np.asarray(corruptions.affine_warp(x, jnp.asarray(down)))
    np.testing.assert_allclose(moved[2:, 2:], x[:-2, :-2], atol=1e-6)
    (turned,) = room.warps((10, 10), (90.0,), (0.0,), (1.0,))
    want = np.rot90(np.asarray(x), -1)
    np.testing.assert_allclose(corruptions.affine_warp(x, jnp.asarray(turned), mode="edge"), want, atol=1e-5)


def test_the_command_line_stores_and_prints_the_card(tmp_path, monkeypatch, capsys):
    from jaxadv import data
    from jaxadv.cli import commands, configs

    x, y = images()
    made = Card(6, 1.0, {"fog": [0.5] * 5}, {"worst": 0.25, "mean": 0.5, "maps": 9.0}, [], [(2, 0.5)], {"edges": 0.5})
    asked = {}

    def told(key, model, x, y, **settings):
        asked.update(settings, n=len(x))
        return made

    monkeypatch.setattr(room, "report_card", told)
    config = configs.Evaluate(model="m", out=tmp_path, card=True, batch_size=4)
    commands._card(config, half, data.arrays(x, y, name="halves"))
    assert asked["batch_size"] == 4 and asked["n"] == 6 and not configs.Evaluate(model="m").card
    stored = json.loads((tmp_path / "card.json").read_text())
    assert stored["geometry"]["worst"] == 0.25 and stored["mean_corruption_error"] == 0.5
    assert "shuffled patches, 2 x 2" in capsys.readouterr().out


def test_what_is_no_image_is_refused():
    x, y = images(2)
    for wrong, words in ((x.reshape(2, -1), "needs images"), (2 * x, "within bounds")):
        with pytest.raises(ValueError, match=words):
            report_card(jax.random.key(0), Partial(half), wrong, y)
    with pytest.raises(ValueError, match="unknown corruption"):
        report_card(jax.random.key(0), Partial(half), x, y, names=("rain",))
