"""ZeroSNet: roots against their table and powers of companion matrices, order by slope, parity, its relatives."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.claims import framework
from benchmarks.parity.zerosnet import draw
from jaxadv import models
from jaxadv.continuous import zerostable as zs
from jaxadv.models.adapt import flatten, unflatten
from jaxadv.models.resnets import ResNet

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "zerosnet_torch.npz"


def companion(a):
    return np.vstack([np.asarray(a, float), np.eye(len(a))[:-1]])


def test_coefficients_fulfill_the_order_conditions_for_every_k():
    for k in np.random.default_rng(0).normal(size=20) * 3:
        (a0, a1, a2), b0 = zs.coeffs_from_k(float(k))
        np.testing.assert_allclose([a0 + a1 + a2, b0 - a1 - 2 * a2, a1 + 4 * a2], 1, rtol=1e-12)
        p, q = (k - 3) / (4 * k), (k + 1) / (4 * k)  # (rho - 1)(rho^2 + p rho + q)
        np.testing.assert_allclose([1, -a0, -a1, -a2], np.polymul([1, -1], [1, p, q]), atol=1e-12)
    with pytest.raises(ValueError, match="k must not be 0"):
        zs.coeffs_from_k(0.0)


def test_the_table_of_roots():
    for k, root in {-9 / 5: 1 / 3, -3: 0.4082, 1: 0.7071, 0.34: 0.9926, -0.5: 1.8828, 1e9: 0.5, -1: 1.0}.items():
        assert zs.extraneous(zs.coeffs_from_k(k)[0]) == pytest.approx(root, abs=1e-4), k
    assert np.abs(zs.char_roots(zs.UNSTABLE[:3]))[0] == pytest.approx(1.8393, abs=1e-4)
    (a, b) = zs.coeffs_from_k(zs.OPT_K)
    np.testing.assert_allclose((*a, b), (1 / 3, 5 / 9, 1 / 9, 16 / 9), rtol=1e-12)
    grid = np.concatenate([np.linspace(-6, -1.01, 200), np.linspace(0.34, 6, 200)])
    assert min(zs.extraneous(zs.coeffs_from_k(k)[0]) for k in grid) > 1 / 3 - 1e-6  # the best of the family
    np.testing.assert_allclose(zs.char_roots((1.0, 0.0, 0.0)), [1, 0, 0], atol=1e-12)
    assert zs.extraneous((1.0,)) == 0


@pytest.mark.parametrize("k", [-5.0, -9 / 5, -1.01, -1.0, -0.99, -0.2, 0.2, 1 / 3, 0.34, 1.0, 5.0])
def test_zero_stable_is_that_powers_of_the_companion_matrix_stay_bounded(k):
    a, _ = zs.coeffs_from_k(k)
    with np.errstate(over="ignore", invalid="ignore"):
        size = [np.linalg.norm(np.linalg.matrix_power(companion(a), n)) for n in (1000, 4000)]
    assert zs.is_zero_stable(a) == (size[1] < 1.5 * size[0]) == (k <= -1 or k > 1 / 3)


def test_zero_stability_looks_at_simple_roots_only_on_the_edge():
    assert zs.is_zero_stable((0.5, 0, -0.0)) and not zs.is_zero_stable((2.0, -1.0, 0.0))  # 1/2, 0, 0; 1 twice
    assert not zs.is_zero_stable(zs.UNSTABLE[:3])


def test_a_perturbation_travels_by_powers_of_the_companion_matrix():
    a, b = zs.coeffs_from_k(-0.5)
    history = tuple(jnp.asarray(v) for v in (0.3, -1.0, 2.0))
    ours = zs.multistep(jnp.zeros_like, history, 12, 1.0, a, b)
    state, want = np.array([0.3, -1.0, 2.0]), []
    for _ in range(12):
        state = companion(a) @ state
        want.append(state[0])
    np.testing.assert_allclose(ours, want, rtol=1e-4)


@pytest.mark.parametrize("k", [zs.OPT_K, 1.0])
def test_the_error_falls_with_the_square_of_the_step(k):
    a, b = zs.coeffs_from_k(k)
    error = []
    with jax.enable_x64(True):
        for steps in (40, 80, 160):
            h = 1 / steps
            history = tuple(jnp.exp(jnp.asarray(-h * i)) for i in (2, 1, 0))
            error.append(abs(float(zs.multistep(lambda x: -x, history, steps - 2, h, a, b)[-1]) - np.exp(-1)))
    np.testing.assert_allclose(np.log2(np.divide(error[:-1], error[1:])), 2, atol=0.1)


def test_a_trained_k_stays_stable():
    u = jnp.linspace(-20, 20, 9)
    k = np.asarray(zs.stable_k(u))
    assert (k <= -1).all() and (np.diff(k) <= 0).all()
    assert all(zs.is_zero_stable(zs.coeffs_from_k(float(v))[0]) for v in k)


def theirs(path):
    """The name in the authors' state dict."""
    words = list(path)
    if words[0] == "blocks":
        kind = words[2]
        if kind == "k":
            return f"blocks.{words[1]}.coe"
        if kind.startswith("side"):
            words = ["downsample1", "downsample", "0" if kind == "side_norm" else "2", words[3]]
        elif kind == "projections":
            words = ["blocks", words[1], "downsample_" + ("x", "l", "ll")[int(words[3])], "downsample_", "0", words[4]]
        else:
            words = ["blocks", words[1], {"norms": "bn", "convs": "conv"}[kind] + str(int(words[3]) + 1), words[4]]
    leaf = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    words[-1] = leaf.get(words[-1], words[-1])
    return ".".join("fc" if w == "linear" else w for w in words)


def drawn(tree):
    made = {}
    for path, leaf in flatten(tree).items():
        turn = {4: (2, 3, 1, 0), 2: (1, 0)}.get(leaf.ndim, tuple(range(leaf.ndim)))
        shape = [0] * leaf.ndim
        for ours, place in enumerate(turn):
            shape[place] = leaf.shape[ours]
        value = draw(theirs(path), tuple(shape) or (1,))
        made[path] = jnp.asarray(value.transpose(turn) if leaf.ndim else value[0])
    return unflatten(made)


def filled(shape=(8, 8, 1), classes=3, **options):
    """A network whose weights are drawn by name, without the cost of drawing them on the device."""
    made = jax.eval_shape(lambda: zs.zerosnet(jax.random.key(0), shape=shape, classes=classes, **options))
    return made._replace(params=drawn(made.params), state=drawn(made.state))


def count(net):
    return sum(leaf.size for leaf in jax.tree.leaves(net.params))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("trained", {"coefficients": "free"}),
        pytest.param("bottleneck", {"bottleneck": True}, marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_the_authors_code(name, options):
    with np.load(FIXTURE) as held:
        x, want, blocks = held["x"].astype(np.float32), held[f"{name}/logits"], tuple(held[f"{name}/layers"].tolist())
        size = int(held[f"{name}/parameters"])
    net = filled((32, 32, 3), 10, blocks=blocks, **options)
    assert count(net) == size
    logits = jax.jit(lambda p, s, x: net.apply(p, s, x)[0])(net.params, net.state, x)
    np.testing.assert_allclose(logits, want, atol=2e-5)


def test_published_sizes(key):
    with np.load(FIXTURE) as held:
        size = int(held["depth 20/parameters"])
    made = jax.eval_shape(lambda k: zs.zerosnet(k, shape=(32, 32, 3), classes=10, blocks=(zs.DEPTHS[20],) * 3), key)
    assert count(made) == size
    assert all(depth == 6 * n + 2 for depth, n in zs.DEPTHS.items())
    assert all(depth == 9 * n + 2 for depth, n in zs.BOTTLENECK_DEPTHS.items())


def plain_resnet():
    """The residual network of the library with two stages of two blocks."""
    about = {"shortcut": "raw", "final_norm": True, "activation": "relu", "norm": "group", "init": "torch"}
    more = {"dropout": 0.0, "stem_stride": 1, "gated": False, "rngs": nnx.Rngs(1)}
    sizes = {"stem": 2, "widths": (2, 4), "depths": (2, 2), "strides": (1, 2)}
    return models.trainable(ResNet((6, 6, 1), 3, None, None, name="plain", **sizes, **about, **more))


def test_with_one_state_it_is_the_preactivation_residual_network():
    ours = filled((6, 6, 1), blocks=(2, 2), coefficients=(1, 0, 0, 1), widths=(2, 4), norm="group")
    other = jax.eval_shape(plain_resnet)
    places = {"bn1": ("norms", "0"), "bn2": ("norms", "1"), "conv1": ("convs", "0"), "conv2": ("convs", "1")}
    places["shortcut"] = ("projections", "0")
    held, given = flatten(ours.params), {}
    for path in flatten(other.params):
        at = path
        if path[0].startswith("layer"):
            at = ("blocks", str(2 * (int(path[0][-1]) - 1) + int(path[1])), *places[path[2]], path[3])
        given[path] = held[at]
    x = np.random.default_rng(0).uniform(size=(2, 6, 6, 1)).astype(np.float32)
    ask = jax.jit(lambda a, b, x: (ours.apply(a, {}, x)[0], other.apply(b, {}, x)[0]))
    mine, plain = ask(ours.params, unflatten(given), x)
    np.testing.assert_allclose(mine, plain, atol=1e-6)


def test_kinds_of_coefficients():
    kept = filled(coefficients="trainable", widths=(2, 2), blocks=(2, 1), norm="group")
    opt = filled(coefficients="opt", widths=(2, 2), blocks=(2, 1), norm="group")
    params = flatten(kept.params)
    block = {kind: zs.Block(1, 1, 1, (1, 1, 1), coefficients=kind, bottleneck=False, norm="group", rngs=nnx.Rngs(0))
             for kind in ("free", "trainable")}  # fmt: skip
    assert float(block["free"].k[...]) == 1 and len(params) == len(flatten(opt.params)) + 1
    np.testing.assert_allclose(zs.stable_k(block["trainable"].k[...]), zs.OPT_K, rtol=1e-6)
    np.testing.assert_allclose(block["free"].coefficients()[0], (1.5, -1, 0.5), rtol=1e-6)
    same = params | {("blocks", "2", "k"): block["trainable"].k[...]}
    x = np.random.default_rng(0).uniform(size=(2, 8, 8, 1)).astype(np.float32)

    @jax.jit
    def both(params, rest, x):
        value, slope = jax.value_and_grad(lambda p: kept.apply(p, {}, x)[0][:, 0].sum())(params)
        return value, slope["blocks"]["2"]["k"], opt.apply(rest, {}, x)[0][:, 0].sum()

    value, slope, fixed = both(
        unflatten(same), unflatten({path: leaf for path, leaf in same.items() if path[-1] != "k"}), x
    )
    assert float(slope) != 0
    np.testing.assert_allclose(fixed, value, rtol=1e-5)
    assert zs.advance((1.0, 2.0), 3.0, (10, 100), 1000, 2) == (6210.0, 1.0)
    assert zs.ZEROSNETS == {"zerosnet": zs.ZeroSNet} and issubclass(zs.ZeroSNet, models.nets.Net)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": (1, 1, 1)}, "the first at least 2"),
        ({"blocks": (2, 2)}, "one number for each of widths"),
        ({"coefficients": "best"}, "unknown coefficients"),
        ({"coefficients": (1, 0, 0)}, "four numbers"),
        ({"coefficients": 0}, "k must not be 0"),
        ({"norm": "none"}, "unknown norm"),
    ],
)
def test_impossible_settings_are_refused(options, words, key):
    with pytest.raises(ValueError, match=words):
        zs.zerosnet(key, shape=(8, 8, 1), classes=3, **options)


def test_the_verdict_on_zerosnet():
    claim = framework.load("zerosnet")

    def judged(**clean):
        numbers = {}
        for arm in claim.ARMS:
            level = clean.get({"best (root 0.33)": "best", "residual (root 0)": "plain"}.get(arm, ""), 90.0)
            level = clean["lost"] if arm in claim.UNSTABLE else level
            what = (
                "clean %",
                *(f"{kind} noise %" for kind in ("normal", "uniform", "constant")),
                "AutoAttack, robust %",
            )
            numbers |= {f"{arm}: {name}": [level - 0.1, level, level + 0.1] for name in what}
        return claim.verdict(numbers)

    word, why = judged(best=95.0, plain=93.0, lost=50.0)
    assert word == "holds" and "+2.0" in why and "45.0 points clean" in why
    assert judged(best=93.0, plain=93.0, lost=50.0)[0] == "holds in part"
    assert judged(best=93.0, plain=93.0, lost=95.0)[0] == "does not hold here"
