"""AutoPGD against the official code step for step, closed forms on linear models, and what its docstring promises."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from jaxadv import core, losses
from jaxadv.attacks import APGD, ATTACKS, apgd, apgd_ce, apgd_dlr, apgd_t
from jaxadv.attacks.apgd import dlr_or_margin, dlr_targeted_or_margin, largest_where, plan
from jaxadv.core import Targets
from jaxadv.threats import l0, l1, l2, linf, union

KEY = jax.random.key(0)
BALLS = {"linf": linf, "l2": l2, "l1": l1}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
FIXTURE = Path(__file__).parents[1] / "fixtures" / "apgd_torch.npz"


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def linear(w, x):
    return x.reshape(x.shape[0], -1) @ w


def problem(seed=0, n=12, b=16, low=0.4, high=0.6, classes=2):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(n, classes)).astype(np.float32)
    x = rng.uniform(low, high, (b, n)).astype(np.float32)
    return Partial(linear, jnp.asarray(w)), x, (x @ w).argmax(-1).astype(np.int32), w


def net(seed=1, n=16, k=5, rows=24, scale=2.0):
    rng = np.random.default_rng(seed)
    params = [jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]) * scale, jnp.float32) for s in ((n, 20), (20, k))]
    x = jnp.asarray(rng.uniform(0.1, 0.9, (rows, n)), jnp.float32)
    return Partial(tanh, params), x, jnp.argmax(tanh(params, x), -1).astype(jnp.int32)


def tanh(params, x):
    return jnp.tanh(x @ params[0]) @ params[1]


# ----------------------------------------------------------------------------------------------- official, by step


def cnn(params, x):
    """The fixture's network, channels-last."""
    for i in ("0", "2"):
        kernel = jnp.transpose(params[f"{i}.weight"], (2, 3, 1, 0))
        x = lax.conv_general_dilated(x, kernel, (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + params[f"{i}.bias"][None, None, None])
    x = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
    x = jax.nn.relu(x @ params["5.weight"].T + params["5.bias"][None])
    return x @ params["7.weight"].T + params["7.bias"][None]


def follow(monkeypatch, attack, start, params, x, y):
    """Every point that the attack asks, from a given start, and the states between."""
    monkeypatch.setattr(APGD, "_start", lambda self, keys, threat, eps, x: start)
    monkeypatch.setattr(APGD, "_remember", lambda self, state, point, *verdict: state._replace(found=point))
    model = Partial(cnn, params)
    state = jax.jit(attack.init)(core.example_keys(KEY, attack.name, jnp.arange(len(y))), model, x, y)
    step = jax.jit(lambda s: attack.step(s, model, x, y))
    states = []
    for _ in range(attack.max_steps):
        state = step(state)
        states.append(jax.device_get(state._replace(keys=state.step)))
    return np.stack([s.found for s in states]), states


RUNS = {
    "linf_ce": lambda eps, **s: apgd_ce(linf(eps[0]), **s),
    "l2_ce": lambda eps, **s: apgd_ce(l2(eps[1]), **s),
    "l1_ce": lambda eps, **s: apgd_ce(l1(eps[2]), **s),
    "linf_t": lambda eps, **s: apgd_t(linf(eps[0]), targets=1, **s),
    "l1_ce_large": lambda eps, **s: apgd_ce(l1(eps[2]), large_eps=True, **s),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_iterate_is_the_official_one(monkeypatch, name):
    stored = np.load(FIXTURE)
    with jax.enable_x64(True):
        params = {k[2:]: jnp.asarray(stored[k], jnp.float64) for k in stored if k.startswith("w.")}
        x, y = jnp.asarray(stored["x"], jnp.float64), jnp.asarray(stored["y"])
        start = jnp.asarray(stored[f"{name}/start"])
        attack = RUNS[name](stored["eps"].tolist(), steps=int(stored["steps"]), compat="official", early=False)
        asked, states = follow(monkeypatch, attack, start, params, x, y)
        assert len(asked) == len(stored[f"{name}/loss"]) == attack.max_steps
        got = jax.jit(lambda z, y: losses.cross_entropy(cnn(params, z), y))(
            jnp.asarray(asked.reshape(-1, 8, 8, 1)), jnp.tile(y, len(asked))
        )
    np.testing.assert_allclose(asked[stored[f"{name}/at"]], stored[f"{name}/path"], atol=1e-5)
    np.testing.assert_allclose(states[-1].best, stored[f"{name}/best"], atol=1e-5)
    if not name.endswith("_t"):
        np.testing.assert_allclose(got.reshape(len(asked), -1), stored[f"{name}/loss"], atol=1e-4)
    lengths = np.stack([s.length for s in states])
    assert len(np.unique(lengths)) > 2  # the schedule was at work


def test_the_official_quirks_are_quirks(monkeypatch):
    """Without `compat` the first check compares with the start, and l2 points keep their length at the box."""
    stored = np.load(FIXTURE)
    params = {k[2:]: jnp.asarray(stored[k]) for k in stored if k.startswith("w.")}
    x, y, eps = jnp.asarray(stored["x"]), jnp.asarray(stored["y"]), stored["eps"].tolist()
    start = jnp.asarray(stored["l2_ce/start"], jnp.float32)
    ours, states = follow(monkeypatch, apgd_ce(l2(eps[1]), steps=10, early=False), start, params, x, y)
    theirs, official = follow(
        monkeypatch, apgd_ce(l2(eps[1]), steps=10, early=False, compat="official"), start, params, x, y
    )
    np.testing.assert_array_equal(official[0].last_loss, 0)
    np.testing.assert_array_equal(states[0].last_loss, states[0].best_loss)
    length = np.linalg.norm((ours - np.asarray(x)).reshape(len(ours), len(y), -1), axis=-1)
    short = np.linalg.norm((theirs - np.asarray(x)).reshape(len(ours), len(y), -1), axis=-1)
    assert (length[1:] >= short[1:] - 1e-5).mean() > 0.9 and (length > short + 1e-3).any()


# ----------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("make", [apgd_ce, apgd_dlr, apgd_t])
@pytest.mark.parametrize("kind", ["linf", "l2"])
def test_linear_model_meets_the_dual_norm(kind, make):
    model, x, y, w = problem()
    threat = BALLS[kind](0.1)
    found = go(make(threat, steps=50, early=False), model, x, y)
    slope = w.T[y] - w.T[1 - y]
    want = (slope * x).sum(-1) - 0.1 * np.linalg.norm(slope, DUAL[kind], axis=-1)
    np.testing.assert_allclose(found.score, want, atol=1e-5)
    np.testing.assert_array_equal(found.success, want < 0)
    if kind == "linf":  # the corner that FGSM takes
        np.testing.assert_allclose(found.x, x - 0.1 * np.sign(slope), atol=1e-6)
    assert core.feasible(threat, np.asarray(found.x), x).all()


@pytest.mark.parametrize("large_eps", [False, True])
def test_linear_model_in_l1_comes_near_the_dual_norm_with_few_features(large_eps):
    model, x, y, w = problem(n=40)
    found = go(apgd_ce(l1(0.3), early=False, large_eps=large_eps), model, x, y)
    slope = w.T[y] - w.T[1 - y]
    best, clean = 0.3 * np.abs(slope).max(-1), (slope * x).sum(-1)
    gain = clean - np.asarray(found.score)
    assert (gain <= best + 1e-5).all() and (gain >= 0.7 * best).all()
    assert core.feasible(l1(0.3), np.asarray(found.x), x).all()
    assert ((np.asarray(found.x) != x).sum(-1) <= 10).all()


def test_a_box_in_the_way_is_filled():
    model, x, y, w = problem(low=0.0, high=1.0)
    slope = w.T[y] - w.T[1 - y]
    corner = np.clip(x - 0.4 * np.sign(slope), 0, 1)
    found = go(apgd_ce(linf(0.4), steps=50, early=False), model, x, y)
    np.testing.assert_allclose(found.score, (slope * corner).sum(-1), atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the machine


def test_checkpoints_are_the_papers():
    table = plan("linf", 100)
    np.testing.assert_array_equal(np.flatnonzero(table.check), [22, 41, 57, 70, 80, 87, 93, 99])
    assert len(table.begin) == 101 and table.begin.sum() == 1 and plan("l2", 1).check.tolist() == [False, True]
    table = plan("l1", 100, large_eps=True)
    np.testing.assert_array_equal(np.flatnonzero(table.begin), [0, 31, 62])
    np.testing.assert_array_equal(table.factor[[0, 31, 62]], [3, 2, 1])
    assert len(table.begin) == 103 and table.final.sum() == 41
    assert apgd(linf(0.1), restarts=3).max_steps == 303 and apgd_t(l1(1.0), large_eps=True, targets=5).max_steps == 515


def test_the_largest_number_where_a_condition_holds_is_exact():
    value = np.abs(np.random.default_rng(0).normal(size=(6, 30))).astype(np.float32)
    value[0], value[1, :15] = 0, 0
    keep = np.array([1, 30, 10, 1, 29, 7])
    got = largest_where(
        lambda least: (jnp.asarray(value) >= least[:, None]).sum(-1) >= keep, jnp.asarray(value.max(-1))
    )
    np.testing.assert_array_equal(got, [np.sort(row)[::-1][k - 1] for row, k in zip(value, keep)])


def walk(attack, model, x, y, rows=None):
    """All states of a search, with every row stepped to the end."""
    keys = core.example_keys(KEY, attack.name, jnp.arange(x.shape[0]))
    state, step = attack.init(keys, model, x, y), jax.jit(lambda s: attack.step(s, model, x, y))
    states = [state]
    for _ in range(attack.max_steps):
        states.append(state := step(state))
    return states


@pytest.mark.parametrize("kind", BALLS)
def test_lengths_only_shrink_losses_never_rise_and_points_are_feasible(kind):
    model, x, y = net()
    threat = BALLS[kind]({"linf": 0.1, "l2": 0.4, "l1": 1.0}[kind])
    states = walk(apgd_ce(threat, steps=60, restarts=1, early=False), model, x, y)[1:]
    loss, length = (np.stack([getattr(s, name) for s in states]) for name in ("best_loss", "length"))
    assert (np.diff(loss, axis=0) <= 0).all()
    for state in states:
        for point in (state.point, state.best, state.found):
            assert core.feasible(threat, np.asarray(point), np.asarray(x)).all()
    if kind == "l1":
        assert (length <= 1.0 + 1e-6).all() and (length >= 0.1 - 1e-6).all()
    else:
        ratio = length[1:] / length[:-1]
        assert set(np.unique(ratio)) <= {1.0, 0.5} and (ratio == 0.5).any(axis=0).all()
    states = walk(apgd_ce(threat, steps=60, rho=0.0, early=False), model, x, y)
    if kind == "linf":  # no share of successful moves is too small: only standing still halves
        assert np.mean(states[-1].length) > length[-1].mean()


def test_standing_still_halves_at_every_other_check():
    """At the corner of a linear model nothing improves any more: the first check passes, then every second halves."""
    model, x, y, _ = problem(b=4)
    states = walk(apgd_ce(linf(0.1), rho=0.0, early=False), model, jnp.asarray(x), jnp.asarray(y))
    halves = np.cumsum(np.isin(np.arange(101), [41, 70, 87, 99]))
    lengths = np.stack([s.length for s in states[1:]])
    np.testing.assert_allclose(lengths, np.repeat(0.2 / 2.0 ** halves[:, None], 4, 1), rtol=1e-6)


def test_rounds_start_anew_and_large_budgets_shrink_to_the_given_one():
    model, x, y = net()
    states = walk(apgd_ce(linf(0.1), steps=5, restarts=2, early=False), model, x, y)
    first, second = (np.asarray(states[i].point) for i in (1, 7))
    np.testing.assert_allclose(states[7].length, 0.2)
    for start in (first, second):  # as far from x as the budget lets them
        np.testing.assert_allclose(np.abs(start - np.asarray(x)).max(-1), 0.1, atol=1e-6)
    assert (first != second).any(axis=-1).all() and states[7].halved.all()
    states = walk(apgd_ce(l1(0.5), steps=10, large_eps=True, early=False), model, x, y)
    sizes = np.stack([np.abs(np.asarray(s.point) - np.asarray(x)).sum(-1) for s in states[1:]])
    assert (sizes[:4] <= 1.5 + 1e-5).all() and (sizes[4:8] <= 1.0 + 1e-5).all() and (sizes[8:] <= 0.5 + 1e-5).all()
    assert sizes[:4].max() > 1.4
    before = walk(apgd_ce(l1(0.5), steps=10, large_eps=True, early=False), model, x, y)[4]
    np.testing.assert_allclose(states[5].point, l1(1.0).project(before.best, x), atol=1e-6)


def test_targets_follow_the_clean_logits():
    model, x, y = net()
    attack = apgd_t(linf(0.05), targets=3, restarts=2, steps=4, early=False)
    states = walk(attack, model, x, y)
    order = np.argsort(-np.asarray(model(x)), axis=-1)[:, 1:4]
    np.testing.assert_array_equal(states[0].order, order)
    for step in range(attack.max_steps):
        aim = attack._aim(states[step], y)
        np.testing.assert_array_equal(aim.target, order[:, step // 10])
        np.testing.assert_array_equal(aim.label, y)
    loss = dlr_targeted_or_margin(model(states[1].best), Targets(label=y, target=jnp.asarray(order[:, 0])))
    np.testing.assert_allclose(states[1].best_loss, loss, atol=1e-6)


def test_early_rows_stop_where_they_break():
    model, x, y = net(rows=60)
    y = np.array(y)
    y[0] = (y[0] + 1) % 5  # wrong to begin with
    found = go(apgd_ce(linf(0.08), steps=10), model, x, y)
    np.testing.assert_array_equal(found.x[0], x[0])
    assert found.success[0] and found.queries[0] == 2 and found.grads[0] == 0
    held = ~np.asarray(found.success)
    assert held.any() and (~held).sum() > 5
    np.testing.assert_array_equal(found.queries[held], 13)
    assert (np.asarray(found.queries)[~held] < 13).all() and len(np.unique(np.asarray(found.grads))) > 2
    late = go(apgd_ce(linf(0.08), steps=10, early=False), model, x, y)
    np.testing.assert_array_equal(late.success, found.success)
    assert (np.asarray(late.score) <= np.asarray(found.score) + 1e-6).all()


def test_restarts_help_and_losses_agree():
    model, x, y = net(rows=60)
    found = go(apgd_ce(linf(0.08), steps=10), model, x, y)
    more = go(apgd_ce(linf(0.08), steps=10, restarts=4), model, x, y)
    assert (np.asarray(more.success) >= np.asarray(found.success)).all()
    dlr = go(apgd_dlr(linf(0.08), steps=10), model, x, y)
    targeted = go(apgd_t(linf(0.08), steps=10), model, x, y)
    for other in (dlr, targeted):
        assert np.mean(np.asarray(other.success) == np.asarray(found.success)) > 0.9
    assert (np.asarray(targeted.queries)[~np.asarray(targeted.success)] == 4 * 11 + 2).all()  # 4 wrong classes, not 9


# ----------------------------------------------------------------------------------------------------- odd models


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("make", [apgd_ce, apgd_dlr, apgd_t])
def test_few_classes_fall_back_to_the_margin(make, classes):
    model, x, y, w = problem(classes=classes)
    found = go(make(linf(0.3), steps=20), model, x, y)
    assert np.isfinite(found.score).all()
    if classes == 2:
        slope = w.T[y] - w.T[1 - y]
        corner = np.clip(x - 0.3 * np.sign(slope), 0, 1)
        np.testing.assert_array_equal(found.success, (slope * corner).sum(-1) < 0)
    assert np.any(found.success)
    late = go(make(linf(0.3), steps=4, early=False), model, x, y)
    np.testing.assert_array_equal(late.queries, 2 + 5 * (classes - 1 if make is apgd_t else 1))
    z, label = model(x), jnp.asarray(y)
    aim = Targets(label=label, target=(label + 1) % classes)
    np.testing.assert_array_equal(dlr_targeted_or_margin(z, aim), losses.margin(z, aim))
    want = losses.margin if classes == 2 else losses.dlr
    np.testing.assert_array_equal(dlr_or_margin(z, label), want(z, label))


def test_a_thousand_classes_and_unrepresentable_logits():
    model, x, y, w = problem(classes=1000)
    found = go(apgd_t(linf(0.05), steps=3, targets=2), model, x, y)
    assert np.isfinite(found.score).all() and np.mean(found.success) > 0.5

    def sick(w, x):
        z = x @ w
        return z.at[:, 0].set(jnp.where(x[:, 0] > 0.5, jnp.nan, z[:, 0]))

    x = x.copy()
    x[:, 0] = np.where(np.arange(16) < 4, 0.7, 0.2)
    x[8:, 0] = 0.45
    w = w[:, :5]
    y = (x @ w).argmax(-1).astype(np.int32)
    found = go(apgd_ce(linf(0.1), steps=20), Partial(sick, jnp.asarray(w)), x, y)
    assert found.success[:4].all() and found.flags["nonfinite"][:4].all() and (found.score[:4] == -np.inf).all()
    np.testing.assert_array_equal(found.x[:4], x[:4])
    assert not found.flags["nonfinite"][4:8].any()  # out of reach of the sick half
    assert np.isfinite(found.x).all() and core.feasible(linf(0.1), np.asarray(found.x), x).all()


def noisy(w, x, keys=None):
    z = x @ w
    if keys is None:
        return z
    return z + 3 * jax.vmap(lambda k: jax.random.normal(k, (w.shape[1],)))(keys)


def test_randomized_models_are_asked_with_fresh_keys_and_averaged():
    _, x, y, w = problem(b=40)
    model, plain = Partial(noisy, jnp.asarray(w)), Partial(linear, jnp.asarray(w))
    states = walk(apgd_ce(linf(0.05), steps=1, eot=8, early=False), model, jnp.asarray(x), jnp.asarray(y))
    losses_seen = np.stack([s.last_loss for s in states[1:]])
    assert len(np.unique(losses_seen)) == 80  # noise of its own for every row and step
    single = walk(apgd_ce(linf(0.05), steps=1, early=False), model, jnp.asarray(x), jnp.asarray(y))
    wide, narrow = (np.std(np.asarray(s[1].last_loss)) for s in (single, states))
    assert narrow < 0.7 * wide
    a, b = (go(apgd_ce(linf(0.05), steps=20, early=False, eot=n), plain, x, y) for n in (1, 4))
    np.testing.assert_allclose(a.x, b.x, atol=1e-6)  # nothing to average
    np.testing.assert_array_equal(b.grads, 4 * np.asarray(a.grads))


def test_verdict_of_the_majority_or_of_the_last_pass():
    """Each pass of a row fails or not by its key; what is made of 21 passes."""
    model, x, y, _ = problem(b=4)
    keys = core.step_keys(core.example_keys(KEY, "majority", jnp.arange(4)), jnp.zeros(4, jnp.int32))

    def flip(w, x, keys=None):
        fails = jax.vmap(lambda k: jax.random.bernoulli(k, 0.4))(keys)
        return jnp.where(fails[:, None], -1.0, 1.0) * (x @ w)

    flipping = Partial(flip, model.args[0])
    passes = [jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys) for i in range(21)]
    fails = np.stack([np.asarray(flipping(jnp.asarray(x), keys=k)).argmax(-1) != y for k in passes])
    for compat, want in ((None, 2 * fails.sum(0) > 21), ("official", fails[-1])):
        attack = apgd_ce(linf(0.1), eot=21, compat=compat)
        _, _, (_, broken, _) = attack._ask(flipping, jnp.asarray(x), jnp.asarray(y), jnp.asarray(y), keys)
        np.testing.assert_array_equal(broken, want)
    assert (fails[-1] != (2 * fails.sum(0) > 21)).any()


@pytest.mark.slow
def test_shards_and_slots_give_the_answer_of_the_batch():
    model, x, y = net(rows=16)
    for attack in (apgd_ce(l1(0.5), steps=4, large_eps=True), apgd_t(linf(0.05), steps=3)):
        whole = go(attack, model, x, y)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

        def part(x, y, i, attack=attack):
            return attack.run(KEY, model, x, y, index=i)

        sharded = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
        found = sharded(x, y, jnp.arange(16, dtype=jnp.int32))
        np.testing.assert_array_equal(found.success, whole.success)
        np.testing.assert_allclose(found.score, whole.score, atol=1e-4)


def test_settings_are_checked_and_names_known():
    assert {"apgd_ce", "apgd_dlr", "apgd_t"} <= set(ATTACKS) and isinstance(apgd_ce(linf(0.1)), APGD)
    for threat in (l0(3.0), union(linf(0.1), l2(1.0))):
        with pytest.raises(ValueError, match="linf, l2 or l1 for apgd_t; got"):
            apgd_t(threat)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 3"):
        apgd(l1(1.0), steps=2, large_eps=True)
    for setting in ("steps", "restarts", "eot"):
        with pytest.raises(ValueError, match=setting):
            apgd(linf(0.1), **{setting: 0})
    with pytest.raises(ValueError, match="targets must be a whole number of at least 1"):
        apgd_t(linf(0.1), targets=0)
    with pytest.raises(ValueError, match="compat"):
        apgd(linf(0.1), compat="foolbox")
    model, x, y = net()
    with pytest.raises(ValueError, match="chooses its targets itself"):
        apgd_t(linf(0.1)).run(KEY, model, x, Targets(label=y, target=y))
    aim = Targets(label=y, target=(y + 1) % 5)  # untargeted members reach given targets
    found = go(apgd_ce(linf(0.3), steps=20), model, x, aim)
    np.testing.assert_array_equal(found.success, np.asarray(model(found.x)).argmax(-1) == np.asarray(aim.target))
    assert np.mean(found.success) > 0.5
