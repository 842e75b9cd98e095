"""The spine, end to end on digits: train, save, evaluate, report, verify; and the front page as written."""

import json

import jax
import numpy as np
import optax
import pytest

import jaxadv as ja

EPS = 0.1


@pytest.fixture(scope="module")
def digits():
    return ja.data.load("digits", "train"), ja.data.evaluation_subset(ja.data.load("digits", "test"), 60)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A linear network, trained for two epochs against FGSM, saved and loaded again."""
    source, _ = digits
    spec = ja.models.make_spec("mlp", shape=source.shape, classes=source.classes, widths=())
    net = ja.models.from_spec(spec, jax.random.key(0))
    attack = ja.attacks.fgsm(ja.threats.linf(EPS), start="random", keep="last")
    folder = tmp_path_factory.mktemp("spine")
    state = ja.train.fit(
        jax.random.key(1), net, ja.train.pgd_at(attack), optax.adam(0.02), source, steps=40, batch_size=64, log_every=20
    )
    path = folder / "model.safetensors"
    ja.models.save(path, ja.train.trained(net, state), spec)
    loaded, found = ja.models.load(path)
    assert found == spec
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    return ja.models.model(loaded)


def exact(model, x, y):
    """Which examples a linear model holds against every point of the box within EPS, by each rival's own corner.

    For a rival k the worst point of linf moves each pixel by EPS along sign(w_k - w_y), cut by [0, 1]; the example is
    robust if and only if no rival wins at its own worst point.
    """
    weights = np.asarray(jax.jacobian(lambda v: model(v[None])[0])(x[0])).reshape(10, -1).astype(np.float64)
    bias = np.asarray(model(np.zeros_like(x[:1]))[0], np.float64)
    flat = x.reshape(len(x), -1).astype(np.float64)
    holds = np.ones(len(x), bool)
    for k in range(10):
        slope = weights[k] - weights[y]
        worst = np.clip(flat + EPS * np.sign(slope), 0, 1)
        gain = (slope * worst).sum(-1) + bias[k] - bias[y]
        holds &= (gain < 0) | (y == k)
    return holds


def test_train_save_evaluate_report_verify(digits, trained, tmp_path):
    _, source = digits
    x, y = source.all()
    threat = ja.threats.linf(EPS, source.bounds)
    attacks = (ja.attacks.pgd(threat, steps=20, loss=ja.losses.margin, name="pgd_margin"),)
    report = ja.evaluate(
        jax.random.key(2),
        trained,
        x,
        y,
        threat,
        attacks=attacks,
        index=source.index,
        data=source,
        name="linear",
        seed=2,
    )
    model = report.models[0]
    assert model.clean_accuracy > 0.8
    # On a linear model the truth is known, the report is an upper bound, and a margin attack all but reaches it.
    truth = exact(trained, x, y)
    robust = np.asarray(model.examples["by"]) == -1
    assert (robust >= truth).all() and robust.sum() - truth.sum() <= 2
    assert 0.1 < truth.mean() < model.clean_accuracy

    folder = report.save(tmp_path / "report")
    tree = json.loads((folder / "report.json").read_text())
    keys = {
        "name",
        "n",
        "clean_accuracy",
        "clean_interval",
        "robust_accuracy",
        "robust_interval",
        "threat",
        "attacks",
        "flags",
    }
    assert tree["schema"] == ja.evaluate.SCHEMA and set(tree["models"][0]) >= keys
    assert (folder / "report.html").stat().st_size > 1000 and (folder / "report.md").read_text().startswith("#")

    stored = ja.evaluate.load(folder)
    again = stored.models[0]
    verdict = ja.evaluate.verify(trained, again.x_adv, stored.x, y, threat)
    broken = np.asarray(again.examples["by"]) >= 0
    assert verdict.feasible.all() and verdict.broken[broken].all()
    assert again.robust_accuracy == robust.mean()


def test_a_report_is_a_function_of_its_key(digits, trained):
    _, source = digits
    x, y = source.all()
    threat = ja.linf(EPS)
    first, second = (
        json.loads(ja.evaluate(jax.random.key(7), trained, x[:20], y[:20], threat, attacks=("pgd",)).to_json())
        for _ in range(2)
    )
    del first["timing"], second["timing"]
    assert first == second


def test_what_a_user_sees_works_as_written(digits, trained):
    """The lines of the front page, on arguments that exist."""
    source, few = digits
    key, model = jax.random.key(0), trained
    x, y = few.take(20).all()

    threat = ja.threats.linf(8 / 255)
    report = ja.evaluate(key, model, x, y, threat, attacks=("fgsm",))
    x_adv = ja.attacks.pgd(threat, steps=20).run(key, model, x, y).x
    assert report.models[0].robust_accuracy <= report.models[0].clean_accuracy
    assert ja.feasible(threat, np.asarray(x_adv), x).all()
    assert float(ja.margin(model(x_adv), y).mean()) < float(ja.margin(model(x), y).mean())


def test_a_recipe_trains_as_written(digits):
    source, key = digits[0], jax.random.key(0)
    state = ja.train.fit(key, **ja.recipes.standard_digits(source, epochs=1, net="mlp") | CALM)
    assert int(state.step) == (len(source) - len(source) // 10) // 64


CALM = {"attack": None, "validation": None, "collapse": None}  # nothing but training


def test_a_module_of_flax_goes_the_same_way(digits):
    from flax import nnx

    _, source = digits
    x, y = source.take(10).all()
    net = nnx.Sequential(lambda v: v.reshape(len(v), -1), nnx.Linear(64, 10, rngs=nnx.Rngs(0)))
    model = ja.models.from_nnx(net)
    found = ja.attacks.fgsm(ja.linf(0.2)).run(jax.random.key(0), model, x, y)
    assert bool((ja.margin(model(found.x), y) <= ja.margin(model(x), y) + 1e-6).all())


@pytest.mark.slow
def test_the_recipe_of_the_front_page_trains_a_robust_network(digits):
    source, few = digits
    state = ja.train.fit(jax.random.key(0), **ja.train.recipes.fast_digits(source, epochs=10))
    net = ja.train.recipes.fast_digits(source, epochs=10)["trainable"]
    model = ja.models.model(ja.train.trained(net, state))
    x, y = few.all()
    report = ja.evaluate(jax.random.key(1), model, x, y, ja.linf(EPS), attacks="quick")
    assert report.models[0].clean_accuracy > 0.85 and report.models[0].robust_accuracy > 0.4
