"""Decision-based attacks: the distance of a linear model, the published schedules step by step, exact query counts."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.tree_util import Partial

from benchmarks.parity import autoattack as parity
from jaxadv import core, models
from jaxadv.attacks import (
    ATTACKS,
    Boundary,
    Decision,
    GeoDA,
    HopSkipJump,
    MinimumNorm,
    SaltAndPepper,
    SignOPT,
    Walk,
    boundary,
    geoda,
    hopskipjump,
    one_pixel,
    salt_and_pepper,
    signopt,
    spsa,
)
from jaxadv.attacks.decisions import BISECT, PROBE, START, STRIDE
from jaxadv.attacks.waves import cosines
from jaxadv.core import Targets
from jaxadv.threats import l0, l2, linf

KEY = jax.random.key(0)
BALLS = {"linf": linf, "l2": l2}
FIXTURES = Path(__file__).parents[1] / "fixtures"
N = 40


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def linear(w, x):
    return (x.reshape(x.shape[0], -1) - 0.5) @ w


class Host:
    """A linear model on the host: decisions in float64 that depend on the row alone, and a count of rows asked."""

    def __init__(self, seed=0, n=N, classes=2):
        self.w = np.random.default_rng(seed).normal(size=(n, classes)).astype(np.float32)
        self.rows = 0

    def __call__(self, x):
        self.rows += len(x)
        return linear(self.w.astype(np.float64), x.astype(np.float64))


def problem(b=12, classes=2, shape=(N,)):
    host = Host(n=int(np.prod(shape)), classes=classes)
    x = np.random.default_rng(1).uniform(0.45, 0.55, (b, *shape)).astype(np.float32)
    return host, x, host(x).argmax(-1).astype(np.int32)


def distance(host, x, norm):
    slope = np.linalg.norm(host.w[:, 0] - host.w[:, 1], {"linf": 1, "l2": 2}[norm])
    z = linear(host.w, x)
    return np.abs(z[:, 0] - z[:, 1]) / slope


def begun(attack, model, x, y):
    x, y = jnp.asarray(x), jnp.asarray(y)
    return attack.init(core.example_keys(KEY, attack.name, jnp.arange(len(y))), model, x, y)


# ------------------------------------------------------------------------------------------------------- linear models


CLOSE = [
    ("hopskipjump", "l2", {}, 1.02),
    ("hopskipjump", "linf", {}, 1.06),
    ("geoda", "l2", {}, 1.02),
    ("geoda", "linf", {}, 1.02),
    ("signopt", "l2", {"probes": 100}, 1.01),
    ("boundary", "l2", {"spherical": 0.05, "source": 0.05}, 1.05),
]


def rows(table, slow):
    """A table of parameters whose rows named `attack-norm` in `slow` run with the slow tests."""
    names = [f"{row[0]}-{row[1]}" for row in table]
    return [pytest.param(*r, id=n, marks=[pytest.mark.slow] * (n in slow)) for n, r in zip(names, table)]


@pytest.mark.parametrize(("attack", "norm", "settings", "factor"), rows(CLOSE, ("hopskipjump-linf", "geoda-l2")))
def test_linear_model_gives_its_distance_and_the_host_counts_the_queries(attack, norm, settings, factor):
    host, x, y = problem()
    want, host.rows = distance(host, x, norm), 0
    found = jax.block_until_ready(
        go(ATTACKS[attack](BALLS[norm](50.0), queries=4000, **settings), models.black_box(host, 2), x, y)
    )
    assert host.rows == found.queries.sum() == len(x) * 4002 and (found.grads == 0).all()
    assert found.success.all() and (host(np.asarray(found.x)).argmax(-1) != y).all()
    ratio = np.asarray(found.size) / want
    assert (ratio > 1 - 1e-4).all() and np.median(ratio) < factor and ratio.max() < 1 + 2 * (factor - 1)


def trace(attack, model, x, y, steps):
    """What is asked, and the states before each query."""
    x, y = jnp.asarray(x), jnp.asarray(y)

    @jax.jit
    def traced(state):
        return lax.scan(lambda s, _: (attack.step(s, model, x, y), s), state, None, steps)

    last, states = traced(begun(attack, model, x, y))
    return last, jax.device_get(states)


def test_hopskipjump_keeps_to_its_schedule_query_by_query():
    host, x, y = problem(b=4)
    model, steps, gamma = Partial(linear, host.w), 900, 2.0
    attack = hopskipjump(l2(50.0), queries=steps, gamma=gamma, probes=(40, 70))
    last, s = trace(attack, model, x, y, steps)
    assert (s.distance[1:] <= s.distance[:-1]).all()  # the nearest failing point only comes nearer
    for row in range(4):
        phase, number, asked = s.own.phase[:, row], s.own.round[:, row], s.point[:, row]
        fails = host(asked).argmax(-1) != y[row]
        first = np.argmax(phase == BISECT)
        assert (phase[:first] == START).all() and (fails[:first] == ([False] * (first - 1) + [True])).all()
        for j in range(1, number.max()):
            at = (phase == PROBE) & (number == j)
            assert at.sum() == min(int(40 * np.sqrt(j)), 70)
            center = s.own.at[np.argmax(at), row]
            assert host(center[None]).argmax(-1) != y[row]
            length = np.linalg.norm(asked[at] - center, axis=-1)
            reach = 0.1 if j == 1 else gamma * s.own.reach[np.argmax(at), row] / N
            np.testing.assert_allclose(length, reach, rtol=1e-3)
            # the direction: mean of (vote - mean vote) * move, of length one
            votes, move = 2.0 * fails[at] - 1, asked[at] - center
            votes = votes if abs(votes.mean()) == 1 else votes - votes.mean()
            want = (votes[:, None] * move).mean(0)
            strides = np.flatnonzero((phase == STRIDE) & (number == j))
            np.testing.assert_allclose(s.own.normal[strides[0], row], want / np.linalg.norm(want), atol=1e-3)
            # strides: the distance over the root of the round, halved until the point fails
            far = np.linalg.norm(center - x[row]) / np.sqrt(j) / 2.0 ** np.arange(len(strides))
            clipped = np.clip(center + far[:, None] * s.own.normal[strides[0], row], 0, 1)
            np.testing.assert_allclose(asked[strides], clipped, atol=1e-5)
            assert list(fails[strides]) == [False] * (len(strides) - 1) + [True]
            # bisection, from the whole way down to a share of gamma / n^1.5
            halves = np.flatnonzero((phase == BISECT) & (number == j))
            assert len(halves) == int(np.ceil(np.log2(N**1.5 / gamma)))
            share = s.own.low[halves, row] / 2 + s.own.high[halves, row] / 2
            np.testing.assert_allclose(
                asked[halves], x[row] + share[:, None] * (asked[strides[-1]] - x[row]), atol=1e-6
            )


def test_a_budget_of_one_query_is_spent_and_every_failing_point_that_was_asked_may_be_the_answer():
    host, x, y = problem(b=4)
    one = go(hopskipjump(l2(50.0), queries=1), Partial(linear, host.w), x, y)
    assert (one.queries == 3).all() and np.isfinite(one.score).all()
    attack, model = hopskipjump(l2(50.0), queries=60, probes=(20, 20)), Partial(linear, host.w)
    last, s = trace(attack, model, x, y, 60)
    size = np.linalg.norm(s.point - x, axis=-1)
    fails = host(s.point.reshape(-1, N)).argmax(-1).reshape(60, 4) != y
    least = np.where(fails, size, np.inf).min(0)
    np.testing.assert_allclose(last.distance, least, rtol=1e-5)
    np.testing.assert_allclose(attack.result(last, model, jnp.asarray(x), jnp.asarray(y)).size, least, rtol=1e-5)


def test_geoda_splits_its_queries_and_probes_with_low_frequencies():
    attack = geoda(l2(9.0), queries=4000, rounds=6, decay=0.6)
    assert 3700 < sum(attack.counts) <= 4000 - 6 * 20
    ratios = np.divide(attack.counts[1:], attack.counts[:-1])
    np.testing.assert_allclose(ratios, 0.6 ** (-2 / 3), rtol=0.02)
    host, x, y = problem(b=3, shape=(8, 8, 1))
    model = Partial(linear, host.w)
    attack = geoda(l2(9.0), queries=120, rounds=1, waves=3, sigma=0.05)
    _, s = trace(attack, model, x, y, 120)
    basis = cosines(8, 8)
    for row in range(3):
        probes = s.own.phase[:, row] == PROBE
        move = s.point[probes, row, :, :, 0] - s.own.at[probes, row, :, :, 0]
        inside = (s.own.at[probes, row] > 0.1).all() and (s.own.at[probes, row] < 0.9).all()
        waves = np.einsum("ia,kab,jb->kij", basis, move, basis)
        assert probes.sum() > 20
        if inside:  # else the bounds cut the waves
            assert np.abs(waves[:, 3:]).max() < 1e-4 and np.abs(waves[:, :, 3:]).max() < 1e-4
        far = np.linalg.norm((s.own.at[probes, row] - x[row]).reshape(probes.sum(), -1), axis=-1)
        assert (np.linalg.norm(move, axis=(1, 2)) <= 0.05 * far * 1.001).all()


def test_boundary_moves_on_the_sphere_then_inward_and_adapts_as_its_windows_tell():
    host, x, y = problem(b=3)
    model, steps = models.black_box(host, 2), 1200  # so near to the boundary a rounding would decide elsewhere
    attack = boundary(l2(50.0), queries=steps, every=3, windows=(6, 4), spherical=0.02, source=0.03)
    _, s = trace(attack, model, x, y, steps)
    for row in range(3):
        phase, more, asked = s.own.phase[:, row], s.own.more, s.point[:, row]
        walk = np.flatnonzero((phase == PROBE) | (phase == STRIDE))
        fails = host(asked).astype(np.float32).argmax(-1) != y[row]
        around, inward, spherical, source, taken = [], [], 0.02, 0.03, 0
        for t in walk:
            at = s.own.at[t, row]
            np.testing.assert_allclose([more.spherical[t, row], more.source[t, row]], [spherical, source], rtol=1e-4)
            far, size = np.linalg.norm(at - x[row]), np.linalg.norm(asked[t] - x[row])
            inside = asked[t].min() > 0 and asked[t].max() < 1
            if phase[t] == STRIDE:
                around = [*around, fails[t]][-6:]
                assert taken % 3 == 2
                if inside:
                    np.testing.assert_allclose(size, far, rtol=1e-4)
                    turned = (1 / np.sqrt(1 + spherical**2) - 1) * far**2  # an aside of `spherical` turns it so far
                    np.testing.assert_allclose((asked[t] - at) @ (at - x[row]), turned, atol=1e-4)
                continue
            if inside and source < 1:
                np.testing.assert_allclose(size, (1 - source) * far, rtol=1e-3)
            taken += 1
            if phase[t - 1] == STRIDE:
                inward = [*inward, fails[t]][-4:]
                one = two = 1.0
                if len(around) == 6 and not 0.2 <= np.mean(around) <= 0.5:
                    one, around = (1.5 if np.mean(around) > 0.5 else 1 / 1.5), []
                if len(inward) == 4 and not 0.1 <= np.mean(inward) <= 0.25:
                    two, inward = (1.5 if np.mean(inward) > 0.25 else 1 / 1.5), []
                spherical, source = spherical * one, source * one * two
        assert taken > 500 and spherical != 0.02
        assert (s.distance[1:, row] <= s.distance[:-1, row]).all()


def test_salt_and_pepper_finds_how_few_features_it_takes():
    """A model that fails beyond 9 features at the ends of the range."""

    def brittle(x):
        ends = jnp.sum((x == 0) | (x == 1), axis=tuple(range(1, x.ndim)))
        return jnp.stack([0 * ends, ends - 9.5], axis=-1)

    x, y = jnp.full((12, 8, 8, 1), 0.4), jnp.zeros(12, jnp.int32)
    found = go(salt_and_pepper(l0(64.0), queries=400), Partial(brittle), x, y)
    assert found.success.all() and (found.size >= 10).all() and np.median(found.size) <= 11
    assert set(np.unique(found.x)) <= {0.0, np.float32(0.4), 1.0} and (found.queries == 402).all()
    wide = jnp.full((4, 4, 4, 3), 0.4)
    found = go(salt_and_pepper(l2(64.0), queries=60), Partial(brittle), wide, y[:4])
    changed = np.asarray(found.x != wide)
    assert found.success.all() and (changed.all(-1) == changed.any(-1)).all()
    apart = go(salt_and_pepper(l2(64.0), queries=60, across=False), Partial(brittle), wide, y[:4])
    changed = np.asarray(apart.x != wide)
    assert apart.success.all() and (changed.all(-1) != changed.any(-1)).any()


# ------------------------------------------------------------------------------------------------------------ every one


def test_given_starts_reach_targets_that_noise_does_not():
    host, x, y = problem(classes=8)
    model = models.black_box(host, 8)
    target = (y + 3) % 8
    corners = (host.w.T > 0).astype(np.float32)  # the point that favors each class
    assert (host(corners).argmax(-1) == np.arange(8)).all()
    aim = Targets(label=jnp.asarray(y), target=jnp.asarray(target))
    blind = go(hopskipjump(l2(50.0), queries=20), model, x, aim)
    assert not blind.success.all()
    found = go(hopskipjump(l2(50.0), queries=600, probes=(30, 60), starts=jnp.asarray(corners)), model, x, aim)
    assert found.success.all() and (host(np.asarray(found.x)).argmax(-1) == target).all()
    assert (found.size < np.linalg.norm(corners[target] - x, axis=-1)).all()


WALKS = [
    ("hopskipjump", "linf", {"probes": (5, 20)}),
    ("geoda", "l2", {"rounds": 2}),
    ("signopt", "l2", {"probes": 8}),
    ("boundary", "l2", {}),
    ("salt_and_pepper", "l2", {}),
]


@pytest.mark.parametrize(("attack", "norm", "settings"), rows(WALKS, ("geoda-l2", "signopt-l2", "salt_and_pepper-l2")))
def test_a_budget_decides_success_and_wrong_rows_come_back_unchanged(attack, norm, settings):
    host, x, y = problem(b=9)
    y[:3] = 1 - y[:3]
    model = models.black_box(host, 2)
    free = go(ATTACKS[attack](BALLS[norm](50.0), queries=300, **settings), model, x, y)
    size = np.asarray(free.size)
    assert free.success.all() and (size[:3] == 0).all() and (free.x[:3] == x[:3]).all()
    eps = float(np.median(size[3:]))
    tight = go(ATTACKS[attack](BALLS[norm](eps), queries=300, early=True, **settings), model, x, y)
    assert core.feasible(BALLS[norm](eps), np.asarray(tight.x), x).all()
    assert tight.success[size < eps].all() and (tight.queries[:3] == 2).all()
    assert tight.queries[3:].min() < 302 == tight.queries.max()
    assert attack == "salt_and_pepper" or not tight.success[size > 1.02 * eps].any()


def test_nan_is_no_failure_on_the_way_and_nothing_breaks_what_nothing_can():
    def sick(x):
        far = jnp.any(jnp.abs(x - 0.5) > 0.3, axis=-1)
        return jnp.where(far[:, None], jnp.nan, jnp.asarray([[1.0, 0.0]]))

    x, y = jnp.full((4, 6), 0.5), jnp.zeros(4, jnp.int32)
    for attack in (hopskipjump(l2(9.0), queries=40), salt_and_pepper(l2(9.0), queries=40)):
        found = go(attack, Partial(sick), x, y)
        assert found.flags["nonfinite"].all() and np.isfinite(found.x).all()
        assert not found.success.any() or np.isnan(np.asarray(sick(found.x))).any(-1)[np.asarray(found.success)].all()
    held = go(hopskipjump(linf(0.2), queries=40), Partial(sick), x, y)
    assert not held.success.any() and (held.x == x).all() and np.isfinite(held.score).all()


def test_slots_give_what_one_batch_gives():
    host, x, y = problem(b=7)
    model, attack = models.black_box(host, 2), hopskipjump(l2(0.35), queries=400, probes=(10, 20), early=True)
    whole = go(attack, model, x, y)
    served = core.serve(attack, KEY, model, x, y, slots=3)
    np.testing.assert_array_equal(served.queries, whole.queries)
    np.testing.assert_array_equal(served.success, whole.success)
    np.testing.assert_allclose(served.x, whole.x, atol=1e-5)
    assert len(set(np.asarray(whole.queries).tolist())) > 1


def test_settings_are_checked():
    kinds = {HopSkipJump: hopskipjump, GeoDA: geoda, SignOPT: signopt, Boundary: boundary}
    for kind, build in kinds.items():
        assert isinstance(build(l2(1.0)), kind) and issubclass(kind, Walk) and issubclass(kind, Decision)
        for bad in ({"queries": 0}, {"starts": jnp.zeros(3)}, {"starts": jnp.zeros((0, 3))}):
            with pytest.raises(ValueError, match="must be"):
                build(l2(1.0), **bad)
        with pytest.raises(ValueError, match="norm ball"):
            build(l0(3.0))
    assert isinstance(salt_and_pepper(l0(1.0)), SaltAndPepper) and issubclass(SaltAndPepper, MinimumNorm)
    for bad in (
        lambda: salt_and_pepper(l0(3.0), queries=0),
        lambda: salt_and_pepper(linf(0.1)),
        lambda: signopt(linf(0.1)),
        lambda: hopskipjump(l2(1.0), gamma=0.0),
        lambda: hopskipjump(l2(1.0), probes=(0, 10)),
        lambda: geoda(l2(1.0), rounds=0),
        lambda: geoda(l2(1.0), decay=0.0),
        lambda: geoda(l2(1.0), sigma=0.0),
        lambda: geoda(l2(1.0), waves=0),
        lambda: signopt(l2(1.0), probes=0),
        lambda: signopt(l2(1.0), sigma=-1.0),
        lambda: boundary(l2(1.0), spherical=0.0),
        lambda: boundary(l2(1.0), source=0.0),
        lambda: boundary(l2(1.0), adaptation=1.0),
        lambda: boundary(l2(1.0), every=1),
        lambda: boundary(l2(1.0), windows=(0, 3)),
    ):
        with pytest.raises(ValueError, match="must"):
            bad()


# ------------------------------------------------------------------------------------------------------ other packages


def stored(net):
    """What other packages have found, and the network and examples of the other minimum-norm attacks."""
    found, given = np.load(FIXTURES / "blackbox_torch.npz"), np.load(FIXTURES / "minimum_torch.npz")
    x, y = given[f"{net}/x"].astype(np.float32) / 255, given[f"{net}/y"]
    return (
        parity.forward(np.load(parity.weights_of(net)), net),
        x,
        y,
        {k.split("/", 1)[1]: found[k] for k in found if k.startswith(net)},
    )


QUERIES = (500,)  # of those stored


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "norm"), [("hopskipjump", "l2"), ("hopskipjump", "linf"), ("boundary", "l2"), ("salt_and_pepper", "l2")]
)
def test_median_distances_after_as_many_queries_are_those_of_foolbox_or_smaller(attack, norm):
    """Medians of 24 examples, averaged over seeds, which differ from each other by up to 8 % on either side."""
    model, x, y, found = stored("mnist_robust")
    theirs = np.median(found[f"{attack}/{norm}"], axis=2).mean(0)[: len(QUERIES)]
    a, steps = ATTACKS[attack](BALLS[norm](1e3), queries=QUERIES[-1]), QUERIES[-1]

    @jax.jit
    def distances(key, model, x, y):
        state = a.init(core.example_keys(key, attack, jnp.arange(len(y))), model, x, y)
        return lax.scan(lambda s, _: (a.step(s, model, x, y), s.distance), state, None, steps)[1]

    runs = [np.asarray(distances(jax.random.key(seed), model, x, y)) for seed in range(2)]
    ours = np.mean([[np.median(run[q - 1]) for q in QUERIES] for run in runs], axis=0)
    assert (ours <= 1.08 * theirs).all(), (ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "net", "eps"), [("spsa", "mnist_standard", 0.2), ("one_pixel", "mnist_robust", 10.0)]
)
def test_as_many_queries_break_as_many_examples_as_those_of_torchattacks(attack, net, eps):
    """Of 24 examples, or one less."""
    model, x, y, found = stored(net)
    queries = int(found[f"{attack}/queries"])
    search = {
        "spsa": lambda: spsa(linf(eps), queries=queries, samples=64),
        "one_pixel": lambda: one_pixel(l0(eps), queries=queries, pixels=10, population=100),
    }[attack]()
    ours = go(search, model, x, y)
    assert (ours.queries <= queries + 3).all() and 0 < found[attack].sum() <= ours.success.sum() + 1
