import json

import jax
import numpy as np
import pytest

from jaxadv import attacks, losses, threats
from jaxadv.evaluate import PROTOCOLS, Stage
from jaxadv.evaluate.protocols import build, describe, refit, stages_of, with_eps


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
@pytest.mark.parametrize("threat", [threats.linf(0.1), threats.l2(0.5), threats.l1(5.0)])
def test_every_protocol_can_be_built_under_names_of_its_own(name, threat):
    built = [build(stage, threat, threat) for stage in PROTOCOLS[name]]
    assert len({a.name for a in built}) == len(built)
    assert all(a.threat is threat for a in built)


def test_the_default_is_standard_and_restarts_can_be_set():
    assert stages_of(None, None) == stages_of("standard", None) == PROTOCOLS["standard"]
    assert [s.restarts for s in stages_of(None, None)] == [1, 1, 5]
    assert {s.restarts for s in stages_of(None, 2)} == {2}
    assert stages_of(("fgsm", Stage("pgd", (("steps", 3),), 4)), None)[1].restarts == 4
    assert stages_of("fgsm", None) == (Stage("fgsm"),)


def test_a_refitted_attack_is_the_attack_built_for_that_budget():
    one = refit(attacks.pgd(threats.linf(0.1), steps=10, loss=losses.margin), 0.1, 0.2)
    two = attacks.pgd(threats.linf(0.2), steps=10, loss=losses.margin)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    np.testing.assert_allclose(jax.tree.leaves(one), jax.tree.leaves(two))
    assert one.threat.eps == 0.2
    half = refit(attacks.fgsm(threats.linf(0.05)), 0.1, 0.2)  # made for half the budget, stays at half
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
