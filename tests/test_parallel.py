"""The law of executors: the same iterates whatever runs the step, on any number of devices; and the doors around it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxadv import parallel

COUNTS = (1, 2, 4, 8)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
STEPS = 10


def problem(seed=0):
    """Sixteen rows of which the last three do not count, so that shards are unequal for every number of devices."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(16, 6, 6, 1)).astype(np.float32),
        "y": rng.integers(0, 3, 16).astype(np.int32),
        "mask": np.arange(16) < 13,
        "index": np.where(np.arange(16) < 13, np.arange(16) + 100, -1).astype(np.int32),
    }


def mlp(params, x):
    return jnp.tanh(x.reshape(x.shape[0], -1) @ params["inner"]) @ params["outer"]


def conv(params, x):
    out = jax.lax.conv_general_dilated(x, params["inner"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.relu(out).reshape(x.shape[0], -1) @ params["outer"]


NETS = {"mlp": (mlp, (36, 7), (7, 3)), "conv": (conv, (3, 3, 1, 4), (36, 3))}


def start(net):
    rng = np.random.default_rng(1)
    inner, outer = (rng.normal(size=shape).astype(np.float32) * 0.3 for shape in NETS[net][1:])
    params = {"inner": jnp.asarray(inner), "outer": jnp.asarray(outer)}
    return params, OPTIMIZER.init(params)


def make_step(net):
    apply = NETS[net][0]

    def step(state, batch, *, axis_name=None):
        params, opt = state
        mask = batch["mask"]

        def total(p):
            losses = optax.softmax_cross_entropy_with_integer_labels(apply(p, batch["x"]), batch["y"])
            return jnp.where(mask, losses, 0).sum()

        loss, grads = jax.value_and_grad(total)(parallel.varying(params, axis_name))
        count = mask.sum()
        grads = parallel.pmean_weighted(grads, count, axis_name)
        updates, opt = OPTIMIZER.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), parallel.psum({"loss": loss, "count": count}, axis_name)

    return step


def executor(step, how, n, **options):
    if how == "vmap":
        return parallel.compile_step(step, how=how, devices=n, **options)
    return parallel.compile_step(step, how=how, mesh=parallel.make_mesh(n), **options)


def iterates(step, how, n, state, batch):
    run, seen = executor(step, how, n), []
    for _ in range(STEPS):
        state, metrics = run(state, batch)
        seen.append(jax.device_get((state, metrics)))
    return seen


@pytest.fixture(scope="module")
def by_hand():
    """The iterates by a plain loop over the rows that count: no mask, no sum, no executor."""

    def go(net):
        batch, (params, opt), seen = problem(), start(net), []

        def mean(p):
            logits = NETS[net][0](p, batch["x"][:13])
            return -jax.nn.log_softmax(logits)[np.arange(13), batch["y"][:13]].mean()

        for _ in range(STEPS):
            loss, grads = jax.value_and_grad(mean)(params)
            updates, opt = OPTIMIZER.update(grads, opt, params)
            params = optax.apply_updates(params, updates)
            seen.append(jax.device_get(((params, opt), {"loss": loss * 13, "count": 13})))
        return seen

    return {net: go(net) for net in NETS}


# ------------------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("how", parallel.HOW)
def test_every_executor_makes_the_same_iterates_on_any_number_of_devices(how, n, net, by_hand):
    for got, want in zip(iterates(make_step(net), how, n, start(net), problem()), by_hand[net], strict=True):
        chex.assert_trees_all_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", parallel.HOW)
def test_without_a_mesh_a_step_runs_on_one_device(how, by_hand):
    run = parallel.compile_step(make_step("mlp"), how=how)
    state, _ = run(start("mlp"), problem())
    chex.assert_trees_all_close(jax.device_get(state), by_hand["mlp"][0][0], atol=1e-5, rtol=0)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("how", parallel.HOW)
def test_the_state_comes_out_replicated_and_without_a_device_axis(how):
    state = start("conv")
    new, metrics = executor(make_step("conv"), how, 4)(state, problem())
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    for leaf in jax.tree.leaves((new, metrics)):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == (1 if how == "vmap" else 4)
    assert metrics["count"] == 13 and metrics["loss"].shape == ()


@pytest.mark.parametrize("how", parallel.HOW)
def test_a_step_is_traced_once(how):
    chex.clear_trace_counter()  # chex counts by name and line, not by function
    run = executor(chex.assert_max_traces(make_step("mlp"), n=1), how, 4)
    state = start("mlp")
    for seed in range(4):
        state, _ = run(state, problem(seed))


@pytest.mark.parametrize("n", (2, 8))
def test_without_varying_the_gradient_under_shard_map_is_n_times_too_large(n, monkeypatch):
    # The oracle has teeth: remove the cure and the law must break, by exactly the factor that the theory names.
    step, batch = make_step("mlp"), problem()
    want = iterates(step, "shard_map", n, start("mlp"), batch)[0][0][0]
    monkeypatch.setattr(parallel, "varying", lambda tree, axis_name=None: tree)
    got = iterates(make_step("mlp"), "shard_map", n, start("mlp"), batch)[0][0][0]
    first = jax.device_get(start("mlp")[0])
    chex.assert_trees_all_close(
        jax.tree.map(np.subtract, got, first),
        jax.tree.map(lambda new, old: n * (new - old), want, first),
        rtol=1e-3,
        atol=1e-5,
    )
    for how in ("jit", "vmap", "pmap"):  # these never saw the trap, so a test on them alone proves nothing
        same = iterates(make_step("mlp"), how, n, start("mlp"), batch)[0][0][0]
        chex.assert_trees_all_close(same, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ("shard_map", "jit", "vmap", "explicit"))
def test_rows_may_be_shared_over_two_mesh_axes(how, by_hand):
    mesh = parallel.make_mesh(axes={"host": 2, "chip": 4})
    seen = []

    def step(state, batch, *, axis_name=None):
        seen.append(axis_name)
        return make_step("mlp")(state, batch, axis_name=axis_name)

    state, _ = parallel.compile_step(step, how=how, mesh=mesh, data_axes=("host", "chip"))(start("mlp"), problem())
    chex.assert_trees_all_close(jax.device_get(state), by_hand["mlp"][0][0], atol=1e-5, rtol=0)
    assert seen[0] == {"shard_map": ("host", "chip"), "vmap": "host"}.get(how)


def test_mesh_axes_that_share_no_rows_hold_copies(by_hand):
    mesh = parallel.make_mesh(axes={"data": 4, "model": 2})
    for how in parallel.HOW:
        state, _ = parallel.compile_step(make_step("mlp"), how=how, mesh=mesh)(start("mlp"), problem())
        chex.assert_trees_all_close(jax.device_get(state), by_hand["mlp"][0][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ("shard_map", "vmap"))
def test_metrics_that_differ_between_shards_are_refused(how):
    def step(state, batch, *, axis_name=None):
        return state, batch["x"].sum()

    with pytest.raises(ValueError, match="out_specs|out_axes"):
        executor(step, how, 4)(jnp.zeros(2), problem())


def test_the_executors_say_what_they_are():
    seen = {}

    def step(state, batch, *, axis_name=None):
        seen["axis"], seen["mesh"] = axis_name, jax.sharding.get_abstract_mesh()
        seen["rows"] = batch["x"].shape[0]
        return state, ()

    for how, rows, checked in (("jit", 16, None), ("explicit", 16, None), ("shard_map", 4, True), ("vmap", 4, False)):
        executor(step, how, 4)(jnp.zeros(2), problem())
        assert seen["rows"] == rows and getattr(seen["axis"], "checked", None) is checked
        assert seen["axis"] == (None if checked is None else "data")
        if how == "explicit":
            assert seen["mesh"].axis_types == (AxisType.Auto,)
    executor(step, "pmap", 4)(jnp.zeros(2), problem())
    assert isinstance(seen["axis"], parallel.Axis) and seen["rows"] == 4 and not seen["axis"].checked


def test_large_leaves_may_lie_in_shares_on_the_devices(by_hand):
    """Iterates as with the whole state on every device; parameters and momenta are kept in eighths."""
    run = parallel.compile_step(make_step("mlp"), mesh=parallel.make_mesh(4), layout=parallel.fsdp(least=200))
    state, batch = run.place(start("mlp")), problem()
    for want, _ in by_hand["mlp"]:
        assert state[0]["inner"].addressable_shards[0].data.shape == (9, 7)  # 36 x 7; 7 x 3 is too small
        assert state[0]["outer"].sharding.is_fully_replicated
        state, _ = run(state, batch)
        chex.assert_trees_all_close(parallel.whole(state), want, atol=1e-5, rtol=0)
    momentum = next(leaf for leaf in jax.tree.leaves(state[1]) if leaf.shape == (36, 7))
    assert momentum.addressable_shards[0].data.shape == (9, 7)
    held = run.lower(state, batch).compile().memory_analysis().argument_size_in_bytes
    all_of_it = executor(make_step("mlp"), "jit", 4).lower(start("mlp"), batch).compile().memory_analysis()
    assert all_of_it.argument_size_in_bytes - held == 2 * 3 / 4 * 36 * 7 * 4


def test_a_layout_splits_the_longest_axis_that_divides():
    mesh = parallel.make_mesh(axes={"data": 2, "model": 4})
    layout = parallel.fsdp("model", least=8)
    assert layout((12, 16, 3), mesh) == PartitionSpec(None, "model", None)
    assert layout((12, 17), mesh) == PartitionSpec("model", None)
    assert layout((4,), mesh) == layout((9, 11), mesh) == layout((), mesh) == PartitionSpec()
    for how, where in (("shard_map", mesh), ("jit", None)):
        with pytest.raises(ValueError, match="layout must be None unless how='jit' with a mesh"):
            parallel.compile_step(make_step("mlp"), how=how, mesh=where, layout=layout)


def test_the_talk_between_processes_is_short_where_there_is_one():
    mesh = parallel.make_mesh(4)
    assert parallel.exchange(b"some") == [b"some"] and parallel.agree(True) and not parallel.agree(False)
    assert not parallel.preempted(3)
    assert parallel.local(mesh) is mesh and parallel.local(None) is None
    spread = parallel.global_batch({"a": np.arange(8.0)}, mesh)
    np.testing.assert_array_equal(parallel.whole(spread)["a"], np.arange(8.0))


def test_a_step_may_open_the_typed_shardings():
    split, seen = PartitionSpec("data"), []

    def count(x):
        seen.append(jax.typeof(x).sharding.spec)
        return x.sum()

    def step(state, batch, *, axis_name=None):
        return state, jax.sharding.explicit_axes(count, in_sharding=(split,))(batch["x"])

    batch = problem()
    _, total = executor(step, "explicit", 4)(jnp.zeros(2), batch)
    assert seen[0][0] == "data" and jax.typeof(total).sharding.mesh.axis_types == (AxisType.Explicit,)
    np.testing.assert_allclose(total, batch["x"].sum(), rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- donation


def ema_step(state, batch, *, axis_name=None):
    mean = parallel.psum(batch["x"].sum(), axis_name)
    params = jax.tree.map(lambda p: p + 1e-3 * mean, state["params"])
    ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state["ema"], params)
    return {"params": params, "ema": ema, "count": state["count"] + 1}, {}


@pytest.mark.parametrize("how", parallel.HOW)
def test_donation_leaves_the_arrays_of_the_caller_alive_and_aliases_are_safe(how):
    params, _ = start("mlp")
    state = {"params": params, "ema": params, "count": 0}  # ema is params itself: one buffer, two leaves
    run = executor(ema_step, how, 4)
    before = jax.device_get(params)
    one, _ = run(state, problem())
    chex.assert_trees_all_equal(jax.device_get(params), before)  # raises if the buffer was given away
    kept = parallel.replicate(one)
    shared = {**one, "ema": one["params"]}  # and once more, with leaves that this executor returned
    two, _ = run(shared, problem())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(one["params"]))  # its memory was reused, so donation works
    chex.assert_tree_all_finite(kept)
    total = problem()["x"].sum() * 1e-3
    np.testing.assert_allclose(two["params"]["outer"], before["outer"] + 2 * total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(two["ema"]["outer"], before["outer"] + 1.1 * total, rtol=1e-5, atol=1e-6)
    assert two["count"] == 2


@pytest.mark.parametrize("how", parallel.HOW)
def test_without_donation_every_state_stays_alive(how):
    run = executor(ema_step, how, 2, donate=False)
    params, _ = start("mlp")
    one, _ = run({"params": params, "ema": params, "count": jnp.zeros((), jnp.int32)}, problem())
    run(one, problem())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(one))


def test_replicate_copies_numbers_arrays_and_keys_to_every_device(key):
    tree = {"array": jnp.ones(3), "numpy": np.zeros(2), "number": 3, "key": key}
    mesh = parallel.make_mesh(4)
    for copy, devices in ((parallel.replicate(tree, mesh), 4), (parallel.replicate(tree), 1)):
        assert all(len(leaf.sharding.device_set) == devices for leaf in jax.tree.leaves(copy))
        assert copy["number"] == 3 and (copy["array"] == tree["array"]).all() and copy["key"] == key
        assert copy["array"].addressable_shards[0].data.unsafe_buffer_pointer() != tree["array"].unsafe_buffer_pointer()


# --------------------------------------------------------------------------------------- the four functions of a step


@pytest.mark.parametrize("how", ("shard_map", "pmap", "vmap"))
@pytest.mark.parametrize("n", COUNTS)
def test_the_four_functions_under_an_axis(how, n):
    def step(state, batch, *, axis_name=None):
        x = batch["x"]
        twice = parallel.varying(parallel.varying({"s": state, "x": x}, axis_name), axis_name)  # varying already: stays
        return state, {
            "sum": parallel.psum({"a": x.sum(), "b": (twice["x"] * 2).sum()}, axis_name),
            "copies": parallel.psum(1, axis_name),
            "state": parallel.psum(twice["s"].sum(), axis_name),
            "mean": parallel.pmean_weighted(x.sum(), batch["mask"].sum(), axis_name),
            "shards": parallel.psum(parallel.axis_index(axis_name), axis_name),
        }

    batch = {"x": np.arange(8.0, dtype=np.float32), "mask": np.arange(8) < 5}
    _, got = executor(step, how, n)(jnp.ones(2), batch)
    assert got["sum"] == {"a": 28, "b": 56} and got["copies"] == n and got["state"] == 2 * n
    assert got["shards"] == n * (n - 1) // 2
    np.testing.assert_allclose(got["mean"], 28 / 5, rtol=1e-6)


def test_the_four_functions_without_an_axis():
    tree = {"a": jnp.arange(3.0)}
    assert parallel.psum(tree) is tree and parallel.varying(tree) is tree and parallel.psum(tree, ()) is tree
    assert parallel.axis_index() == 0 and parallel.axis_index().dtype == jnp.int32


@pytest.mark.parametrize(
    ("total", "count", "mean"),
    [
        (jnp.float32(6), jnp.int32(4), jnp.float32(1.5)),
        (jnp.float32(0), 0, jnp.float32(0)),  # no rows: zero, no NaN
        (jnp.int32(3), 2, jnp.float32(1.5)),
        (jnp.bfloat16(512), 257, jnp.bfloat16(1.9921875)),  # with 257 rounded to 256: 2
    ],
)
def test_pmean_weighted_divides_in_float32_and_keeps_the_type(total, count, mean):
    got = parallel.pmean_weighted(total, count)
    assert got == mean and got.dtype == mean.dtype


def test_varying_takes_a_plain_name_as_checked():
    mesh = parallel.make_mesh(4)

    def shard(w, x):
        w = parallel.varying(w, "data")
        return jax.grad(lambda w: (w * x).sum())(w)[None]

    specs = {"mesh": mesh, "in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec("data")}
    x = jnp.arange(8.0)
    own = x.reshape(4, 2).sum(1)
    np.testing.assert_array_equal(jax.shard_map(shard, **specs)(jnp.float32(1), x), own)
    np.testing.assert_array_equal(jax.shard_map(shard, **specs, check_vma=False)(jnp.float32(1), x), own)
    with pytest.raises(ValueError):  # loud, never silently wrong
        jax.vmap(shard, (None, 0), axis_name="data")(jnp.float32(1), x.reshape(4, 2))


# ---------------------------------------------------------------------- meshes, padding, processes, errors


class Chip:
    """A device of a slice, as far as a mesh looks at it."""

    platform, device_kind, process_index = "gpu", "chip", 0

    def __init__(self, number, slice_index):
        self.id, self.slice_index = number, slice_index

    def __repr__(self):
        return f"{self.slice_index}:{self.id}"


def test_only_the_first_axis_of_a_mesh_spans_slices():
    mixed = [Chip(i, i % 2) for i in range(8)]
    mesh = parallel.make_mesh(mixed, {"data": 4, "model": 2})
    assert mesh.axis_names == ("data", "model") and {chip.id for chip in mesh.devices.flat} == set(range(8))
    assert [[chip.slice_index for chip in row] for row in mesh.devices] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert [chip.slice_index for chip in parallel.make_mesh(mixed).devices] == [0] * 4 + [1] * 4
    one = parallel.make_mesh(mixed, {"slice": 2, "data": 4}, explicit=True)
    assert one.axis_types == (AxisType.Explicit,) * 2
    with pytest.raises(ValueError, match="multiple of the 2 slices .* got {'model': 1, 'data': 8}.*rows first"):
        parallel.make_mesh(mixed, {"model": 1, "data": 8})


def test_make_mesh_takes_a_count_devices_or_axes():
    assert dict(parallel.make_mesh().shape) == {"data": len(jax.devices())} == {"data": 8}
    assert parallel.make_mesh().axis_types == (AxisType.Auto,)
    assert parallel.make_mesh(2, explicit=True).axis_types == (AxisType.Explicit,)
    chosen = jax.devices()[3:5]
    assert list(parallel.make_mesh(chosen).devices.flat) == chosen
    assert dict(parallel.make_mesh(axes={"data": 2, "model": 2}).shape) == {"data": 2, "model": 2}
    with pytest.raises(ValueError, match="at most the 8 that jax sees; got 9.*jax_num_cpu_devices"):
        parallel.make_mesh(9)
    with pytest.raises(ValueError, match="multiply to its 4 devices; got {'data': 3}"):
        parallel.make_mesh(4, {"data": 3})


def test_pad_batch_adds_rows_that_do_not_count():
    batch = {k: v[:5] for k, v in problem().items()} | {"pair": (np.arange(5), jnp.arange(5))}
    padded = parallel.pad_batch(batch, 4)
    assert all(leaf.shape[0] == 8 for leaf in jax.tree.leaves(padded))
    for got, want in zip(jax.tree.leaves(padded), jax.tree.leaves(batch), strict=True):
        assert got.dtype == want.dtype and isinstance(got, np.ndarray) is isinstance(want, np.ndarray)
        np.testing.assert_array_equal(got[:5], want)
    np.testing.assert_array_equal(padded["x"][5:], np.repeat(batch["x"][:1], 3, 0))
    np.testing.assert_array_equal(padded["mask"], np.arange(8) < 5)
    np.testing.assert_array_equal(padded["index"][5:], -1)
    np.testing.assert_array_equal(padded["pair"][1][5:], 0)
    same = parallel.pad_batch(padded, 8)
    chex.assert_trees_all_equal(same, padded)
    assert parallel.pad_batch({"x": np.ones((3, 2))}, 2)["mask"].tolist() == [True, True, True, False]
    empty = parallel.pad_batch({"x": np.ones((0, 2), np.float32), "index": np.zeros(0, np.int32)}, 4)
    assert empty["x"].shape == (4, 2) and not empty["mask"].any() and (empty["index"] == -1).all()
    with pytest.raises(ValueError, match="multiple must be a whole number"):
        parallel.pad_batch(batch, 0)


@pytest.mark.parametrize("how", ("jit", "shard_map"))
def test_a_padded_batch_gives_the_iterates_of_the_rows_that_count(how, by_hand):
    batch = parallel.pad_batch({k: v[:13] for k, v in problem().items()}, 8)
    state, _ = executor(make_step("mlp"), how, 8)(start("mlp"), batch)
    chex.assert_trees_all_close(jax.device_get(state), by_hand["mlp"][0][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", parallel.HOW)
def test_a_batch_that_devices_cannot_share_is_refused_with_the_cure(how):
    batch = {k: v[:13] for k, v in problem().items()}
    with pytest.raises(ValueError, match=r"among the 4 devices; got 13 rows. Pad with parallel.pad_batch\(batch, 4\)"):
        executor(make_step("mlp"), how, 4)(start("mlp"), batch)


def test_a_batch_without_a_common_leading_axis_is_refused():
    run = parallel.compile_step(make_step("mlp"))
    for odd in (np.float32(1), np.ones(3)):
        with pytest.raises(ValueError, match="same leading axis; got shapes"):
            run(start("mlp"), problem() | {"z": odd})


def test_global_batch_spreads_the_rows_in_order():
    mesh, batch = parallel.make_mesh(4), problem()
    spread = parallel.global_batch(batch, mesh)
    chex.assert_trees_all_equal(jax.device_get(spread), batch)
    for i, shard in enumerate(sorted(spread["y"].addressable_shards, key=lambda s: s.device.id)):
        np.testing.assert_array_equal(shard.data, batch["y"][4 * i : 4 * i + 4])
    again = parallel.global_batch(spread, mesh)
    assert again["x"].sharding == spread["x"].sharding
    assert parallel.global_batch(batch, None) is batch


@pytest.mark.parametrize("wrong", ("pmapp", "jitt", "shard"))
def test_an_unknown_executor_is_refused_with_the_nearest(wrong):
    near = {"pmapp": "pmap", "jitt": "jit", "shard": "shard_map"}[wrong]
    with pytest.raises(ValueError, match=f"unknown executor '{wrong}'.*Did you mean.*'{near}'"):
        parallel.compile_step(make_step("mlp"), how=wrong)


def test_wrong_axes_and_devices_are_refused():
    step, mesh = make_step("mlp"), parallel.make_mesh(2)
    with pytest.raises(ValueError, match="unknown mesh axis 'dat'.*Did you mean 'data'"):
        parallel.compile_step(step, mesh=mesh, data_axes=("dat",))
    with pytest.raises(ValueError, match="at least one axis"):
        parallel.compile_step(step, mesh=mesh, data_axes=())
    with pytest.raises(ValueError, match="devices must be None unless how='vmap'"):
        parallel.compile_step(step, how="jit", devices=4)


def test_distributed_reads_its_text(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    assert parallel.distributed("off") is False and calls == []
    assert parallel.distributed("auto") is True
    assert parallel.distributed("127.0.0.1:1234, 2, 1") is True
    assert calls == [(), ("127.0.0.1:1234", 2, 1)]
    for wrong in ("on", "127.0.0.1,2,0", "127.0.0.1:1,2", "127.0.0.1:1,2,2", "127.0.0.1:1,two,0"):
        with pytest.raises(ValueError, match="'auto', 'off' or 'address:port,n,i'"):
            parallel.distributed(wrong)
    assert len(calls) == 2
