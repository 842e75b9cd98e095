"""Canonical convolutions: every form, everywhere a convolution may stand, against the compiler's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxadv.core import FORMS, canonical, loop

NAMES = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}
CASES = {  # spatial, kernel, strides, padding, options
    "plain": (2, (3, 3), (1, 1), "SAME", {}),
    "odd": (2, (3, 3), (1, 1), ((-1, 2), (2, 0)), {}),
    "strided": (2, (4, 4), (2, 2), ((1, 1), (1, 1)), {}),
    "strided_to_few": (2, (4, 3), (2, 2), ((1, 1), (0, 2)), {"outputs": 3}),
    "strided_to_many": (2, (4, 4), (2, 2), ((1, 1), (1, 1)), {"outputs": 20}),
    "to_many": (2, (3, 2), (1, 1), ((1, 0), (2, 1)), {"outputs": 60}),
    "strided_to_very_many": (2, (3, 3), (2, 2), ((1, 1), (1, 2)), {"outputs": 60}),
    "to_few": (2, (3, 2), (1, 1), ((1, 0), (2, 1)), {"outputs": 2}),
    "narrow": (2, (1, 1), (2, 2), "VALID", {}),
    "wide_stride": (2, (3, 2), (3, 2), ((2, 0), (0, 1)), {}),
    "cropped": (2, (3, 3), (2, 2), ((-1, 2), (1, -1)), {}),
    "grouped": (2, (3, 3), (2, 2), "SAME", {"feature_group_count": 2}),
    "dilated": (2, (3, 3), (1, 1), "SAME", {"rhs_dilation": (2, 2)}),
    "input_dilated": (2, (3, 3), (1, 1), ((2, 1), (1, 2)), {"lhs_dilation": (2, 3)}),
    "both": (2, (3, 3), (2, 1), ((2, 1), (1, 2)), {"lhs_dilation": (2, 2)}),
    "line": (1, (3,), (2,), "SAME", {}),
    "volume": (3, (2, 3, 2), (1, 2, 1), "SAME", {}),
}


def setting(case, names=None):
    spatial, kernel, strides, padding, options = CASES[case]
    rng = np.random.default_rng(0)
    groups = options.get("feature_group_count", 1)
    x = jnp.asarray(rng.normal(size=(2, *(7, 8, 5)[:spatial], 4)), jnp.float32)
    outputs = options.get("outputs", 6)
    options = {name: value for name, value in options.items() if name != "outputs"}
    w = jnp.asarray(rng.normal(size=(*kernel, 4 // groups, outputs)), jnp.float32)

    def conv(x, w):
        return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=NAMES[spatial], **options)

    return conv, x, w


def everything(conv):
    """Forward, input gradient and weight gradient."""

    def all_three(x, w):
        z, back = jax.vjp(conv, x, w)
        return z, *back(jnp.cos(z))

    return all_three


@functools.cache
def compilers_own(case):
    conv, x, w = setting(case)
    return jax.jit(everything(conv))(x, w)


def near(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.abs(b).max()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", [*FORMS, None])
def test_every_form_of_every_convolution_and_its_gradients(case, form):
    conv, x, w = setting(case)
    got = jax.jit(canonical(everything(conv), enabled=True, form=form))(x, w)
    want = compilers_own(case)
    near(got, want)
    if form == "layout":
        for a, b in zip(got, want, strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@jax.custom_jvp
def straight(x, w):
    return setting("strided")[0](x, w)


@straight.defjvp
def _(primals, tangents):
    return straight(*primals), 3.0 * setting("strided")[0](tangents[0], primals[1])


PLACES = {
    "jit": lambda f: jax.jit(f),
    "scan": lambda f: lambda x, w: lax.scan(lambda c, _: (c + 0.1 * f(x, w).mean(), f(x, w + c)), 0.0, None, 2),
    "while": lambda f: (
        lambda x, w: lax.while_loop(
            lambda c: f(x, w + c[1]).mean() + c[0] < 3.0, lambda c: (c[0] + 1, c[1] + f(x, w).mean()), (0, 0.0)
        )
    ),
    "cond": lambda f: lambda x, w: lax.cond(x.sum() > 0, f, lambda x, w: 2 * f(x, w), x, w),
    "remat": lambda f: jax.checkpoint(f),
    "vmap": lambda f: lambda x, w: jax.vmap(f, in_axes=(None, 0))(x, jnp.stack([w, 2 * w])),
    "shard_map": lambda f: jax.shard_map(
        f,
        mesh=jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(P("d"), P()),
        out_specs=P("d"),
        check_vma=False,
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_convolutions_are_found_wherever_they_stand(place):
    conv, x, w = setting("strided")
    inner = PLACES[place](conv)
    for form in ("layout", "phases"):
        near(jax.jit(canonical(inner, enabled=True, form=form))(x, w), jax.jit(inner)(x, w))
    outside = PLACES[place](canonical(conv, enabled=True, form="phases"))
    near(jax.jit(outside)(x, w), jax.jit(inner)(x, w))
    if place not in ("while", "scan"):
        total = lambda f: jax.grad(lambda x, w: jnp.sum(f(x, w) ** 2), argnums=(0, 1))  # noqa: E731
        near(jax.jit(total(canonical(inner, enabled=True)))(x, w), jax.jit(total(inner))(x, w))


def strides_of(jaxpr):
    """The strides of all convolutions in a jaxpr, held ones included."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            found.append(tuple(eqn.params["window_strides"]))
        for value in eqn.params.values():
            for held in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(held, "jaxpr", held)
                if hasattr(inner, "eqns"):
                    found += strides_of(inner)
    return found


@pytest.mark.parametrize("place", ["jit", "scan", "while", "cond", "remat", "vmap"])
def test_the_rewrite_reaches_inside(place):
    conv, x, w = setting("strided")
    inner = PLACES[place](conv)
    before = strides_of(jax.make_jaxpr(inner)(x, w).jaxpr)
    after = strides_of(jax.make_jaxpr(canonical(inner, enabled=True, form="phases"))(x, w).jaxpr)
    assert (2, 2) in before and after and (2, 2) not in after


def kernel_sums(jaxpr, inside=False):
    """Whether the kernels of minimal filtering (sums of [4, 6] slices) are computed outside and inside loops."""
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "add" and eqn.outvars[0].aval.shape == (4, 6):
            found.add("inside" if inside else "outside")
        for value in eqn.params.values():
            for held in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(held, "jaxpr", held)
                if hasattr(inner, "eqns"):
                    found |= kernel_sums(inner, inside or eqn.primitive.name in ("while", "scan"))
    return found


@pytest.mark.parametrize("kind", ["steps", "until", "nested"])
def test_kernels_are_transformed_once_before_the_loop(kind, monkeypatch):
    monkeypatch.setattr("jaxadv.core.convolution.choose", lambda *_: "winograd")
    conv, x, w = setting("plain")

    def step(w):
        return lambda x: x + 0.1 * conv(x, w)[..., :4]

    def never(x):
        return jnp.zeros(x.shape[0], bool)

    def nested(x, w):
        held = lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, step(w)(c[1])), (0, x))
        return held[1]

    fns = {
        "steps": lambda x, w: loop(step(w), x, 3),
        "until": lambda x, w: loop(step(w), x, 3, until=never),
        "nested": lambda x, w: loop(lambda x: nested(x, w), x, 3, until=never),
    }
    jaxpr = jax.make_jaxpr(fns[kind])(x, w).jaxpr
    assert kernel_sums(jaxpr) == {"outside"}
    want = x
    for _ in range(6 if kind == "nested" else 3):
        want = step(w)(want)
    near(jax.jit(fns[kind])(x, w), want)
    one_device = jax.jit(fns[kind])(x, w), jax.vmap(fns[kind], in_axes=(0, None))(jnp.stack([x, x]), w)
    near(one_device[1][1], one_device[0])


def test_custom_derivatives_stay():
    _, x, w = setting("strided")
    total = lambda f: jax.grad(lambda x: jnp.sum(f(x, w)))  # noqa: E731
    near(total(canonical(straight, enabled=True))(x), total(straight)(x))
    plain = total(setting("strided")[0])(x)
    np.testing.assert_allclose(total(canonical(straight, enabled=True))(x), 3 * plain, rtol=1e-5, atol=1e-5)


def test_it_does_nothing_when_disabled_or_without_convolutions():
    conv, x, w = setting("strided")
    assert str(jax.make_jaxpr(canonical(conv, enabled=False))(x, w)) == str(jax.make_jaxpr(conv)(x, w))
    smooth = lambda x: jax.nn.softmax(x @ x.T)  # noqa: E731
    a = jnp.ones((3, 3))
    assert str(jax.make_jaxpr(canonical(smooth, enabled=True))(a)) == str(jax.make_jaxpr(smooth)(a))


def test_pytrees_pass_through():
    conv, x, w = setting("plain")
    out = canonical(lambda d: {"z": conv(d["x"], d["w"]), "n": None, "s": (d["x"],)}, enabled=True)({"x": x, "w": w})
    assert set(out) == {"z", "n", "s"} and out["n"] is None
    near(out["z"], conv(x, w))
