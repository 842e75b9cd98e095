"""Every method of clipping gives the sum that a gradient for each example gives, over layers of all kinds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxadv.privacy import METHODS, AdaptiveBound, Automatic, Clipped, clipped_grads, mean_over_views
from jaxadv.privacy.clipping import RELATIONS
from jaxadv.privacy.methods import ClipPlan, LeafPlan, Part, arrange, describe
from jaxadv.privacy.uses import Graph, Use, trace

ROWS = 6


def normal(*shape, scale=0.4):
    return scale * np.random.default_rng(sum(shape)).normal(size=shape)


def group_norm(x, scale, bias):
    z = x.reshape(*x.shape[:2], -1, 2)
    z = (z - z.mean((0, 1, 3), keepdims=True)) * lax.rsqrt(z.var((0, 1, 3), keepdims=True) + 1e-3)
    return z.reshape(x.shape) * scale[None, None] + bias[None, None]


def conv(x, w, **options):
    given = {"window_strides": (1, 1), "padding": "SAME"} | options
    return lax.conv_general_dilated(x[None], w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **given)[0]


def cnn(p, example, key):
    """Convolutions of every sort, group norm, weight standardization; nothing but dense at the end has one position."""
    x = jnp.tanh(conv(example["x"], p["plain"]) + p["bias"][None, None])
    x = jnp.tanh(conv(x, p["strided"], window_strides=(2, 2), padding=((1, 0), (0, 1))))
    x = group_norm(conv(x, p["grouped"], feature_group_count=2), p["scale"], p["shift"])
    w = p["standard"] - p["standard"].mean((0, 1, 2), keepdims=True)
    w = w * lax.rsqrt(w.var((0, 1, 2), keepdims=True) + 1e-2) * p["gain"][None, None, None]
    x = jnp.tanh(conv(jnp.tanh(x), w, rhs_dilation=(2, 2)))
    x = x + conv(x, p["up"], lhs_dilation=(2, 2), padding=((1, 1), (1, 1)))[::2, ::2]
    logits = x.reshape(-1) @ p["dense"] + p["end"]
    return -jax.nn.log_softmax(logits)[example["y"]]


CNN = {
    "plain": normal(3, 3, 2, 4),
    "bias": normal(4),
    "strided": normal(2, 2, 4, 4),
    "grouped": normal(3, 3, 2, 6),
    "scale": 1 + normal(6),
    "shift": normal(6),
    "standard": normal(2, 2, 6, 3),
    "gain": 1 + normal(3),
    "up": normal(3, 3, 3, 3),
    "dense": normal(27, 3),
    "end": normal(3),
}


def tokens(p, example, key):
    """A table whose rows repeat, read twice; layer norm, attention, a weight used both ways round, a recurrence."""
    x = p["table"][example["tokens"]] + p["place"]
    x = x + jnp.take(p["table"], example["tokens"][::-1], axis=0, mode="clip")
    z = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-3) * p["scale"][None] + p["shift"][
        None
    ]
    q, k, v = jnp.moveaxis((z @ p["qkv"].reshape(6, 18)).reshape(5, 3, 2, 3), 1, 0)
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k))
    x = x + jnp.einsum("hts,shd->thd", weights, v).reshape(5, 6) @ p["out"]
    x = x + jnp.tanh(x @ p["tied"]) @ p["tied"].T
    last, _ = lax.scan(lambda c, row: (jnp.tanh(c @ p["cell"] + row), None), x[0], x)
    return jnp.square(jnp.einsum("ti,io->to", x, p["head"])).sum() + last.sum()


TOKENS = {
    "table": normal(7, 6),
    "place": normal(5, 6),
    "scale": 1 + normal(6),
    "shift": normal(6),
    "qkv": normal(6, 3, 6),
    "out": normal(6, 6),
    "tied": normal(6, 4),
    "cell": normal(6, 6, scale=0.2),
    "head": normal(6, 2),
}


@jax.custom_vjp
def doubled(w, x):  # its backward pass is not that of its forward pass
    return x @ w


doubled.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, b: (2 * jnp.outer(kept[1], b), kept[0] @ b))


def attacked(p, example, key):
    """An attack inside the example, a clean and an adversarial pass, a product of factors, a penalty, noise, no use."""

    def logits(x):
        z = jnp.tanh(x @ p["first"] + p["bias"])
        return jnp.tanh(doubled(p["odd"], z)) @ (p["left"] @ p["right"])

    def loss(x):
        return -jax.nn.log_softmax(logits(x))[example["y"]]

    x = example["x"].reshape(-1)[:8]
    x = x + 0.1 * jax.random.normal(key, x.shape, x.dtype)
    found = lax.fori_loop(0, 3, lambda _, z: z + 0.05 * jnp.sign(jax.grad(loss)(z)), x + 0.01)
    return loss(x) + 2 * loss(lax.stop_gradient(found)) + 0.1 * jnp.square(p["first"]).sum()


ATTACKED = {
    "first": normal(8, 5),
    "bias": normal(5),
    "odd": normal(5, 4),
    "left": normal(4, 2),
    "right": normal(2, 3),
    "unused": normal(2),
}

CASES = {"cnn": (cnn, CNN), "tokens": (tokens, TOKENS), "attacked": (attacked, ATTACKED)}
FORMULAS = {  # of `book_keeping`, which takes Gram matrices wherever they serve
    "cnn": {
        **dict.fromkeys(("plain", "strided", "grouped", "up", "dense"), "gram"),
        **dict.fromkeys(("bias", "scale", "shift", "end"), "rows"),
        **dict.fromkeys(("standard", "gain"), "rows"),
    },
    "tokens": {
        **dict.fromkeys(("table", "qkv", "out", "head"), "gram"),
        **dict.fromkeys(("place", "scale", "shift", "tied", "cell"), "rows"),
    },
    "attacked": {
        "first": "rows, product",
        "bias": "rows",
        "odd": "rows",
        "left": "rows",
        "right": "rows",
        "unused": "none",
    },
}


def given(case, kind=np.float32):
    data = np.random.default_rng(1)
    batch = {
        "x": data.normal(size=(ROWS, 5, 6, 2)).astype(kind),
        "y": data.integers(0, 3, ROWS).astype(np.int32),
        "tokens": data.integers(-2, 4, (ROWS, 5)).astype(np.int32),
    }
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(ROWS))
    return jax.tree.map(lambda a: jnp.asarray(a, kind), CASES[case][1]), jax.tree.map(jnp.asarray, batch), keys


@functools.cache
def program(case, bound=0.8, methods=("vmap", "two_pass", "ghost", "auto")):
    """Several methods at once; the bound is such that some examples are clipped and some are not."""

    def run(params, batch, mask, keys):
        made = {m: clipped_grads(CASES[case][0], clip_norm=bound, method=m) for m in methods}
        made["parts"] = clipped_grads(CASES[case][0], clip_norm=bound, microbatch=4)
        return {name: clip(params, batch, mask, keys) for name, clip in made.items()}

    return jax.jit(run)


def norm(tree):
    return np.sqrt(sum(np.square(np.asarray(a, np.float64)).sum() for a in jax.tree.leaves(tree)))


def gap(got, want):
    return norm(jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), got, want)) / norm(
        want
    )


@pytest.mark.parametrize("case", [*(pytest.param(c, marks=pytest.mark.slow) for c in ("cnn", "tokens")), "attacked"])
def test_all_methods_give_the_same_sum(case):
    with jax.enable_x64(True):
        run = program(case, methods=tuple(METHODS))
        exact = run(*given(case, np.float64)[:2], None, given(case)[2])
    want, aux = exact["vmap"]
    assert 0 < (np.asarray(aux["norms"]) > 0.8).sum() and np.isfinite(aux["norms"]).all()
    for name, (sums, shown) in exact.items():
        assert gap(sums, want) < 1e-6, name
        np.testing.assert_allclose(shown["norms"], aux["norms"], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(shown["losses"], aux["losses"], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_each_parameter_is_treated_as_it_should_be(case):
    params, batch, keys = given(case)
    loss = CASES[case][0]
    plan = describe("book_keeping", loss, params, batch, keys)
    assert {leaf.name.strip("[]'"): leaf.formula for leaf in plan.leaves} == FORMULAS[case]
    assert isinstance(plan, ClipPlan) and isinstance(plan.leaves[0], LeafPlan)
    assert "gram" in str(plan) or case == "attacked"
    plain = clipped_grads(loss, clip_norm=1.0, method="vmap").plan(params, batch, keys)
    assert {leaf.formula for leaf in plain.leaves} <= {"rows", "none"} and plain.method == "vmap"


# ------------------------------------------------------------------------------------------- every method, in float32


def by_hand(case):
    """The clipped sum in float64, example by example."""
    with jax.enable_x64(True):
        params, batch, keys = given(case, np.float64)
        grad = jax.jit(lambda row: jax.grad(CASES[case][0])(params, *row))
        rows = [jax.device_get(grad(jax.tree.map(lambda a, i=i: a[i], (batch, keys)))) for i in range(ROWS)]
    return jax.tree.map(
        lambda *leaves: sum(leaves), *(jax.tree.map(lambda a, r=r: a * min(1, 0.8 / norm(r)), r) for r in rows)
    )


@pytest.mark.parametrize("case", ("cnn", pytest.param("tokens", marks=pytest.mark.slow)))
def test_float32_rounds_a_little(case):
    params, batch, keys = given(case)
    want = by_hand(case)
    for name, (sums, _) in program(case)(params, batch, jnp.ones(ROWS, bool), keys).items():
        assert gap(sums, want) < 1e-4, name


def dirty(batch, bad):
    """Row 1 holds a value that breaks it, row 4 is a copy of row 5."""
    x = batch["x"].at[4].set(batch["x"][5]).at[1].multiply(bad)
    return {**batch, "x": x, "y": batch["y"].at[4].set(batch["y"][5])}


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_no_example_moves_the_sum_by_more_than_the_bound(bad):
    params, batch, keys = given("cnn")
    batch, mask = dirty(batch, bad), jnp.arange(ROWS) != 2
    run = program("cnn")
    whole = run(params, batch, mask, keys)
    clean = run(params, {**batch, "x": batch["x"].at[1].set(0.0)}, mask.at[1].set(False), keys)
    moved = {name: [] for name in whole}
    for i in range(ROWS):
        less = run(params, batch, mask.at[i].set(False), keys)
        for name, (sums, _) in whole.items():
            moved[name].append(norm(jax.tree.map(np.subtract, sums, less[name][0])))
    for name, (sums, shown) in whole.items():
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(sums)), name
        assert gap(sums, clean[name][0]) < 1e-6, name  # a broken example contributes exactly nothing
        assert max(moved[name]) <= 0.8 * (1 + 1e-5) and max(moved[name]) > 0.79, name
        assert moved[name][1] < 1e-6 and moved[name][2] < 1e-6, name
        assert list(np.isfinite(shown["norms"])) == [i != 1 for i in range(ROWS)] and shown["norms"][2] == 0, name


@pytest.mark.parametrize("garbage", (np.nan, np.inf, 1e30))
def test_rows_that_do_not_count_and_the_order_change_nothing(garbage):
    params, batch, keys = given("cnn")
    mask, order = jnp.arange(ROWS) % 3 != 1, np.random.default_rng(5).permutation(ROWS)
    column = mask.reshape(-1, 1, 1, 1)
    run = program("cnn")
    want = run(params, batch, mask, keys)
    other = run(params, {**batch, "x": jnp.where(column, batch["x"], garbage)}, mask, keys)
    moved = run(params, jax.tree.map(lambda a: a[order], batch), mask[order], keys[order])
    none = run(params, {**batch, "x": jnp.where(column, batch["x"], garbage)}, mask & False, keys)
    for name in want:
        assert gap(other[name][0], want[name][0]) < 1e-6, name
        assert gap(moved[name][0], want[name][0]) < 1e-5, name
        np.testing.assert_allclose(moved[name][1]["norms"], want[name][1]["norms"][order], rtol=1e-5)
        assert norm(none[name][0]) == 0, name


def test_a_convolution_that_is_hidden_is_left_to_vmap():
    params, batch, keys = given("cnn")

    def loss(p, example, key):
        x = conv(example["x"], p["plain"])
        return lax.scan(lambda c, _: (jnp.tanh(conv(c, p["up"][:, :, :, :3])), None), x[..., :3], length=2)[0].sum()

    plan = clipped_grads(loss, clip_norm=1.0).plan(params, batch, keys)
    assert "as vmap" in plan.method and {leaf.formula for leaf in plan.leaves} == {"rows", "none"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own code
def test_the_sum_is_that_of_jax_privacy():
    clipping = pytest.importorskip("jax_privacy.clipping")
    params, batch, _ = given("cnn")

    def loss(params, example):
        return cnn(params, example, None)

    peer = clipping.clipped_grad(loss, l2_clip_norm=0.8, keep_batch_dim=False, return_grad_norms=True)
    want, aux = jax.jit(peer)(params, batch)
    got = program("cnn")(params, batch, jnp.ones(ROWS, bool), given("cnn")[2])
    for name, (sums, shown) in got.items():
        assert gap(sums, want) < 1e-4, name
        np.testing.assert_allclose(shown["norms"], aux.grad_norms, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- kinds of bounds, views


def quadratic(params, example, key):
    """A loss whose gradient is the example, in two layers."""
    return jnp.vdot(params["a"], example[:2]) + jnp.vdot(params["b"], example[2:])


POINTS = np.array([[3.0, 4.0, 0.0], [0.3, 0.4, 1.0], [0.0, 0.0, 0.0], [1e-3, 0.0, 2.0]], np.float32)
ZERO = {"a": jnp.zeros(2), "b": jnp.zeros(1)}


@pytest.mark.parametrize("method", ("vmap", "auto"))
@pytest.mark.parametrize("rescale", (False, True))
def test_a_bound_for_each_layer(method, rescale):
    bounds = {"a": 2.0, "b": 0.5}
    clip = clipped_grads(quadratic, clip_norm=bounds, rescale=rescale, method=method)
    got, aux = clip(ZERO, jnp.asarray(POINTS))
    for name, part in (("a", POINTS[:, :2]), ("b", POINTS[:, 2:])):
        norms = np.linalg.norm(part, axis=1)
        factors = np.minimum(1, bounds[name] / np.maximum(norms, 1e-30)) / (bounds[name] if rescale else 1)
        np.testing.assert_allclose(got[name], factors @ part, rtol=1e-6)
    np.testing.assert_allclose(aux["norms"], np.linalg.norm(POINTS, axis=1), rtol=1e-6)
    np.testing.assert_allclose(clip.sensitivity(), np.sqrt(2) if rescale else np.hypot(2.0, 0.5))
    np.testing.assert_allclose(clip.sensitivity("replace_one"), 2 * clip.sensitivity("replace_special"))
    with pytest.raises(ValueError, match="have the top of the structure of params"):
        clipped_grads(quadratic, clip_norm={"a": 1.0})(ZERO, jnp.asarray(POINTS))
    with pytest.raises(ValueError, match="one bound for all parameters"):
        clipped_grads(quadratic, clip_norm=bounds, method="ghost")(ZERO, jnp.asarray(POINTS))


def test_leaves_of_one_weight_may_have_bounds_of_their_own():
    params, batch, keys = given("cnn")
    groups = {name: 0.05 * (1 + i) for i, name in enumerate(params)}
    want, got = (
        jax.jit(clipped_grads(cnn, clip_norm=groups, method=m))(params, batch, None, keys)[0] for m in ("vmap", "auto")
    )
    assert gap(got, want) < 1e-4


@pytest.mark.parametrize("method", ("vmap", "auto"))
def test_automatic_clipping_is_its_formula(method):
    clip = clipped_grads(quadratic, clip_norm=Automatic(0.1), method=method)
    got, _ = clip(ZERO, jnp.asarray(POINTS))
    norms = np.linalg.norm(POINTS, axis=1, keepdims=True)
    want = (POINTS / (norms + 0.1)).sum(0)
    np.testing.assert_allclose(np.concatenate([got["a"], got["b"]]), want, rtol=1e-6)
    assert clip.sensitivity() == 1 and clip.sensitivity("replace_one") == 2 and (norms / (norms + 0.1) < 1).all()
    with pytest.raises(ValueError, match="rescale must be False"):
        clipped_grads(quadratic, clip_norm=Automatic(), rescale=True)
    with pytest.raises(ValueError, match="gamma"):
        Automatic(0.0)


def test_the_object_that_clips_states_its_sensitivity():
    clip = clipped_grads(quadratic, clip_norm=3.0)
    assert isinstance(clip, Clipped) and [clip.sensitivity(name) for name in RELATIONS] == [3, 3, 6]
    assert clip.sensitivity("ADD_OR_REMOVE_ONE") == 3
    assert clipped_grads(quadratic, clip_norm=3.0, rescale=True).sensitivity("replace_one") == 2
    assert clipped_grads(quadratic, clip_norm=np.inf).sensitivity() == np.inf
    assert jax.jit(lambda c: clipped_grads(quadratic, clip_norm=c).sensitivity("replace_one"))(1.5) == 3
    with pytest.raises(ValueError, match="unknown relation 'add'"):
        clipped_grads(quadratic, clip_norm=1.0).sensitivity("add")
    with pytest.raises(ValueError, match="unknown method 'gost'. Did you mean 'ghost'"):
        clipped_grads(quadratic, clip_norm=1.0, method="gost")
    with pytest.raises(ValueError, match="microbatch must be a whole number"):
        clipped_grads(quadratic, clip_norm=1.0, microbatch=0)


def test_the_cheaper_formula_is_taken():
    def plan(positions, inputs, outputs, method="auto", **params):
        params = {"w": jnp.ones((inputs, outputs)), **params}

        def loss(p, x, key):
            return jnp.sin(x @ p["w"]).sum()

        rows = jnp.ones((2, positions, inputs))
        graph = trace(loss, params, rows, None)
        (part,) = arrange(graph, method)
        (use,) = graph.uses[part.roots[0]]
        assert isinstance(graph, Graph) and isinstance(use, Use) and isinstance(part, Part)
        assert use.sizes() == (positions, inputs, outputs) == part[3:6]
        return part.formula

    assert plan(1, 30, 40) == plan(1, 30, 40, "mixed") == "gram"
    assert plan(50, 30, 40) == plan(50, 30, 40, "mixed") == "rows"  # 2 T^2 > inputs x outputs, and rows are smaller
    assert plan(10, 100, 100) == plan(10, 100, 100, "mixed") == "gram"
    assert plan(60, 100, 100) == "rows" and plan(75, 100, 100, "mixed") == "rows"
    assert plan(90, 10, 3000, "mixed") == "gram" and plan(130, 10, 3000, "mixed") == "rows"


def test_a_loss_of_a_batch_is_refused():
    with pytest.raises(ValueError, match="must return one number for one example"):
        clipped_grads(lambda p, e, k: p["a"] * e[0], clip_norm=1.0)(ZERO, jnp.asarray(POINTS))


@pytest.mark.parametrize("method", ("auto", "ghost", "vmap"))
def test_an_example_of_several_views_is_clipped_once(method):
    views = np.random.default_rng(2).normal(size=(4, 5, 3)).astype(np.float32)
    views[2] = np.concatenate([views[2, :2], -views[2, :2], np.zeros((1, 3))])  # views that cancel
    clip = clipped_grads(mean_over_views(quadratic), clip_norm=0.2, method=method)
    got, aux = clip(ZERO, jnp.asarray(views))
    means = views.astype(np.float64).mean(1)
    norms = np.linalg.norm(means, axis=1)
    np.testing.assert_allclose(aux["norms"], norms, rtol=1e-5, atol=5e-3 if method == "ghost" else 1e-6)
    want = (means * np.minimum(1, 0.2 / np.maximum(norms, 1e-12))[:, None]).sum(0)
    np.testing.assert_allclose(np.concatenate([got["a"], got["b"]]), want, atol=1e-6)
    noisy = mean_over_views(lambda p, e, k: jax.random.normal(k) * e.sum())
    keys = jax.random.split(jax.random.key(0), 5)
    drawn = np.array([jax.random.normal(k) for k in keys])
    np.testing.assert_allclose(noisy(ZERO, views[0], jax.random.key(0)), (drawn * views[0].sum(1)).mean(), rtol=1e-5)


@pytest.mark.parametrize("kind", (jnp.bfloat16, jnp.float16))
def test_half_precision_is_summed_in_float32_and_second_passes_refuse_it(kind):
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(300, 4, 3)), kind)
    params = {"w": jnp.ones((3, 2), kind)}

    def loss(p, x, key):
        return (x @ p["w"]).astype(jnp.float32).sum()

    got, aux = jax.jit(clipped_grads(loss, clip_norm=0.5, method="book_keeping"))(params, rows)
    grads = np.repeat(np.asarray(rows, np.float64).sum(1)[:, :, None], 2, 2)
    norms = np.sqrt((grads**2).sum((1, 2)))
    want = (grads * np.minimum(1, 0.5 / norms)[:, None, None]).sum(0)
    assert got["w"].dtype == jnp.float32
    np.testing.assert_allclose(aux["norms"], norms, rtol=1e-3)
    np.testing.assert_allclose(got["w"], want, rtol=1e-4, atol=1e-3)
    for method in ("ghost", "two_pass"):
        with pytest.raises(ValueError, match="float32 or wider for a second backward pass"):
            clipped_grads(loss, clip_norm=0.5, method=method)(params, rows)


# ---------------------------------------------------------------------------------------------------- adaptive bounds


def test_an_adaptive_bound_finds_the_quantile_and_states_its_price():
    norms = jnp.asarray(np.random.default_rng(0).lognormal(size=401), jnp.float32)
    rule = AdaptiveBound(noise=20.0, expected=401.0, quantile=0.7)
    step = jax.jit(lambda c: rule.update(c, norms, draw=lambda: 0.0))
    bound = jnp.float32(0.01)
    for _ in range(200):
        bound = step(bound)
    assert abs(np.mean(np.asarray(norms) <= bound) - 0.7) < 0.01
    one = rule.update(1.0, norms, jnp.arange(401) < 100, draw=lambda: 2.0)
    count = (np.where(np.asarray(norms) <= 1, 0.5, -0.5))[:100].sum()
    np.testing.assert_allclose(one, np.exp(-0.2 * ((count + 40) / 401 + 0.5 - 0.7)), rtol=1e-6)
    z = 1.1
    np.testing.assert_allclose(rule.gradient_noise(z) ** -2 + (2 * 20.0) ** -2, z**-2)
    assert rule.gradient_noise(z) > z and rule.gradient_noise(0.0) == 0
    lost = jnp.array([jnp.nan, jnp.inf, 1.0])
    assert rule.update(2.0, lost, draw=lambda: 0.0) > 2  # what is not finite counts as above
    with pytest.raises(ValueError, match="exceed half the multiplier"):
        AdaptiveBound(noise=0.5, expected=10.0).gradient_noise(1.0)
    with pytest.raises(ValueError, match="within"):
        AdaptiveBound(noise=1.0, expected=10.0, quantile=1.0)


def test_the_influence_of_an_example_on_the_count_is_one_half():
    rule = AdaptiveBound(noise=1.0, expected=1.0, rate=1.0)
    norms = jnp.asarray([0.5, 2.0, 0.1])
    logs = [np.log(rule.update(1.0, norms, jnp.arange(3) != i, draw=lambda: 0.0)) for i in range(4)]
    np.testing.assert_allclose(np.abs(np.array(logs[:3]) - logs[3]), 0.5, rtol=1e-5)
