"""Composite attacks: one component is plain PGD, orders are permutations that replay, the schedule by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxadv import core, losses
from jaxadv.attacks import Affine, Brightness, Composite, Contrast, Pixels, composite, pgd
from jaxadv.attacks.composite import greedy, sinkhorn
from jaxadv.threats import Behind, behind, linf, semantic

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SHAPE, B = (5, 5, 3), 10
X = RNG.uniform(0.02, 0.98, (B, *SHAPE)).astype(np.float32)
W = RNG.normal(size=(75, 4)).astype(np.float32)
PARTS = (Contrast(), Brightness(), Affine(20.0, 0.0))
THREAT = semantic(PARTS, SHAPE)


def seen(w, x):
    return jnp.tanh(3 * (x.reshape(x.shape[0], -1) - 0.5)) @ w


MODEL = Partial(seen, jnp.asarray(W))
Y = np.asarray(MODEL(X)).argmax(-1).astype(np.int32)
run = jax.jit(lambda attack, key, model, x, y, index: attack.run(key, model, x, y, index=index))
images = jax.jit(THREAT.images)
changes = [jax.jit(part) for part in PARTS]


def found_by(attack, threat=THREAT, place=None, key=KEY):
    place = np.arange(B) if place is None else place
    x = threat.pack(X)[place]
    return run(attack, key, behind(threat, MODEL), x, jnp.asarray(Y[place]), jnp.asarray(place))


def test_one_component_is_that_attack():
    """The cube as the only component: PGD on images, whose random start is that of the parameters."""
    threat = semantic(Pixels(0.05), SHAPE)
    settings = {"step_size": 0.2, "start": "zero"}
    found = found_by(composite(threat, order="fixed", outer=1, inner=6, early=False, **settings), threat)
    plain = jax.jit(pgd(linf(0.05), steps=6, step_size=0.01, start="zero").run)(KEY, MODEL, X, Y)
    np.testing.assert_allclose(threat.images(found.x), plain.x, atol=1e-6)
    np.testing.assert_allclose(found.score, plain.score, atol=1e-4)


def test_matrices_are_doubly_stochastic_and_their_orders_permutations():
    raised = jnp.asarray(RNG.normal(size=(6, 4, 4)), jnp.float32)
    soft = np.asarray(sinkhorn(raised))
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(soft.sum(2), 1, atol=1e-4)
    np.testing.assert_array_equal(np.sort(greedy(jnp.asarray(soft)), -1), np.tile(np.arange(4), (6, 1)))
    every = np.array(list(itertools.permutations(range(4))))
    np.testing.assert_array_equal(greedy(jnp.asarray(np.eye(4, dtype=np.float32)[every])), every)
    taken = jnp.asarray([[[0.5, 0.4, 0.1], [0.45, 0.2, 0.35], [0.05, 0.4, 0.55]]])
    np.testing.assert_array_equal(greedy(taken), [[0, 2, 1]])  # by hand: the second place wants what is gone


def test_images_follow_each_rows_order_and_a_soft_order_is_its_mean():
    order = np.array(list(itertools.permutations(range(3))) * 2, np.float32)[:B]
    point = np.asarray(THREAT.sample(core.example_keys(KEY, "s", jnp.arange(B)), THREAT.pack(X))).copy()
    point[:, :3] = order
    values = THREAT.values(point)[1]
    by_hand = []
    for i in range(B):
        image = jnp.asarray(X[i : i + 1])
        for which in order[i].astype(int):
            image = changes[which](image, values[which][i : i + 1])
        by_hand.append(image[0])
    out = images(point)
    np.testing.assert_allclose(out, np.stack(by_hand), atol=1e-6)
    hard = jnp.asarray(np.eye(3, dtype=np.float32)[order.astype(int)])
    np.testing.assert_allclose(images(point, hard), out, atol=1e-6)
    assert len(np.unique(np.round(np.asarray(out)[0], 3))) > 10
    other = point.copy()
    other[:, :3] = order[:, ::-1]
    assert (np.abs(np.asarray(images(other)) - out).reshape(B, -1).max(-1) > 1e-3).mean() > 0.7  # it matters


SCHEDULED = composite(THREAT, outer=3, inner=2, early=False)


def test_what_is_found_is_feasible_replays_and_is_verified():
    found = found_by(SCHEDULED)
    stored = np.asarray(found.x)
    assert isinstance(SCHEDULED, Composite) and isinstance(behind(THREAT, MODEL), Behind)
    assert core.feasible(THREAT, stored, np.asarray(THREAT.pack(X))).all()
    logits = np.asarray(MODEL(images(stored)))
    np.testing.assert_array_equal(found.success, logits.argmax(-1) != Y)
    own = logits[np.arange(B), Y] - np.where(np.eye(4, dtype=bool)[Y], -np.inf, logits).max(-1)
    np.testing.assert_allclose(found.score, own, atol=1e-4)
    np.testing.assert_array_equal(np.sort(THREAT.values(stored)[0], -1), np.tile(np.arange(3), (B, 1)))
    assert (found.grads == 6 + 2).all() and (found.queries == 6 + 3 + 2).all()  # two choices of an order
    place = np.random.default_rng(1).permutation(B)
    mixed = found_by(SCHEDULED, place=place)
    for got, want in zip(jax.tree.leaves(mixed), jax.tree.leaves(found)):
        np.testing.assert_array_equal(np.asarray(got)[np.argsort(place)], want)


def states(attack, n):
    x, keys = THREAT.pack(X), core.example_keys(KEY, attack.name, jnp.arange(B))
    model = behind(THREAT, MODEL)
    state, walk = jax.jit(attack.init)(keys, model, x, jnp.asarray(Y)), []
    step = jax.jit(lambda s: attack.step(s, model, x, jnp.asarray(Y)))
    for _ in range(n):
        walk.append(state)
        state = step(state)
    return [*walk, state]


def test_the_schedule_climbs_the_soft_order_by_hand():
    walk = states(SCHEDULED, 4)
    orders = np.stack([s.point[:, :3] for s in walk])
    assert (orders[0] == orders[1]).all() and (orders[2] == orders[3]).all()  # chosen anew after two steps
    assert (orders[1] != orders[2]).any(-1).mean() > 0.5
    before, after = walk[1], walk[2]
    point = jnp.concatenate([before.point[:, :3], after.point[:, 3:]], -1)  # what the step moved, in the old order
    rise = jax.grad(lambda mix: jnp.sum(losses.cross_entropy(MODEL(images(point, mix)), jnp.asarray(Y))))
    grad = rise(before.memory[1])
    risen = np.asarray(before.memory[1] + grad, np.float64)
    risen = np.exp(risen - risen.max((1, 2), keepdims=True))
    for _ in range(20):
        risen /= risen.sum(1, keepdims=True)
        risen /= risen.sum(2, keepdims=True)
    same = (np.asarray(greedy(jnp.asarray(risen, jnp.float32))) == np.asarray(before.point[:, :3])).all(-1)
    np.testing.assert_allclose(np.asarray(after.memory[1])[~same], risen[~same], atol=1e-4)
    np.testing.assert_allclose(after.memory[1].sum(1), 1, atol=1e-3)  # drawn anew where the order was the same
    assert 0 < same.sum() and (np.abs(np.asarray(after.memory[1])[same] - risen[same]).max((1, 2)) > 1e-3).all()


def test_orders_that_are_fixed_or_random_stay_as_they_were():
    for order in ("fixed", "random"):
        walk = states(composite(THREAT, order=order, outer=3, inner=1, early=False), 3)
        orders = np.stack([s.point[:, :3] for s in walk])
        assert (orders == orders[:1]).all()
        assert (orders == np.arange(3)).all() == (order == "fixed")
        assert len(np.unique(orders[0], axis=0)) == 1 if order == "fixed" else len(np.unique(orders[0], axis=0)) > 2


@pytest.mark.slow
def test_a_fixed_order_is_that_of_the_row():
    """The same components in another first order, and rows with an order each."""
    attack = composite(THREAT, order="fixed", outer=2, inner=2, early=False, start="zero")
    every = list(itertools.permutations(range(3)))
    order = np.array([every[i % 6] for i in range(B)])
    go = jax.jit(lambda x: attack.run(KEY, behind(THREAT, MODEL), x, jnp.asarray(Y)))
    each = go(THREAT.pack(X, order))
    np.testing.assert_array_equal(THREAT.values(each.x)[0], order)
    other = semantic([PARTS[i] for i in every[4]], SHAPE)
    turned = composite(other, order="fixed", outer=2, inner=2, early=False, start="zero")
    want = jax.jit(lambda x: turned.run(KEY, behind(other, MODEL), x, jnp.asarray(Y)))(other.pack(X))
    np.testing.assert_allclose(THREAT.images(each.x)[4], other.images(want.x)[4], atol=1e-5)
    got = go(THREAT.pack(X, every[4]))
    np.testing.assert_allclose(got.score, want.score, atol=1e-4)
    assert np.abs(got.score - go(THREAT.pack(X)).score).max() > 1e-3  # order matters here


def test_rows_that_are_broken_stop_and_stay():
    found = found_by(composite(THREAT, outer=3, inner=2))
    whole = found_by(SCHEDULED)
    assert (np.asarray(found.success) == np.asarray(whole.success)).all()
    broken = np.asarray(found.success)
    assert (
        broken.any() and (np.asarray(found.grads)[broken] < 8).any() and (np.asarray(found.grads)[~broken] == 8).all()
    )


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="semantic threat, no norm ball; got linf"):
        composite(linf(0.1))  # pyright: ignore
    for setting in ("outer", "inner"):
        with pytest.raises(ValueError, match=setting):
            composite(THREAT, **{setting: 0})
    with pytest.raises(ValueError, match="order"):
        composite(THREAT, order="sorted")
    for wrong, words in (((0, 0, 2), "once"), ((0, 1), r"shape \[3\]"), (1, "once")):
        with pytest.raises(ValueError, match=f"order must .*{words}"):
            THREAT.pack(X, wrong)
    with pytest.raises(TypeError, match="packed rows"):
        SCHEDULED.run(KEY, MODEL, THREAT.pack(X), Y)
