"""Few-shot segmentation: exact on one-hot features, averages by hand, losses that vanish, attacks within the budget."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import ndimage

import jaxadv as ja
from benchmarks.claims import framework
from jaxadv.continuous import SolveCfg
from jaxadv.continuous import prototypes as pt

EULER = SolveCfg("euler", "fixed", n_steps=2)


def identity(params, x):
    return x


def one_hot(maps, classes=3):
    return np.eye(classes, dtype=np.float32)[np.asarray(maps)]


def bilinear(x, size):
    """Interpolation at centers of pixels, one axis after the other."""
    for axis, n in zip((1, 2), size):
        m = x.shape[axis]
        at = (np.arange(n) + 0.5) * m / n - 0.5
        rows = np.stack([np.interp(at, np.arange(m), row) for row in np.eye(m)], axis=1)
        x = np.moveaxis(np.tensordot(rows, x, (1, axis)), 0, axis)
    return x


@pytest.fixture(scope="module")
def episode():
    """Two ways, two shots, three queries of 8x8."""
    masks = np.random.default_rng(0).integers(0, 3, (5, 8, 8))
    return pt.Episode(one_hot(masks[:2]), masks[:2], one_hot(masks[2:]), masks[2:])


def test_one_hot_features_are_segmented_exactly(episode):
    logits = jax.jit(lambda s, m, q: pt.proto_segment(identity, None, s, m, q, ways=2))(*episode[:3])
    assert logits.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(logits.argmax(-1), episode.truth)
    one = jax.jit(lambda s, m, q: pt.proto_segment(identity, None, s, m, q))(
        episode.support, episode.masks == 2, episode.query
    )
    np.testing.assert_array_equal(np.asarray(one.argmax(-1)) == 1, episode.truth == 2)


def test_averages_and_scores_by_hand(episode):
    rng = np.random.default_rng(1)
    features, wanted = (
        rng.normal(size=(2, 4, 4, 5)).astype(np.float32),
        rng.normal(size=(3, 4, 4, 5)).astype(np.float32),
    )
    turned = rng.permutation(64)

    @jax.jit
    def run(features, wanted, masks):
        protos = pt.prototypes(features, masks, 2)
        big = jax.image.resize(features, (2, 8, 8, 5), "bilinear")
        shuffled = pt.prototypes(
            big.reshape(2, 64, 5)[:, turned].reshape(2, 8, 8, 5), masks.reshape(2, 64)[:, turned].reshape(2, 8, 8), 2
        )
        averaged = pt.masked_average(features, masks == 1)
        return protos, shuffled, averaged, pt.proto_scores(wanted, protos, (8, 8))

    protos, shuffled, averaged, scores = jax.tree.map(np.asarray, run(features, wanted, episode.masks))
    big = bilinear(features.astype(float), (8, 8))
    mean = lambda m: np.stack([(big[i] * m[i, ..., None]).sum((0, 1)) / (m[i].sum() + 1e-5) for i in range(2)])  # noqa: E731
    np.testing.assert_allclose(averaged, mean(episode.masks == 1), rtol=1e-4, atol=1e-5)
    inside = [mean(episode.masks == way).mean(0) for way in (1, 2)]
    outside = sum(mean(episode.masks != way).mean(0) for way in (1, 2)) / 2
    np.testing.assert_allclose(protos, [outside, *inside], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(shuffled, protos, rtol=1e-4, atol=1e-5)  # order of pixels does not matter
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(
        scores, bilinear(20 * unit(wanted.astype(float)) @ unit(protos).T, (8, 8)), rtol=1e-3, atol=1e-3
    )


def test_losses_vanish_where_they_should_and_are_those_by_hand(episode, key):
    rng = np.random.default_rng(2)
    params = {"w": rng.normal(size=(3, 4)).astype(np.float32)}
    linear = lambda params, x: x @ params["w"]  # noqa: E731
    two, asked = episode.masks % 2, episode.truth % 2
    binary = pt.Episode(*map(jnp.asarray, (one_hot(two, 2), two, one_hot(asked, 2), asked)))

    @jax.jit
    def run(params, episode):
        made = lambda **options: pt.pnode_episode_loss(linear, params, episode, key, ways=2, **options)  # noqa: E731
        clean, _ = pt.pnode_episode_loss(identity, None, binary, key, noise=0.0)
        quiet = made(noise=0.0)[1]["consistency"], made(multiplicative=True)[1]["consistency"]  # of one-hot rows
        alone, _ = made(weights=(0.0, 0.0))
        full, parts = made(weights=(2.0, 3.0))
        protos = pt.prototypes(linear(params, episode.support), episode.masks, 2)
        return clean, quiet, alone, full, parts, protos

    clean, quiet, alone, full, parts, protos = jax.tree.map(np.asarray, run(params, episode))
    assert abs(clean) < 1e-5 and max(map(abs, quiet)) < 1e-5 and parts["consistency"] > 1e-4
    np.testing.assert_allclose(alone, parts["segmentation"], rtol=1e-5)
    np.testing.assert_allclose(full, parts["segmentation"] + 2 * parts["cluster"] + 3 * parts["consistency"], rtol=1e-5)
    features = episode.query @ params["w"]
    away = []
    for image, truth in zip(features, episode.truth):
        cosines = [image[truth == k].mean(0) @ protos[k] / np.linalg.norm(image[truth == k].mean(0))
                   / np.linalg.norm(protos[k]) for k in range(3)]  # fmt: skip
        away.append(1 - np.mean(cosines))
    np.testing.assert_allclose(parts["cluster"], np.mean(away), rtol=1e-4)


def test_pixels_that_are_ignored_do_not_count_and_missing_classes_neither():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 3, 2)), jnp.float32)
    truth = np.random.default_rng(4).integers(0, 2, (2, 3, 3))
    truth[0, 0] = pt.IGNORED
    each = np.asarray(jax.nn.logsumexp(logits, -1)) - np.take_along_axis(
        np.asarray(logits), (truth % 255)[..., None], -1
    ).squeeze(-1)
    np.testing.assert_allclose(
        jax.jit(pt.pixel_cross_entropy)(logits, truth), [each[0, 1:].mean(), each[1].mean()], rtol=1e-5
    )
    protos, empty = jnp.eye(2), jnp.zeros((1, 3, 3), int)
    features = jnp.zeros((1, 3, 3, 2)).at[..., 0].set(2.0)
    ask = jax.jit(lambda f, t, p: (pt.cluster_loss(f, t, p), pt.consistency_loss(f, -f)))
    np.testing.assert_allclose(np.ravel(ask(features, empty, protos)), [0, 2], atol=1e-6)
    assert float(pt.cosine(jnp.zeros(3), jnp.ones(3))) == 0


def test_dice():
    a = np.zeros((4, 2, 4), int)
    b = a.copy()
    a[0, 0], b[0, 0] = 1, 1  # identical
    a[1, 0], b[1, 0, :2], b[1, 1, :2] = 1, 1, 1  # half of each
    a[2, 0] = 1  # nothing found; both empty in the last
    np.testing.assert_allclose(pt.dice(jnp.asarray(a), jnp.asarray(b)), [1, 0.5, 0, 1])


def test_phantoms_are_as_stated(key):
    x, labels = jax.tree.map(np.asarray, jax.jit(partial(pt.phantoms, n=12, size=24))(key))
    assert x.shape == (12, 24, 24, 1) and labels.shape == (12, 24, 24) and labels.dtype == np.int32
    assert x.min() >= 0 and x.max() <= 1 and (x[..., 0][labels == 0]).std() < 0.12
    for organ in range(1, pt.ORGANS + 1):
        assert abs(np.median(x[..., 0][labels == organ]) - (0.3 + 0.15 * organ)) < 0.03
        share = (labels == organ).mean((1, 2))
        assert (share > 0.02).all() and (share < np.pi * 0.22**2 + 0.02).all()


@pytest.mark.slow
def test_an_episode_is_about_its_organs(key):
    drawn = jax.jit(lambda k, organ: pt.sample_episode(k, (organ, 1), shots=2, queries=1, size=16))(key, 3)
    assert drawn.support.shape == (2, 16, 16, 1) and drawn.truth.shape == (1, 16, 16)
    labels = jax.jit(partial(pt.phantoms, n=3, size=16))(key)[1]
    np.testing.assert_array_equal(np.concatenate([drawn.masks, drawn.truth]), (labels == 3) + 2 * (labels == 1))


def test_the_encoder_and_its_residual_form(key):
    net = pt.Encoder((4, 4), layers=1, cfg=EULER)
    params = pt.encoder_init(key, net)
    x = np.random.default_rng(5).uniform(size=(2, 8, 8, 1)).astype(np.float32)

    @jax.jit
    def run(params, x):
        plain = pt.encode(pt.Encoder((4, 4), layers=1, cfg=None), params, x)
        one = pt.encode(pt.Encoder((4, 4), layers=1, cfg=SolveCfg("euler", "fixed", n_steps=1)), params, x)
        return plain, one, pt.encoder_field(params["field"], 0.5, plain)

    plain, one, motion = jax.tree.map(np.asarray, run(params, x))
    np.testing.assert_allclose(plain, one, atol=1e-5)  # one Euler step of length 1
    assert plain.shape == (2, 4, 4, 4) and motion.shape == plain.shape
    np.testing.assert_allclose(motion.reshape(2, 16, 4).mean(1), 0, atol=1e-4)  # a norm ends the field: 4 groups of 1
    assert np.asarray(params["convs"][0]["kernel"]).std() == pytest.approx(np.sqrt(2 / 9), rel=0.5)


@pytest.fixture(scope="module")
def target():
    """A linear segmenter of 6x6 images with three values for each pixel, and what it should say."""
    rng = np.random.default_rng(6)
    truth = rng.integers(0, 2, (3, 6, 6))
    masks = rng.integers(0, 2, (2, 6, 6))
    shift = lambda maps: (0.3 + 0.25 * one_hot(maps, 3) + 0.02 * rng.normal(size=(*maps.shape, 3))).astype(np.float32)  # noqa: E731
    return shift(masks), masks, shift(truth), truth


@pytest.mark.parametrize(
    "kind", ["dag", "bim", *(pytest.param(k, marks=pytest.mark.slow) for k in ("fgsm", "pgd", "smia"))]
)
def test_attacks_keep_to_the_budget_and_lower_what_holds(kind, target, key):
    support, masks, x, truth = target
    threat = ja.linf(0.15)
    model = pt.query_model(identity, None, jnp.asarray(support), jnp.asarray(masks))
    label = truth.reshape(3, -1)
    y: Any = pt.dag_aims(key, jnp.asarray(truth), 2) if kind == "dag" else jnp.asarray(label)
    attack = pt.seg_attack(threat, kind=kind, **({} if kind == "fgsm" else {"steps": 5}))
    clean, found, after = jax.jit(lambda m, x, y: (m(x), (r := attack.run(key, m, x, y)), m(r.x)))(model, x, y)
    assert ja.feasible(threat, np.asarray(found.x), x).all()
    if kind == "dag":
        chosen = np.asarray(y.target) != label
        np.testing.assert_array_equal(chosen, label == 1)
        np.testing.assert_array_equal(np.asarray(y.target)[chosen], 0)
    right = [np.asarray(pt.maps(z, (6, 6), 2)) == truth for z in (clean, after)]
    assert right[0].mean() > 0.99 and right[1][truth == 1].mean() < right[0][truth == 1].mean() - 0.1
    counted = right[1].reshape(3, -1)
    share = counted.mean(1) if kind != "dag" else (counted & chosen).sum(1) / chosen.sum(1)
    np.testing.assert_allclose(found.score, share, atol=1e-6)


def test_losses_of_attacks_by_hand():
    rng = np.random.default_rng(7)
    z, label = rng.normal(size=(2, 4, 3)).astype(np.float32), rng.integers(0, 3, (2, 4))
    aims = pt.Aims(jnp.asarray(label), jnp.asarray((label + [0, 1, 2, 1]) % 3))
    logits = jnp.asarray(z.reshape(2, 12))
    aimed = (np.asarray(aims.target) != label) & (z.argmax(-1) == label)
    at = lambda y: np.take_along_axis(z, np.asarray(y)[..., None], -1)[..., 0]  # noqa: E731
    np.testing.assert_allclose(
        pt.dag_loss(logits, aims), ((at(label) - at(aims.target)) * aimed).sum(1), rtol=1e-5, atol=1e-6
    )
    cross = np.log(np.exp(z).sum(-1)) - at(label)
    np.testing.assert_allclose(pt.minus_pixels(logits, aims.label), -cross.mean(1), rtol=1e-5)
    np.testing.assert_allclose(pt.held(logits, aims.label), (z.argmax(-1) == label).mean(1))
    np.testing.assert_allclose(pt.held(logits, aims), aimed.sum(1) / 3)
    np.testing.assert_allclose(pt.minus_pixels(logits, aims), -cross.mean(1), rtol=1e-5)
    drawn = pt.dag_aims(jax.random.key(1), jnp.asarray(label), 3)
    assert ((np.asarray(drawn.target) == label) == (label == 0)).all()


def linear(params, x):
    return (x[..., :1] * params).reshape(len(x), -1)  # two classes for each pixel


def test_the_stabilized_attack_is_bim_and_a_pull_toward_smooth_perturbations(key):
    """Steps against a loop in NumPy and SciPy, whose gradients are differences."""
    rng = np.random.default_rng(8)
    x, w = rng.uniform(0.3, 0.7, (1, 3, 3, 1)), rng.normal(size=(1, 3, 3, 2))
    y, threat = rng.integers(0, 2, (1, 9)), ja.linf(0.2)

    def log_softmax(point):
        z = point * w
        return z - np.logaddexp(z[..., :1], z[..., 1:])

    def blur(d):
        return ndimage.gaussian_filter(d, (0, 0.5, 0.5, 0), mode="constant", radius=(0, 2, 2, 0))

    def loss(point, alpha):
        p, q = log_softmax(point), log_softmax(x + blur(point - x))
        apart = (np.exp(p) * (p - q)).sum(-1).mean()
        return np.take_along_axis(p.reshape(1, 9, 2), y[..., None], -1).mean() + alpha * apart

    model = jax.tree_util.Partial(linear, jnp.asarray(w, jnp.float32))
    run = jax.jit(lambda attack: attack.run(key, model, jnp.asarray(x, jnp.float32), jnp.asarray(y)))
    ends = {}
    for alpha in (0.0, 30.0):
        made = pt.smia(threat, steps=4, step_size=0.06, alpha=alpha, sigma=0.5, keep="last")
        found, point = run(made), x.copy()
        for _ in range(4):
            slope = np.zeros_like(x)
            for at in np.ndindex(*x.shape):
                e = np.zeros_like(x)
                e[at] = 1e-5
                slope[at] = (loss(point + e, alpha) - loss(point - e, alpha)) / 2e-5
            point = np.clip(x + np.clip(point - 0.06 * np.sign(slope) - x, -0.2, 0.2), 0, 1)
        ends[alpha] = point
        np.testing.assert_allclose(found.x, point, atol=1e-5)
    assert np.abs(ends[0.0] - ends[30.0]).max() > 0.05 and isinstance(made, pt.Stabilized)
    wide = x + rng.normal(size=x.shape)
    np.testing.assert_allclose(pt.blurred(jnp.asarray(wide, jnp.float32), 0.5), blur(wide), atol=1e-5)
    with pytest.raises(ValueError, match="sigma must be"):
        pt.smia(threat, sigma=0.0)


def test_the_support_can_be_attacked_too(target):

    support, masks, x, _ = target
    model = pt.support_model(identity, None, jnp.asarray(masks), jnp.asarray(x[:2]))
    got = jax.jit(lambda m, s: m(s))(model, support)
    each = jax.jit(lambda s, m, q: pt.proto_segment(identity, None, s, m, q))
    for i in range(2):
        want = each(support[i : i + 1], masks[i : i + 1], x[i : i + 1])
        np.testing.assert_allclose(got[i], np.asarray(want).ravel(), rtol=1e-5)
    with pytest.raises(ValueError, match="unknown attack on segmentations 'pdg'"):
        pt.seg_attack(ja.linf(0.1), kind="pdg")
    assert set(pt.SEGMENTATION_ATTACKS) == {"fgsm", "bim", "pgd", "dag", "smia"} and callable(pt.dag)


@pytest.mark.slow
def test_training_on_two_organs_segments_a_third(key):
    net = pt.Encoder((8, 16), layers=1, cfg=EULER)
    encode = partial(pt.encode, net)
    size = {"size": 32, "noise": 0.05}

    def draw(key):
        k_organ, k = jax.random.split(key)
        return pt.sample_episode(k, (jax.random.randint(k_organ, (), 1, pt.ORGANS),), queries=2, **size)

    def loss(params, episode, key):
        return pt.pnode_episode_loss(encode, params, episode, key, weights=(0.0, 0.0))

    params = pt.encoder_init(key, net)
    train = jax.jit(lambda p: pt.meta_train(key, p, loss, draw, optax.adam(3e-3), steps=150))
    trained, values = train(params)
    assert values[-30:].mean() < 0.75 * values[:20].mean()

    @jax.jit
    def score(params, key):
        novel = pt.sample_episode(key, (pt.ORGANS,), queries=8, **size)
        logits = pt.proto_segment(encode, params, *novel[:3])
        return pt.dice(logits.argmax(-1), novel.truth)

    before, after = (np.mean([score(p, jax.random.key(i)) for i in range(3)]) for p in (params, trained))
    assert after > max(0.6, before + 0.1), (before, after)


def test_the_verdict_on_rpnode():
    claim = framework.load("rpnode")

    def judged(worst, known, clean=80.0):
        arms = {"R-PNODE": (worst, known, clean), "residual": (10.0, 20.0, 80.0), "PNODE": (10.0, 20.0, 80.0)}
        given = {}
        for arm, (low, paper, usual) in arms.items():
            what = {"worst case": low, "FGSM": paper, "BIM": paper, "clean": usual}
            given |= {f"{arm}: {name}, Dice %": [v, v + 0.1, v] for name, v in what.items()}
        return claim.verdict(given)[0]

    assert judged(15.0, 30.0) == "holds" and judged(10.0, 30.0) == "holds in part"
    assert judged(15.0, 30.0, 70.0) == "does not hold here" == judged(10.0, 20.0)
