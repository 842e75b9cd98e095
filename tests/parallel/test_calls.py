"""What a call of an executor does beside the program: nothing is placed twice, nothing strange is trusted."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxadv import parallel

DEVICES = 2
ROWS = {"x": np.arange(8.0, dtype=np.float32).reshape(4, 2) / 8, "mask": np.array([True, True, True, False])}


def step(state, batch, *, axis_name=None):
    """Momentum towards the mean of the rows, and a number of steps."""
    total = jnp.where(batch["mask"][:, None], batch["x"], 0).sum(0)
    mean = parallel.pmean_weighted(total, batch["mask"].sum(), axis_name)
    speed = 0.5 * state["speed"] + mean - state["at"]
    return {"at": state["at"] + 0.25 * speed, "speed": speed, "n": state["n"] + 1}, {"mean": mean}


def start():
    return {"at": np.ones(2, np.float32), "speed": np.zeros(2, np.float32), "n": np.int32(0)}


def by_hand(state, steps=1):
    at, speed, mean = state["at"], state["speed"], ROWS["x"][:3].mean(0)
    for _ in range(steps):
        speed = 0.5 * speed + mean - at
        at = at + 0.25 * speed
    return {"at": at, "speed": speed, "n": state["n"] + steps}


def executor(how, **options):
    where = {"devices": DEVICES} if how == "vmap" else {"mesh": parallel.make_mesh(DEVICES)}
    return parallel.compile_step(step, how=how, **where, **options)


def close(state, want):
    assert sorted(state) == sorted(want)
    for name in want:
        np.testing.assert_allclose(state[name], want[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", parallel.HOW)
def test_a_call_like_the_last_one_places_and_copies_nothing(how, monkeypatch):
    run = executor(how)
    state, _ = run(start(), ROWS)

    def refused(*args, **settings):
        raise AssertionError("placed again")

    with monkeypatch.context() as patch:
        for module, name in ((jax, "device_put"), (jnp, "copy"), (jax, "make_array_from_callback")):
            patch.setattr(module, name, refused)
        for rows in (ROWS, dict(reversed(ROWS.items()))):
            state, _ = run({name: state[name] for name in reversed(state)}, rows)
    close(state, by_hand(start(), 3))


@pytest.mark.parametrize("how", parallel.HOW)
def test_what_the_last_call_did_not_return_is_placed_or_copied(how):
    """A known call is recognized by its arrays alone: other arrays, twice the same one, another form, other places."""
    run, other = executor(how), executor(how)
    state, _ = run(start(), ROWS)
    want = by_hand(start())
    for change in (
        lambda s: s | {"at": s["speed"], "speed": s["at"]},  # ours, exchanged
        lambda s: s | {"at": s["speed"]},  # one of ours twice
        lambda s: s | {"speed": 2 * s["speed"], "n": 7},  # of somebody else
        lambda s: collections.OrderedDict(sorted(s.items())),  # another form
        lambda s: jax.device_put(s, jax.devices()[3]),  # another place
    ):
        want = by_hand(jax.device_get(change(want)))
        state, _ = run(change(state), ROWS)
        close(state, want)
    close(other(state, ROWS)[0], by_hand(want))
    assert not any(leaf.is_deleted() for leaf in state.values())  # another executor's to give away
    mesh, far = parallel.make_mesh(DEVICES), jax.devices()[3]
    rows = [parallel.replicate(ROWS, mesh), parallel.global_batch(ROWS, mesh), jax.device_put(ROWS, far)]
    for batch in rows[2:] if how == "vmap" else rows:  # which is on the device of its arguments, here the last one
        state, want = run(state, batch)[0], by_hand(want)
        close(state, want)


@pytest.mark.parametrize("how", ("jit", "explicit"))
def test_shares_stay_where_they_are(how):
    """The state goes in and comes out in shares, so an executor with typed shardings sees and returns sharded types."""
    run = executor(how, layout=parallel.fsdp(least=2), donate=False)
    placed = run.place(start())
    state, metrics = run(placed, ROWS)
    for tree in (placed, state):
        assert tree["at"].addressable_shards[0].data.shape == tree["speed"].addressable_shards[1].data.shape == (1,)
        assert tree["n"].sharding.is_fully_replicated and run.place(tree) is tree
    close(run(state, ROWS)[0], by_hand(start(), 2))
    assert metrics["mean"].sharding.is_fully_replicated
    typed = how == "explicit"
    assert jax.typeof(state["at"]).sharding.spec == PartitionSpec("data" if typed else None)
    assert state["at"].sharding.mesh.axis_types == ((AxisType.Explicit if typed else AxisType.Auto),)
