"""Laws over every objective, in one table: a new member is covered the day it is added."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, models, parallel, threats, train
from jaxadv.core import Trainable
from jaxadv.train import record, terms, trainer
from jaxadv.train.costs import PARTS

CLASSES, ROWS = 3, 8
OF_ATTACK = {
    "pgd_at": {},
    "iat": {},
    "ladder": {},
    "advlc": {"top": 0.5},
    "cost_sensitive": {"costs": 1 - np.eye(CLASSES)},
}
SHORT = {name: {"steps": 2} for name in ("trades", "mart", "a3t", "dial", "cifs")} | {"grad_align": {"weight": 0.2}}
NO_SEARCH = {"standard": {}, "jsigr": {"size": 2, "top": 0.5}}
MIXING = ("iat", "advlc")  # a row's loss depends on the other rows, of its shard where there are several
WRAPPED = {
    "masked": lambda threat: train.masked(train.fgsm_at(threat), 0.4),
    "plus": lambda threat: train.plus(train.trades(threat, steps=1), terms.jacobian(), 0.01),
}


def build(name, threat=None):
    """An objective of the table, short. In l2 unless it must not: steps along signs amplify rounding."""
    threat = threats.l2(0.5) if threat is None else threat
    if name in WRAPPED:
        return WRAPPED[name](threat)
    if name in NO_SEARCH:
        return train.OBJECTIVES[name](**NO_SEARCH[name])
    if name in OF_ATTACK:
        return train.OBJECTIVES[name](attacks.pgd(threat, steps=2, keep="last"), **OF_ATTACK[name])
    return train.OBJECTIVES[name](threat, **SHORT.get(name, {}))


ALL = [*train.OBJECTIVES, *WRAPPED]
KIN = (
    "fgsm_at",
    "fgsm_rs",
    "n_fgsm",
    "mart",
    "a3t",
    "advlc",
    "cost_sensitive",
    "masked",
    "dial",
    "cifs",
    "jsigr",
    "ladder",
)
"""Others stand for them in the default run of executors."""

table = pytest.mark.parametrize("name", ALL)


@functools.cache
def network(norm="none", name=""):
    """The network that an objective trains: most take any."""
    key, shape = jax.random.key(3), (4, 4, 1)
    net = models.create("mlp", key, shape=shape, classes=CLASSES, widths=(8,), norm=norm, activation="silu")
    if name == "dial":
        head = models.create("mlp", key, shape=(8,), classes=2, widths=(4,), norm=norm, activation="silu")
        return models.branched(net, head, at="layers.1:in")
    if name == "cifs":
        sizes = {"channels": (3, 4), "hidden": 6, "gated": True, "norm": norm, "activation": "silu"}
        return models.create("cnn_small", key, shape=shape, classes=CLASSES, **sizes)
    return net


def batch(n=ROWS, padded=0, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(n) < n - padded
    rows = {
        "x": rng.uniform(0, 1, (n, 4, 4, 1)).astype(np.float32),
        "y": rng.integers(0, CLASSES, n).astype(np.int32),
        "index": np.where(mask, np.arange(n) + 7, -1).astype(np.int32),
        "mask": mask,
        "step": np.full(n, 5, np.int32),
    }
    return jax.tree.map(jnp.asarray, rows)


@functools.cache
def compiled(name, norm):
    """Losses and metrics as the trainer sees them: bound to mask and shards."""
    objective, net = build(name), network(norm, name)

    def go(params, state, rows, key):
        losses, (state, metrics) = objective(trainer.bind(net.apply, rows["mask"], None), params, state, rows, key)
        return losses, metrics, state

    return go, jax.jit(go)


def answer(name, rows, norm="batch", *, seed=0, jit=True):
    net = network(norm, name)
    return jax.device_get(compiled(name, norm)[jit](net.params, net.state, rows, jax.random.key(seed)))


def same(one, two, atol=2e-4):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-3)


@table
def test_one_loss_and_one_number_of_each_metric_for_each_row(name):
    rows = batch()
    losses, metrics, state = answer(name, rows)
    assert losses.shape == (ROWS,) and np.isfinite(losses).all() and (losses > 0).all()
    assert metrics and all(m.shape == (ROWS,) and np.isfinite(m).all() for m in metrics.values())
    before = network("batch", name).state
    assert jax.tree.structure(state) == jax.tree.structure(before)
    assert all(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(before)))
    if name in ("standard", "pgd_at"):  # one operation after the other: dear, and alike
        same(answer(name, rows, jit=False), (losses, metrics, state))
    other = answer(name, rows, seed=1)[0]
    assert np.array_equal(other, losses) == (name in ("standard", "fgsm_at"))


@table
def test_the_order_of_rows_and_padding_change_nothing(name):
    rows = batch(padded=2)
    losses, metrics, state = answer(name, rows)
    order = np.random.default_rng(1).permutation(ROWS)
    turned = answer(name, {k: v[order] for k, v in rows.items()})
    back = jax.tree.map(lambda a: a[np.argsort(order)][:6], turned[:2])
    same(back, jax.tree.map(lambda a: a[:6], (losses, metrics)))
    same(turned[2], state)
    garbage = rows | {"x": jnp.where(rows["mask"][:, None, None, None], rows["x"], 0.77)}
    garbage["y"] = jnp.where(rows["mask"], rows["y"], (rows["y"] + 1) % CLASSES)
    other = answer(name, garbage)
    same(jax.tree.map(lambda a: a[:6], other[:2]), jax.tree.map(lambda a: a[:6], (losses, metrics)))
    same(other[2], state)


@table
def test_without_batch_statistics_a_row_does_not_see_the_others(name):
    rows = batch()
    whole, half = answer(name, rows, "none")[0], answer(name, {k: v[:4] for k, v in rows.items()}, "none")[0]
    if name in MIXING:
        assert not np.allclose(half, whole[:4], atol=1e-4)
    else:
        same(half, whole[:4])


def constant(params, state, x, *, bn="eval", key=None, mask=None, axis_name=None, taps=(), hints=None):
    logits = jnp.zeros((x.shape[0], CLASSES)) + params["bias"][None] + 0 * x.reshape(len(x), -1)[:, :1]
    return (logits, dict.fromkeys(taps, logits)) if taps else logits, state


@table
@pytest.mark.parametrize("size", [0.0, 200.0])
def test_losses_and_gradients_are_finite_at_constant_models(name, size):
    """No input gradient at all, and predictions without doubt, half of them wrong."""
    net = Trainable(constant, {"bias": size * jnp.arange(CLASSES, dtype=jnp.float32)}, {})
    got = jax.jit(train.grad_fn(build(name)), static_argnums=0)(
        net.apply, net.params, net.state, batch(), jax.random.key(0)
    )
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((got.total, got.sums)))


@table
def test_a_vanishing_budget_leaves_the_clean_examples(name):
    """Then the search returns the examples, and what compares two predictions sees no difference."""
    tiny = threats.linf(1e-12)
    net, rows = network("none", name), batch()
    objective = build(name, tiny)
    find, loss = train.objectives.halves(objective)
    found = jax.jit(functools.partial(find, net.apply))(net.params, net.state, rows, jax.random.key(0))
    if name not in NO_SEARCH:
        np.testing.assert_allclose(found["found"], rows["x"], atol=1e-6)
    if name in ("pgd_at", "fgsm_at", "fgsm_rs", "n_fgsm", "a3t", "trades", "advlc"):
        got = loss(net.apply, net.params, net.state, found, jax.random.key(0))[0]
        plain = train.standard()(net.apply, net.params, net.state, rows, jax.random.key(0))[0]
        np.testing.assert_allclose(got, plain, atol=1e-4)


@table
def test_a_gradient_costs_what_its_parts_cost(name):
    objective, net, rows = build(name), network("none", name), batch()
    found = train.cost(objective, net, rows)
    parts = {
        "masked": PARTS["fgsm_at"],
        "plus": PARTS["trades"]._replace(second_order=1),
        "jsigr": PARTS["jsigr"]._replace(forward=1 + 4),  # patches of 2 x 2 on 4 x 4
    }.get(name) or PARTS[name]
    steps = 1 if name == "plus" or "fgsm" in name or name in ("masked", "grad_align") else 2
    search = parts.forward + parts.searches * steps * found.input_gradient
    loss = parts.input_gradients * found.input_gradient
    loss += parts.weight_gradients * found.weight_gradient + parts.second_order * found.second_order
    assert found.input_gradient == pytest.approx(2) or name == "cifs"  # no gradient through which classes are likely
    if name in ("dial", "cifs"):  # and what their heads cost
        assert search + loss < found.step < 1.5 * (search + loss)
    elif name in ("plus", "jsigr"):  # a projection is linear, so the last layer's forward pass is not needed
        assert search + loss - 0.5 < found.step < search + loss
    else:
        assert found.step == pytest.approx(search + loss)
        moved = train.cost(objective, net, rows, gradient=functools.partial(train.awp, gamma=0.01)).step
        assert moved == pytest.approx(search + 2 * loss)


@table
def test_a_run_can_write_down_what_it_minimizes_and_know_it_again(name):
    first, again = (record.describe(build(name)) for _ in range(2))
    assert json.loads(json.dumps(first)) == again
    if name not in NO_SEARCH:
        assert record.differences(first, record.describe(build(name, threats.linf(0.03))))


EXECUTORS = [("shard_map", 4), ("jit", 4), ("pmap", 4), ("vmap", 4), ("explicit", 4)]
OTHERS = dict(zip((name for name in ALL if name not in KIN), itertools.cycle(EXECUTORS[1:])))
PAIRS = [(name, *how) for name in ALL for how in (EXECUTORS[0], OTHERS.get(name)) if how]
"""Every objective meets shard_map, and those that others stand for in turn one of the other executors."""


@functools.lru_cache(maxsize=2)
def stepped(name, how, devices):
    """Parameters, statistics and metrics after one step with batch norm and padding."""
    net, sgd = network("batch", name), optax.sgd(0.1)
    step = train.make_step(net.apply, build(name), sgd)
    settings = {"devices": devices} if how == "vmap" else {"mesh": parallel.make_mesh(devices)}
    state, metrics = parallel.compile_step(step, how=how, **settings)(
        trainer.init(jax.random.key(0), net, sgd), batch(padded=2)
    )
    return jax.device_get((state.params, state.state, metrics))


@pytest.mark.parametrize(
    ("name", "how", "devices"),
    [
        pytest.param(*pair, marks=[pytest.mark.slow] if pair[0] in KIN or pair[1] != "shard_map" else [])
        for pair in PAIRS
    ],
)
def test_every_executor_takes_the_same_step(name, how, devices):
    """What mixes rows finds other partners in a shard; it must run all the same."""
    want = stepped(name, "jit", 1) if name not in MIXING or how in ("jit", "explicit") else None
    got = stepped(name, how, devices)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(got))
    if want:
        same(got, want)
