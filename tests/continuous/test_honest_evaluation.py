"""The protocol `ode`: planted masks raise alarms, honest models none, failures are broken, budgets are arguments."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import continuous, evaluate, threats
from jaxadv.continuous import SolveCfg, ode_solve
from jaxadv.continuous.surrogates import network_of
from jaxadv.core import Trainable, robust
from jaxadv.evaluate import odes, protocols
from jaxadv.models.adapt import Static

EULER = SolveCfg("euler", "fixed", n_steps=4)
LINF = threats.linf(0.2)
CHEAP = {"steps": 4, "restarts": 1, "grids": (("rk4", 2),), "tolerances": (), "spsa_samples": 0, "version": ""}


def field(rate, t, z):
    return rate * z


def run(params, x, cfg):
    """The sign of the first feature, grown by a linear flow; perhaps rounded where Euler solves, or failing."""
    rate, masked, fails = params
    z = x - 0.5
    if cfg.method == "euler":
        z = jnp.where(masked, jnp.round(20 * z) / 20, z)
    z = jnp.where(fails & (z > 0.45), 3e38 * z, z)
    z, stats = ode_solve(field, rate, z, cfg)
    return jnp.stack([-5 * z[:, 0], 5 * z[:, 0]], -1), stats


def model(masked=False, fails=False):
    return continuous.ode_model(run, EULER, (jnp.float32(1.0), jnp.asarray(masked), jnp.asarray(fails)))


@pytest.fixture(scope="module")
def points():
    x = np.random.default_rng(0).uniform(0.1, 0.9, (24, 3)).astype(np.float32)
    return x, (x[:, 0] > 0.5).astype(np.int32)


def look(points: Any, key, **given):
    said = odes.alarms(
        key, model(**given), *points, LINF, steps=5, grid=("rk4", 4), directions=8, radius=0.1, examples=24
    )
    return {flag.name: flag for flag in said.flags}, said.numbers


def test_an_honest_euler_network_raises_no_alarm(points, key):
    found, numbers = look(points, key)
    assert found == {} and numbers["failed_clean"] == 0
    assert numbers["clean"] == {"steps_mean": 4, "steps_max": 4, "rejected_mean": 0, "nfe_mean": 4}
    assert min(numbers["cosines"].values()) > 0.99 and numbers["apart_alone"] < 1e-5
    masks = np.asarray([numbers["masks"][name] for name in numbers["masks"]])
    assert masks.shape == (5, 24) and numbers["standing"]["pgd"] == masks[0].mean()
    exact = np.abs(points[0][:, 0] - 0.5) > 0.2
    np.testing.assert_array_equal(masks[0], exact)  # closed form of a threshold
    json.dumps(numbers)


def test_a_planted_mask_raises_alarms(points, key):
    found, numbers = look(points, key, masked=True)
    assert {"surrogate_stronger", "zero_gradient", "gradients_disagree"} <= set(found)
    assert numbers["standing"]["gradient of a grid"] < numbers["standing"]["pgd"]
    assert "grid rk4 x4" in found["surrogate_stronger"].detail
    assert {"surrogate_stronger", "gradients_disagree"} <= set(odes.ALARMS)


def offset(params, x, cfg):
    """`run` on logits of a million, whose differences drown in rounding."""
    logits, stats = run(params[:3], x, cfg)
    return logits + params[3], stats


def test_gradients_are_compared_in_float64(points: Any, key):
    """At logits of a million float32 knows differences to 0.06; the slope is exact, and no alarm is due."""
    x, y = points
    given = (jnp.float32(1.0), jnp.asarray(False), jnp.asarray(False), jnp.float32(1e6))
    far, v = continuous.ode_model(offset, EULER, given), np.eye(3)
    numbers: dict = {}
    found = odes._gradients(key, far, continuous.fixed_step(far, x, "rk4", 4), x, y, 8, 1e-3, numbers)
    assert found == [] and min(numbers["cosines"].values()) > 0.999
    assert set(numbers["cosines"]) == {"grid", "differences", "rounding"}
    native, _, seen = odes._slopes(far, far, x, y, v, 1e-3)
    np.testing.assert_allclose(native, seen.T, rtol=1e-6, atol=1e-6)
    low = np.asarray(odes._differences(far, x, y, v.astype(np.float32), 1e-3))
    assert np.median(odes._cosine(native, low.T)) < 0.9


def test_failed_solves_are_told_and_never_robust(points, key):
    x = np.concatenate([np.full((6, 3), 0.97, np.float32), points[0]])
    y = (x[:, 0] > 0.5).astype(np.int32)
    broken = model(fails=True)
    assert not np.asarray(robust(broken(jnp.asarray(x)), jnp.asarray(y)))[:6].any()
    found, numbers = look((x, y), key, fails=True)
    assert found["solver_failed"].severity == "error" and numbers["failed_clean"] == pytest.approx(6 / 30)


@pytest.fixture(scope="module")
def report(points: Any):
    first, _, _, second, _ = odes.stages("linf", **CHEAP)
    return odes.ode_report(
        jax.random.key(0), model(True), *points, LINF, attacks=(first, second), diagnostics=False,
        tolerances=(), slots=8, batch_size=8,
    )  # fmt: skip


@pytest.mark.slow
def test_the_protocol_breaks_what_gradients_through_the_solver_do_not(report, points):
    entry = report.models[0]
    rows = {row["name"]: row for row in entry.attacks}
    assert list(rows) == ["pgd_ce", "pgd on gradient rk4 x2", "noise"]
    followed = rows["pgd on gradient rk4 x2"]
    assert rows["pgd_ce"]["robust_accuracy_after"] > followed["robust_accuracy_after"]
    assert followed["settings"]["change"] == "gradient rk4 x2"
    rounded = np.abs(np.round(20 * (points[0][:, 0] - 0.5)) / 20)
    assert entry.robust_accuracy >= np.mean(rounded > 0.25 + 1e-6)  # nothing reaches farther than the budget
    assert entry.robust_accuracy <= np.mean(rounded > 0.15 - 1e-6)


@pytest.mark.slow
def test_the_report_says_how_it_was_solved(report):
    entry = report.models[0]
    assert "solved with euler, fixed, 4 steps, per_example" in entry.statements[-1]
    assert entry.diagnostics["failed"] == {"clean": 0.0, "adversarial": 0.0}
    assert set(entry.diagnostics["ladder"]) == {"clean", "adversarial"}
    assert json.loads(report.to_json())["models"][0]["diagnostics"]["ladder"]["clean"]["deployed"] == 1.0


def test_stages_are_data_and_budgets_are_arguments():
    whole = evaluate.PROTOCOLS["ode"]("linf")
    names = [protocols.build(stage, LINF, LINF).name for stage in whole]
    assert len(set(names)) == len(names) == 3 + 4 + 2 * len(odes.GRIDS) + len(odes.TOLERANCES) + 1
    assert whole[0].restarts == 5 and dict(whole[0].settings)["steps"] == 100
    assert dict(whole[-1].settings)["queries"] == 2 * 2048 * 100
    assert len(odes.stages("linf", **CHEAP)) == 5
    change = odes.Change("grid", "rk4", 4)
    assert change == odes.Change("grid", "rk4", 4) and change.__name__ == "grid rk4 x4"
    one, two = (odes.behind(LINF, change=odes.Change("grid", "rk4", 4), steps=3) for _ in range(2))
    assert isinstance(one, odes.Behind) and jax.tree.structure(one) == jax.tree.structure(two)


def test_points_of_another_solver_are_judged_on_the_model_itself(points, key):
    x, y = (jnp.asarray(v) for v in points)
    attack, masked = odes.behind(LINF, change=odes.Change("grid", "rk4", 4), steps=2), model(True)
    found = jax.jit(lambda attack, m: attack.run(key, m, x, y))(attack, masked)
    np.testing.assert_array_equal(found.success, ~robust(masked(found.x), y))


def flow(params, state, x, *, taps=(), hints=None, **settings):
    """Logits after a linear flow until given times, or until one."""
    hints = hints or {}
    times, cfg = hints.get("times", jnp.ones(1)), hints.get("solve") or EULER
    z, stats = ode_solve(field, params["rate"], x - 0.5, cfg, ts=times)
    logits = jnp.concatenate([-z[..., :1], z[..., :1]], -1).reshape(-1, 2)
    told = {"block.stats": stats, "block.solver": Static(cfg)}
    return (logits, told) if taps else logits, state


@pytest.fixture(scope="module")
def latent():
    net = Trainable(jax.tree_util.Partial(flow), {"rate": jnp.float32(-1.0)}, {})
    cfg = SolveCfg("rk4", "fixed", t1=3.0, n_steps=6)
    return continuous.ode_model(continuous.lt_node(net, cfg, points=8))


def test_a_random_end_time_is_attacked_through_draws_and_judged_exactly(latent, points: Any):
    x, y = (jnp.asarray(v) for v in points)
    changes = [odes.Change(kind, value=400) for kind in ("draws", "times")]

    @jax.jit
    def ask(model, x):
        logits, stats = continuous.solved(model, x)
        twice = jnp.concatenate([x, x + 1e-3])
        return logits, stats.ok, model(x), [change(model, x)(twice).reshape(2, -1, 2) for change in changes]

    logits, ok, again, drawn = jax.tree.map(np.asarray, ask(latent, x))
    np.testing.assert_array_equal(logits, again)
    assert ok.all() and continuous.random_time(latent) is not None
    t, w = np.polynomial.legendre.leggauss(8)  # the posterior is the exponential law with rate 1, cut at 3
    t, w = 1.5 * (t + 1), w * np.exp(-1.5 * (t + 1))
    z = (np.asarray(x)[:, :1] - 0.5) * np.exp(-t)
    exact = (w / w.sum() / (1 + np.exp(-2 * z))).sum(1)
    np.testing.assert_allclose(np.exp(logits[:, 1]), exact, atol=1e-4)
    for own in drawn:  # draws beyond the end are cut, not thrown away
        np.testing.assert_allclose(np.exp(own[0, :, 1]), exact, atol=0.03)
    apart = [np.abs(one - other).max() for one, other in drawn]
    assert apart[1] < 2e-3 < apart[0]  # fixed draws move with the point alone
    moved = continuous.with_cfg(latent, SolveCfg("euler", "fixed", t1=3.0, n_steps=3))
    net: Any = continuous.random_time(moved)
    assert net.apply.args[0].values[0].n_steps == 3
    assert continuous.cfg_of(latent, x).t1 == 3.0
    assert network_of(latent)[1] is None and network_of(model()) == (None, EULER)


def test_the_protocol_knows_a_random_end_time(latent, points: Any, key, monkeypatch):
    names = [protocols.build(stage, LINF, LINF).name for stage in odes.stages("linf", **CHEAP, draws=odes.DRAWS)]
    assert names[-2:] == ["pgd on draws x20", "pgd on times x20"] and len(names) == 7

    def asked(norm, draws):
        raise LookupError(f"{draws} draws in {norm}")

    monkeypatch.setattr(odes, "stages", asked)
    with pytest.raises(LookupError, match="20 draws in linf"):
        odes.ode_report(key, latent, *points, LINF)
    with pytest.raises(ValueError, match="must have a random end time"):
        continuous.drawn(model())


@pytest.mark.slow
def test_what_draws_lead_to_is_judged_on_the_exact_average(latent, points: Any, key):
    x, y = (jnp.asarray(v) for v in points)
    attack = odes.behind(LINF, change=odes.Change("draws", value=4), steps=3, start="zero")
    found, verdict = jax.jit(lambda m: ((r := attack.run(key, m, x, y)), robust(m(r.x), y)))(latent)
    np.testing.assert_array_equal(found.success, ~verdict)
    np.testing.assert_array_equal(verdict, np.abs(points[0][:, 0] - 0.5) > 0.2)  # closed form of a threshold


def test_what_knows_no_solver_is_refused(points: Any, key):
    with pytest.raises(ValueError, match="must know its solver.*ode_model"):
        evaluate.ode_report(key, jax.tree_util.Partial(lambda x: x), *points, LINF)
    with pytest.raises(ValueError, match="unknown kind of change"):
        odes.Change("solver")


@pytest.mark.slow
def test_joint_solves_couple_rows_and_tolerances_are_a_ladder(points, key):
    """Adaptive steps of a whole batch: an example alone is another function; tighter tolerances agree."""
    loose = SolveCfg("heun", rtol=0.5, atol=0.5, batching="joint", max_steps=64)

    def steep(rate, t, z):
        return rate * jnp.sin(8 * z + 3 * t)

    def wild(rate, x, cfg):
        z, stats = ode_solve(steep, rate, 2 * x, cfg)
        return jnp.stack([-z.sum(-1), z.sum(-1)], -1), stats

    x = points[0]
    joint = continuous.ode_model(wild, loose, jnp.float32(6.0))
    y = np.asarray(joint(jnp.asarray(x))).argmax(-1).astype(np.int32)
    numbers: dict = {}
    assert [flag.name for flag in odes._coupling(joint, x[:8], numbers)] == ["batch_coupled"]
    rows = continuous.with_cfg(joint, dataclasses.replace(loose, batching="per_example"))
    assert odes._coupling(rows, x[:8], numbers) == []
    told = odes.ladder(rows, x, y, (1e-1, 1e-4))
    assert set(told) == {"deployed", "0.1", "0.0001"} and all(0 <= value <= 1 for value in told.values())
