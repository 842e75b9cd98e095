"""Generated data against closed forms."""

import jax
import numpy as np
import pytest
from scipy.stats import norm

from jaxadv import data

GENERATORS = {"gaussians": data.gaussians, "separable_images": data.separable_images, "moons": data.moons}


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_are_functions_of_the_key(name, key):
    make = GENERATORS[name]
    one, same, other = make(key, 50), make(key, 50), make(jax.random.key(1), 50)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    x, y = one.all()
    assert len(one) == 50 and one.name == name and x.dtype == np.float32 and y.dtype == np.int32
    assert x.shape == (50, *one.shape) and one.bounds[0] <= x.min() and x.max() <= one.bounds[1]


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_refuse_raw_keys(name):
    with pytest.raises(Exception, match="key"):
        GENERATORS[name](np.zeros(2, np.uint32), 5)


def test_gaussians_have_the_stated_moments(key):
    n, d, eta, p = 40_000, 8, 0.4, 0.9
    source = data.gaussians(key, n, features=d, eta=eta, probability=p)
    x, y = source.all()
    s = 2.0 * y - 1
    assert source.shape == (d + 1,) and set(np.unique(x[:, 0])) == {-1.0, 1.0}
    far = 5 / np.sqrt(n)  # five standard errors of a unit-variance mean
    assert abs(s.mean()) < far
    assert abs((x[:, 0] == s).mean() - p) < far * np.sqrt(p * (1 - p))
    weak = x[:, 1:] - eta * s[:, None]
    assert np.abs(weak.mean(0)).max() < far
    np.testing.assert_allclose(np.cov(weak.T), np.eye(d), atol=1.5 * far)
    assert np.abs((weak * (x[:, :1] == s[:, None])).mean(0)).max() < far  # independent of the robust coordinate
    assert abs(np.mean(weak**4) - 3) < 5 * np.sqrt(96 / (n * d))


def test_gaussians_robustness_is_at_odds_with_accuracy(key):
    n, d = 40_000, 25
    eta = 3 / np.sqrt(d)
    x, y = data.gaussians(key, n, features=d).all()
    s = 2.0 * y - 1
    mean = x[:, 1:].mean(1)
    for eps in (0.0, eta, 2 * eta):  # the best linf perturbation shifts every coordinate by eps against the label
        accuracy = ((mean - eps * s) * s > 0).mean()
        expected = norm.cdf((eta - eps) * np.sqrt(d))
        assert abs(accuracy - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1e-9
    assert abs(((x[:, 0] - 0.9 * s) * s > 0).mean() - 0.95) < 5 * np.sqrt(0.95 * 0.05 / n)


@pytest.mark.parametrize(
    "classes, shape, gap", [(2, (8, 8, 1), 0.2), (3, (4, 4, 3), 0.5), (5, (5,), 0.05), (2, (2, 2), 1.0)]
)
def test_images_are_separable_with_the_stated_margin(key, classes, shape, gap):
    source = data.separable_images(key, 101, shape=shape, classes=classes, gap=gap)
    x, y = source.all()
    assert np.ptp(np.bincount(y, minlength=classes)) <= 1 and source.bounds == (0.0, 1.0)
    owner = np.arange(np.prod(shape)) % classes
    weights = np.stack([(owner == c) / (owner == c).sum() for c in range(classes)], axis=1)
    scores = x.reshape(len(x), -1).astype(np.float64) @ weights
    own = scores[np.arange(len(y)), y]
    scores[np.arange(len(y)), y] = -np.inf
    margin = own - scores.max(1)
    assert margin.min() >= gap - 1e-6
    # an linf perturbation moves each mean by at most eps: the margin falls by 2 eps, no more
    assert (margin - 2 * (gap / 2 - 1e-4) > 0).all()


def test_the_images_fill_their_ranges(key):
    x, y = data.separable_images(key, 4000, gap=0.2).all()
    own = (np.arange(64) % 2 == y[:, None]).reshape(x.shape)
    for values, (low, high) in ((x[own], (0.6, 1.0)), (x[~own], (0.0, 0.4))):
        assert abs(values.mean() - (low + high) / 2) < 5 * 0.4 / np.sqrt(12 * values.size)
        assert values.min() < low + 1e-3 and values.max() > high - 1e-3


def test_moons_without_noise_lie_on_their_half_circles(key):
    x, y = data.moons(key, 200, noise=0.0).all()
    upper, lower = x[y == 0], x[y == 1] - np.array([1.0, 0.5], np.float32)
    np.testing.assert_allclose(np.linalg.norm(upper, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(lower, axis=1), 1, atol=1e-6)
    assert (upper[:, 1] >= -1e-6).all() and (lower[:, 1] <= 1e-6).all() and len(upper) == len(lower) == 100
    np.testing.assert_allclose(upper.mean(0), [0, 2 / np.pi], atol=5 / 10)


def test_moons_agree_with_scikit_learns(key):
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = data.moons(key, 4000, noise=0.05).all()
    theirs_x, theirs_y = datasets.make_moons(4000, noise=0.05, random_state=0)
    for c in (0, 1):
        np.testing.assert_allclose(x[y == c].mean(0), theirs_x[theirs_y == c].mean(0), atol=5 * 0.75 / np.sqrt(2000))
        np.testing.assert_allclose(np.cov(x[y == c].T), np.cov(theirs_x[theirs_y == c].T), atol=0.06)


@pytest.mark.parametrize(
    "name, bad",
    [
        ("gaussians", {"n": 0}),
        ("gaussians", {"features": 0}),
        ("gaussians", {"eta": 0.0}),
        ("gaussians", {"probability": 0.4}),
        ("separable_images", {"classes": 1}),
        ("separable_images", {"gap": 0.0}),
        ("separable_images", {"shape": (1, 1, 1)}),
        ("moons", {"noise": -0.1}),
        ("moons", {"n": 0}),
    ],
)
def test_settings_out_of_range_are_refused(name, bad, key):
    with pytest.raises(ValueError, match="must"):
        GENERATORS[name](key, **({"n": 5} | bad))
