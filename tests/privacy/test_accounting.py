import math
import sys

import numpy as np
import pytest
from scipy import optimize, stats

from jaxadv.privacy import accounting
from jaxadv.privacy.accounting import calibrate_noise, calibrate_steps, delta, epsilon, gaussian_event, of_gaussian

TABLE = [  # noise, rate, steps, delta, epsilon by rdp, by pld; the digits that are printed must agree
    (1.0, 1, 1, 1e-5, "4.7284", "4.37718"),
    (3.0, 0.1, 512, 1e-6, "4.05098", "3.76969"),
    (1.1, 256 / 60000, 14062, 1e-5, "2.5970", "2.3817"),
    (1.0, 0.01, 1000, 1e-5, "2.1018", "1.8282"),
    (10, 4096 / 50000, 875, 1e-5, "0.9877", "0.9028"),
    (21.1, 16384 / 50000, 250, 1e-5, "0.9976", "0.9121"),
    (2.5, 16384 / 1281167, 71589, 8e-7, "7.9280", "7.4404"),
]


def agrees(value, text):
    """Equal within one unit of the last digit that is printed."""
    return abs(value - float(text)) <= 10.0 ** -len(text.split(".")[1])


def gaussian_delta(eps, s):
    """Closed form: one Gaussian release of sensitivity 1 with noise s."""
    return stats.norm.cdf(1 / (2 * s) - eps * s) - math.exp(eps) * stats.norm.cdf(-1 / (2 * s) - eps * s)


def gaussian_epsilon(s, d):
    return optimize.brentq(lambda e: gaussian_delta(e, s) - d, 0, 100, xtol=1e-12)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}-{row[2]}")
def test_rdp_gives_the_numbers_of_the_table(row):
    noise, rate, steps, d, expected, _ = row
    found = epsilon(gaussian_event(noise, rate=rate), d, steps=steps, accountant="rdp")
    assert agrees(found, expected)


HEAVY = (1, 2, 3, 6)


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[pytest.mark.slow] * (i in HEAVY)) for i, row in enumerate(TABLE)],
    ids=lambda row: f"{row[0]}-{row[2]}",
)
def test_pld_gives_the_numbers_of_the_table_and_is_below_rdp(row):
    noise, rate, steps, d, above, expected = row
    found = epsilon(gaussian_event(noise, rate=rate), d, steps=steps)
    assert agrees(found, expected) and found <= float(above)


@pytest.mark.parametrize("s", [0.7, 1.0, 3.0])
def test_one_gaussian_is_the_closed_form(s):
    exact = gaussian_epsilon(s, 1e-5)
    assert of_gaussian(1 / s, 1e-5) == pytest.approx(exact, abs=1e-9)
    assert exact <= epsilon(gaussian_event(s), 1e-5) <= exact + 1e-4
    assert gaussian_delta(2.0, s) <= delta(gaussian_event(s), 2.0) <= gaussian_delta(2.0, s) * 1.001


def test_many_gaussians_are_one_with_less_noise():
    assert epsilon(gaussian_event(6.0), 1e-5, steps=9) == pytest.approx(gaussian_epsilon(2.0, 1e-5), abs=1e-3)
    assert delta(gaussian_event(6.0), 1.0, steps=9, accountant="rdp") >= gaussian_delta(1.0, 2.0)


def test_edges():
    assert epsilon(gaussian_event(1.0), 1e-5, steps=0) == 0 and delta(gaussian_event(1.0), 1.0, steps=0) == 0
    assert math.isinf(epsilon(gaussian_event(0.0, rate=0.1), 1e-5, accountant="rdp"))
    assert of_gaussian(0.0, 1e-5) == 0 == of_gaussian(-1.0, 1e-5) and math.isinf(of_gaussian(math.inf, 1e-5))


def test_epsilon_is_monotone():
    def rdp(noise=2.0, rate=0.02, steps=300, d=1e-5):
        return epsilon(gaussian_event(noise, rate=rate), d, steps=steps, accountant="rdp")

    assert rdp(noise=3.0) < rdp() < rdp(rate=0.03)
    assert rdp(steps=200) < rdp() < rdp(d=1e-6)
    few = gaussian_event(2.0, rate=0.02)
    assert epsilon(few, 1e-5, steps=300, accountant="rdp", relation="replace_special") == rdp()


def test_orders_that_are_left_out_are_not_announced(caplog):
    spent = epsilon(gaussian_event(0.9, rate=0.16), 1e-5, steps=3, accountant="rdp")
    assert spent > 0 and caplog.text == ""


def test_replacing_one_example_by_another_costs_more():
    event = gaussian_event(3.0)
    assert epsilon(event, 1e-6, relation="replace_one") == pytest.approx(gaussian_epsilon(1.5, 1e-6), abs=1e-3)
    with pytest.raises(ValueError, match="accountant must know.*'rdp' with neighbors 'replace_one'"):
        epsilon(gaussian_event(3.0, rate=0.1), 1e-6, accountant="rdp", relation="replace_one")


@pytest.mark.slow
def test_replacement_and_truncation_on_the_table():
    assert agrees(epsilon(gaussian_event(3.0, rate=0.1), 1e-6, steps=512, relation="replace_one"), "7.8246")
    event = gaussian_event(3.0, rate=0.1, n=50_000, rows=5300)
    assert agrees(epsilon(event, 1e-6, steps=512, relation="replace_special"), "3.76985")


def test_noise_for_a_budget_is_the_least():
    setting = {"rate": 4096 / 50000, "steps": 2468, "accountant": "rdp"}
    noise = calibrate_noise(8.0, 1e-5, **setting)
    assert agrees(noise, "2.71")  # 2.714 within the tolerance of one part in a thousand

    def spent(s):
        return epsilon(gaussian_event(s, rate=setting["rate"]), 1e-5, steps=2468, accountant="rdp")

    assert spent(noise) <= 8.0 < spent(noise * 0.998)


@pytest.mark.slow
def test_documented_calibrations_with_pld():
    assert calibrate_noise(1.0, 1e-6, rate=0.1, steps=512) == pytest.approx(9.66, abs=0.015)
    assert calibrate_noise(8.0, 1e-5, rate=4096 / 50000, steps=2468) == pytest.approx(2.561, abs=0.004)
    assert calibrate_steps(2.0, 1e-6, rate=0.1, noise_multiplier=3.0) == 155


def test_steps_for_a_budget_are_the_most():
    steps = calibrate_steps(2.0, 1e-6, rate=0.1, noise_multiplier=3.0, accountant="rdp")
    event = gaussian_event(3.0, rate=0.1)
    assert epsilon(event, 1e-6, steps=steps, accountant="rdp") <= 2.0
    assert epsilon(event, 1e-6, steps=steps + 1, accountant="rdp") > 2.0
    assert calibrate_steps(0.01, 1e-6, rate=1.0, noise_multiplier=1.0, accountant="rdp") == 0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: gaussian_event(-1.0), "noise_multiplier must be at least 0"),
        (lambda: gaussian_event(1.0, rate=1.5), "rate must be a probability"),
        (lambda: gaussian_event(1.0, rows=5), "n must be given"),
        (lambda: epsilon(gaussian_event(1.0), 1e-5, accountant="moments"), "unknown accountant"),
        (lambda: epsilon(gaussian_event(1.0), 1e-5, relation="friends"), "unknown relation"),
        (lambda: calibrate_noise(0.0, 1e-5, rate=0.1, steps=3), "epsilon must be finite"),
        (lambda: calibrate_steps(-1.0, 1e-5, rate=0.1, noise_multiplier=1.0), "epsilon must be finite"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"dp-accounting.*jaxadv\[privacy\]"):
        accounting.library()
    assert "noise" in accounting.missing("noise", "x") and np.isclose(gaussian_delta(0, 1), 0.3829, atol=1e-4)
