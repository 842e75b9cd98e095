"""TRADES, MART: closed forms on a linear model, finite differences in float64, reductions, the authors' code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attacks, losses, threats, train
from jaxadv.train import regularized, starts

WIDE = (-10.0, 10.0)


def binary_kl(a, b):
    """KL between the predictions of two scores, logits (0, s)."""
    p = 1 / (1 + np.exp(-a))
    return p * (np.logaddexp(0, -b) - np.logaddexp(0, -a)) + (1 - p) * (np.logaddexp(0, b) - np.logaddexp(0, a))


@pytest.mark.parametrize(("ball", "dual"), [(threats.linf, 1), (threats.l2, 2)])
def test_trades_on_a_linear_model_is_the_worse_of_two_ends(kit, key, ball, dual):
    net, batch, eps, beta = kit.linear(), kit.rows(), 0.3, 4.0
    objective = train.trades(ball(eps, WIDE), beta=beta, steps=8, step_size=eps / 3)
    got, (_, metrics) = objective(net.apply, net.params, net.state, batch, key)
    w, y = np.asarray(net.params["w"], np.float64), np.asarray(batch["y"])
    score = np.asarray(batch["x"], np.float64) @ w + float(net.params["b"])
    move = eps * np.linalg.norm(w, dual)
    fit = np.logaddexp(0, -(2 * y - 1) * score)
    ends = np.stack([fit + beta * binary_kl(score, score + side * move) for side in (-1, 1)])
    # the search climbs to one end: from x the divergence rises on both sides, as the third derivative tells
    reached = np.min(np.abs(ends - np.asarray(got)), axis=0)
    np.testing.assert_allclose(reached, 0, atol=2e-5)
    np.testing.assert_array_equal(np.asarray(metrics["clean"]) > 0, (score > 0) == (y > 0))


def test_mart_by_hand_on_three_classes():
    clean, robust, y = np.log([[0.5, 0.3, 0.2]]), np.log([[0.2, 0.7, 0.1]]), np.asarray([0], np.int32)
    gap = 0.5 * np.log(0.5 / 0.2) + 0.3 * np.log(0.3 / 0.7) + 0.2 * np.log(0.2 / 0.1)
    want = -np.log(0.2) - np.log(1.0001 - 0.7) + 3 * gap * 0.5
    given = (jnp.asarray(clean, jnp.float32), jnp.asarray(robust, jnp.float32), jnp.asarray(y))
    np.testing.assert_allclose(regularized.mart_loss(*given, weight=3.0), [want], rtol=1e-5)
    alone = regularized.mart_loss(given[0], given[0], given[2], weight=3.0)
    np.testing.assert_allclose(alone, [-np.log(0.5) - np.log(1.0001 - 0.3)], rtol=1e-5)
    sure = jnp.asarray([[40.0, 0.0, 0.0]])  # a clean prediction without doubt: the divergence does not count
    np.testing.assert_allclose(
        regularized.mart_loss(sure, given[1], given[2], weight=3.0), [-np.log(0.2) - np.log(1.0001 - 0.7)], rtol=1e-4
    )


@pytest.mark.parametrize(
    "loss",
    [partial(regularized.trades_loss, beta=6.0, smoothing=0.1), partial(regularized.mart_loss, weight=5.0)],
    ids=["trades", "mart"],
)
def test_the_gradient_of_a_loss_against_finite_differences(loss):
    rng = np.random.default_rng(0)
    x, moved, v = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), rng.normal(size=(6, 3))
    with jax.enable_x64(True):
        y = jnp.asarray([0, 1, 2, 0], jnp.int32)
        total = lambda w: loss(jnp.tanh(x @ w), jnp.tanh(moved @ w), y).sum()  # noqa: E731
        slope = np.asarray(jax.grad(total)(jnp.asarray(v)))
        for place in [(0, 0), (2, 1), (5, 2)]:
            step = np.zeros_like(v)
            step[place] = 1e-6
            want = (float(total(jnp.asarray(v + step))) - float(total(jnp.asarray(v - step)))) / 2e-6
            np.testing.assert_allclose(slope[place], want, rtol=1e-6, atol=1e-8)


def pictures(kit, n=8):
    x = np.random.default_rng(0).uniform(0, 1, (n, 4, 4, 1))
    return dict(kit.rows(n), x=jnp.asarray(x, jnp.float32))


def test_without_their_terms_they_are_what_they_extend(kit, key):
    net, batch, threat = kit.mlp(), pictures(kit), threats.linf(0.1)
    slope = lambda objective: jax.jit(partial(train.grad_fn(objective), net.apply))(  # noqa: E731
        net.params, net.state, batch, key
    )
    for a, b in zip(
        kit.leaves(slope(train.trades(threat, beta=0.0, steps=2)).total),
        kit.leaves(slope(train.standard()).total),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)
    search = attacks.pgd(threat, steps=2, keep="last")
    bare = slope(train.mart(threat, weight=0.0, attack=search, running=("robust",)))
    plain = slope(train.pgd_at(search))
    found = train.mart(threat, attack=search).find(net.apply, net.params, net.state, batch, key)["found"]
    z = net.apply(net.params, net.state, found, bn="train")[0]
    rival = jnp.max(jnp.where(jax.nn.one_hot(batch["y"], 3) > 0, 0, jax.nn.softmax(z)), -1)
    extra = -jnp.log(1.0001 - rival).sum()
    np.testing.assert_allclose(bare.sums["loss"], plain.sums["loss"] + extra, rtol=1e-5)


def test_at_the_example_itself_the_divergence_has_no_slope(kit, key):
    """Why TRADES needs its noise: without it the search would follow rounding errors."""
    net, batch = kit.mlp(), pictures(kit)
    model = train.frozen(net.apply, net.params, net.state)
    slope = jax.jit(jax.grad(lambda x: -losses.minus_kl(model(x), model(batch["x"])).sum()))
    at, near = slope(batch["x"]), slope(starts.gaussian(0.001)(None, jax.random.split(key, 8), batch["x"]))
    assert float(jnp.abs(at).max()) < 1e-3 * float(jnp.abs(near).max())
    objective = train.trades(threats.linf(0.2))
    found = objective.find(net.apply, net.params, net.state, batch, key)["found"]
    assert float(jnp.abs(found - batch["x"]).max()) > 0.19


def test_the_passes_move_the_running_statistics_as_they_are_told(kit, key):
    net, batch, threat = kit.mlp("batch"), pictures(kit), threats.linf(0.1)

    def after(running):
        objective = train.trades(threat, steps=1, running=running)
        found = objective.find(net.apply, net.params, net.state, batch, key)["found"]
        want = net.state
        for name in running:
            want = net.apply(net.params, want, {"clean": batch["x"], "robust": found}[name], bn="train")[1]
        _, (state, _) = objective(net.apply, net.params, net.state, batch, key)
        return state, want

    for running in [("clean", "robust", "clean"), ("robust",), ()]:
        assert kit.same_bits(*after(running))
    assert kit.same_bits(after(())[0], net.state)
    default = train.trades(threat, steps=1)(net.apply, net.params, net.state, batch, key)[1][0]
    assert kit.same_bits(default, after(("clean", "robust", "clean"))[1])


def test_starts_are_what_they_say(key):
    x = jnp.zeros((2000, 3))
    threat, keys = threats.linf(0.5, WIDE), jax.random.split(key, 2000)
    near = starts.gaussian(0.01)(threat, keys, x)
    assert abs(float(near.std()) - 0.01) < 5e-4 and not np.array_equal(near[0], near[1])
    wide = starts.uniform(2.0)(threat, keys, x)
    assert 0.98 < float(jnp.abs(wide).max()) <= 1.0 and abs(float((wide**2).mean()) - 1 / 3) < 0.02
    np.testing.assert_array_equal(starts.uniform()(threat, keys, x), threat.sample(keys, x))
    np.testing.assert_array_equal(starts.uniform(0.0)(threat, keys, x), x)
    with pytest.raises(ValueError, match="share must be"):
        starts.uniform(-1.0)
    with pytest.raises(TypeError, match="gradient engine"):
        train.started(attacks.square(threat), starts.uniform())


def test_an_attack_that_is_started_elsewhere_is_otherwise_itself(kit, key):
    net, batch = kit.mlp(), pictures(kit)
    model = train.frozen(net.apply, net.params, net.state)
    plain = attacks.pgd(threats.linf(0.1), steps=3, early=True)
    moved = train.started(plain, starts.uniform())
    one, two = (a.run(key, model, batch["x"], batch["y"]) for a in (plain, moved))
    assert kit.same_bits(tuple(one), tuple(two))
    half = attacks.scaled(moved, 0.5)
    assert half.threat.eps == 0.05 and isinstance(half, starts.Started) and half.name == "pgd" and half.max_steps == 3


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda t: train.trades(t, beta=-1.0), "beta must be"),
        (lambda t: train.mart(t, weight=-1.0), "weight must be"),
        (lambda t: train.trades(t, label_smoothing=1.0), "label_smoothing must lie in"),
        (lambda t: train.trades(t, running=("robustt",)), "Did you mean 'robust'"),
        (lambda t: train.trades(t, bn_attack="train"), "'local' gives the same attack"),
        (lambda t: train.adversarial(attacks.pgd(t), losses.kl, points=("dirty",)), "unknown point 'dirty'"),
    ],
)
def test_impossible_settings_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build(threats.linf(0.1))
