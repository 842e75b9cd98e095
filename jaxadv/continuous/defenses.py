"""Stability as a defense of neural ODEs, in short forms, and the attack on what a solve costs.

What lives here: the logarithmic norm and its bound, the loss of SODEF, the Lyapunov loss of LyaNet, the skew fields of
SONet, and attacks that raise the number of adaptive steps. What does not: solvers (`solve.py`), networks (`nets.py`),
and the evaluation that tells a defense from a masked gradient.

Fields are functions `(params, t, z) -> dz` of a batch whose rows do not depend on each other, as `ode_solve` takes
them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import attacks, losses
from jaxadv.continuous.solve import SolveCfg, ode_solve
from jaxadv.core import Attack, Model, Objective, Threat, Trainable, check, robust
from jaxadv.core.rows import flat
from jaxadv.models import group_norm
from jaxadv.models.adapt import Static

Partial = jax.tree_util.Partial

# --------------------------------------------------------------------------------------------------- logarithmic norms


def log_norm(jacobian: Any) -> Any:
    """Return the logarithmic norm of matrices in the Euclidean norm: the largest eigenvalue of `(J + J^T) / 2`.

    Args:
      jacobian: `[..., n, n]`.

    Returns:
      `[...]`, the fastest rate at which two solutions that are near each other can part; negative where they approach.
    """
    return jnp.linalg.eigvalsh((jacobian + jnp.swapaxes(jacobian, -1, -2)) / 2)[..., -1]


def field_jacobian(vf: Callable, params: Any, t: Any, z: Any) -> Any:
    """Return the derivative of a field with respect to the state, row by row.

    Args:
      vf: `(params, t, z) -> dz`.
      params: of the field.
      t: the time.
      z: `[b, n]`.

    Returns:
      `[b, n, n]`; the first of the two axes is that of the field's value.
    """
    return jax.vmap(jax.jacfwd(lambda row: vf(params, t, row[None])[0]))(z)


class Contraction(NamedTuple):
    """How a flow spreads small perturbations.

    Attributes:
      rates: `[n + 1, b]` logarithmic norms along the solution, at even times from t0 to t1.
      bound: `[b]` e to the integral of the rates: no small perturbation of the first state grows by more.
      ok: `[b]` whether the solve ended.
    """

    rates: Any
    bound: Any
    ok: Any


def contraction(vf: Callable, params: Any, z0: Any, cfg: SolveCfg, *, n: int = 32) -> Contraction:
    """Bound by how much a flow spreads small perturbations of the first state: `|δ(t1)| <= exp(∫ μ(J)) |δ(t0)|`.

    Exact for infinitesimal perturbations, up to the trapezoidal rule; for finite ones the rate must be the largest over
    what lies between the two solutions.

    Args:
      vf: the field, on vectors.
      params: of the field.
      z0: `[b, n]` first states.
      cfg: what to solve with.
      n: intervals of the integral.

    Returns:
      Rates and bound.

    References:
      Söderlind 2006, The logarithmic norm: history and modern theory, BIT 46.
    """
    check.whole("n", n)
    times = cfg.t0 + (cfg.t1 - cfg.t0) * jnp.arange(n + 1, dtype=z0.dtype) / n
    later, stats = ode_solve(vf, params, z0, cfg, ts=times[1:])
    states = jnp.concatenate([z0[None], later])
    rates = jax.vmap(lambda t, z: log_norm(field_jacobian(vf, params, t, z)))(times, states)
    total = (rates.sum(0) - (rates[0] + rates[-1]) / 2) * (cfg.t1 - cfg.t0) / n
    return Contraction(rates, jnp.exp(total), jnp.broadcast_to(stats.ok, z0.shape[:1]))


# --------------------------------------------------------------------------------------------------------------- SODEF


def sodef_field(params: Any, t: Any, z: Any) -> Any:
    """The field of SODEF on features: `sin(-(W z + b))`.

    Args:
      params: `{'w': [n, n], 'b': [n]}`.
      t: not used.
      z: `[b, n]`.

    Returns:
      `[b, n]`.
    """
    del t
    return jnp.sin(-(z @ params["w"].T + params["b"][None]))


def sodef_terms(vf: Callable, params: Any, z: Any, *, t: float = 1.0) -> dict[str, Any]:
    """Return what SODEF asks of a field at the features of examples, each near zero where it is fulfilled.

    | term | small where |
    | --- | --- |
    | `steady`, mean of `(50 f)^2` | the example is an equilibrium |
    | `diagonal`, mean of `exp(J_jj + 1)` | the diagonal of the Jacobian is far below zero |
    | `dominant`, mean of `exp(0.1 (sum_{i != j} abs J_ij - abs J_jj + 1))` | it dominates its column |

    With the last two, all eigenvalues lie in the left half plane (Gershgorin), so that the equilibrium attracts.

    Args:
      vf: the field.
      params: of the field.
      z: `[b, n]` features.
      t: the time, for fields that see it.

    Returns:
      Term to `[b]`.

    References:
      Kang et al. 2021, Stable neural ODE with Lyapunov-stable equilibrium points for defending against adversarial
      attacks, arXiv:2110.12976; code kangqiyu/SODEF. Its code takes Jacobians of 16 rows of a batch only.
    """
    value, jacobian = vf(params, t, z), field_jacobian(vf, params, t, z)
    diagonal = jnp.diagonal(jacobian, axis1=-2, axis2=-1)
    column = jnp.abs(jacobian).sum(-2) - 2 * jnp.abs(diagonal)
    return {
        "steady": jnp.square(50 * value).mean(-1),
        "diagonal": jnp.exp(diagonal + 1).mean(-1),
        "dominant": jnp.exp(0.1 * (column + 1)).mean(-1),
    }


SODEF_WEIGHTS = {"steady": 0.1, "diagonal": 10.0, "dominant": 0.0}
"""The weights of the published code, which leaves dominance out."""


def sodef_penalty(
    vf: Callable, params: Any, z: Any, *, weights: dict[str, float] = SODEF_WEIGHTS, t: float = 1.0
) -> Any:
    """Return the weighted sum of `sodef_terms`.

    Args:
      vf: the field.
      params: of the field.
      z: `[b, n]` features.
      weights: term to weight.
      t: the time.

    Returns:
      `[b]`, to be minimized.

    Raises:
      ValueError: on an unknown term.
    """
    for name in weights:
        check.choice("term", name, SODEF_WEIGHTS)
    terms = sodef_terms(vf, params, z, t=t)
    return sum((weight * terms[name] for name, weight in weights.items() if weight), jnp.zeros_like(terms["steady"]))


def _sodef(apply, params, state, batch, key, *, weights, bn):
    (logits, seen), state = apply(params, state, batch["x"], bn=bn, key=key, taps=("block:in",))
    penalty = sodef_penalty(sodef_field, params["block"]["field"], seen["block:in"], weights=dict(weights))
    metrics = {"clean": robust(logits, batch["y"]).astype(jnp.float32), "unstable": penalty}
    return losses.cross_entropy(logits, batch["y"]) + penalty, (state, metrics)


def sodef(weights: dict[str, float] = SODEF_WEIGHTS, *, bn: str = "train") -> Objective:
    """Return the loss of SODEF: cross-entropy, and `sodef_penalty` where each example enters the field.

    Args:
      weights: term to weight, see `sodef_terms`.
      bn: mode of batch norm.

    Returns:
      The objective for the network `sodef`; metrics `clean` and `unstable`, the penalty.

    Raises:
      ValueError: on an unknown term.

    References:
      Kang et al. 2021, arXiv:2110.12976. They train in stages, on the frozen features of a robust network, and take
      Jacobians of 16 rows of a batch; here all is trained at once, with those of all rows.
    """
    for name in weights:
        check.choice("term", name, SODEF_WEIGHTS)
    return partial(_sodef, weights=tuple(weights.items()), bn=bn)


# -------------------------------------------------------------------------------------------------------------- LyaNet


def lyapunov_points(key, n: int, features: int, classes: int, *, limit: float = 15.0) -> Any:
    """Draw states at which the Lyapunov condition is asked for: random directions, radii uniform up to a limit.

    Args:
      key: a typed key.
      n: number of points (512 as published).
      features: of a state.
      classes: number of classes; the largest radius is `limit sqrt(classes)`.
      limit: see there.

    Returns:
      `[n, features]`.
    """
    k_way, k_long = jax.random.split(key)
    way = jax.random.normal(k_way, (n, features))
    long = jax.random.uniform(k_long, (n, 1), maxval=limit * math.sqrt(classes))
    return long * way / jnp.linalg.norm(way, axis=-1, keepdims=True)


def lyapunov_violation(motion: Any, head: Callable, z: Any, y: Any, *, kappa: float) -> Any:
    """Return by how much the cross-entropy along a motion misses an exponential fall: `relu(dV/dt + κ V)`.

    V is the cross-entropy of the logits at the state. κ V is held constant in gradients. Zero everywhere means that V
    falls at least as `exp(-κ t)` along every solution, without any solve in training.

    Args:
      motion: `[b, n]`, the field at the states.
      head: states to logits.
      z: `[b, n]` states.
      y: int `[b]`.
      kappa: the rate.

    Returns:
      `[b]`.
    """
    value, slope = jax.jvp(lambda z: losses.cross_entropy(head(z), y), (z,), (motion,))
    return jax.nn.relu(slope + kappa * lax.stop_gradient(value))


def lyanet_loss(
    field: Callable, head: Callable, x: Any, y: Any, key, *, features: int, classes: int, points: int = 512,
    kappa: float = 10.0, limit: float = 15.0, t1: float = 1.0,
) -> Any:  # fmt: skip
    """Return the Lyapunov loss of each example: the mean violation over random states at one random time.

    Args:
      field: `(t, z, x) -> dz`, a field of states `[b, n]` that is steered by the example.
      head: states to logits.
      x: `[b, ...]` examples, or what the field sees of them.
      y: int `[b]`.
      key: a typed key.
      features: n, of a state.
      classes: number of classes.
      points: states for each example, the same for all.
      kappa: the rate, see `lyapunov_violation`.
      limit: see `lyapunov_points`.
      t1: the time is uniform up to here.

    Returns:
      `[b]`.

    References:
      Rodriguez, Ames and Yue 2022, LyaNet: a Lyapunov framework for training neural ODEs, arXiv:2202.02526; code
      ivandariojr/LyapunovLearning, whose gain of the field, changed while training, is left out.
    """
    k_time, k_point = jax.random.split(key)
    t = jax.random.uniform(k_time, maxval=t1)

    def at(point):
        z = jnp.broadcast_to(point, (y.shape[0], features))
        return lyapunov_violation(field(t, z, x), head, z, y, kappa=kappa)

    return jax.vmap(at)(lyapunov_points(k_point, points, features, classes, limit=limit)).mean(0)


def _lyanet(apply, params, state, batch, key, *, points, kappa, limit, bn):
    k_time, k_point = jax.random.split(key)
    features, classes = params["linear"]["kernel"].shape
    states = lyapunov_points(k_point, points, features, classes, limit=limit)
    asked = states, batch["y"], kappa, jax.random.uniform(k_time)
    settings = {"bn": bn, "key": key, "taps": ("lyapunov",), "hints": {"lyapunov": asked}}
    (_, seen), state = apply(params, state, batch["x"], **settings)
    return seen["lyapunov"], (state, {"violation": seen["lyapunov"]})


def lyanet(*, points: int = 512, kappa: float = 10.0, limit: float = 15.0, bn: str = "train") -> Objective:
    """Return the Lyapunov loss as an objective, see `lyanet_loss`; training solves nothing.

    Args:
      points: states for each example, the same for all.
      kappa: the rate at which the cross-entropy is to fall.
      limit: see `lyapunov_points`.
      bn: mode of batch norm.

    Returns:
      The objective for the network `lyanet`; metric `violation`.

    Raises:
      ValueError: if a setting is not positive.

    References:
      Rodriguez, Ames and Yue 2022, LyaNet: a Lyapunov framework for training neural ODEs, arXiv:2202.02526.
    """
    check.whole("points", points)
    check.positive("kappa", kappa, "As published: 10.")
    check.positive("limit", limit, "As published: 15.")
    return partial(_lyanet, points=points, kappa=kappa, limit=limit, bn=bn)


# --------------------------------------------------------------------------------------------------------------- SONet


_MAPS = ("NHWC", "HWIO", "NHWC")


def skew_convolution(kernel: Any, u: Any, act: Callable = jax.nn.leaky_relu) -> Any:
    """Return the motion `(act(K * z), act(-K^T * y))` of a state `(y, z)` that is stacked along height.

    Without the activation it is skew: it turns the state and keeps its norm.

    Args:
      kernel: `[3, 3, c, c]`.
      u: `[b, 2 h, w, c]`.
      act: activation.

    Returns:
      `[b, 2 h, w, c]`.
    """
    y, z = jnp.split(u, 2, axis=1)
    ahead = lax.conv_general_dilated(z, kernel, (1, 1), "SAME", dimension_numbers=_MAPS)
    back = lax.conv_transpose(y, kernel, (1, 1), "SAME", dimension_numbers=_MAPS, transpose_kernel=True)
    return jnp.concatenate([act(ahead), act(-back)], axis=1)


def sonet_field(params: Any, t: Any, u: Any) -> Any:
    """The field of SONet's blocks: norm, `skew_convolution`, norm.

    Args:
      params: `{'kernel': [3, 3, c, c], 'scale': [2, c], 'bias': [2, c]}`.
      t: not used.
      u: `[b, 2 h, w, c]`.

    Returns:
      `[b, 2 h, w, c]`.
    """
    del t
    scale, bias = params["scale"], params["bias"]
    moved = skew_convolution(params["kernel"], group_norm(u, scale[0], bias[0], groups=8))
    return group_norm(moved, scale[1], bias[1], groups=8)


def sonet_init(key, channels: int) -> dict[str, Any]:
    """Draw the weights of a SONet block.

    Args:
      key: a typed key.
      channels: of its feature maps.

    Returns:
      The weights, see `sonet_field`.
    """
    bound = 1 / math.sqrt(9 * channels)
    kernel = jax.random.uniform(key, (3, 3, channels, channels), minval=-bound, maxval=bound)
    return {"kernel": kernel, "scale": jnp.ones((2, channels)), "bias": jnp.zeros((2, channels))}


def sonet_block(params: Any, x: Any, cfg: SolveCfg) -> Any:
    """Return the half y of the state that starts at `(x, x)`.

    Args:
      params: see `sonet_field`.
      x: `[b, h, w, c]`.
      cfg: what to solve with; published: Dormand-Prince at tolerances of 0.1, jointly for a batch.

    Returns:
      `[b, h, w, c]`.

    References:
      Huang, Yu, Zhang, Ma and Yao 2020, Adversarial robustness of stabilized neural ODEs might be from obfuscated
      gradients, arXiv:2009.13145; code yao-lab/SONet.
    """
    out, _ = ode_solve(sonet_field, params, jnp.concatenate([x, x], axis=1), cfg)
    return out[:, : x.shape[1]]


def sonet_head_field(params: Any, t: Any, s: Any) -> Any:
    """The field of SONet's last layer on features and logits: `(W act(z) + b_y, -W^T act(y) + b_z)`.

    Args:
      params: `{'w': [n, k], 'b': [n + k]}`.
      t: not used.
      s: `[b, n + k]`, features y before logits z.

    Returns:
      `[b, n + k]`.
    """
    del t
    n = params["w"].shape[0]
    y, z = s[:, :n], s[:, n:]
    moved = [jax.nn.leaky_relu(z) @ params["w"].T, -jax.nn.leaky_relu(y) @ params["w"]]
    return jnp.concatenate(moved, axis=1) + params["b"][None]


def sonet_logits(params: Any, features: Any, cfg: SolveCfg) -> Any:
    """Return the logits z of the state that starts at (features, 0.1).

    Args:
      params: see `sonet_head_field`.
      features: `[b, n]`.
      cfg: what to solve with.

    Returns:
      `[b, k]`.
    """
    n, k = params["w"].shape
    start = jnp.concatenate([features, jnp.full((features.shape[0], k), 0.1, features.dtype)], axis=1)
    return ode_solve(sonet_head_field, params, start, cfg)[0][:, n:]


# --------------------------------------------------------------------------------------------------- cost of the solver


def local_error(vf: Callable, params: Any, z0: Any, cfg: SolveCfg, *, steps: int = 8) -> Any:
    """Return the sum of the logarithms of the scaled local errors on an even grid: how hard a solve is.

    Numbers of adaptive steps have no gradient; this has one. The error of a step is that of the pair Heun and Euler,
    scaled and measured as step control does: `rms(err / (atol + rtol max(abs z, abs z_new)))`.

    Args:
      vf: the field.
      params: of the field.
      z0: `[b, ...]` first states.
      cfg: its times and tolerances.
      steps: of the grid.

    Returns:
      `[b]`.
    """
    h = (cfg.t1 - cfg.t0) / steps

    def step(z, t):
        first = vf(params, t, z)
        second = vf(params, t + h, z + h * first)
        new = z + h / 2 * (first + second)
        scale = cfg.atol + cfg.rtol * jnp.maximum(jnp.abs(z), jnp.abs(new))
        error = jnp.square(flat(h / 2 * (second - first) / scale)).mean(-1)
        return new, jnp.log(error + 1e-20) / 2

    times = (cfg.t0 + h * jnp.arange(steps)).astype(z0.dtype)
    return lax.scan(step, z0, times)[1].sum(0)


def _hardness(static, start, vf, params, x):
    """What a solve costs, to follow and to count, in the place of logits."""
    cfg, steps = static.values
    z0 = start(params, x)
    counted = ode_solve(vf, lax.stop_gradient(params), lax.stop_gradient(z0), cfg)[1].num_steps
    counted = jnp.broadcast_to(counted, x.shape[:1]).astype(x.dtype)
    return jnp.stack([local_error(vf, params, z0, cfg, steps=steps), counted], axis=-1)


def solver_cost(start: Callable, vf: Callable, params: Any, cfg: SolveCfg, *, steps: int = 8) -> Model:
    """Return what a solve costs as a model, for `solver_cost_attack`.

    Args:
      start: `(params, x) -> z0`.
      vf: the field.
      params: of both.
      cfg: the adaptive solve that is attacked.
      steps: of the grid of `local_error`.

    Returns:
      `[b, 2]` from a batch: `local_error`, and the number of adaptive steps.

    Raises:
      ValueError: if the steps are not adaptive.
    """
    if cfg.mode != "adaptive":
        raise ValueError(f"only adaptive solves have a cost that inputs change; got mode={cfg.mode!r}. Nothing to do.")
    return Partial(_hardness, Static(cfg, steps), Partial(start), Partial(vf), params)


def _steps_of(apply_fn, tap, params, state, x):
    (_, seen), _ = apply_fn(params, state, x, bn="eval", taps=tap.values)
    (stats,) = seen.values()
    counted = jnp.broadcast_to(stats.num_steps, x.shape[:1]).astype(x.dtype)
    return jnp.stack([counted, jnp.zeros_like(counted)], axis=-1)


def step_counter(trainable: Trainable, *, at: str = "block.stats") -> Model:
    """Return the number of steps of a network's solve as a model without gradients, for attacks by queries.

    `margin` with the label 1 is minus the number of steps, so score-based attacks raise it.

    Args:
      trainable: a network of `continuous.NETS`.
      at: the tap that shows its `SolveStats`.

    Returns:
      `[b, 2]` from a batch: the number of steps, and 0.
    """
    return Partial(_steps_of, trainable.apply, Static(at), trainable.params, trainable.state)


def effort(costs: Any, y: Any) -> Any:
    """The loss of `solver_cost_attack`: minus the differentiable cost.

    Args:
      costs: `[b, 2]` of `solver_cost`.
      y: not used.

    Returns:
      `[b]`.
    """
    del y
    return -costs[:, 0]


def fewest(costs: Any, y: Any) -> Any:
    """The criterion of `solver_cost_attack`: minus the number of steps.

    Args:
      costs: `[b, 2]` of `solver_cost`.
      y: not used.

    Returns:
      `[b]`.
    """
    del y
    return -costs[:, 1]


def solver_cost_attack(threat: Threat, *, steps: int = 50, name: str = "solver_cost", **settings: Any) -> Attack:
    """Return an attack that makes adaptive solves as long as it can; run it on a `solver_cost`.

    Projected gradient ascent on the local errors; the point with the most steps is returned. `y` is not read: pass
    zeros of floating point, so that nothing is taken for a label. A cap on steps (`SolveCfg.max_steps`) is the defense,
    and its price is that a solve that hits it has failed.

    Args:
      threat: the allowed set.
      steps: gradient steps.
      name: enters the random keys.
      **settings: of `attacks.pgd`.

    Returns:
      The attack; minus its `score` is the number of adaptive steps.

    References:
      Haque et al. 2021, NODEAttack: adversarial attack on the energy consumption of neural ODEs (code). There Adam
      descends a penalty on the perturbation, through step sizes that carry gradients; here they carry none.
    """
    return attacks.pgd(threat, steps=steps, loss=effort, criterion=fewest, name=name, **settings)
