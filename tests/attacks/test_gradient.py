"""The gradient engine against closed forms on linear models, identities between its wirings, and torch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.tree_util import Partial

from jaxadv import core, losses
from jaxadv.attacks import ATTACKS, GradientAttack, best_of, bim, fgsm, mi_fgsm, pgd, r_fgsm
from jaxadv.threats import l0, l1, l2, linf

KEY = jax.random.key(0)
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
FIXTURE = Path(__file__).parents[1] / "fixtures" / "gradient_torch.npz"


def linear(w, x):
    return x @ w


def problem(seed=0, n=12, b=8, low=0.4, high=0.6, classes=2):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(n, classes)).astype(np.float32)
    x = rng.uniform(low, high, (b, n)).astype(np.float32)
    y = (x @ w).argmax(-1).astype(np.int32)
    return Partial(linear, jnp.asarray(w)), jnp.asarray(x), jnp.asarray(y), w, x, y


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def slopes(w, y):
    return w.T[y] - w.T[1 - y]


def margins(w, x, y):
    return (slopes(w, y) * x).sum(-1)


@pytest.mark.parametrize("kind", ["linf", "l2", "l1"])
def test_linear_model_without_the_box_meets_the_dual_norm(kind):
    model, x, y, w, xs, ys = problem()
    threat = {"linf": linf, "l2": l2, "l1": l1}[kind](0.2)
    found = go(pgd(threat, steps=40, start="zero"), model, x, y)
    want = margins(w, xs, ys) - 0.2 * np.linalg.norm(slopes(w, ys), DUAL[kind], axis=-1)
    np.testing.assert_allclose(found.score, want, atol=2e-4)
    np.testing.assert_array_equal(found.success, want < 0)
    assert core.feasible(threat, np.asarray(found.x), xs).all()
    drawn = go(pgd(threat, steps=40), model, x, y)  # from a random start it converges, and never goes below
    assert (np.asarray(drawn.score) >= want - 1e-4).all()
    np.testing.assert_allclose(drawn.score, want, atol=0.02)


def test_linear_model_l0_takes_the_heaviest_features_to_the_box():
    model, x, y, w, xs, ys = problem(low=0.5, high=0.5)
    slope = np.abs(slopes(w, ys))
    for count in (1, 3):
        found = go(pgd(l0(float(count)), steps=20, start="zero"), model, x, y)
        want = margins(w, xs, ys) - 0.5 * -np.sort(-slope, -1)[:, :count].sum(-1)
        np.testing.assert_allclose(found.score, want, atol=1e-4)


@pytest.mark.parametrize("kind", ["linf", "l1"])
def test_linear_model_with_an_active_box(kind):
    """linf: each feature goes as far as box and budget let it. l1: a fractional knapsack filled by slope."""
    model, x, y, w, xs, ys = problem(low=0.0, high=1.0)
    slope, eps = slopes(w, ys), {"linf": 0.4, "l1": 2.0}[kind]
    room = np.where(slope > 0, xs, 1 - xs)
    if kind == "linf":
        drop = (np.abs(slope) * np.minimum(room, eps)).sum(-1)
    else:
        drop = np.zeros(len(ys))
        for i in range(len(ys)):
            left = eps
            for j in np.argsort(-np.abs(slope[i])):
                take = min(left, room[i, j])
                drop[i] += take * abs(slope[i, j])
                left -= take
    found = go(pgd({"linf": linf, "l1": l1}[kind](eps), steps=100, step_size=0.05, start="zero"), model, x, y)
    np.testing.assert_allclose(found.score, margins(w, xs, ys) - drop, atol=5e-3)
    assert (np.asarray(found.score) >= margins(w, xs, ys) - drop - 1e-4).all()


def test_targeted_attack_reaches_the_target_by_the_closed_form():
    model, x, y, w, xs, ys = problem(classes=2)
    aim = core.Targets(label=y, target=1 - y)
    for eps in (0.01, 0.3):
        found = go(fgsm(linf(eps)), model, x, aim)
        want = margins(w, xs, ys) - eps * np.abs(slopes(w, ys)).sum(-1)
        np.testing.assert_allclose(found.score, want, atol=1e-5)
        np.testing.assert_array_equal(found.success, want < 0)
    model, x, y, w, xs, _ = problem(classes=5)
    target = jnp.asarray((np.asarray(y) + 2) % 5)
    found = go(pgd(linf(0.3), steps=20), model, x, core.Targets(label=y, target=target))
    hit = np.asarray(model(found.x)).argmax(-1) == np.asarray(target)
    np.testing.assert_array_equal(found.success, hit)
    assert hit.any()


def net(seed=1, n=16, k=4):
    rng = np.random.default_rng(seed)
    params = [jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]) * 2, jnp.float32) for s in ((n, 20), (20, k))]
    x = jnp.asarray(rng.uniform(0.1, 0.9, (10, n)), jnp.float32)
    model = Partial(lambda p, x: jnp.tanh(x @ p[0]) @ p[1], params)
    return model, x, jnp.argmax(model(x), -1).astype(jnp.int32)


MODEL, X, Y = net()


def test_one_pgd_step_from_the_clean_point_is_fgsm_by_hand():
    grad = jax.grad(lambda x: losses.minus_cross_entropy(MODEL(x), Y).sum())(X)
    want = jnp.clip(X - 0.1 * jnp.sign(grad), 0, 1)
    one = go(pgd(linf(0.1), steps=1, step_size=0.1, start="zero", keep="last"), MODEL, X, Y)
    np.testing.assert_allclose(one.x, want, atol=1e-7)
    np.testing.assert_array_equal(go(fgsm(linf(0.1), keep="last"), MODEL, X, Y).x, one.x)
    np.testing.assert_array_equal(one.queries, 2)
    np.testing.assert_array_equal(one.grads, 1)
    long = grad / jnp.linalg.norm(grad, axis=-1, keepdims=True)
    np.testing.assert_allclose(go(fgsm(l2(0.1), keep="last"), MODEL, X, Y).x, jnp.clip(X - 0.1 * long, 0, 1), atol=1e-6)


def test_momentum_without_memory_is_bim_and_with_it_the_sum_by_hand():
    plain = go(bim(linf(0.1), steps=4, step_size=0.025, keep="last"), MODEL, X, Y)
    none = go(mi_fgsm(linf(0.1), steps=4, decay=0.0, keep="last"), MODEL, X, Y)
    np.testing.assert_array_equal(none.x, plain.x)
    point, memory = X, jnp.zeros_like(X)
    for _ in range(4):
        grad = jax.grad(lambda x: losses.minus_cross_entropy(MODEL(x), Y).sum())(point)
        memory = 0.9 * memory + grad / jnp.abs(grad).sum(-1, keepdims=True)
        point = jnp.clip(jnp.clip(point - 0.025 * jnp.sign(memory), X - 0.1, X + 0.1), 0, 1)
    np.testing.assert_allclose(go(mi_fgsm(linf(0.1), steps=4, decay=0.9, keep="last"), MODEL, X, Y).x, point, atol=1e-6)
    assert mi_fgsm(linf(0.1), decay=0.9).transform is mi_fgsm(linf(0.2), decay=0.9).transform


def test_r_fgsm_starts_half_way_along_random_signs():
    attack = r_fgsm(linf(0.1), keep="last")
    keys = core.example_keys(KEY, "r_fgsm", jnp.arange(10))
    start = np.asarray(attack.init(keys, MODEL, X, Y).point)
    np.testing.assert_allclose(np.abs(start - X), 0.05, atol=1e-6)
    assert abs(np.mean(start > X) - 0.5) < 0.15
    grad = jax.grad(lambda x: losses.minus_cross_entropy(MODEL(x), Y).sum())(jnp.asarray(start))
    np.testing.assert_allclose(go(attack, MODEL, X, Y).x, jnp.clip(start - 0.05 * jnp.sign(grad), 0, 1), atol=1e-6)


def tiny(logits, y):
    return 1e-8 * losses.minus_cross_entropy(logits, y)


def test_a_loss_scaled_by_1e_8_gives_the_same_l2_attack():
    for threat in (l2(0.5), linf(0.05)):
        same = [go(pgd(threat, steps=5, loss=f), MODEL, X, Y).x for f in (losses.minus_cross_entropy, tiny)]
        np.testing.assert_allclose(*same, atol=1e-5)


def test_the_best_point_is_never_worse_and_the_last_is_the_last():
    kinds = {keep: go(pgd(linf(0.2), steps=6, step_size=0.15, keep=keep), MODEL, X, Y) for keep in ("best", "last")}
    attack = pgd(linf(0.2), steps=6, step_size=0.15)
    state = attack.init(core.example_keys(KEY, "pgd", jnp.arange(10)), MODEL, X, Y)
    seen = [X, state.point]
    for _ in range(6):
        state = attack.step(state, MODEL, X, Y)
        seen.append(state.point)
    scores = np.stack([losses.margin(MODEL(p), Y) for p in seen])
    np.testing.assert_allclose(kinds["best"].score, scores.min(0), atol=1e-5)
    np.testing.assert_allclose(kinds["last"].score, scores[-1], atol=1e-4)
    assert (scores[-1] > scores.min(0) + 1e-4).any()  # here the two differ


def test_early_rows_stop_at_their_first_failure():
    full, early = (go(pgd(linf(0.3), steps=12, early=e), MODEL, X, Y) for e in (False, True))
    np.testing.assert_array_equal(early.success, full.success)
    assert len(set(np.asarray(early.grads).tolist())) > 1
    assert (np.asarray(early.grads)[~np.asarray(early.success)] == 12).all()
    wrong = (Y + 1) % 4
    found = go(pgd(linf(0.3), steps=12, early=True), MODEL, X, wrong)
    np.testing.assert_array_equal(found.grads, 0)
    assert np.asarray(found.success).all() and core.feasible(linf(0.3), np.asarray(found.x), np.asarray(X)).all()
    assert (np.asarray(found.score) <= np.asarray(losses.margin(MODEL(X), wrong)) + 1e-6).all()


def test_flags_of_nan_zero_gradients_and_inputs_outside_the_box():
    sick = Partial(lambda x: MODEL(x) * jnp.where(x[:, :1] > X[4, 0] - 0.05, jnp.nan, 1.0))
    found = go(pgd(linf(0.01), steps=3), sick, X, Y)
    want = np.asarray(X[:, 0] > X[4, 0] - 0.03)
    assert np.asarray(found.flags["nonfinite"])[want].all() and np.asarray(found.success)[want].all()
    assert not np.asarray(found.flags["nonfinite"])[np.asarray(X[:, 0] < X[4, 0] - 0.07)].any()
    assert np.isfinite(found.x).all()
    masked = go(pgd(linf(0.01), steps=3), Partial(lambda x: lax.stop_gradient(MODEL(x))), X, Y)
    assert np.asarray(masked.flags["zero_gradient"]).all() and not np.asarray(found.flags["infeasible"]).any()
    out = go(pgd(linf(0.01), steps=3), MODEL, X.at[3, 2].set(1.5), Y)
    np.testing.assert_array_equal(out.flags["infeasible"], np.arange(10) == 3)


def test_radius_sweep_restarts_and_schedules():
    sweep = jax.jit(jax.vmap(lambda e: pgd(linf(e), steps=3).run(KEY, MODEL, X, Y).score))(jnp.float32([0.05, 0.1]))
    for row, eps in zip(sweep, (0.05, 0.1)):
        np.testing.assert_allclose(row, go(pgd(linf(jnp.float32(eps)), steps=3), MODEL, X, Y).score, atol=1e-4)
    many = best_of(pgd(linf(0.1), steps=2), KEY, MODEL, X, Y, restarts=3)
    assert (np.asarray(many.score) <= np.asarray(go(pgd(linf(0.1), steps=2), MODEL, X, Y).score) + 1e-5).all()
    half = go(pgd(linf(0.1), steps=3, step_size=0.04, schedule=lambda s: 0.5), MODEL, X, Y)
    np.testing.assert_allclose(half.x, go(pgd(linf(0.1), steps=3, step_size=0.02), MODEL, X, Y).x, atol=1e-6)


ADAM = optax.scale_by_adam()


def test_adam_is_vmapped_over_rows():
    attack = pgd(linf(0.1), steps=4, step_size=0.02, transform=ADAM, steep=False, start="zero", keep="last")
    whole = go(attack, MODEL, X, Y)
    alone = go(attack, MODEL, X[3:4], Y[3:4])
    np.testing.assert_allclose(whole.x[3:4], alone.x, atol=1e-5)
    grad = jax.grad(lambda x: losses.minus_cross_entropy(MODEL(x), Y).sum())(X)
    first = go(
        pgd(linf(0.1), steps=1, step_size=0.02, transform=ADAM, steep=False, start="zero", keep="last"), MODEL, X, Y
    )
    np.testing.assert_allclose(first.x, X - 0.02 * jnp.sign(grad), atol=1e-4)


def test_logits_may_guide_in_place_of_labels():
    attack = pgd(linf(0.1), steps=5, loss=losses.minus_kl, criterion=losses.minus_kl)
    found = go(attack, MODEL, X, MODEL(X))
    assert (np.asarray(found.score) < -1e-3).all() and not np.asarray(found.success).any()


def test_unclipped_start_leaves_the_box_and_comes_back():
    attack = fgsm(linf(0.3), start="unclipped", keep="last", step_size=0.375)
    low = jnp.zeros_like(X)
    start = attack.init(core.example_keys(KEY, "fgsm", jnp.arange(10)), MODEL, low, Y).point
    assert float(start.min()) < -0.2
    assert core.feasible(linf(0.3), np.asarray(go(attack, MODEL, low, Y).x), np.asarray(low)).all()
    with pytest.raises(ValueError, match=r"unclipped.*keep='last' and a norm ball; got"):
        pgd(linf(0.3), start="unclipped")


def test_settings_are_checked_and_names_known():
    assert {"fgsm", "r_fgsm", "bim", "pgd", "mi_fgsm"} <= set(ATTACKS) and isinstance(fgsm(linf(0.1)), GradientAttack)
    assert float(pgd(linf(0.2), steps=10).step_size) == pytest.approx(0.05)
    with pytest.raises(ValueError, match=r"steps must .*got 0"):
        pgd(linf(0.1), steps=0)
    with pytest.raises(ValueError, match=r"step_size must .*got -1.*2.5 \* eps"):
        pgd(linf(0.1), step_size=-1.0)
    with pytest.raises(ValueError, match=r"unknown start 'zeros'.*mean 'zero'"):
        pgd(linf(0.1), start="zeros")
    with pytest.raises(ValueError, match=r"unknown keep 'first'.*best, last"):
        pgd(linf(0.1), keep="first")


def cnn(params, x):
    numbers = ("NHWC", "OIHW", "NHWC")
    for name in ("0", "2"):
        x = lax.conv_general_dilated(x, params[f"{name}.weight"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=numbers)
        x = jax.nn.relu(x + params[f"{name}.bias"].reshape(1, 1, 1, -1))
    x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
    x = jax.nn.relu(x @ params["5.weight"].T + params["5.bias"][None])
    return x @ params["7.weight"].T + params["7.bias"][None]


@pytest.mark.parametrize("name", ["fgsm", "pgd", "bim", "mi_fgsm"])
def test_parity_with_torchattacks(name):
    """At least 99.9 % of the pixels agree; the rest follow the sign of a gradient that is zero up to rounding."""
    stored = np.load(FIXTURE)
    params = {k.removeprefix("w."): jnp.asarray(v) for k, v in stored.items() if k.startswith("w.")}
    eps, steps, size = (stored[k].item() for k in ("eps", "steps", "step_size"))
    wiring = {
        "fgsm": lambda: fgsm(linf(eps), keep="last"),
        "pgd": lambda: pgd(linf(eps), steps=steps, step_size=size, start="zero", keep="last"),
        "bim": lambda: bim(linf(eps), steps=steps, step_size=size, keep="last"),
        "mi_fgsm": lambda: mi_fgsm(linf(eps), steps=steps, step_size=size, decay=1.0, keep="last"),
    }
    x, y = jnp.asarray(stored["x"]), jnp.asarray(stored["y"])
    np.testing.assert_allclose(cnn(params, x), stored["logits"], atol=1e-5)
    found = go(wiring[name](), Partial(cnn, params), x, y)
    agree = np.abs(np.asarray(found.x) - stored[name]) < 1e-6
    assert agree.mean() >= 0.999, f"{(~agree).sum()} of {agree.size} pixels differ"
    assert np.abs(stored[name] - stored["x"]).max() > 0.9 * eps
