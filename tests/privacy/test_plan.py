import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import data
from jaxadv.privacy import BudgetError, Gaussian, Plan, Shuffled, accounting, banded, plan, poisson

RDP = {"accountant": "rdp"}
SMALL = {"size": 128, "steps": 500, "delta": 1e-5, **RDP}


def test_the_digits_oracle():
    made = plan(1437, noise_multiplier=1.5, **SMALL)
    assert f"{made.spent(500):.3f}" == "7.965" and made.epsilon is None
    made.admit(10**6)  # no budget: nothing to refuse


@pytest.mark.slow
def test_the_digits_oracle_by_pld():
    assert f"{plan(1437, noise_multiplier=1.5, **SMALL | {'accountant': 'pld'}).spent(500):.3f}" == "7.316"
    truncated = plan(1437, size=128, steps=500, delta=1e-5, noise_multiplier=1.5, rows=200)
    assert truncated.relation == "replace_special" and 7.316 <= truncated.spent(500) < 7.32


def test_noise_follows_from_the_clip(key):
    made = plan(1437, noise_multiplier=1.5, clip_norm=0.2, **SMALL)
    assert made.sensitivity == 0.2 and made.std == pytest.approx(0.3) and made.size == pytest.approx(128)
    same = plan(1437, noise_multiplier=1.5, clip_norm=0.2, rescale=True, **SMALL)
    assert same.sensitivity == 1.0 and same.std == 1.5
    zeros = jnp.zeros(20_000)
    for p in (made, same):
        stage = p.stage(key)
        noise, _ = jax.jit(stage.update)(zeros, stage.init(zeros))
        assert float(noise.std()) * p.size == pytest.approx(p.std, rel=0.03)  # noise on the mean: divided by the size


def test_the_clipped_sum_is_within_the_sensitivity(key):
    x = jax.random.normal(key, (6, 3)) * 10

    def loss(w, example, key):
        return w @ example

    for rescale in (False, True):
        made = plan(1437, noise_multiplier=1.5, clip_norm=0.2, rescale=rescale, **SMALL)
        total = jax.jit(made.clipped(loss))(jnp.zeros(3), x)[0]
        unit = x / jnp.linalg.norm(x, axis=1, keepdims=True)
        np.testing.assert_allclose(total, made.sensitivity * unit.sum(0), rtol=1e-5)


def test_a_budget_finds_the_noise_and_refuses_steps_before_they_are_taken():
    made = plan(1437, epsilon=3.0, **SMALL)
    assert made.spent(500) <= 3.0 < made.spent(510)
    made.admit(500)
    with pytest.raises(BudgetError, match="budget of epsilon 3 .* 510 steps would spend"):
        made.admit(510)
    assert 500 <= (most := made.affordable(3.0)) < 510 and made.spent(most) <= 3.0 < made.spent(most + 1)
    tight = plan(1437, epsilon=3.0, noise_multiplier=0.8, **SMALL)
    with pytest.raises(BudgetError):
        tight.admit(500)
    assert math.isinf(plan(1437, noise_multiplier=0.0, **SMALL).spent(1))


def test_samples_that_may_not_fit_are_paid_for_out_of_delta():
    made = plan(1437, noise_multiplier=1.5, **SMALL)
    plain = accounting.epsilon(accounting.gaussian_event(1.5, rate=128 / 1437), 1e-5, steps=500, accountant="rdp")
    assert plain < made.spent(500) < plain + 1e-5
    assert math.isinf(plan(1437, noise_multiplier=0.12, **SMALL).spent(10**5))


def test_groups_that_take_turns_compose_by_rounds():
    made = plan(1437, noise_multiplier=1.5, noise=banded(4, 500), **SMALL)
    rate = 4 * 128 / 1437
    event = accounting.gaussian_event(1.5, rate=rate)
    assert made.sampler.cycle == 4 and made.sampler.rate == pytest.approx(rate)
    assert made.spent(10) == pytest.approx(accounting.epsilon(event, 1e-5, steps=3, accountant="rdp"), rel=1e-5)
    one = plan(1437, noise_multiplier=1.5, noise=banded([1.0], 500), **SMALL)
    assert one.spent(500) == plan(1437, noise_multiplier=1.5, **SMALL).spent(500)
    with pytest.raises(ValueError, match="cycle of at least 4"):
        Plan(poisson(1437, 128), 1.0, 1.5, 1e-5, accountant="rdp", noise=banded(4, 500))


def test_the_ledger_says_what_and_under_which_assumptions():
    ledger = plan(1437, noise_multiplier=1.5, epsilon=8.0, **SMALL).ledger(500)
    assert f"{ledger['epsilon']:.3f}" == "7.965" and ledger["delta"] == 1e-5 and ledger["counted_steps"] == 500
    assert ledger["relation"] == "add_or_remove_one" and "PoissonSampled" in ledger["event"]
    assert ledger["unsupported"] is None and ledger["budget"] == 8.0


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"sampler": Shuffled(1437, 128)}, "shuffled order"),
        ({"noise": optax.identity()}, "noise stage of your own"),
    ],
)
def test_without_a_known_cost_no_epsilon_is_stated(parts, reason, key):
    given = {"sampler": poisson(1437, 128), "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5} | parts
    made = Plan(**given)
    assert made.ledger(3)["epsilon"] is None and reason in made.ledger(3)["unsupported"]
    assert isinstance(made.stage(key), optax.GradientTransformation)
    with pytest.raises(ValueError, match=reason):
        made.spent(3)
    with pytest.raises(ValueError, match=f"budget must be countable.*{reason}"):
        Plan(**given, epsilon=8.0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"delta": 1 / 1437}, r"delta must lie between 0 and 1/n"),
        ({"delta": 0.0}, r"delta must lie between 0 and 1/n"),
        ({"clip_norm": math.inf}, "clip_norm must be finite"),
        ({"clip_norm": 0.0}, "clip_norm must be finite"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be finite"),
        ({"noise_multiplier": None}, "must have a budget or noise"),
        ({"epsilon": -1.0}, "epsilon must be finite"),
        ({"views": 0}, "views must be a whole number"),
        ({"rows": 140}, "truncated samples must be counted"),
        ({"accountant": "guess"}, "unknown accountant"),
        ({"relation": "friends"}, "unknown relation"),
    ],
)
def test_refusals(change, match):
    with pytest.raises(ValueError, match=match):
        plan(1437, **{**SMALL, "noise_multiplier": 1.0} | change)


def test_batches_come_from_the_plan(key):
    n = 50
    held = data.arrays(np.zeros((n, 2, 2, 1), np.float32), np.zeros(n, np.int32), classes=2)
    made = plan(n, size=5, steps=3, delta=1e-3, noise_multiplier=1.0, multiple=4, **RDP)
    first = list(itertools.islice(made.batches(held, key), 3))
    again = next(made.batches(held, key, start=2))
    assert made.rows % 4 == 0 and {b["x"].shape[0] for b in first} == {made.rows}
    np.testing.assert_array_equal(first[2]["index"], again["index"])
    with pytest.raises(ValueError, match="sampler must be for the 49"):
        made.batches(held.subset(np.arange(n) > 0), key)
    assert isinstance(made.noise, Gaussian)
