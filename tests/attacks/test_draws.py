"""Randomized models: expectations with known noise, one way of averaging for all attacks, fresh and equal draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxadv import core, losses
from jaxadv.attacks import Expectation, apgd_ce, eot, fgsm, noisy, simba, survival, transferable
from jaxadv.attacks.draws import asked, by_parts, content_keys, descend, folded, majority, takes_keys
from jaxadv.attacks.judge import judge
from jaxadv.threats import linf

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 3)).astype(np.float32)
X = RNG.uniform(0.3, 0.7, (5, 6)).astype(np.float32)
Y = np.array([0, 1, 2, 0, 1], np.int32)


def linear(w, x):
    return x @ w


def turned(w, x, *, keys):
    """Weights that are drawn for each row: a known mean with known noise."""
    noise = jax.vmap(lambda k: jax.random.normal(k, w.shape))(keys)
    return jnp.einsum("bi,bij->bj", x, w[None] + 0.5 * noise)


RANDOM, PLAIN = Partial(turned, jnp.asarray(W)), Partial(linear, jnp.asarray(W))


def weights(key, x, samples):
    """The weights `[n, b, d, k]` of the draws of an expectation."""
    keys = content_keys(key, jnp.asarray(x))
    draw = jax.vmap(lambda k: jax.random.normal(k, W.shape))
    return np.stack([W + 0.5 * np.asarray(draw(folded(keys, i))) for i in range(samples)]).astype(np.float64)


def by_hand(key, x, mean, samples):
    """Logits, and the gradient of minus the cross-entropy, in float64."""
    w = weights(key, x, samples)
    z = np.einsum("bi,nbij->nbj", x.astype(np.float64), w)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    hot = np.eye(3)[Y]
    if mean == "logits":
        q = np.exp(z.mean(0))
        q /= q.sum(-1, keepdims=True)
        return z.mean(0), np.einsum("bj,bij->bi", hot - q, w.mean(0))
    if mean == "loss":
        return np.log(p.mean(0)), np.einsum("nbj,nbij->bi", hot[None] - p, w) / samples
    own = p[:, np.arange(5), Y]  # of the mean probability: sum_n p_y (w_y - sum_j p_j w_j) / sum_n p_y
    slope = w[:, np.arange(5), :, Y].transpose(1, 0, 2) - np.einsum("nbj,nbij->nbi", p, w)
    return np.log(p.mean(0)), np.einsum("nb,nbi->bi", own, slope) / own.sum(0)[:, None]


@pytest.mark.parametrize("mean", ["loss", "logits", "probabilities"])
def test_logits_and_gradients_are_those_of_the_stated_mean(mean):
    model = eot(RANDOM, KEY, samples=6, mean=mean)
    grad, loss, (score, broken, finite) = jax.jit(
        lambda model, x: descend(
            model, x, lambda z: losses.minus_cross_entropy(z, jnp.asarray(Y)), lambda z: judge(z, jnp.asarray(Y))
        )
    )(model, jnp.asarray(X))
    logits, want = by_hand(KEY, X, mean, 6)
    np.testing.assert_allclose(model(X), logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(broken, logits.argmax(-1) != Y)
    others = np.where(np.eye(3)[Y] > 0, -np.inf, logits).max(-1)
    np.testing.assert_allclose(score, logits[np.arange(5), Y] - others, rtol=1e-3, atol=1e-5)
    assert finite.all() and np.isfinite(loss).all()


def test_many_draws_come_to_the_model_without_noise():
    model = eot(RANDOM, KEY, samples=4000, mean="logits")
    spread = 0.5 * np.linalg.norm(X, axis=1, keepdims=True) / np.sqrt(4000)  # of a logit's mean
    assert (np.abs(np.asarray(jax.jit(model)(X)) - X @ W) < 5 * spread).all()


def test_fgsm_of_an_expectation_is_the_closed_form():
    model = eot(RANDOM, KEY, samples=50, mean="logits")
    found = jax.jit(fgsm(linf(0.05), keep="last").run)(KEY, model, X, Y)
    np.testing.assert_allclose(found.x, X - 0.05 * np.sign(by_hand(KEY, X, "logits", 50)[1]), atol=1e-6)


def test_a_row_draws_by_its_content_and_nothing_else():
    keys = jax.random.key_data(content_keys(KEY, jnp.asarray(X)))
    assert len(np.unique(np.asarray(keys), axis=0)) == 5
    back = jax.random.key_data(content_keys(KEY, jnp.asarray(X[::-1].copy())))
    np.testing.assert_array_equal(np.asarray(back)[::-1], keys)
    other, swapped = X.copy(), X[:, ::-1].copy()
    other[:, 3] = np.nextafter(other[:, 3], 1)
    for changed in (other, swapped):
        assert (np.asarray(jax.random.key_data(content_keys(KEY, jnp.asarray(changed)))) != keys).any(-1).all()
    zero = jnp.zeros((1, 6))
    assert content_keys(KEY, zero) == content_keys(KEY, -zero)
    half = jnp.asarray(X, jnp.bfloat16)
    assert (content_keys(KEY, half) == content_keys(KEY, half.astype(jnp.float32))).all()
    with jax.enable_x64(True):
        assert content_keys(KEY, jnp.asarray(X, jnp.float64)).shape == (5,)


def test_attacks_of_all_kinds_take_an_expectation_and_judge_as_it_answers():
    model = eot(RANDOM, KEY, samples=4)
    for attack in (transferable(linf(0.2), steps=2), simba(linf(0.2), queries=5)):
        found, logits = jax.jit(lambda a, m: (r := a.run(KEY, m, X, Y), m(r.x)))(attack, model)
        np.testing.assert_array_equal(found.success, np.asarray(logits).argmax(-1) != Y)


def test_autopgd_averages_as_an_expectation_does():
    """Its own passes, with keys of its own, are an expectation of losses with one key for each row."""
    keys = core.example_keys(KEY, "pass", jnp.arange(5))
    attack = apgd_ce(linf(0.2), eot=6)
    loss, grad, (score, broken, _) = attack._ask(RANDOM, jnp.asarray(X), jnp.asarray(Y), jnp.asarray(Y), keys)
    same = Expectation(RANDOM, keys, 6, "loss")
    want = descend(
        same,
        jnp.asarray(X),
        lambda z: losses.minus_cross_entropy(z, jnp.asarray(Y)),
        lambda z: judge(z, jnp.asarray(Y)),
        majority,
    )
    for got, other in zip((grad, loss, score, broken), (*want[:2], *want[2][:2])):
        np.testing.assert_allclose(got, other, rtol=1e-5)


def test_confident_draws_give_finite_logits():
    model = eot(Partial(turned, jnp.asarray(W) * 1e4), KEY, samples=3)
    assert np.isfinite(np.asarray(model(X))).all()  # probabilities below the smallest float


def test_noise_is_added_with_its_spread():
    model = noisy(PLAIN, 0.2)
    keys = core.example_keys(KEY, "noise", jnp.arange(4000))
    z = np.asarray(asked(model, jnp.broadcast_to(X[:1], (4000, 6)), keys)) - X[:1] @ W
    np.testing.assert_allclose(z.std(0), 0.2 * np.linalg.norm(W, axis=0), rtol=0.05)
    np.testing.assert_allclose(z.mean(0), 0, atol=5 * 0.2 * np.linalg.norm(W, axis=0).max() / np.sqrt(4000))


def test_survival_is_the_share_of_draws_that_hold():
    """With two classes and Gaussian noise the share is known."""
    from scipy import stats

    w = np.stack([W[:, 0], -W[:, 0]], axis=1)
    x = X - (X @ W[:, 0] - 0.1)[:, None] * W[:, 0] / (W[:, 0] @ W[:, 0])  # all margins are 0.2
    y = np.array([0, 0, 0, 1, 1], np.int32)
    model = noisy(Partial(linear, jnp.asarray(w)), 0.3)
    share = np.asarray(survival(KEY, model, x, y, samples=2000))
    holds = stats.norm.cdf(0.1 / (0.3 * np.linalg.norm(W[:, 0])))
    want = np.array([holds] * 3 + [1 - holds] * 2)
    assert (np.abs(share - want) < 5 * np.sqrt(want * (1 - want) / 2000)).all()
    assert len(np.unique(share[:3])) > 1  # draws of its own for each row
    alone = survival(KEY, model, x[2:3], y[2:3], samples=2000, index=[2])
    np.testing.assert_array_equal(alone, share[2:3])


@by_parts
def _both(first, second, x, keys=None):
    return asked(first, x, folded(keys, 0)) + asked(second, x, folded(keys, 1))


def test_what_is_made_of_models_takes_keys_where_one_of_them_does():
    assert takes_keys(RANDOM) and not takes_keys(PLAIN) and not takes_keys(len)
    assert takes_keys(Partial(_both, PLAIN, RANDOM)) and not takes_keys(Partial(_both, PLAIN, PLAIN))
    assert folded(None, 3) is None


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(TypeError, match="takes keys="):
        eot(PLAIN, KEY)
    with pytest.raises(ValueError, match="samples"):
        eot(RANDOM, KEY, samples=0)
    with pytest.raises(ValueError, match="mean"):
        eot(RANDOM, KEY, mean="losses")
    with pytest.raises(ValueError, match="samples"):
        survival(KEY, RANDOM, X, Y, samples=0)
