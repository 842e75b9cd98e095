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
from jaxadv.core import robust
from jaxadv.evaluate import odes, protocols

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
