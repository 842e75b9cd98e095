"""The adaptive toolkit on defenses whose answer is known: quantized, saturated, shattered, purified, detected."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxadv import core, losses
from jaxadv.attacks import (
    Evading,
    bpda,
    eot,
    evading,
    feature_distance,
    fgsm,
    identity,
    matched,
    mean_logits,
    noisy,
    pgd,
    preprocessed,
    rejecting,
    rescaled,
    smoothed,
    straight,
    sweep,
    transfer,
    unrolled,
    without,
)
from jaxadv.attacks.draws import asked, takes_keys
from jaxadv.core import Targets
from jaxadv.threats import l2, linf

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
W = RNG.normal(size=(12, 4)).astype(np.float32)
W -= W.mean(0)  # the middle of the box is where all classes meet
X = RNG.uniform(0.3, 0.7, (40, 12)).astype(np.float32)
Y = (X @ W).argmax(-1).astype(np.int32)


def linear(w, x):
    return x @ w


def curved(w, x):
    return jnp.tanh(2 * x @ w[0]) @ w[1]


def quantize(x):
    return jnp.round(x * 16) / 16


MODEL = Partial(linear, jnp.asarray(W))
NET = Partial(curved, (jnp.asarray(W), jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)))


def slope(model, x, *, keys=None, weights=(1.0, -2.0, 0.5)):
    """The gradient of a fixed sum of logits."""
    at = jnp.asarray(weights)
    return np.asarray(jax.grad(lambda p: jnp.sum(asked(model, p, keys)[:, : len(weights)] @ at))(jnp.asarray(x)))


def test_values_of_one_function_and_gradients_of_another():
    both = straight(NET, Partial(linear, jnp.asarray(W[:, :3])))
    np.testing.assert_array_equal(both(X), NET(X))  # to the bit
    np.testing.assert_allclose(slope(both, X), np.tile(W[:, :3] @ [1.0, -2.0, 0.5], (40, 1)), rtol=1e-5)
    np.testing.assert_array_equal(straight(quantize)(X), np.round(X * 16) / 16)


def test_bpda_passes_gradients_as_the_stand_in_does():
    """The identity: the model's gradient where the preprocessing leads. Another: its Jacobian times that."""
    model, at = bpda(NET, quantize), jnp.asarray(quantize(X))
    np.testing.assert_array_equal(model(X), NET(at))
    np.testing.assert_allclose(slope(model, X), slope(NET, at), rtol=1e-5, atol=1e-6)
    assert not slope(preprocessed(NET, quantize), X).any()  # true gradients are of no use
    np.testing.assert_array_equal(slope(bpda(NET, quantize, identity), X), slope(model, X))
    other = bpda(NET, quantize, Partial(linear, jnp.asarray(np.diag(np.arange(12.0)), jnp.float32)))
    np.testing.assert_allclose(slope(other, X), slope(NET, at) * np.arange(12.0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(40, 12\); got \(40, 3\)"):
        slope(bpda(NET, quantize, Partial(linear, jnp.asarray(W[:, :3]))), X)


def test_a_quantized_linear_model_falls_to_bpda_exactly_as_far_as_the_box_allows():
    """Linear and quantized: the lowest margin is known. PGD has no gradient; through the stand-in it gets there."""
    eps = 1 / 16
    grid = np.asarray(quantize(X))  # points of the grid, so that moves of whole cells are exact
    y = (grid @ W).argmax(-1).astype(np.int32)
    model, threat = bpda(MODEL, quantize), linf(eps)
    margins = np.where(np.eye(4)[y] > 0, np.inf, (grid @ W)[np.arange(40), y][:, None] - grid @ W)
    reach = eps * np.abs(W[:, y].T[:, None, :] - W.T[None]).sum(-1)
    within = np.all((grid - eps >= 0) & (grid + eps <= 1), axis=-1)
    assert within.all()
    breakable = (margins < reach - 1e-4).any(-1)
    assert 0.2 < breakable.mean() < 1
    plain = pgd(threat, steps=5).run(KEY, Partial(linear_quantized, jnp.asarray(W)), grid, y)
    assert plain.flags["zero_gradient"].all()
    found = sweep(fgsm(threat, loss=losses.margin), KEY, model, grid, y, classes=4)
    np.testing.assert_array_equal(found.success, breakable)
    np.testing.assert_array_equal(np.asarray(model(found.x)).argmax(-1) != y, breakable)
    assert plain.success.mean() < breakable.mean() - 0.2


def linear_quantized(w, x):
    return quantize(x) @ w


def test_logits_too_large_for_the_softmax_are_scaled_back():
    loud = Partial(linear, jnp.asarray(W) * 1e4)
    y = jnp.asarray(Y)

    def grad(model):
        return jax.grad(lambda p: jnp.sum(losses.minus_cross_entropy(model(p), y)))(jnp.asarray(X))

    assert not np.asarray(grad(loud)).any(-1).all()
    cured = rescaled(loud, 1e-4)
    np.testing.assert_allclose(grad(cured), grad(MODEL), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(cured(X)).argmax(-1), Y)
    with pytest.raises(ValueError, match="factor"):
        rescaled(loud, 0.0)


def shattered(w, x):
    return x @ w + 0.05 * jnp.sin(500 * x) @ jnp.abs(w)


def test_smoothing_restores_a_shattered_gradient():
    """The wave of frequency 500 is damped by exp(-(500 s)^2 / 2); what noise is left falls with the draws."""
    model = Partial(shattered, jnp.asarray(W))
    cured = smoothed(model, KEY, sigma=0.02, samples=400)
    np.testing.assert_array_equal(cured(X), model(X))
    want = np.tile(W[:, :3] @ [1.0, -2.0, 0.5], (40, 1))
    left = 25 * np.abs(W[:, :3] @ [1.0, -2.0, 0.5]).max() / np.sqrt(2 * 400)
    off = slope(cured, X) - want
    assert np.abs(slope(model, X) - want).mean() > 8 > left > np.abs(off).mean()
    with pytest.raises(ValueError, match="mean"):
        smoothed(model, KEY, sigma=0.02, mean="loss")


def toward(center, x):
    return x - 0.1 * (x - center)


def test_gradients_pass_an_unrolled_purifier_all_the_way():
    """n steps of length a toward a point: what is left of a gradient is (1 - a)^n."""
    purify = unrolled(Partial(toward, jnp.full((1, 12), 0.5)), 7)
    shrink = 0.9**7
    np.testing.assert_allclose(purify(X), 0.5 + shrink * (X - 0.5), rtol=1e-5)
    model = preprocessed(MODEL, purify)
    np.testing.assert_allclose(slope(model, X), shrink * slope(MODEL, X), rtol=1e-4)
    np.testing.assert_allclose(slope(bpda(MODEL, purify), X), slope(MODEL, X), rtol=1e-4)
    with pytest.raises(ValueError, match="steps"):
        unrolled(quantize, 0)


def jitter(scale, x, *, keys):
    return x + scale * jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)


def rounded_jitter(scale, x, *, keys):
    return jnp.round((x + scale * jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)) * 16) / 16


def test_random_parts_make_random_models_that_expectations_take():
    """Random preprocessing that has no gradients: `bpda` first, `eot` around it."""
    random = bpda(NET, Partial(rounded_jitter, 0.1), Partial(jitter, 0.1))
    assert takes_keys(random) and not takes_keys(bpda(NET, quantize)) and takes_keys(noisy(NET, 0.1))
    keys = core.example_keys(KEY, "one", jnp.arange(40))
    seen = jnp.asarray(slope(random, X, keys=keys))
    inner = jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys)
    at = rounded_jitter(0.1, jnp.asarray(X), keys=inner)
    np.testing.assert_allclose(seen, slope(NET, at), rtol=1e-4, atol=1e-5)
    model = eot(random, KEY, samples=3, mean="logits")
    assert model(X).shape == (40, 3) and np.isfinite(slope(model, X)).all() and slope(model, X).any()
    purify = unrolled(Partial(jitter, 0.1), 3)
    assert takes_keys(purify) and not np.allclose(purify(X, keys=keys), X)
    assert (np.asarray(asked(rescaled(random, 2.0), X, keys)) == 2 * np.asarray(asked(random, X, keys))).all()


def suspicion(v, x):
    return x @ v


V = (0.5 * RNG.normal(size=12) - W[:, 3]).astype(np.float32)  # rises where the last class is left
DETECTOR = Partial(suspicion, jnp.asarray(V))


def test_a_rejecting_model_rejects_exactly_where_the_detector_does():
    threshold = float(np.median(X @ V))
    logits = np.asarray(rejecting(MODEL, DETECTOR, threshold=threshold, factor=3.0)(X))
    np.testing.assert_array_equal(logits[:, :4], np.asarray(MODEL(X)))
    np.testing.assert_array_equal(logits.argmax(-1) == 4, X @ V > threshold)
    np.testing.assert_allclose(logits[:, 4] - logits[:, :4].max(-1), 3 * (X @ V - threshold), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"one score for each row, \[40\]; got \[40, 4\]"):
        rejecting(MODEL, MODEL)(X)
    with pytest.raises(ValueError, match="factor"):
        rejecting(MODEL, DETECTOR, factor=-1.0)


def test_a_sweep_evades_a_linear_detector_where_a_linear_program_says_so():
    """Fooled and not detected is a linear program for each class; SciPy solves it."""
    from scipy import optimize

    eps, rows = 0.04, 12
    threshold = float(np.median(X @ V))
    free = np.flatnonzero(X @ V < threshold)
    free = free[np.argsort(-(X @ V)[free])[:rows]]  # not detected at first, but nearly
    x, y = X[free], Y[free]
    best = np.full(rows, np.inf)
    for i in range(rows):
        for t in set(range(4)) - {int(y[i])}:
            others = np.array([W[:, c] - W[:, t] for c in range(4) if c != t])
            sides = np.concatenate([np.c_[others, -np.ones(3)], np.r_[V, 0.0][None]])  # margin <= s, detector silent
            limit = np.r_[np.zeros(3), threshold]
            box = [(max(a - eps, 0), min(a + eps, 1)) for a in x[i]] + [(None, None)]
            found = optimize.linprog(np.r_[np.zeros(12), 1.0], A_ub=sides, b_ub=limit, bounds=box)
            best[i] = min(best[i], found.fun)
    possible, clear = best < 0, np.abs(best) > 0.02
    model = rejecting(MODEL, DETECTOR, threshold=threshold)
    attack = pgd(linf(eps), steps=60, step_size=eps / 10, loss=losses.margin, start="zero")
    found = jax.jit(lambda x, y: sweep(attack, KEY, model, x, y, classes=4))(x, y)
    point = np.asarray(found.x)
    evades = ((point @ W).argmax(-1) != y) & (point @ V <= threshold)
    np.testing.assert_array_equal(found.success, evades)
    np.testing.assert_array_equal(found.success[clear], possible[clear])
    assert possible[clear].any() and not possible[clear].all()
    blind = pgd(linf(eps), steps=60, step_size=eps / 10, loss=losses.margin, start="zero").run(KEY, MODEL, x, y)
    caught = blind.success & (np.asarray(blind.x) @ V > threshold)
    assert caught.sum() >= 1 and found.success[caught].any()  # who does not know of the detector is caught


def test_a_sweep_is_the_worst_of_all_targets():
    attack = fgsm(linf(0.05), loss=losses.margin)
    found = sweep(attack, KEY, MODEL, X, Y, classes=4)
    each = [
        attack.run(KEY, MODEL, X, core.Targets(jnp.asarray(Y), jnp.asarray((Y + t) % 4)), restart=t - 1)
        for t in (1, 2, 3)
    ]
    np.testing.assert_array_equal(found.success, np.any([e.success for e in each], axis=0))
    wins = np.where([e.success for e in each], np.asarray([e.score for e in each]), np.inf).min(0)
    np.testing.assert_allclose(found.score[found.success], wins[found.success], rtol=1e-5)
    np.testing.assert_array_equal(found.grads, sum(np.asarray(e.grads) for e in each))
    with pytest.raises(ValueError, match="classes"):
        sweep(attack, KEY, MODEL, X, Y, classes=1)
    with pytest.raises(ValueError, match="labels"):
        sweep(attack, KEY, MODEL, X, Y + 4, classes=4)


def test_two_results_are_joined_row_by_row():
    one, two = (fgsm(linf(e)).run(KEY, MODEL, X, Y) for e in (0.05, 0.1))
    both = core.joined(one, two)
    np.testing.assert_array_equal(both.success, np.asarray(one.success) | np.asarray(two.success))
    np.testing.assert_array_equal(both.queries, np.asarray(one.queries) + np.asarray(two.queries))


def test_matching_features_is_the_nearest_example_by_brute_force():
    features = Partial(linear, jnp.asarray(W))
    model = matched(features, X, Y, classes=4)
    point = RNG.uniform(0, 1, (9, 12)).astype(np.float32)
    far = np.square((point @ W)[:, None] - (X @ W)[None]).sum(-1)
    want = np.stack([far[:, c == Y].min(-1) for c in range(4)], axis=-1)
    np.testing.assert_allclose(-np.asarray(model(point)), want, rtol=1e-3, atol=1e-4)
    nearest = np.where(Y[None] == 2, far, np.inf).argmin(-1)
    own = slope(model, point, weights=(0.0, 0.0, 1.0))
    np.testing.assert_allclose(own, -2 * ((point @ W) - (X @ W)[nearest]) @ W.T, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"none of \[3\]"):
        matched(features, X[Y != 3], Y[Y != 3], classes=4)


def test_features_lead_where_logits_do_not():
    """The head has no gradients: attacks follow the features, and the verdict is the model's."""
    model, features = Partial(hard, jnp.asarray(W)), Partial(linear, jnp.asarray(W))
    threat, stand = linf(0.04), matched(features, X, Y, classes=4)
    plain = pgd(threat, steps=10, loss=losses.margin).run(KEY, model, X, Y)
    assert plain.flags["zero_gradient"].all()
    for found in (
        pgd(threat, steps=10, loss=losses.margin).run(KEY, straight(model, stand), X, Y),
        transfer(threat, stand, attack=lambda t: pgd(t, steps=10, loss=losses.margin)).run(KEY, model, X, Y),
    ):
        np.testing.assert_array_equal(found.success, np.asarray(model(found.x)).argmax(-1) != Y)
        assert found.success.mean() > plain.success.mean() + 0.2


def hard(w, x):
    return jax.nn.one_hot(jnp.argmax(x @ w, axis=-1), w.shape[1])


def test_the_distance_of_features_falls_to_the_least_that_the_box_allows():
    """With the identity as features the nearest allowed point is known."""
    goal = jnp.asarray(X[::-1].copy())
    attack = pgd(linf(0.1), steps=100, step_size=0.01, loss=feature_distance, criterion=feature_distance, start="zero")
    found = attack.run(KEY, Partial(identity), X, goal)
    best = np.square(np.maximum(np.abs(X[::-1] - X) - 0.1, 0)).sum(-1)
    np.testing.assert_allclose(feature_distance(found.x, goal), best, atol=3e-3)


def test_parts_are_data_so_new_weights_do_not_compile_anew():
    count = []

    @jax.jit
    def go(model, x):
        count.append(0)
        return pgd(linf(0.1), steps=2).run(KEY, model, x, jnp.asarray(Y)).x

    one, two = (bpda(rescaled(Partial(linear, jnp.asarray(w)), 2.0), quantize) for w in (W, -W))
    assert (np.asarray(go(one, jnp.asarray(X))) != np.asarray(go(two, jnp.asarray(X)))).any() and len(count) == 1


# --------------------------------------------------------------------------------------------- two gradients, one step


@functools.partial(jax.jit, static_argnums=3)
def evade(attack, x, y, classes):
    model = rejecting(MODEL, DETECTOR, threshold=float(np.median(X @ V)))
    return sweep(attack, KEY, model, x, y, classes=classes) if classes else attack.run(KEY, model, x, y)


@pytest.mark.parametrize("way", [pytest.param("selective", marks=pytest.mark.slow), "orthogonal"])
def test_a_step_against_a_detector_follows_one_gradient(way):
    """Linear parts: the gradients are known, and with them the first step, of rows that are fooled and that are not."""
    attack = evading(l2(0.05), steps=1, step_size=0.02, way=way, start="zero", keep="last")
    assert isinstance(attack, Evading)
    target = Targets(jnp.asarray(X[:12] @ W[:, :4]).argmax(-1), jnp.arange(12, dtype=jnp.int32) % 4)
    found = evade(attack, jnp.asarray(X[:12]), target, 0)
    z = np.asarray(MODEL(X[:12]))
    for row, logits, aim, got in zip(X[:12], z, np.asarray(target.target), np.asarray(found.x)):
        others = np.where(np.arange(4) == aim, -np.inf, logits)
        fool, hide = W[:, others.argmax()] - W[:, aim], V
        fooled = others.max() < logits[aim]
        if way == "orthogonal":
            fool, hide = fool - hide * (fool @ hide) / (hide @ hide), hide - fool * (fool @ hide) / (fool @ fool)
        rise = hide if fooled else fool
        np.testing.assert_allclose(got, row - 0.02 * rise / np.linalg.norm(rise), atol=1e-5)
    assert (found.grads == 2).all()
    grads = jnp.asarray(RNG.normal(size=(2, 5, 3)), jnp.float32)
    apart = without(grads[0], grads[1])
    np.testing.assert_allclose((apart * grads[1]).sum(-1), 0, atol=1e-5)
    np.testing.assert_array_equal(without(grads[0], 0 * grads[1]), grads[0])


@pytest.mark.slow
def test_evading_is_fooled_and_undetected_and_wants_targets():
    x, y = X[:12], np.asarray(MODEL(X[:12])).argmax(-1).astype(np.int32)
    attack = evading(linf(0.08), steps=20)
    found = evade(attack, x, y, 4)
    hidden = np.asarray(found.x) @ V <= np.median(X @ V) + 1e-5
    fooled = np.asarray(MODEL(found.x)).argmax(-1) != y
    assert not (np.asarray(found.success) & ~(hidden & fooled)).any() and np.asarray(found.success).any()
    assert core.feasible(linf(0.08), np.asarray(found.x), x).all()
    with pytest.raises(ValueError, match="y must be Targets for evading"):
        attack.run(KEY, rejecting(MODEL, DETECTOR), x, y)
    with pytest.raises(ValueError, match="way"):
        evading(linf(0.1), way="both")


def test_plain_functions_may_be_wrapped_and_jitted():
    def plain(x):
        return linear(W, x)

    wraps = (
        lambda model: preprocessed(model, quantize),
        lambda model: rescaled(model, 2.0),
        lambda model: smoothed(model, KEY, sigma=0.1, samples=2),
        lambda model: rejecting(model, lambda x: x[:, 0]),
        mean_logits,
    )
    got, want = (jax.jit(lambda made: [model(X) for model in made])([w(m) for w in wraps]) for m in (plain, MODEL))
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
