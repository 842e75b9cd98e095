"""Transfer attacks: closed forms, reductions to the momentum method, steps by hand, SciPy, and torchattacks."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.tree_util import Partial
from scipy import signal, special, stats

from jaxadv import core, losses
from jaxadv.attacks import (
    ATTACKS,
    Diverse,
    Ensemble,
    GradientAttack,
    Members,
    Scales,
    Transferable,
    Translations,
    View,
    di_fgsm,
    mean_logits,
    mean_probabilities,
    mi_fgsm,
    ni_fgsm,
    si_fgsm,
    ti_fgsm,
    transfer,
    transferable,
    vmi_fgsm,
)
from jaxadv.attacks.transferable import sampling
from jaxadv.evaluate.protocols import describe
from jaxadv.threats import l0, l2, linf

KEY = jax.random.key(0)
FIXTURE = Path(__file__).parents[1] / "fixtures" / "transferable_torch.npz"
SHAPE = (6, 5, 2)


def linear(w, x):
    return x.reshape(x.shape[0], -1) @ w


def curved(params, x):
    return jnp.tanh(x.reshape(x.shape[0], -1) @ params[0]) @ params[1]


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]) * 2, jnp.float32)


def net(seed):
    rng = np.random.default_rng(seed)
    return Partial(curved, (draw(rng, 60, 20), draw(rng, 20, 4)))


MODEL = net(1)
X = jnp.asarray(np.random.default_rng(2).uniform(0.2, 0.8, (6, *SHAPE)), jnp.float32)
Y = jnp.argmax(MODEL(X), -1).astype(jnp.int32)
KEYS = core.example_keys(KEY, "views", jnp.arange(6))


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def slope(model, y, point):
    return jax.grad(lambda p: losses.minus_cross_entropy(model(p), y).sum())(point)


def through(view, ask=None, model=None, point=X):
    """What a view makes of a way of asking; by default of the identity."""
    asked = view(ask or (lambda model, keys, point: point))
    return np.asarray(jax.jit(lambda model, keys, point: asked(model, keys, point))(model, KEYS, point))


def smoothed(grad, kernel):
    """SciPy's convolution of each channel with the kernel of the authors' code."""
    bell = stats.norm.pdf(np.linspace(-3, 3, kernel))
    square = np.outer(bell, bell) / np.outer(bell, bell).sum()
    grad = np.asarray(grad, np.float64)
    planes = [[signal.convolve2d(row[..., c], square, mode="same") for c in range(grad.shape[-1])] for row in grad]
    return np.moveaxis(np.asarray(planes), 1, -1)


def test_on_a_linear_model_every_one_ends_in_the_corner_of_its_direction():
    w = draw(np.random.default_rng(3), 60, 2)
    model, y = Partial(linear, w), jnp.argmax(linear(w, X), -1).astype(jnp.int32)
    rise = np.asarray((w[:, 1] - w[:, 0]).reshape(SHAPE))[None] * np.where(y == 0, 1, -1)[:, None, None, None]
    everything = transferable(linf(0.1), look_ahead=True, neighbors=2, views=(Translations(7), Scales(2)), name="all")
    for attack in (ni_fgsm(linf(0.1)), si_fgsm(linf(0.1)), vmi_fgsm(linf(0.1), neighbors=3), everything):
        way = smoothed(rise, 7) if attack.name == "all" else rise
        np.testing.assert_allclose(go(attack, model, X, y).x, X + 0.1 * np.sign(way), atol=1e-6)
    assert (np.sign(smoothed(rise, 7)) != np.sign(rise)).mean() > 0.1


def test_views_that_change_nothing_give_the_momentum_method_to_the_bit():
    settings = {"steps": 4, "step_size": 0.03, "name": "mi_fgsm"}
    want = go(mi_fgsm(linf(0.1), **settings), MODEL, X, Y)
    none = transferable(linf(0.1), views=(Scales(1), Diverse(0.0), Translations(1)), **settings)
    found = go(none, MODEL, X, Y)
    np.testing.assert_array_equal(found.x, want.x)
    np.testing.assert_array_equal(found.queries, want.queries + 4)  # the verdict has a pass of its own
    np.testing.assert_array_equal(found.grads, want.grads)
    still = go(transferable(linf(0.1), neighbors=2, beta=0.0, **settings), MODEL, X, Y)
    np.testing.assert_array_equal(still.x, want.x)  # twice a number is exact, and so is half of it
    np.testing.assert_array_equal(still.grads, 3 * want.grads)
    plain, blind = (go(make(linf(0.1), steps=4, decay=0.0, keep="last"), MODEL, X, Y) for make in (mi_fgsm, ni_fgsm))
    np.testing.assert_array_equal(blind.x, plain.x)
    np.testing.assert_array_equal(blind.queries, plain.queries)  # nothing depends on a verdict on the path


WAVE = jnp.cos(1.7 * jnp.arange(60.0)).reshape(SHAPE)


def still(self, keys, point, factor=1.0):
    """A fixed neighbor in the place of a random one."""
    return point + factor * self.threat.eps * WAVE[None]


@pytest.mark.parametrize("kind", [linf, l2])
def test_all_together_take_the_steps_of_the_papers(kind, monkeypatch):
    """Nesterov, variance tuning, smoothing and scales in NumPy, in the order of the authors' composite code."""
    monkeypatch.setattr(GradientAttack, "_around", still)
    eps, size, decay = 0.4, 0.07, 0.8
    attack = transferable(
        kind(eps), steps=4, step_size=size, decay=decay, look_ahead=True, neighbors=2, beta=0.6,
        views=(Translations(5), Scales(3, center=0.5)), keep="last", name=f"by hand {kind.__name__}",
    )  # fmt: skip
    ask = jax.jit(lambda point: slope(MODEL, Y, point))

    def scaled(point):
        parts = [0.5**i * np.asarray(ask(jnp.asarray(0.5 + (point - 0.5) / 2**i, jnp.float32))) for i in range(3)]
        return smoothed(np.mean(parts, 0), 5)

    def norm(value, p):
        return np.linalg.norm(value.reshape(6, -1), p, axis=-1)[:, None, None, None]

    x = np.asarray(X, np.float64)
    point, memory, variance = x, np.zeros_like(x), np.zeros_like(x)
    for _ in range(4):
        unit = 60 if kind is linf else np.sqrt(60)
        grad = scaled(point - size * unit * decay * memory)
        total, variance = grad + variance, scaled(point + 0.6 * eps * np.asarray(WAVE)) - grad
        memory = decay * memory + total / norm(total, 1)
        move = np.sign(memory) if kind is linf else memory / norm(memory, 2)
        point = np.clip(point - size * move, 0, 1)
        away = point - x
        point = x + (np.clip(away, -eps, eps) if kind is linf else away * np.minimum(1, eps / norm(away, 2)))
    np.testing.assert_allclose(go(attack, MODEL, X, Y).x, point, atol=2e-5)


def test_smoothing_is_scipys_convolution_and_sums_to_one():
    for kernel in (3, 5, 15):
        np.testing.assert_allclose(through(Translations(kernel)), smoothed(X, kernel), atol=1e-6)
        assert Translations(kernel).weights().sum() == pytest.approx(1)
    np.testing.assert_array_equal(through(Translations(1)), X)


def test_the_gradient_of_scales_is_that_of_the_mean_loss():
    def mean(point):
        copies = [MODEL(0.5 + (point - 0.5) / 2**i) for i in range(4)]
        return sum(losses.minus_cross_entropy(z, Y).sum() for z in copies) / 4

    got = through(Scales(4, center=0.5), lambda model, keys, point: slope(model, Y, point), MODEL)
    np.testing.assert_allclose(got, jax.grad(mean)(X), atol=1e-6)


def test_shrunk_images_are_those_of_torch():
    stored = np.load(FIXTURE)
    for mode in ("bilinear", "nearest"):
        for want, (size, top, left) in zip(stored[mode], stored["places"]):
            down, across = (
                np.asarray(sampling(8, jnp.asarray([size]), jnp.asarray([at]), mode == "nearest"))[0]
                for at in (top, left)
            )
            got = np.einsum("pq,qwc,rw->prc", down, stored["x"][0], across)
            np.testing.assert_allclose(got, want, atol=1e-6)


def test_each_image_is_shrunk_and_placed_by_itself_and_the_gradient_comes_back():
    many = jnp.ones((400, 12, 20, 1))
    keys = core.example_keys(KEY, "shrunk", jnp.arange(400))
    view = Diverse(chance=0.4, least=0.5, fill=0.25)
    seen = np.asarray(jax.jit(view.view)(keys, many))[..., 0]
    assert np.isclose(seen, 1, atol=1e-5).any() and (np.isclose(seen, 1, atol=1e-5) | (seen == 0.25)).all()
    laid = seen > 0.5
    high, wide = laid.any(2).sum(1), laid.any(1).sum(1)
    changed = (high < 12) | (wide < 20)
    assert abs(changed.mean() - 0.4) < 4 * np.sqrt(0.24 / 400)
    assert set(high[changed]) == set(range(6, 12)) and set(wide[changed]) == set(range(10, 20))
    assert (np.abs(high - 0.6 * wide)[changed] <= 1).all()  # the same share of both sides
    first = laid.any(2).argmax(1)
    assert first[changed].max() == 5 and first[changed].min() == 0
    beside = np.roll(np.arange(400), 7)  # in another place, beside others
    np.testing.assert_array_equal(jax.jit(view.view)(keys[beside], many)[..., 0], seen[beside])
    rng = np.random.default_rng(4)  # without a ground the view is linear, so the gradient must be its transpose
    images, cover = (jnp.asarray(rng.normal(size=(6, *SHAPE)), jnp.float32) for _ in range(2))
    view = Diverse(chance=0.7, least=0.4)
    back = through(view, lambda model, keys, point: cover, point=images)
    forth = np.asarray(jax.jit(view.view)(KEYS, images))
    np.testing.assert_allclose((back * images).sum((1, 2, 3)), (forth * cover).sum((1, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not np.allclose(forth, images)


def test_draws_differ_from_step_to_step_and_from_row_to_row():
    attack = transferable(linf(0.1), views=(Scales(2), Diverse(1.0, least=0.4)), neighbors=2)
    same, labels = X.at[:].set(X[:1]), jnp.broadcast_to(Y[:1], Y.shape)
    state = attack.init(core.example_keys(KEY, attack.name, jnp.arange(6)), MODEL, same, labels)
    asked = jax.jit(lambda state: attack._ask(state, MODEL, same, labels))
    now, (_, spread) = [asked(state)[i] for i in (0, 2)]
    later = asked(state._replace(step=state.step + 1))[0]
    assert not np.allclose(now[0], now[1]) and not np.allclose(now, later) and not np.allclose(spread[0], spread[1])
    np.testing.assert_array_equal(now, asked(state)[0])


def central(f, point, cells, h=1e-3):
    """Finite differences at some cells, in float64."""
    out = []
    for cell in cells:
        step = np.zeros(point.shape)
        step[(slice(None), *cell)] = h
        out.append((f(point + step) - f(point - step)) / (2 * h))
    return np.stack(out, -1)


def wide_logits(model, x):
    """A network's logits in NumPy, float64."""
    first, second = (np.asarray(p, np.float64) for p in model.args[0])
    return np.tanh(x.reshape(len(x), -1) @ first) @ second


def loss_of(z):
    return z[np.arange(len(z)), Y] - special.logsumexp(z, axis=-1)


MEMBERS, WEIGHTS = (net(1), net(5), net(6)), (1.0, 2.0, 5.0)
SHARES = np.asarray(WEIGHTS) / 8


def test_gradients_of_ensembles_are_those_of_finite_differences():
    cells = [(0, 0, 0), (2, 3, 1), (5, 4, 0)]
    wholes = {
        "logits": lambda x: loss_of(sum(w * wide_logits(m, x) for w, m in zip(SHARES, MEMBERS))),
        "probabilities": lambda x: loss_of(
            np.log(sum(w * special.softmax(wide_logits(m, x), -1) for w, m in zip(SHARES, MEMBERS)))
        ),
        "losses": lambda x: sum(w * loss_of(wide_logits(m, x)) for w, m in zip(SHARES, MEMBERS)),
    }
    models = {"probabilities": mean_probabilities(*MEMBERS, weights=WEIGHTS)}
    models["logits"] = models["losses"] = mean_logits(*MEMBERS, weights=WEIGHTS)
    for name, whole in wholes.items():
        view = Members() if name == "losses" else Same()
        got = through(view, lambda model, keys, point: slope(model, Y, point), models[name])
        want = central(whole, np.asarray(X, np.float64), cells)
        np.testing.assert_allclose(np.stack([got[(slice(None), *c)] for c in cells], -1), want, atol=1e-4)
    assert isinstance(models["logits"], Ensemble)


class Same(View):
    def __call__(self, ask):
        return ask


def test_gradients_of_equal_size_and_ensembles_of_one():
    model = mean_logits(*MEMBERS, weights=WEIGHTS)
    got = through(Members(equal=True), lambda model, keys, point: slope(model, Y, point), model)
    each = [np.asarray(slope(m, Y, X)) for m in MEMBERS]
    want = sum(w * g / np.abs(g).sum((1, 2, 3), keepdims=True) for w, g in zip(SHARES, each))
    np.testing.assert_allclose(got, want, atol=1e-7)
    for mix in (mean_logits, mean_probabilities):
        np.testing.assert_allclose(jax.nn.softmax(mix(MODEL, MODEL)(X)), jax.nn.softmax(MODEL(X)), atol=1e-6)
    np.testing.assert_array_equal(mean_logits(MODEL)(X), MODEL(X))


def test_an_ensemble_is_a_surrogate_and_what_is_spent_is_counted():
    source, victim = mean_logits(*MEMBERS[1:]), MODEL
    views = (Members(), Scales(2))
    attack = transfer(linf(0.3), source, attack=lambda t: transferable(t, steps=3, views=views, neighbors=1))
    found = go(attack, victim, X, Y)
    np.testing.assert_array_equal(found.success, np.argmax(victim(found.x), -1) != Y)
    np.testing.assert_array_equal(found.grads, 3 * 2 * 2 * 2)
    np.testing.assert_array_equal(found.queries, 3 * (2 * 2 * 2 + 1) + 3 + 1)
    assert (np.asarray(losses.margin(source(found.x), Y)) < np.asarray(losses.margin(source(X), Y))).all()


def bowl(x):
    return jnp.stack([jnp.sum(x**2, (1, 2, 3)) / 2, 0 * x[:, 0, 0, 0]], -1)


def first(logits, y):
    return logits[:, 0]


@jax.jit
def tuning(attack, model, y):
    """What the neighbors of the first step add to its gradient."""
    return attack._ask(attack.init(KEYS, model, X, y), model, X, y)[2][1]


def test_neighbors_are_uniform_in_their_cube_and_independent():
    """Where the gradient is the point itself, what they add is the mean of their noise."""
    attack = vmi_fgsm(linf(0.2), neighbors=16, beta=2.0, loss=first)
    noise = np.asarray(tuning(attack, Partial(bowl), 0 * Y))
    assert np.abs(noise).max() < 0.4 and abs(noise.mean()) < 4 * 0.4 / np.sqrt(48 * noise.size)
    np.testing.assert_allclose(noise.std(), 0.4 / np.sqrt(48), rtol=0.15)


def test_neighbors_without_finite_gradients_do_not_count():
    sick = Partial(lambda x: MODEL(x) * jnp.where(x.min((1, 2, 3)) < 0.0, jnp.nan, 1.0)[:, None])
    attack = vmi_fgsm(linf(0.2), neighbors=2, beta=5.0)
    np.testing.assert_allclose(tuning(attack, sick, Y), -slope(MODEL, Y, X), atol=1e-6)  # all of them lie outside


def test_reports_tell_the_settings_and_equal_attacks_share_a_program():
    one, two = (di_fgsm(linf(eps), views=(Diverse(0.7), Scales(3))) for eps in (0.1, 0.2))
    assert jax.tree.structure(one) == jax.tree.structure(two)
    other = di_fgsm(linf(0.1), views=(Diverse(0.6), Scales(3)))
    assert jax.tree.structure(one) != jax.tree.structure(other)
    told = describe(one)
    assert told["views"][1] == "Scales(copies=3, center=0.0)" and "chance=0.7" in told["views"][0]
    assert told["look_ahead"] is False and describe(ni_fgsm(linf(0.1)))["look_ahead"] is True
    assert (
        isinstance(one, Transferable)
        and ATTACKS["ti_fgsm"] is ti_fgsm
        and ti_fgsm(linf(0.1)).views == (Translations(7),)
    )


def test_settings_are_checked():
    for bad, words in (
        (lambda: transferable(l0(3.0)), "norm ball linf or l2 or l1 for transferable; got l0"),
        (lambda: transferable(linf(0.1), neighbors=-1), "neighbors must be a whole number"),
        (lambda: transferable(linf(0.1), beta=-1.0), "beta must be finite"),
        (lambda: transferable(linf(0.1), views=(mi_fgsm,)), "views must hold views"),
        (lambda: transferable(linf(0.1), transform=None), "transform"),
        (lambda: Scales(0), "copies must be"),
        (lambda: Diverse(1.5), "chance must lie"),
        (lambda: Translations(4), "odd"),
        (lambda: mean_logits(), "at least one model"),
        (lambda: mean_logits(MODEL, weights=(1.0, 2.0)), "1 positive numbers"),
        (lambda: mean_logits(MODEL, MODEL, weights=(1.0, 0.0)), "2 positive numbers"),
        (lambda: through(Members(), model=MODEL), "Members needs an ensemble"),
        (lambda: through(Diverse(), point=X[..., 0]), r"Diverse needs images \[b, h, w, c\]"),
        (lambda: through(Translations(), point=X[..., 0]), "Translations needs images"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()
    with pytest.raises(TypeError, match="View must define"):
        View()(lambda model, keys, point: point)


def cnn(params, x):
    numbers = ("NHWC", "OIHW", "NHWC")
    for name in ("0", "2"):
        x = lax.conv_general_dilated(x, params[f"{name}.weight"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=numbers)
        x = jax.nn.softplus(x + params[f"{name}.bias"].reshape(1, 1, 1, -1))
    x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
    x = jax.nn.softplus(x @ params["5.weight"].T + params["5.bias"][None])
    return x @ params["7.weight"].T + params["7.bias"][None]


@pytest.mark.parametrize(
    "names",
    [("ti_di", "si_ni", "vni"), pytest.param(("mi", "ni", "di", "ti", "vmi"), marks=pytest.mark.slow)],
    ids=["together", "alone"],
)
def test_parity_with_torchattacks(names, monkeypatch):
    """In float64 the paths are the same; a pixel may differ only where a gradient is zero up to rounding."""
    stored = np.load(FIXTURE)
    pattern, beta = stored["pattern"], stored["beta"].item()
    monkeypatch.setattr(
        GradientAttack,
        "_around",
        lambda self, keys, point, factor=1.0: point + factor * self.threat.eps * pattern[None],
    )
    least, kernel = stored["least"].item(), stored["kernel"].item()
    diverse, smooth = Diverse(1.0, least=least), Translations(kernel)
    wirings = {
        "mi": {},
        "ni": {"look_ahead": True},
        "di": {"views": (diverse,)},
        "ti": {"views": (smooth,)},
        "ti_di": {"views": (smooth, diverse)},
        "si_ni": {"views": (Scales(stored["copies"].item()),), "look_ahead": True},
        "vmi": {"neighbors": 1, "beta": beta},
        "vni": {"neighbors": 1, "beta": beta, "look_ahead": True},
    }
    eps, steps, size = (stored[k].item() for k in ("eps", "steps", "step_size"))
    with jax.enable_x64(True):
        params = {k[2:]: jnp.asarray(v, jnp.float64) for k, v in stored.items() if k.startswith("w.")}
        x, y = jnp.asarray(stored["x"], jnp.float64), jnp.asarray(stored["y"])
        np.testing.assert_allclose(cnn(params, x), stored["logits"], atol=1e-10)
        for name in names:
            settings = {"steps": steps, "step_size": size, "keep": "last", "name": f"torch {name}"}
            attack = transferable(linf(eps), **settings, **wirings[name])
            found = np.asarray(go(attack, Partial(cnn, params), x, y).x)
            agree = np.abs(found - stored[name]) < 1e-6
            assert agree.mean() >= 0.999, f"{name}: {(~agree).sum()} of {agree.size} pixels differ"
    apart = [(np.abs(stored[name] - stored["mi"]) > 1e-3).mean() for name in wirings if name != "mi"]
    assert min(apart) > 0.01  # each is an attack of its own
