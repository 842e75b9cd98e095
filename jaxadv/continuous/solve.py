"""The solver: one configuration, one front door, failures and costs as data. The only file that knows diffrax.

What lives here: `SolveCfg` (what to solve with, static), `ode_solve` (the front door), `SolveStats` (what it cost and
whether it ended). What does not: vector fields and networks (`nets`).

Two engines behind the door. A fixed grid is one `lax.scan` over Runge-Kutta steps, a small program that compiles in a
fraction of the time; adaptive steps, and the adjoints that are not those of the steps, are diffrax.

| adjoint | gradients | for |
| --- | --- | --- |
| `scan` | of the steps, reverse; keeps what each step computed | fixed grids, the default |
| `checkpoint` | of the steps, reverse; computes steps again, each or (adaptive) from few states | adaptive, default |
| `forward` | of the steps, forward only | Jacobians with few inputs |
| `backsolve` | of the continuous adjoint, approximate | parity with other libraries; not for attacks |
| `implicit` | of the steady state, none through the initial state | steady states of fields that depend on parameters |

Step sizes carry no gradient: through an adaptive solve, gradients are those of the map on its accepted grid. An
adaptive solve of a whole batch (`joint`) takes one sequence of steps, so an answer depends on the other rows;
`per_example`, the default, gives each row its own.

On CPU a field with convolutions is brought into the forms that are fast inside loops, forward and backward (see
`core.loop`); everywhere its matrix products run at the precision of the configuration, because step control reacts to
rounding.

References:
  Kidger 2022, On neural differential equations, arXiv:2202.02435 (diffrax). Chen et al. 2018, Neural ordinary
  differential equations, arXiv:1806.07366.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxadv.core import PyTree, canonical, check

MODES = ("fixed", "adaptive")
BATCHING = ("per_example", "joint")
ADJOINTS = ("checkpoint", "scan", "forward", "backsolve", "implicit")
METHODS: dict[str, tuple[tuple[tuple[float, ...], ...], tuple[float, ...], tuple[float, ...]] | str] = {
    "euler": ((), (1.0,), (0.0,)),
    "midpoint": (((0.5,),), (0.0, 1.0), (0.0, 0.5)),
    "heun": (((1.0,),), (0.5, 0.5), (0.0, 1.0)),
    "rk4": (((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0)),
    "rk38": (
        ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
        (0.0, 1 / 3, 2 / 3, 1.0),
    ),
    "bosh3": "Bosh3",
    "dopri5": "Dopri5",
    "tsit5": "Tsit5",
    "dopri8": "Dopri8",
}
"""Name of a method to its tableau (rows below the diagonal, weights, times), or to the class of diffrax that holds it.
`rk38` is the 3/8 rule, which torchdiffeq calls `rk4`."""

UNCONTROLLED = ("euler", "rk4", "rk38")
"""Methods without an error estimate: for fixed grids only."""

LEAST = {"rtol": 1e-5, "atol": 1e-6}
"""Tolerances below which float32 has no digits left for step control."""


@dataclasses.dataclass(frozen=True)
class SolveCfg:
    """What an ODE is solved with; static and hashable, so a part of a network's structure.

    Attributes:
      method: a name in `METHODS`.
      mode: `'fixed'`, a grid of `n_steps` equal steps, or `'adaptive'`.
      t0: time of the initial state.
      t1: time of the answer, after `t0`.
      n_steps: steps of the fixed grid.
      rtol: relative tolerance of adaptive steps, at least 1e-5 in float32.
      atol: absolute tolerance, at least 1e-6 in float32.
      dt0: first adaptive step; None leaves it to diffrax, whose version 0.7.2 takes 0.01 and asks the field nothing.
      max_steps: adaptive steps, rejected ones included, after which a solve has failed.
      dtmin: smallest adaptive step (taken even where the error is too large), or None.
      dtmax: largest adaptive step, or None.
      batching: `'per_example'` or `'joint'`: whose error decides about adaptive steps.
      adjoint: one of `ADJOINTS`; None is `scan` on fixed grids and `checkpoint` for adaptive steps.
      checkpoints: states that the adjoint `checkpoint` keeps; None chooses from `max_steps`.
      failed: what a failed solve returns, `'nan'` (so that no logit counts as robust) or `'last'`, the state reached.
      precision: of matrix products and convolutions inside the field; None leaves the default of the device.

    Raises:
      ValueError: on unknown names, `t1 <= t0`, steps or tolerances out of range, or an adaptive method without an error
        estimate.
    """

    method: str = "dopri5"
    mode: str = "adaptive"
    t0: float = 0.0
    t1: float = 1.0
    n_steps: int = 10
    rtol: float = 1e-3
    atol: float = 1e-3
    dt0: float | None = None
    max_steps: int = 256
    dtmin: float | None = None
    dtmax: float | None = None
    batching: str = "per_example"
    adjoint: str | None = None
    checkpoints: int | None = None
    failed: str = "nan"
    precision: str | None = "highest"

    def __post_init__(self):
        check.choice("method", self.method, METHODS)
        check.choice("mode", self.mode, MODES)
        check.choice("batching", self.batching, BATCHING)
        check.choice("failed", self.failed, ("nan", "last"))
        if self.adjoint is not None:
            check.choice("adjoint", self.adjoint, ADJOINTS)
        if not (math.isfinite(self.t0) and math.isfinite(self.t1) and self.t1 > self.t0):
            raise ValueError(
                f"t1 must be after t0 and both finite; got t0={self.t0}, t1={self.t1}. "
                "To integrate backwards, negate the field."
            )
        for name in ("n_steps", "max_steps"):
            check.whole(name, getattr(self, name))
        for name in ("rtol", "atol"):
            check.positive(name, getattr(self, name), "A usual value is 1e-3.")
        for name in ("dt0", "dtmin", "dtmax", "checkpoints"):
            if getattr(self, name) is not None:
                check.positive(name, getattr(self, name), "None lets the solver choose.")
        if self.mode == "fixed" and self.through == "implicit":
            raise ValueError(
                "the adjoint 'implicit' needs adaptive steps, which look for a steady state; got mode='fixed'. "
                "Use mode='adaptive'."
            )
        if self.mode == "adaptive" and self.method in UNCONTROLLED:
            raise ValueError(
                f"adaptive steps need a method with an error estimate; got {self.method!r}, which has none. "
                "Use 'heun', 'bosh3', 'dopri5' or 'tsit5', or mode='fixed'."
            )

    @property
    def through(self) -> str:
        """The adjoint in use."""
        return self.adjoint or ("scan" if self.mode == "fixed" else "checkpoint")


class SolveStats(NamedTuple):
    """What a solve cost and whether it ended: numbers `[]` for a joint solve, `[b]` for one by rows.

    Attributes:
      num_steps: steps tried.
      num_accepted: of these, accepted.
      num_rejected: of these, rejected.
      nfe: evaluations of the field.
      ok: whether the end was reached with a finite state.
    """

    num_steps: Int[Array, "..."]
    num_accepted: Int[Array, "..."]
    num_rejected: Int[Array, "..."]
    nfe: Int[Array, "..."]
    ok: Bool[Array, "..."]


def tableau(method: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the coefficients of a Runge-Kutta method.

    Args:
      method: a name in `METHODS`.

    Returns:
      `a [s, s]` strictly lower triangular, `b [s]` weights, `c [s]` times, float64.

    Raises:
      ValueError: on an unknown name.
    """
    found = check.choice("method", method, METHODS)
    if isinstance(found, str):
        import diffrax

        given = getattr(diffrax, found).tableau
        found = given.a_lower, given.b_sol, (0.0, *given.c)
    rows, b, c = found
    a = np.zeros((len(b), len(b)))
    for i, row in enumerate(rows):
        a[i + 1, : len(row)] = row
    return a, np.asarray(b, np.float64), np.asarray(c, np.float64)


def _stages(method: str) -> tuple[int, bool]:
    """Evaluations of a step, and whether the last one is the first of the next step."""
    a, b, _ = tableau(method)
    return len(b), len(b) > 1 and bool(np.allclose(a[-1], b))


def ode_solve(
    vf: Callable, params: PyTree, z0: PyTree, cfg: SolveCfg, *, ts: Any = None, dense: bool = False
) -> tuple[Any, SolveStats]:
    """Solve `dz/dt = vf(params, t, z)`, `z(t0) = z0`, for a batch.

    Args:
      vf: `(params, t, z) -> dz`, with `t` a scalar and `z` a pytree of `[b, ...]`; rows must not depend on each other.
        Arrays it needs enter through `params`, not by closure.
      params: a pytree of arrays; differentiable.
      z0: the initial states, a pytree of floating-point `[b, ...]`; differentiable.
      cfg: what to solve with.
      ts: times of the answers in (t0, t1], rising, `[n]` or `[n, b]`; None is the end alone. Times in between are
        interpolated; differentiable.
      dense: return the solution as a function of time in the place of the answer; joint solves of vectors only.

    Returns:
      The states at `t1`, or `[n, b, ...]` at `ts`, or a function from a time to states; and the statistics. A failed
      solve (too many steps, a state that is not finite) raises nothing: `ok` is False, and the answer NaN (see
      `SolveCfg.failed`).

    Raises:
      ValueError: on tolerances that float32 cannot hold, a dense answer of a feature map, of rows or of an adjoint
        without one, or times of a wrong shape.
      TypeError: if states are not floating point.
    """
    leaves = jax.tree.leaves(z0)
    dtype = jnp.result_type(*leaves)
    if not jnp.issubdtype(dtype, jnp.floating) or any(jnp.ndim(leaf) < 1 for leaf in leaves):
        raise TypeError(
            f"states must be floating point of shape [b, ...]; got {dtype} of shapes {[jnp.shape(v) for v in leaves]}. "
            "Integers? Pass z0.astype('float32'). A single state? Pass z0[None]."
        )
    _representable(cfg, dtype)
    if ts is not None:
        ts = jnp.asarray(ts, dtype)
        if ts.ndim not in (1, 2) or ts.ndim == 2 and ts.shape[1] != leaves[0].shape[0]:
            raise ValueError(
                f"ts must be times [n], or [n, b] for {leaves[0].shape[0]} rows; got shape {ts.shape}. Transpose it?"
            )
    field = _field(vf, cfg, dtype)
    if dense:
        _allow_dense(cfg, leaves, ts)
        return _dense(field, params, z0, cfg)
    if cfg.mode == "fixed" and cfg.through != "backsolve":
        z, stats = _scanned(field, params, z0, cfg, ts)
    elif cfg.batching == "joint" and (ts is None or ts.ndim == 1):
        z, stats = _diffrax(field, params, z0, cfg, ts)
    else:
        z, stats = _by_rows(field, params, z0, cfg, ts)
    if cfg.failed == "nan":
        z = jax.tree.map(lambda leaf: jnp.where(_wide(stats.ok, leaf, ts is not None), leaf, jnp.nan), z)
    return z, stats


def _representable(cfg: SolveCfg, dtype: Any) -> None:
    """Refuse tolerances that the type of the states cannot hold."""
    scale = float(jnp.finfo(dtype).eps / jnp.finfo(jnp.float32).eps)
    low = [name for name, least in LEAST.items() if getattr(cfg, name) < 0.999 * least * scale]
    if cfg.mode == "adaptive" and low:
        told = ", ".join(f"{name}={getattr(cfg, name):g}" for name in low)
        raise ValueError(
            f"tolerances must be at least rtol {LEAST['rtol'] * scale:.3g} and atol {LEAST['atol'] * scale:.3g} in "
            f"{dtype.name}; got {told}. Below that, steps follow rounding: raise them, or solve in float64."
        )


def _allow_dense(cfg: SolveCfg, leaves: list, ts: Any) -> None:
    """Refuse dense output where it would hold every stage of every step of a feature map, or cannot be had."""
    if (
        ts is not None
        or (cfg.mode, cfg.batching) != ("adaptive", "joint")
        or cfg.through not in ("checkpoint", "forward")
    ):
        raise ValueError(
            "dense output needs an adaptive, joint solve without ts, through 'checkpoint' or 'forward'; got "
            f"{cfg.mode!r}, {cfg.batching!r}, {cfg.through!r}{'' if ts is None else ', ts'}. Pass ts= for chosen times."
        )
    if any(leaf.ndim > 2 for leaf in leaves):
        shapes = [leaf.shape for leaf in leaves]
        raise ValueError(
            f"dense output must be of vectors [b, n]; got states of shapes {shapes}, for which it would hold every "
            f"stage of up to {cfg.max_steps} steps. Pass ts= for answers at chosen times."
        )


def _wide(ok: Array, leaf: Array, leading: bool) -> Array:
    """Bring `ok [] or [b]` to the shape of states `[b, ...]`, or `[n, b, ...]`."""
    if ok.ndim == 0:
        return ok
    return ok.reshape((1,) * leading + ok.shape + (1,) * (leaf.ndim - 1 - leading))


def _field(vf: Callable, cfg: SolveCfg, dtype: Any) -> Callable:
    """The field at the precision of the configuration, its convolutions in forms that are fast inside loops."""

    def precise(params, t, z):
        t = jnp.asarray(t, dtype)
        if cfg.precision is None:
            return vf(params, t, z)
        with jax.default_matmul_precision(cfg.precision):
            return vf(params, t, z)

    if jax.default_backend() != "cpu":
        return precise
    return canonical(precise) if cfg.through in ("forward", "implicit") else _quick(precise)


def _quick(fn: Callable) -> Callable:
    """The function, with the convolutions of its value and of its pullback rewritten; reverse mode only.

    `core.canonical` alone would rewrite the forward pass, whose transposes are convolutions in other layouts again. A
    solve keeps products and convolutions of every evaluation; what lies between them is cheaper to compute again.
    """
    kept = jax.checkpoint(fn, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)

    @jax.custom_vjp
    def quick(*args):
        return canonical(fn)(*args)

    def forward(*args):
        return canonical(lambda *given: jax.vjp(kept, *given))(*args)

    def backward(pull, grad):
        return canonical(lambda pull, grad: pull(grad))(pull, grad)

    quick.defvjp(forward, backward)
    return quick


# ------------------------------------------------------------------------------------------------------ the plain scan


def _scanned(field: Callable, params: PyTree, z0: PyTree, cfg: SolveCfg, ts: Any) -> tuple[PyTree, SolveStats]:
    """Runge-Kutta steps on an even grid; answers in between by the cubic with the values and slopes at both ends."""
    a, b, c = tableau(cfg.method)
    while len(b) > 1 and b[-1] == 0 and not a[:, -1].any():  # serves the error estimate only
        a, b, c = a[:-1, :-1], b[:-1], c[:-1]
    h = (cfg.t1 - cfg.t0) / cfg.n_steps
    dtype = jnp.result_type(*jax.tree.leaves(z0))

    def moved(z, weights, slopes):
        some = [(float(w), k) for w, k in zip(weights, slopes) if w != 0]
        return jax.tree.map(
            lambda v, *ks: v + sum((h * w) * k for (w, _), k in zip(some, ks)), z, *(k for _, k in some)
        )

    def step(t, z, slope):
        slopes = [slope]
        for i in range(1, len(b)):
            slopes.append(field(params, t + h * float(c[i]), moved(z, a[i, :i], slopes)))
        return moved(z, b, slopes)

    kept = jax.checkpoint if cfg.through == "checkpoint" else lambda body: body
    times = jnp.asarray(cfg.t0 + h * np.arange(cfg.n_steps), dtype)
    if ts is None:
        z, _ = lax.scan(kept(lambda z, t: (step(t, z, field(params, t, z)), None)), z0, times)
    else:

        def look(carry, t):
            z, slope, out = carry
            new = step(t, z, slope)
            after = field(params, t + h, new)
            return (new, after, _between(t, h, ts, (z, slope, new, after), out)), None

        out = jax.tree.map(lambda v: jnp.zeros((len(ts), *v.shape), v.dtype), z0)
        (_, _, z), _ = lax.scan(kept(look), (z0, field(params, times[0], z0), out), times)
    nfe = len(b) * cfg.n_steps + (ts is not None)
    ok = _finite(z, joint=cfg.batching == "joint", leading=ts is not None)
    steps, none, asked = (jnp.full(ok.shape, n, jnp.int32) for n in (cfg.n_steps, 0, nfe))
    return z, SolveStats(steps, steps, none, asked, ok)


def _between(t: Array, h: float, ts: Array, ends: tuple, out: PyTree) -> PyTree:
    """Write the answers whose times lie in the step from `t`; times after the grid are answered by its end."""
    at = (ts - t) / h
    here = at > 0  # later steps write over
    at = jnp.minimum(at, 1)

    def write(z, slope, new, after, out):
        u = at.reshape(at.shape + (1,) * (out.ndim - at.ndim))
        z, slope, new, after = (v[None] for v in (z, slope, new, after))
        bend = h * u * (1 - u) * ((1 - u) * slope - u * after)
        cubic = (1 + 2 * u) * (1 - u) ** 2 * z + u**2 * (3 - 2 * u) * new + bend
        return jnp.where(here.reshape(u.shape), cubic, out)

    return jax.tree.map(write, *ends, out)


def _finite(z: PyTree, joint: bool, leading: bool) -> Bool[Array, "..."]:
    """Whether states are finite, `[]` or `[b]`."""
    leaves = [jnp.isfinite(leaf) for leaf in jax.tree.leaves(z)]
    if joint:
        return jnp.all(jnp.stack([leaf.all() for leaf in leaves]))
    axes = [tuple(i for i in range(leaf.ndim) if i != int(leading)) for leaf in leaves]
    return jnp.all(jnp.stack([leaf.all(axis) for leaf, axis in zip(leaves, axes)]), axis=0)


# -------------------------------------------------------------------------------------------------------------- diffrax


def _by_rows(field: Callable, params: PyTree, z0: PyTree, cfg: SolveCfg, ts: Any) -> tuple[PyTree, SolveStats]:
    """One solve for each row; the loop runs until the last of them ends."""

    def one(z, times):
        z, stats = _diffrax(field, params, jax.tree.map(lambda leaf: leaf[None], z), cfg, times)
        return jax.tree.map(lambda leaf: leaf[:, 0] if ts is not None else leaf[0], z), stats

    along = 1 if ts is not None and ts.ndim == 2 else None
    z, stats = jax.vmap(one, in_axes=(0, along), out_axes=(0 if ts is None else 1, 0))(z0, ts)
    return z, stats


def _solution(field: Callable, params: PyTree, z0: PyTree, cfg: SolveCfg, saveat: Any) -> Any:
    import diffrax

    adjoints = {
        "checkpoint": partial(diffrax.RecursiveCheckpointAdjoint, cfg.checkpoints),
        "scan": diffrax.DirectAdjoint,
        "forward": diffrax.ForwardMode,
        "backsolve": diffrax.BacksolveAdjoint,
        "implicit": diffrax.ImplicitAdjoint,
    }
    if cfg.mode == "fixed":
        controller, dt0 = diffrax.ConstantStepSize(), (cfg.t1 - cfg.t0) / cfg.n_steps
        most = cfg.n_steps + 1  # rounding may leave a last tiny step
    else:
        controller = diffrax.PIDController(cfg.rtol, cfg.atol, dtmin=cfg.dtmin, dtmax=cfg.dtmax)
        dt0, most = cfg.dt0, cfg.max_steps
    steady = diffrax.Event(diffrax.steady_state_event(cfg.rtol, cfg.atol)) if cfg.through == "implicit" else None
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, z, params: field(params, t, z)),
        _solver(cfg.method),
        cfg.t0,
        cfg.t1,
        dt0,
        z0,
        params,
        saveat=saveat,
        stepsize_controller=controller,
        adjoint=adjoints[cfg.through](),
        event=steady,
        max_steps=most,
        throw=False,
    )


@lru_cache
def _solver(method: str) -> Any:
    import diffrax

    name = METHODS[method]
    if isinstance(name, str):
        return getattr(diffrax, name)()
    if hasattr(diffrax, method.title()):
        return getattr(diffrax, method.title())()
    rows, b, c = name

    class Tableau(diffrax.AbstractERK):
        """A method that diffrax does not have."""

        tableau = diffrax.ButcherTableau(
            a_lower=tuple(np.asarray(row) for row in rows),
            b_sol=np.asarray(b),
            b_error=np.zeros(len(b)),
            c=np.asarray(c[1:]),
        )
        interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

        def order(self, terms):
            return 4

    return Tableau()


def _stats(solution: Any, cfg: SolveCfg, z: PyTree) -> SolveStats:
    import diffrax

    told = solution.stats
    steps, stages, again = told["num_steps"], *_stages(cfg.method)
    nfe = steps * (stages - again) + int(again)
    end = diffrax.RESULTS.event_occurred if cfg.through == "implicit" else diffrax.RESULTS.successful
    ok = (solution.result == end) & _finite(z, joint=True, leading=False)
    accepted, rejected = told["num_accepted_steps"], told["num_rejected_steps"]
    steps, accepted, rejected, nfe = (jnp.asarray(count, jnp.int32) for count in (steps, accepted, rejected, nfe))
    return SolveStats(steps, accepted, rejected, nfe, ok)


def _diffrax(field: Callable, params: PyTree, z0: PyTree, cfg: SolveCfg, ts: Any) -> tuple[PyTree, SolveStats]:
    """One adaptive or checkpointed solve of everything in `z0`."""
    import diffrax

    if ts is None:
        saveat = diffrax.SaveAt(t1=True)
    else:
        saveat = diffrax.SaveAt(ts=lax.stop_gradient(jnp.clip(ts, cfg.t0, cfg.t1)))
    solution = _solution(field, params, z0, cfg, saveat)
    if ts is None:
        z = jax.tree.map(lambda leaf: leaf[0], solution.ys)
    else:
        z = _timed(field)(params, ts, solution.ys)
    return z, _stats(solution, cfg, z)


def _timed(field: Callable) -> Callable:
    """Return answers as they are, with the derivative `f(t, z(t))` to their times, which diffrax does not give."""

    @jax.custom_jvp
    def timed(params, ts, z):
        del params, ts
        return z

    @timed.defjvp
    def _(primals, tangents):
        params, ts, z = primals
        slope = jax.vmap(lambda t, z: field(params, t, z))(ts, z)

        def moved(dz, k):
            return dz + tangents[1].reshape(ts.shape + (1,) * (k.ndim - 1)) * k

        return z, jax.tree.map(moved, tangents[2], slope)

    return timed


def _dense(field: Callable, params: PyTree, z0: PyTree, cfg: SolveCfg) -> tuple[Callable, SolveStats]:
    """A joint solve as a function of time."""
    import diffrax

    solution = _solution(field, params, z0, cfg, diffrax.SaveAt(t1=True, dense=True))
    return jax.tree_util.Partial(_evaluated, solution.interpolation), _stats(solution, cfg, solution.ys)


def _evaluated(interpolation: Any, t: Any) -> Any:
    return interpolation.evaluate(t)
