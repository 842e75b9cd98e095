import json

import jax
import numpy as np
import pytest

from jaxadv import attacks, losses, threats
from jaxadv.attacks.autoattack import fitting
from jaxadv.attacks.autoattack import stages as autoattack_stages
from jaxadv.evaluate import PROTOCOLS, Stage
from jaxadv.evaluate.protocols import Each, build, describe, stages_of, with_eps

LINF = threats.linf(0.1)


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
@pytest.mark.parametrize("threat", [threats.linf(0.1), threats.l2(0.5), threats.l1(5.0), threats.l0(3.0)])
def test_every_protocol_can_be_built_under_names_of_its_own(name, threat):
    built = [build(stage, threat, threat) for stage in stages_of(name, None, threat.norm)]
    assert len({a.name for a in built}) == len(built)
    assert all(a.threat is threat for a in built)


def test_standard_is_autoattack_with_its_published_settings():
    assert stages_of(None, None) == stages_of("standard", None) == autoattack_stages("linf")
    for norm in ("linf", "l2"):
        built = [build(s, threats.THREATS[norm](0.1), threats.THREATS[norm](0.1)) for s in stages_of(None, None, norm)]
        assert [a.name for a in built] == ["apgd_ce", "apgd_t", "fab_t", "square"]
        assert [a.max_steps for a in built[:2]] == [101, 909] and sum(a.max_steps for a in built[:2]) == 1010
        assert built[1].targets == 9 and built[3].max_steps in (5000, 5001)
    ce, t, *_ = (build(s, threats.l1(5.0), threats.l1(5.0)) for s in stages_of(None, None, "l1"))
    assert ce.rounds == 5 and t.targets == 5 and ce.large_eps and t.large_eps
    rand = [build(s, LINF, LINF) for s in stages_of("rand", None)]
    assert [(a.name, a.eot) for a in rand] == [("apgd_ce", 20), ("apgd_dlr", 20)]
    plus = [s.attack for s in stages_of("plus", None)]
    assert plus == ["apgd_ce", "apgd_dlr", "fab", "square", "apgd_t", "fab_t"]
    fast, whole = (sum(build(s, LINF, LINF).max_steps for s in stages_of(name, None)) for name in ("fast", "standard"))
    assert fast < 0.25 * whole
    assert set(stages_of("standard", None)) < set(stages_of("thorough", None))


def test_restarts_can_be_set_and_stages_given():
    assert [s.restarts for s in stages_of("gradient", None)] == [1, 1, 5]
    assert {s.restarts for s in stages_of("gradient", 2)} == {2}
    assert stages_of(("fgsm", Stage("pgd", (("steps", 3),), 4)), None)[1].restarts == 4
    assert stages_of("fgsm", None) == (Stage("fgsm"),)
    assert stages_of("standard", None, "union") == stages_of("gradient", None)


def test_what_cannot_work_on_the_inputs_is_left_out_with_a_word():
    kept, words = fitting(stages_of(None, None), (5,), False)
    assert [s.attack for s in kept] == ["apgd_ce", "apgd_t", "fab_t"] and "works on images" in words[0]
    kept, words = fitting(stages_of(None, None), (8, 8, 1), True)
    assert [s.attack for s in kept] == ["apgd_ce", "square"] and len(words) == 2
    assert fitting(stages_of(None, None), (8, 8, 1), False) == (stages_of(None, None), [])


def test_budgets_of_their_own_make_attacks_of_their_own():
    each = Each(with_eps(threats.linf(np.full(3, 0.1, np.float32)), 1.0), Stage("pgd", (("steps", 5),)))
    eps = np.float32([0.1, 0.2])
    one, two = each(eps), attacks.pgd(threats.linf(eps), steps=5)
    assert jax.tree.structure(one) == jax.tree.structure(two) and one.name == "pgd"
    np.testing.assert_allclose(one.step_size, two.step_size)


def test_a_scaled_attack_is_the_attack_built_for_that_budget():
    one = attacks.scaled(attacks.pgd(threats.linf(0.1), steps=10, loss=losses.margin), 2.0)
    two = attacks.pgd(threats.linf(0.2), steps=10, loss=losses.margin)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    np.testing.assert_allclose(jax.tree.leaves(one), jax.tree.leaves(two))
    assert one.threat.eps == 0.2
    half = attacks.scaled(attacks.fgsm(threats.linf(0.05)), 2.0)  # made for half the budget, stays at half
    assert half.threat.eps == pytest.approx(0.1) and half.step_size == pytest.approx(0.1)


def test_functions_and_built_attacks_follow_the_budget():
    base, larger = threats.linf(0.1), with_eps(threats.linf(0.1), 0.2)
    for given in ("fgsm", attacks.fgsm, attacks.fgsm(base)):
        assert build(Stage(given), base, larger).step_size == pytest.approx(0.2)
        assert build(Stage(given), base, base).step_size == 0.1
    assert isinstance(with_eps(base, 0.2).eps, float)
    assert with_eps(threats.linf(np.float32(0.1)), 0.2).eps.dtype == np.float32


def test_settings_are_strict_json():
    told = describe(attacks.mi_fgsm(threats.linf(0.1), steps=5))
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["max_steps"] == 5 and told["loss"] == "minus_cross_entropy" and told["step_size"] == pytest.approx(0.02)
    assert "threat" not in told and "name" not in told
    assert describe(attacks.pgd(threats.linf(np.full(4, 0.1, np.float32))))["step_size"] == "float32[4]"
