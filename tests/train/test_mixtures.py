"""Soft and mixed labels: boxes against exact enumeration, mixtures read off the pixels, losses in NumPy, reductions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, data, parallel, privacy, threats, train
from jaxadv.core import example_keys
from jaxadv.train import objectives, terms, trainer
from jaxadv.train.private import check_private

N, CLASSES = 12, 3


def batch(shape=(8, 6, 1), n=N, padded=0):
    """Images of one color each, so that a mixture shows whose pixels it has; labels 0, 1, 2, 0, ..."""
    mask = np.arange(n) < n - padded
    x = np.broadcast_to((np.arange(n, dtype=np.float32)[:, None, None, None] + 1) / 100, (n, *shape))
    rows = {"x": x, "y": np.arange(n, dtype=np.int32) % CLASSES, "mask": mask, "step": np.zeros(n, np.int32)}
    return rows | {"index": np.where(mask, np.arange(n) + 40, -1).astype(np.int32)}


def affine(params, state, x, *, bn="eval", key=None, **_):
    return 2 * x.reshape(len(x), -1) @ params, state


WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(48, CLASSES)), jnp.float32)


THREAT = threats.linf(0.05)
SOFT = objectives.minus_soft_cross_entropy
ADAM = attacks.adam_pgd(
    THREAT, steps=4, step_size=0.02, schedule=optax.piecewise_constant_schedule(1.0, {2: 0.1}), loss=SOFT,
    criterion=SOFT, keep="last",
)  # fmt: skip
MADE = {
    "plain": train.cutmix(train.standard(), CLASSES),
    "shared": train.cutmix(train.standard(), CLASSES, shared=True),
    "half": train.cutmix(train.standard(), CLASSES, share=0.5),
    "soft": train.softened(train.cutmix(train.standard(), CLASSES), CLASSES, 0.3, since=46),
    "trades": train.cutmix(train.trades(THREAT, beta=2.0, steps=1), CLASSES),
    "guided": train.cutmix(train.pgd_at(ADAM, guide=objectives.targets), CLASSES),
}


@jax.jit
def go(rows, key):
    """Name to what the search of an objective made of a batch, and what the objective returns; all in one program."""
    out = {}
    for name, objective in MADE.items():
        find, loss = objectives.halves(objective)
        mixed = find(affine, WEIGHTS, {}, rows, key)
        out[name] = mixed, loss(affine, WEIGHTS, {}, mixed, key)
    start = THREAT.sample(example_keys(key, ADAM.name, rows["index"]), out["guided"][0]["x"])
    return out, start


def read(mixed, rows):
    """Owner and partner of each row, and the owner's share, from the colors."""
    colors = np.rint(np.asarray(mixed["x"]) * 100).astype(int)[..., 0] - 1
    partner, own = np.arange(len(colors)), np.ones(len(colors))
    for i, image in enumerate(colors):
        others = set(np.unique(image).tolist()) - {i}
        assert len(others) <= 1
        partner[i], own[i] = others.pop() if others else -1, np.mean(image == i)
        inside = image != i
        assert np.array_equal(inside, inside.any(1)[:, None] & inside.any(0)[None])  # a box
    return partner, own


def test_the_mean_share_of_a_box_is_that_of_an_exact_enumeration():
    """λ ~ U(0, 1) on a fine grid, every center; half sides floor(n √(1 - λ)) // 2."""
    size = (8, 5)
    light = (np.arange(20_000) + 0.5) / 20_000
    sides = []
    for n in size:
        half, center = np.floor(n * np.sqrt(1 - light)).astype(int) // 2, np.arange(n)[:, None]
        sides.append((np.minimum(center + half, n) - np.maximum(center - half, 0)).mean(0))
    want = np.mean(sides[0] * sides[1]) / np.prod(size)
    drawn = jax.jit(jax.vmap(lambda k: train.box(k, *size)))(jax.random.split(jax.random.key(1), 20_000))
    got = np.asarray(drawn).mean((1, 2))
    assert got.mean() == pytest.approx(want, abs=0.006) and 0.2 < want < 0.35
    assert np.asarray(drawn).any(1).sum(1).max() == 4 and np.isclose(got, 0).any()


def test_labels_are_mixed_by_the_pixels_that_are_seen(key):
    rows = batch()
    mixed = go(rows, key)[0]["plain"][0]
    partner, own = read(mixed, rows)
    y = np.eye(CLASSES)[np.asarray(rows["y"])]
    want = own[:, None] * y + (1 - own)[:, None] * y[partner]
    np.testing.assert_allclose(mixed["target"], want, atol=1e-6)
    np.testing.assert_array_equal(mixed["y"], np.asarray(mixed["target"]).argmax(1))
    assert len(set(own.tolist())) > 3 and own.min() < 0.7  # each row a box of its own
    seen, at = set(), 0  # who has a box shows its partner: parts of one cycle, nobody twice
    known = partner[partner >= 0]
    assert len(set(known.tolist())) == len(known) and not np.any(partner == np.arange(N))
    while at not in seen and at >= 0:
        seen.add(at)
        at = partner[at]
    assert at <= 0
    again = go(rows, jax.random.key(1))[0]["plain"][0]
    assert not np.array_equal(again["x"], mixed["x"])


def test_neither_order_nor_padding_enters_a_mixture(key):
    rows = batch(padded=3)
    mixed = go(rows, key)[0]["plain"][0]
    turn = np.random.default_rng(0).permutation(N)
    turned = go({k: v[turn] for k, v in rows.items()}, key)[0]["plain"][0]
    for name in ("x", "y", "target"):
        np.testing.assert_array_equal(np.asarray(turned[name])[np.argsort(turn)][:9], mixed[name][:9])
    np.testing.assert_array_equal(mixed["x"][9:], rows["x"][9:])  # padding keeps to itself
    x = np.where(rows["mask"][:, None, None, None], rows["x"], np.float32(0.9))
    garbage = go(rows | {"x": x}, key)[0]["plain"][0]
    np.testing.assert_array_equal(garbage["x"][:9], mixed["x"][:9])


def test_one_box_for_all_and_boxes_for_some(key):
    rows = batch()
    mixed = [go(rows, jax.random.key(i))[0]["shared"][0] for i in range(4)]
    shares = [read(m, rows)[1] for m in mixed]
    assert all(np.ptp(s) < 1e-6 for s in shares) and len({float(s[0]) for s in shares}) > 1
    whole, some = (go(rows, key)[0][name][0] for name in ("plain", "half"))
    alike = [np.array_equal(a, b) for a, b in zip(whole["x"], some["x"])]
    alone = [np.array_equal(a, b) for a, b in zip(rows["x"], some["x"])]
    assert all(a or b for a, b in zip(alike, alone)) and 0 < sum(alone) < N and not all(alike)
    np.testing.assert_allclose(np.asarray(some["target"]).sum(1), 1, atol=1e-6)


def soft_cross_entropy(z, target):
    z = np.asarray(z, np.float64)
    log = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
    return -(target * log).sum(1), log


def said(x):
    return affine(np.asarray(WEIGHTS, np.float64), {}, np.asarray(x, np.float64))[0]


def test_losses_are_those_of_the_mixture(key):
    """Standard and TRADES in NumPy at what the search left; which class is counted; labels softened before mixing."""
    rows = batch()
    out = go(rows, key)[0]
    mixed, (losses, (_, metrics)) = out["plain"]
    target = np.asarray(mixed["target"], np.float64)
    clean, log = soft_cross_entropy(said(mixed["x"]), target)
    np.testing.assert_allclose(losses, clean, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(metrics["clean"], log.argmax(1) == target.argmax(1))
    found, (losses, _) = out["trades"]
    np.testing.assert_array_equal(found["x"], mixed["x"])
    assert 0.01 < np.abs(np.subtract(found["found"], found["x"])).max() < 0.0501  # the search starts at the mixture
    other = soft_cross_entropy(said(found["found"]), target)[1]
    want = clean + 2 * (np.exp(log) * (log - other)).sum(1)
    np.testing.assert_allclose(losses, want, rtol=1e-4, atol=1e-6)
    soft, (losses, _) = out["soft"]
    partner, own = read(soft, rows)
    y = np.eye(CLASSES)[rows["y"]]
    y[6:] = 0.7 * y[6:] + 0.1  # from index 46 on
    want = own[:, None] * y + (1 - own)[:, None] * y[partner]
    np.testing.assert_allclose(soft["target"], want, atol=1e-6)
    np.testing.assert_allclose(losses, soft_cross_entropy(said(soft["x"]), want)[0], rtol=1e-5, atol=1e-6)


def test_smoothing_all_rows_is_label_smoothing(kit, key):
    net, rows = kit.linear(), kit.rows()

    @jax.jit
    def both(rows):
        one = train.softened(train.standard(), 2, 0.2)(net.apply, net.params, {}, rows, key)[0]
        return one, train.standard(label_smoothing=0.2)(net.apply, net.params, {}, rows, key)[0]

    np.testing.assert_allclose(*both(rows), rtol=1e-5)


def test_without_boxes_nothing_changes(kit, key):
    plain = train.standard()
    assert train.cutmix(plain, CLASSES, share=0) is plain and train.softened(plain, CLASSES, 0.0) is plain
    rows = batch((1, 1, 48))  # a box has an even side: none fits into one pixel

    @jax.jit
    def both(rows):
        mixed = train.cutmix(plain, CLASSES)(affine, WEIGHTS, {}, rows, key)
        return mixed, plain(affine, WEIGHTS, {}, rows, key)

    mixed, alone = both(rows)
    np.testing.assert_allclose(mixed[0], alone[0], rtol=1e-5, atol=1e-6)
    assert kit.same_bits(mixed[1], alone[1])


def test_a_guided_attack_follows_the_mixture(key):
    """Adam in NumPy on a linear model: the gradient of the cross-entropy to q is W (softmax - q)."""
    out, start = go(batch(), key)
    mixed = out["guided"][0]
    x, point, w = (np.asarray(a, np.float64) for a in (mixed["x"], start, WEIGHTS))
    q, m, v = np.asarray(mixed["target"], np.float64), 0.0, 0.0
    for step in range(4):
        log = soft_cross_entropy(said(point), q)[1]
        rise = ((np.exp(log) - q) @ (2 * w).T).reshape(x.shape)
        m, v = 0.9 * m + 0.1 * rise, 0.999 * v + 0.001 * rise**2
        ratio = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        moved = point + 0.02 * (1 if step < 2 else 0.1) * ratio
        point = np.clip(np.clip(moved, x - 0.05, x + 0.05), 0, 1)
    np.testing.assert_allclose(mixed["found"], point, atol=2e-5)
    assert objectives.targets(None, batch() | {"y": 1}) == 1


def test_what_does_not_mix_is_refused(kit, key):
    mixed = train.cutmix(train.standard(), CLASSES)
    with pytest.raises(ValueError, match="cutmix must get images"):
        jax.eval_shape(functools.partial(mixed, kit.linear().apply), kit.linear().params, {}, kit.rows(), key)
    for settings, words in (({"classes": 1}, "classes must"), ({"classes": 3, "share": 1.5}, "share must")):
        with pytest.raises(ValueError, match=words):
            train.cutmix(train.standard(), **settings)
    for settings, words in (({"smoothing": 1.0}, "label_smoothing must"), ({"since": -1}, "since must")):
        with pytest.raises(ValueError, match=words):
            train.softened(train.standard(), CLASSES, **settings)
    with pytest.raises(ValueError, match="a batch without target. A gradient function that skips the search"):
        objectives.halves(mixed)[1](affine, WEIGHTS, {}, batch(), key)


@pytest.mark.slow
def test_private_training_refuses_to_mix(kit):
    source = data.arrays(np.random.default_rng(0).uniform(size=(64, 4, 4, 1)).astype(np.float32), np.arange(64) % 3)
    plan = privacy.plan(64, size=16, steps=2, noise_multiplier=2.0, clip_norm=1.0, epsilon=None, delta=1e-3)
    given = {"gradient": train.grad_fn, "replays": 1, "bn_groups": 1, "collapse": None, "keep": "last"}
    with pytest.raises(ValueError, match="as another row changed"):
        check_private(
            plan, train.cutmix(train.standard(), 3), kit.mlp(), source, given | {"batch_size": 16, "steps": 2}
        )


@pytest.mark.slow
def test_mixtures_pass_every_door_of_training(kit, key):
    """Accumulated, perturbed weights, shards: partners come from the same part, and the step is taken."""
    net, sgd = kit.mlp("batch"), optax.sgd(0.1)
    rng = np.random.default_rng(0)
    rows = batch((4, 4, 1), 8, padded=1) | {"x": rng.uniform(size=(8, 4, 4, 1)).astype(np.float32)}
    objective = train.cutmix(train.pgd_at(attacks.fgsm(threats.l2(0.3))), CLASSES)
    del rows["step"]

    def stepped(how="jit", devices=1, **settings):
        step = train.make_step(net.apply, objective, sgd, **settings)
        compiled = parallel.compile_step(step, how=how, mesh=parallel.make_mesh(devices))
        return jax.device_get(compiled(trainer.init(key, net, sgd), rows))

    plain = stepped()
    for a, b in zip(kit.leaves(stepped(devices=4)), kit.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    quiet = stepped(gradient=functools.partial(train.awp, gamma=0.0))
    for a, b in zip(kit.leaves(quiet), kit.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for settings in ({"accumulate": 2}, {"how": "shard_map", "devices": 4}):
        other = stepped(**settings)
        assert np.isfinite(other[1]["loss"]) and not kit.same_bits(other[0].params, plain[0].params)
    assert terms.masked(objective, 0.5) is not None


@pytest.mark.parametrize(
    "objective",
    [
        train.mart(THREAT, steps=1),
        train.iat(attacks.pgd(THREAT, steps=1)),
        train.cost_sensitive(attacks.pgd(THREAT, steps=1), np.ones((CLASSES, CLASSES)) - np.eye(CLASSES)),
    ],
    ids=["mart", "iat", "cost_sensitive"],
)
def test_what_needs_labels_says_so_inside_of_what_mixes_them(objective, key):
    with pytest.raises(ValueError, match="y must be integer labels.*Mixed or smoothed ones"):
        jax.eval_shape(functools.partial(train.cutmix(objective, CLASSES), affine), WEIGHTS, {}, batch(), key)
