"""LADDER: separators against mean differences and scikit-learn, exact rises of the score, a linear autoencoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.svm import LinearSVC

from jaxadv import attacks, losses, models, threats, train
from jaxadv.train import latent

MIX = 0.3


def gaussians(n=60, d=12, classes=3, seed=0):
    """Latents of classes around means of their own, one deviation wide."""
    rng = np.random.default_rng(seed)
    means, y = 3 * rng.normal(size=(classes, d)), np.arange(n * classes, dtype=np.int32) % classes
    return (means[y] + rng.normal(size=(len(y), d))).astype(np.float32), y, means


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("attend", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_separator_points_from_mean_to_mean_as_that_of_scikit_learn(key, attend):
    """Between Gaussians of one width the best direction is known; attention hardly changes it."""
    z, y, means = gaussians()
    got = latent.separators(key, z, y, classes=3, attend=attend, epochs=40, rate=0.02)
    assert got.weight.shape == (3, 12) and (got.mix is None) != attend
    for place, (s, t) in enumerate(((0, 1), (0, 2), (1, 2))):
        one = jax.tree.map(lambda leaf, place=place: leaf[place], got)
        two, side = z[(y == s) | (y == t)], np.where(y[(y == s) | (y == t)] == t, 1, -1)
        settings = {"loss": "hinge", "dual": True, "max_iter": 100_000, "intercept_scaling": 30}  # a free bias
        peer = LinearSVC(C=0.01 * 12 / 2 / len(two), **settings).fit(two * np.exp(1 / 12), side)  # the same problem
        assert cosine(one.weight, means[t] - means[s]) > 0.95 and cosine(one.weight, peer.coef_[0]) > 0.97
        np.testing.assert_allclose(np.linalg.norm(one.weight), np.linalg.norm(peer.coef_), rtol=0.08)
        assert np.mean(np.sign(latent.score(one, jnp.asarray(two))) == side) > 0.99


def test_the_attention_lies_between_one_and_e_and_without_a_mix_it_is_constant():
    rng = np.random.default_rng(0)
    w, z = rng.normal(size=5).astype(np.float32), jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    still = latent.Separator(w, np.float32(0.2), np.zeros((5, 5), np.float32), np.zeros(5, np.float32))
    np.testing.assert_allclose(latent.attention(still, z), np.exp(0.2), rtol=1e-6)
    np.testing.assert_allclose(latent.attention(still._replace(mix=None, shift=None), z), np.exp(0.2), rtol=1e-6)
    alive = still._replace(mix=rng.normal(size=(5, 5)).astype(np.float32))
    a = np.tanh(np.asarray(z) @ alive.mix)
    a = np.exp(np.exp(a) / np.exp(a).sum(-1, keepdims=True))
    np.testing.assert_allclose(latent.attention(alive, z), a, rtol=1e-5)
    np.testing.assert_allclose(latent.score(alive, z), (np.asarray(z) * a) @ w + 0.2, rtol=1e-4)


def linear(matrix, z):
    return z.reshape(len(z), -1) @ matrix


def constant(name, x):
    return jnp.tile(name[None], (len(x), 1)) + 0 * x.reshape(len(x), -1)[:, :1]


@pytest.fixture
def climbed():
    """A linear autoencoder with orthonormal latents, and separators of four classes."""
    rng = np.random.default_rng(2)
    basis = jnp.asarray(np.linalg.qr(rng.normal(size=(9, 5)))[0], jnp.float32)
    parts = ((6, 5), (6,), (6, 5, 5), (6, 5))
    svm = latent.Separator(*(jnp.asarray(rng.normal(size=s) * MIX, jnp.float32) for s in parts))
    x, y = jnp.asarray(rng.uniform(-2, 2, (8, 3, 3, 1)), jnp.float32), jnp.arange(8) % 4
    return models.pure(linear, basis), models.pure(linear, basis.T), svm, x, y


def test_with_a_linear_autoencoder_the_move_is_known(climbed, key):
    """x' - g(φ(x)) = ± eps D (a * w), towards the drawn class; and each pair finds its separator."""
    encoder, decoder, svm, x, y = climbed
    still = svm._replace(mix=None, shift=None)
    sure = models.pure(constant, jnp.zeros(4))  # says 0
    pairs = list(zip(*np.triu_indices(4, 1)))
    for separators in (svm, still):
        attack = train.climb(encoder, decoder, separators, eps=0.7, bounds=(-9.0, 9.0))
        found = jax.jit(attack.run)(key, sure, x, y)
        z = encoder(x)
        gap = (np.asarray(found.x) - np.asarray(decoder(z)).reshape(x.shape)).reshape(8, -1) @ encoder.args[0]
        for row, label in enumerate(np.asarray(y)):
            ways = {}
            for place, (s, t) in enumerate(pairs):
                if label in (s, t):
                    one = jax.tree.map(lambda leaf, place=place: leaf[place], separators)
                    a = latent.attention(one, z[row][None])[0]
                    ways[int(s + t - label)] = (1 if label == s else -1) * a * one.weight
                    if separators is still:  # the score rises by exactly eps |a * w|^2
                        rise = latent.score(one, (z[row] + 0.7 * a * one.weight)[None]) - latent.score(
                            one, z[row][None]
                        )
                        np.testing.assert_allclose(rise, 0.7 * jnp.sum((a * one.weight) ** 2), rtol=1e-4)
            errors = [float(np.abs(gap[row] - 0.7 * way).max()) for way in ways.values()]
            assert min(errors) < 1e-5 and sorted(errors)[1] > 1e-2
        np.testing.assert_array_equal(found.success, np.asarray(y) != 0)


def test_a_climb_ends_where_the_model_fails_and_stays_in_the_bounds(climbed, key):
    encoder, decoder, svm, x, y = climbed
    x = x / 4 + 0.5
    sees = models.pure(lambda w, x: jnp.tanh(x.reshape(len(x), -1) @ w) * 9, encoder.args[0][:, :4])
    y = jnp.argmax(sees(x), -1)
    rungs = (0.05, 0.5, 2.0, 8.0, 30.0)
    go = jax.jit(lambda attack: attack.run(key, sees, x, y))
    run = lambda eps: go(train.climb(encoder, decoder, svm, eps=eps, unit=True))  # noqa: E731
    got, singles = run(rungs), [run(eps) for eps in rungs]
    broken = np.stack([np.asarray(one.success) for one in singles])
    rung = np.where(broken.any(0), broken.argmax(0), len(rungs) - 1)
    assert len(set(rung)) > 2
    np.testing.assert_array_equal(got.queries, rung + 2)
    for row, place in enumerate(rung):
        np.testing.assert_allclose(got.x[row], singles[place].x[row], atol=1e-6)
    assert float(got.x.min()) >= 0 and float(got.x.max()) <= 1 and bool((got.size <= 1).all())
    step = encoder(singles[0].x) - encoder(decoder(encoder(x)).reshape(x.shape))
    inside = np.asarray((singles[0].x > 0) & (singles[0].x < 1)).all((1, 2, 3))
    np.testing.assert_allclose(np.linalg.norm(step, axis=-1)[inside], 0.05, rtol=1e-3)


def test_a_decoder_is_trained_by_the_objective(kit, key):
    source, net = kit.blobs(), kit.mlp(widths=(16,))
    encoder = models.features(net, at="layers.1:in")
    x, _ = source.all()
    first = net.params["layers"]["0"]
    want = jax.nn.relu(x.reshape(len(x), -1) @ first["kernel"] + first["bias"][None])
    np.testing.assert_allclose(encoder(x), want, atol=1e-5)
    decoder = models.create("mlp", key, shape=(16,), classes=16, widths=())
    batch = {"x": jnp.asarray(x), "y": jnp.zeros(len(x), jnp.int32)}
    for power, norm in ((1, "l1"), (2, "l2")):
        loss, (_, metrics) = latent.reconstruction(encoder, norm=norm)(
            decoder.apply, decoder.params, decoder.state, batch, key
        )
        gap = abs(np.asarray(models.model(decoder)(encoder(x))) - np.asarray(x).reshape(len(x), -1))
        np.testing.assert_allclose(loss, (gap**power).mean(-1), rtol=1e-5)
        np.testing.assert_allclose(metrics["gap"], gap.max(-1), rtol=1e-5)


def test_the_objective_is_the_mixture_of_two_cross_entropies(kit, key):
    net = kit.mlp()
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(8, 4, 4, 1)), jnp.float32)
    batch = dict(kit.rows(), x=x, found=1 - x)
    attack = attacks.fgsm(threats.linf(0.1))
    at = lambda x: losses.cross_entropy(models.model(net)(x), batch["y"])  # noqa: E731
    for weight in (0.0, 0.3, 1.0):
        got = train.ladder(attack, weight=weight).loss(net.apply, net.params, net.state, batch, key)[0]
        np.testing.assert_allclose(got, (1 - weight) * at(x) + weight * at(1 - x), rtol=1e-5)


def test_a_network_learns_from_its_own_ladder(kit, key):
    """The whole order of work, in a few steps."""
    net, source = kit.mlp(), kit.blobs()
    encoder = models.features(net, at="layers.1:in")
    x, y = source.all()
    decoder = models.model(models.create("mlp", key, shape=(16,), classes=16, widths=()))
    svm = latent.separators(key, encoder(x), y, classes=3, epochs=1, attend=False)
    attack = train.climb(encoder, decoder, svm, eps=(1.0, 3.0))
    objective = train.ladder(attack)
    batch = {"x": x, "y": jnp.asarray(y), "index": jnp.arange(96), "mask": jnp.ones(96, bool)}
    got = jax.jit(functools.partial(train.grad_fn(objective), net.apply))(net.params, net.state, batch, key)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(got.total)) and float(got.sums["loss"]) > 0


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda svm: train.climb(models.pure(linear), models.pure(linear), svm, eps=(2.0, 1.0)), "must rise"),
        (lambda svm: train.climb(models.pure(linear), models.pure(linear), svm, eps=0.0), "eps must be"),
        (lambda svm: train.ladder(attacks.fgsm(threats.linf(0.1)), weight=1.5), "weight"),
        (lambda svm: latent.reconstruction(models.pure(linear), norm="linf"), "norm"),
        (lambda svm: latent.separators(jax.random.key(0), np.zeros((2, 3)), np.zeros(2, int), classes=2), "classes"),
    ],
)
def test_impossible_settings_are_refused(climbed, build, words):
    with pytest.raises(ValueError, match=words):
        build(climbed[2])
