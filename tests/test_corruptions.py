"""Common corruptions against the published code's own answers, SciPy, Pillow, moments, and laws over the registry."""

import functools
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from jaxadv import corruptions
from jaxadv.corruptions import BENCHMARK, CORRUPTIONS, EXTRA, SEVERITIES, TABLES, common, image
from jaxadv.corruptions.base import settings

PUBLISHED = Path(__file__).parent / "fixtures" / "corruptions_reference.npz"
DRAWN_ALIKE = [name for name in CORRUPTIONS if name not in ("shot_noise", "impulse_noise", "frost")]
LEVELS = {  # largest and mean difference to the published code, in levels of 255; measured, rounded up
    # where it exceeds 0.01: bytes are cut in the middle or at the end of theirs; a coefficient of JPEG on the edge of
    # two steps; chamfer distances in the rims of spatter
    "gaussian_noise": (0.01, 0.005),
    "defocus_blur": (0.01, 0.005),
    "glass_blur": (1.1, 0.5),
    "motion_blur": (1, 0.51),
    "zoom_blur": (0.01, 0.005),
    "snow": (2, 0.3),
    "fog": (0.01, 0.005),
    "brightness": (0.01, 0.005),
    "contrast": (0.01, 0.005),
    "elastic_transform": (0.01, 0.005),
    "pixelate": (1.1, 0.3),
    "jpeg_compression": (5.1, 0.06),
    "speckle_noise": (0.01, 0.005),
    "gaussian_blur": (0.01, 0.005),
    "spatter": (80, 0.3),
    "saturate": (0.01, 0.005),
}


@pytest.fixture(scope="module")
def published():
    with np.load(PUBLISHED) as stored:
        return dict(stored)


def drawn_as_published(name, severity, i):
    """The numbers that the published code draws after its generator was seeded, as our halves take them."""
    random, rows = np.random.RandomState(1000 * severity + i), settings(name, (32, 32, 3), "small")
    if name in ("gaussian_noise", "speckle_noise"):
        return random.normal(size=(32, 32, 3))
    if name == "glass_blur":
        _, reach, rounds = (int(v) for v in rows[severity - 1])
        drawn = np.zeros((3, 32, 32, 2))
        for r in range(rounds):
            for h in range(32 - reach, reach, -1):
                for w in range(32 - reach, reach, -1):
                    drawn[r, h, w] = random.randint(-reach, reach, size=(2,))
        return (drawn + reach + 0.5) / (2 * reach)
    if name == "motion_blur":
        return np.asarray(random.uniform(-45, 45))
    if name == "snow":
        return {"layer": random.normal(size=(32, 32)), "angle": np.asarray(random.uniform(-135, -45))}
    if name == "fog":
        drawn, step = np.zeros((32, 32)), 32
        while step >= 2:
            half, n = step // 2, 32 // step
            for row, column in ((half, half), (0, half), (half, 0)):
                drawn[row::step, column::step] = random.uniform(-1, 1, (n, n))
            step = half
        return drawn
    if name == "elastic_transform":
        return {"points": random.uniform(-1, 1, (3, 2)), "bumps": random.uniform(-1, 1, (2, 32, 32))}
    if name == "spatter":
        return random.normal(size=(32, 32))
    return None


@functools.cache
def applied(name):
    """One program: many images, each with its numbers and severity."""
    rows = settings(name, (32, 32, 3), "small")
    half = jax.vmap(lambda x, drawn, level: jnp.clip(CORRUPTIONS[name].apply(x, drawn, level, rows), 0, 1))
    return jax.jit(half)


# --------------------------------------------------------------------------------------------------- the published code


@pytest.mark.parametrize("name", DRAWN_ALIKE)
def test_with_the_same_numbers_drawn_it_is_the_published_corruption(name, published):
    x = published["x"].astype(np.float32) / 255
    cases = [(s, i) for s in SEVERITIES for i in range(4)]
    drawn = [drawn_as_published(name, s, i) for s, i in cases]
    drawn = jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32), *drawn)
    level = np.asarray([s - 1 for s, _ in cases], np.int32)
    ours = np.asarray(applied(name)(x[[i for _, i in cases]], drawn, level))[:, ::3, ::3]
    theirs = published[name].reshape(ours.shape) / 65535
    apart = 255 * np.abs(ours - theirs)
    most, mean = LEVELS[name]
    assert apart.max() <= most and apart.mean() <= mean, (apart.max(), apart.mean())


@pytest.mark.parametrize("size", ["small", "large"])
def test_the_settings_are_the_published_ones(size, published):
    assert len(BENCHMARK) == 15 and len(EXTRA) == 4 and (*BENCHMARK, *EXTRA) == tuple(TABLES) == tuple(CORRUPTIONS)
    for name, tables in TABLES.items():
        rows = np.asarray(tables[size], np.float64)
        if name == "zoom_blur":
            ranges = [np.arange(1, end, step) for end, step in rows]
            rows = np.asarray([(len(r), r[-1], r[1] - r[0]) for r in ranges])
        np.testing.assert_allclose(rows, published[f"table.{size}.{name}"], rtol=1e-9, atol=1e-12, err_msg=name)


# ------------------------------------------------------------------------------------------------------ other libraries


@pytest.mark.parametrize(
    ("sigma", "mode", "truncate"), [(1, "edge", 4), (6, "edge", 4), (20.1, "symmetric", 3), (0, "edge", 4)]
)
def test_gaussian_matrices_are_scipys_filter_also_where_the_kernel_is_longer_than_the_image(sigma, mode, truncate):
    x = np.random.default_rng(0).random((28, 3))
    ours = image.gaussian_matrix(28, sigma, mode, truncate) @ x
    scipys = {"edge": "nearest", "symmetric": "reflect"}[mode]
    theirs = ndimage.gaussian_filter1d(x, sigma, axis=0, mode=scipys, truncate=truncate) if sigma else x
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(224, 134), (224, 67), (134, 224), (8, 7), (7, 8), (5, 1)])
def test_box_matrices_are_pillows_resize(n, m):
    x = np.random.default_rng(0).random((1, n)).astype(np.float32)
    theirs = np.asarray(Image.fromarray(x, mode="F").resize((m, 1), Image.Resampling.BOX))
    np.testing.assert_allclose(x @ image.box_matrix(n, m).T, theirs, atol=1e-6)


def test_linear_samples_are_scipys_beyond_every_border():
    random = np.random.default_rng(0)
    x, at = random.random((7, 9, 2)).astype(np.float32), random.uniform(-12, 20, (2, 50)).astype(np.float32)
    modes = {"edge": "nearest", "symmetric": "reflect", "reflect": "mirror", "zero": "grid-constant"}
    cases = [(mode, order) for mode in modes for order in (0, 1)]
    ours = jax.jit(lambda x, at: [image.sample(x, *at, mode, order) for mode, order in cases])(x, at)
    for found, (mode, order) in zip(ours, cases):
        want = [ndimage.map_coordinates(x[..., c], at, order=order, mode=modes[mode]) for c in range(2)]
        np.testing.assert_allclose(found, np.stack(want, -1), atol=1e-5, err_msg=f"{mode}, order {order}")


def test_an_affine_warp_is_scipys_and_turns_shifts_and_scales_as_it_says():
    x = np.random.default_rng(0).random((9, 7, 2)).astype(np.float32)
    matrix = np.asarray([[0.9, 0.3, 1.2], [-0.2, 1.1, -0.4]], np.float32)
    middle = np.asarray([4, 3])
    offset = middle + matrix[:, 2] - matrix[:, :2] @ middle
    want = [ndimage.affine_transform(x[..., c], matrix[:, :2], offset, order=1, mode="grid-constant") for c in range(2)]
    warp = jax.jit(lambda x, m: corruptions.affine_warp(x, m))
    np.testing.assert_allclose(warp(x, matrix), np.stack(want, -1), atol=1e-5)
    still, down = np.eye(2, 3, dtype=np.float32), np.asarray([[1, 0, 2], [0, 1, 0]], np.float32)
    np.testing.assert_array_equal(warp(x, still), x)
    np.testing.assert_array_equal(warp(x, down)[:-2], x[2:])
    square = x[:7]
    quarter = jnp.asarray([[0, 1, 0], [-1, 0, 0]], jnp.float32)
    np.testing.assert_allclose(
        corruptions.affine_warp(jnp.asarray(square), quarter, mode="edge"), np.rot90(square), atol=1e-6
    )


def test_distances_are_scipys_up_to_the_limit():
    mask = np.random.default_rng(0).random((20, 17)) < 0.02
    want = np.minimum(ndimage.distance_transform_edt(~mask), 6)
    np.testing.assert_allclose(image.distance(jnp.asarray(mask), 6.0), want, atol=1e-5)


def test_edges_are_thin_and_weak_ones_count_where_they_touch_strong_ones():
    step = np.zeros((12, 12), np.float32)
    step[:, 6:] = 200
    step[:, 6:][6:] = 30  # the lower half is weak: a gradient of 120, between the two thresholds
    find = jax.jit(lambda gray: image.canny(gray, 100.0, 300.0))
    found = np.asarray(find(step))
    assert found[:5].any(1).all() and (found[:5].sum(1) == 1).all() and found[8:11].any(1).all()
    weak = np.asarray(find(np.where(step > 0, 30.0, 0.0).astype(np.float32)))
    assert not weak.any()


def test_a_disk_is_a_disk_for_large_images():
    for row in TABLES["defocus_blur"]["large"]:
        kernel = image.disk_kernel(*row)
        assert abs(kernel.sum() - 1) < 0.03 and np.allclose(kernel, kernel.T) and np.allclose(kernel, kernel[::-1])
        np.testing.assert_allclose((kernel > kernel.max() / 2).sum(), np.pi * row[0] ** 2, rtol=0.1)
    kernels = image.disk_kernels(TABLES["defocus_blur"]["large"])
    x = np.random.default_rng(0).random((30, 26)).astype(np.float32)
    want = ndimage.correlate(x.astype(np.float64), kernels[4].astype(np.float64), mode="mirror")
    np.testing.assert_allclose(image.correlate(jnp.asarray(x), jnp.asarray(kernels[4])), want, atol=1e-5)


@pytest.mark.parametrize(("size", "quality"), [((32, 48, 3), 10), ((23, 30, 1), 75), ((21, 36, 3), 10)])
def test_jpeg_is_pillows_within_four_levels(size, quality):
    row, column = np.mgrid[: size[0], : size[1]] / 8
    x = np.stack([0.5 + 0.4 * np.sin(row * (c + 1)) * np.cos(column - c) for c in range(size[2])], -1)
    x = np.uint8(255 * x)
    file = io.BytesIO()
    Image.fromarray(x.squeeze()).save(file, "JPEG", quality=quality)
    theirs = np.asarray(Image.open(file)).reshape(size).astype(int)
    steps = jnp.asarray(corruptions.quantization(quality))

    def both(x, steps):
        return corruptions.jpeg(x, steps), jax.grad(lambda x: jnp.sum(corruptions.jpeg(x, steps) ** 2))(x)

    ours, slope = jax.jit(both)(x.astype(np.float32) / 255, steps)
    apart = np.abs(255 * np.asarray(ours) - theirs)
    assert apart.max() <= 4.01 and np.mean(apart > 2.01) < 0.02 and apart.mean() < 0.2, (apart.max(), apart.mean())
    assert np.isfinite(slope).all() and np.mean(np.asarray(slope) != 0) > 0.9


def test_glass_is_the_loop_also_where_neighbors_lie_ahead():
    random, reach = np.random.default_rng(0), 3
    x, drawn = random.random((14, 12, 2)).astype(np.float32), random.random((14, 12, 2))
    want = x.copy()
    for h in range(14 - reach, reach, -1):
        for w in range(12 - reach, reach, -1):
            right, down = (int(v) for v in np.floor(drawn[h, w] * 2 * reach) - reach)
            want[h, w] = want[h + down, w + right]
    ours = jax.jit(common.shuffled)(x, drawn.astype(np.float32), reach)
    np.testing.assert_array_equal(ours, want)


# ----------------------------------------------------------------------------------------------------------------- laws

STEADY = [
    n for n in CORRUPTIONS if n not in ("glass_blur", "elastic_transform", "frost", "spatter", "saturate", "pixelate")
]
"""Types whose published settings change images more with each severity; the published code's own changes say which."""


@functools.cache
def program(name):
    """One compiled program: a batch, a severity for each row, an index for each row."""
    return jax.jit(lambda key, x, severity, index: CORRUPTIONS[name](key, x, severity, index=index))


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_laws(name, key, published):
    x = np.tile(published["x"].astype(np.float32) / 255, (5, 1, 1, 1))
    severity, index = np.repeat(np.arange(1, 6), 4), np.tile(np.arange(10, 14), 5)
    run = program(name)
    out = np.asarray(run(key, x, severity, index))
    assert out.dtype == np.float32 and out.shape == x.shape and np.isfinite(out).all()
    assert out.min() >= 0 and out.max() <= 1
    # More with each severity, as much as the published ones.
    change = np.abs(out - x).reshape(5, 4, -1).mean((1, 2))
    theirs = published[f"change.{name}"].mean(1)
    np.testing.assert_allclose(
        change, theirs, rtol=0.6 if name in ("spatter", "snow", "elastic_transform", "frost") else 0.25
    )
    if name in STEADY:
        assert (np.diff(change) > -0.05 * change[:-1]).all() and change[-1] > 1.2 * change[0], change
    # Rows live alone to the bit: another order, other companions; the same key gives the same result.
    order = np.random.default_rng(0).permutation(20)
    np.testing.assert_array_equal(run(key, x[order], severity[order], index[order]), out[order])
    other, keep = x.copy(), np.asarray([3, 8, 14])
    rest = np.setdiff1d(np.arange(20), keep)
    other[rest] = 1 - other[rest]
    away = np.asarray(run(key, other, np.where(np.isin(np.arange(20), keep), severity, 2), index))
    np.testing.assert_array_equal(away[keep], out[keep])
    np.testing.assert_array_equal(run(key, x, severity, index), out)
    assert run._cache_size() == 1
    random = CORRUPTIONS[name].draw(key, (4, 4, 3)) is not None
    fresh = np.asarray(run(jax.random.key(1), x, severity, index))
    assert np.array_equal(fresh, out) != random and (
        np.array_equal(out[0], run(key, x, severity, index + 4)[0]) != random
    )


def test_noise_has_its_moments(key):
    """After the laws, whose compiled programs it shares."""
    x, index = np.full((20, 32, 32, 3), 0.5, np.float32), np.arange(20)
    for name, variance in (
        ("gaussian_noise", 0.06**2),
        ("speckle_noise", (0.5 * 0.1) ** 2),
        ("shot_noise", 0.5 / 250),
        ("impulse_noise", 0.02 * 0.25),
    ):
        noise = np.asarray(program(name)(key, x, np.full(20, 2), index), np.float64) - 0.5
        assert abs(noise.mean()) < 5 * np.sqrt(variance / x.size), name
        np.testing.assert_allclose(noise.var(), variance, rtol=0.1, err_msg=name)
    counts = np.asarray(program("shot_noise")(key, 0.12 * x, np.full(20, 5), index), np.float64).ravel() * 50
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)
    shares = np.bincount(np.round(counts).astype(int), minlength=12)[:12] / x.size
    np.testing.assert_allclose(shares, stats.poisson.pmf(range(12), 3.0), atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_other_batches_and_gray_images_and_other_sizes(name, key, published):
    x = published["x"].astype(np.float32) / 255
    run = jax.jit(lambda key, x, severity, index: CORRUPTIONS[name](key, x, severity, index=index))
    whole = np.asarray(run(key, x, 4, np.arange(4)))
    rows = slice(1, 4)  # another batch shape changes rounding only (and what a rounding decides)
    apart = np.abs(np.asarray(run(key, x[rows], 4, np.arange(4)[rows])) - whole[rows])
    assert apart.mean() < 1e-5 and np.mean(apart > 1e-5) < 0.01
    for shape in ((2, 8, 8, 1), (1, 20, 13, 3), (1, 70, 66, 3)):
        y = np.random.default_rng(0).random(shape).astype(np.float32)
        out = np.asarray(run(key, y, 5, np.arange(shape[0])))
        assert out.shape == shape and np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
        for flat in (np.zeros(shape, np.float32), np.ones(shape, np.float32)):
            assert np.isfinite(run(key, flat, 3, np.arange(shape[0]))).all()


# ------------------------------------------------------------------------------------------------------------- the door


def test_bytes_in_bytes_out_cut_downwards(key, published):
    x = published["x"]
    out = corruptions.corrupt(key, x, "contrast", 3)
    real = np.asarray(corruptions.corrupt(key, x.astype(np.float32) / 255, "contrast", 3))
    assert out.dtype == np.uint8 and real.dtype == np.float32
    np.testing.assert_array_equal(out, corruptions.as_bytes(real))
    assert np.abs(255 * real - out - 0.5).max() <= 0.501
    np.testing.assert_array_equal(corruptions.as_bytes(np.arange(256, dtype=np.float32) / 255), np.arange(256))


def test_bad_input_is_refused_with_the_fix(key):
    x = np.full((2, 8, 8, 3), 0.5, np.float32)
    refused = [
        (lambda: corruptions.corrupt(key, x, "gaussian_nois", 1), "unknown corruption.*gaussian_noise"),
        (lambda: corruptions.corrupt(key, x, "fog", 0), "severity must be a whole number from 1 to 5"),
        (lambda: corruptions.corrupt(key, x, "fog", 2.0), "severity must be a whole number"),
        (lambda: corruptions.corrupt(key, x, "fog", np.asarray([1, 2, 3])), "one for each of the 2 images"),
        (lambda: corruptions.corrupt(key, 3 * x, "fog", 1), "within bounds"),
        (lambda: corruptions.corrupt(key, x, "fog", 1, index=np.arange(3)), "index must hold one"),
        (lambda: corruptions.corrupt(key, x, "fog", 1, table="huge"), "unknown table"),
        (lambda: corruptions.corrupt(key, x[..., :2], "snow", 1), "gray or RGB"),
    ]
    for call, words in refused:
        with pytest.raises(ValueError, match=words):
            call()


def test_large_images_take_the_large_table():
    large, small = TABLES["fog"]["large"], TABLES["fog"]["small"]
    assert settings("fog", (2, 224, 224, 3), None) == settings("fog", (2, 32, 32, 3), "large") == large
    assert settings("fog", (2, 64, 300, 3), None) == settings("fog", (224, 224, 3), "small") == small
