"""Regularized objectives: closed forms, numbers by hand, finite differences in float64, reductions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attacks, losses, threats, train
from jaxadv.core import example_keys
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
        total = jax.jit(lambda w: loss(jnp.tanh(x @ w), jnp.tanh(moved @ w), y).sum())
        slope = np.asarray(jax.jit(jax.grad(total))(jnp.asarray(v)))
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


def test_consistency_by_hand():
    clean = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
    robust = jnp.asarray([[1.5, 2.0], [0.0, 3.0], [9.0, 9.0]])
    mask = jnp.asarray([True, True, False])  # the last row is padding, however much it changes
    for top, want in [(1.0, [0.5, 4.0]), (0.5, [0.0, 4.0]), (0.25, [0.0, 3.0]), (0.1, [0.0, 0.0])]:
        got = regularized.consistency(clean, robust, mask, top=top)
        np.testing.assert_allclose(got[:2], want, err_msg=f"{top}")
    np.testing.assert_array_equal(regularized.consistency(clean, clean, mask, top=0.5), 0)


def test_costs_by_hand():
    p = np.asarray([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    logits, y = jnp.log(jnp.asarray(p, jnp.float32)), jnp.asarray([0, 2], jnp.int32)
    alike = regularized.cost_sensitive_loss(logits, y, 1 - np.eye(3), weight=2.0)
    np.testing.assert_allclose(alike, [-np.log(0.5) + 2 * 0.5, -np.log(0.8) + 2 * 0.2], rtol=1e-5)
    costs = np.asarray([[0, 4, 4], [4, 0, 1], [4, 1, 0]])
    dear = regularized.cost_sensitive_loss(logits, y, costs, weight=2.0)
    np.testing.assert_allclose(
        dear, [-4 * np.log(0.5) + 2 * (4 * 0.3 + 4 * 0.2), -2.5 * np.log(0.8) + 2 * (4 * 0.1 + 0.1)], rtol=1e-5
    )
    plain = regularized.cost_sensitive_loss(logits, y, 1 - np.eye(3), weight=0.0)
    np.testing.assert_allclose(plain, losses.cross_entropy(logits, y), rtol=1e-6)


@pytest.mark.parametrize("mode", regularized.A3T_MODES)
def test_a3t_moves_the_margin_of_a_linear_model_by_the_dual_norm(kit, key, mode):
    net, batch, eps = kit.linear(), kit.rows(32), 0.2
    point = {}
    builds = {
        "a3t": train.a3t(threats.linf(eps, WIDE), mode=mode, steps=3, step_size=2 * eps),
        "pgd": train.pgd_at(attacks.pgd(threats.linf(eps, WIDE), steps=3, step_size=2 * eps, keep="last", name="a3t")),
    }
    for name, objective in builds.items():
        point[name] = objective.find(net.apply, net.params, net.state, batch, key)["found"]
    w, y = np.asarray(net.params["w"]), np.asarray(batch["y"])
    margin = lambda x: (2 * y - 1) * (np.asarray(x) @ w + float(net.params["b"]))  # noqa: E731
    right, moved = margin(batch["x"]) > 0, margin(point["a3t"]) - margin(batch["x"])
    assert 0 < right.sum() < 32
    np.testing.assert_array_equal(point["a3t"][right], point["pgd"][right])
    rise = 0.0 if mode == "clean" else eps * np.abs(w).sum()
    np.testing.assert_allclose(moved[~right], rise, atol=1e-5)
    np.testing.assert_allclose(moved[right], -eps * np.abs(w).sum(), atol=1e-5)
    guide = {"label": jnp.asarray([0]), "sign": jnp.asarray([-1.0])}
    z = jnp.asarray([[1.0, 2.0]])
    np.testing.assert_allclose(regularized.directed(z, guide), losses.cross_entropy(z, guide["label"]))


def test_interpolation_is_linear_in_the_labels_and_reduces_to_what_it_mixes(kit, key):
    net, batch = kit.mlp(), pictures(kit)
    search = attacks.pgd(threats.linf(0.1), steps=2, keep="last")
    go = lambda objective: objective(net.apply, net.params, net.state, batch, key)[0]  # noqa: E731
    np.testing.assert_allclose(go(train.iat(search, weight=0.0, alpha=0.0)), go(train.pgd_at(search)), rtol=1e-6)
    half = go(train.iat(search, alpha=0.0))
    np.testing.assert_allclose(half, (go(train.standard()) + go(train.pgd_at(search))) / 2, rtol=1e-6)

    seen = []  # mixing by hand: what the network gets, and soft labels of the same shares

    def spy(params, state, x, **settings):
        out = net.apply(params, state, x, **settings)
        if settings.get("bn") == "train":
            seen.append((np.asarray(x), out[0]))
        return out

    mixed = train.iat(search, weight=1.0)
    got = mixed(spy, net.params, net.state, batch, key)[0]
    (x, logits), plain = seen[0], np.asarray(batch["x"])
    partner = np.asarray(regularized.partners(_mixup_keys(key, 1, batch), batch["mask"]))
    assert sorted(partner) == list(range(8)) and not np.any(partner == np.arange(8))
    far = (plain - plain[partner]).reshape(8, -1)
    share = ((x - plain[partner]).reshape(8, -1) * far).sum(-1) / (far**2).sum(-1)
    assert np.all((share > 0) & (share < 1)) and np.ptp(share) > 0.2
    np.testing.assert_allclose(x.reshape(8, -1), plain[partner].reshape(8, -1) + share[:, None] * far, atol=1e-6)
    one = np.asarray(jax.nn.one_hot(batch["y"], 3))
    soft = share[:, None] * one + (1 - share[:, None]) * one[partner]
    np.testing.assert_allclose(got, -(soft * jax.nn.log_softmax(logits)).sum(-1), rtol=1e-5)


def test_shares_are_draws_of_the_beta_distribution(key):
    keys = jax.random.split(key, 4000)
    for alpha in (1.0, 0.4):
        share = np.asarray(regularized._shares(keys, alpha))
        np.testing.assert_allclose([share.mean(), share.var()], [0.5, 1 / (4 * (2 * alpha + 1))], atol=0.01)


def _mixup_keys(key, number, batch):
    return example_keys(jax.random.fold_in(key, number), "mixup", batch["index"])


def test_partners_form_one_cycle_whatever_the_order_and_the_padding(key):
    keys = jax.random.split(key, 9)
    whole = np.asarray(regularized.partners(keys, jnp.ones(9, bool)))
    at, seen = 0, []
    for _ in range(9):
        seen.append(at)
        at = whole[at]
    assert sorted(seen) == list(range(9)) and at == 0
    order = np.random.default_rng(0).permutation(9)
    turned = np.asarray(regularized.partners(keys[order], jnp.ones(9, bool)))
    np.testing.assert_array_equal(order[turned], whole[order])
    mask = jnp.arange(9) < 6
    padded = np.asarray(regularized.partners(keys, mask))
    np.testing.assert_array_equal(padded[:6], regularized.partners(keys[:6], mask[:6]))
    np.testing.assert_array_equal(padded[6:], [6, 7, 8])
    assert np.asarray(regularized.partners(keys[:1], jnp.ones(1, bool))) == [0]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda t: train.trades(t, beta=-1.0), "beta must be"),
        (lambda t: train.mart(t, weight=-1.0), "weight must be"),
        (lambda t: train.trades(t, label_smoothing=1.0), "label_smoothing must lie in"),
        (lambda t: train.trades(t, running=("robustt",)), "Did you mean 'robust'"),
        (lambda t: train.trades(t, bn_attack="trian"), "Did you mean 'train'"),
        (lambda t: train.advlc(attacks.pgd(t), top=2.0), "top"),
        (lambda t: train.iat(attacks.pgd(t), weight=1.5), "weight"),
        (lambda t: train.iat(attacks.pgd(t), bn="global"), "unknown bn"),
        (lambda t: train.a3t(t, mode="from"), "unknown mode"),
        (lambda t: train.cost_sensitive(attacks.pgd(t), np.ones((3, 3))), "zero on the diagonal"),
        (lambda t: train.adversarial(attacks.pgd(t), losses.kl, points=("dirty",)), "unknown point 'dirty'"),
    ],
)
def test_impossible_settings_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build(threats.linf(0.1))
