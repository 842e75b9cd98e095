"""The derived drivers against hand-written loops over the protocol."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from jaxadv import core, models
from jaxadv.attacks import best_of, pgd
from jaxadv.core import Result, advance, example_keys, pytree, run, select, serve, static
from jaxadv.threats import linf

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.uniform(size=(6, 5)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, 6), jnp.int32)
MODEL = Partial(lambda w, x: jnp.tanh(x @ w) * 3, jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32))
KEY = jax.random.key(0)


@pytree
class Walk(core.Attack):
    """A random walk that remembers its lowest margin, and is done below a level: no gradient, any number of steps."""

    threat: core.Threat
    level: float
    name: str = static(default="walk")
    max_steps: int = static(default=7)
    early: bool = static(default=True)

    def init(self, keys, model, x, y):
        far = jnp.full(x.shape[:1], jnp.inf)
        return {"keys": keys, "step": jnp.zeros(x.shape[0], jnp.int32), "best": x, "score": far}

    def step(self, state, model, x, y):
        keys = core.step_keys(state["keys"], state["step"])
        point = x + 0.2 * jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)
        score = model(point)[jnp.arange(x.shape[0]), y]
        best, low = select(score < state["score"], (point, score), (state["best"], state["score"]))
        return state | {"best": best, "score": low, "step": state["step"] + 1}

    def done(self, state):
        return (state["step"] >= self.max_steps) | (state["score"] < self.level)

    def result(self, state, model, x, y):
        none = jnp.zeros(x.shape[0], bool)
        return Result(
            x=state["best"], score=state["score"], success=~core.robust(model(state["best"]), y),
            size=jnp.abs(state["best"] - x).max(-1), queries=state["step"], grads=0 * state["step"],
            flags={"nonfinite": none},
        )  # fmt: skip


def by_hand(attack, index, restart=0):
    """Row by row, step by step, each in a batch of its own."""
    rows = []
    for i in range(6):
        x, y = X[i : i + 1], Y[i : i + 1]
        state = attack.init(example_keys(KEY, attack.name, index[i : i + 1], restart), MODEL, x, y)
        while not bool(attack.done(state)[0]):
            state = attack.step(state, MODEL, x, y)
        rows.append(attack.result(state, MODEL, x, y))
    return jax.tree.map(lambda *v: np.concatenate(v), *rows)


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.slow
def test_run_and_serve_are_the_loop_by_hand():
    attack, index = Walk(threat=linf(1.0), level=-0.5), jnp.asarray([4, 9, 2, 7, 0, 1])
    want = by_hand(attack, index)
    assert len(set(want.queries.tolist())) > 1
    close(run(attack, KEY, MODEL, X, Y, index=index), want)
    close(attack.run(KEY, MODEL, X, Y, index=index), want)
    for slots in (1, 4, 9):
        close(serve(attack, KEY, MODEL, X, Y, slots=slots, index=index), want)
    close(run(attack, KEY, MODEL, X, Y, restart=3), by_hand(attack, jnp.arange(6), 3))


def test_advance_leaves_rows_that_are_done():
    attack = Walk(threat=linf(1.0), level=-0.5)
    state = attack.init(example_keys(KEY, "walk", jnp.arange(6)), MODEL, X, Y)
    state = state | {"score": jnp.asarray([-1.0, 5, -1, 5, 5, -1]), "step": jnp.asarray([2, 7, 0, 1, 2, 3])}
    after = advance(attack, state, MODEL, X, Y)
    np.testing.assert_array_equal(after["step"], [2, 7, 0, 2, 3, 3])
    np.testing.assert_array_equal(after["best"][:3], state["best"][:3])


def test_best_of_is_a_loop_over_restarts():
    attack = pgd(linf(0.1), steps=2)
    got = best_of(attack, KEY, MODEL, X, Y, restarts=4)
    best = None
    runs = [jax.device_get(run(attack, KEY, MODEL, X, Y, restart=r)) for r in range(4)]
    best = [min(range(4), key=lambda r, i=i: (not runs[r].success[i], runs[r].score[i])) for i in range(6)]
    np.testing.assert_allclose(got.score, [runs[r].score[i] for i, r in enumerate(best)], atol=1e-5)
    np.testing.assert_array_equal(got.success, [runs[r].success[i] for i, r in enumerate(best)])
    np.testing.assert_array_equal(got.queries, sum(r.queries for r in runs))
    np.testing.assert_array_equal(got.grads, sum(r.grads for r in runs))
    assert len(set(best)) > 1
    one = best_of(attack, KEY, MODEL, X, Y, restarts=1)
    close(one, runs[0])


def test_a_plain_function_is_a_model():
    def plain(x):
        return MODEL(x)

    attack = Walk(threat=linf(1.0), level=-0.5, max_steps=2)
    want = jax.jit(run)(attack, KEY, MODEL, X, Y)
    close(jax.jit(lambda w, x: attack.run(KEY, lambda v: MODEL.func(w, v), x, Y))(MODEL.args[0], X), want)
    close(serve(attack, KEY, plain, X, Y, slots=2), want)


@pytest.mark.parametrize("known", [True, False])
def test_rows_may_be_shared_over_devices_by_their_type(known):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    split, index = NamedSharding(mesh, P("data")), np.asarray([4, 9, 2, 7, 0, 1], np.int32)
    attack = Walk(threat=linf(1.0), level=-0.5)
    x, y, i = (jax.device_put(a, split) for a in (X, Y, index))
    with jax.set_mesh(mesh) if known else contextlib.nullcontext():
        got = jax.jit(lambda model, x, y, i: attack.run(KEY, model, x, y, index=i))(MODEL, x, y, i)
    assert all(leaf.sharding.spec[0] == "data" for leaf in jax.tree.leaves(got))
    close(jax.device_get(got), run(attack, KEY, MODEL, X, Y, index=index))


def test_select_chooses_rows_of_any_rank():
    yes, no = {"a": jnp.ones((3, 2, 2)), "b": jnp.ones(3)}, {"a": jnp.zeros((3, 2, 2)), "b": jnp.zeros(3)}
    got = select(jnp.asarray([True, False, True]), yes, no)
    np.testing.assert_array_equal(got["a"][:, 1, 0], [1, 0, 1])
    np.testing.assert_array_equal(got["b"], [1, 0, 1])


def test_refusals():
    attack = pgd(linf(0.1), steps=1)
    for call in (lambda x, y: run(attack, KEY, MODEL, x, y), lambda x, y: serve(attack, KEY, MODEL, x, y, slots=2)):
        with pytest.raises(ValueError, match=r"x must hold at least one example; got float32\[0, 5\]"):
            call(X[:0], Y[:0])
        with pytest.raises(ValueError, match=r"x must lie within bounds \[0, 1\]"):
            call(X * 3, Y)
        with pytest.raises(TypeError, match=r"x must be floating point.*/ 255"):
            call(X.astype(jnp.uint8), Y)
        with pytest.raises(TypeError, match=r"y must be integer labels .*got float32\[\d\]"):
            call(X, Y.astype(jnp.float32))
        with pytest.raises(ValueError, match=r"One-hot labels"):
            call(X, jax.nn.one_hot(Y, 3))
    with pytest.raises(ValueError, match=r"y must lie in \[0, 3\)"):
        run(attack, KEY, MODEL, X, Y + 1)
    with pytest.raises(ValueError, match=r"index must .*6 examples; got \(2,\)\. Slice"):
        run(attack, KEY, MODEL, X, Y, index=jnp.arange(2))
    with pytest.raises(ValueError, match=r"slots must be a whole number"):
        serve(attack, KEY, MODEL, X, Y, slots=0)
    with pytest.raises(ValueError, match=r"restarts must be a whole number"):
        best_of(attack, KEY, MODEL, X, Y, restarts=0)
    with pytest.raises(ValueError, match=r"the model's output must be logits"):
        run(attack, KEY, Partial(lambda x: x[:, 0]), X, Y)
    net = models.create("mlp", KEY, shape=(5,), classes=3, widths=(4,))
    for model, cure in ((net, r"Trainable\. Make one of it with models\.model"), (X, r"another order\?")):
        with pytest.raises(TypeError, match=rf"model must be a function of a batch.*got .*{cure}"):
            attack.run(KEY, model, X, Y)


def test_a_board_serves_chosen_rows_chunk_by_chunk():
    attack = Walk(threat=linf(1.0), level=-0.5)
    want = run(attack, KEY, MODEL, X, Y)
    data = core.Data(X, Y, jnp.arange(6, dtype=jnp.int32))
    queue, count = jnp.asarray([5, 1, 3, 0, 0, 0], jnp.int32), jnp.asarray([3], jnp.int32)
    assert core.block_of(2) == 1 and core.block_of(64) == 8
    start = jax.jit(lambda: core.begin(attack, KEY, MODEL, data, queue, 0, slots=2))
    go = jax.jit(lambda b: core.advance_board(b, attack, KEY, MODEL, data, queue, count, 0, jnp.int32(2), room=2))
    board, found, steps = start(), {}, []
    assert isinstance(board, core.Board) and (np.asarray(board.held) == -1).all()
    while len(found) < 3:
        board, out = go(board)
        assert isinstance(out, core.Out) and int(out.filled[0]) <= 2
        for i in range(int(out.filled[0])):
            row = int(out.row[i])
            found[row] = jax.tree.map(lambda a, i=i: a[i], out.result)
            assert int(out.taken[i]) == int(out.result.queries[i])
        steps.append(int(board.steps[0]))
    assert sorted(found) == [1, 3, 5] and max(np.diff([0, *steps])) <= 2
    for row, result in found.items():
        close(result, jax.tree.map(lambda a, row=row: a[row], want))
    assert (np.asarray(board.held) == -1).all() and int(board.pointer[0]) == 3


def test_rows_that_are_not_chosen_cost_nothing():
    attack = Walk(threat=linf(1.0), level=-0.5)
    chosen = jnp.asarray([True, False, True, False, False, True])
    found, want = serve(attack, KEY, MODEL, X, Y, slots=2, rows=chosen), run(attack, KEY, MODEL, X, Y)
    close(jax.tree.map(lambda a: a[chosen], found), jax.tree.map(lambda a: a[chosen], want))
    assert not np.asarray(found.queries)[~np.asarray(chosen)].any() and not found.x[1].any()
    none = serve(attack, KEY, MODEL, X, Y, slots=2, rows=jnp.zeros(6, bool))
    assert not none.queries.any()
