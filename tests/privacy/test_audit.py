"""Audits: planted leaks are found, the honest step is not accused, bounds are valid; LiRA against its formula."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxadv import parallel, privacy, train
from jaxadv.privacy import audit, clipping
from jaxadv.privacy.audit import Audit, confidence_scores, gaussian_bound, lira_scores, one_run, tpr_at_fpr, white_box
from jaxadv.train.private import one_step

DELTA, CLIP, SIGMA = 1e-5, 0.5, 1.0
CLAIMED = 4.377178  # one Gaussian, noise 1, delta 1e-5: the closed form
EVERYONE = dict(size=5, steps=1, delta=DELTA, clip_norm=CLIP, accountant="rdp")


def step_of(noise=SIGMA, gradient=None):
    return one_step(noise, CLIP, gradient=gradient)[0]


def unclipped(objective):
    """The planted leak: example 4 goes past the clip."""
    made = privacy.plan(5, noise_multiplier=SIGMA, **EVERYONE)
    private, plain = train.private_grad_fn(made)(objective), train.grad_fn(objective)

    def gradient(apply, params, state, rows, key, *, axis_name=None):
        last = rows["index"] == 4
        got = private(apply, params, state, rows | {"mask": rows["mask"] & ~last}, key, axis_name=axis_name)
        past = plain(apply, params, state, rows | {"mask": rows["mask"] & last}, key, axis_name=axis_name)
        return got._replace(total=jax.tree.map(jnp.add, got.total, past.total))

    return gradient


def noise_on_one_shard(key, included):
    """Two replicas, of which the first alone adds noise; the release is what the second one holds."""
    honest = step_of()(key, included)
    silent = step_of(0.0)(key, included)
    return jax.vmap(lambda i: jnp.where(parallel.axis_index("shard") == 0, honest, silent), axis_name="shard")(
        jnp.arange(2)
    )[1]


CANARY = one_step(SIGMA, CLIP)[1]
LEAKS = {
    "no noise": (step_of(0.0), CANARY),
    "half the noise": (step_of(SIGMA / 2), CANARY),
    "an example that is not clipped": (step_of(gradient=unclipped), CANARY),
    "noise on one shard only": (noise_on_one_shard, CANARY),
}


def run(release, canary, trials=20_000, seed=7):
    return white_box(jax.random.key(seed), release, canary, claimed=CLAIMED, delta=DELTA, trials=trials)


def test_the_honest_step_is_not_accused_and_the_bound_is_near():
    found = run(step_of(), CANARY)
    assert not found.leaks and 0.85 * CLAIMED < found.epsilon <= CLAIMED and found.mu < 1
    assert isinstance(found, Audit) and found.trials == 20_000 and found.confidence == 0.99


@pytest.mark.parametrize(
    "name", [n if n == "half the noise" else pytest.param(n, marks=pytest.mark.slow) for n in LEAKS]
)
def test_planted_leaks_are_found(name):
    found = run(*LEAKS[name])
    assert found.leaks and found.epsilon > 2 * CLAIMED


def test_the_claim_is_the_accountants():
    made = privacy.plan(5, noise_multiplier=SIGMA, **EVERYONE | {"accountant": "pld"})
    assert made.sampler.rate == 1 and made.spent(1) == pytest.approx(CLAIMED, abs=1e-4)


@pytest.mark.parametrize("mu", [0.0, 1.0, 2.0])
def test_the_gaussian_bound_is_valid_and_near_on_known_gaussians(mu):
    rng = np.random.default_rng(1)
    inside, outside = rng.normal(mu, 1, 20_000), rng.normal(0, 1, 20_000)
    epsilon, found, errors = gaussian_bound(inside, outside, threshold=mu / 2, delta=DELTA)
    true = privacy.accounting.of_gaussian(mu, DELTA)
    assert found <= mu and epsilon <= true and (mu == 0 or epsilon > 0.9 * true)
    hits = int((outside > mu / 2).sum())
    assert stats.binom.cdf(hits, 20_000, errors[0]) == pytest.approx(0.005, rel=1e-3)  # Clopper-Pearson, inverted


def test_edges_of_the_bound():
    ones, zeros = np.ones(300), np.zeros(300)
    assert gaussian_bound(zeros, zeros, threshold=0.5, delta=DELTA)[0] == 0
    assert gaussian_bound(ones, zeros, threshold=0.5, delta=DELTA)[0] > 10
    assert gaussian_bound(ones * np.nan, zeros, threshold=0.5, delta=DELTA)[0] > 10  # NaN gives an example away
    with pytest.raises(ValueError, match="confidence must lie"):
        gaussian_bound(ones, zeros, threshold=0.5, delta=DELTA, confidence=1.0)
    with pytest.raises(ValueError, match="trials must be"):
        run(step_of(), CANARY, trials=3)


def test_one_run_is_valid(monkeypatch):
    rng = np.random.default_rng(0)
    bound = one_run(rng.normal(1, 1, 2000), rng.normal(0, 1, 2000), delta=DELTA)
    assert 0 < bound <= CLAIMED
    assert one_run(rng.normal(0, 1, 2000), rng.normal(0, 1, 2000), delta=DELTA) <= 0.2
    monkeypatch.setitem(sys.modules, "jax_privacy", None)
    with pytest.raises(ImportError, match=r"jaxadv\[privacy\]"):
        one_run(np.ones(3), np.zeros(3), delta=DELTA)


def test_canaries_are_coordinates_of_the_length_of_the_clip(key):
    params = {"a": jnp.zeros((3, 4)), "b": jnp.zeros(8)}
    made = audit.gradient_canaries(key, params, 12, CLIP)
    rows = np.concatenate([np.asarray(made["a"]).reshape(12, -1), np.asarray(made["b"])], 1)
    np.testing.assert_allclose(abs(rows @ rows.T), CLIP**2 * np.eye(12), atol=1e-7)
    assert (np.count_nonzero(rows, axis=1) == 1).all()
    with pytest.raises(ValueError, match="at most the 20 parameters"):
        audit.gradient_canaries(key, params, 21, CLIP)


def test_confidence_is_the_logit_of_the_labels_probability(key):
    logits, y = jax.random.normal(key, (5, 4)) * 3, jnp.array([0, 1, 2, 3, 0])
    p = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)), np.float64)[np.arange(5), np.asarray(y)]
    np.testing.assert_allclose(confidence_scores(logits, y), np.log(p / (1 - p)), rtol=1e-4, atol=1e-4)
    sure = confidence_scores(jnp.array([[200.0, 0.0]]), jnp.array([0]))
    assert float(sure[0]) == 200  # where p rounds to one


@pytest.mark.parametrize("fixed", [False, True])
def test_lira_is_the_ratio_of_two_gaussians(fixed):
    rng = np.random.default_rng(0)
    shadows, n = 40, 300
    member = rng.permuted(np.repeat([[True], [False]], shadows // 2, 0).repeat(n, 1), axis=0)
    centre = rng.normal(size=(n, 2))
    phi = centre + 1.5 * member[..., None] + rng.normal(size=(shadows, n, 2))
    truth = rng.random(n) < 0.5
    target = centre + 1.5 * truth[:, None] + rng.normal(size=(n, 2))
    found = lira_scores(phi, member, target, fixed_variance=fixed)
    i = 3
    into, out = phi[member[:, i], i], phi[~member[:, i], i]
    if not fixed:
        by_hand = stats.norm.logpdf(target[i], into.mean(0), into.std(0))
        by_hand = by_hand - stats.norm.logpdf(target[i], out.mean(0), out.std(0))
        assert found[i] == pytest.approx(by_hand.mean(), rel=1e-9)
    rates = [stats.mannwhitneyu(s[truth], s[~truth]).statistic / (truth.sum() * (~truth).sum()) for s in (
        found, lira_scores(phi, member, target, online=False, fixed_variance=fixed))]  # fmt: skip
    best = stats.norm.cdf(1.5 * math.sqrt(2) / math.sqrt(2))  # two views, equal variance: AUROC of distance 1.5 sqrt 2
    assert 0.8 < rates[0] <= best + 0.03 and rates[1] > 0.75
    with pytest.raises(ValueError, match="at least 2 shadow networks"):
        lira_scores(phi[:1], member[:1], target)


def test_rates_at_low_false_positives():
    scores, member = np.array([5.0, 4, 3, 2, 1, 0]), np.array([True, False, True, True, False, False])
    assert tpr_at_fpr(scores, member, 0.0) == pytest.approx(1 / 3)
    assert tpr_at_fpr(scores, member, 0.34) == 1.0
    with pytest.raises(ValueError, match="fpr must lie"):
        tpr_at_fpr(scores, np.ones(6, bool), 0.1)
    assert clipping.clipped_grads is privacy.clipped_grads
