"""Transformations of images against SciPy and colorsys, packed rows that verify and replay, searches by brute force."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import ndimage

from jaxadv import core
from jaxadv.attacks import (
    Affine,
    Brightness,
    Contrast,
    Flow,
    Hue,
    Pixels,
    Saturation,
    StAdv,
    WorstOf,
    pgd,
    roughness,
    stadv,
    worst_of,
)
from jaxadv.attacks.spatial import from_hsv, resample, to_hsv, turn
from jaxadv.threats import Component, Semantic, behind, semantic
from jaxadv.threats.semantic import ranks

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SHAPE = (8, 8, 3)
X = RNG.uniform(0.05, 0.95, (4, *SHAPE)).astype(np.float32)
COMPONENTS = (
    Hue(),
    Saturation(),
    Affine(10.0, 0.0),
    Brightness(),
    Contrast(),
    Pixels(),
    Affine(),
    Flow(),
    Flow(2.0, 3),
)


def values(*numbers):
    return jnp.broadcast_to(jnp.asarray(numbers, jnp.float32)[None], (4, len(numbers)))


@pytest.mark.parametrize("component", COMPONENTS, ids=repr)
def test_a_component_at_its_identity_changes_no_bit_and_has_gradients(component):
    low, still, high = component.ranges(SHAPE)
    assert isinstance(component, Component) and (low <= still).all() and (still <= high).all()
    x = X.copy()
    x[0, :, :4] = x[0, :, :4, :1]  # gray
    x[1, 0], x[1, 1] = 0, 1
    at = jnp.tile(jnp.asarray(still, jnp.float32)[None], (4, 1))
    weight = jnp.asarray(RNG.normal(size=X.shape), jnp.float32)
    out = jax.jit(component.__call__)(x, at)
    np.testing.assert_array_equal(out, x)
    slopes = jax.jit(jax.grad(lambda x, v: jnp.sum(weight * component(x, v)), argnums=(0, 1)))(jnp.asarray(x), at)
    assert all(np.isfinite(s).all() and np.asarray(s).any() for s in slopes)
    assert hash(component) == hash(type(component)(**vars(component)))


def test_quarter_turns_are_exact_and_anticlockwise():
    for n in (7, 8):
        x = RNG.uniform(0, 1, (4, n, n, 2)).astype(np.float32)
        turned = jax.jit(Affine(360.0, 0.0).__call__)
        for k, degrees in enumerate((0, 90, 180, 270, 360, -90)):
            out = turned(jnp.asarray(x), values(degrees))
            np.testing.assert_array_equal(out, np.rot90(x, k if degrees >= 0 else 3, axes=(1, 2)))
    cosine, sine = turn(jnp.asarray([60.0, 135.0, -240.0]))
    np.testing.assert_allclose(cosine, np.cos(np.deg2rad([60, 135, -240])), atol=1e-6)
    np.testing.assert_allclose(sine, np.sin(np.deg2rad([60, 135, -240])), atol=1e-6)


def by_scipy(x, down, right):
    read = functools.partial(ndimage.map_coordinates, coordinates=[down, right], order=1, mode="grid-constant")
    return np.stack([read(x[..., c].astype(np.float64)) for c in range(x.shape[-1])], axis=-1)


def test_rotation_with_translation_is_scipys_linear_interpolation():
    x = RNG.uniform(0, 1, (4, 9, 6, 2)).astype(np.float32)
    degrees, down, right = 23.0, 1.3, -2.6
    out = jax.jit(Affine().__call__)(jnp.asarray(x), values(degrees, down, right))
    i, j = np.meshgrid(np.arange(9) - 4 - down, np.arange(6) - 2.5 - right, indexing="ij")
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    for got, image in zip(out, x):
        np.testing.assert_allclose(got, by_scipy(image, c * i + s * j + 4, c * j - s * i + 2.5), atol=1e-5)


def test_flow_is_scipys_linear_interpolation_and_a_constant_coarse_field_a_translation():
    flow = Flow(2.0)
    field = RNG.uniform(-2, 2, (4, 8, 8, 2)).astype(np.float32)
    out = flow(jnp.asarray(X), jnp.asarray(field.reshape(4, -1)))
    i, j = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    for got, image, shift in zip(out, X, field):
        np.testing.assert_allclose(got, by_scipy(image, i + shift[..., 0], j + shift[..., 1]), atol=1e-5)
    coarse = Flow(2.0, grid=3)
    same = jnp.tile(jnp.asarray([1.5, -1.0])[None], (4, 9))
    moved = Affine(0.0, 2.0)(jnp.asarray(X), values(0.0, -1.5, 1.0))
    np.testing.assert_allclose(coarse(jnp.asarray(X), same), moved, atol=1e-5)
    ends = coarse.field(jnp.asarray(RNG.normal(size=(4, 18)), jnp.float32), SHAPE)
    assert ends.shape == (4, 8, 8, 2)
    np.testing.assert_array_equal(resample(jnp.asarray(X), *(jnp.full((4, 8, 8), 20.0),) * 2), 0 * X)


def test_colors_are_those_of_colorsys():
    hue, saturation, value = (np.asarray(v) for v in to_hsv(jnp.asarray(X)))
    want = np.array([colorsys.rgb_to_hsv(*p) for p in X.reshape(-1, 3).astype(np.float64)])
    np.testing.assert_allclose(np.stack([hue, saturation, value], -1).reshape(-1, 3), want, atol=2e-6)
    turned = Hue()(jnp.asarray(X), values(2.0))
    faded = Saturation(0.0, 3.0)(jnp.asarray(X), values(2.5))
    for got, change in ((turned, lambda h, s, v: (h + 2.0 / (2 * np.pi), s, v)), (faded, more)):
        want = np.array([colorsys.hsv_to_rgb(*change(*p)) for p in want_of(X)])
        np.testing.assert_allclose(np.asarray(got).reshape(-1, 3), want, atol=3e-6)
    back = from_hsv(*to_hsv(jnp.asarray(X)))
    np.testing.assert_allclose(back, X, atol=1e-6)
    np.testing.assert_allclose(Brightness()(jnp.asarray(X), values(0.15)), np.clip(X + 0.15, 0, 1), atol=1e-6)
    np.testing.assert_allclose(Contrast()(jnp.asarray(X), values(1.3)), np.clip(X * 1.3, 0, 1), atol=1e-6)


def more(h, s, v):
    return h, min(2.5 * s, 1.0), v


def want_of(x):
    return [colorsys.rgb_to_hsv(*p) for p in x.reshape(-1, 3).astype(np.float64)]


def test_gradients_of_parameters_are_differences():
    with jax.enable_x64(True):
        x = ndimage.gaussian_filter(RNG.uniform(0.2, 0.8, (1, 8, 8, 3)), (0, 2, 2, 0))
        weight = RNG.normal(size=x.shape)
        for component, at in (
            (Affine(), [11.3, 0.4, -1.2]),
            (Hue(), [0.3]),
            (Saturation(), [1.1]),
            (Contrast(), [0.9]),
        ):
            at = jnp.asarray(at)[None]
            f = jax.jit(lambda v, c=component: jnp.sum(weight * c(jnp.asarray(x), v)))
            step = 1e-6 * jnp.eye(at.shape[1])[:, None]
            want = [(f(at + d) - f(at - d)) / 2e-6 for d in step]
            np.testing.assert_allclose(jax.grad(f)(at)[0], want, rtol=1e-5, atol=1e-7)


W = 6 * ndimage.gaussian_filter(RNG.normal(size=(*SHAPE, 5)), (2, 2, 0, 0)).reshape(192, 5).astype(np.float32)


def seen(w, x):
    return jnp.tanh(x.reshape(x.shape[0], -1) - 0.5) @ w


MODEL = Partial(seen, jnp.asarray(W))
IMAGES = ndimage.gaussian_filter(RNG.uniform(0, 1, (12, *SHAPE)), (0, 1, 1, 0)).astype(np.float32)
Y = np.asarray(MODEL(IMAGES)).argmax(-1).astype(np.int32)
run = jax.jit(lambda attack, key, model, x, y, index: attack.run(key, model, x, y, index=index))


def test_the_worst_of_a_grid_is_a_loop_over_it():
    affine = Affine(1.0, 0.1)
    threat, grid = semantic(affine, SHAPE), affine.grid(3, 3, 2)
    assert grid.shape == (18, 3) and set(grid[:, 0]) == {-1, 0, 1} and set(grid[:, 2]) == {-0.1, 0.1}
    x = threat.pack(IMAGES)
    attack = worst_of(threat, grid)
    found = run(attack, KEY, behind(threat, MODEL), x, Y, jnp.arange(12))
    assert isinstance(attack, WorstOf) and isinstance(threat, Semantic) and threat.norm == "semantic"
    all_logits = [MODEL(jnp.asarray(IMAGES))]
    for row in grid.astype(np.float32):
        all_logits.append(MODEL(affine(jnp.asarray(IMAGES), jnp.tile(jnp.asarray(row)[None], (12, 1)))))
    logits = np.asarray(jnp.stack(all_logits))
    own = np.take_along_axis(logits, Y[None, :, None], -1)[..., 0]
    margins = own - np.where(np.eye(5, dtype=bool)[Y][None], -np.inf, logits).max(-1)
    np.testing.assert_allclose(found.score, margins.min(0), atol=1e-4)
    np.testing.assert_array_equal(found.success, (margins < 0).any(0))
    assert 0 < found.success.mean() < 1 and (found.queries == 20).all()
    assert core.feasible(threat, np.asarray(found.x), np.asarray(x)).all()


BOTH = semantic((Contrast(), Affine(10.0, 1.0)), SHAPE, eps=0.5)


def test_a_stored_result_replays_and_verifies():
    x, model = BOTH.pack(IMAGES), behind(BOTH, MODEL)
    np.testing.assert_array_equal(BOTH.images(x), IMAGES)
    found = run(pgd(BOTH, steps=6), KEY, model, x, Y, jnp.arange(12))
    stored, clean = np.asarray(found.x), np.asarray(x)
    assert core.feasible(BOTH, stored, clean).all() and BOTH.contains(found.x, x).all()
    np.testing.assert_array_equal(found.success, np.asarray(MODEL(BOTH.images(stored))).argmax(-1) != Y)
    margin = np.sort(np.asarray(MODEL(IMAGES)), -1)
    assert (found.score < margin[:, -1] - margin[:, -2] - 1e-4).mean() > 0.8  # it searches
    order, (contrast, affine) = BOTH.values(stored)
    np.testing.assert_array_equal(np.sort(order, -1), np.tile([0, 1], (12, 1)))
    share = np.maximum(np.abs(contrast[:, 0] - 1) / 0.3, np.abs(np.asarray(affine) / [10, 1, 1]).max(-1))
    np.testing.assert_allclose(found.size, share, rtol=1e-4)
    assert (np.asarray(found.size) > 0.2).any() and (np.asarray(found.size) < 0.5 + 1e-6).all()
    again = semantic((Contrast(), Affine(10.0, 1.0)), SHAPE, eps=0.5)
    np.testing.assert_array_equal(again.images(stored), BOTH.images(found.x))
    for at, value in ((0, 1.0), (1, 5.0), (2, 1.2), (3, 6.0), (6, 0.123)):  # order twice, no order, ranges, a pixel
        broken = stored.copy()
        broken[:, :2] = [0, 1]
        broken[:, at] = value
        assert not core.feasible(BOTH, broken, clean).any()


def test_rows_live_alone():
    x, model = BOTH.pack(IMAGES), behind(BOTH, MODEL)
    attack, place = pgd(BOTH, steps=6), np.random.default_rng(3).permutation(12)
    whole = run(attack, KEY, model, x, Y, jnp.arange(12))
    mixed = run(attack, KEY, model, x[place], Y[place], jnp.asarray(place))
    np.testing.assert_array_equal(np.asarray(mixed.x)[np.argsort(place)], whole.x)
    other = run(attack, jax.random.key(1), model, x, Y, jnp.arange(12))
    assert (np.asarray(other.x) != np.asarray(whole.x)).any()


def test_the_worst_of_draws_is_never_worse_than_fewer_of_them():
    x, model = BOTH.pack(IMAGES), behind(BOTH, MODEL)
    few, more = (run(worst_of(BOTH, draws=n), KEY, model, x, Y, jnp.arange(12)) for n in (2, 12))
    held = ~np.asarray(few.success)
    assert (np.asarray(more.score) <= np.asarray(few.score))[held].all() and more.success.sum() >= few.success.sum()
    assert core.feasible(BOTH, np.asarray(more.x), np.asarray(x)).all()


def test_projection_and_draws_stay_inside_and_keep_what_is_inside():
    threat = semantic((Hue(), Contrast(), Pixels(0.1)), SHAPE, eps=0.7)
    x = threat.pack(IMAGES)
    keys = core.example_keys(KEY, "draw", jnp.arange(12))
    drawn = threat.sample(keys, x)
    assert core.feasible(threat, np.asarray(drawn), np.asarray(x)).all() and len(np.unique(drawn[:, 3])) == 12
    np.testing.assert_array_equal(threat.project(drawn, x), drawn)
    far = drawn + 10 * jnp.asarray(RNG.normal(size=drawn.shape), jnp.float32)
    assert core.feasible(threat, np.asarray(threat.project(far, x)), np.asarray(x)).all()
    np.testing.assert_array_equal(ranks(jnp.asarray([[2.0, 0.0, 1.0], [0.3, -7.0, 0.1]])), [[2, 0, 1], [2, 0, 1]])
    grad = jnp.asarray(RNG.normal(size=drawn.shape), jnp.float32)
    step = np.asarray(threat.steepest(grad))
    assert not step[:, :3].any() and not step[:, -192:].any()
    np.testing.assert_allclose(np.abs(step[:, 3:5]), np.tile([np.pi, 0.3], (12, 1)), rtol=1e-5)
    np.testing.assert_array_equal(np.sign(step[:, 3:-192]), np.sign(np.asarray(grad)[:, 3:-192]))


@pytest.mark.parametrize(
    ("hue", "contrast", "size"),
    [(1.0, 1.0, 0.5), (-0.25, 1.0, 0.5), (0.0, 1.1, 0.25), (0.0, 0.9, 0.5), (2.0, 0.8, 1.0), (-1.0, 1.0, 2.0)],
)
def test_the_size_is_a_share_of_the_side_that_a_parameter_lies_on(hue, contrast, size):
    threat = semantic((Hue(-0.5, 2.0), Contrast(0.8, 1.4)), SHAPE)
    x = np.asarray(threat.pack(IMAGES[:1]))
    point = x.copy()
    point[0, 2:4] = hue, contrast  # after the order of the two
    np.testing.assert_allclose(threat.size(point, x), size, rtol=1e-5)
    np.testing.assert_array_equal(threat.contains(point, x), size <= 1)
    np.testing.assert_allclose(threat.size(jnp.asarray(point), jnp.asarray(x)), size, rtol=1e-5)


def test_settings_that_make_no_sense_are_refused():
    for wrong, text in (
        (lambda: semantic((), SHAPE), "components"),
        (lambda: semantic(Hue(), SHAPE, eps=1.5), "at most 1"),
        (lambda: semantic(Hue(), (8, 8)), "one image"),
        (lambda: semantic(Hue(), SHAPE).pack(IMAGES[:, :4]), "shape"),
        (lambda: Hue(0.1, 0.2), "must hold 0"),
        (lambda: Affine(-1.0), "degrees"),
        (lambda: Affine().grid(5), "3 parameters"),
        (lambda: Flow(1.0, 1), "grid"),
        (lambda: Pixels(0.0), "eps"),
        (lambda: Hue()(jnp.zeros((4, 8, 8, 1)), values(0.0)), "red, green and blue"),
        (lambda: worst_of(semantic(Hue(), SHAPE), np.zeros((3, 2))), "1 parameters"),
        (lambda: worst_of(semantic(Hue(), SHAPE), draws=0), "draws"),
    ):
        with pytest.raises(ValueError, match=text):
            wrong()


# --------------------------------------------------------------------------------------------------------------- stAdv


def contrast_of_halves(w, x):
    seen = jnp.sum(x * w[None], axis=(1, 2, 3))
    return jnp.stack([seen, -seen], axis=-1)


def test_roughness_counts_each_pair_of_neighbors_twice():
    field = RNG.normal(size=(3, 4, 5, 2)).astype(np.float32)
    want = np.zeros(3)
    for i, j in np.ndindex(4, 5):
        for a, b in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if 0 <= a < 4 and 0 <= b < 5:
                want += np.linalg.norm(field[:, i, j] - field[:, a, b], axis=-1)
    both = jax.jit(jax.value_and_grad(lambda f: jnp.sum(roughness(f))))
    np.testing.assert_allclose(both(field)[0], want.sum(), rtol=1e-5)
    np.testing.assert_array_equal(both(np.ones_like(field))[1], 0)


@pytest.mark.slow
def test_stadv_finds_a_smoother_flow_than_a_search_without_the_penalty():
    shape = (6, 6, 1)
    weight = jnp.asarray(RNG.normal(size=shape), jnp.float32)
    x = np.linspace(0.1, 0.9, 36).reshape(1, *shape).astype(np.float32) * RNG.uniform(0.5, 1, (4, 1, 1, 1)).astype("f")
    threat = semantic(Flow(1.0), shape)
    model = behind(threat, Partial(contrast_of_halves, weight - jnp.sum(weight * x[0]) / jnp.sum(x[0]) + 0.002))
    packed = threat.pack(x)
    y = np.asarray(model(packed)).argmax(-1).astype(np.int32)

    @jax.jit
    def go(attack, packed):
        return attack.run(KEY, model, packed, y)

    def rough(found):
        return np.asarray(roughness(Flow(1.0).field(threat.values(found.x)[1][0], shape)))

    smooth, free = (go(stadv(threat, tau=tau, steps=40), packed) for tau in (0.05, 1e-9))
    assert isinstance(stadv(threat), StAdv) and smooth.success.all() and free.success.all()
    assert (rough(smooth) < rough(free)).all()
    np.testing.assert_array_equal(np.asarray(model(smooth.x)).argmax(-1) != y, True)
    assert threat.contains(np.asarray(smooth.x), np.asarray(packed)).all()
    for bad in ({"tau": 0.0}, {"threat": semantic(Affine(), shape)}):
        with pytest.raises(ValueError, match=r"tau must be finite|must be semantic\(Flow"):
            stadv(**{"threat": threat} | bad)
