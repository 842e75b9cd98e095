import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxadv import evaluate, threats
from jaxadv.evaluate import FLAGS, Flag, flags
from jaxadv.evaluate.diagnostics import RAISES

KEY = jax.random.key(0)
LINF = threats.linf(0.02)


def softmax(w, b, x):
    return jax.nn.softmax(x @ w + b[None])


def standing_still(w, b, x):
    return jax.lax.stop_gradient(x) @ w + b[None]


def coupled(w, b, x):
    return (x - x.mean(0, keepdims=True) + 0.5) @ w + b[None]


def overflowing(w, b, x):
    z = x @ w + b[None]
    return jnp.where(x[:, :1] > 0.69, jnp.inf, z)


def raised(report):
    return {f.name: f for f in report.models[0].flags}


def plant(kit, name):
    """A defect that must raise the flag, as arguments that differ from an honest evaluation."""
    p = kit.linear(n=1000, wrong=50)
    swap = Partial(kit.affine, p.w, p.b)
    planted = {
        "nonfinite_logits": {"model": Partial(overflowing, p.w, p.b)},
        "zero_gradient": {"model": Partial(standing_still, p.w, p.b)},
        "probabilities": {"model": Partial(softmax, p.w, p.b)},
        "input_out_of_range": {
            "x": p.x / 255,
            "model": Partial(kit.affine, 255 * p.w, p.b),
            "threat": threats.linf(0.02 / 255),
        },
        "label_mismatch": {"y": 1 - p.y},
        "budget_unusable": {"threat": threats.linf(1e-9)},
        "budget_unused": {"attacks": (kit.Planted(threat=threats.linf(0.005), w=p.w),)},
        "attack_weaker_than_noise": {"attacks": (kit.Planted(threat=LINF, w=p.w, kind="finds nothing"),)},
        "few_examples": {"x": p.x[-40:], "y": p.y[-40:]},
        "batch_dependent": {"model": Partial(coupled, p.w, p.b)},
        "randomized": {"model": drifting(p)},
        "claims_refused": {"attacks": (kit.Planted(threat=LINF, w=p.w, kind="lies"),)},
    }
    honest = {"model": swap, "x": p.x, "y": p.y, "threat": LINF, "attacks": "fgsm"}
    return honest | planted.get(name, {})


def drifting(p):
    """A function that draws anew each time it is traced."""
    rng = np.random.default_rng(0)
    return lambda x: x @ p.w + p.b[None] + rng.normal(size=(1, 2)).astype(np.float32)


@pytest.mark.parametrize("name", sorted(set(FLAGS) - set(RAISES)))
def test_a_planted_defect_raises_its_flag(kit, name):
    found = raised(evaluate(KEY, **plant(kit, name), batch_size=1000))
    assert name in found
    kind, flag = FLAGS[name], found[name]
    assert (flag.severity, flag.words, flag.remedy) == kind and flag.detail and np.isfinite(flag.value)
    others = set(found) - {name}
    allowed = {  # a defect may show in more than one place
        "budget_unusable": {"budget_unused"},
        "attack_weaker_than_noise": {"budget_unused"},
        "claims_refused": {"budget_unused", "attack_weaker_than_noise"},
        "zero_gradient": {"budget_unused", "attack_weaker_than_noise"},
        "budget_unused": {"attack_weaker_than_noise"},
        "nonfinite_logits": {"attack_weaker_than_noise"},
        "randomized": {"label_mismatch", "claims_refused"},
        "batch_dependent": {"claims_refused", "attack_weaker_than_noise"},
    }
    assert others <= allowed.get(name, set())


def test_an_honest_evaluation_raises_none(kit):
    assert raised(evaluate(KEY, **plant(kit, "nothing"), batch_size=1000)) == {}


def test_flags_come_worst_first(kit):
    p = kit.linear(n=40, wrong=0)
    found = evaluate(KEY, Partial(softmax, p.w, p.b), p.x, 1 - p.y, LINF, attacks="fgsm").models[0].flags
    assert [f.severity for f in found] == sorted((f.severity for f in found), key=flags.SEVERITIES.index)
    assert len({f.severity for f in found}) == 3 or len(found) > 1


def test_labels_that_start_at_one_are_found():
    y = np.random.default_rng(0).integers(0, 5, 200)
    logits = np.eye(5)[y] * 4
    assert flags.label_mismatch(logits, y) is None
    found = flags.label_mismatch(logits, (y + 1) % 5)
    assert "adding -1" in found.detail and found.value == 1.0


def test_renamed_classes_are_found_and_a_weak_model_is_not_accused():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 200)
    names = np.array([2, 0, 1, 4, 3])
    found = flags.label_mismatch(np.eye(5)[names[y]], y)
    assert "renaming" in found.detail and found.value == 1.0
    weak = np.where(rng.random(200) < 0.35, y, rng.integers(0, 5, 200))
    assert flags.label_mismatch(np.eye(5)[weak], y) is None
    few = rng.integers(0, 5, 12)  # twelve examples can be renamed to fit almost anything
    lucky = np.where(np.arange(12) < 5, few, (few + 2) % 5)
    assert flags.label_mismatch(np.eye(5)[lucky], few) is None


def test_chance_is_chance():
    y = np.arange(100) % 4
    found = flags.label_mismatch(np.eye(4)[np.zeros(100, int)], y)
    assert found.value == found.threshold == 0.25


@pytest.mark.parametrize(
    ("eps", "threat", "stuck"),
    [(1e-9, threats.linf, True), (8 / 255, threats.linf, False), (0.6, threats.linf, True), (1e-9, threats.l2, True),
     (0.1, threats.l2, False), (3.0, threats.l2, True), (0.5, threats.l1, False)],
)  # fmt: skip
def test_budgets_below_rounding_or_beyond_gray_are_unusable(eps, threat, stuck):
    x = np.random.default_rng(0).uniform(0.2, 0.8, (20, 25)).astype(np.float32)
    assert (flags.budget_unusable(jax.tree.map(np.asarray, threat(eps)), x) is not None) is stuck


def test_the_used_share_of_the_budget_is_the_largest_size():
    assert flags.budget_unused(0.1, np.full(9, 0.06), 5) is None
    assert flags.budget_unused(0.1, np.full(9, 0.04), 0) is None
    assert flags.budget_unused(0.1, np.full(4, 0.04), 5) is None
    assert flags.budget_unused(0.1, np.full(9, 0.04), 5).value == pytest.approx(0.4)


def test_standardized_inputs_are_told_from_images():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 64)).clip(-4, 4).astype(np.float32)
    assert "standardized" in flags.input_range(x, (-4.0, 4.0)).detail
    assert flags.input_range(rng.uniform(-1, 1, (50, 64)).astype(np.float32), (-1.0, 1.0)) is None
    assert "twice" in flags.input_range(rng.uniform(0, 1 / 255, (50, 64)).astype(np.float32), (0.0, 1.0)).detail
    assert flags.input_range(rng.uniform(0, 1, (50, 64)).astype(np.float32), (0.0, 255.0)) is not None


def test_probabilities_are_told_from_logits_that_sum_to_one():
    assert flags.probabilities(np.array([[0.2, 0.8], [1.0, 0.0]])) is not None
    assert flags.probabilities(np.array([[-0.2, 1.2], [1.0, 0.0]])) is None
    assert flags.probabilities(np.log([[0.2, 0.8]])) is None
    assert flags.probabilities(np.full((2, 2), np.nan)) is None


def test_counts_become_shares():
    assert flags.zero_gradient([("a", 1, 100), ("b", 0, 0)]) is None
    assert flags.zero_gradient([("a", 1, 100), ("b", 2, 10)]).value == 0.2
    assert flags.claims_refused([("a", 0, 5)]) is None
    assert flags.claims_refused([("a", 1, 4), ("b", 0, 1)]).value == 0.25
    assert flags.weaker_than_noise(0, 5) is None and flags.weaker_than_noise(1, 5).value == 0.2
    assert flags.few_examples((0.4, 0.45), 500) is None and flags.few_examples((0.3, 0.5), 50).value == 0.2
    assert flags.nonfinite_logits(0, 0, 5) is None and flags.nonfinite_logits(1, 2, 5).value == 0.4


def test_forward_passes_are_compared_with_other_companions():
    x = np.random.default_rng(0).uniform(0, 1, (8, 3)).astype(np.float32)
    honest = flags.forward_passes(lambda x: x @ np.eye(3), lambda x: x @ np.eye(3), x, (0.0, 1.0))
    coupled = flags.forward_passes(lambda x: x - x.mean(0), lambda x: x - x.mean(0), x, (0.0, 1.0))
    moving = flags.forward_passes(lambda x: x, lambda x: 1.01 * x, x, (0.0, 1.0))
    assert (honest, [f.name for f in coupled], [f.name for f in moving]) == ([], ["batch_dependent"], ["randomized"])


def test_a_flag_survives_its_json_form():
    one = flags.flag("few_examples", np.nan, 0.1, "because")
    assert one.value == 0.1 and Flag.from_dict(dataclasses.asdict(one)) == one
    with pytest.raises(ValueError, match="severity"):
        Flag.from_dict(dataclasses.asdict(one) | {"severity": "bad"})
    assert {kind.severity for kind in FLAGS.values()} == set(flags.SEVERITIES)
