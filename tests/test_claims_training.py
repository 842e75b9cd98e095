"""Claims about training objectives: the shared rule, and that each verdict can go either way."""

import pytest

from benchmarks.claims import a3t, advlc, arms, cost_sensitive, fgsm_tricks, framework, iat, mart, trades

AUTO, CLEAN, COST, GAP, PGD, TRAINING = arms.AUTO, arms.CLEAN, arms.COST, arms.GAP, arms.PGD, arms.TRAINING
PROTECTED, OTHERS = cost_sensitive.PROTECTED, cost_sensitive.OTHERS


def level(names, **measures):
    """Equal arms over three seeds."""
    return {f"{arm}: {what}": [value] * 3 for arm in names for what, value in measures.items()}


def raised(by, *seeds):
    """A measure with three seeds near a value."""
    return [by + s for s in (seeds or (0.0, 0.1, 0.2))]


def test_a_sentence_holds_with_its_sides_in_part_without_and_not_at_all_without_its_gain():
    assert arms.word(True) == arms.word(True, True, True) == "holds"
    assert arms.word(True, True, False) == "holds in part"
    assert arms.word(False, True) == arms.word(False) == "does not hold here"


def test_gains_are_paired_by_seed_and_told_with_their_interval():
    numbers = {f"a: {AUTO}": [51.0, 62.0, 73.0], f"b: {AUTO}": [50.0, 60.0, 70.0]}
    assert arms.gain(numbers, "a", "b") == framework.interval([1.0, 2.0, 3.0])
    assert arms.mean(numbers, "a", AUTO) == 62
    assert arms.signed(arms.gain(numbers, "a", "b")) == "+2.0 (-0.5 to +4.5)"
    assert arms.told(numbers, "ab", AUTO) == "percent for a, b: AutoAttack, robust 62.0, 60.0"


TURN, RISE = advlc.TURN, advlc.RISE
CASES = {
    "n_fgsm": (
        level(("FGSM", "random start", "GradAlign", "PGD", "N-FGSM"), **{CLEAN: 98.0, AUTO: 80.0, COST: 1.0})
        | {f"FGSM: {AUTO}": raised(0)},
        {
            "holds": [{}],
            "holds in part": [{f"N-FGSM: {AUTO}": [39.0, 60.0, 60.0]}, {f"N-FGSM: {COST}": [1.3] * 3}],
            "does not hold here": [
                {f"N-FGSM: {AUTO}": [0.0, 80.0, 80.0]},
                {f"FGSM: {AUTO}": [0.0, 0.0, 60.0]},
                {f"PGD: {AUTO}": [29.0] * 3},
            ],
        },
    ),
    "trades": (
        level(trades.ARMS, **{CLEAN: 98.0, PGD: 82.0, AUTO: 80.0})
        | {f"large: {AUTO}": raised(85), f"large: {CLEAN}": raised(95)},
        {
            "holds": [{}],
            "holds in part": [{f"large: {CLEAN}": raised(98)}, {f"middle: {AUTO}": raised(90)}],
            "does not hold here": [{f"large: {AUTO}": [70.0, 85.0, 90.0]}, {f"PGD: {AUTO}": raised(29)}],
        },
    ),
    "mart": (
        level(mart.ARMS, **{CLEAN: 98.0, PGD: 82.0, AUTO: 80.0}) | {f"MART: {AUTO}": raised(83)},
        {
            "holds": [{}],
            "holds in part": [{f"all examples: {AUTO}": raised(84)}],
            "does not hold here": [{f"MART: {AUTO}": raised(79)}, {f"PGD: {AUTO}": raised(29)}],
        },
    ),
    "fgsm_tricks": (
        level(fgsm_tricks.ARMS, **{CLEAN: 98.0, AUTO: 80.0}) | {f"FGSM: {AUTO}": raised(0)},
        {
            "holds": [{}],
            "holds in part": [{f"first layer: {AUTO}": [0.0, 80.0, 80.0]}, {f"hidden pixels: {AUTO}": raised(0)}],
            "does not hold here": [
                {f"{arm}: {AUTO}": raised(1) for arm in fgsm_tricks.TRICKS},
                {f"FGSM: {AUTO}": [0.0, 0.0, 60.0]},
                {f"PGD: {AUTO}": raised(29)},
            ],
        },
    ),
    "advlc": (
        level(advlc.ARMS, **{CLEAN: 98.0, AUTO: 60.0, TRAINING: 90.0, GAP: 30.0, RISE: 50.0, TURN: 40.0})
        | {f"AdvLC: {GAP}": raised(20), f"AdvLC: {RISE}": raised(30), f"AdvLC: {TURN}": raised(20)},
        {
            "holds": [{}],
            "holds in part": [{f"AdvLC: {TURN}": raised(41)}, {f"AdvLC: {AUTO}": raised(59)}],
            "does not hold here": [{f"AdvLC: {GAP}": [10.0, 20.0, 35.0]}, {f"PGD: {AUTO}": raised(29)}],
        },
    ),
    "iat": (
        level(iat.ARMS, **{CLEAN: 97.0, PGD: 72.0, AUTO: 70.0}) | {f"IAT: {CLEAN}": raised(98)},
        {
            "holds": [{}],
            "holds in part": [{f"IAT: {AUTO}": raised(60)}, {f"without mixing: {CLEAN}": raised(99)}],
            "does not hold here": [{f"IAT: {CLEAN}": raised(96)}, {f"PGD: {AUTO}": raised(29)}],
        },
    ),
    "a3t": (
        level(a3t.ARMS, **{CLEAN: 98.0, AUTO: 60.0, TRAINING: 90.0, GAP: 30.0})
        | {f"from prediction: {GAP}": raised(20)},
        {
            "holds": [{}],
            "holds in part": [{f"from prediction: {AUTO}": raised(50)}],
            "does not hold here": [{f"from prediction: {GAP}": raised(31)}, {f"PGD: {AUTO}": raised(29)}],
        },
    ),
    "cost_sensitive": (
        level(
            cost_sensitive.ARMS,
            **{CLEAN: 98.0, PGD: 82.0, AUTO: 80.0, PROTECTED: 75.0, OTHERS: 81.0, cost_sensitive.SPARSE: 30.0},
        )
        | {f"costs: {PROTECTED}": raised(85), f"costs and Min-Max: {PROTECTED}": raised(88)},
        {
            "holds": [{}],
            "holds in part": [
                {f"costs: {AUTO}": raised(77)},
                {f"costs: {OTHERS}": raised(86)},
                {f"costs and Min-Max: {PROTECTED}": raised(85)},
            ],
            "does not hold here": [{f"costs: {PROTECTED}": raised(75, -1.0, 0.0, 1.0)}, {f"PGD: {AUTO}": raised(29)}],
        },
    ),
}
"""Claim to numbers with which it holds, and what changes of these make of the verdict."""
ROWS = [(name, word, i) for name, (_, words) in CASES.items() for word in words for i in range(len(words[word]))]


@pytest.mark.parametrize(("name", "word", "case"), ROWS)
def test_the_verdict_can_go_either_way(name, word, case):
    numbers, words = CASES[name]
    found, why = framework.load(name).verdict(numbers | words[word][case])
    assert found == word and "percent for" in why


def test_claims_about_objectives_train_and_judge_alike():
    for name in CASES:
        claim = framework.load(name).CLAIM
        assert set(arms.SETTINGS) <= set(claim["settings"]) and arms.SMOKE.items() <= claim["smoke"].items()
