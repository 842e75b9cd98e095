"""Terms: closed forms of linear and quadratic models, unbiasedness, finite differences, what a mask hides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv import attacks, threats, train
from jaxadv.core import Trainable
from jaxadv.train import terms

WIDE = (-10.0, 10.0)


def affine(params, state, x, *, bn="eval", key=None, **_):
    return x @ params["kernel"], state


def curved(params, state, x, *, bn="eval", key=None, **_):
    return jnp.tanh(x @ params["kernel"]) @ params["head"], state


def net(apply, seed=0, features=5, classes=3):
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.normal(size=(features, classes)), "head": rng.normal(size=(classes, classes))}
    return Trainable(apply, {name: jnp.asarray(a, jnp.float32) for name, a in params.items()}, {})


def test_the_gradients_of_a_linear_model_are_aligned(kit, key):
    linear, batch = kit.linear(), kit.rows()
    term = terms.alignment(threats.linf(0.5, WIDE))
    go = lambda p: term(linear.apply, p, linear.state, batch, key)  # noqa: E731
    np.testing.assert_allclose(go(linear.params), 0, atol=1e-6)
    slope = jax.grad(lambda p: go(p).sum())(linear.params)
    assert all(float(jnp.abs(a).max()) < 1e-5 for a in jax.tree.leaves(slope))
    still = {"w": jnp.zeros(5), "b": jnp.float32(0.3)}  # no gradient at all
    np.testing.assert_array_equal(go(still), 0)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(jax.grad(lambda p: go(p).sum())(still)))


def test_the_cosine_of_a_quadratic_loss_is_its_closed_form(kit, key):
    """Logits (0, q(x)) with q = x^T A x / 2: every gradient of the loss lies along A x."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5, 5))
    a = jnp.asarray(a + a.T, jnp.float32)

    def quadratic(params, state, x, *, bn="eval", key=None, **_):
        q = jnp.sum(x * (x @ params), -1) / 2
        return jnp.stack([jnp.zeros_like(q), q], -1), state

    batch, noise = kit.rows(), jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    term = terms.alignment(threats.linf(0.5, WIDE), start=lambda threat, keys, x: x + noise)
    one, two = (np.asarray(x, np.float64) @ np.asarray(a, np.float64) for x in (batch["x"], batch["x"] + noise))
    want = 1 - (one * two).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(two, axis=-1)
    np.testing.assert_allclose(term(quadratic, a, {}, batch, key), want, atol=1e-5)


def test_grad_align_is_fgsm_and_its_term(kit, key):
    model, batch, threat = net(curved), kit.rows(), threats.linf(8 / 255, WIDE)
    objective = train.grad_align(threat)
    got, (_, metrics) = objective(model.apply, model.params, model.state, batch, key)
    plain, _ = train.fgsm_at(threat)(model.apply, model.params, model.state, batch, key)
    extra = terms.alignment(threat)(model.apply, model.params, model.state, batch, key)
    np.testing.assert_allclose(got, plain + 0.2 * extra, rtol=1e-5)
    np.testing.assert_array_equal(metrics["misalignment"], extra)
    near = batch["x"] + jnp.zeros_like(batch["x"])
    alone = terms.alignment(threat, start=lambda threat, keys, x: near)
    np.testing.assert_allclose(alone(model.apply, model.params, model.state, batch, key), 0, atol=1e-6)


def test_the_jacobian_of_a_linear_model_is_its_kernel(kit, key):
    model, batch = net(affine), kit.rows(400)
    want = float(jnp.sum(model.params["kernel"] ** 2))
    exact = terms.jacobian(projections=None)(model.apply, model.params, model.state, batch, key)
    np.testing.assert_allclose(exact, want, rtol=1e-6)
    drawn = terms.jacobian(projections=4)(model.apply, model.params, model.state, batch, key)
    assert abs(float(drawn.mean()) / want - 1) < 0.05 and float(drawn.std()) > 0.01 * want
    curve = net(curved)
    full = terms.jacobian(projections=None)(curve.apply, curve.params, curve.state, batch, key)
    each = jax.vmap(jax.jacobian(lambda x: curve.apply(curve.params, {}, x[None])[0][0]))(batch["x"])
    np.testing.assert_allclose(full, jnp.sum(each**2, (1, 2)), rtol=1e-5)


@pytest.mark.parametrize("build", [terms.jacobian, lambda: terms.alignment(threats.linf(0.1, WIDE))])
def test_the_gradient_of_a_term_against_finite_differences(kit, build):
    with jax.enable_x64(True):
        term, model = build(), net(curved)
        params = jax.tree.map(lambda a: a.astype(jnp.float64), model.params)
        batch = {k: v.astype(jnp.float64) if k == "x" else v for k, v in kit.rows(4).items()}
        key = jax.random.key(0)
        fixed = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)) * 0.1)
        if build is not terms.jacobian:
            # the first of the two gradients is held constant: differentiate what remains
            term = terms.alignment(threats.linf(0.1, WIDE), start=lambda threat, keys, x: x + fixed)
            first = jax.grad(lambda x: _fit(params, x, batch).sum())(batch["x"])

            def free(p):
                second = jax.grad(lambda x: _fit(p, x, batch).sum())(batch["x"] + fixed)
                cos = (first * second).sum(-1) / jnp.linalg.norm(first, axis=-1) / jnp.linalg.norm(second, axis=-1)
                return (1 - cos).sum()
        else:

            def free(p):
                return term(model.apply, p, {}, batch, key).sum()

        free = jax.jit(free)
        slope = jax.jit(jax.grad(lambda p: term(model.apply, p, {}, batch, key).sum()))(params)["kernel"]
        for place in [(0, 0), (4, 2)]:
            step = jnp.zeros((5, 3)).at[place].set(1e-6)
            ends = [float(free(params | {"kernel": params["kernel"] + s * step})) for s in (1, -1)]
            np.testing.assert_allclose(slope[place], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-8)


def _fit(params, x, batch):
    z = curved(params, {}, x)[0]
    return jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, batch["y"][:, None], -1)[:, 0]


def test_sparseness_of_what_is_known():
    rng = np.random.default_rng(0)
    assert float(terms.hoyer(jnp.eye(1, 100)[0])) == pytest.approx(1)
    assert float(terms.hoyer(-3 * jnp.ones((4, 4)))) == pytest.approx(0, abs=1e-6)
    assert float(terms.hoyer(jnp.zeros(4))) == 0
    gaussian = jnp.asarray(rng.normal(size=100_000), jnp.float32)
    assert float(terms.hoyer(gaussian)) == pytest.approx(1 - np.sqrt(2 / np.pi), abs=0.01)
    assert float(terms.hoyer(7 * gaussian)) == pytest.approx(float(terms.hoyer(gaussian)), abs=1e-5)
    params = {"kernel": jnp.eye(2), "bias": jnp.eye(1, 4)[0]}
    assert float(terms.minmax(params)) == pytest.approx(-float(terms.hoyer(jnp.eye(2))))


def test_a_penalty_on_weights_is_the_same_for_each_row_and_its_mean_is_the_penalty(kit, key):
    model, batch = net(affine), kit.rows()
    objective = train.plus(train.standard(), terms.of_weights(lambda p: jnp.sum(p["kernel"] ** 2)), 0.5)
    got = train.grad_fn(objective)(model.apply, model.params, model.state, batch, key)
    plain = train.grad_fn(train.standard())(model.apply, model.params, model.state, batch, key)
    np.testing.assert_allclose(
        got.total["kernel"] / 8, plain.total["kernel"] / 8 + model.params["kernel"], rtol=1e-5, atol=1e-6
    )
    none = train.plus(train.standard(), terms.of_weights(terms.minmax), 0.0)
    assert kit.same_bits(
        none(model.apply, model.params, model.state, batch, key),
        train.standard()(model.apply, model.params, model.state, batch, key),
    )


def test_a_masked_pixel_has_no_influence_and_no_perturbation_that_counts(kit, key):
    network = kit.mlp()
    x = jnp.asarray(np.random.default_rng(0).uniform(0.2, 0.8, (8, 4, 4, 1)), jnp.float32)
    batch, seen = dict(kit.rows(), x=x), []

    def spy(params, state, x, **settings):
        if settings["bn"] == "train":
            seen.append(np.asarray(x))
        return network.apply(params, state, x, **settings)

    objective = train.fgsm_at(threats.linf(0.1))
    hidden = train.masked(objective, 0.5)
    hidden(spy, network.params, network.state, batch, key)
    last = seen[-1]  # what the loss was computed from
    assert 0.35 < np.mean(last == 0) < 0.65 and np.any((last == 0)[0] != (last == 0)[1])
    got = hidden(network.apply, network.params, network.state, batch, key)
    other = hidden(network.apply, network.params, network.state, dict(batch, x=jnp.where(last == 0, 0.5, x)), key)
    np.testing.assert_allclose(got[0], other[0], rtol=1e-6)
    all_seen = train.masked(objective, 0.0)
    plain = objective(network.apply, network.params, network.state, batch, key)
    np.testing.assert_allclose(
        all_seen(network.apply, network.params, network.state, batch, key)[0], plain[0], rtol=1e-6
    )
    flat = train.masked(train.standard(), 0.5)(kit.linear().apply, kit.linear().params, {}, kit.rows(), key)[0]
    assert np.isfinite(flat).all()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: train.plus(train.standard(), terms.jacobian(), -1.0), "weight must be"),
        (lambda: train.grad_align(threats.linf(0.3)), "weight must be given"),
        (lambda: terms.jacobian(projections=0), "projections must be"),
        (lambda: terms.jacobian(bn="train"), "unknown bn"),
        (lambda: terms.alignment(threats.linf(0.1), bn="train"), "unknown bn"),
        (lambda: train.masked(train.standard(), 1.5), "ratio"),
        (lambda: train.masked(train.pgd_at(attacks.pgd(threats.linf(0.1))), -0.1), "ratio"),
    ],
)
def test_impossible_settings_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
