"""The long TRADES recipe: published settings, its optimizer by hand, its attack, generated data, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, data, losses, models, threats, train
from jaxadv.core import Trainable, example_keys
from jaxadv.train import assembly, objectives, trades_recipes

RECIPE = train.RECIPES["trades_cifar10_wrn28_10"]
SHAPE, CLASSES = (4, 4, 3), 10


def source(n, seed=0):
    x = np.random.default_rng(seed).integers(0, 255, (n, *SHAPE), dtype=np.uint8)
    return data.arrays(x, np.arange(n, dtype=np.int32) % CLASSES, classes=CLASSES)


def affine(params, state, x, *, bn="eval", key=None, **_):
    return x.reshape(len(x), -1) @ params, state


NET = Trainable(affine, jnp.asarray(np.random.default_rng(0).normal(size=(48, CLASSES)), jnp.float32), {})


def test_the_settings_are_as_published():
    given = RECIPE(source(12_000), trainable=NET)
    assert len(given["data"]) == 11_000 and (given["batch_size"], given["steps"]) == (1024, 400 * (11_000 // 1024))
    assert (given["ema"], given["keep"]) == (0.995, "best") and not isinstance(given["data"], data.Blend)
    mixing = given["objective"].keywords
    assert (mixing["aim"].keywords["classes"], mixing["aim"].keywords["share"]) == (CLASSES, 1.0)
    search = mixing["find"].keywords
    attack = search["attack"]
    assert (attack.threat.eps, attack.step_size, attack.max_steps, attack.start) == (8 / 255, 0.1, 10, "random")
    assert [float(attack.schedule(t)) for t in (0, 4, 5, 9)] == pytest.approx([1, 1, 0.1, 0.1])
    assert search["bn_attack"] == "local" and search["guide"] is objectives.targets and not attack.steep
    assert attack.loss is objectives.minus_soft_cross_entropy and attack.keep == "last"
    judge = given["attack"]
    assert (judge.max_steps, judge.loss) == (40, losses.margin) and judge.threat.eps == 8 / 255
    assert [float(judge.schedule(t)) for t in (19, 20, 30)] == pytest.approx([1, 0.1, 0.001])
    plain = RECIPE(source(120), trainable=NET, mix=False, attack_steps=4, eps=0.1)
    search = plain["objective"].keywords
    assert search["guide"] is objectives.clean_logits and search["attack"].loss is losses.minus_kl
    assert plain["batch_size"] == 10 and float(search["attack"].schedule(2)) == pytest.approx(0.1)
    again = RECIPE(source(120), trainable=NET, mix=False, attack_steps=4, eps=0.1)
    assert jax.tree.structure(again["attack"]) == jax.tree.structure(plain["attack"])  # one program
    with pytest.raises(ValueError, match="attack_steps must be"):
        RECIPE(source(120), trainable=NET, attack_steps=0)


def test_the_optimizer_by_hand():
    """`nesterov`: on the gradient of the loss and of the squares, which leave norms out; the published rate."""
    params = {"conv": {"kernel": np.float32(2.0), "bias": np.float32(1.0)}}
    params |= {"bn": {"scale": np.float32(1.5), "bias": np.float32(0.5)}}
    assert trades_recipes.decayed(params) == {
        "conv": {"kernel": True, "bias": True},
        "bn": {"scale": False, "bias": False},
    }
    given = RECIPE(source(120), trainable=NET, epochs=8, batch_size=12, lr=0.4)
    steps, optimizer = given["steps"], given["optimizer"]
    assert steps == 72
    want = {"kernel": 2.0, "bias": 1.0, "scale": 1.5, "offset": 0.5}
    speed = dict.fromkeys(want, 0.0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for t in range(20):
        rise = round(steps / 40)
        rate = 0.4 * t / rise if t < rise else 0.2 * (1 + np.cos(np.pi * (t - rise) / (steps - rise)))
        for name, value in want.items():
            slope = 0.3 + (5e-4 * value if name in ("kernel", "bias") else 0)
            speed[name] = 0.9 * speed[name] + slope
            want[name] = value - rate * (slope + 0.9 * speed[name])
        grads = jax.tree.map(lambda a: np.full_like(a, 0.3), params)
        moved, state = update(grads, state, params)
        params = jax.tree.map(lambda a, b: a + np.asarray(b), params, moved)
    got = {**params["conv"], "scale": params["bn"]["scale"], "offset": params["bn"]["bias"]}
    assert {k: float(v) for k, v in got.items()} == pytest.approx(want, rel=1e-5)


def test_the_rate_rises_with_the_batch(monkeypatch):
    seen = []
    still = optax.constant_schedule(0.1)
    monkeypatch.setattr(trades_recipes.schedules, "cosine", lambda *given, **more: seen.append((*given, more)) or still)
    RECIPE(source(12_000), trainable=NET)
    RECIPE(source(120), trainable=NET, batch_size=12, epochs=2)
    RECIPE(source(120), trainable=NET, lr=0.3, steps=5)
    steps = 400 * (11_000 // 1024)
    assert seen == [(0.4, steps, seen[0][2]), (0.1, 18, seen[0][2]), (0.3, 5, {"warmup": 1 / 40})]


def test_only_attacked_examples_move_running_statistics():
    given, seen = RECIPE(source(120), trainable=NET), []

    def spy(params, state, x, *, bn="eval", **settings):
        seen.append(bn)
        return affine(params, state, x)

    n = jnp.arange(6, dtype=jnp.int32)
    rows = {"x": jnp.zeros((6, *SHAPE)), "y": n, "index": n, "mask": n >= 0, "step": n * 0}
    jax.eval_shape(functools.partial(given["objective"], spy), NET.params, {}, rows, jax.random.key(0))
    assert seen[-2:] == ["train", "local"] and set(seen[:-2]) == {"local"}


def test_without_mixing_the_attack_is_that_on_the_cross_entropy_to_the_clean_prediction(key):
    given = RECIPE(source(120), trainable=NET, mix=False, eps=0.1)
    soft = objectives.minus_soft_cross_entropy
    plain = attacks.adam_pgd(
        threats.linf(0.1), steps=10, step_size=0.1, schedule=lambda t: jnp.where(t < 5, 1.0, 0.1), loss=soft,
        criterion=soft, keep="last", name="trades_adam",
    )  # fmt: skip
    n = np.arange(6, dtype=np.int32)
    rows = {"x": source(6)[n]["x"], "y": n, "index": n + 9, "mask": n >= 0, "step": n * 0}

    @jax.jit
    def both(rows):
        model = train.frozen(affine, NET.params, {}, bn="local")
        found = plain.run(key, model, rows["x"], jax.nn.softmax(model(rows["x"])), index=rows["index"])
        start = plain.threat.sample(example_keys(key, plain.name, rows["index"]), rows["x"])
        return given["objective"].find(affine, NET.params, {}, rows, key)["found"], found.x, start

    got, want, start = both(rows)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(np.subtract(got, rows["x"])).max() <= 0.1001 and np.abs(np.subtract(got, start)).max() > 0.05


def test_generated_data_fill_their_share_and_alone_are_softened(key):
    given = RECIPE(source(120), extra=source(500, 1), trainable=NET, epochs=3, batch_size=20, share=0.25, smoothing=0.2)
    blend = given["data"]
    assert isinstance(blend, data.Blend) and len(blend) == 108 + 500 and blend.share == 0.25
    assert given["steps"] == 3 * (108 // 20)  # passes over the real data
    assert (given["validation"].index < 120).all() and not set(given["validation"].index) & set(blend.index)
    batch = next(data.batches(blend, 20, seed=0)) | {"step": np.zeros(20, np.int32)}
    made = batch["index"] >= blend.since
    assert made.sum() == 15
    soft = objectives.halves(given["objective"])[0].keywords["aim"](batch, key)
    np.testing.assert_allclose(np.asarray(soft["target"]).max(1), np.where(made, 0.82, 1.0), atol=1e-6)
    with pytest.raises(ValueError, match="the same shape"):
        RECIPE(source(120), extra=data.load("digits"), trainable=NET)


def test_the_network_has_the_options_it_knows():
    digits = data.load("digits")
    given = RECIPE(digits, net="mlp")
    want = models.create("mlp", jax.random.key(0), shape=(8, 8, 1), classes=10, activation="silu")
    assert jax.tree.structure(given["trainable"]) == jax.tree.structure(want)
    assert assembly.CIFAR10_MEAN is train.recipes.CIFAR10_MEAN and len(train.recipes.CIFAR10_STD) == 3


@pytest.mark.parametrize("name", ["fast_cifar10", "pgd_cifar10"])
def test_the_shorter_recipes_smooth_labels_and_average_by_argument(name):
    given = train.recipe(name)(source(1200), trainable=NET, label_smoothing=0.4, ema=0.999, keep="best")
    assert given["objective"].loss.keywords["loss"].keywords["smoothing"] == 0.4
    assert (given["ema"], given["keep"]) == (0.999, "best")


@pytest.mark.slow
def test_a_small_run_learns_and_averages_as_published(key):
    """Digits and noisy copies of them; the average of one parameter by hand."""
    digits = data.load("digits")
    x, y = digits.all()
    noisy = np.clip(x + np.random.default_rng(0).normal(0, 0.1, x.shape), 0, 1).astype(np.float32)
    net = models.create("mlp", key, shape=(8, 8, 1), classes=10, widths=(64,), norm="batch", activation="silu")
    settings = {"eps": 0.1, "epochs": 20, "batch_size": 100, "attack_steps": 4, "beta": 3.0, "validate_every": 240}
    given = RECIPE(digits, extra=data.arrays(noisy, y, classes=10), trainable=net, **settings) | {"augment": None}
    seen, loss = [np.asarray(jax.tree.leaves(net.params)[0])], []

    def watch(step, state, line):
        if line["event"] == "train":
            seen.append(np.asarray(jax.tree.leaves(state.params)[0]))
            loss.append(line["loss"])

    state = train.fit(key, **given | {"keep": "last", "log_every": 1, "callbacks": (watch,)})
    average = seen[0]
    for t, params in enumerate(seen[1:]):
        d = min(0.995, (1 + t) / (10 + t))
        average = d * average + (1 - d) * params
    np.testing.assert_allclose(jax.tree.leaves(state.ema)[0], average, atol=1e-5)
    assert len(loss) == given["steps"] and np.mean(loss[-20:]) < 0.7 * np.mean(loss[:5])
    model = models.model(train.trained(net, state))
    x, y = data.load("digits", "test").all()
    found = jax.jit(attacks.pgd(threats.linf(0.1), steps=20).run)(key, model, x, y)
    assert np.mean(~np.asarray(found.success)) > 0.5 and np.mean(np.argmax(model(x), -1) == y) > 0.8
