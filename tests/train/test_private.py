"""Private training: the step against closed forms, sensitivity with an attack inside, the ledger through crashes."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, data, models, parallel, privacy, threats, train
from jaxadv.privacy import BudgetError, Plan, Shuffled, poisson
from jaxadv.train.private import LEDGER, Ledger, check_private, private_grad_fn, program_of, spent_line

N = 96


def plan(noise=0.0, clip=1e6, n=N, size=16, **more):
    return privacy.plan(
        n, size=size, steps=12, delta=1e-3, noise_multiplier=noise, clip_norm=clip, accountant="rdp", **more
    )


def logistic_gradients(net, x, y):
    """Per-example gradients of the two-class linear net of the kit, rows (w, b)."""
    w, b = np.asarray(net.params["w"], np.float64), float(net.params["b"])
    p = 1 / (1 + np.exp(-(x @ w + b)))
    slope = p - y
    return np.concatenate([slope[:, None] * x, slope[:, None]], 1)


def flat(grads):
    return np.concatenate([np.asarray(grads["w"]), [float(grads["b"])]])


def total(made, objective, net, batch, key, augment=None):
    gradient = private_grad_fn(made, augment)(objective)
    got = jax.jit(lambda batch: gradient(net.apply, net.params, net.state, batch, key))(batch)
    return flat(got.total), got


def test_the_clipped_sum_of_a_linear_net_is_the_closed_form(kit, key):
    net, batch = kit.linear(), kit.rows(8) | {"step": jnp.zeros(8, jnp.int32)}
    batch["mask"] = batch["mask"].at[6:].set(False)
    each = logistic_gradients(net, np.asarray(batch["x"], np.float64), np.asarray(batch["y"]))[:6]
    norms = np.linalg.norm(each, axis=1)
    bound = float(np.median(norms))
    found, got = total(plan(clip=bound), train.standard(), net, batch, key)
    np.testing.assert_allclose(found, (each * np.minimum(1, bound / norms)[:, None]).sum(0), rtol=1e-5)
    assert float(got.count) == 6 and float(got.sums["clipped"]) == (norms > bound).sum()
    assert float(got.sums["norm"]) == pytest.approx(norms.sum(), rel=1e-5) and got.state == net.state


def test_views_are_averaged_before_the_clip(kit, key):
    """K = 3 shifts of each example: the gradient of the mean loss, clipped once."""
    net, batch = kit.linear(), kit.rows(4) | {"step": jnp.zeros(4, jnp.int32)}

    def shift(key, x):
        return x + jax.random.uniform(key)

    bound = 0.05
    found, _ = total(plan(clip=bound, views=3), train.standard(), net, batch, key, shift)
    index = np.repeat(np.asarray(batch["index"]), 3) * 3 + np.tile(np.arange(3), 4)
    keys = train.trainer.example_keys(key, "augment", jnp.asarray(index))
    x = np.repeat(np.asarray(batch["x"], np.float64), 3, 0) + np.asarray(jax.vmap(jax.random.uniform)(keys))[:, None]
    each = logistic_gradients(net, x, np.repeat(np.asarray(batch["y"]), 3)).reshape(4, 3, -1).mean(1)
    norms = np.linalg.norm(each, axis=1)
    np.testing.assert_allclose(found, (each * np.minimum(1, bound / norms)[:, None]).sum(0), rtol=1e-4)


@pytest.fixture(scope="module")
def attacked(kit):
    """A private sum with PGD inside each example, compiled once: `(mask, x) -> (gradient, sums)`."""
    threat = threats.linf(0.2, (-1.0, 1.0))
    objective = train.pgd_at(attacks.pgd(threat, steps=3, keep="last"))
    net, batch = kit.mlp(side=4), kit.rows(6, 16) | {"step": jnp.zeros(6, jnp.int32)}
    made, key = plan(clip=0.3), jax.random.key(1)

    def run(gradient, mask, x):
        rows = batch | {"mask": mask, "x": x.reshape(6, 4, 4, 1)}
        got = gradient(objective)(net.apply, net.params, net.state, rows, key)
        return jax.flatten_util.ravel_pytree(got.total)[0], got.sums

    return batch["x"], jax.jit(partial(run, private_grad_fn(made))), jax.jit(partial(run, train.grad_fn))


def test_one_example_moves_the_sum_by_at_most_the_clip_with_an_attack_inside(attacked):
    x, run, _ = attacked
    everyone = jnp.ones(6, bool)
    whole, sums = run(everyone, x)
    moves = [float(jnp.linalg.norm(whole - run(everyone.at[i].set(False), x)[0])) for i in range(6)]
    assert max(moves) <= 0.3 * (1 + 1e-5) and float(sums["clipped"]) > 0
    assert max(moves) == pytest.approx(0.3, rel=1e-4)  # and the bound is met: these examples are clipped
    broken, sums = run(everyone, x.at[2].set(jnp.nan))
    np.testing.assert_allclose(broken, run(everyone.at[2].set(False), x)[0], atol=1e-6)
    assert float(sums["nonfinite"]) == 1 and np.isfinite(float(sums["loss"]))


@pytest.mark.slow
def test_a_clip_that_does_not_bind_gives_the_ordinary_gradient_of_the_attacked_loss(attacked, kit):
    x, _, ordinary = attacked
    threat = threats.linf(0.2, (-1.0, 1.0))
    objective = train.pgd_at(attacks.pgd(threat, steps=3, keep="last"))
    net, batch = kit.mlp(side=4), kit.rows(6, 16) | {"step": jnp.zeros(6, jnp.int32)}
    rows = batch | {"x": x.reshape(6, 4, 4, 1)}
    gradient = private_grad_fn(plan())(objective)
    loose = jax.jit(lambda rows: gradient(net.apply, net.params, net.state, rows, jax.random.key(1)).total)(rows)
    plain, _ = ordinary(jnp.ones(6, bool), x)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(loose)[0], plain, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["shard_map", pytest.param("vmap", marks=pytest.mark.slow)])
def test_devices_share_one_private_step(kit, key, how):
    """Sum, noise and metrics of eight devices are those of one; the noise is drawn once."""
    net, made = kit.linear(), plan(noise=1.0, clip=0.3)
    optimizer = optax.chain(made.stage(key), optax.sgd(1.0))
    step = train.make_step(
        net.apply, train.standard(), optimizer, gradient=private_grad_fn(made), divisor=made.size, accumulate=2
    )
    state = train.trainer.init(key, net, optimizer)
    batch = kit.rows(32)
    batch["mask"] = batch["mask"].at[25:].set(False)
    alone, seen = parallel.compile_step(step, how="jit", donate=False)(state, batch)
    many, metrics = parallel.compile_step(step, how=how, mesh=parallel.make_mesh(8), donate=False)(state, batch)
    np.testing.assert_allclose(flat(many.params), flat(alone.params), atol=1e-6)
    assert float(metrics["norm"]) == pytest.approx(float(seen["norm"]), rel=1e-5)
    each = logistic_gradients(net, np.asarray(batch["x"], np.float64), np.asarray(batch["y"]))[:25]
    clipped = (each * np.minimum(1, 0.3 / np.linalg.norm(each, axis=1))[:, None]).sum(0)
    noise, _ = made.stage(key).update(jax.tree.map(jnp.zeros_like, net.params), made.stage(key).init(None))
    np.testing.assert_allclose(flat(net.params) - flat(alone.params), clipped / 16 + flat(noise), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- runs


def arguments(kit, folder=None, **more):
    given = dict(
        trainable=kit.mlp(),
        objective=train.standard(),
        optimizer=optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.5)),
        data=kit.blobs(N),
        steps=12,
        batch_size=16,
        private=plan(noise=1.5, clip=0.5),
        ema=0.9,
        save_every=4,
        log_every=3,
        checkpoint=folder,
    )
    return given | more


class Stop(Exception):
    """Breaks a run off, as a crash would."""


def stop_at(where):
    def callback(step, state, line):
        if step >= where:
            raise Stop

    return callback


@pytest.fixture(scope="module")
def runs(kit, tmp_path_factory):
    """One whole run; one that crashed at step 9 and was resumed."""
    folder, key = tmp_path_factory.mktemp("runs"), jax.random.key(0)
    whole = train.fit(key, **arguments(kit, folder / "whole"))
    with pytest.raises(Stop):
        train.fit(key, **arguments(kit, folder / "crashed", callbacks=[stop_at(9)]))
    ledger = json.loads((folder / "crashed" / LEDGER).read_text())
    resumed = train.fit(key, **arguments(kit, folder / "crashed", resume=True))
    return folder, whole, resumed, ledger


@pytest.mark.slow
def test_a_crash_is_neither_seen_nor_counted_where_the_bits_are_the_same(runs, kit):
    folder, whole, resumed, ledger = runs
    assert kit.same_bits(whole, resumed)
    made = arguments(kit)["private"]
    assert ledger["steps"] == 8 and ledger["epsilon"] == made.spent(8)
    final = json.loads((folder / "crashed" / LEDGER).read_text())
    assert (final["steps"], final["repeated"], final["epsilon"]) == (12, 0, made.spent(12))
    lines = [kit.quiet(train.read_metrics(folder / name / "metrics.jsonl")) for name in ("whole", "crashed")]
    assert lines[0] == lines[1]
    spent = [line["epsilon"] for line in lines[0] if line["event"] == "privacy"]
    assert spent == [made.spent(t) for t in (4, 8, 12)] and spent[0] < spent[2]
    last = [line for line in lines[0] if line["event"] == "train"][-1]
    assert 0 <= last["clipped"] <= 1 and last["nonfinite"] == 0


@pytest.mark.slow
def test_every_checkpoint_holds_the_ledger(runs, kit):
    folder, whole, *_ = runs
    store = train.Checkpoints(folder / "whole" / "checkpoints")
    made = arguments(kit)["private"]
    for step in store.steps():
        _, facts = store.restore({"state": whole, "good": None}, step)
        assert facts["privacy"]["epsilon"] == made.spent(step) and facts["privacy"]["steps"] == step
        assert "PoissonSampled" in facts["privacy"]["event"] and facts["privacy"]["delta"] == 1e-3
    store.close()


@pytest.mark.slow
def test_the_run_is_the_plan_by_hand(runs, kit):
    """Poisson batches, clipped sum over the expected size, one draw of noise, then decay: repeated without `fit`."""
    _, whole, *_ = runs
    given, key = arguments(kit), jax.random.key(0)
    made, net = given["private"], given["trainable"]
    optimizer = optax.chain(made.stage(train.trainer.purpose(key, "noise")), given["optimizer"])
    step = train.make_step(
        net.apply, given["objective"], optimizer, gradient=private_grad_fn(made), divisor=16.0, ema=0.9
    )
    state = train.trainer.init(key, net, optimizer, ema=True)
    run = jax.jit(step)
    for batch, _ in zip(made.batches(given["data"], train.trainer.purpose(key, "sampling")), range(12)):
        assert batch["x"].shape[0] == made.rows
        state, _ = run(state, batch)
    assert kit.same_bits(whole.params, state.params) and kit.same_bits(whole.ema, state.ema)


def test_steps_that_may_have_had_other_bits_count_twice(tmp_path):
    made = privacy.plan(N, size=16, steps=100, delta=1e-3, epsilon=50.0, noise_multiplier=1.5, accountant="rdp")
    one, other = program_of("jit", None), program_of("shard_map", parallel.make_mesh(8))
    assert one != other

    def book(program):
        return Ledger(made, 100, 10, program)

    book(one).open(tmp_path, 0, 0)
    book(one).facts(40, tmp_path)
    same = book(one)
    same.open(tmp_path, 30, 40)
    assert same.repeated == 0
    moved = book(other)
    moved.open(tmp_path, 30, 40)  # 10 steps of a checkpoint that is dropped, and up to 20 after it
    assert moved.repeated == 30 and moved.facts(30)["epsilon"] == made.spent(60)
    back = book(one)  # the other program crashed before it could save: its steps count, too
    back.open(tmp_path, 30, 30)
    assert back.repeated == 50
    back.facts(95, tmp_path)
    late = book(other)
    late.open(tmp_path, 95, 95)
    assert late.repeated == 55  # no more than the steps that there are
    assert spent_line(late.facts(100)) == {
        "epsilon": made.spent(155), "delta": 1e-3, "accountant": "rdp", "repeated": 55
    }  # fmt: skip
    poor = privacy.plan(
        N, size=16, steps=100, delta=1e-3, epsilon=made.spent(160), noise_multiplier=1.5, accountant="rdp"
    )
    with pytest.raises(BudgetError):
        Ledger(poor, 100, 10, one).open(tmp_path, 90, 90)


def test_a_run_stops_before_the_step_that_would_break_the_budget(kit, key):
    poor = privacy.plan(N, size=16, steps=5, delta=1e-3, epsilon=2.0, accountant="rdp")
    with pytest.raises(BudgetError, match="12 steps would spend"):
        train.fit(key, **arguments(kit, private=poor))


class Mixing:
    """An objective whose losses look at the whole batch."""

    def __call__(self, apply, params, state, batch, key):
        logits, _ = apply(params, state, batch["x"])
        scores = logits - logits.mean(0, keepdims=True)
        return -jax.nn.log_softmax(scores)[:, 0], (state, {})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gradient": train.awp}, "Adversarial weight perturbation moves the weights"),
        ({"replays": 2}, "replays must be 1 in private training"),
        ({"bn_groups": 2}, "bn_groups must be 1"),
        ({"keep": "best"}, "keep must be 'last'"),
        ({"collapse": "watch"}, "collapse must be None"),
        ({"batch_size": 17}, "batch_size must be the plan's expected size, 16"),
        ({"n": 95}, "plan must be for the 96 training examples"),
        ({"net": "batch"}, "no running statistics"),
        ({"objective": Mixing()}, "a loss of its own"),
    ],
)
def test_what_cannot_be_private_is_refused_with_the_reason(kit, change, match):
    settings = {"gradient": train.grad_fn, "replays": 1, "bn_groups": 1, "collapse": None, "keep": "last"}
    settings |= {"batch_size": 16, "steps": 12} | {
        k: v for k, v in change.items() if k not in ("n", "net", "objective")
    }
    made = plan(noise=1.0, n=change.get("n", N))
    net, objective = kit.mlp(change.get("net", "none")), change.get("objective", train.standard())
    with pytest.raises(ValueError, match=match):
        check_private(made, objective, net, kit.blobs(N), settings)


def test_shuffled_batches_have_no_epsilon(tmp_path):
    book = Ledger(Plan(Shuffled(N, 16), 0.5, 1.0, 1e-3), 10, 5, program_of("jit", None))
    book.open(tmp_path, 0, 0)
    assert spent_line(book.facts(3))["epsilon"] is None
    assert "shuffled order" in json.loads((tmp_path / LEDGER).read_text())["unsupported"]
    with pytest.raises(ValueError, match="budget must be countable"):
        Plan(Shuffled(N, 16), 0.5, 1.0, 1e-3, epsilon=8.0)
    with pytest.raises(ValueError, match="delta must lie"):
        Plan(poisson(N, 16), 0.5, 1.0, 1 / N)


@pytest.mark.slow
def test_a_linear_net_learns_the_digits_privately(key):
    """Sigma 1.5, batch 128, 500 steps: epsilon 7.9 on all 1437 images; at most ten points below no privacy."""
    source, test = data.load("digits", "train"), data.load("digits", "test")
    made = privacy.plan(
        len(source), size=128, steps=500, delta=1e-5, noise_multiplier=1.5, clip_norm=1.0, accountant="rdp"
    )
    net = models.create("mlp", jax.random.key(0), shape=source.shape, classes=10, widths=())
    common = dict(trainable=net, objective=train.standard(), optimizer=optax.sgd(1.0), data=source, batch_size=128)
    x, y = test.all()
    right = []
    for more in ({"private": made, "ema": 0.99}, {}):
        state = train.fit(key, **common, steps=500, **more)
        right.append(float(np.mean(np.argmax(models.model(train.trained(net, state))(x), -1) == y)))
    assert right[0] > right[1] - 0.1 and right[0] > 0.8


def test_mirror_padding_repeats_the_edge_rows(key):
    x = jnp.arange(12.0).reshape(3, 4, 1)
    wide = np.pad(np.asarray(x)[..., 0], 2, mode="symmetric")
    windows = {wide[i : i + 3, j : j + 4].tobytes() for i in range(5) for j in range(5)}
    cut = jax.jit(jax.vmap(lambda k: train.crop(2, mirror=True)(k, x)))(jax.random.split(key, 64))
    assert {np.asarray(c)[..., 0].tobytes() for c in cut} <= windows
