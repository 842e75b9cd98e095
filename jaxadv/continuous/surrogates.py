"""Models that know their solver, and the same weights behind another one: what honest evaluation attacks with.

What lives here: `ode_model` and functions `model -> model` that change solver, tolerance, adjoint or backward pass.
What does not: the protocol that uses them (room `evaluate`).

| the doubt | the cure |
| --- | --- |
| accepted and rejected steps make the loss jump | `fixed_step`, and the points carried over |
| gradients through adaptive steps mislead | `surrogate_gradient`: native forward pass, gradients of a fixed grid |
| the tolerance is the defense | `with_cfg` at other tolerances |
| the adjoint is inexact | `with_cfg` with `adjoint='checkpoint'` |
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxadv.attacks import straight
from jaxadv.continuous.solve import SolveCfg, SolveStats
from jaxadv.core import Model, Trainable
from jaxadv.models.adapt import Static

Partial = jax.tree_util.Partial


def _run_net(apply, variables, x, cfg):
    """Logits, and statistics of all solves, of a network with an `ODEBlock` named `block` and perhaps others."""
    told = {} if cfg is None else {"hints": {"solve": cfg}}
    (logits, seen), _ = apply(*variables, x, bn="eval", taps=("*.stats", "block.solver"), **told)
    solver = seen.pop("block.solver")
    first, *more = seen.values()
    for other in more:
        first = SolveStats(*(a + b for a, b in zip(first[:-1], other[:-1])), ok=first.ok & other.ok)
    return logits, first, solver


def _logits(run, cfg, variables, x):
    return run(variables, x, cfg.values[0])[0]


def ode_model(trainable: Trainable | Callable, cfg: SolveCfg | None = None, params: Any = None) -> Model:
    """Return a model whose solver can be exchanged.

    Args:
      trainable: a network of `continuous.NETS`, or `lt_node` of one; or a module-level function
        `run(params, x, cfg) -> (logits, stats)` of your own.
      cfg: what to solve with; None is what the network was built with.
      params: of a function of your own.

    Returns:
      Logits from a batch, a callable pytree: new weights of one structure and solver do not recompile.

    Raises:
      ValueError: if a function comes without `cfg`.
    """
    if isinstance(trainable, Trainable):
        return Partial(_logits, Partial(_run_net, trainable.apply), Static(cfg), (trainable.params, trainable.state))
    if cfg is None:
        raise ValueError("a function of your own must come with the cfg it is solved with; got None.")
    return Partial(_logits, Partial(trainable), Static(cfg), params)


def _parts(model: Any) -> tuple:
    if not isinstance(model, Partial) or model.func is not _logits:
        raise ValueError(
            f"the model must know its solver; got {getattr(getattr(model, 'func', model), '__name__', type(model))}. "
            "Build it with continuous.ode_model(trainable)."
        )
    return model.args


def with_cfg(model: Model, cfg: SolveCfg) -> Model:
    """Return the model with the same weights behind another solver.

    Args:
      model: from `ode_model`.
      cfg: what to solve with.

    Returns:
      The model.

    Raises:
      ValueError: if the model does not know its solver.
    """
    run, _, variables = _parts(model)
    return Partial(_logits, run, Static(cfg), variables)


def network_of(model: Model) -> tuple[Trainable | None, SolveCfg | None]:
    """Return what a model was made of.

    Args:
      model: from `ode_model`.

    Returns:
      The network, None for a function of your own; and its solver, None if that is the network's own.

    Raises:
      ValueError: if the model does not know its solver.
    """
    run, cfg, variables = _parts(model)
    inside = isinstance(run, Partial) and run.func is _run_net
    return (Trainable(run.args[0], *variables) if inside else None), cfg.values[0]


def solved(model: Model, x: Any) -> tuple[Any, SolveStats]:
    """Return logits and what their solve cost.

    Args:
      model: from `ode_model`.
      x: `[b, ...]`.

    Returns:
      Logits `[b, k]` and the statistics.

    Raises:
      ValueError: if the model does not know its solver.
    """
    run, cfg, variables = _parts(model)
    logits, stats, *_ = run(variables, x, cfg.values[0])
    return logits, stats


def cfg_of(model: Model, x: Any) -> SolveCfg:
    """Return what a model is solved with; nothing is computed.

    Args:
      model: from `ode_model`.
      x: a batch, of which the shape counts.

    Returns:
      The configuration.

    Raises:
      ValueError: if the model does not know its solver.
    """
    run, cfg, variables = _parts(model)
    if cfg.values[0] is not None:
        return cfg.values[0]
    return jax.eval_shape(lambda v, x: run(v, x, None)[2], variables, x).values[0]


def fixed_step(model: Model, x: Any, method: str = "rk4", n_steps: int = 8) -> Model:
    """Return the model on a fixed grid, whose gradients are smooth in the input.

    Args:
      model: from `ode_model`.
      x: a batch, of which the shape counts.
      method: see `METHODS`.
      n_steps: steps of the grid.

    Returns:
      The model.

    Raises:
      ValueError: if the model does not know its solver.
    """
    cfg = cfg_of(model, x)
    grid = dataclasses.replace(cfg, method=method, mode="fixed", n_steps=n_steps, adjoint=None)
    return with_cfg(model, grid)


def with_tolerance(model: Model, x: Any, tolerance: float) -> Model:
    """Return the model with other tolerances; a fixed grid becomes Dormand-Prince with adaptive steps.

    Args:
      model: from `ode_model`.
      x: a batch, of which the shape counts.
      tolerance: relative and absolute.

    Returns:
      The model.

    Raises:
      ValueError: if the model does not know its solver, or the tolerance is none.
    """
    cfg = cfg_of(model, x)
    if cfg.mode == "fixed":
        cfg = dataclasses.replace(cfg, method="dopri5", mode="adaptive", adjoint=None)
    return with_cfg(model, dataclasses.replace(cfg, rtol=float(tolerance), atol=float(tolerance)))


def surrogate_gradient(model: Model, surrogate: Model) -> Model:
    """Return the model with its own logits and the gradients of another solver of the same weights.

    Args:
      model: from `ode_model`; exactly what is deployed.
      surrogate: `fixed_step(model, x)`, for one.

    Returns:
      The model.

    References:
      Athalye et al. 2018, Obfuscated gradients give a false sense of security, sec. 4.1.2, arXiv:1802.00420.
    """
    return straight(model, surrogate)
