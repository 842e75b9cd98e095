"""Claims about training objectives: the shared rule, and that each verdict can go either way."""

import pytest

from benchmarks.claims import arms, framework

AUTO, CLEAN, COST, GAP = arms.AUTO, arms.CLEAN, arms.COST, arms.GAP


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
                {f"PGD: {AUTO}": [40.0] * 3},
            ],
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
