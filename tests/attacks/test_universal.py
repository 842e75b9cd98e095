"""Universal perturbations and patches: the algorithm written out in NumPy, a linear optimum, SciPy's warp, shards."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.tree_util import Partial
from scipy.ndimage import affine_transform

from jaxadv import core
from jaxadv.attacks import UNIVERSAL, Found, Placement, patch, patched, survival, universal, universal_gradient
from jaxadv.attacks.universal import Patch, Universal, UniversalDeepFool, UniversalGradient
from jaxadv.core import Targets
from jaxadv.losses import margin
from jaxadv.threats import l0, l1, l2, linf

KEY = jax.random.key(0)


@jax.jit
def go(search, model, x, y):
    return search.run(KEY, model, x, y)


def linear(w, x):
    return (x.reshape(x.shape[0], -1) - 0.5) @ w


def problem(n=8, b=7, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(n, classes)).astype(np.float32)
    x = rng.uniform(0.4, 0.6, (b, n)).astype(np.float32)
    return Partial(linear, jnp.asarray(w)), x, linear(w, x).argmax(-1).astype(np.int32), w


def needed(w, start, label, norm):
    """DeepFool on a linear model, ten steps: what moves a point out of its class."""
    total = np.zeros_like(start)
    for _ in range(10):
        z = (start + 1.02 * total - 0.5) @ w
        if z.argmax() != label:
            return 1.02 * total
        slopes, gaps = w - w[:, [label]], z[label] - z
        dual = np.linalg.norm(slopes, 2 if norm == "l2" else 1, axis=0)
        away = np.where(dual > 0, gaps / np.maximum(dual, 1e-12), np.inf)
        k = away.argmin()
        unit = slopes[:, k] / dual[k] if norm == "l2" else np.sign(slopes[:, k])
        total = total + (away[k] + 1e-4) * unit
    return np.zeros_like(start)


@partial(jax.jit, static_argnums=(1, 2))
def draws(epoch, lanes, length):
    keys = jax.vmap(lambda lane: jax.random.fold_in(jax.random.fold_in(KEY, epoch), lane))(jnp.arange(lanes))
    return jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)


def by_hand(w, x, labels, eps, norm, lanes, epochs):
    """Algorithm 1 with minibatches of one row from each lane."""
    change, rates, length = np.zeros(x.shape[1]), [], -(-len(x) // lanes)
    best, x = change, x.astype(np.float64)
    for epoch in range(epochs):
        orders = np.asarray(draws(epoch, lanes, length)).argsort(axis=-1)
        for turn in range(length):
            places = [lane * length + orders[lane][turn] for lane in range(lanes)]
            change = change + sum(needed(w, x[i] + change, labels[i], norm) for i in places if i < len(x))
            size = np.linalg.norm(change)
            change = np.clip(change, -eps, eps) if norm == "linf" else change * min(1, eps / max(size, 1e-12))
        rates.append(np.mean(((x + change - 0.5) @ w).argmax(-1) != labels))
        best = change if rates[-1] == max(rates) and rates[-1] > max(rates[:-1], default=-1) else best
    return best, rates


@pytest.mark.parametrize("norm", ["l2", pytest.param("linf", marks=pytest.mark.slow)])
def test_on_a_linear_model_it_is_the_published_algorithm(norm):
    """Seven rows in two lanes: one place of the second lane is padding, and must not count."""
    model, x, y, w = problem(seed=8)  # where counting the padding would change the answer
    threat = {"l2": l2, "linf": linf}[norm]({"l2": 0.06, "linf": 0.02}[norm])
    found = go(universal(threat, epochs=2, goal=1.0, batch_size=2), model, x, y)
    want, rates = by_hand(w.astype(np.float64), x, y, float(threat.eps), norm, 2, 2)
    np.testing.assert_allclose(found.change, want, atol=2e-6)
    np.testing.assert_allclose(found.rates, rates, atol=1e-6)
    assert 0 < max(rates) < 1 and np.linalg.norm(want) > 0.03
    moved = np.asarray(UniversalDeepFool.put(universal(threat), found.change, jnp.asarray(x)))
    assert core.feasible(threat, moved, x).all()
    np.testing.assert_array_equal(found.fooled, np.asarray(model(moved)).argmax(-1) != y)
    assert abs(found.rate - np.mean(np.asarray(found.fooled))) < 1e-6 and isinstance(found, Found)


def test_gradients_find_the_optimum_of_a_linear_model_and_stop_at_the_goal():
    model, x, y, w = problem(b=60)
    mine = x[y == 0][:9]  # of one class: one direction is best for all
    labels = np.zeros(9, np.int32)
    search = universal_gradient(l1(0.1), batch_size=4, epochs=4, goal=0.5, loss=margin, floor=-1e9)
    aimed = go(search, model, mine, Targets(labels, labels + 2))
    slope = w[:, [2]] - w[:, [0, 1]]
    gaps = linear(w, mine)[:, :2] - linear(w, mine)[:, 2:]
    hit = ((gaps - np.abs(0.1 * slope[np.abs(slope[:, 0]).argmax()])[None]) < 0).all(-1)
    assert np.abs(np.asarray(aimed.change)).sum() <= 0.1 + 1e-6 and aimed.rate >= hit.mean() - 1e-6
    np.testing.assert_array_equal(aimed.fooled, linear(w, mine + np.asarray(aimed.change)).argmax(-1) == 2)
    np.testing.assert_array_equal(aimed.wrong, linear(w, mine + np.asarray(aimed.change)).argmax(-1) != 0)
    two = Partial(linear, jnp.asarray(w[:, :2]))
    mine = x[linear(w[:, :2], x).argmax(-1) == 0][:9]
    found = go(
        universal_gradient(linf(0.03), batch_size=4, epochs=2, step_size=0.02, loss=margin, floor=-1e9),
        two,
        mine,
        labels,
    )
    np.testing.assert_allclose(found.change, 0.03 * np.sign(w[:, 1] - w[:, 0]), atol=1e-6)
    want = np.mean(linear(w[:, :2], mine + np.asarray(found.change)).argmax(-1) != 0)
    np.testing.assert_allclose(found.rate, want, atol=1e-6)
    early = np.asarray(aimed.rates) >= 0.5
    assert early.any() and np.isnan(np.asarray(aimed.rates)[early.argmax() + 1 :]).all()


# --------------------------------------------------------------------------------------------------------------- patch


def shapes(w, x):
    return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ w[0]) @ w[1]


def pictures(b=16, side=8, classes=4):
    rng = np.random.default_rng(1)
    w = [jnp.asarray(rng.normal(size=s) / 2, jnp.float32) for s in ((side * side, 12), (12, classes))]
    x = rng.uniform(0.3, 0.7, (b, side, side, 1)).astype(np.float32)
    return Partial(shapes, w), x, np.asarray(shapes(w, x)).argmax(-1).astype(np.int32)


lay_all = jax.jit(Placement.__call__)


def warped(plane, matrix, offset):
    """SciPy drops to zero at the middle of the last pixel, we one pixel beyond: hence the padding."""
    return affine_transform(np.pad(np.float64(plane), 4), matrix, offset + 4, (9, 12), order=1)


def test_a_patch_lies_as_scipy_lays_it():
    rng = np.random.default_rng(2)
    sheet = rng.uniform(size=(5, 5, 2)).astype(np.float32)
    x = rng.uniform(size=(6, 9, 12, 2)).astype(np.float32)
    lay = patch(linf(1.0), 5, mask=rng.uniform(0.5, 1, (5, 5)), scale=(0.4, 0.9), degrees=70).placement
    keys = jax.random.split(KEY, 6)
    got = np.asarray(lay_all(lay, sheet, x, keys))
    for image, key, seen in zip(x, keys, got):
        u = np.asarray(jax.random.uniform(key, (4,)), np.float64)
        length, angle = (0.4 + 0.5 * u[0]) * 9, np.deg2rad(70 * (2 * u[1] - 1))
        middle = np.array([(length - 1) / 2 + (9 - length) * u[2], (length - 1) / 2 + (12 - length) * u[3]])
        matrix = 5 / length * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        offset = 2 - matrix @ middle

        cover = warped(lay.mask, matrix, offset)
        layers = [warped(sheet[..., i] * lay.mask, matrix, offset) for i in (0, 1)]
        want = image * (1 - cover[..., None]) + np.stack(layers, -1)
        np.testing.assert_allclose(seen, want, atol=1e-5)
    whole = patch(linf(1.0), 5, mask=np.eye(5), scale=(1.0, 1.0), degrees=0.0).placement
    square = np.asarray(lay_all(whole, sheet, x[:, :5, :5], keys))
    want = np.where(np.eye(5)[..., None] > 0, sheet, x[:, :5, :5])
    np.testing.assert_allclose(square, want, atol=1e-6)


@pytest.fixture(scope="module")
def stuck():
    model, x, y = pictures()
    search = patch(linf(1.0), 4, scale=(0.4, 0.6), epochs=4, batch_size=4, step_size=0.2)
    return model, x, y, search, go(search, model, x, y)


def test_a_patch_fools_from_draws_it_never_met_and_gray_does_not(stuck):
    model, x, y, search, found = stuck
    assert isinstance(search, Patch) and found.change.shape == (4, 4, 1)
    assert 0 <= found.change.min() and found.change.max() <= 1
    assert np.nanmax(np.asarray(found.rates)) > 0.2 and found.rates.shape == (4,)

    @jax.jit
    def fresh(change):
        return 1 - survival(jax.random.key(5), patched(model, change, search.placement), x, y, samples=50)

    fooled, gray = np.asarray(fresh(found.change)), np.asarray(fresh(jnp.full((4, 4, 1), 0.5)))
    assert fooled.mean() > gray.mean() + 0.1
    assert abs(fooled.mean() - found.rate) < 3 * np.sqrt(0.25 / 16)


def sharded(search, model, x, y):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    one, rows = PartitionSpec(), PartitionSpec("data")

    def part(x, y):
        return search.run(KEY, model, x, y, axis_name="data")

    spread = jax.shard_map(part, mesh=mesh, in_specs=rows, out_specs=Found(one, one, one, rows, rows))
    return jax.device_get(jax.jit(spread)(x, y))


def check_shards(got, whole):
    np.testing.assert_allclose(got.change, whole.change, atol=1e-5)
    np.testing.assert_allclose(got.rates, whole.rates, atol=1e-6)
    np.testing.assert_array_equal(got.fooled, whole.fooled)
    np.testing.assert_array_equal(got.wrong, whole.wrong)
    assert got.rate == whole.rate


def test_two_shards_find_the_patch_that_one_device_finds(stuck):
    model, x, y, search, whole = stuck
    check_shards(sharded(search, model, x, y), whole)
    with pytest.raises(ValueError, match="multiple of the number of shards; got 3 for 2 shards. Take 2"):
        sharded(patch(linf(1.0), 4, batch_size=3), model, x, y)


@pytest.mark.slow
@pytest.mark.parametrize("build", [universal, universal_gradient])
def test_two_shards_find_the_perturbation_that_one_device_finds_and_it_beats_noise(build):
    model, x, y = pictures(b=32)
    search = build(linf(0.1), batch_size=4, epochs=4, goal=1.0)
    whole = go(search, model, x, y)
    check_shards(sharded(search, model, x, y), whole)
    signs = np.random.default_rng(3).choice([-0.1, 0.1], (20, *x.shape[1:])).astype(np.float32)
    noise = [np.mean(np.asarray(model(x + sign)).argmax(-1) != y) for sign in signs]
    assert whole.rate > max(noise)
    np.testing.assert_array_equal(whole.change, go(search, model, x, y).change)


def test_the_table_and_what_is_refused():
    assert UNIVERSAL == {"universal": universal, "universal_gradient": universal_gradient, "patch": patch}
    assert all(isinstance(build(linf(0.1)), Universal) for build in UNIVERSAL.values())
    assert isinstance(universal_gradient(l2(0.1)), UniversalGradient)
    model, x, y, _ = problem()
    for build, bad, words in (
        (universal, {"goal": 0.0}, "goal must be a share"),
        (universal, {"epochs": 0}, "epochs must be a whole number"),
        (universal_gradient, {"decay": 1.0}, "decay must be a share"),
        (universal_gradient, {"step_size": 0.0}, "step_size must be finite and greater than 0"),
        (patch, {"scale": (0.5, 0.2)}, "smallest <= largest"),
        (patch, {"degrees": -1.0}, "degrees must be finite"),
        (patch, {"side": 0}, "side must be a whole number"),
        (patch, {"mask": np.ones((3, 4))}, r"mask must be \[8, 8\]"),
        (patch, {"mask": np.zeros((8, 8))}, "not all zero"),
    ):
        with pytest.raises(ValueError, match=words):
            build(linf(0.1), **bad)
    with pytest.raises(ValueError, match="norm ball linf or l2 for universal; got l0"):
        universal(l0(3.0))
    with pytest.raises(ValueError, match="bounds must be numbers"):
        patch(linf(0.1, bounds=(np.zeros(3), np.ones(3))))
    with pytest.raises(ValueError, match="aims at no class"):
        universal(linf(0.1)).run(KEY, model, x, Targets(y, y))
    with pytest.raises(ValueError, match="needs images"):
        patch(linf(0.1)).run(KEY, model, x, y)
    with pytest.raises(ValueError, match="one label for each of the 7 examples"):
        universal(linf(0.1)).run(KEY, model, x, y[:5])
    with pytest.raises(ValueError, match="one dataset index"):
        universal(linf(0.1)).run(KEY, model, x, y, index=y[:5])
