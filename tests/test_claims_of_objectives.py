"""Verdicts on claims about objectives: each can go either way, and says the numbers it rests on."""

import pytest

from benchmarks.claims import framework


def measures(**given):
    """Three seeds around each value: differences are clear of zero where they exceed one."""
    return {name: [value - 0.2, value, value + 0.1] for name, value in given.items()}


def test_a_gain_is_the_mean_of_differences_with_their_interval():
    numbers = {"one": [3.0, 5.0, 7.0], "two": [1.0, 2.0, 3.0]}
    mean, low, high = framework.gain(numbers, "one", "two")
    assert mean == pytest.approx(3) and (low, high) == pytest.approx(framework.interval([2.0, 3.0, 4.0])[1:])


def dial(kl, ce, clean=98.0):
    kinds = {"divergence": kl, "cross-entropy": ce}
    robust = {
        f"{kind}, {which} domains: AutoAttack, robust %": 85.0 + (gain if which == "with" else 0)
        for kind, gain in kinds.items()
        for which in ("with", "without")
    }
    kept = {f"{kind}, {which} domains: clean %": clean if which == "with" else 98.0 for kind in kinds
            for which in ("with", "without")}  # fmt: skip
    return framework.load("dial").verdict(measures(**robust, **kept))


def test_the_verdict_on_dial():
    word, why = dial(3.0, 2.0)
    assert word == "holds" and "divergence 85.0 % robust without domains, +3.0" in why
    assert dial(3.0, -1.0)[0] == "holds in part"
    assert dial(-1.0, 0.0)[0] == "does not hold here" and dial(3.0, 2.0, clean=90.0)[0] == "does not hold here"


def jsigr(transferred, seen, clear, clean=97.0):
    what = ("transferred, robust %", "AutoAttack at half, robust %", "gradient where it matters, %", "clean %")
    numbers = {}
    for arm in ("standard", "Jacobian alone", "J-SIGR"):
        values = (transferred, seen, clear, clean) if arm == "J-SIGR" else (40.0, 20.0, 30.0, 97.0)
        numbers |= {f"{arm}: {name}": value for name, value in zip(what, values)}
    return framework.load("jsigr").verdict(measures(**numbers))


def test_the_verdict_on_jsigr():
    word, why = jsigr(60.0, 30.0, 50.0)
    assert word == "holds" and "transferred, robust 40.0, 40.0, 60.0" in why
    assert jsigr(60.0, 10.0, 50.0)[0] == "holds in part"  # robust to transferred examples only
    assert jsigr(60.0, 30.0, 50.0, clean=90.0)[0] == "holds in part"
    assert jsigr(35.0, 30.0, 25.0)[0] == "does not hold here"


def cifs(worst, clean=98.0, base=80.0):
    numbers = {"gated: worst case, robust %": worst, "without gates: worst case, robust %": base}
    numbers |= {"gated: clean %": clean, "without gates: clean %": 98.0}
    numbers |= {"gated: PGD on the joint loss, robust %": worst + 3, "gated: AutoAttack, robust %": worst + 1}
    return framework.load("cifs").verdict(measures(**numbers))


def test_the_verdict_on_cifs():
    word, why = cifs(85.0)
    assert word == "holds" and "worst case 85.0 % with gates, 80.0 % without" in why
    assert cifs(85.0, clean=90.0)[0] == "holds in part"
    assert cifs(79.0)[0] == "does not hold here" and cifs(25.0, base=20.0)[0] == "does not hold here"


def ladder(robust, clean, climbed=90.0):
    numbers = {"first network: climbs that break it, %": 80.0}
    arms = {"trained on": (98.0, 10.0, 50.0), "LADDER": (clean, robust, climbed), "PGD": (97.0, 70.0, 70.0)}
    for arm, values in arms.items():
        names = ("clean %", "AutoAttack, robust %", "climbed, robust %")
        numbers |= {f"{arm}: {name}": value for name, value in zip(names, values)}
    return framework.load("ladder").verdict(measures(**numbers))


def test_the_verdict_on_ladder():
    word, why = ladder(50.0, 98.0)
    assert word == "holds" and "robust gain +40.0" in why
    assert ladder(20.0, 98.0)[0] == "holds in part" and ladder(50.0, 95.0)[0] == "holds in part"
    assert ladder(10.0, 98.0)[0] == "holds in part"  # against climbs alone
    assert ladder(10.0, 98.0, climbed=50.0)[0] == "does not hold here"


def dpsgd(batch, views=1.0, plain=80.0):
    lacking = {"large batch": batch, "views": views, "average": 1.0, "tight accountant": 1.0}
    numbers = {f"without {name}: test %": 90.0 - gain for name, gain in lacking.items()}
    numbers |= {"plain DP-SGD: test %": plain, "without privacy: test %": 98.0, "all ingredients: test %": 90.0}
    return framework.load("dpsgd").verdict(measures(**numbers))


def test_the_verdict_on_dpsgd():
    word, why = dpsgd(2.0)
    assert word == "holds" and "large batch +2.0" in why and "98.0 % without privacy" in why
    assert dpsgd(-1.0)[0] == "holds in part" and dpsgd(2.0, plain=91.0)[0] == "does not hold here"
