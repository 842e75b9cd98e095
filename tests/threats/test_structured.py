"""Structured threats: the laws of threats, dual norms, SciPy's root, and what PGD reaches on linear models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.optimize import brentq

from jaxadv import core
from jaxadv.attacks import ATTACKS, fgsm, flattened, minus_squared_error, obs_atk, pgd, pixel_margin
from jaxadv.attacks.judge import held, unfenced
from jaxadv.losses import margin
from jaxadv.threats import (
    Categorical,
    Fenced,
    ZeroMean,
    categorical,
    l0,
    l1,
    l2,
    linf,
    masked,
    patch,
    tabular,
    union,
    weighted,
    zero_mean,
)

KEY = jax.random.key(0)
N, B = 8, 6
FREE = np.array([1, 1, 0, 1, 1, 0, 1, 1], bool)
WEIGHTS = np.array([1, 0.5, 2, 1, 0.1, 1, 4, 1], np.float32)
MISSING = np.array([0.25, np.nan, np.nan, 0.25, np.nan, np.nan, np.nan, 0.0], np.float32)
TABLE = {"whole": ~FREE, "default": MISSING, "relative": 0.5, "shift": -0.1, "scale": 2.0}
GROUPS = ((0, 2, 5), (3, 4))
KINDS = {
    "masked-l2": (lambda eps: masked(l2(eps), FREE), 0.4),
    "masked-l1": (lambda eps: masked(l1(eps), FREE), 0.6),
    "masked-l0": (lambda eps: masked(l0(eps), FREE), 2.0),
    "weighted-linf": (lambda eps: weighted(masked(linf(eps), FREE), WEIGHTS), 0.2),
    "weighted-l1": (lambda eps: weighted(l1(eps), WEIGHTS), 0.5),
    "weighted-l2": (lambda eps: weighted(l2(eps), WEIGHTS), 0.4),
    "tabular-linf": (lambda eps: tabular(linf(eps), **TABLE), 0.2),
    "zero_mean": (zero_mean, 0.4),
    "categorical": (lambda eps: categorical(linf(eps), GROUPS, changes=1.0), 0.1),
}


def draw(kind, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 1, (B, N)).astype(np.float32)
    x[0, 0], x[1, 1] = 0, 1  # some stand at a bound
    x[::2, 0] = x[2:4, 3] = 0.25  # some are missing
    if kind == "categorical":
        for group in map(list, GROUPS):
            x[:, group] = np.eye(len(group))[rng.integers(len(group), size=B)]
    return x, (x + rng.normal(size=x.shape) * 0.8).astype(np.float32), rng.normal(size=x.shape).astype(np.float32)


@jax.jit
def everything(threat, keys, x, point, grad):
    once = threat.project(point, x)
    halfway = threat.project(x + (once - x) / 2, x)
    drawn = threat.sample(keys, x)
    return (
        once,
        threat.project(once, x),
        threat.project(x, x),
        halfway,
        drawn,
        threat.steepest(grad),
        threat.size(once, x),
    )


SLOW = ("masked-l1", "weighted-l1")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in KINDS])
def test_the_laws_of_threats_hold(kind):
    """Feasible, idempotent, what is feasible stays, a budget of nothing is the identity, directions of size one."""
    build, eps = KINDS[kind]
    threat, keys = build(jnp.float32(eps)), jax.random.split(KEY, B)
    x, point, grad = draw(kind)
    once, twice, still, halfway, drawn, steep, size = map(np.asarray, everything(threat, keys, x, point, grad))
    assert core.feasible(threat, once, x).all() and threat.contains(drawn, x).all()
    assert not core.feasible(threat, point, x).any()
    np.testing.assert_allclose(twice, once, atol=2e-6)
    np.testing.assert_array_equal(still, x)
    assert (once != x).any(-1).all() and (drawn != x).any(-1).all()
    np.testing.assert_allclose(size, threat.size(once, x), rtol=1e-4, atol=1e-6)
    if kind not in ("masked-l0", "categorical"):
        np.testing.assert_allclose(halfway, x + (once - x) / 2, atol=2e-6)
    if kind.startswith("masked") or kind == "weighted-linf":
        np.testing.assert_array_equal(once[:, ~FREE], x[:, ~FREE])
        np.testing.assert_array_equal(drawn[:, ~FREE], x[:, ~FREE])
        moved = once.copy()
        moved[:, 2] = x[:, 2] + 1e-7
        assert np.isinf(threat.size(moved, x))[moved[:, 2] != x[:, 2]].all()
    free = FREE if kind.startswith(("masked", "tabular")) or kind == "weighted-linf" else np.ones(N, bool)
    unit = WEIGHTS if kind.startswith("weighted") else np.ones(N)
    pull = np.where(free, unit * grad, 0).astype(np.float64)
    dual = {"l2": np.linalg.norm(pull, axis=-1), "linf": np.abs(pull).sum(-1), "l1": np.abs(pull).max(-1)}
    dual["zero_mean"] = np.linalg.norm(grad - grad.mean(-1, keepdims=True), axis=-1)
    if (norm := kind.split("-")[-1]) in dual:
        np.testing.assert_allclose((grad * steep).sum(-1), dual[norm], rtol=1e-5)
        inside = steep / unit if norm != "zero_mean" else steep
        order = {"linf": np.inf, "l1": 1}.get(norm, 2)
        np.testing.assert_allclose(np.linalg.norm(inside, order, axis=-1), 1, rtol=1e-5)

    def none(path, leaf):
        return leaf * 0 if getattr(path[-1], "name", "") in ("eps", "changes") else leaf

    nothing = everything(jax.tree_util.tree_map_with_path(none, threat), keys, x, point, grad)
    for got in nothing[:5]:
        np.testing.assert_array_equal(got, x)


def test_a_change_without_a_mean_is_the_nearest_one_in_the_bounds():
    x, point, _ = draw("zero_mean")
    got = np.asarray(everything(zero_mean(50.0), jax.random.split(KEY, B), x, point, point)[0], np.float64)
    for row, center, found in zip(point.astype(float), x.astype(float), got):
        level = brentq(lambda t, p=row, c=center: np.sum(np.clip(p - t, 0, 1) - c), -9, 9, xtol=1e-12)
        np.testing.assert_allclose(found, np.clip(row - level, 0, 1), atol=1e-6)
        assert abs(np.mean(found - center)) < 2e-7


def test_what_is_missing_or_whole_stays_and_nothing_becomes_missing():
    threat = tabular(linf(0.3), **TABLE)
    assert isinstance(threat, Fenced)
    x, point, _ = draw("tabular")
    once = np.asarray(everything(threat, jax.random.split(KEY, B), x, point - 5, point)[0])
    free = np.asarray(threat.movable(jnp.asarray(x)))
    np.testing.assert_array_equal(free, FREE & (x != MISSING))
    assert (~free[:, 0]).sum() == 3 and (~free[:, 3]).sum() == 2
    np.testing.assert_array_equal(once[~free], x[~free])
    assert (once != MISSING)[x != MISSING].all() and (once[:, 7][x[:, 7] < 0.1] > 0).all()
    physical = np.abs(2.0 * x.astype(float) - 0.1)
    assert (np.abs(2.0 * (once.astype(float) - x)) <= 0.5 * physical * (1 + 1e-6) + 1e-6).all()
    np.testing.assert_allclose(threat.room(x), np.where(free, 0.25 * physical, 0), rtol=1e-5)
    edge = tabular(linf(0.2), default=np.zeros(2, np.float32))
    low = np.asarray(edge.project(jnp.array([[-1.0, 0.3]]), jnp.array([[0.05, 0.0]])))
    assert 0 < low[0, 0] < 1e-6 and low[0, 1] == 0


# ------------------------------------------------------------------------------------------------------ PGD, unchanged


def linear(w, x):
    return (x - 0.5).reshape(x.shape[0], -1) @ w


def problem(seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(N, 2)).astype(np.float32)
    x = rng.uniform(0.35, 0.65, (B, N)).astype(np.float32)
    x[::2, 0] = x[2:4, 3] = 0.25
    return Partial(linear, jnp.asarray(w)), x, linear(w, x).argmax(-1).astype(np.int32), w


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def fall(model, found, x, y):
    return np.asarray(margin(model(jnp.asarray(x)), jnp.asarray(y)) - margin(model(found.x), jnp.asarray(y)))


def test_pgd_reaches_the_optimum_of_a_linear_model_with_movable_features_alone():
    model, x, y, w = problem()
    slope, free = w[:, 0] - w[:, 1], FREE & (x != MISSING)
    threat = tabular(linf(0.05), **TABLE)
    found = go(pgd(threat, steps=5, loss=margin), model, x, y)
    reach = np.minimum(0.05, 0.5 * np.abs(2 * x - 0.1) / 2)
    np.testing.assert_allclose(fall(model, found, x, y), (free * reach * np.abs(slope)).sum(-1), rtol=1e-4)
    np.testing.assert_array_equal(np.asarray(found.x)[~free], x[~free])
    assert core.feasible(threat, np.asarray(found.x), x).all()
    round_ball = tabular(l2(0.1), whole=~FREE, default=MISSING)
    found = go(fgsm(round_ball, loss=margin), model, x, y)  # one step: frozen features must not shorten it
    np.testing.assert_allclose(fall(model, found, x, y), 0.1 * np.linalg.norm(free * slope, axis=-1), rtol=1e-4)
    grad = jnp.ones((B, N))
    np.testing.assert_array_equal(held(round_ball, grad, jnp.asarray(x)), free)
    np.testing.assert_array_equal(held(l2(0.1), grad, jnp.asarray(x)), grad)


def test_without_fences_it_is_the_ball_to_the_bit():
    model, x, y, _ = problem()
    plain, fenced = (go(pgd(t, steps=3), model, x, y).x for t in (linf(0.1), tabular(linf(0.1))))
    np.testing.assert_array_equal(plain, fenced)


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "settings"), [("apgd_ce", {"steps": 20}), ("fmn", {"steps": 200}), ("spsa", {})])
def test_other_attacks_that_take_fences_reach_the_optimum(attack, settings):
    model, x, y, w = problem()
    free = FREE & (x != MISSING)
    slope = np.linalg.norm(free * (w[:, 0] - w[:, 1]), axis=-1)
    gap = np.asarray(margin(model(jnp.asarray(x)), jnp.asarray(y)))
    threat = tabular(l2(3.0 if attack == "fmn" else 0.1), whole=~FREE, default=MISSING)
    found = go(ATTACKS[attack](threat, early=False, **settings), model, x, y)
    assert core.feasible(threat, np.asarray(found.x), x).all()
    np.testing.assert_array_equal(np.asarray(found.x)[~free], x[~free])
    if attack == "fmn":
        near = gap / slope < 0.2  # the box is farther
        assert near.any()
        np.testing.assert_allclose(found.size[near], (gap / slope)[near], rtol=0.02)
    else:
        share = fall(model, found, x, y) / (0.1 * slope)
        assert (share > (0.999 if attack == "apgd_ce" else 0.8)).all()


def test_every_other_attack_refuses_fences():
    takes = set()
    for name, build in ATTACKS.items():
        for ball in (linf(0.1), l2(0.5), l1(2.0), l0(3.0)):
            try:
                build(ball)
            except ValueError:
                continue
            try:
                build(masked(ball, FREE))
                takes.add(name)
            except ValueError as refusal:
                assert "without fences" in str(refusal) and name in str(refusal)
    kin = "fgsm r_fgsm bim pgd mi_fgsm adam_pgd ni_fgsm si_fgsm di_fgsm ti_fgsm vmi_fgsm nes spsa"
    assert takes == set(f"{kin} apgd_ce apgd_dlr apgd_t acg fmn".split())
    with pytest.raises(ValueError, match="pgd and its kin"):
        unfenced(masked(linf(0.1), FREE), "mine")


def test_a_patch_moves_its_rectangle_alone():
    threat = patch(linf(1.0), (4, 5, 1), 1, 2, 2, 3)
    x = np.full((1, 4, 5, 1), 0.5, np.float32)
    moved = np.asarray(threat.project(jnp.ones_like(x), jnp.asarray(x)))[0, ..., 0]
    want = np.full((4, 5), 0.5)
    want[1:3, 2:5] = 1
    np.testing.assert_array_equal(moved, want)
    for bad in ((3, 0, 2, 2), (0, 4, 1, 2), (-1, 0, 2, 2), (0, 0, 0, 1)):
        with pytest.raises(ValueError, match="inside the image"):
            patch(linf(1.0), (4, 5, 1), *bad)


def test_categories_are_the_best_by_enumeration():
    model, _, _, w = problem(3)
    x, *_ = draw("categorical")
    y = np.asarray(model(jnp.asarray(x))).argmax(-1).astype(np.int32)
    rest = [i for i in range(N) if not any(i in g for g in GROUPS)]
    x[:, rest] = 0.5
    sign = np.where(y == 0, 1, -1)[:, None]
    slope = sign * (w[:, 0] - w[:, 1])[None]
    gains = []
    for group in map(list, GROUPS):
        now = (slope[:, group] * x[:, group]).sum(-1)
        gains.append(now - slope[:, group].min(-1))
    gains, ball = np.sort(np.stack(gains, -1), -1)[:, ::-1], 0.05 * np.abs(slope[:, rest]).sum(-1)
    for changes in (1, 2):
        threat = categorical(linf(jnp.float32(0.05)), GROUPS, changes=jnp.float32(changes))
        found = go(pgd(threat, steps=4, loss=margin), model, x, y)
        np.testing.assert_allclose(fall(model, found, x, y), ball + gains[:, :changes].sum(-1), rtol=1e-4, atol=1e-5)
        assert core.feasible(threat, np.asarray(found.x), x).all()
        assert (threat.changed(np.asarray(found.x), x).sum(-1) <= changes).all()
    assert isinstance(threat, Categorical)
    torn = x.copy()
    torn[:, 0] = 0.5
    assert np.isinf(threat.size(torn, x)).all()


# ------------------------------------------------------------------------------------- outputs that are no classes


def filtered(a, v):
    return (v.reshape(v.shape[0], -1) @ a).reshape(v.shape)


def test_obs_atk_on_a_linear_denoiser_steps_along_the_projected_gradient():
    rng = np.random.default_rng(4)
    a = rng.normal(size=(9, 9)).astype(np.float32) / 3
    clean = rng.uniform(0.4, 0.6, (B, 3, 3, 1)).astype(np.float32)
    noisy = clean + rng.normal(size=clean.shape).astype(np.float32) * 0.02
    threat, model = zero_mean(0.1), flattened(Partial(filtered, jnp.asarray(a)))
    one = go(obs_atk(threat, steps=1, keep="last"), model, noisy, clean)
    flat_noisy, flat_clean = noisy.reshape(B, -1).astype(float), clean.reshape(B, -1).astype(float)
    rise = (flat_noisy @ a - flat_clean) @ a.T
    rise = rise - rise.mean(-1, keepdims=True)
    want = flat_noisy + 0.1 * rise / np.linalg.norm(rise, axis=-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(one.x).reshape(B, -1), want, atol=1e-6)
    many = go(obs_atk(threat, steps=20), model, noisy, clean)
    assert core.feasible(threat, np.asarray(many.x), noisy).all() and isinstance(threat, ZeroMean)
    assert (np.abs((np.asarray(many.x, np.float64) - noisy).mean((1, 2, 3))) < 1e-6).all()
    np.testing.assert_allclose(many.score, minus_squared_error(model(many.x), jnp.asarray(clean)), rtol=1e-5)
    assert (many.score < one.score).all() and not many.success.any()
    with pytest.raises(ValueError, match="must be zero_mean for obs_atk; got l2"):
        obs_atk(l2(0.1))


def scored(w, x):
    return (x[..., None] - 0.25) * w.reshape(1, 1, 1, -1)


def test_pgd_brings_the_pixels_of_a_segmentation_down():
    rng = np.random.default_rng(5)
    w = jnp.array([-1.0, 1.0, 0.0]) * 2
    x = rng.uniform(0.2, 0.8, (B, 2, 3)).astype(np.float32)
    model = flattened(Partial(scored, w))
    y = np.ones((B, 2, 3), np.int32)  # the margin of class 1 is 2 (x - 1/4), and where that is negative twice as much
    clean = np.asarray(pixel_margin(model(jnp.asarray(x)), jnp.asarray(y)))
    np.testing.assert_allclose(clean, 2 * np.maximum(x - 0.25, 0).sum((1, 2)), rtol=1e-5)
    found = go(pgd(linf(0.3), steps=6, loss=pixel_margin, criterion=pixel_margin), model, x, y)
    np.testing.assert_allclose(found.score, 2 * np.maximum(x - 0.55, 0).sum((1, 2)), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="two or more logits for each of the 6 pixels"):
        pixel_margin(jnp.zeros((B, 7)), jnp.asarray(y))


def test_settings_are_checked():
    for build, words in (
        (lambda: masked(linf(0.1), np.zeros(3, bool)), "free must be True for at least one"),
        (lambda: masked(union(linf(0.1), l2(1.0)), FREE), "must be a ball"),
        (lambda: weighted(l0(2.0), WEIGHTS), "got l0"),
        (lambda: weighted(l2(2.0), -WEIGHTS), "weights must be finite"),
        (lambda: tabular(linf(0.1), whole=np.ones(3, bool)), "whole must be False"),
        (lambda: tabular(linf(0.1), relative=0.0), "relative must be finite"),
        (lambda: zero_mean(-1.0), "eps must be finite"),
        (lambda: categorical(linf(0.1), [[0, 1], [1, 2]]), "share none"),
        (lambda: categorical(linf(0.1), [[0]]), "two or more columns"),
        (lambda: categorical(linf(0.1), [[0, 1]], changes=0), "changes must be finite"),
    ):
        with pytest.raises(ValueError, match=words):
            build()
    both = masked(masked(linf(0.1), np.array([1, 1, 0], bool)), np.array([0, 1, 1], bool))
    np.testing.assert_array_equal(both.free, [False, True, False])
    assert dataclasses.replace(both, eps=0.2).p == np.inf
