"""Laws over every attack and every threat, in one table: a new member is covered the day it is added."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from jaxadv import attacks, core, models
from jaxadv.attacks import ATTACKS
from jaxadv.threats import THREATS, union

SHAPE, CLASSES, POOL = (8, 8, 1), 10, 48
EPS = {"linf": 0.1, "l2": 0.8, "l1": 3.0, "l0": 5.0}
BALLS = tuple(THREATS)
ALL = (*BALLS, "union")
VIEWS = (attacks.Translations(3), attacks.Scales(2), attacks.Diverse(1.0, least=0.5))
SHORT = {  # settings of the laws where they are not four steps; attacks that stop early are told to go on
    "fgsm": {},
    "r_fgsm": {},
    "square": {"queries": 5, "early": False},
    "apgd_ce": {"steps": 4, "early": False},
    "apgd_dlr": {"steps": 4, "early": False},
    "apgd_t": {"steps": 4, "targets": 2, "early": False},
    "acg": {"steps": 4, "early": False},
    "fab": {"steps": 4, "early": False},
    "fab_t": {"steps": 4, "targets": 2, "early": False},
    "deepfool": {"steps": 4, "early": False},
    "newtonfool": {"steps": 4, "early": False},
    "brendel_bethge": {"steps": 8, "bisections": 1, "noise": 0.5, "draws": 1},
    "carlini": {"steps": 4, "rounds": 2, "constant": 1.0, "rate": 0.1, "abort": False},
    "carlini_linf": {"steps": 4, "rounds": 2, "constant": 1.0, "rate": 0.1, "least": 1e-12},
    "carlini_l0": {"steps": 4, "rounds": 2, "constant": 1.0, "rate": 0.1},
    "ead": {"steps": 4, "rounds": 2, "constant": 1.0, "abort": False},
    "lbfgs": {"steps": 4, "rounds": 2, "constant": 1.0, "abort": False},
    "jsma": {"steps": 4, "early": False},
    "sparsefool": {"steps": 4, "early": False},
    "nes": {"queries": 36, "samples": 4, "at_once": 4, "early": False},
    "spsa": {"queries": 36, "samples": 4, "at_once": 4, "early": False},
    "zoo": {"queries": 136, "samples": 8, "at_once": 8, "rounds": 2, "rate": 0.1, "abort": False},
    "simba": {"queries": 8, "early": False},
    "one_pixel": {"queries": 8, "pixels": 2, "population": 4, "early": False},
    "hopskipjump": {"queries": 60, "probes": (4, 100)},
    "boundary": {"queries": 60, "spherical": 0.1, "source": 0.1, "every": 2, "windows": (2, 2)},
    "geoda": {"queries": 60, "rounds": 2},
    "signopt": {"queries": 60, "probes": 4},
    "salt_and_pepper": {"queries": 8},
    "vmi_fgsm": {"steps": 4, "neighbors": 2, "look_ahead": True, "views": VIEWS},  # all that can be combined
}
DEAR = (
    "r_fgsm",
    "bim",
    "mi_fgsm",
    "apgd_dlr",
    "apgd_t",
    "fab_t",
    "deepfool",
    "fmn",
    "newtonfool",
    "ead",
    "lbfgs",
    "sparsefool",
    "adam_pgd",
    "vmi_fgsm",
    "spsa",
    "zoo",
    "one_pixel",
    "boundary",
    "geoda",
    "signopt",
    "salt_and_pepper",
)  # their kin stand for them in the default run where nothing of theirs differs


def build(name, scale=1.0):
    if name == "union":
        return union(*(THREATS[name](jnp.asarray(EPS[name], jnp.float32) * scale) for name in ("linf", "l2")))
    return THREATS[name](jnp.asarray(EPS.get(name, 0.5) * scale, jnp.float32))


def wire(attack, threat, scale=1.0, **settings):
    """An attack of the table, short."""
    return ATTACKS[attack](build(threat, scale), **SHORT.get(attack, {"steps": 4}) | settings)


def takes(attack, threat):
    """Whether an attack works with a threat; one that does not says so in terms of norms."""
    try:
        return bool(wire(attack, threat))
    except ValueError as refusal:
        assert "norm" in str(refusal) and threat in str(refusal)
        return False


WIRINGS = ("nes", "r_fgsm", "bim", "mi_fgsm", "vmi_fgsm")
KIN = ("acg", "carlini_linf", "carlini_l0", "brendel_bethge")  # of apgd_ce, carlini and fmn: their rows are all slow
PARTS = ("ni_fgsm", "si_fgsm", "di_fgsm", "ti_fgsm")
SCORED = ("apgd_dlr", "apgd_t", "fab_t")
MEETS = {
    **dict.fromkeys(WIRINGS, ("linf", "l2")),  # one engine with pgd, which meets every threat
    **dict.fromkeys(KIN, ("linf", "l0")),
    **dict.fromkeys(PARTS, ("linf",)),  # of what vmi_fgsm combines here
    **dict.fromkeys(SCORED, ("linf", "l1")),  # apgd_ce and fab with another loss; these meet every threat
}
TABLE = [(attack, threat) for attack in ATTACKS for threat in MEETS.get(attack, ALL) if takes(attack, threat)]


def marks(attack, threat):
    return [pytest.mark.slow] if attack in (*PARTS, *KIN) or (attack in DEAR and threat != "linf") else []


ROWS = [pytest.param(a, t, id=f"{a}-{t}", marks=marks(a, t)) for a, t in TABLE]
table = pytest.mark.parametrize(("attack", "threat"), ROWS, scope="module")  # one after the other: one compilation
FIRST = {a: (a, t) for a, t in reversed(TABLE)}
"""Each attack with one threat, for laws of what differs little from threat to threat."""


WALKS = ("hopskipjump", "boundary", "geoda", "signopt", "salt_and_pepper")
BLIND = ("square", "nes", "spsa", "zoo", "simba", "one_pixel", *WALKS)  # no gradients
ALONE = {
    "ddn": "l2",
    "newtonfool": "l2",
    "carlini": "l2",
    "lbfgs": "l2",
    "carlini_l0": "l0",
    "ead": "l1",
    "jsma": "l0",
    "sparsefool": "l0",
    "zoo": "l2",
    "one_pixel": "l0",
    "boundary": "l2",
    "signopt": "l2",
}  # attacks of one norm


def test_every_attack_takes_the_cube_or_a_ball_and_every_threat_has_an_attack():
    assert {a for a, t in TABLE if t == "linf"} == set(ATTACKS) - set(ALONE) - {"salt_and_pepper"}
    assert {(a, t) for a, t in TABLE if a in ALONE} == set(ALONE.items())
    assert {t for _, t in TABLE} == set(ALL)


@jax.jit
def run(attack, key, model, x, y, index):
    return attack.run(key, model, x, y, index=index)


def dense(params, x):
    return jax.nn.tanh(x.reshape(x.shape[0], -1) @ params["w"]) @ params["v"] + params["b"][None]


def dense_model(seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]) * 2, jnp.float32)

    return Partial(dense, {"w": draw(64, 24), "v": draw(24, CLASSES), "b": draw(CLASSES)})


def poisoned(params, x):
    """NaN logits and gradients where the first row of pixels is above `hot`; elsewhere the inner model."""
    model, hot = params
    sick = jnp.min(x.reshape(x.shape[0], -1)[:, :8], axis=1) > hot
    return 20 * model(x) * jnp.where(sick, jnp.nan, 1.0)[:, None]


@functools.cache
def conv_model(seed=3):
    """One structure for all laws of the table, so that each (attack, threat) is compiled once."""
    net = models.create("cnn_small", jax.random.key(seed), shape=SHAPE, classes=CLASSES)
    return Partial(poisoned, (models.model(net), jnp.float32(0.999)))


@functools.cache
def data(kind=poisoned):
    rng = np.random.default_rng(1)
    x = rng.uniform(0.05, 0.95, (POOL, *SHAPE)).astype(np.float32)
    y = np.array(jnp.argmax((dense_model() if kind is dense else conv_model())(x), -1), np.int32)
    y[::5] = (y[::5] + 1) % CLASSES  # some rows start broken
    return x, y


def batch(index, kind=dense):
    x, y = data(kind)
    return jnp.asarray(x[index]), jnp.asarray(y[index]), jnp.asarray(index, jnp.int32)


def answer(attack, model, index, seed=0):
    x, y, i = batch(np.asarray(index), model.func)
    return jax.device_get(run(attack, jax.random.key(seed), model, x, y, i))


def spent(attack):
    """Forward passes and gradients of a row that takes all steps: calls of a model, counted as they are traced."""
    calls = []

    def counted(params, x):
        calls.append(len(x) / 4)  # where several points of a row are asked at once, each counts
        return dense(params, x)

    model, (x, y, index) = Partial(counted, dense_model().args[0]), batch(np.arange(4))
    state = jax.eval_shape(attack.init, core.example_keys(jax.random.key(0), "law", index), model, x, y)
    before = sum(calls)
    with jax.disable_jit(isinstance(attack, attacks.Transferable)):  # it asks inside loops: trace every turn
        jax.eval_shape(attack.step, state, model, x, y)
    each = sum(calls) - before
    jax.eval_shape(attack.result, state, model, x, y)
    after = sum(calls) - before - each
    assert before <= 1  # a slot is cheap to fill
    others = dict.fromkeys(("fab", "deepfool", "sparsefool"), CLASSES - 1)  # one for each wrong class
    blind = dict.fromkeys(BLIND, 0)
    backward = ({"jsma": 2, "si_fgsm": 5, "vmi_fgsm": 3 * 2} | others | blind).get(attack.name, 1)
    return before + each * attack.max_steps + after, backward * attack.max_steps


@table
def test_feasible_in_float64_verified_and_never_worse_than_clean(attack, threat):
    a, model, index = wire(attack, threat), conv_model(), np.arange(16)
    x, y = (v[index] for v in data())
    found = answer(a, model, index)
    assert core.feasible(build(threat), found.x, x).all()
    assert build(threat).contains(found.x, x).all()
    clean = jax.device_get(model(jnp.asarray(x)))
    held = clean.argmax(-1) == y
    broken = np.asarray(model(jnp.asarray(found.x))).argmax(-1) != y
    np.testing.assert_array_equal(found.success, broken)
    assert not np.any(~held & ~found.success)
    score = clean[np.arange(16), y] - np.where(np.arange(CLASSES) == y[:, None], -np.inf, clean).max(-1)
    assert (found.score <= score + 1e-5)[found.success == ~held].all()
    if attack not in WALKS:  # these start from noise, which never leaves the class of this network
        assert (found.score < score - 1e-4)[held].mean() > 0.5  # it searches at all, in four steps
    np.testing.assert_allclose(found.size, build(threat).size(found.x, x), rtol=1e-5, atol=1e-6)
    calls = [v.tolist() for v in (found.queries, found.grads)]
    assert calls == [[n] * 16 for n in spent(a)]
    assert not any(flag.any() for flag in found.flags.values())


def check_rows_live_alone(attack, threat, size):
    a, model = wire(attack, threat), conv_model()
    x, y = data()
    rng = np.random.default_rng(5)
    want = None
    for trial in range(4):
        index = np.concatenate([np.arange(8), rng.permutation(np.arange(8, POOL))[: size - 8]])
        place = rng.permutation(size) if trial else np.arange(size)
        rows, labels = x[index].copy(), y[index].copy()
        if trial == 2:  # padding: rows of zeros with index -1
            rows[8:12], labels[8:12], index[8:12] = 0, 0, -1
        if trial == 3:  # companions that break the model
            rows[8:16, 0] = 1.0
        inputs = (jnp.asarray(rows[place]), jnp.asarray(labels[place]), jnp.asarray(index[place], jnp.int32))
        found = jax.device_get(run(a, jax.random.key(0), model, *inputs))
        home = np.argsort(place)
        back = jax.tree.map(lambda leaf, at=home[:8]: leaf[at], found)
        want = back if want is None else want
        for got, ref in zip(jax.tree.leaves(back), jax.tree.leaves(want), strict=True):
            assert got.tobytes() == ref.tobytes()
        if trial == 3:
            flagged = found.flags["nonfinite"][home]
            assert flagged[8:16].all() and not flagged[:8].any()


@table
def test_rows_live_alone_to_the_bit(attack, threat):
    """Same index and shape of batch: the same bits in any place, beside any companions, NaN-producing ones too."""
    check_rows_live_alone(attack, threat, 16)


@pytest.mark.parametrize("threat", ALL)
def test_rows_live_alone_in_a_batch_of_odd_size(threat):
    check_rows_live_alone("pgd", threat, 33)


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "threat"), [FIRST[a] for a in ATTACKS if a not in (*PARTS, *DEAR)])
def test_rows_live_alone_in_a_batch_of_odd_size_for_each_kind_of_attack(attack, threat):
    check_rows_live_alone(attack, threat, 33)


@table
def test_the_same_key_gives_the_same_result(attack, threat):
    a, index = wire(attack, threat), np.arange(16)
    one, two, other = (answer(a, conv_model(), index, seed) for seed in (0, 0, 1))
    for got, ref in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert got.tobytes() == ref.tobytes()
    if getattr(a, "start", "random") == "zero" and attack not in ("di_fgsm", "vmi_fgsm"):
        np.testing.assert_array_equal(one.x, other.x)
    elif attack != "brendel_bethge":  # its noise never leaves the class of this network
        assert (one.x != other.x).any()


@table
def test_a_traced_zero_budget_is_the_identity(attack, threat):
    index = np.arange(16)

    def none(path, leaf):
        return leaf * 0 if path[-1] == jax.tree_util.GetAttrKey("eps") else leaf

    a = jax.tree_util.tree_map_with_path(none, wire(attack, threat))  # only known budgets must be positive
    np.testing.assert_array_equal(answer(a, conv_model(), index).x, data()[0][index])


@table
def test_one_program_serves_new_weights_and_new_budgets(attack, threat):
    settings = [(conv_model(), 1.0), (conv_model(4), 1.0), (conv_model(), 0.2)]
    seen, programs = [], []
    for model, scale in settings:
        seen.append(answer(wire(attack, threat, scale), model, np.arange(16)).x)
        programs.append(run._cache_size())
    assert programs[0] == programs[1] == programs[2]
    assert (seen[0] != seen[1]).any() and (seen[0] != seen[2]).any()


@table
def test_a_constant_model_gives_flags_not_nan(attack, threat):
    net, hot = conv_model().args[0]
    model = Partial(poisoned, (jax.tree.map(jnp.zeros_like, net), hot))
    found = answer(wire(attack, threat), model, np.arange(16))
    assert (found.flags["zero_gradient"] == (found.grads > 0)).all() and not found.flags["nonfinite"].any()
    assert np.isfinite(found.x).all() and np.isfinite(found.score).all()
    assert core.feasible(build(threat), found.x, data()[0][:16]).all()


@table
def test_every_leaf_of_the_state_and_of_the_result_has_the_batch_first(attack, threat):
    a, model = wire(attack, threat), dense_model()
    x, y, index = batch(np.arange(5))
    keys = core.example_keys(jax.random.key(0), a.name, index)
    state = jax.eval_shape(a.init, keys, model, x, y)
    after = jax.eval_shape(a.step, state, model, x, y)
    result = jax.eval_shape(a.result, after, model, x, y)
    assert all(leaf.shape[:1] == (5,) for leaf in jax.tree.leaves((state, after, result)))
    kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(s)] for s in (state, after)]
    assert kinds[0] == kinds[1] and jax.tree.structure(state) == jax.tree.structure(after)
    assert jax.eval_shape(a.done, state).shape == (5,)


@table
def test_bfloat16_inputs_are_accepted(attack, threat):
    x, y, index = batch(np.arange(16))
    found = jax.eval_shape(wire(attack, threat).run, jax.random.key(0), dense_model(), x.astype(jnp.bfloat16), y)
    assert found.x.dtype == jnp.float32  # raised: budgets and boxes are not representable in bfloat16
    if (attack, threat) == ("pgd", "linf"):
        found = run(wire(attack, threat), jax.random.key(0), dense_model(), x.astype(jnp.bfloat16), y, index)
        given = np.asarray(x.astype(jnp.bfloat16), np.float32)
        assert core.feasible(build(threat), np.asarray(found.x), given).all()


def same(got, want, tolerance=1e-4):
    """Equal up to rounding: a rounding may flip the sign of a gradient near zero, so decisions and scores decide."""
    np.testing.assert_array_equal(got.success, want.success)
    np.testing.assert_allclose(got.score, want.score, atol=tolerance, rtol=tolerance)


MINIMUM = (
    "nes",
    "simba",
    "deepfool",
    "ddn",
    "fmn",
    "newtonfool",
    "carlini",
    "ead",
    "lbfgs",
    "jsma",
    "sparsefool",
    "adam_pgd",
)
SOME = [pytest.param(a, t, id=f"{a}-{t}") for a, t in [*(("pgd", t) for t in ALL), ("mi_fgsm", "l1")]]
MORE = [
    pytest.param(a, t, id=f"{a}-{t}", marks=pytest.mark.slow)
    for a, t in TABLE
    if a in ("apgd_ce", "fab", "fab_t", "vmi_fgsm", *MINIMUM) and (a, t) == FIRST[a] or (a, t) == ("apgd_ce", "l1")
]
transforms = pytest.mark.parametrize(("attack", "threat"), SOME + MORE, scope="module")


@pytest.mark.parametrize(("attack", "threat"), SOME, scope="module")  # one operation after the other: dear, and alike
def test_jit_is_no_jit(attack, threat):
    x, y, index = batch(np.arange(16))
    a = wire(attack, threat)
    same(a.run(jax.random.key(0), dense_model(), x, y, index=index), answer(a, dense_model(), np.arange(16)))


@transforms
def test_vmap_over_radii_is_a_loop(attack, threat):
    x, y, index = batch(np.arange(16))
    scales = (0.3, 1.0)
    many = jax.jit(
        jax.vmap(lambda a: a.run(jax.random.key(0), dense_model(), x, y, index=index), in_axes=0),
    )
    stacked = jax.tree.map(
        lambda *v: jnp.stack([jnp.asarray(i) for i in v]), *[wire(attack, threat, s) for s in scales]
    )
    swept = jax.device_get(many(stacked))
    for i, scale in enumerate(scales):
        same(
            jax.tree.map(lambda leaf, i=i: leaf[i], swept),
            answer(wire(attack, threat, scale), dense_model(), range(16)),
        )


@transforms
def test_other_batch_shapes_and_shards_change_rounding_only(attack, threat):
    a, model, index = wire(attack, threat), dense_model(), np.arange(16)
    whole = answer(a, model, index)
    parts = [answer(a, model, index[i : i + 5]) for i in (0, 5)]
    same(jax.tree.map(lambda *v: np.concatenate(v), *parts), jax.tree.map(lambda leaf: leaf[:10], whole))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, y, i = batch(index)
    sharded = jax.jit(
        jax.shard_map(
            lambda x, y, i: a.run(jax.random.key(0), model, x, y, index=i),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
        )
    )
    same(jax.device_get(sharded(x, y, i)), whole)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["apgd_t", "square", "nes", "geoda", "carlini"])
def test_rows_shared_over_devices_by_their_type_change_rounding_only(attack):
    """What types have no rules for: rows of tables, draws beside rows, several points of a row."""
    a, model, index = wire(*FIRST[attack]), dense_model(), np.arange(16)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x, y, i = (jax.device_put(v, jax.sharding.NamedSharding(mesh, P("data"))) for v in batch(index))
    same(jax.device_get(run(a, jax.random.key(0), model, x, y, i)), answer(a, model, index))


@pytest.mark.parametrize(("attack", "threat"), [("pgd", "linf"), ("pgd", "l1"), ("mi_fgsm", "l2"), ("r_fgsm", "union")])
def test_in_float64_other_batch_shapes_decide_the_same(attack, threat):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: np.asarray(p, np.float64), dense_model().args[0])
        model = Partial(dense, jax.tree.map(jnp.asarray, params))
        x, y, i = (
            jnp.asarray(np.asarray(v, d)) for v, d in zip(batch(np.arange(12)), (np.float64, np.int32, np.int32))
        )
        a = ATTACKS[attack](build(threat))
        go = jax.jit(lambda x, y, i: a.run(jax.random.key(0), model, x, y, index=i))
        whole, half = go(x, y, i), go(x[7:], y[7:], i[7:])
        np.testing.assert_array_equal(half.success, whole.success[7:])
        np.testing.assert_allclose(half.x, whole.x[7:], atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "threat"),
    [
        ("pgd", "linf"),
        ("pgd", "l1"),
        ("apgd_ce", "l1"),
        ("apgd_t", "linf"),
        ("fab", "linf"),
        ("fab_t", "l2"),
        ("deepfool", "l2"),
        ("lbfgs", "l2"),
        ("fmn", "linf"),
        ("vmi_fgsm", "linf"),
    ],
)
def test_served_from_slots_is_run(attack, threat):
    a, model = wire(attack, threat, early=True), dense_model()
    x, y, index = batch(np.arange(11))
    want = answer(a, model, np.arange(11))
    order = np.random.default_rng(3).permutation(11)
    straight = core.serve(a, jax.random.key(0), model, x, y, slots=3, index=index)
    same(straight, want)
    np.testing.assert_array_equal(straight.queries, want.queries)
    mixed = core.serve(a, jax.random.key(0), model, x[order], y[order], slots=3, index=index[order])
    back = jax.tree.map(lambda leaf: np.asarray(leaf)[np.argsort(order)], mixed)
    for got, ref in zip(jax.tree.leaves(back), jax.tree.leaves(straight), strict=True):
        assert got.tobytes() == np.asarray(ref).tobytes()
    assert len(set(np.asarray(want.queries).tolist())) > 1  # rows finish at different times, so slots are refilled
