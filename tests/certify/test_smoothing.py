"""Randomized smoothing against closed forms of linear classifiers, scipy, the published table and exact coverage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.stats import binomtest, norm

from jaxadv import threats
from jaxadv.certify import smoothing
from jaxadv.certify.smoothing import ABSTAIN, Certificate

KEY = jax.random.key(0)


def halves(params, x):
    """Two classes; the margin is `x @ w + b`."""
    w, b = params
    z = x.reshape(x.shape[0], -1) @ w + b
    return jnp.stack([-z, z], -1)


def linear(d=6, b=16, seed=0):
    """A linear classifier, points at known distances from its boundary, their classes and distances."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=d)
    far = np.linspace(-1.2, 1.2, b)
    x = rng.normal(size=(b, d))
    x += np.outer(far - (x @ w) / np.linalg.norm(w), w / np.linalg.norm(w))
    model = Partial(halves, (jnp.asarray(w, jnp.float32), jnp.float32(0)))
    return model, jnp.asarray(x, jnp.float32), (far > 0).astype(np.int32), np.abs(far)


@pytest.mark.parametrize(
    ("k", "n", "alpha", "bound", "share"),
    [
        (100, 100, 0.001, 0.9332543008, 1.500475),
        (1000, 1000, 0.001, 0.9931160484, 2.463263),
        (990, 1000, 0.001, 0.9760361872, 1.978010),
        (99_000, 100_000, 0.001, 0.9889893404, 2.290000),
        (100_000, 100_000, 0.001, 0.9999309248, 3.811457),
        (51_000, 100_000, 0.001, 0.5051093492, 0.012808),
        (10, 10, 0.05, 0.7411344491, 0.646847),
    ],
)
def test_the_bound_is_the_published_one(k, n, alpha, bound, share):
    found = smoothing.clopper_pearson_lower(k, n, alpha)
    assert found == pytest.approx(bound, abs=1e-9)
    assert norm.ppf(found) == pytest.approx(share, abs=2e-6)
    two_sided = binomtest(k, n).proportion_ci(1 - 2 * alpha, method="exact").low
    assert found == pytest.approx(two_sided, abs=1e-9)


def test_the_bound_is_exact_at_both_ends_and_rises():
    found = smoothing.clopper_pearson_lower(np.arange(51), 50, 0.01)
    assert found[0] == 0 and found[-1] == pytest.approx(0.01 ** (1 / 50)) and (np.diff(found) > 0).all()
    assert found[1] == pytest.approx(1 - 0.99 ** (1 / 50))


def test_the_bound_holds_as_often_as_it_says():
    """Over all counts, weighted by their probability: exact, not simulated."""
    from scipy.stats import binom

    n, alpha = 60, 0.05
    lower = smoothing.clopper_pearson_lower(np.arange(n + 1), n, alpha)
    for p in (0.1, 0.5, 0.77, 0.95, 0.999):
        wrong = binom.pmf(np.arange(n + 1), n, p)[lower > p].sum()
        assert wrong <= alpha
    assert max(binom.pmf(np.arange(n + 1), n, p)[lower > p].sum() for p in np.linspace(0.05, 0.99, 500)) > 0.8 * alpha


def test_stored_tables_are_rounded_down_and_abstain_where_they_should():
    exact = smoothing.clopper_pearson_lower(np.arange(1001), 1000, 0.001)
    lower, share = smoothing._bounds(1000, 0.001)
    assert lower.dtype == share.dtype == np.float32
    assert (lower.astype(np.float64) <= exact).all() and np.abs(lower - exact).max() < 1e-7
    sure = exact >= 0.5
    assert ((share >= 0) == sure).all() and (share[sure].astype(np.float64) <= norm.ppf(exact[sure])).all()
    first = smoothing._bounds(100_000, 0.001)[1]
    assert np.flatnonzero(first >= 0)[0] == 50_490


def test_prediction_needs_the_votes_of_the_binomial_test():
    fewest = smoothing._fewest(100, 0.001)
    assert fewest[100] == 67  # 66 of 100 has p = .0018, 67 of 100 p = .00087
    for total in (0, 1, 9, 11, 40, 77, 99):
        sure = [k for k in range(-(-total // 2), total + 1) if total and binomtest(k, total).pvalue <= 0.001]
        assert fewest[total] == (sure[0] if sure else total + 1) or (not sure and fewest[total] > total)


def test_noise_belongs_to_the_example_and_not_to_the_batch():
    model, x, _, _ = linear()
    settings = {"sigma": 0.5, "n": 37}
    whole = smoothing.sample_counts(KEY, model, x, batch_size=1000, **settings)
    np.testing.assert_array_equal(whole.sum(-1), 37)
    assert len({tuple(r) for r in np.asarray(whole).tolist()}) > 3
    for size in (16 * 5, 16 * 36):
        np.testing.assert_array_equal(whole, smoothing.sample_counts(KEY, model, x, batch_size=size, **settings))
    order = np.random.default_rng(0).permutation(16)
    moved = smoothing.sample_counts(KEY, model, x[order], index=order, **settings)
    np.testing.assert_array_equal(np.asarray(whole)[order], moved)
    other = smoothing.sample_counts(KEY, model, x, stage=1, **settings)
    assert (np.asarray(other) != np.asarray(whole)).any()  # a fresh sample


def test_the_radius_of_a_linear_classifier_is_its_margin():
    model, x, y, far = linear()
    sigma, n = 0.5, 20_000
    found = jax.jit(lambda x: smoothing.certify(KEY, model, x, sigma=sigma, n=n, batch_size=8000))(x)
    label, radius = np.asarray(found.label), np.asarray(found.radius, np.float64)
    sure = label != ABSTAIN
    assert sure.sum() >= 14 and (label[sure] == y[sure]).all() and (radius[~sure] == 0).all()
    assert (radius <= far + 1e-6).all()
    # the bound lies about 3.1 standard errors below the truth
    p = norm.cdf(far / sigma)
    near = sigma * norm.ppf(np.clip(p - 7 * np.sqrt(p * (1 - p) / n) - 10 / n, 1e-9, 1))
    assert (radius[sure] >= near[sure] - 1e-6).all()
    exact = smoothing.clopper_pearson_lower(np.asarray(found.counts)[np.arange(16), y], n, 0.001)
    np.testing.assert_allclose(radius[sure], sigma * norm.ppf(exact[sure]), rtol=1e-6)
    np.testing.assert_allclose(found.p_lower, np.where(sure, exact, found.p_lower), rtol=1e-6)
    said = np.asarray(jax.jit(lambda x: smoothing.predict(KEY, model, x, sigma=sigma, n=500))(x))
    assert (said[said != ABSTAIN] == y[said != ABSTAIN]).all() and (said != ABSTAIN)[[0, -1]].all()


def test_a_certain_classifier_gets_the_largest_radius_and_an_even_one_none():
    def sure(x):
        return jnp.broadcast_to(jnp.asarray([0.0, 1.0, 0.0])[None], (x.shape[0], 3))

    x = jnp.full((4, 3), 0.5)
    found = smoothing.certify(KEY, Partial(sure), x, sigma=0.25, n0=10, n=100)
    np.testing.assert_array_equal(found.label, 1)
    np.testing.assert_allclose(found.radius, 0.25 * 1.500475, rtol=1e-5)
    model = Partial(halves, (jnp.ones(3), jnp.float32(-1.5)))  # the boundary runs through x
    even = smoothing.certify(KEY, model, x, sigma=0.25, n0=10, n=100)
    assert (np.asarray(even.label) == ABSTAIN).all() and not np.asarray(even.radius).any()
    assert (np.asarray(smoothing.predict(KEY, model, x, sigma=0.25, n=100)) == ABSTAIN).all()


def test_the_sample_that_chooses_is_not_the_sample_that_bounds():
    """On the boundary the class that one sample prefers often has the minority in another one, never in its own."""
    model = Partial(halves, (jnp.ones(3), jnp.float32(-1.5)))
    found = smoothing.certify(KEY, model, jnp.full((60, 3), 0.5), sigma=0.25, n0=101, n=101)
    least = smoothing.clopper_pearson_lower(51, 101, 0.001)
    assert 0.2 < np.mean(np.asarray(found.p_lower) < least - 1e-6) < 0.8
    fresh = smoothing.sample_counts(KEY, model, jnp.full((60, 3), 0.5), sigma=0.25, n=101, stage=1)
    np.testing.assert_array_equal(found.counts, fresh)


def test_logits_that_are_not_finite_vote_for_none():
    def sick(x):
        z = jnp.where(x[:, :1] > 0.5, jnp.nan, 1.0)
        return jnp.concatenate([z, 0 * z], -1)

    counts = np.asarray(smoothing.sample_counts(KEY, Partial(sick), jnp.full((2, 3), 0.5), sigma=1.0, n=200))
    assert (counts.sum(-1) < 130).all() and (counts.sum(-1) > 70).all() and (counts[:, 1] == 0).all()


def test_metrics_count_abstentions_as_wrong():
    found = Certificate(
        jnp.asarray([1, ABSTAIN, 0, 2]), jnp.asarray([0.5, 0.0, 0.3, 0.1]), jnp.ones(4), jnp.zeros((4, 3), jnp.int32)
    )
    y = np.asarray([1, 2, 0, 0])
    np.testing.assert_allclose(smoothing.certified_accuracy(found, y, [0.0, 0.3, 0.4, 1.0]), [0.5, 0.5, 0.25, 0])
    assert smoothing.average_certified_radius(found, y) == pytest.approx(0.2)
    surprise = np.log(1000)
    want = 0.6 - 0.001 - np.sqrt(0.001 * 0.999 * surprise / 500) - surprise / 1500
    assert smoothing.guaranteed_accuracy(0.6, 500) == pytest.approx(want)


def test_the_model_under_attack_is_the_average_over_noise():
    model, x, y, far = linear()
    soft = smoothing.smoothed(KEY, model, sigma=0.5, n=256)
    logits = np.asarray(soft(x))
    np.testing.assert_allclose(np.exp(logits).sum(-1), 1, rtol=1e-4)
    noise = np.stack([jax.random.normal(jax.random.fold_in(KEY, i), (6,)) for i in range(256)]) * 0.5
    drawn = np.asarray(jax.nn.softmax(jax.vmap(lambda e: model(x + e[None]))(noise))).mean(0)
    np.testing.assert_allclose(np.exp(logits), drawn, rtol=1e-4)
    hard = np.asarray(smoothing.smoothed(KEY, model, sigma=0.5, n=256, votes=True)(x))
    wins = np.asarray(halves(model.args[0], (x[:, None] + noise[None]).reshape(-1, 6)).argmax(-1)).reshape(16, 256)
    np.testing.assert_allclose(hard[:, 1], wins.mean(-1), atol=1e-6)
    assert (logits.argmax(-1) == y)[far > 0.3].all()
    grad = jax.grad(lambda x: soft(x)[:, 1].sum())(x)
    w = np.asarray(model.args[0][0])
    cosine = grad @ w / np.linalg.norm(grad, axis=1) / np.linalg.norm(w)
    assert (np.asarray(cosine) > 0.99).all()
    one, two = (smoothing.smoothed(KEY, model, sigma=0.5, n=7) for _ in range(2))
    assert jax.tree.structure(one) == jax.tree.structure(two)  # no new program for new weights


def test_the_certificate_speaks_of_the_smoothed_model_and_of_l2():
    model, x, y, far = linear()
    certified = smoothing.certificate(n=4000)
    index = np.arange(16)
    g = smoothing.smoothed(KEY, model, sigma=0.5)
    holds = np.asarray(certified(KEY, g, np.asarray(x), y, threats.l2(0.4, (-10.0, 10.0)), index))
    assert holds.dtype == bool and holds.shape == (16,)
    assert not holds[far < 0.4].any() and holds[far > 0.55].all()
    assert not np.asarray(certified(KEY, g, x, 1 - y, threats.l2(0.1, (-10.0, 10.0)), index)).any()
    own = threats.l2(jnp.where(jnp.arange(16) < 8, 0.01, 5.0), (-10.0, 10.0))
    assert not np.asarray(certified(KEY, g, x, y, own, index))[8:].any()
    with pytest.raises(ValueError, match=r"needs a model made by smoothing.smoothed.*not of the base"):
        certified(KEY, model, x, y, threats.l2(0.4), index)
    with pytest.raises(ValueError, match="certifies l2 balls; got linf"):
        certified(KEY, g, x, y, threats.linf(0.4), index)


def test_settings_are_checked():
    model, x, _, _ = linear()
    for settings, words in (
        ({"alpha": 0.0}, r"alpha must lie in \(0, 1\)"),
        ({"n": 0}, "n must be a whole number"),
        ({"sigma": -1.0}, "sigma must be finite and greater than 0"),
    ):
        with pytest.raises(ValueError, match=words):
            smoothing.certify(KEY, model, x, **{"sigma": 0.5, "n": 10} | settings)
    with pytest.raises(ValueError, match="n must be"):
        smoothing.smoothed(KEY, model, sigma=0.5, n=0)
