"""Objectives against closed forms on a linear model, and against a few lines of plain jax."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, losses, threats, train
from jaxadv.core import example_keys
from jaxadv.train import trainer

WIDE = (-10.0, 10.0)


def closed_form(params, batch, eps, dual):
    """softplus(-s (w . x + b) + eps ||w||_dual), s = +1 for class 1."""
    sign = 2.0 * batch["y"] - 1
    score = batch["x"] @ params["w"] + params["b"]
    size = jnp.sum(jnp.abs(params["w"])) if dual == 1 else jnp.sqrt(jnp.sum(params["w"] ** 2))
    return jax.nn.softplus(-sign * score + eps * size)


@pytest.mark.parametrize(("ball", "dual"), [(threats.linf, 1), (threats.l2, 2)])
@pytest.mark.parametrize("steps", [1, 4])
def test_adversarial_training_of_a_linear_model_is_the_closed_form(kit, key, ball, dual, steps):
    net, batch, eps = kit.linear(), kit.rows(), 0.3
    attack = attacks.pgd(ball(eps, WIDE), steps=steps, step_size=eps, start="zero", keep="last")
    objective = train.pgd_at(attack)
    got, (_, metrics) = jax.jit(partial(objective, net.apply))(net.params, net.state, batch, key)
    np.testing.assert_allclose(got, closed_form(net.params, batch, eps, dual), atol=2e-6)
    worst = np.asarray(closed_form(net.params, batch, eps, dual))
    np.testing.assert_array_equal(np.asarray(metrics["robust"]) > 0, worst < np.log(2))

    slope = jax.jit(partial(train.grad_fn(objective), net.apply))(net.params, net.state, batch, key)
    want = jax.grad(lambda p: closed_form(p, batch, eps, dual).sum())(net.params)
    for name in want:
        np.testing.assert_allclose(slope.total[name], want[name], atol=5e-6)
    assert float(slope.count) == 8


@pytest.mark.parametrize("step", [0, 1, 3, 9])
def test_a_growing_budget_is_the_closed_form_at_its_share(kit, key, step):
    net, batch, eps = kit.linear(), kit.rows(), 0.3
    batch["step"] = jnp.full(8, step, jnp.int32)
    attack = attacks.pgd(threats.linf(eps, WIDE), steps=2, step_size=eps, start="zero", keep="last")
    objective = train.pgd_at(attack, growth=train.schedules.growth(4))
    got, _ = jax.jit(partial(objective, net.apply))(net.params, net.state, batch, key)
    share = {0: 0.25, 1: 0.5, 3: 1.0, 9: 1.0}[step]
    np.testing.assert_allclose(got, closed_form(net.params, batch, share * eps, 1), atol=2e-6)


def test_the_step_of_training_tells_the_objective_its_number(kit, key):
    """One step at share 1/2 equals one step at half the budget: the number comes from the state of training."""
    net, batch, sgd = kit.linear(), kit.rows(), optax.sgd(0.5)

    def moved(attack, at, **settings):
        step = train.make_step(net.apply, train.pgd_at(attack, **settings), sgd)
        state = trainer.init(key, net, sgd)._replace(step=jnp.int32(at))
        return jax.jit(step)(state, batch)[0].params

    def attack(eps):
        return attacks.pgd(threats.linf(eps, WIDE), steps=1, step_size=eps, start="zero", keep="last")

    got = moved(attack(0.3), 1, growth=train.schedules.growth(4))
    np.testing.assert_allclose(got["w"], moved(attack(0.15), 1)["w"], atol=1e-6)
    assert np.abs(got["w"] - moved(attack(0.3), 1)["w"]).max() > 1e-3


def test_a_vanishing_budget_is_standard_training_to_the_bit(kit, key):
    net, batch = (
        kit.mlp(),
        dict(kit.rows(), x=jnp.asarray(np.random.default_rng(0).uniform(0, 1, (8, 4, 4, 1)), jnp.float32)),
    )
    plain = train.grad_fn(train.standard())(net.apply, net.params, net.state, batch, key)
    threat = threats.linf(1e-30)
    for objective in [train.pgd_at(attacks.pgd(threat, steps=2, keep="last")), train.fgsm_rs(threat)]:
        other = train.grad_fn(objective)(net.apply, net.params, net.state, batch, key)
        assert kit.same_bits(plain.total, other.total)
        assert float(plain.sums["loss"]) == float(other.sums["loss"])


def test_fgsm_rs_is_its_two_lines(kit, key):
    net = kit.mlp(widths=(8,))
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (6, 4, 4, 1)), jnp.float32)
    batch = {
        "x": x,
        "y": jnp.arange(6, dtype=jnp.int32) % 3,
        "index": jnp.arange(6, dtype=jnp.int32) + 50,
        "mask": jnp.ones(6, bool),
    }
    eps, alpha = 0.2, 0.3

    keys = example_keys(key, "fgsm_rs", batch["index"])
    noise = jax.vmap(lambda k: jax.random.uniform(k, (4, 4, 1), jnp.float32, -1.0, 1.0))(keys)
    start = jnp.clip(jnp.clip(x + eps * noise, x - eps, x + eps), 0, 1)
    slope = jax.grad(lambda z: losses.cross_entropy(net.apply(net.params, net.state, z)[0], batch["y"]).sum())(start)
    point = jnp.clip(jnp.clip(start + alpha * jnp.sign(slope), x - eps, x + eps), 0, 1)
    want = losses.cross_entropy(net.apply(net.params, net.state, point)[0], batch["y"])

    got, _ = train.fgsm_rs(threats.linf(eps), alpha=alpha)(net.apply, net.params, net.state, batch, key)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    default, _ = train.fgsm_rs(threats.linf(eps))(net.apply, net.params, net.state, batch, key)
    quarter, _ = train.fgsm_rs(threats.linf(eps), alpha=1.25 * eps)(net.apply, net.params, net.state, batch, key)
    np.testing.assert_array_equal(default, quarter)


def test_the_attack_leaves_running_statistics_alone_and_sees_the_mode_it_is_told(kit, key):
    net = kit.mlp("batch")
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (8, 4, 4, 1)), jnp.float32)
    batch = dict(kit.rows(), x=x)
    seen = []

    def spy(params, state, x, *, bn="eval", **settings):
        seen.append(bn)
        return net.apply(params, state, x, bn=bn, **settings)

    for bn_attack in train.objectives.ATTACK_BN:
        seen.clear()
        objective = train.pgd_at(attacks.pgd(threats.linf(0.1), steps=1, keep="last"), bn_attack=bn_attack)
        _, (state, _) = objective(spy, net.params, net.state, batch, key)
        assert (
            set(seen) == {bn_attack, "train"} | ({"local"} if bn_attack == "train" else set()) and seen[-1] == "train"
        )
        assert not kit.same_bits(state, net.state)
    model = train.frozen(net.apply, net.params, net.state)
    assert kit.same_bits(model(x), net.apply(net.params, net.state, x, bn="eval")[0])
    gradient = jax.grad(lambda p: train.frozen(net.apply, p, net.state)(x).sum())(net.params)
    assert all(not np.any(g) for g in kit.leaves(gradient))


def test_an_attack_in_train_mode_moves_the_running_statistics_at_each_of_its_points(kit, key):
    net, batch = kit.mlp("batch"), pictures(kit)
    attack = attacks.pgd(threats.linf(0.1), steps=3, keep="last")
    local, moving = (train.pgd_at(attack, bn_attack=mode) for mode in ("local", "train"))
    gradients = [train.grad_fn(o)(net.apply, net.params, net.state, batch, key) for o in (local, moving)]
    for one, two in zip(kit.leaves(gradients[0].total), kit.leaves(gradients[1].total), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)

    model = train.frozen(net.apply, net.params, net.state, bn="local")
    state, search = net.state, attack.init(example_keys(key, "pgd", batch["index"], 0), model, batch["x"], batch["y"])
    for _ in range(4):  # the last is the pass of the loss
        state = net.apply(net.params, state, search.point, bn="train")[1]
        search = attack.step(search, model, batch["x"], batch["y"])
    for one, two in zip(kit.leaves(gradients[1].state), kit.leaves(state), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)

    aligned = train.grad_align(threats.linf(0.1), weight=0.2, bn_attack="train")
    kept = aligned.find(net.apply, net.params, net.state, batch, key)["statistics"]
    assert kit.same_bits(kept, net.apply(net.params, net.state, batch["x"], bn="train")[1])

    mixed = train.iat(attack, bn_attack="train")
    found = mixed.find(net.apply, net.params, net.state, batch, key)
    after = mixed.loss(net.apply, net.params, net.state, found, key)[1][0]
    assert kit.same_bits(after, mixed.loss(net.apply, net.params, found["statistics"], found, key)[1][0])
    assert not kit.same_bits(
        after, train.iat(attack, bn_attack="local")(net.apply, net.params, net.state, batch, key)[1][0]
    )


def test_label_smoothing_is_cross_entropy_against_soft_labels():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    y = jnp.asarray([0, 1, 2, 3, 0], jnp.int32)
    soft = 0.7 * jax.nn.one_hot(y, 4) + 0.3 / 4
    np.testing.assert_allclose(
        train.smoothed_cross_entropy(logits, y, 0.3), -(soft * jax.nn.log_softmax(logits)).sum(-1), rtol=1e-5
    )
    np.testing.assert_array_equal(train.smoothed_cross_entropy(logits, y, 0.0), losses.cross_entropy(logits, y))


def test_randomness_of_an_example_does_not_depend_on_its_place(kit, key):
    net = kit.mlp()
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (8, 4, 4, 1)), jnp.float32)
    batch = dict(kit.rows(), x=x)
    turned = {name: a[::-1] for name, a in batch.items()}
    objective = train.fgsm_rs(threats.linf(0.2))
    one, _ = objective(net.apply, net.params, net.state, batch, key)
    two, _ = objective(net.apply, net.params, net.state, turned, key)
    np.testing.assert_allclose(one, two[::-1], rtol=1e-5)
    other, _ = objective(net.apply, net.params, net.state, dict(batch, index=batch["index"] + 1), key)
    assert not np.allclose(one, other)


def test_every_objective_is_there_by_name():
    assert {"standard", "pgd_at", "fgsm_at", "fgsm_rs", "n_fgsm"} <= set(train.OBJECTIVES)
    assert all(train.OBJECTIVES[name] is getattr(train, name) for name in train.OBJECTIVES)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_n_fgsm_without_noise_is_fgsm(kit, key, clip):
    net, batch = kit.mlp(), pictures(kit)
    plain = train.fgsm_at(threats.linf(0.1)).find(net.apply, net.params, net.state, batch, key)["found"]
    noisy = train.n_fgsm(threats.linf(0.1), noise=0.0, clip=clip)
    np.testing.assert_array_equal(noisy.find(net.apply, net.params, net.state, batch, key)["found"], plain)
    x = batch["x"]
    slope = jax.grad(lambda z: losses.cross_entropy(net.apply(net.params, net.state, z)[0], batch["y"]).sum())(x)
    np.testing.assert_allclose(plain, jnp.clip(x + 0.1 * jnp.sign(slope), 0, 1), atol=1e-7)


def test_n_fgsm_with_the_settings_of_fgsm_rs_is_fgsm_rs_to_the_bit(kit, key):
    net, batch, threat = kit.mlp(), pictures(kit), threats.linf(0.2)
    rs, n = train.fgsm_rs(threat), train.n_fgsm(threat, noise=1.0, alpha=1.25 * 0.2, clip=1.0)
    attack = n.keywords["attack"]
    same_keys = dataclasses.replace(attack, attack=dataclasses.replace(attack.attack, name="fgsm_rs"))
    one = rs(net.apply, net.params, net.state, batch, key)
    two = train.pgd_at(same_keys, bn_attack="local")(net.apply, net.params, net.state, batch, key)
    assert kit.same_bits(one, two)


def test_the_points_of_n_fgsm_go_beyond_the_budget_and_not_beyond_the_bounds(kit, key):
    net, eps = kit.linear(features=500), 0.1
    batch = kit.rows(features=500)
    objective = train.n_fgsm(threats.linf(eps, (-1.0, 1.0)), noise=2.0)
    point = objective.find(net.apply, net.params, net.state, batch, key)["found"]
    assert float(jnp.abs(point).max()) <= 1
    move = np.asarray(point - batch["x"])
    free = np.abs(np.asarray(batch["x"])) < 1 - 3 * eps
    assert np.abs(move).max() <= 3 * eps + 1e-6 and np.abs(move[free]).max() > 2.9 * eps
    # E delta^2 = (2 eps)^2 / 3 + eps^2, noise and step being independent on a linear model
    np.testing.assert_allclose(np.mean(move[free] ** 2), (4 / 3 + 1) * eps**2, rtol=0.05)
    clipped = train.n_fgsm(threats.linf(eps, (-1.0, 1.0)), clip=2.0)
    found = clipped.find(net.apply, net.params, net.state, batch, key)["found"]
    np.testing.assert_allclose(np.abs(found - batch["x"]).max(), 2 * eps, atol=1e-6)


def test_an_objective_can_be_parted_into_its_search_and_its_loss(kit, key):
    net, batch = kit.mlp(), pictures(kit)
    for objective in (train.standard(), train.fgsm_rs(threats.linf(0.1))):
        find, loss = train.objectives.halves(objective)
        found = find(net.apply, net.params, net.state, batch, key)
        parts = loss(net.apply, net.params, net.state, found, key)
        assert kit.same_bits(parts, objective(net.apply, net.params, net.state, batch, key))
        assert ("found" in found) == isinstance(objective, train.Adversarial)
    # an attack that is guided by the label and one that is guided by the clean prediction
    model = train.frozen(net.apply, net.params, net.state)
    assert train.objectives.labels(model, batch) is batch["y"]
    np.testing.assert_array_equal(train.objectives.clean_logits(model, batch), model(batch["x"]))


def pictures(kit):
    x = np.random.default_rng(0).uniform(0, 1, (8, 4, 4, 1))
    return dict(kit.rows(), x=jnp.asarray(x, jnp.float32))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: train.standard(label_smoothing=1.0), "label_smoothing must lie in"),
        (lambda: train.standard(bn="global"), "unknown bn 'global'"),
        (lambda: train.fgsm_rs(threats.linf(0.1), alpha=0.0), "alpha must be finite and greater than 0"),
        (lambda: train.n_fgsm(threats.linf(0.1), noise=-1.0), "noise must be"),
        (lambda: train.n_fgsm(threats.linf(0.1), clip=0.0), "clip must be"),
        (lambda: train.fgsm_at(threats.linf(0.1), alpha=0.0), "alpha must be"),
        (lambda: train.objectives.check_smoothing(-0.1), "label_smoothing must lie in"),
        (lambda: train.pgd_at(attacks.square(threats.linf(0.1)), bn_attack="train"), "'local' gives the same points"),
        (lambda: train.pgd_at(attacks.pgd(threats.linf(0.1), early=True), bn_attack="train"), "with early=True"),
        (lambda: train.pgd_at(attacks.pgd(threats.linf(0.1)), bn_attack="locl"), "Did you mean 'local'"),
    ],
)
def test_impossible_settings_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
