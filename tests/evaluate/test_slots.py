"""Slots and queue: the answers of `run`, whatever else is served, and little work beside the necessary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxadv import core, evaluate
from jaxadv.attacks import pgd
from jaxadv.evaluate import slots as room
from jaxadv.evaluate.slots import Server, drain
from jaxadv.threats import linf

KEY = jax.random.key(0)


@core.pytree
class Countdown(core.Attack):
    """Breaks each row after the number of steps that stands in its first feature; 99 never breaks."""

    threat: core.Threat
    name: str = core.static(default="countdown")
    max_steps: int = core.static(default=40)
    early: bool = core.static(default=True)
    random: bool = core.static(default=True)  # generators take long to compile

    def init(self, keys, model, x, y):
        draw = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:]))(keys) if self.random else jnp.tanh(x)
        return {"draw": draw, "keys": keys, "life": x[:, 0], "step": jnp.zeros(x.shape[0], jnp.int32)}

    def step(self, state, model, x, y):
        keys = core.step_keys(state["keys"], state["step"])
        move = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys) if self.random else x
        draw = jnp.tanh(state["draw"] @ model.args[0] + move)
        return state | {"draw": draw, "step": state["step"] + 1}

    def done(self, state):
        return (state["step"] >= self.max_steps) | (state["step"] >= state["life"])

    def result(self, state, model, x, y):
        broken = state["step"] >= state["life"]
        none = jnp.zeros(x.shape[0], bool)
        return core.Result(
            x=state["draw"], score=model(x)[:, 0], success=broken, size=state["life"], queries=state["step"],
            grads=0 * state["step"], flags={"nonfinite": none},
        )  # fmt: skip


WILD = linf(1.0, bounds=(-100.0, 100.0))
ATTACK = Countdown(threat=WILD)
PLAIN = Countdown(threat=WILD, random=False)
MODEL = Partial(lambda w, x: jnp.tanh(x @ w), jnp.asarray(np.random.default_rng(2).normal(size=(5, 5)), jnp.float32))


def problem(n, seed=0):
    """Half of the rows never break, the others within six steps."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 5)).astype(np.float32)
    x[:, 0] = np.where(rng.random(n) < 0.5, 99, rng.integers(0, 7, n))
    return x, rng.integers(0, 5, n).astype(np.int32)


def gather(served, n):
    """Put what was served in order; each row must come once."""
    rows, parts = zip(*served)
    rows = np.concatenate(rows)
    assert sorted(rows.tolist()) == list(range(n))
    return jax.tree.map(lambda *v: np.concatenate(v)[np.argsort(rows)], *parts)


def same_bits(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_every_row_gets_the_answer_of_run():
    x, y = problem(50)
    want = ATTACK.run(KEY, MODEL, x, y, restart=2)
    server = Server(MODEL, x, y, slots=16)
    found = gather(server.drain(ATTACK, KEY, restart=2), 50)
    np.testing.assert_array_equal(found.queries, want.queries)
    np.testing.assert_array_equal(found.success, want.success)
    np.testing.assert_allclose(found.x, want.x, atol=1e-5)
    assert server.work["needed"] == found.queries.sum() and server.slots == 16
    assert evaluate.Server is Server and evaluate.drain is drain


def ideal_steps(lengths, slots):
    """Steps of a board whose slots are refilled at once, at no cost."""
    free = np.zeros(slots)
    for length in lengths:
        free[free.argmin()] += length
    return int(free.max())


@pytest.mark.parametrize(("times", "least"), [(8, 0.85), (16, 0.9), (64, 0.95)])
def test_most_of_the_work_is_necessary(times, least):
    x, y = problem(16 * times)
    server = Server(MODEL, x, y, slots=16, block=1024)
    gather(server.drain(PLAIN, KEY), len(x))
    lengths = np.minimum(x[:, 0], 40)
    assert server.work["needed"] == lengths.sum() and server.work["done"] == 16 * server.work["steps"]
    assert lengths.sum() / server.work["done"] >= least, server.work  # at 8 a whole row may stand alone in the end
    assert ideal_steps(lengths, 16) / server.work["steps"] >= 0.9
    without = sum(16 * lengths[i : i + 16].max() for i in range(0, len(x), 16))
    assert server.work["done"] < 0.75 * without
    assert server.work["exchanges"] * core.block_of(16) < 4 * len(x)  # few blocks are exchanged nearly empty


def test_at_one_number_of_slots_the_bits_depend_on_the_row_alone(monkeypatch):
    x, y = problem(60)
    want = gather(drain(ATTACK, KEY, MODEL, x, y, slots=16), 60)
    order = np.random.default_rng(4).permutation(60)
    mixed = gather(drain(ATTACK, KEY, MODEL, x[order], y[order], slots=16, index=order), 60)
    same_bits(jax.tree.map(lambda a: a[np.argsort(order)], mixed), want)
    rows = np.arange(60)[::-1]  # another order of the queue, and later only a part of it
    same_bits(gather(drain(ATTACK, KEY, MODEL, x, y, rows, slots=16), 60), want)
    part, found = zip(*drain(ATTACK, KEY, MODEL, x, y, rows[:23], slots=16))
    part = np.concatenate(part)
    assert sorted(part) == sorted(rows[:23])
    same_bits(jax.tree.map(lambda *v: np.concatenate(v), *found), jax.tree.map(lambda a: a[part], want))
    monkeypatch.setattr(room, "SECONDS", 0.0)  # chunks of a few steps, then of one
    server = Server(MODEL, x, y, slots=16)
    same_bits(gather(server.drain(ATTACK, KEY), 60), want)
    assert server.work["dispatches"] > 20


def test_blocks_of_a_large_set_are_streamed():
    x, y = problem(60)
    want = gather(drain(PLAIN, KEY, MODEL, x, y, slots=16), 60)
    server = Server(MODEL, x, y, slots=16, block=16)
    same_bits(gather(server.drain(PLAIN, KEY), 60), want)
    assert server.placed[0] == 3 and server.placed[1].x.shape == (16, 5)


@pytest.mark.parametrize("block", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_several_devices_answer_like_one(block):
    x, y = problem(75)
    attack = ATTACK if block is None else PLAIN
    want = gather(drain(attack, KEY, MODEL, x, y, slots=3), 75)
    mesh = jax.make_mesh((8,), ("data",))
    server = Server(MODEL, x, y, slots=3, mesh=mesh, block=block)
    found = gather(server.drain(attack, KEY), 75)
    same_bits(found, want)
    assert server.devices == 8 and len(server.placed[1].x.sharding.device_set) == 8
    served = [rows for rows, _ in Server(MODEL, x, y, slots=3, mesh=mesh, block=block).drain(attack, KEY, range(5, 30))]
    assert sorted(np.concatenate(served)) == list(range(5, 30))


def test_processes_share_the_rows_and_answer_like_one(monkeypatch):
    """Two stand-ins for processes, two devices each; tests/parallel has real ones."""
    x, y = problem(21)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ("data",))
    want = gather(Server(MODEL, x, y, slots=3, mesh=mesh).drain(PLAIN, KEY), 21)
    served = []
    for number in (0, 1):
        half = jax.sharding.Mesh(mesh.devices[2 * number : 2 * number + 2], ("data",))
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: 2)
            patch.setattr(jax, "process_index", lambda number=number: number)
            patch.setattr(room.parallel, "local", lambda mesh, half=half: half)
            server = Server(MODEL, x, y, slots=3, mesh=mesh)
        assert (server.rows // 2 % 2 == number).all()
        assert server.own(np.asarray([20, 2, 1])).tolist() == ([20, 1], [2])[number]
        served += list(server.drain(PLAIN, KEY, range(21)))
    same_bits(gather(served, 21), want)


def test_other_numbers_of_slots_change_rounding_only():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(40, 5)).astype(np.float32), rng.integers(0, 5, 40)
    attack = pgd(linf(0.1), steps=5, early=True)
    answers = [gather(drain(attack, KEY, MODEL, x, y, slots=s), 40) for s in (3, 40)]
    np.testing.assert_array_equal(answers[0].success, answers[1].success)
    np.testing.assert_allclose(answers[0].score, answers[1].score, atol=1e-4)


def test_running_out_of_memory_halves_the_slots_and_loses_nothing(monkeypatch):
    x, y = problem(60)
    real, asked = room._programs, []

    def scarce(slots, space, mesh):
        start, chunk = real(slots, space, mesh)
        calls = []

        def small(*args):
            asked.append(slots)
            calls.append(1)
            if slots > 5 and len(calls) > 1:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
            return chunk(*args)

        return start, small

    monkeypatch.setattr(room, "_programs", scarce)
    monkeypatch.setattr(room, "SECONDS", 0.0)
    server = Server(MODEL, x, y, slots=16)
    found = gather(server.drain(PLAIN, KEY), 60)
    np.testing.assert_array_equal(found.queries, np.minimum(x[:, 0], 40))
    assert server.slots == 4 and list(dict.fromkeys(asked)) == [16, 8, 4]
    assert room.exhausted(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x")) and not room.exhausted(ValueError("x"))

    def broken(slots, space, mesh):
        def fail(*args):
            raise RuntimeError("INTERNAL: something else")

        return fail, fail

    monkeypatch.setattr(room, "_programs", broken)
    with pytest.raises(RuntimeError, match="something else"):
        list(drain(PLAIN, KEY, MODEL, x, y, slots=4))


def test_one_program_serves_queues_restarts_weights_and_budgets():
    traces = []

    def counted(w, x):
        traces.append(x.shape)
        return jnp.tanh(x @ w)

    x, y = problem(40)
    x = np.clip(x, 0, 1)
    for scale, eps, rows in ((1.0, 0.1, np.arange(40)), (2.0, 0.3, np.arange(7)), (3.0, 0.2, np.arange(20, 33))):
        model = Partial(counted, scale * MODEL.args[0])
        server = Server(model, x, y, slots=8)
        first = len(traces)
        gathered = [r for r, _ in server.drain(pgd(linf(eps), steps=3), KEY, rows, restart=int(scale))]
        assert sorted(np.concatenate(gathered)) == rows.tolist()
    assert len(traces) == first and first > 0


def test_the_number_of_slots_follows_memory():
    class Device:
        platform = "gpu"

        def __init__(self, limit):
            self.limit = limit

        def memory_stats(self):
            return {"bytes_limit": self.limit}

    x, y = problem(3000)
    need = room.footprint(MODEL, x)
    assert 5 * 4 * 3 <= need < 5 * 4 * 40  # a handful of vectors of five floats
    wide = room.footprint(Partial(lambda w, x: jnp.tanh(x @ w), jnp.ones((5, 500))), x)
    assert wide > 50 * need
    counts = [room.slots_for(MODEL, x, Device(limit)) for limit in (2 * need, 400 * need, 10**12)]
    assert counts == [1, 128, room.MOST_SLOTS]
    assert room.slots_for(MODEL, x) == room.CPU_SLOTS and room.slots_for(MODEL, x[:9]) == 9
    assert Server(MODEL, x[:9], y[:9], slots=50).slots == 9
    assert room.SECONDS > 0 and room.BLOCK_BYTES > 2**20


def test_refusals():
    x, y = problem(6)
    with pytest.raises(ValueError, match="slots must be a whole number of at least 1"):
        Server(MODEL, x, y, slots=0)
    with pytest.raises(ValueError, match="block must be a whole number"):
        Server(MODEL, x, y, block=0)
    with pytest.raises(ValueError, match="one axis"):
        Server(MODEL, x, y, mesh=jax.make_mesh((4, 2), ("a", "b")))
