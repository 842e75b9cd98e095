"""A classifier that is one ODE and nothing else: sNODE, its gradients, its nonlinear conjugate gradients, its attack.

What lives here: the network `dx/dt = act(W(t) x + b(t))` on a grid in depth, direct, adjoint and sensitivity problems,
Sobolev gradients, conjugate gradients as optax transformations that take the step which minimizes the cost of the
linearized flow, and the sensitivity attack. What does not: adaptive solvers (`solve.py`); here a step is an Euler step.

Weights are a dict of functions of depth, given by their values on the N cells of a uniform grid: `w` `[N, n, n]` and
`b` `[N, n]`. Gradients with respect to them are densities: they do not shrink as the grid is refined.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxadv import losses
from jaxadv.attacks.judge import ask, dead
from jaxadv.attacks.minimum import MinimumNorm, ball, mended
from jaxadv.core import Attack, Targets, Threat, Trainable, check, edges, label_of, pytree, select, static, step_keys
from jaxadv.core.rows import flat

Partial = jax.tree_util.Partial
_CORNER = 0.1


def _smooth_relu(z):
    """ReLU with a parabola between -0.1 and 0.1, once continuously differentiable."""
    return jnp.where(jnp.abs(z) < _CORNER, jnp.square(z + _CORNER) / (4 * _CORNER), jnp.maximum(z, 0))


FLOW_ACTIVATIONS: dict[str, Callable] = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "smooth_relu": _smooth_relu,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "identity": lambda z: z,
}
"""Name of an activation of the field to the function."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SNODE:
    """What an sNODE depends on beside its weights; hashable, and a pytree without leaves.

    Attributes:
      classes: number of classes: the logits are the first so many components of the state.
      horizon: T, the depth.
      rate: grid cells for each unit of depth.
      activation: one of `FLOW_ACTIVATIONS`.
      fit: weight of half the squared distance of the state to the one-hot label, padded with zeros.
      entropy: weight of the cross-entropy.
      rest: weight of half the squared distance of the state to `T act(0)`.
      decay: weight of half the integral of the squared weights.
      pool: side of the squares over which images are averaged first (2 makes 14x14 of MNIST).
    """

    classes: int
    horizon: float = 3.0
    rate: int = 50
    activation: str = "tanh"
    fit: float = 1.0
    entropy: float = 0.0
    rest: float = 0.0
    decay: float = 0.0
    pool: int = 1

    def __post_init__(self):
        check.whole("classes", self.classes, 2)
        check.whole("rate", self.rate)
        check.whole("pool", self.pool)
        check.positive("horizon", self.horizon)
        check.choice("activation", self.activation, FLOW_ACTIVATIONS)
        if abs(self.horizon * self.rate - self.nodes) > 1e-6 or self.nodes < 1:
            raise ValueError(
                f"horizon must be a whole number of cells 1/rate; got horizon={self.horizon}, rate={self.rate}. "
                "Published: 3.0 and 50."
            )

    @property
    def nodes(self) -> int:
        """Number of grid cells."""
        return round(self.horizon * self.rate)

    @property
    def h(self) -> float:
        """Length of an Euler step."""
        return 1 / self.rate

    @property
    def act(self) -> Callable:
        """The activation."""
        return FLOW_ACTIVATIONS[self.activation]


def snode_init(key, features: int, net: SNODE) -> dict[str, Any]:
    """Draw smooth random weights: N(0, 1) / n at whole depths, a cubic spline in between.

    Args:
      key: a typed key.
      features: n, the size of the state.
      net: the settings.

    Returns:
      The weights.
    """
    from scipy.interpolate import CubicSpline

    knots = np.linspace(0, net.horizon, max(2, round(net.horizon) + 1))
    places = np.arange(net.nodes) * net.h
    spread = CubicSpline(knots, np.eye(len(knots)))(places).astype(np.float32)
    drawn = jax.random.normal(key, (len(knots), features, features + 1)) / features
    both = jnp.einsum("ik,k...->i...", spread, drawn)
    return {"w": both[..., :-1], "b": both[..., -1]}


def snode_state(x: Any, net: SNODE) -> Any:
    """Return the first state of images: averaged over squares, in a line, with background 0 and foreground -1.

    Args:
      x: `[b, h, w, c]` in [0, 1], or `[b, n]`.
      net: the settings.

    Returns:
      `[b, n]`.

    Raises:
      ValueError: if the squares do not tile the image.
    """
    p = net.pool
    if p > 1:
        if x.ndim != 4 or x.shape[1] % p or x.shape[2] % p:
            raise ValueError(f"pool must divide the sides of images [b, h, w, c]; got pool={p} for {x.shape}. Use 1?")
        b, height, width, c = x.shape
        x = x.reshape(b, height // p, p, width // p, p, c).mean((2, 4))
    return -x.reshape(x.shape[0], -1)


def snode_forward(params: dict[str, Any], x0: Any, net: SNODE) -> Any:
    """Solve the direct problem by Euler's method: `x_{i+1} = x_i + h act(W_i x_i + b_i)`.

    Args:
      params: the weights.
      x0: `[b, n]` first states.
      net: the settings.

    Returns:
      `[N + 1, b, n]`, all states.
    """

    def step(x, layer):
        x = x + net.h * net.act(_affine(layer, x))
        return x, x

    return jnp.concatenate([x0[None], lax.scan(step, x0, params)[1]])


def _affine(layer, x):
    return x @ layer["w"].T + layer["b"][None]


def _flow(params, x0, net: SNODE):
    return snode_forward(params, x0, net)[-1]


def snode_loss(out: Any, y: Any, net: SNODE) -> Any:
    """Return what each example adds to the cost.

    Args:
      out: `[b, n]` the last states.
      y: int `[b]`.
      net: the settings.

    Returns:
      `[b]`.
    """
    total = 0.0
    if net.fit:
        wanted = jax.nn.one_hot(y, out.shape[-1], dtype=out.dtype)
        total = total + net.fit / 2 * jnp.square(out - wanted).sum(-1)
    if net.entropy:
        total = total + net.entropy * losses.cross_entropy(out[:, : net.classes], y)
    if net.rest:
        total = total + net.rest / 2 * jnp.square(out - net.horizon * net.act(jnp.zeros_like(out))).sum(-1)
    return total


def _cost(out, params, y, net: SNODE):
    """The cost as a function of the last states and the weights, convex in both."""
    mean = snode_loss(out, y, net).mean()
    if not net.decay:
        return mean
    return mean + net.decay / 2 * net.h * optax.tree.norm(params, squared=True)


def snode_cost(params: dict[str, Any], x0: Any, y: Any, net: SNODE) -> Any:
    """Return the mean loss plus the integral of the squared weights.

    Args:
      params: the weights.
      x0: `[b, n]` first states.
      y: int `[b]`.
      net: the settings.

    Returns:
      A number.
    """
    return _cost(_flow(params, x0, net), params, y, net)


def snode_gradient(params: dict[str, Any], x0: Any, y: Any, net: SNODE) -> tuple[Any, dict[str, Any]]:
    """Return the cost and its L2 gradient by the adjoint problem.

    `-dλ/dt = W^T (act'(W x + b) λ)` backward from the gradient at the last state; with `U = act'(W x + b) λ` the
    gradient is `sum U x^T` for w and `sum U` for b, plus the decay. The adjoint is that of the Euler steps, so the
    gradient is `jax.grad(snode_cost) / h` to rounding.

    Args:
      params: the weights.
      x0: `[b, n]` first states.
      y: int `[b]`.
      net: the settings.

    Returns:
      The cost, and a density with the shape of the weights.
    """
    xs = snode_forward(params, x0, net)
    value, last = jax.value_and_grad(lambda out: snode_loss(out, y, net).mean())(xs[-1])

    def back(costate, given):
        layer, x = given
        pulled = jax.vjp(net.act, _affine(layer, x))[1](costate)[0]
        return costate + net.h * pulled @ layer["w"], {"w": pulled.T @ x, "b": pulled.sum(0)}

    density = lax.scan(back, last, (params, xs[:-1]), reverse=True)[1]
    if net.decay:
        value = value + net.decay / 2 * net.h * optax.tree.norm(params, squared=True)
        density = jax.tree.map(lambda g, p: g + net.decay * p, density, params)
    return value, density


def sensitivity(params: Any, x0: Any, net: SNODE, *, dparams: Any = None, dx: Any = None) -> Any:
    """Solve the sensitivity problem: how the states move when weights, first states or both move.

    `dξ/dt = act'(W x + b) (W ξ + d_W x + d_b)`; the derivative of the Euler steps, forward.

    Args:
      params: the weights.
      x0: `[b, n]` first states.
      net: the settings.
      dparams: direction of the weights; None for none.
      dx: direction of the first states; None for none.

    Returns:
      `[N + 1, b, n]`.
    """
    nothing = lambda given, like: jax.tree.map(jnp.zeros_like, like) if given is None else given  # noqa: E731
    tangents = nothing(dparams, params), nothing(dx, x0)
    return jax.jvp(lambda p, x: snode_forward(p, x, net), (params, x0), tangents)[1]


def flow_jacobian(params: Any, x0: Any, net: SNODE) -> Any:
    """Return the derivative of the last state with respect to the first, by n sensitivity problems.

    Args:
      params: the weights.
      x0: `[b, n]` first states.
      net: the settings.

    Returns:
      `[b, n, n]`: rows are components of the last state. A covariance C of the input leaves as `J C J^T`.
    """
    columns = jax.vmap(lambda e: sensitivity(params, x0, net, dx=jnp.broadcast_to(e, x0.shape))[-1])
    return jnp.moveaxis(columns(jnp.eye(x0.shape[1], dtype=x0.dtype)), 0, -1)


# ---------------------------------------------------------------------------------------------------- Sobolev gradients


@lru_cache
def green(nodes: int, h: float, length: float = 1.0) -> np.ndarray:
    """Return the matrix that solves `v - l^2 v'' = u` with `v' = 0` at both ends, on grid cells.

    Second differences on cells: symmetric and positive, keeps constants, and cosines are its eigenvectors. In the limit
    it is the integral against the Green function `cosh(min(s, t)) cosh(T - max(s, t)) / sinh(T)`.

    Args:
      nodes: number of cells.
      h: their length.
      length: l, the scale below which changes are smoothed.

    Returns:
      float64 `[N, N]`, read-only.
    """
    laplace = 2 * np.eye(nodes) - np.eye(nodes, k=1) - np.eye(nodes, k=-1)
    laplace[0, 0] = laplace[-1, -1] = 1 if nodes > 1 else 0
    matrix = np.linalg.inv(np.eye(nodes) + (length / h) ** 2 * laplace)
    matrix.setflags(write=False)
    return matrix


def sobolev(u: Any, h: float, length: float = 1.0) -> Any:
    """Turn an L2 gradient into the gradient of the same cost in the Sobolev space W^{1,2}.

    Args:
      u: pytree of functions of depth, each `[N, ...]`.
      h: length of a cell.
      length: scale below which changes along depth are smoothed; 1 is the paper's.

    Returns:
      The same pytree, smoothed: `<sobolev(u), u>` is the squared Sobolev norm of the result, so that it is a direction
      of ascent wherever `u` is.

    References:
      Jaroudi et al. 2022, Standalone neural ODEs with sensitivity analysis, arXiv:2205.13933. Their prototype
      integrates the Green function with midpoints from a cubic spline, over a span of N - 1 cells.
    """
    one = lambda leaf: jnp.einsum("ij,j...->i...", jnp.asarray(green(leaf.shape[0], h, length), leaf.dtype), leaf)  # noqa: E731
    return jax.tree.map(one, u)


# -------------------------------------------------------------------------------------------------- conjugate gradients


def _pair(a, b):
    return optax.tree.vdot(a, b)


def _ratio(a, b):
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


class Turn(NamedTuple):
    """What a formula of conjugate gradients may use: inner products of this gradient g, the last one, the last step d.

    Attributes:
      gg: <g, g>.
      gl: <g, last g>.
      ll: <last g, last g>.
      dg: <last d, g>.
      dl: <last d, last g>.
    """

    gg: Any
    gl: Any
    ll: Any
    dg: Any
    dl: Any


def _fr(t: Turn):
    return _ratio(t.gg, t.ll)


def _pr(t: Turn):
    return _ratio(t.gg - t.gl, t.ll)


CONJUGATE: dict[str, Callable[[Turn], Any]] = {
    "fr": _fr,
    "pr+": lambda t: jnp.maximum(0, _pr(t)),
    "fr-pr": lambda t: jnp.clip(_pr(t), -_fr(t), _fr(t)),
    "hs": lambda t: _ratio(t.gg - t.gl, t.dg - t.dl),
    "dy": lambda t: _ratio(t.gg, t.dg - t.dl),
}
"""Name to the share of the last direction: Fletcher-Reeves, Polak-Ribiere, both, Hestenes-Stiefel, Dai-Yuan."""


class ConjugateState(NamedTuple):
    """The last gradient, what it is multiplied by in inner products, the last direction, the number of steps."""

    gradient: Any
    dual: Any
    direction: Any
    count: Any


def conjugate(
    method: str = "fr", *, riesz: Callable | None = None, inner: str = "l2"
) -> optax.GradientTransformationExtraArgs:
    """Turn gradients into conjugate directions of descent: `d = -g + γ d_last`, γ = 0 at the first.

    Args:
      method: one of `CONJUGATE`.
      riesz: linear map from the L2 gradient to the one that is followed (`sobolev`); None follows it as it is.
      inner: `'l2'`, inner products of what is followed, as in the authors' code, or `'w12'`, those of the space in
        which `riesz` finds gradients (`<a, b> = sum a_followed b_L2`), which is consistent.

    Returns:
      An optax transformation; its state is that of one minibatch, so start anew for each.

    Raises:
      ValueError: on an unknown method or inner product.

    References:
      Jaroudi et al. 2022, arXiv:2205.13933. Their Hestenes-Stiefel and Dai-Yuan branches read a variable that is never
      set; here both are the textbook's.
    """
    formula = check.choice("method", method, CONJUGATE)
    check.choice("inner", inner, ("l2", "w12"))

    def init(params):
        none = jax.tree.map(jnp.zeros_like, params)
        return ConjugateState(none, none, none, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        del params, extra
        g = updates if riesz is None else riesz(updates)
        dual = updates if inner == "w12" else g
        last, d = state.gradient, state.direction
        turn = Turn(_pair(g, dual), _pair(last, dual), _pair(last, state.dual), _pair(d, dual), _pair(d, state.dual))
        share = jnp.where(state.count == 0, 0, formula(turn))
        d = jax.tree.map(lambda new, old: share * old - new, g, d)
        return d, ConjugateState(g, dual, d, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


class SearchState(NamedTuple):
    """The last step length, and the cost before it."""

    step: Any
    cost: Any


def linearized_search(iterations: int = 20) -> optax.GradientTransformationExtraArgs:
    """Scale a direction by the step that minimizes the cost of the linearized flow.

    The flow is replaced by `out + η ξ`, with ξ from the sensitivity problem along the direction, so the cost is convex
    in η wherever it is convex in the outputs and the weights. Newton's method with a bracket finds the root of its
    slope; for squared distances the first step does.

    Args:
      iterations: of Newton's method.

    Returns:
      An optax transformation whose `update` takes two more arguments: `flow`, weights to outputs, and `cost`,
      `(outputs, weights) -> number`.
    """
    check.whole("iterations", iterations)

    def init(params):
        del params
        return SearchState(jnp.zeros(()), jnp.zeros(()))

    def update(updates, state, params=None, *, flow, cost, **extra):
        del extra
        out, moved = jax.jvp(flow, (params,), (updates,))
        move = lambda at, by, s: jax.tree.map(lambda a, b: a + s * b, at, by)  # noqa: E731
        along = lambda s: cost(move(out, moved, s), move(params, updates, s))  # noqa: E731
        slope = lambda s: jax.jvp(along, (s,), (jnp.ones_like(s),))[1]  # noqa: E731
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(updates)))
        sign = jnp.where(slope(zero) > 0, -1, 1).astype(zero.dtype)

        def newton(_, carry):
            low, high, s = carry
            g, c = jax.jvp(lambda s: sign * slope(sign * s), (s,), (jnp.ones_like(s),))
            low, high = jnp.where(g <= 0, s, low), jnp.where(g > 0, s, high)
            new = s - g / jnp.where(c > 0, c, 1)
            inside = (c > 0) & (new >= low) & (new <= high)
            other = jnp.where(jnp.isinf(high), 2 * jnp.maximum(s, 0.5), (low + high) / 2)
            return low, high, jnp.where(g == 0, s, jnp.where(inside, new, other))

        step = sign * lax.fori_loop(0, iterations, newton, (zero, zero + jnp.inf, zero))[2]
        state = SearchState(step.astype(state.step.dtype), along(zero).astype(state.cost.dtype))
        return jax.tree.map(lambda d: step * d, updates), state

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def ncg(
    method: str = "fr", *, riesz: Callable | None = None, inner: str = "l2", iterations: int = 20
) -> optax.GradientTransformationExtraArgs:
    """Return nonlinear conjugate gradients: `conjugate`, then `linearized_search`.

    Args:
      method: see `conjugate`.
      riesz: see `conjugate`.
      inner: see `conjugate`.
      iterations: see `linearized_search`.

    Returns:
      An optax transformation whose `update` takes `flow` and `cost`, and has no learning rate.
    """
    return optax.chain(conjugate(method, riesz=riesz, inner=inner), linearized_search(iterations))


def snode_ncg(
    params: dict[str, Any],
    x0: Any,
    y: Any,
    net: SNODE,
    *,
    steps: int = 6,
    method: str = "fr",
    inner: str = "l2",
    length: float | None = 1.0,
) -> tuple[dict[str, Any], Any]:
    """Take some conjugate gradient steps on one minibatch, as sNODEs are trained.

    Args:
      params: the weights.
      x0: `[b, n]` first states.
      y: int `[b]`.
      net: the settings.
      steps: on this minibatch.
      method: see `conjugate`.
      inner: see `conjugate`.
      length: scale of the Sobolev gradient, see `sobolev`; None follows the L2 gradient.

    Returns:
      The weights after the last step, and the cost before each, `[steps]`.
    """
    optimizer = ncg(method, riesz=None if length is None else lambda u: sobolev(u, net.h, length), inner=inner)
    update: Callable[..., Any] = optimizer.update

    def step(carry, _):
        params, state = carry
        value, density = snode_gradient(params, x0, y, net)
        move, state = update(
            density, state, params, flow=lambda p: _flow(p, x0, net), cost=lambda out, p: _cost(out, p, y, net)
        )
        return (jax.tree.map(jnp.add, params, move), state), value

    (params, _), values = lax.scan(step, (params, optimizer.init(params)), None, length=steps)
    return params, values


# -------------------------------------------------------------------------------------------------- network and attack


def _apply(net: SNODE, params, state, x, *, bn: str = "eval", **settings):
    """Logits of a batch; there is no batch norm and no noise, so the other settings change nothing."""
    del bn, settings
    return _flow(params, snode_state(x, net), net)[:, : net.classes], state


def snode(key, *, shape: Sequence[int], classes: int, **options: Any) -> Trainable:
    """Build an sNODE with fresh weights, as a trainable like every other network.

    Args:
      key: a typed key.
      shape: shape of one example.
      classes: number of classes.
      **options: of `SNODE`.

    Returns:
      The trainable; the settings are `trainable.apply.args[0]`.

    Raises:
      ValueError: on impossible options, or more classes than components of the state.

    References:
      Jaroudi et al. 2022, Standalone neural ODEs with sensitivity analysis, arXiv:2205.13933; code
      malylu/SNODEs_prototype. Published for MNIST: `pool=2`, horizon 3, rate 50.
    """
    net = SNODE(classes=classes, **options)
    features = jax.eval_shape(lambda: snode_state(jnp.zeros((1, *shape)), net)).shape[1]
    if features < classes:
        raise ValueError(f"the state must have a component for each class; got {features} for {classes}. A lower pool?")
    return Trainable(Partial(_apply, net), snode_init(key, features, net), {})


@pytree
class SensitivityAttack(MinimumNorm):
    """Steps of one length toward the boundary that is nearest in the linearization; built by `sensitivity_attack`."""

    step_size: float = static()
    kappa: float = static()

    def _own(self, logits, x, y):
        return logits

    def _passes(self, state) -> tuple[int, int]:
        return 1, state.own.shape[1]

    def step(self, state, model, x, y):
        """Ask, remember the point where it fails, and go on toward the nearest or the wanted boundary."""
        logits, pull = jax.vjp(lambda p: ask(model, p), state.point)
        state, _ = self._seen(state, logits, x, y)
        classes, label = logits.shape[1], label_of(y)
        slopes = jnp.stack([flat(pull(jnp.broadcast_to(e, logits.shape))[0]) for e in jnp.eye(classes)], axis=1)
        own = jnp.take_along_axis(slopes, label[:, None, None], axis=1)
        normal = self.kappa * slopes - own
        gap = jnp.take_along_axis(logits, label[:, None], axis=1) - self.kappa * logits
        long = jnp.linalg.norm(normal, axis=-1)
        away = jnp.where((long > 0) & jnp.isfinite(long), gap / jnp.where(long > 0, long, 1), jnp.inf)
        away = jnp.where(jnp.arange(classes)[None, :] == label[:, None], jnp.inf, away)
        aim = y.target if isinstance(y, Targets) else jnp.argmin(away, axis=1)
        raw = jnp.take_along_axis(normal, aim[:, None, None], axis=1)[:, 0]
        lost = dead(raw)
        keys = step_keys(state.keys, state.step)
        noise = jax.vmap(lambda k: jax.random.normal(k, raw.shape[1:], raw.dtype))(keys)
        way = self.threat.steepest(select(lost, noise, mended(raw)).reshape(x.shape))
        low, high = edges(self.threat.bounds, x)
        return state._replace(
            step=state.step + 1,
            spent=state.spent + 1,
            point=jnp.clip(state.point + jnp.asarray(self.step_size, x.dtype) * way, low, high),
            zero_gradient=state.zero_gradient | lost,
        )


def sensitivity_attack(
    threat: Threat,
    *,
    steps: int = 30,
    step_size: float = 0.03,
    kappa: float = 0.975,
    early: bool = False,
    name: str = "sensitivity",
) -> Attack:
    """Return the sensitivity attack: look for the nearest failing point by steps of one length.

    With z the logits, p their gradients and c the label, each step goes along `κ p_i - p_c` of the class i with the
    least `(z_c - κ z_i) / |κ p_i - p_c|` (or of the target), and goes on after a success; the nearest failing point is
    kept. For sNODEs the gradients are those of the sensitivity problem; it works for every differentiable model.

    Args:
      threat: an `l2` ball; its budget decides what counts as a success in the end.
      steps: number of steps.
      step_size: their length.
      kappa: below 1 aims a little beyond the boundary.
      early: stop a row once a failing point within the budget is known.
      name: enters the random keys, which draw a direction where there is no gradient.

    Returns:
      The attack.

    Raises:
      ValueError: if the threat is another, or `steps` or `step_size` is not positive.

    References:
      Jaroudi et al. 2022, arXiv:2205.13933. In their prototype the first gradient is that at the second point, and a
      targeted attack goes on from the point of the target before; not here.
    """
    ball(threat, ("l2",), name)
    check.whole("steps", steps)
    check.positive("step_size", step_size)
    check.positive("kappa", kappa)
    return SensitivityAttack(threat=threat, name=name, max_steps=steps, early=early, step_size=step_size, kappa=kappa)
