"""What the compiled programs say: which collectives a step holds, and what a device has to keep and to compute."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, models, parallel, privacy, threats, train
from jaxadv.core import Data
from jaxadv.evaluate import slots
from jaxadv.train import trainer

SGD = optax.sgd(0.1, momentum=0.9)
EACH = 4
"""Rows of a device."""

MANY = [("jit", 8), ("shard_map", 8), ("explicit", 4), ("pmap", 4)]


def rows(n):
    rng = np.random.default_rng(0)
    return {
        "x": rng.uniform(0, 1, (n, 4, 4, 1)).astype(np.float32),
        "y": rng.integers(0, 3, n).astype(np.int32),
        "index": np.arange(n, dtype=np.int32),
        "mask": np.ones(n, bool),
    }


def collectives(text):
    """Kind and number of operands of every collective in the text of a compiled program."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    found = re.findall(rf" = (\S.*?) ({kinds})(?:-start)?\(", text)
    return sorted((kind, len(re.findall(r"\w+\[[\d,]*\]", shape))) for shape, kind in found)


def network(norm):
    return models.create("mlp", jax.random.key(0), shape=(4, 4, 1), classes=3, widths=(8,), norm=norm)


def lowered(step, state, how, n):
    return parallel.compile_step(step, how=how, mesh=parallel.make_mesh(n)).lower(state, rows(EACH * n))


@pytest.fixture(scope="module")
def programs():
    """Adversarial training of a network without batch statistics: the attack's loop, gradient, update."""
    net, attack = network("none"), attacks.pgd(threats.linf(0.1), steps=3, keep="last")
    step = train.make_step(net.apply, train.pgd_at(attack), SGD, ema=0.9)
    state = trainer.init(jax.random.key(0), net, SGD, ema=True)

    @functools.cache
    def compiled(how, n):
        return lowered(step, state, how, n).compile()

    return compiled


@pytest.mark.parametrize(("how", "n"), MANY)
def test_a_step_of_adversarial_training_holds_one_fused_all_reduce_and_nothing_else(programs, how, n):
    """Gradients, count, loss and metrics together: so none in the attack's loop, and no data or weights gathered."""
    leaves = len(jax.tree.leaves(network("none").params))
    text = programs(how, n).as_text()
    assert collectives(text) == [("all-reduce", leaves + len(("count", "loss", "adversarial")))]


def test_one_device_talks_to_nobody(programs):
    assert collectives(programs("jit", 1).as_text()) == []


@pytest.mark.parametrize(
    ("how", "counts"),
    [("jit", (1, 8)), ("shard_map", (1, 8)), pytest.param("jit", (1, 2, 4), marks=pytest.mark.slow)],
)
def test_memory_and_work_of_a_device_are_flat_from_one_device_to_eight(programs, how, counts):
    """With the rows of each device fixed. The state is on all devices whole, so it is in both numbers, too."""
    of = {n: programs(how, n) for n in counts}
    memory = {n: c.memory_analysis() for n, c in of.items()}
    held = {n: m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes for n, m in memory.items()}
    work = {n: (c.cost_analysis()["flops"], c.cost_analysis()["bytes accessed"]) for n, c in of.items()}
    for n in of:
        assert memory[n].argument_size_in_bytes == memory[1].argument_size_in_bytes
        assert held[n] <= 1.1 * held[1]  # the fused all-reduce has a buffer
        np.testing.assert_allclose(work[n][0], work[1][0], rtol=0.02)
        assert work[n][1] <= 1.1 * work[1][1]


def test_on_one_device_an_executor_adds_no_work(programs):
    plain, mapped = (programs(how, 1).cost_analysis() for how in ("jit", "shard_map"))
    for what, more in (("flops", 0.03), ("bytes accessed", 0.06)):  # the sums of one device are copied once
        assert mapped[what] / plain[what] - 1 < more


@pytest.mark.parametrize("how", ("jit", pytest.param("shard_map", marks=pytest.mark.slow)))
def test_batch_statistics_cost_their_own_small_all_reduces(how):
    """Mean and variance, forward and backward; none in the attack's loop, where running statistics are used."""
    net, attack = network("batch"), attacks.pgd(threats.linf(0.1), steps=3, keep="last")
    step = train.make_step(net.apply, train.pgd_at(attack), SGD)
    found = collectives(lowered(step, trainer.init(jax.random.key(0), net, SGD), how, 4).compile().as_text())
    assert {kind for kind, _ in found} == {"all-reduce"} and len(found) <= 1 + 4 + 1
    assert max(found)[1] == len(jax.tree.leaves(net.params)) + 3  # gradients and metrics are one, as without
    assert sorted(found)[-2][1] <= 2


OBJECTIVES = {
    "trades": (lambda threat: train.trades(threat, steps=1), {"all-reduce"}),
    "advlc": (lambda threat: train.advlc(attacks.pgd(threat, steps=1), top=0.5), {"all-reduce", "all-gather"}),
    "iat": (lambda threat: train.iat(attacks.pgd(threat, steps=1)), {"all-reduce", "all-gather"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_objectives_that_look_at_all_rows_by_definition_gather_them(name):
    """One all-reduce for the others; all of the table were read so once, see docs/scale/plan.md."""
    build, kinds = OBJECTIVES[name]
    net = network("none")
    step = train.make_step(net.apply, build(threats.l2(0.1)), SGD)
    found = collectives(lowered(step, trainer.init(jax.random.key(0), net, SGD), "jit", 4).compile().as_text())
    assert {kind for kind, _ in found} == kinds and (len(found) == 1) == (len(kinds) == 1)


def test_a_private_step_holds_one_all_reduce():
    net = network("none")

    def loss(params, example, key):
        logits, _ = net.apply(params, {}, example["x"][None])
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"][None])[0]

    clipped = privacy.clipped_grads(loss, clip_norm=1.0)

    def step(params, batch, *, axis_name=None):
        keys = jax.random.split(jax.random.key(0), EACH)
        total, _ = clipped(params, {"x": batch["x"], "y": batch["y"]}, batch["mask"], keys, axis_name=axis_name)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, parallel.psum(total, axis_name)), ()

    text = lowered(step, net.params, "shard_map", 4).compile().as_text()
    assert collectives(text) == [("all-reduce", len(jax.tree.leaves(net.params)))]


def test_serving_an_attack_needs_no_collective():
    mesh, net = parallel.make_mesh(4), network("none")
    begin, chunk = slots._programs(2, 2, mesh)
    attack, model = attacks.pgd(threats.linf(0.1), steps=5), models.model(net)
    x = rows(32)
    data = Data(x["x"], x["y"], x["index"])
    queue, count = np.tile(np.arange(8, dtype=np.int32), 4), np.full(4, 8, np.int32)
    given = (attack, jax.random.key(0), model, data, queue)
    board = jax.eval_shape(begin, *given, np.uint32(0))
    text = chunk.lower(board, *given, count, np.uint32(0), np.int32(4)).compile().as_text()
    assert "while" in text and collectives(text) == []


def test_the_reader_of_programs_sees_a_gather(key):
    """The oracle has teeth: an objective that looks at all rows (the largest losses of the batch) gathers them."""

    def step(state, batch, *, axis_name=None):
        return state, jax.lax.top_k(batch["x"].sum((1, 2, 3)), 3)[0].sum()

    kinds = {kind for kind, _ in collectives(lowered(step, jnp.zeros(2), "jit", 4).compile().as_text())}
    assert kinds & {"all-gather", "all-to-all", "collective-permute"}
