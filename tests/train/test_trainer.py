"""The pure step: against numpy, across executors, in parts, in half precision, with padding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, losses, parallel, threats, train
from jaxadv.core import Trainable
from jaxadv.train import trainer


def picture_batch(n=8, seed=0, classes=3, padded=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(n) < n - padded
    batch = {
        "x": rng.uniform(0, 1, (n, 4, 4, 1)).astype(np.float32),
        "y": rng.integers(0, classes, n).astype(np.int32),
        "index": np.where(mask, np.arange(n) + 7, -1).astype(np.int32),
        "mask": mask,
    }
    return jax.tree.map(jnp.asarray, batch)


def test_five_steps_of_sgd_by_hand(kit, key):
    net, batch = kit.linear(), kit.rows()
    step = jax.jit(train.make_step(net.apply, train.standard(), optax.sgd(0.5)))
    state = trainer.init(key, net, optax.sgd(0.5))
    w, b = np.asarray(net.params["w"], np.float64), float(net.params["b"])
    x, y = np.asarray(batch["x"], np.float64), np.asarray(batch["y"])
    for _ in range(5):
        score = x @ w + b
        loss = np.mean(np.logaddexp(0, -(2 * y - 1) * score))
        slope = (1 / (1 + np.exp(-score)) - y) / len(y)  # d mean cross-entropy / d score
        w, b = w - 0.5 * slope @ x, b - 0.5 * slope.sum()
        state, metrics = step(state, batch)
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
        assert float(metrics["clean"]) == pytest.approx(np.mean((score > 0) == y))
    norm = np.sqrt(np.sum((slope @ x) ** 2) + slope.sum() ** 2)
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    assert float(state.params["b"]) == pytest.approx(b, rel=1e-5) and int(state.step) == 5


def test_padding_changes_nothing(kit, key):
    net = kit.mlp("batch")
    objective = train.pgd_at(attacks.pgd(threats.l2(0.5), steps=2, keep="last"), bn_attack="local")
    step = jax.jit(train.make_step(net.apply, objective, optax.sgd(0.1)))
    padded = picture_batch(8, padded=3)
    garbage = dict(padded, x=jnp.where(padded["mask"][:, None, None, None], padded["x"], 0.77))
    short = {name: a[:5] for name, a in padded.items()}
    states = [step(trainer.init(key, net, optax.sgd(0.1)), batch)[0] for batch in (padded, garbage, short)]
    for other in states[1:]:
        for a, b in zip(kit.leaves(states[0]), kit.leaves(other)):
            np.testing.assert_allclose(a, b, atol=1e-6)
    assert not kit.same_bits(states[0].params, net.params)


@pytest.mark.slow
@pytest.mark.parametrize("bn_attack", ["eval", "local", "train"])
def test_every_executor_takes_the_same_steps(kit, key, bn_attack):
    net, optimizer = kit.mlp("batch"), optax.sgd(0.1, momentum=0.9)
    objective = train.pgd_at(attacks.pgd(threats.l2(0.5), steps=2, keep="last"), bn_attack=bn_attack)
    step = train.make_step(net.apply, objective, optimizer, ema=0.9)
    batches = [picture_batch(8, seed, padded=seed) for seed in range(3)]

    def run(how, devices):
        settings = {"devices": devices} if how == "vmap" else {"mesh": parallel.make_mesh(devices)}
        compiled = parallel.compile_step(step, how=how, **settings)
        state = trainer.init(key, net, optimizer, ema=True)
        for batch in batches:
            state, metrics = compiled(state, batch)
        return kit.leaves(state), {k: float(v) for k, v in metrics.items()}

    want, told = run("jit", 1)
    for how, devices in [("jit", 4), ("shard_map", 1), ("shard_map", 4), ("pmap", 4), ("vmap", 4)]:
        got, also = run(how, devices)
        for a, b in zip(want, got):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=f"{how} on {devices}")
        assert also == pytest.approx(told, abs=1e-5)


def test_without_varying_parameters_shard_map_counts_the_gradient_too_often(kit, key, monkeypatch):
    """The oracle above has teeth: remove the cure and four devices no longer agree with one."""
    net = kit.mlp()
    step = train.make_step(net.apply, train.standard(), optax.sgd(0.1))
    run = lambda: parallel.compile_step(step, how="shard_map", mesh=parallel.make_mesh(4))(  # noqa: E731
        trainer.init(key, net, optax.sgd(0.1)), picture_batch()
    )
    right = run()[1]["gradient_norm"]
    monkeypatch.setattr(trainer.parallel, "varying", lambda tree, axis_name=None: tree)
    try:
        wrong = run()[1]["gradient_norm"]
    except Exception:
        return  # refusing is as good as a wrong number
    assert abs(float(wrong) / float(right) - 4) < 1e-3


@pytest.mark.parametrize("how", ["jit", "shard_map"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_gives_the_gradient_of_the_whole_batch(kit, key, parts, how):
    net, batch = kit.mlp(), picture_batch(16, padded=3)
    objective = train.pgd_at(attacks.pgd(threats.l2(0.5), steps=2, keep="last"))
    states = []
    for accumulate in (1, parts):
        step = train.make_step(net.apply, objective, optax.sgd(0.1), accumulate=accumulate)
        compiled = parallel.compile_step(step, how=how, mesh=parallel.make_mesh(4))
        states.append(compiled(trainer.init(key, net, optax.sgd(0.1)), batch))
    for a, b in zip(kit.leaves(states[0]), kit.leaves(states[1])):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_accumulation_works_on_convolutions_and_batch_norm(kit, key):
    from jaxadv import models

    net = models.create("cnn_small", key, shape=(8, 8, 1), classes=3, channels=(4, 4), hidden=8, norm="batch")
    batch = picture_batch(8)
    batch["x"] = np.random.default_rng(0).uniform(0, 1, (8, 8, 8, 1)).astype(np.float32)
    parts = [{name: a[i::2] for name, a in batch.items()} for i in range(2)]
    plain = train.grad_fn(train.standard())
    gradient = jax.jit(plain, static_argnums=0)
    both = jax.jit(train.accumulated(plain, 2), static_argnums=0)(net.apply, net.params, net.state, batch, key)
    first = gradient(net.apply, net.params, net.state, parts[0], key)
    second = gradient(net.apply, net.params, first.state, parts[1], key)
    for a, b, c in zip(*map(kit.leaves, (both.total, first.total, second.total))):
        np.testing.assert_allclose(a, b + c, atol=1e-5)
    for a, b in zip(kit.leaves(both.state), kit.leaves(second.state)):
        np.testing.assert_allclose(a, b, atol=1e-6)
    with pytest.raises(ValueError, match="accumulate must divide the 8 rows"):
        train.accumulated(gradient, 3)(net.apply, net.params, net.state, batch, key)


def test_half_precision_is_inside_the_network_only(kit, key):
    seen = {}

    def apply(params, state, x, *, bn="eval", key=None, **_):
        seen["params"], seen["x"] = params["w"].dtype, x.dtype
        return (x @ params["w"]), {"mean": state["mean"].astype(x.dtype) + 1}

    net = Trainable(apply, {"w": jnp.ones((5, 2))}, {"mean": jnp.zeros(2)})
    step = train.make_step(net.apply, train.standard(), optax.adam(0.1), precision="bfloat16", ema=0.5)
    state, metrics = step(trainer.init(key, net, optax.adam(0.1), ema=True), kit.rows())
    assert seen == {"params": jnp.bfloat16, "x": jnp.bfloat16}
    kinds = {a.dtype for a in jax.tree.leaves((state.params, state.state, state.ema, metrics))}
    assert kinds == {jnp.dtype("float32")}
    plain = kit.mlp("batch")
    half = train.make_step(plain.apply, train.standard(), optax.sgd(0.1), precision="bfloat16")
    full = train.make_step(plain.apply, train.standard(), optax.sgd(0.1))
    a, b = (jax.jit(s)(trainer.init(key, plain, optax.sgd(0.1)), picture_batch())[1]["loss"] for s in (half, full))
    assert 0 < abs(float(a) - float(b)) < 0.02


def test_the_average_of_parameters_by_hand():
    ema, params = {"w": jnp.float32(1.0)}, {"w": jnp.float32(3.0)}
    assert float(trainer.averaged(ema, params, 0, 0.9, True)["w"]) == pytest.approx(0.1 * 1 + 0.9 * 3)
    assert float(trainer.averaged(ema, params, 1000, 0.9, True)["w"]) == pytest.approx(0.9 * 1 + 0.1 * 3)
    assert float(trainer.averaged(ema, params, 0, 0.9, False)["w"]) == pytest.approx(0.9 * 1 + 0.1 * 3)


def test_the_first_state_shares_no_memory_with_the_network(kit, key):
    net = kit.mlp()
    state = trainer.init(key, net, optax.adam(1.0), ema=True)
    for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)):
        leaf.delete()
    assert all(np.isfinite(a).all() for a in kit.leaves(net.params))


def test_bn_groups_are_two_batches_of_half_the_size(kit, key):
    net, batch = kit.mlp("batch"), picture_batch(8)
    grouped = trainer.in_precision(net.apply, bn_groups=2)
    logits, _ = jax.jit(partial(grouped, bn="train"))(net.params, net.state, batch["x"])
    whole = jax.jit(partial(net.apply, bn="train"))
    halves = [whole(net.params, net.state, batch["x"][i : i + 4])[0] for i in (0, 4)]
    np.testing.assert_allclose(logits, np.concatenate(halves), atol=1e-5)


def test_augmentation_belongs_to_example_and_step(kit, key):
    net, batch = kit.mlp(), picture_batch(6)
    seen = []

    def spy(apply, params, state, batch, key):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch["x"])
        return jnp.sum(batch["x"], (1, 2, 3)) * params["layers"]["0"]["bias"][0], (state, {})

    augment = train.chain(train.crop(1), train.flip())
    step = train.make_step(net.apply, spy, optax.sgd(0.0), augment=augment)
    state = trainer.init(key, net, optax.sgd(0.0))
    later, _ = step(state, batch)
    step(state, {name: a[::-1] for name, a in batch.items()})
    step(later, batch)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen[0], seen[1][::-1])
    assert not np.array_equal(seen[0], seen[2])


@pytest.mark.parametrize("name", ["crop", "flip"])
def test_each_augmentation_gives_only_what_it_may(name):
    x = np.arange(16, dtype=np.float32).reshape(4, 4, 1) + 1
    wide = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    allowed = {
        "crop": [wide[i : i + 4, j : j + 4].tobytes() for i in range(3) for j in range(3)],
        "flip": [x.tobytes(), np.ascontiguousarray(x[:, ::-1]).tobytes()],
    }[name]
    augment = train.AUGMENTATIONS[name](**({"pad": 1} if name == "crop" else {}))
    keys = jax.random.split(jax.random.key(0), 200)
    got = np.asarray(jax.jit(jax.vmap(augment, (0, None)))(keys, jnp.asarray(x)))
    assert {a.tobytes() for a in got} == set(allowed)


def test_a_resized_crop_is_a_window_of_the_drawn_area_and_shape_inside_the_image():
    """Of an image that is affine in its places the crop is affine, so it tells its window."""
    height, width = 20, 30
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    image = np.stack([rows, columns], -1).astype(np.float32)
    area, ratio = (0.1, 0.4), (0.5, 1.5)
    augment, keys = train.resized_crop(area, ratio), jax.random.split(jax.random.key(0), 300)
    got = np.asarray(jax.jit(jax.vmap(augment, (0, None)))(keys, jnp.asarray(image)), np.float64)
    assert got.shape == (300, height, width, 2)
    inner = got[:, 3:-3, 3:-3]  # beyond the last pixel there is nothing to interpolate with
    down, right = np.diff(inner[..., 0], axis=1), np.diff(inner[..., 1], axis=2)
    tall, wide = down.mean((1, 2)) * height, right.mean((1, 2)) * width
    np.testing.assert_allclose(down, np.broadcast_to((tall / height)[:, None, None], down.shape), atol=1e-4)
    np.testing.assert_allclose(right, np.broadcast_to((wide / width)[:, None, None], right.shape), atol=1e-4)
    np.testing.assert_allclose(np.diff(inner[..., 0], axis=2), 0, atol=1e-4)  # upright
    share, shape = tall * wide / (height * width), wide / tall
    free = tall < height - 1e-3  # else the side was cut
    assert share.max() < area[1] + 1e-3 and share[free].min() > area[0] - 1e-3
    assert shape[free].max() < ratio[1] + 1e-3 and shape[free].min() > ratio[0] - 1e-3
    assert abs(share[free].mean() - 0.25) < 0.03 and abs(np.log(shape[free]).mean() - np.log(0.75) / 2) < 0.08
    top = inner[:, 0, 0, 0] + 0.5 - 3.5 * tall / height
    assert top.min() > -1e-3 and (top + tall).max() < height + 1e-3 and np.ptp(top) > 8
    square = jnp.asarray(image[:, :20])
    np.testing.assert_allclose(train.resized_crop((1.0, 1.0), (1.0, 1.0))(keys[0], square), square, atol=1e-5)
    for name, settings in (("area", ((0.5, 1.5),)), ("ratio", ((0.1, 1.0), (2.0, 1.0)))):
        with pytest.raises(ValueError, match=f"{name} must be a rising pair"):
            train.resized_crop(*settings)
    assert set(train.AUGMENTATIONS) == {"crop", "resized_crop", "flip"}


def test_collapse_is_a_fall_of_more_than_the_threshold():
    assert train.co_detector(0.6, 0.3) and not train.co_detector(0.6, 0.45) and not train.co_detector(0.3, 0.6)
    assert train.co_detector(0.6, 0.45, threshold=0.1)


def test_the_judge_counts_rows_that_are_correct_and_stay_so(kit, key):
    net, eps = kit.linear(), 0.2
    batch = kit.rows(64)
    batch["mask"] = jnp.arange(64) < 50
    attack = attacks.pgd(threats.linf(eps, (-10.0, 10.0)), steps=2, step_size=eps)
    _, counts = jax.jit(trainer.make_judge(net.apply, attack))(trainer.Judged(net.params, net.state, key), batch)
    w, b = np.asarray(net.params["w"]), float(net.params["b"])
    x, y = np.asarray(batch["x"])[:50], np.asarray(batch["y"])[:50]
    sign, score = 2 * y - 1, x @ w + b
    assert int(counts["count"]) == 50 and int(counts["clean"]) == np.sum(sign * score > 0)
    assert int(counts["robust"]) == np.sum(sign * score > eps * np.abs(w).sum())
    # an attack that repairs wrong rows does not make them robust
    helper = attacks.pgd(
        threats.linf(eps, (-10.0, 10.0)), steps=2, step_size=eps, loss=losses.cross_entropy, start="zero", keep="last"
    )
    _, counts = jax.jit(trainer.make_judge(net.apply, helper))(trainer.Judged(net.params, net.state, key), batch)
    assert int(counts["robust"]) == int(counts["clean"]) < np.sum(sign * score > -eps * np.abs(w).sum())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precision": "float16"}, "unknown precision 'float16'. Did you mean 'bfloat16' or 'float32'"),
        ({"ema": 1.0}, "ema must be a decay between 0 and 1"),
        ({"accumulate": 0}, "accumulate must be a whole number"),
    ],
)
def test_impossible_settings_are_refused(kit, settings, words):
    with pytest.raises(ValueError, match=words):
        train.make_step(kit.linear().apply, train.standard(), optax.sgd(0.1), **settings)


def test_an_objective_that_averages_is_refused(kit, key):
    net = kit.linear()

    def mean(apply, params, state, batch, key):
        losses, rest = train.standard()(apply, params, state, batch, key)
        return losses.mean(), rest

    with pytest.raises(ValueError, match="Leave out the mean"):
        train.grad_fn(mean)(net.apply, net.params, net.state, kit.rows(), key)


def test_the_types_say_what_they_hold(kit, key):
    assert train.TrainState._fields == ("step", "key", "params", "state", "opt_state", "ema", "carry")
    assert train.Gradient._fields == ("total", "count", "state", "sums", "carry")


def test_trained_takes_the_average_where_one_was_kept(kit, key):
    net = kit.linear()
    for kept in (False, True):
        state = trainer.init(key, net, optax.sgd(0.1), ema=kept)
        state = state._replace(params=jax.tree.map(lambda a: a + 1, state.params))
        got = train.trained(net, state)
        want = state.ema if kept else state.params
        assert got.apply is net.apply
        assert all(
            np.array_equal(a, b) for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(want), strict=True)
        )
