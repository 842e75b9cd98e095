"""Verdicts on claims about continuous depth: each can go either way, and says the numbers it rests on."""

from benchmarks.claims import framework


def measures(arms):
    """Three seeds around each value: differences are clear of zero where they exceed one."""
    return {
        f"{arm}: {what}": [value - 0.2, value, value + 0.1] for arm, row in arms.items() for what, value in row.items()
    }


def row(name, level, **changes):
    return dict.fromkeys(framework.load(name).JUDGED, level) | changes


def test_the_verdicts_on_odenet_and_tisode():
    for name, better, base in (("odenet", "ODE", "residual"), ("tisode", "TisODE", "ODE")):
        judge = framework.load(name).verdict
        one, other = row("odenet", 50.0), row("odenet", 40.0)
        word, why = judge(measures({better: one, base: other}))
        assert word == "holds" and "worst case +10.0" in why and f"{better} over {base}" in why
        part = one | {"worst case %": 40.0}
        assert judge(measures({better: part, base: other}))[0] == "holds in part"
        assert judge(measures({better: other, base: other}))[0] == "does not hold here"


def test_the_verdict_on_ltnode():
    judge = framework.load("ltnode").verdict
    arms = {"NODE": row("ltnode", 40.0), "LT-NODE": row("ltnode", 50.0), "ALT-NODE": row("ltnode", 50.0)}
    word, why = judge(measures(arms))
    assert word == "holds" and "ALT-NODE over NODE" in why and "worst case of NODE 40.0 %" in why
    arms["LT-NODE"] = row("ltnode", 30.0)
    assert judge(measures(arms))[0] == "holds in part"
    assert judge(measures(arms | {"ALT-NODE": arms["NODE"]}))[0] == "does not hold here"
