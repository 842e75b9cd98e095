import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxadv as ja
from jaxadv import attacks, core, evaluate, threats
from jaxadv.evaluate import engine, inputs

KEY = jax.random.key(0)
LINF = threats.linf(0.02)


def outcome(report):
    return {k: np.asarray(v, object) for k, v in report.models[0].examples.items()}


def without_timing(report):
    tree = report.to_dict()
    del tree["timing"]
    return json.dumps(tree)


@pytest.mark.parametrize("protocol", ["quick", pytest.param(None, marks=pytest.mark.slow)])
def test_a_linear_model_has_exactly_its_closed_form_accuracy(kit, protocol):
    p = kit.linear()
    report = ja.evaluate(KEY, p.model, p.x, p.y, LINF, attacks=protocol, eps_curve=(0.01, 0.04), batch_size=64)
    found = report.models[0]
    assert found.clean_accuracy == np.mean(p.far > 0) == 280 / 300
    assert found.robust_accuracy == np.mean(p.far > 0.02)
    assert [c["robust_accuracy"] for c in found.curve] == [np.mean(p.far > e) for e in (0.01, 0.02, 0.04)]
    assert 0 < found.robust_accuracy < found.clean_accuracy
    by = np.asarray(found.examples["by"])
    np.testing.assert_array_equal(by == -1, p.far > 0.02)  # point by point, not only in number
    np.testing.assert_array_equal(by == -2, p.far == 0)
    assert found.flags == [] or [f.name for f in found.flags] == ["few_examples"]


def test_the_room_is_the_function():
    assert evaluate is ja.evaluate
    assert inspect.signature(ja.evaluate) == inspect.signature(engine.evaluate)
    assert evaluate.report.Report is evaluate.Report and evaluate.slots.drain is evaluate.drain


def test_misclassified_examples_are_not_attacked_and_return_as_they_are(kit):
    p = kit.linear()
    report = evaluate(KEY, p.model, p.x, p.y, threats.linf(0.05), attacks="fgsm")
    model, wrong = report.models[0], p.far == 0
    np.testing.assert_array_equal(model.x_adv[wrong], p.x[wrong])
    assert model.attacks[0]["attacked"] == 280 and model.attacks[0]["grads"] == 280
    columns = outcome(report)
    assert set(columns["by"][wrong]) == {-2} and set(columns["size"][wrong]) == {0.0}
    standing = columns["by"] == -1
    np.testing.assert_array_equal(model.x_adv[standing], p.x[standing])
    assert set(columns["size"][standing]) == {None}


def test_broken_points_break_when_asked_by_hand(kit):
    p = kit.linear()
    report = evaluate(KEY, p.model, p.x, p.y, LINF, attacks="fgsm")
    columns, x_adv = outcome(report), report.models[0].x_adv
    broken = columns["by"] >= 0
    z = x_adv.astype(np.float64) @ p.w + p.b
    assert (z.argmax(-1)[broken] != p.y[broken]).all() and broken.sum() > 20
    size = np.abs(x_adv.astype(np.float64) - p.x).max(-1)
    assert (size[broken] <= 0.02 + 2.0**-24).all()
    np.testing.assert_allclose(columns["size"][broken].astype(float), size[broken], rtol=1e-8)
    np.testing.assert_array_equal(columns["adversarial"][broken].astype(int), z.argmax(-1)[broken])


@pytest.mark.parametrize("kind", ["leaves the ball", "leaves the box", "returns NaN", "lies"])
def test_an_attack_that_cheats_is_not_believed(kit, kind):
    p = kit.linear()
    attack = kit.Planted(threat=LINF, w=p.w, kind=kind)
    report = evaluate(KEY, p.model, p.x, p.y, LINF, attacks=(attack,))
    model = report.models[0]
    assert model.attacks[0]["broken"] == 0 and model.attacks[0]["robust_accuracy_after"] == model.clean_accuracy
    assert model.attacks[0]["claimed"] == model.attacks[0]["refused"] == 280
    assert "claims_refused" in [f.name for f in model.flags]
    assert np.isfinite(model.x_adv).all()
    json.loads(report.to_json(), parse_constant=pytest.fail)


def test_an_attack_with_a_larger_budget_than_the_evaluation_counts_only_what_fits(kit):
    p = kit.linear()
    report = evaluate(KEY, p.model, p.x, p.y, LINF, attacks=(attacks.fgsm(threats.linf(0.04)),))
    assert report.models[0].attacks[0]["broken"] == 0
    assert report.models[0].attacks[0]["refused"] == np.sum((p.far > 0) & (p.far <= 0.04))


def test_restarts_run_on_survivors_with_randomness_of_their_own(kit):
    p = kit.linear()
    attack = kit.Planted(threat=LINF, w=p.w, kind="is lucky")
    report = evaluate(KEY, p.model, p.x, p.y, LINF, attacks=(attack,), restarts=3, batch_size=50)
    columns, within = outcome(report), (p.far > 0) & (p.far <= 0.02)
    lucky = np.stack([
        jax.vmap(lambda k: jax.random.bernoulli(k, 0.3))(core.example_keys(KEY, "planted", jnp.arange(300), r))
        for r in range(3)
    ])  # fmt: skip
    first = np.where(lucky.any(0), lucky.argmax(0), -1)
    want = np.where(within, first, -1)
    got = np.where(columns["by"] >= 0, columns["restart"], -1).astype(int)
    noise = columns["by"] == 1
    np.testing.assert_array_equal(got[~noise], want[~noise])
    alive = [280, *(280 - np.sum(within & (first >= 0) & (first <= r)) for r in range(2))]
    assert report.models[0].attacks[0]["queries"] == sum(alive)


def test_the_answer_does_not_depend_on_batches_or_order(kit):
    p = kit.linear()
    settings = {"attacks": ("r_fgsm",), "restarts": 2, "eps_curve": (0.01,)}
    one = evaluate(KEY, p.model, p.x, p.y, LINF, batch_size=300, **settings)
    for size in (64,):
        other = evaluate(KEY, p.model, p.x, p.y, LINF, batch_size=size, **settings)
        assert one.models[0].examples["by"] == other.models[0].examples["by"]
        assert one.models[0].attacks == other.models[0].attacks
        np.testing.assert_allclose(one.models[0].x_adv, other.models[0].x_adv, atol=1e-6)
    order = np.random.default_rng(3).permutation(300)
    mixed = evaluate(KEY, p.model, p.x[order], p.y[order], LINF, index=order, batch_size=300, **settings)
    np.testing.assert_array_equal(outcome(mixed)["by"], outcome(one)["by"][order])
    np.testing.assert_allclose(mixed.models[0].x_adv, one.models[0].x_adv[order], atol=1e-6)


def test_other_budgets_and_other_weights_reuse_the_programs(kit):
    p, traces = kit.linear(), []

    def counted(w, b, x):
        traces.append(x.shape)
        return kit.affine(w, b, x)

    def once(scale, eps, chosen):
        attack = chosen(threats.linf(eps)) if chosen else "fgsm"
        model = Partial(counted, scale * p.w, scale * p.b)
        budgets = {"eps_curve": (0.01, 0.03), "batch_size": 50, "slots": 50}
        evaluate(KEY, model, p.x, p.y, threats.linf(eps), attacks=(attack,), **budgets)
        return len(traces)

    for chosen in (None, attacks.bim):
        first = once(1.0, 0.02, chosen)
        second = once(2.0, 0.025, chosen)
        assert traces[first:second] == [(50, 6), (8, 6)]  # the shape check, and the pass that is traced anew on purpose
    assert first > 5


def test_two_runs_of_one_seed_give_the_same_report_but_for_timing(kit):
    p = kit.linear(n=60)
    attack = kit.Planted(threat=LINF, w=p.w, kind="is lucky")
    runs = [evaluate(key, p.model, p.x, p.y, LINF, attacks=(attack,), seed=0) for key in (KEY, KEY, jax.random.key(1))]
    assert without_timing(runs[0]) == without_timing(runs[1]) != without_timing(runs[2])
    assert runs[0].key == [0, 0] and runs[0].seed == 0
    assert set(runs[0].timing["models"][0]) == {"name", "total", "clean", "attacks", "curve"}


def test_what_breaks_at_a_small_budget_is_carried_to_the_larger_ones(kit):
    p = kit.linear()
    attack = kit.Planted(threat=LINF, w=p.w, kind="is lucky")
    model = evaluate(KEY, p.model, p.x, p.y, LINF, attacks=(attack,), eps_curve=(0.01, 0.04, 0.02)).models[0]
    assert [c["eps"] for c in model.curve] == [0.01, 0.02, 0.04]
    assert [c["carried"] for c in model.curve][1:] == [c["broken"] for c in model.curve][:-1]
    accuracy = [c["robust_accuracy"] for c in model.curve]
    assert accuracy == sorted(accuracy, reverse=True) and accuracy[1] == model.robust_accuracy
    carried = [s for s, by in zip(model.examples["size"], model.examples["by"]) if by >= 0 and s < 0.011]
    assert len(carried) == model.curve[0]["broken"] > 0
    assert any("pointwise minimum" in s for s in model.statements)


def nan_beyond(w, b, x):
    z = x @ w + b[None]
    return jnp.where(x[:, :1] > 0.7, jnp.nan, z)


def test_logits_that_are_not_finite_never_count_as_robust(kit):
    p = kit.linear(wrong=0)
    x = p.x.copy()
    x[:30, 0] = 0.75  # NaN without an attack
    x[30:60, 0], x[60:, 0] = 0.69, 0.4  # NaN within reach; never NaN
    y = (x @ p.w + p.b).argmax(-1).astype(np.int32)
    model = Partial(nan_beyond, p.w, p.b)
    toward = kit.Planted(threat=LINF, w=np.eye(6, 2, k=1)[:, ::-1] * 0 + np.stack([np.zeros(6), np.eye(6)[0]], -1))
    report = evaluate(KEY, model, x, np.zeros_like(y), LINF, attacks=(toward,))
    columns = outcome(report)
    assert set(columns["clean"][:30]) == {-1} and set(columns["by"][:30]) == {-2}
    hit = columns["clean"][30:60] == 0
    assert hit.any() and set(columns["by"][30:60][hit]) == {0} and set(columns["adversarial"][30:60][hit]) == {-1}
    assert "nonfinite_logits" in [f.name for f in report.models[0].flags]


def test_targeted_with_two_classes_is_untargeted(kit):
    p = kit.linear()
    plain = evaluate(KEY, p.model, p.x, p.y, LINF, attacks="fgsm")
    aimed = evaluate(KEY, p.model, p.x, p.y, LINF, attacks="fgsm", targets="next")
    given = evaluate(KEY, p.model, p.x, p.y, LINF, attacks="fgsm", targets=1 - p.y)
    assert aimed.models[0].robust_accuracy == plain.models[0].robust_accuracy == given.models[0].robust_accuracy
    assert aimed.models[0].targeted["rule"] == "next" and given.models[0].targeted["rule"] == "given"
    rate = np.sum((p.far > 0) & (p.far <= 0.02)) / np.sum(p.far > 0)
    assert aimed.models[0].targeted["success_rate"] == rate
    assert plain.models[0].targeted is None
    assert any(s.startswith("The evaluation is targeted") for s in aimed.models[0].statements)


def test_a_targeted_evaluation_counts_only_the_target(kit):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(6, 4)).astype(np.float32)
    x = rng.uniform(0.3, 0.7, size=(200, 6)).astype(np.float32)
    model = Partial(kit.affine, w, -(0.5 * w.sum(0)))
    y = np.asarray(model(x)).argmax(-1).astype(np.int32)
    report = evaluate(KEY, model, x, y, threats.linf(0.1), attacks="fgsm", targets="least_likely")
    columns = outcome(report)
    z = np.asarray(model(x)).copy()
    z[np.arange(200), y] = np.inf
    broken = columns["by"] >= 0
    np.testing.assert_array_equal(columns["adversarial"][broken].astype(int), z.argmin(-1)[broken])
    assert 0 < broken.sum() < 200
    untargeted = evaluate(KEY, model, x, y, threats.linf(0.1), attacks="fgsm")
    assert untargeted.models[0].robust_accuracy < report.models[0].robust_accuracy


def test_random_targets_follow_the_index_and_avoid_the_label():
    y = np.random.default_rng(0).integers(0, 5, 400).astype(np.int32)
    logits, index = np.zeros((400, 5)), np.arange(400)
    target, rule = inputs.choose_targets("random", KEY, y, index, logits)
    assert rule == "random" and (target != y).all()
    shift = (target - y) % 5
    assert set(shift) == {1, 2, 3, 4} and np.bincount(shift)[1:].min() > 60
    order = np.random.default_rng(1).permutation(400)
    np.testing.assert_array_equal(
        inputs.choose_targets("random", KEY, y[order], index[order], logits)[0], target[order]
    )
    assert set(evaluate.TARGET_RULES) == {"random", "next", "least_likely"}


def test_each_example_may_have_a_budget_of_its_own(kit):
    p = kit.linear()
    eps = np.where(np.arange(300) % 2, 0.01, 0.04).astype(np.float32)
    report = evaluate(KEY, p.model, p.x, p.y, threats.linf(eps), attacks="fgsm", batch_size=64)
    np.testing.assert_array_equal(np.asarray(report.models[0].examples["by"]) == -1, p.far > eps)
    assert report.models[0].threat["eps"] == eps.tolist()
    with pytest.raises(ValueError, match="given by name"):
        evaluate(KEY, p.model, p.x, p.y, threats.linf(eps), attacks=(attacks.fgsm(threats.linf(0.1)),))


@pytest.mark.parametrize("threat", [threats.l2(0.05), threats.l1(0.1), threats.union(LINF, threats.l2(0.05))])
def test_other_threats_meet_the_dual_norm(kit, threat):
    p = kit.linear()
    slope, gap = p.w[:, 1] - p.w[:, 0], p.far * np.abs(p.w[:, 1] - p.w[:, 0]).sum()
    report = evaluate(KEY, p.model, p.x, p.y, threat, attacks="fgsm")
    robust = np.asarray(report.models[0].examples["by"]) == -1
    reach = {"l2": 0.05 * np.linalg.norm(slope), "l1": 0.1 * np.abs(slope).max()}
    reach["union"] = max(reach["l2"], 0.02 * np.abs(slope).sum())
    clear = np.abs(gap - reach[threat.norm]) > 0.001 * reach[threat.norm]
    np.testing.assert_array_equal(robust[clear], gap[clear] > reach[threat.norm])
    assert 0 < robust.sum() < 280


def test_what_noise_breaks_counts(kit):
    p = kit.linear()
    idle = kit.Planted(threat=LINF, w=p.w, kind="finds nothing")
    model = evaluate(KEY, p.model, p.x, p.y, LINF, attacks=(idle,)).models[0]
    assert model.attacks[-1]["name"] == "noise" and model.attacks[-1]["broken"] > 0
    assert model.examples["by"].count(1) == model.attacks[-1]["broken"] and model.attacks[0]["broken"] == 0
    assert model.robust_accuracy == (280 - model.attacks[-1]["broken"]) / 300
    assert "attack_weaker_than_noise" in [f.name for f in model.flags]


def test_progress_rises_to_its_total(kit):
    p, told = kit.linear(), []
    evaluate(
        KEY, p.model, p.x, p.y, LINF, attacks="fgsm", eps_curve=(0.01,), batch_size=64, restarts=2,
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    done = [d for d, _, _ in told]
    assert done == sorted(done) and told[-1][:2] == (4 * 300, 4 * 300) == (told[-1][1], told[0][1])
    assert {s.split(",")[0] for _, _, s in told} == {"fgsm"}


def test_verify_judges_stored_points(kit):
    p = kit.linear()
    report = evaluate(KEY, p.model, p.x, p.y, LINF, attacks="fgsm")
    verdict = evaluate.verify(p.model, report.models[0].x_adv, p.x, p.y, LINF, batch_size=64)
    np.testing.assert_array_equal(verdict.broken, np.asarray(report.models[0].examples["by"]) != -1)
    assert isinstance(verdict, evaluate.Verdict) and verdict.feasible.all() and verdict.size.dtype == np.float64
    far = p.x + np.float32(0.021)
    assert not evaluate.verify(p.model, far, p.x, p.y, LINF).feasible.any()
    edge = p.x + np.float32(0.02)  # rounding of the sum is forgiven, nothing more
    assert evaluate.verify(p.model, edge, p.x, p.y, LINF).feasible.all()
    assert not evaluate.verify(p.model, edge + np.float32(3e-7), p.x, p.y, LINF).feasible.any()
    with pytest.raises(ValueError, match="shape of x"):
        evaluate.verify(p.model, p.x[:3], p.x, p.y, LINF)


def test_half_precision_points_are_judged_as_float32(kit):
    p = kit.linear(wrong=0)
    half = (p.x + 0.0199).astype(jnp.bfloat16)
    verdict = evaluate.verify(p.model, half, p.x, p.y, LINF)
    want = np.abs(np.asarray(half, np.float64) - p.x).max(-1)
    np.testing.assert_array_equal(verdict.feasible, want <= 0.02 + 2.0**-24)


def test_logits_are_the_models_own_in_order(kit):
    p = kit.linear()
    np.testing.assert_allclose(evaluate.logits_of(p.model, p.x, 64), p.x @ p.w + p.b, rtol=1e-4, atol=1e-5)


def test_a_plain_function_is_a_model(kit):
    p = kit.linear(n=40)
    report = evaluate(KEY, lambda x: x @ p.w + p.b[None], p.x, p.y, LINF, attacks="fgsm", keep_adversarial=False)
    assert report.models[0].robust_accuracy == np.mean(p.far > 0.02)
    assert report.x is None and report.models[0].x_adv is None


def test_the_data_are_named_and_marked(kit):
    p = kit.linear(n=40)

    def told(data="", y=p.y, index=None):
        return evaluate(KEY, p.model, p.x, y, LINF, attacks="fgsm", data=data, index=index).data

    plain = told("mnist")
    assert (plain["name"], plain["split"], plain["n"], plain["shape"], plain["classes"]) == ("mnist", "", 40, [6], 2)
    assert told({"name": "mnist", "split": "test"})["split"] == "test"
    assert told()["fingerprint"] == plain["fingerprint"] != told(y=1 - p.y)["fingerprint"]
    assert told(index=np.arange(40) + 1)["fingerprint"] != plain["fingerprint"]


IMAGES = np.full((4, 8, 8, 3), 0.5, np.float32)


def wants_images(x):
    return jnp.zeros((x.shape[0], 2)) + x.reshape(x.shape[0], 8, 8, 3).transpose(0, 1, 2, 3)[:, 0, 0, :2] @ jnp.eye(2)


def conv(x):
    kernel = jnp.ones((3, 3, 3, 2)) / 27
    z = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return z.mean((1, 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"y": np.zeros(8, np.float32)}, "integer labels"),
        ({"y": np.eye(2, dtype=np.int32)[np.zeros(8, int)]}, "One-hot"),
        ({"y": np.zeros(7, np.int32)}, "one label for each"),
        ({"y": np.full(8, 2, np.int32)}, r"\[0, 2\)"),
        ({"x": np.full((8, 6), 1.5, np.float32)}, "within bounds"),
        ({"x": np.full((8, 6), np.nan, np.float32)}, "finite"),
        ({"x": np.zeros((8, 6), np.uint8)}, "floating point"),
        ({"x": np.zeros((0, 6), np.float32), "y": np.zeros(0, np.int32)}, "at least one example"),
        ({"threat": core.types.dataclasses.replace(LINF, eps=0.0)}, "eps must be"),
        ({"threat": core.types.dataclasses.replace(LINF, eps=float("nan"))}, "eps must be"),
        ({"threat": threats.linf(np.full(3, 0.1))}, "one for each of the 8"),
        ({"key": 0}, "typed key"),
        ({"batch_size": 0}, "batch_size"),
        ({"restarts": 0}, "restarts"),
        ({"attacks": "pdg"}, "'pgd'"),
        ({"attacks": ()}, "at least one attack"),
        ({"attacks": (3,)}, "names, attacks or functions"),
        ({"targets": np.zeros(8, np.int32)}, "differ from the labels"),
        ({"targets": np.full(8, 9, np.int32)}, "targets must lie"),
        ({"targets": "nearest"}, "rule for targets"),
        ({"eps_curve": (0.1, 0.0)}, "clean accuracy"),
        ({"eps_curve": (0.1,), "threat": threats.union(LINF, threats.l2(0.1))}, "one number"),
        ({"index": np.arange(7)}, "index must have"),
        ({"model": lambda x: x[:, 0]}, "logits of shape"),
        ({"model": lambda x: jnp.zeros((x.shape[0], 1))}, "k >= 2"),
        ({"model": lambda x: jnp.zeros((x.shape[0], 2)) * jnp.nan}, "finite logits"),
        ({"model": lambda x: x @ jnp.zeros((5, 2))}, "must take a batch of shape"),
        ({"model": conv, "x": IMAGES.transpose(0, 3, 1, 2), "y": np.zeros(4, np.int32)}, "channels first"),
        ({"model": lambda x: x.reshape(3, 2)}, "reshape inside the model"),
    ],
)  # fmt: skip
def test_impossible_arguments_are_refused_with_a_remedy(kit, change, words):
    p = kit.linear(n=8, wrong=0)
    good = {"key": KEY, "model": p.model, "x": p.x, "y": np.zeros(8, np.int32), "threat": LINF, "attacks": "fgsm"}
    with pytest.raises((ValueError, TypeError), match=words):
        evaluate(**(good | change))


def near(key, model, x, y, threat, index):
    """A certificate that tells the truth about a linear model, except about every fifth example."""
    w, b = (np.asarray(a, np.float64) for a in model.args)
    z = np.asarray(x, np.float64) @ w + b
    gap = np.abs(z[:, 1] - z[:, 0]) / np.abs(w[:, 1] - w[:, 0]).sum()
    return (gap > np.max(threat.eps)) & (np.asarray(index) % 5 > 0)


def test_certified_examples_are_not_attacked_and_bound_the_accuracy_from_below(kit):
    p = kit.linear()
    report = evaluate(KEY, p.model, p.x, p.y, LINF, attacks="fgsm", certificate=near, eps_curve=(0.01, 0.04))
    plain = evaluate(KEY, p.model, p.x, p.y, LINF, attacks="fgsm", eps_curve=(0.01, 0.04))
    model, by = report.models[0], np.asarray(report.models[0].examples["by"])
    covered = (p.far > 0.02) & (np.arange(300) % 5 > 0)
    np.testing.assert_array_equal(by == -3, covered)
    assert model.certified_accuracy == covered.mean() < model.robust_accuracy == plain.models[0].robust_accuracy
    low, high = model.certified_interval
    assert low < model.certified_accuracy < high
    open_now = (p.far > 0.01) & ~covered  # what the smaller budget broke is carried over
    assert model.attacks[0]["attacked"] == open_now.sum()
    for point, eps in zip(model.curve, (0.01, 0.02, 0.04)):
        assert point["certified_accuracy"] == np.mean((p.far > eps) & (np.arange(300) % 5 > 0))
        assert point["robust_accuracy"] == np.mean(p.far > eps)
    assert model.attacks[-1]["robust_accuracy_after"] == model.robust_accuracy
    assert any(s.startswith("Certified accuracy is a lower bound") for s in model.statements)
    assert plain.models[0].certified_accuracy is None and plain.models[0].certified_interval is None
    np.testing.assert_array_equal(model.x_adv[covered], p.x[covered])
    with pytest.raises(TypeError, match=r"certificate must return bool \[b\].*Radii"):
        evaluate(KEY, p.model, p.x, p.y, LINF, attacks="fgsm", certificate=lambda *args: np.full(len(args[2]), 0.3))


def test_a_search_in_bfloat16_counts_only_what_float32_confirms(kit):
    p = kit.linear()
    p.model = Partial(kit.affine, p.w, p.b + 100)  # bfloat16 sees no difference between the logits
    report = evaluate(KEY, p.model, p.x, p.y, LINF, attacks=("fgsm",), search_dtype="bfloat16")
    model = report.models[0]
    np.testing.assert_array_equal(np.asarray(model.examples["by"]) == -1, p.far > 0.02)
    assert model.search["dtype"] == "bfloat16" and model.search["retried"] > 10
    assert any("bfloat16" in s for s in model.statements)
    assert evaluate.verify_report(report, p.model) == []
    low = engine.bfloat16(p.model)
    assert low.args[0].args[0].dtype == jnp.bfloat16 and low(jnp.asarray(p.x[:2])).dtype == jnp.float32
    with pytest.raises(ValueError, match="unknown search_dtype 'float16'"):
        evaluate(KEY, p.model, p.x, p.y, LINF, search_dtype="float16")


def test_several_devices_and_other_slots_change_nothing(kit):
    p = kit.linear()
    mesh = jax.make_mesh((8,), ("data",))
    settings = {"attacks": ("r_fgsm",), "restarts": 2}
    one = evaluate(KEY, p.model, p.x, p.y, LINF, slots=11, **settings).models[0]
    many = evaluate(KEY, p.model, p.x, p.y, LINF, slots=11, mesh=mesh, **settings).models[0]
    few = evaluate(KEY, p.model, p.x, p.y, LINF, slots=7, **settings).models[0]
    assert one.examples["by"] == many.examples["by"] == few.examples["by"]
    assert one.x_adv.tobytes() == many.x_adv.tobytes()
    assert one.attacks == many.attacks == few.attacks
    assert (many.search["devices"], many.search["slots"], few.search["slots"]) == (8, 11, 7)


def test_each_example_may_have_a_budget_of_its_own_in_slots(kit):
    p = kit.linear()
    eps = np.where(np.arange(300) % 2, 0.01, 0.04).astype(np.float32)
    report = evaluate(KEY, p.model, p.x, p.y, threats.linf(eps), attacks="fgsm", slots=13)
    np.testing.assert_array_equal(np.asarray(report.models[0].examples["by"]) == -1, p.far > eps)
    assert evaluate.verify_report(report, p.model) == []


def test_what_the_evaluation_costs_beyond_the_model_is_timed_when_asked(kit):
    p = kit.linear(n=60)
    report = evaluate(KEY, p.model, p.x, p.y, LINF, attacks="fgsm", measure=True)
    cost = report.timing["models"][0]["cost"]
    assert cost["t_grad"] > 0 and cost["t_fwd"] > 0 and [a["name"] for a in cost["attacks"]] == ["fgsm", "noise"]
    assert cost["attacks"][0]["overhead"] > 0


def test_a_diagnosis_is_entered_beside_the_evaluations_own_flags(kit):
    p, asked = kit.linear(n=60), []

    class Said:
        flags = (evaluate.flags.flag("zero_gradient", 1.0, 0.0, "planted"),)
        numbers = {"checks": {"a": 1.5}}

    def diagnosis(key, model, x, y, threat, *, index):
        asked.append((x.shape, threat.norm))
        return Said

    model = evaluate(KEY, p.model, p.x, p.y, LINF, attacks="fgsm", diagnostics=diagnosis).models[0]
    assert asked == [((60, 6), "linf")] and model.diagnostics == {"checks": {"a": 1.5}}
    assert [f.name for f in model.flags if f.detail == "planted"] == ["zero_gradient"]
    assert evaluate(KEY, p.model, p.x, p.y, LINF, attacks="fgsm").models[0].diagnostics is None


def test_stored_points_that_do_not_hold_are_named(kit):
    p = kit.linear()
    report = evaluate(KEY, p.model, p.x, p.y, LINF, attacks="fgsm")
    model, by = report.models[0], np.asarray(report.models[0].examples["by"])
    hit, held = np.flatnonzero(by >= 0), np.flatnonzero(by == -1)
    x_adv = model.x_adv.copy()
    x_adv[hit[0]] += 0.05
    x_adv[hit[1]] = p.x[hit[1]]
    x_adv[held[0]] += 0.001
    spoiled = core.types.dataclasses.replace(report, models=[core.types.dataclasses.replace(model, x_adv=x_adv)])
    wrong = evaluate.verify_report(spoiled, p.model, batch_size=32)
    said = {}
    for place, row, words in wrong:
        assert place == 0
        said.setdefault(row, []).append(words)
    assert sorted(said) == sorted([hit[0], hit[1], held[0]])
    assert "outside bounds or budget" in said[hit[0]][0] and any("classifies it correctly" in w for w in said[hit[1]])
    assert "is not the clean one" in said[held[0]][0]
    assert evaluate.verify_report(report, p.model) == [] == evaluate.verify_report(report)
    bare = core.types.dataclasses.replace(report, x=None)
    with pytest.raises(ValueError, match="must hold its examples"):
        evaluate.verify_report(bare)


@pytest.mark.slow
def test_the_rooms_own_diagnosis_and_a_smoothing_certificate_fit_the_seams(kit):
    from jaxadv.certify import smoothing

    p = kit.linear(n=40)
    p.model = jax.tree.map(jnp.asarray, p.model)
    report = evaluate(KEY, p.model, p.x, p.y, LINF, attacks="fgsm", diagnostics=True)
    model = report.models[0]
    assert set(evaluate.CHECKS) < set(model.diagnostics) and model.diagnostics["examples"] == 20
    assert evaluate.report.from_json(report.to_json()).models[0].diagnostics == model.diagnostics
    assert evaluate.Diagnosis._fields == ("flags", "numbers") and callable(evaluate.diagnose)
    smooth = smoothing.smoothed(KEY, p.model, sigma=0.05)
    certificate = smoothing.certificate(n0=20, n=200)
    found = evaluate(KEY, smooth, p.x, p.y, threats.l2(0.01), attacks="fgsm", certificate=certificate).models[0]
    assert 0 < found.certified_accuracy <= found.robust_accuracy <= found.clean_accuracy
