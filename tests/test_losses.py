"""Losses against hand-written numpy, finite differences and invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import approx_fprime
from scipy.special import log_softmax, logsumexp

from jaxadv import core, losses
from jaxadv.losses import LOSSES


def ask(loss):
    return lambda z, y: loss(jnp.asarray(z), y)


cross_entropy, minus_cross_entropy, margin = map(ask, (losses.cross_entropy, losses.minus_cross_entropy, losses.margin))
dlr, dlr_targeted = map(ask, (losses.dlr, losses.dlr_targeted))
kl, minus_kl = (lambda p, q, f=f: f(jnp.asarray(p), jnp.asarray(q)) for f in (losses.kl, losses.minus_kl))

RNG = np.random.default_rng(0)
Z = RNG.normal(size=(64, 6)).astype(np.float32) * 3
Y = RNG.integers(0, 6, 64).astype(np.int32)
T = ((Y + RNG.integers(1, 6, 64)) % 6).astype(np.int32)
AIM = core.Targets(label=jnp.asarray(Y), target=jnp.asarray(T))
WRONG = Z.argmax(-1) != Y


def at(z, y):
    return z[np.arange(len(y)), y]


def other(z, y):
    return np.where(np.arange(z.shape[1]) == y[:, None], -np.inf, z).max(-1)


def close(got, want):
    assert got.shape == (64,)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_values_match_numpy():
    z = Z.astype(float)
    top = -np.sort(-z, axis=-1)
    ce = logsumexp(z, axis=-1) - at(z, Y)
    close(cross_entropy(Z, Y), ce)
    close(minus_cross_entropy(Z, Y), -ce)
    close(margin(Z, Y), at(z, Y) - other(z, Y))
    close(dlr(Z, Y), (at(z, Y) - other(z, Y)) / (top[:, 0] - top[:, 2]))
    close(dlr_targeted(Z, AIM), (at(z, Y) - at(z, T)) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2))
    q = RNG.normal(size=Z.shape).astype(np.float32)
    p_log, q_log = log_softmax(z, axis=-1), log_softmax(q.astype(float), axis=-1)
    close(kl(Z, q), np.sum(np.exp(p_log) * (p_log - q_log), -1))
    close(minus_kl(q, Z), -np.sum(np.exp(p_log) * (p_log - q_log), -1))


def test_targeted_forms_turn_around_at_the_target():
    close(minus_cross_entropy(Z, AIM), cross_entropy(Z, T))
    close(margin(Z, AIM), other(Z, T) - at(Z, T))
    close(dlr(Z, AIM), -dlr(Z, T))


def test_soft_labels_are_the_mean_over_labels():
    soft = RNG.dirichlet(np.ones(6), 64).astype(np.float32)
    each = np.stack([np.asarray(cross_entropy(Z, np.full(64, k, np.int32))) for k in range(6)], -1)
    close(cross_entropy(Z, soft), (soft * each).sum(-1))
    close(cross_entropy(Z, np.eye(6, dtype=np.float32)[Y]), cross_entropy(Z, Y))


def test_signs_tell_right_from_wrong():
    assert WRONG.any() and not WRONG.all()
    np.testing.assert_array_equal(np.asarray(margin(Z, Y)) < 0, WRONG)
    np.testing.assert_array_equal(np.asarray(dlr(Z, Y)) < 0, WRONG)
    np.testing.assert_array_equal(np.asarray(margin(Z, AIM)) < 0, Z.argmax(-1) == T)
    assert (np.asarray(dlr(Z, Y)) <= 1 + 1e-6).all()
    assert (np.asarray(cross_entropy(Z, Y)) >= 0).all() and (np.asarray(kl(Z, Z[::-1])) >= -1e-6).all()
    np.testing.assert_allclose(kl(Z, Z), 0, atol=1e-6)


@pytest.mark.parametrize(("scale", "shift"), [(1e-2, 3.0), (7.0, -2.0), (1e3, 0.0)])
def test_dlr_is_invariant_under_positive_affine_maps(scale, shift):
    for loss, y in ((dlr, Y), (dlr_targeted, AIM)):
        np.testing.assert_allclose(loss(np.float32(scale) * Z + np.float32(shift), y), loss(Z, y), rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_match_finite_differences_in_float64(name):
    y = {"dlr_targeted": AIM, "minus_kl": jnp.asarray(Z[::-1])}.get(name, jnp.asarray(Y))
    rows = slice(0, 4)
    with jax.enable_x64(True):
        part = jax.tree.map(lambda v: jnp.asarray(np.asarray(v)[rows]), y)
        z = np.asarray(Z[rows], float)
        total = jax.jit(lambda flat: jnp.sum(LOSSES[name](flat.reshape(4, 6), part)))
        grad = jax.grad(total)(jnp.asarray(z.ravel()))
        want = approx_fprime(z.ravel(), lambda flat: float(total(jnp.asarray(flat))), 1e-7)
        np.testing.assert_allclose(grad, want, atol=2e-6)


def test_large_logits_stay_finite():
    z = np.float32([[1e4, 0, -1e4], [0, 0, 0]])
    for name in ("minus_cross_entropy", "margin", "dlr"):
        value, grad = jax.value_and_grad(lambda v, n=name: LOSSES[n](v, jnp.zeros(2, jnp.int32)).sum())(jnp.asarray(z))
        assert np.isfinite(value) and np.isfinite(grad).all()


def test_every_refusal_says_what_was_got_and_what_to_do():
    with pytest.raises(ValueError, match=r"y must .*got float32\[64, 6\]\. One-hot labels\? Pass y\.argmax"):
        margin(Z, np.eye(6, dtype=np.float32)[Y])
    with pytest.raises(TypeError, match=r"y must .*got float32\[64\].*astype"):
        cross_entropy(Z, Y.astype(np.float32))
    with pytest.raises(ValueError, match=r"y must have one label .*got int32\[3\]\. \w+"):
        margin(Z, Y[:3])
    with pytest.raises(ValueError, match=r"y must lie in \[0, 6\).*got labels.* 0 to 6"):
        margin(Z, np.where(Y == Y[0], 6, 0).astype(np.int32))
    with pytest.raises(ValueError, match=r"at least 3 classes; got .*\(64, 2\).*margin"):
        dlr(Z[:, :2], (Y % 2).astype(np.int32))
    with pytest.raises(ValueError, match=r"at least 4 classes; got .*\(64, 3\).*margin"):
        dlr_targeted(Z[:, :3], jax.tree.map(lambda v: v % 3, AIM))
    with pytest.raises(Exception, match=r"Targets"):  # under the type checks of this run the hook speaks first
        dlr_targeted(Z, Y)
    with pytest.raises(ValueError, match=r"p_logits must be logits .*got .*Return"):
        losses.kl(jnp.zeros((3, 1)), jnp.zeros((3, 1)))
