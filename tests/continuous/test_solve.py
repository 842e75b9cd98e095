"""The solver: closed forms, orders, adjoints against each other, rows against batches, failures as data, refusals."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy.linalg import expm

from jaxadv.continuous import METHODS, SolveCfg, ode_solve
from jaxadv.continuous.solve import UNCONTROLLED, SolveStats, tableau

A = np.array([[-0.5, 1.0], [-1.0, -0.2]])
Z0 = np.array([[1.0, 0.5], [0.3, -1.0], [-0.4, 0.8]])
TIMES = np.array([0.3, 0.5, 1.0])


def linear(params, t, z):
    return z @ params.T


def driven(params, t, z):
    """Feels the time and is not linear: z = tanh(artanh(z0) + params sin t)."""
    return params * jnp.cos(t) * (1 - z**2)


def fixed(method="rk4", n_steps=10, **more):
    return SolveCfg(method, "fixed", n_steps=n_steps, **more)


def total(vf, cfg, **more):
    """A scalar of everything that can be differentiated."""
    return lambda params, z: jnp.sum(jnp.sin(ode_solve(vf, params, z, cfg, **more)[0]))


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def once(fn):
    """A fixture computed once for the module, in float64."""

    @functools.wraps(fn)
    def made():
        with jax.enable_x64(True):
            return fn()

    return pytest.fixture(scope="module")(made)


@once
def errors():
    """Error at two grids of each method that steps cheaply, of the driven equation."""
    exact = np.tanh(np.arctanh(Z0[:1, 1:]) + np.sin(1.0))

    @jax.jit
    def run(z):
        names = ("euler", "midpoint", "heun", "bosh3", "rk4", "rk38")
        return {m: jnp.stack([ode_solve(driven, 1.0, z, fixed(m, n))[0] for n in (4, 8)]) for m in names}

    return {m: np.abs(np.asarray(z) - exact).reshape(2) for m, z in run(Z0[:1, 1:]).items()}


@pytest.mark.parametrize(
    ("method", "order"),
    [("euler", 1), ("midpoint", 2), ("heun", 2), ("bosh3", 3), ("rk4", 4), ("rk38", 4)],
)
def test_halving_the_step_shows_the_order_of_the_method(errors, method, order):
    slope = np.log2(errors[method][0] / errors[method][1])
    assert abs(slope - order) < 0.5


def test_tableaus_are_consistent():
    for method in METHODS:
        a, b, c = tableau(method)
        np.testing.assert_allclose(a.sum(1), c, atol=1e-12)
        assert abs(b.sum() - 1) < 1e-12 and abs(b @ c - 0.5) < 1e-12 or method == "euler"
    assert tableau("rk38")[2].tolist() == [0, 1 / 3, 2 / 3, 1]


def test_euler_is_the_residual_loop_to_the_bit(wide):
    def loop(params, z):
        return lax.fori_loop(0, 7, lambda i, z: z + (1 / 7) * linear(params, i, z), z)

    ours = jax.jit(lambda p, z: ode_solve(linear, p, z, fixed("euler", 7))[0])(A, Z0)
    np.testing.assert_array_equal(ours, jax.jit(loop)(A, Z0))


@once
def gradients():
    """Gradients to parameters and states of the fixed grid, through each adjoint that is exact."""

    def through(adjoint):
        fn = total(linear, fixed(adjoint=adjoint))
        return jax.jit(jax.jacfwd(fn, (0, 1)) if adjoint == "forward" else jax.grad(fn, (0, 1)))(A, Z0)

    return {adjoint: through(adjoint) for adjoint in ("scan", "checkpoint", "forward")}


@pytest.mark.parametrize("adjoint", ["checkpoint", "forward"])
def test_adjoints_of_the_steps_agree(gradients, adjoint):
    for one, other in zip(gradients["scan"], gradients[adjoint]):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


def test_gradients_are_those_of_finite_differences(gradients, wide):
    fn, step = jax.jit(total(linear, fixed())), 1e-6
    for place, grad in enumerate(gradients["scan"]):
        for i in np.ndindex(grad.shape):
            ends = []
            for sign in (1, -1):
                args = [A.copy(), Z0.copy()]
                args[place][i] += sign * step
                ends.append(float(fn(*args)))
            assert abs((ends[0] - ends[1]) / (2 * step) - grad[i]) < 1e-8


@once
def between():
    """States at three times and for each row at its own, their derivatives to the times, and the statistics."""
    cfg = fixed(n_steps=8, t1=1.5)

    @jax.jit
    def run(ts):
        (shared, stats), slope = (
            ode_solve(linear, A, Z0, cfg, ts=ts),
            jax.jacrev(lambda ts: ode_solve(linear, A, Z0, cfg, ts=ts)[0])(ts),
        )
        own = ode_solve(linear, A, Z0, cfg, ts=jnp.stack([ts, ts / 2, ts], 1))[0]
        return shared, stats, jnp.einsum("ibni->ibn", slope), own

    return run(TIMES)


def test_answers_in_between_are_those_of_the_flow(between):
    states, stats, slope, own = between
    exact = np.stack([Z0 @ expm(A * t).T for t in TIMES])
    np.testing.assert_allclose(states, exact, atol=1e-4)
    np.testing.assert_allclose(slope, exact @ A.T, atol=2e-3)  # d/dT of the answer is the field there
    half = np.stack([Z0[1] @ expm(A * t / 2).T for t in TIMES])
    np.testing.assert_allclose(own[:, 1], half, atol=1e-4)
    np.testing.assert_array_equal(own[:, 2], states[:, 2])
    assert stats.nfe.tolist() == [33] * 3 and stats.num_steps.tolist() == [8] * 3


def test_a_field_without_time_composes(wide):
    """The flow over 1.5 is that over 0.5 after that over 1; one that feels the time is not so."""

    def two(vf, p, z):
        parts = [ode_solve(vf, p, z, fixed(t1=t, n_steps=round(10 * t)))[0] for t in (1.5, 1.0)]
        return parts[0], ode_solve(vf, p, parts[1], fixed(t1=0.5, n_steps=5))[0]

    whole, parts = jax.jit(lambda p, z: two(linear, p, z))(A, Z0)
    np.testing.assert_allclose(whole, parts, rtol=1e-13)
    whole, parts = jax.jit(lambda z: two(driven, 1.0, z))(Z0 / 2)
    assert np.abs(whole - parts).max() > 0.01


def test_rows_and_batches_agree_on_fixed_grids_and_a_row_that_fails_fails_alone():
    """dz = z^2 leaves the numbers before t = 1 from z0 > 1, and stays small from z0 < 0."""
    vf, z = (lambda p, t, z: p * z**2), np.asarray([[-1.0], [50.0], [0.2]], np.float32)

    @jax.jit
    def run(z):
        cfgs = [fixed("rk4", 10, batching=b, failed=f) for b, f in (("per_example", "nan"), ("joint", "nan"))]
        last = fixed("rk4", 10, failed="last")
        return [ode_solve(vf, 1.0, z, cfg) for cfg in (*cfgs, last)]

    (rows, stats), (joint, whole), (last, _) = run(z)
    assert isinstance(stats, SolveStats) and stats.ok.tolist() == [True, False, True]
    assert np.isnan(rows[1]).all() and np.isfinite(rows[::2]).all() and not np.isfinite(last[1]).all()
    np.testing.assert_allclose(rows[2], 0.2 / (1 - 0.2), rtol=1e-5)
    assert whole.ok.shape == () and not whole.ok and np.isnan(joint).all()
    assert stats.nfe.tolist() == [40] * 3 and whole.nfe == 40 and stats.num_rejected.tolist() == [0] * 3


def dimensions(jaxpr):
    """Dimension numbers of every convolution of a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn.params["dimension_numbers"]
        for value in eqn.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from dimensions(getattr(inner, "jaxpr", inner))


def convolved(params, t, z):
    return jnp.tanh(lax.conv_general_dilated(z, params, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))


def test_convolutions_stand_in_their_fast_layout_inside_the_loop_forward_and_backward(key):
    kernel, z = jax.random.normal(key, (3, 3, 2, 2)) / 5, jax.random.normal(key, (3, 4, 4, 2))

    def plain(params, z):
        for _ in range(3):
            z = z + convolved(params, 0, z) / 3
        return jnp.sum(jnp.sin(z))

    solved = jax.grad(total(convolved, fixed("euler", 3)), (0, 1))
    found = list(dimensions(jax.make_jaxpr(solved)(kernel, z).jaxpr))
    fast = lax.conv_dimension_numbers(z.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    assert len(found) >= 2 and all(spec == fast for spec in found)  # the gradient to the kernel is a matrix product
    for one, other in zip(jax.jit(solved)(kernel, z), jax.jit(jax.grad(plain, (0, 1)))(kernel, z)):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="t1 must be after t0.*negate the field"):
        SolveCfg(t0=1.0, t1=1.0)
    with pytest.raises(ValueError, match="'rk4', which has none.*Use 'heun'"):
        SolveCfg("rk4")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"method": "dopri"}, "Did you mean .*'dopri5'"),
        ({"adjoint": "direct"}, "unknown adjoint"),
        ({"batching": "rows"}, "unknown batching"),
        ({"max_steps": 0}, "max_steps must be a whole number"),
        ({"rtol": 0.0}, "rtol must be finite and greater than 0"),
        ({"mode": "fixed", "adjoint": "implicit"}, "needs adaptive steps"),
    )
    for settings, words in wrong:
        with pytest.raises(ValueError, match=words):
            SolveCfg(**settings)
    z = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="at least rtol 1e-05 and atol 1e-06 in float32; got rtol=1e-06"):
        ode_solve(linear, A, z, SolveCfg(rtol=1e-6))
    with pytest.raises(ValueError, match=r"got shape \(4, 3\)"):
        ode_solve(linear, A, z, fixed(), ts=np.ones((4, 3)))
    with pytest.raises(TypeError, match="Integers"):
        ode_solve(linear, A, np.ones((2, 3), int), fixed())
    joint = SolveCfg(batching="joint")
    with pytest.raises(ValueError, match=r"dense output must be of vectors.*\(2, 4, 4, 3\).*256 steps"):
        ode_solve(linear, A, np.ones((2, 4, 4, 3), np.float32), joint, dense=True)
    for cfg in (SolveCfg(), fixed(), dataclasses.replace(joint, adjoint="backsolve")):
        with pytest.raises(ValueError, match="dense output needs an adaptive, joint solve"):
            ode_solve(linear, A, z, cfg, dense=True)
    assert set(UNCONTROLLED) < set(METHODS) and hash(fixed()) == hash(fixed())


# ------------------------------------------------------------------------------------------------------- adaptive steps


@once
def adaptive():
    """One program by rows: value, gradient and statistics for a mild and a stiff row; and how often it was traced."""
    traces = []

    def vf(params, t, z):
        traces.append(0)
        return z @ params.T * jnp.where(z[:, :1] ** 2 > 100, 1e6, 1.0)

    cfg = SolveCfg("dopri5", rtol=1e-6, atol=1e-6, dt0=0.1, max_steps=40)

    @jax.jit
    def run(params, z):
        def value(params, z):
            z, stats = ode_solve(vf, params, z, cfg)
            return jnp.sum(jnp.sin(z[:2])), (z, stats)

        (_, out), grads = jax.value_and_grad(value, (0, 1), has_aux=True)(params, z)
        return *out, *grads

    z = np.concatenate([Z0[:2], [[20.0, 1.0]]])
    found = run(A, z)
    first = len(traces)
    again = run(2 * A, z)
    return found, again, (first, len(traces)), z


def test_adaptive_steps_follow_the_flow_by_rows(adaptive):
    (z, stats, _, _), again, _, z0 = adaptive
    np.testing.assert_allclose(z[:2], z0[:2] @ expm(A).T, atol=1e-5)
    np.testing.assert_allclose(again[0][:2], z0[:2] @ expm(2 * A).T, atol=1e-5)
    assert (stats.num_accepted + stats.num_rejected == stats.num_steps).all()
    assert stats.nfe.tolist() == (6 * stats.num_steps + 1).tolist()


def test_too_many_steps_are_data_and_not_an_error(adaptive):
    (z, stats, _, _), _, _, _ = adaptive
    assert stats.ok.tolist() == [True, True, False] and stats.num_steps[2] == 40
    assert np.isnan(z[2]).all() and np.isfinite(z[:2]).all()


def test_gradients_through_adaptive_steps_are_those_of_the_flow(adaptive, wide):
    (_, _, to_params, to_states), _, _, z0 = adaptive

    def flow(params, z):
        return jnp.sum(jnp.sin(z @ jax.scipy.linalg.expm(params).T))

    exact = jax.jit(jax.grad(flow, (0, 1)))(A, z0[:2])
    np.testing.assert_allclose(to_params, exact[0], atol=1e-4)
    np.testing.assert_allclose(to_states[:2], exact[1], atol=1e-4)


def test_new_weights_do_not_trace_again(adaptive):
    first, after = adaptive[2]
    assert 0 < first == after


@pytest.mark.slow
def test_joint_and_looped_solves_agree_with_rows(wide):
    """One row solved jointly is that row solved by rows; all rows together take other steps."""
    cfg = SolveCfg("bosh3", rtol=1e-4, atol=1e-6, dt0=0.1, batching="joint")
    rows = dataclasses.replace(cfg, batching="per_example")
    z, stats = jax.jit(lambda z: ode_solve(linear, A, z, rows))(Z0)
    alone = jax.jit(lambda z: ode_solve(linear, A, z, cfg))
    for i in range(len(Z0)):
        one, told = alone(Z0[i : i + 1])
        np.testing.assert_allclose(z[i : i + 1], one, rtol=1e-13)
        assert told.num_steps == stats.num_steps[i]


@pytest.mark.slow
def test_adjoints_agree_on_adaptive_steps(wide):
    def through(adjoint):
        cfg = SolveCfg("tsit5", rtol=1e-8, atol=1e-8, dt0=0.1, batching="joint", adjoint=adjoint)
        fn = total(linear, cfg)
        return jax.jit(jax.jacfwd(fn, (0, 1)) if adjoint == "forward" else jax.grad(fn, (0, 1)))(A, Z0)

    steps = through("checkpoint")
    for adjoint, slack in (("scan", 1e-12), ("forward", 1e-12), ("backsolve", 1e-6)):
        for one, other in zip(steps, through(adjoint)):
            np.testing.assert_allclose(one, other, atol=slack, err_msg=adjoint)


@pytest.mark.slow
def test_errors_fall_with_the_tolerance_and_evaluations_are_counted(wide):
    seen = []

    def counted(params, t, z):
        jax.debug.callback(lambda: seen.append(0))
        return driven(params, t, z)

    exact, last = np.tanh(np.arctanh(Z0[2:] / 2) + np.sin(1.0)), 1.0
    for tol in (1e-3, 1e-6, 1e-9):
        cfg = SolveCfg("dopri5", rtol=tol, atol=tol, batching="joint", adjoint="forward")
        seen.clear()
        z, stats = jax.jit(lambda z, cfg=cfg: ode_solve(counted, 1.0, z, cfg))(Z0[2:] / 2)
        jax.block_until_ready(z)
        jax.effects_barrier()
        error = np.abs(z - exact).max()
        assert error < min(10 * tol, last) and len(seen) == stats.nfe
        last = error


@pytest.mark.slow
def test_a_steady_state_differentiates_by_the_implicit_function_theorem(wide):
    """dz = b - M z rests at M^-1 b; its gradient to b is M^-T."""
    m = np.array([[2.0, 0.3], [0.1, 1.0]])
    cfg = SolveCfg("tsit5", t1=100.0, rtol=1e-8, atol=1e-8, batching="joint", adjoint="implicit", max_steps=1000)

    def rest(b, z0):
        z, stats = ode_solve(lambda b, t, z: b[None] - z @ m.T, b, z0, cfg)
        return z[0, 0], (z, stats)

    grads, (z, stats) = jax.jit(jax.grad(rest, (0, 1), has_aux=True))(np.array([1.0, -1.0]), np.zeros((1, 2)))
    np.testing.assert_allclose(z[0], np.linalg.solve(m, [1.0, -1.0]), atol=1e-6)
    np.testing.assert_allclose(grads[0], np.linalg.inv(m)[0], atol=1e-6)
    assert stats.ok and np.all(grads[1] == 0)


@pytest.mark.slow
def test_dense_answers_and_times_of_rows(wide):
    cfg = SolveCfg("dopri5", rtol=1e-7, atol=1e-7, batching="joint", dt0=0.1)

    @jax.jit
    def run(ts):
        solution, stats = ode_solve(linear, A, Z0, cfg, dense=True)
        rows = dataclasses.replace(cfg, batching="per_example")
        own, pull = jax.vjp(lambda ts: ode_solve(linear, A, Z0, rows, ts=ts)[0], jnp.stack([ts, ts / 2, ts], 1))
        return jax.vmap(solution)(ts), stats, own, pull(jnp.ones_like(own))[0]

    dense, stats, own, slope = run(TIMES)
    exact = np.stack([Z0 @ expm(A * t).T for t in TIMES])
    np.testing.assert_allclose(dense, exact, atol=1e-5)
    np.testing.assert_allclose(own[:, 0], exact[:, 0], atol=1e-5)
    half = np.stack([Z0[1] @ expm(A * t / 2).T for t in TIMES])
    np.testing.assert_allclose(own[:, 1], half, atol=1e-5)
    np.testing.assert_allclose(slope[:, 1], (half @ A.T).sum(-1), atol=1e-4)
    assert stats.ok
