"""Networks with a block that is solved instead of stacked: ODENet in its two published forms, at any width.

What lives here: the fields, the block that solves them, the networks (`NETS`) and `create`. What does not: solving
(`solve`), losses (`tisode`, `latent`), other solvers for the same weights (`surrogates`).

The block listens to three hints of a call (`Trainable.apply(..., hints=...)`), so that losses and evaluations need no
networks of their own:

| hint | effect |
| --- | --- |
| `solve` | a `SolveCfg` in the place of the block's own |
| `times` | `[n]` or `[n, b]`: the states at these times; what follows sees `n * b` rows, time first |
| `steady` | `(ta, tb)`: also the mean motion of each row between these times, told to the tap `block.motion` |

The tap `block.stats` is the `SolveStats` of the call, and `block.solver` its `SolveCfg`, without leaves.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxadv.continuous import defenses
from jaxadv.continuous.latent import lt_node
from jaxadv.continuous.solve import SolveCfg, ode_solve
from jaxadv.core import Trainable, check
from jaxadv.models import GroupNorm
from jaxadv.models import create as models_create
from jaxadv.models.adapt import Static, trainable
from jaxadv.models.create import Builder
from jaxadv.models.nets import Net, conv, dense, image_shape
from jaxadv.models.norms import Layer

_EDGE = 1e-5
"""Slack with which times on a grid are compared: more than rounding, less than a step."""


class Told(Layer):
    """The identity, whose tap shows what passes."""

    def __call__(self, value):
        """Return `value`."""
        return value


class Field(nnx.Module):
    """A vector field on feature maps: 3x3 convolutions that see the time as a further channel, norms, activations.

    Args:
      channels: of the state.
      first: whether norm and activation come before each convolution (and a norm ends the field), as in torchdiffeq's
        example; else after it, as in TisODE.
      time: whether the field sees the time; without it, convolutions have no bias, as in TisODE.
      groups: of the norms, at most.
      init: of the weights, see `models.NETS`.
      rngs: randomness of the weights.
    """

    def __init__(self, channels: int, *, first: bool, time: bool, groups: int, init: str, rngs: nnx.Rngs):
        made = partial(conv, channels + time, channels, 3, padding=1, bias=time, init=init, rngs=rngs)
        self.conv1, self.conv2 = made(), made()
        self.norms = nnx.List([GroupNorm(channels, groups=groups) for _ in range(3 if first else 2)])
        self.first, self.time = first, time

    def __call__(self, t, z):
        """Return the motion of `z` `[b, h, w, c]` at time `t`."""

        def seen(conv, z):
            return _timed(conv, t, z) if self.time else conv(z)

        if not self.first:
            for conv, norm in zip((self.conv1, self.conv2), self.norms):
                z = jax.nn.relu(norm(seen(conv, z)))
            return z
        for conv, norm in zip((self.conv1, self.conv2), self.norms):
            z = seen(conv, jax.nn.relu(norm(z)))
        return self.norms[-1](z)


def _timed(layer: Any, t, z):
    """Convolve `z` with the time as a further, first channel: being constant, it adds one map, the same in all rows."""
    kernel, bias = layer.kernel[...], layer.bias[...]
    dtype = jnp.result_type(z, kernel)

    def convolved(z, kernel):
        return lax.conv_general_dilated(
            z.astype(dtype), kernel.astype(dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    clock = convolved(jnp.ones((1, *z.shape[1:-1], 1)), kernel[:, :, :1])
    return convolved(z, kernel[:, :, 1:]) + (t.astype(dtype) * clock + bias.astype(dtype)[None, None, None])


class Hinted(Layer):
    """Returns the hint of a name, or None."""

    def __call__(self, name):
        """Return what the call was told under `name`."""
        return self.call.hints.get(name)


def _solver(cfg: Any) -> SolveCfg:
    """The configuration, or that of its settings."""
    return cfg if isinstance(cfg, SolveCfg) else SolveCfg(**dict(cfg or {}))


def _motion(graph, arrays, t, z):
    return nnx.merge(graph, arrays)(t, z)


def _with_integral(since, graph, arrays, t, state):
    """The field, and beside it the mean absolute motion of each row from a time on."""
    dz = _motion(graph, arrays, t, state[0])
    pace = jnp.mean(jnp.abs(dz), axis=tuple(range(1, dz.ndim)))
    return dz, jnp.where(t >= since - _EDGE, pace, 0)


class ODEBlock(Layer):
    """A layer whose output is the state of its field at the end of the solve.

    Args:
      field: called as `field(t, z)`; its parameters are the block's.
      cfg: what to solve with.
    """

    def __init__(self, field: nnx.Module, cfg: SolveCfg):
        self.field, self.cfg = field, cfg
        self.solver, self.stats, self.motion = Told(), Told(), Told()

    def __call__(self, z):
        """Return `[b, ...]`, or `[n * b, ...]` with the hint `times`."""
        for _, part in nnx.iter_modules(self.field):
            vars(part).pop("call", None)  # settings of this call are no part of the field's structure
        graph, arrays = nnx.split(self.field)
        hints = self.call.hints
        cfg, times, steady = hints.get("solve") or self.cfg, hints.get("times"), hints.get("steady")
        self.solver(Static(cfg))
        if steady is None:
            out, stats = ode_solve(partial(_motion, graph), nnx.to_pure_dict(arrays), z, cfg, ts=times)
            self.stats(stats)
            return out if times is None else out.reshape(-1, *out.shape[2:])
        if times is not None:
            raise ValueError("a call must have one of the hints 'times' and 'steady'; got both. Ask twice.")
        since, until = steady
        long = extended(cfg, since, until)
        field = partial(_with_integral, since, graph)
        state = z, jnp.zeros(z.shape[0], z.dtype)
        (out, integral), stats = ode_solve(field, nnx.to_pure_dict(arrays), state, long, ts=(cfg.t1, long.t1))
        self.stats(stats)
        self.motion(integral[-1])
        return out[0]


def extended(cfg: SolveCfg, since: float, until: float) -> SolveCfg:
    """Return the configuration that goes on to `until`, on the same grid where it is fixed.

    Args:
      cfg: ends at the time of the answer.
      since: where a window begins, from `cfg.t0` on.
      until: where it ends, not before `cfg.t1`.

    Returns:
      The configuration.

    Raises:
      ValueError: if the window does not lie so, or is no whole number of steps of the fixed grid.
    """
    if not cfg.t0 <= since < until or until < cfg.t1:
        raise ValueError(
            f"the window must begin between t0 and its end, and end at t1 or later; got {since} to {until} for "
            f"t0={cfg.t0}, t1={cfg.t1}."
        )
    if cfg.mode == "adaptive":
        return dataclasses.replace(cfg, t1=float(until))
    h = (cfg.t1 - cfg.t0) / cfg.n_steps
    places = [(at - cfg.t0) / h for at in (since, until)]
    if any(abs(place - round(place)) > 1e-3 for place in places):
        raise ValueError(
            f"the window must begin and end on the grid of steps {h:g}; got {since} to {until}. "
            "Use more n_steps, or move it."
        )
    return dataclasses.replace(cfg, t1=float(until), n_steps=round(places[1]))


class Stem(nnx.Module):
    """The convolutions before the block: 3x3 without padding, then 4x4 with stride 2, norms and activations between.

    Args:
      shape: (height, width, channels) of an image.
      channels: of all feature maps.
      stem: number of convolutions.
      normed: how many of them are followed by a norm and an activation.
      groups: of the norms, at most.
      init: of the weights.
      rngs: randomness of the weights.

    Raises:
      ValueError: if an image is too small, or a number is none.
    """

    def __init__(
        self, shape: Sequence[int], channels: int, stem: int, *, normed: int, groups: int, init: str, rngs: nnx.Rngs
    ):
        height, width, inputs = image_shape("an ODENet", shape)
        for name, value in (("channels", channels), ("stem", stem), ("groups", groups)):
            check.whole(name, value)
        side = min(height, width) - 2
        for _ in range(stem - 1):
            side //= 2
        if side < 1:
            raise ValueError(
                f"an ODENet must have images large enough for its {stem} convolutions; got {tuple(shape)}. Use stem=1."
            )
        made = partial(conv, init=init, rngs=rngs)
        more = (made(channels, channels, 4, stride=2, padding=1) for _ in range(stem - 1))
        self.convs = nnx.List([made(inputs, channels, 3), *more])
        self.norms = nnx.List([GroupNorm(channels, groups=groups) for _ in range(normed)])

    def __call__(self, x):
        """Return feature maps."""
        for number, layer in enumerate(self.convs):
            x = layer(x)
            if number < len(self.norms):
                x = jax.nn.relu(self.norms[number](x))
        return x


class ODENet(Net):
    """Convolutions, a block that is solved, and a linear layer on the mean over space; base of the published networks.

    Args:
      shape: (height, width, channels).
      classes: number of classes.
      mean: see `models.NETS`.
      std: see `models.NETS`.
      channels: of all feature maps.
      stem: convolutions before the block: 3x3 without padding, then 4x4 with stride 2. 1 suits images of 8x8.
      cfg: a `SolveCfg`, or its settings as a mapping, which survive JSON.
      first: see `Field`.
      time: see `Field`.
      groups: of the norms, at most.
      init: `'torch'` (default, as published) or `'kaiming_normal'`.
      rngs: randomness of the weights.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, mean=None, std=None, *, channels: int, stem: int, cfg: Any,
        first: bool, time: bool, groups: int, init: str, rngs: nnx.Rngs,
    ):  # fmt: skip
        super().__init__(shape, classes, mean, std)
        same: dict[str, Any] = {"groups": groups, "init": init, "rngs": rngs}
        self.stem = Stem(shape, channels, stem, normed=stem - 1 if first else stem, **same)
        field = Field(channels, first=first, time=time, **same)
        self.block = ODEBlock(field, _solver(cfg))
        self.norm = GroupNorm(channels, groups=groups) if first else None
        self.linear = dense(channels, classes, init=init, rngs=rngs)

    def forward(self, x):
        """Return logits from the normalized input."""
        x = self.block(self.stem(x))
        if self.norm is not None:
            x = jax.nn.relu(self.norm(x))
        return self.linear(x.mean((1, 2)))


class ODENetMNIST(ODENet):
    """The ODE network of torchdiffeq's MNIST example: norms before activations, adaptive steps.

    208,266 parameters on MNIST with 64 channels. A batch is solved by rows; the example solves it jointly
    (`cfg={'batching': 'joint'}`).

    Args:
      shape: (height, width, channels).
      classes: number of classes.
      mean: see `models.NETS`.
      std: see `models.NETS`.
      channels: of all feature maps.
      stem: see `ODENet`.
      cfg: settings of `SolveCfg`; default Dormand-Prince 5(4) at tolerances of 1e-3, as published.
      time: whether the field sees the time.
      groups: of the norms, at most.
      init: see `ODENet`.
      rngs: randomness of the weights.

    References:
      Chen et al. 2018, Neural ordinary differential equations, arXiv:1806.07366; code rtqichen/torchdiffeq,
      examples/odenet_mnist.py.
    """

    def __init__(
        self, shape, classes, mean=None, std=None, *, channels: int = 64, stem: int = 3,
        cfg: Mapping | SolveCfg | None = None, time: bool = True, groups: int = 32, init: str = "torch", rngs: nnx.Rngs,
    ):  # fmt: skip
        settings = {"channels": channels, "stem": stem, "time": time, "groups": groups, "init": init, "rngs": rngs}
        super().__init__(shape, classes, mean, std, cfg=cfg, first=True, **settings)


class ODENetTis(ODENet):
    """The ODE network of TisODE: norms and activations after convolutions, so motion is never negative; Euler steps.

    142,410 parameters on MNIST with 64 channels; without the time (`time=False`, TisODE itself) 141,130.

    Args:
      shape: (height, width, channels).
      classes: number of classes.
      mean: see `models.NETS`.
      std: see `models.NETS`.
      channels: of all feature maps.
      stem: see `ODENet`.
      cfg: settings of `SolveCfg`; default ten Euler steps, as published.
      time: whether the field sees the time; TisODE's does not.
      groups: of the norms, at most.
      init: see `ODENet`.
      rngs: randomness of the weights.

    References:
      Yan et al. 2020, On robustness of neural ordinary differential equations, arXiv:1910.05513; code HanshuYAN/TisODE.
    """

    def __init__(
        self, shape, classes, mean=None, std=None, *, channels: int = 64, stem: int = 2,
        cfg: Mapping | SolveCfg | None = None, time: bool = True, groups: int = 32, init: str = "torch", rngs: nnx.Rngs,
    ):  # fmt: skip
        settings = {"channels": channels, "stem": stem, "time": time, "groups": groups, "init": init, "rngs": rngs}
        cfg = SolveCfg("euler", "fixed") if cfg is None else cfg
        super().__init__(shape, classes, mean, std, cfg=cfg, first=False, **settings)


class SodefField(nnx.Module):
    """The field `sin(-(W z + b))`, see `defenses.sodef_field`.

    Args:
      features: of the state.
      rngs: randomness of the weights.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        uniform = partial(jax.random.uniform, minval=-(features**-0.5), maxval=features**-0.5)
        self.w = nnx.Param(uniform(rngs.params(), (features, features)))
        self.b = nnx.Param(uniform(rngs.params(), (features,)))

    def __call__(self, t, z):
        """Return the motion of `z` `[b, n]`."""
        return defenses.sodef_field({"w": self.w[...], "b": self.b[...]}, t, z)


class SODEF(Net):
    """Convolutions, an orthogonal layer to a vector, a stable field on it, a linear layer.

    The published network puts field and layers on a frozen robust backbone; here the convolutions stand in its place.
    Trained by `defenses.sodef`.

    Args:
      shape: (height, width, channels).
      classes: number of classes.
      mean: see `models.NETS`.
      std: see `models.NETS`.
      channels: of the feature maps.
      features: of the vector that is solved.
      stem: see `ODENet`.
      cfg: settings of `SolveCfg`; default Dormand-Prince to t=5 at tolerances of 1e-3, as published.
      groups: of the norms, at most.
      init: see `ODENet`.
      rngs: randomness of the weights.

    References:
      Kang et al. 2021, Stable neural ODE with Lyapunov-stable equilibrium points for defending against adversarial
      attacks, arXiv:2110.12976; code kangqiyu/SODEF.
    """

    def __init__(
        self, shape, classes, mean=None, std=None, *, channels: int = 64, features: int = 64, stem: int = 3,
        cfg: Mapping | SolveCfg | None = None, groups: int = 32, init: str = "torch", rngs: nnx.Rngs,
    ):  # fmt: skip
        super().__init__(shape, classes, mean, std)
        check.whole("features", features)
        self.stem = Stem(shape, channels, stem, normed=stem, groups=groups, init=init, rngs=rngs)
        self.before = nnx.Linear(channels, features, kernel_init=nnx.initializers.orthogonal(), rngs=rngs)
        cfg = {"t1": 5.0} if cfg is None else cfg
        self.block = ODEBlock(SodefField(features, rngs=rngs), _solver(cfg))
        self.linear = dense(features, classes, init=init, rngs=rngs)

    def forward(self, x):
        """Return logits from the normalized input."""
        return self.linear(self.block(self.before(self.stem(x).mean((1, 2)))))


class SteeredField(nnx.Module):
    """A perceptron as the field of a state that is steered by features, which stand beside it and rest.

    Args:
      features: of the state, and of what steers it.
      width: of the hidden layer.
      init: of the weights.
      rngs: randomness of the weights.
    """

    def __init__(self, features: int, width: int, *, init: str, rngs: nnx.Rngs):
        self.hidden = dense(2 * features + 1, width, init=init, rngs=rngs)
        self.out = dense(width, features, init=init, rngs=rngs)

    def __call__(self, t, z):
        """Return the motion of `z` `[b, 2 n]`, zero in its second half."""
        clock = jnp.broadcast_to(jnp.asarray(t, z.dtype), (len(z), 1))
        motion = self.out(jax.nn.tanh(self.hidden(jnp.concatenate([z, clock], -1))))
        return jnp.concatenate([motion, jnp.zeros_like(motion)], -1)


class LyaNet(Net):
    """Convolutions whose features steer a field; the state starts at zero and is read by a linear layer.

    Trained by `defenses.lyanet`, without any solve. The hint `lyapunov` `(states [m, n], y, kappa, t)` is answered at
    the tap `lyapunov` by the mean violation of each row (`defenses.lyapunov_violation`), and the state is not solved.

    Args:
      shape: (height, width, channels).
      classes: number of classes.
      mean: see `models.NETS`.
      std: see `models.NETS`.
      channels: of the feature maps.
      features: of the state.
      width: of the field's hidden layer.
      stem: see `ODENet`.
      cfg: settings of `SolveCfg`; default Dormand-Prince at tolerances of 1e-3.
      groups: of the norms, at most.
      init: see `ODENet`.
      rngs: randomness of the weights.

    References:
      Rodriguez, Ames and Yue 2022, LyaNet, arXiv:2202.02526; code ivandariojr/LyapunovLearning. The networks here are
      smaller.
    """

    def __init__(
        self, shape, classes, mean=None, std=None, *, channels: int = 64, features: int = 32, width: int = 128,
        stem: int = 3, cfg: Mapping | SolveCfg | None = None, groups: int = 32, init: str = "torch", rngs: nnx.Rngs,
    ):  # fmt: skip
        super().__init__(shape, classes, mean, std)
        self.stem = Stem(shape, channels, stem, normed=stem, groups=groups, init=init, rngs=rngs)
        self.steer = dense(channels, features, init=init, rngs=rngs)
        self.block = ODEBlock(SteeredField(features, width, init=init, rngs=rngs), _solver(cfg))
        self.linear = dense(features, classes, init=init, rngs=rngs)
        self.lyapunov = Told()
        self.told = Hinted()

    def forward(self, x):
        """Return logits from the normalized input."""
        steer = self.steer(self.stem(x).mean((1, 2)))
        asked = self.told("lyapunov")
        if asked is None:
            return self.linear(self.block(jnp.concatenate([jnp.zeros_like(steer), steer], -1))[:, : steer.shape[1]])
        states, y, kappa, t = asked

        def at(state):
            z = jnp.broadcast_to(state, steer.shape)
            motion = self.block.field(t, jnp.concatenate([z, steer], -1))[:, : z.shape[1]]
            return defenses.lyapunov_violation(motion, self.linear, z, y, kappa=kappa)

        self.lyapunov(jax.vmap(at)(states).mean(0))
        return self.linear(jnp.zeros_like(steer))


class SkewField(nnx.Module):
    """The field of a SONet block, see `defenses.sonet_field`.

    Args:
      channels: of the feature maps, a multiple of 8.
      rngs: randomness of the weights.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        made = defenses.sonet_init(rngs.params(), channels)
        self.kernel, self.scale, self.bias = (nnx.Param(made[name]) for name in ("kernel", "scale", "bias"))

    def __call__(self, t, u):
        """Return the motion of `u` `[b, 2 h, w, c]`."""
        params = {"kernel": self.kernel[...], "scale": self.scale[...], "bias": self.bias[...]}
        return defenses.sonet_field(params, t, u)


class SkewHead(nnx.Module):
    """The field of SONet's last layer, see `defenses.sonet_head_field`.

    Args:
      features: number of features.
      classes: number of classes.
      rngs: randomness of the weights.
    """

    def __init__(self, features: int, classes: int, *, rngs: nnx.Rngs):
        uniform = partial(jax.random.uniform, minval=-(features**-0.5), maxval=features**-0.5)
        self.w, self.b = (
            nnx.Param(uniform(rngs.params(), (features, classes))),
            nnx.Param(jnp.zeros(features + classes)),
        )

    def __call__(self, t, s):
        """Return the motion of `s` `[b, n + k]`."""
        return defenses.sonet_head_field({"w": self.w[...], "b": self.b[...]}, t, s)


class SONet(Net):
    """Convolutions, a skew block on doubled feature maps (`block`), and a skew last layer (`last`), both solved.

    Args:
      shape: (height, width, channels).
      classes: number of classes.
      mean: see `models.NETS`.
      std: see `models.NETS`.
      channels: of all feature maps, a multiple of 8.
      stem: see `ODENet`.
      cfg: settings of `SolveCfg`; default Dormand-Prince at tolerances of 0.1, as published, but row by row.
      groups: of the norms of the convolutions, at most.
      init: see `ODENet`.
      rngs: randomness of the weights.

    Raises:
      ValueError: if the channels cannot be normed in 8 groups.

    References:
      Huang et al. 2020, Adversarial robustness of stabilized neural ODEs might be from obfuscated gradients,
      arXiv:2009.13145; code yao-lab/SONet, whose networks begin with residual stages.
    """

    def __init__(
        self, shape, classes, mean=None, std=None, *, channels: int = 64, stem: int = 2,
        cfg: Mapping | SolveCfg | None = None, groups: int = 32, init: str = "torch", rngs: nnx.Rngs,
    ):  # fmt: skip
        super().__init__(shape, classes, mean, std)
        if channels % 8:
            raise ValueError(f"channels of a SONet must be a multiple of 8, its groups; got {channels}. Use 64.")
        self.stem = Stem(shape, channels, stem, normed=stem, groups=groups, init=init, rngs=rngs)
        solver = _solver({"rtol": 0.1, "atol": 0.1} if cfg is None else cfg)
        self.block = ODEBlock(SkewField(channels, rngs=rngs), solver)
        self.last = ODEBlock(SkewHead(channels, classes, rngs=rngs), solver)

    def forward(self, x):
        """Return logits from the normalized input."""
        x = self.stem(x)
        x = self.block(jnp.concatenate([x, x], axis=1))[:, : x.shape[1]]
        features = x.mean((1, 2))
        start = jnp.full((len(x), self.classes), 0.1, features.dtype)
        return self.last(jnp.concatenate([features, start], -1))[:, features.shape[1] :]


class TimeEncoder(Net):
    """The convolutions of `odenet_mnist` with two outputs: the parameters of the time of an example, for ALT-NODE.

    132,354 parameters on MNIST with 64 channels.

    Args:
      shape: (height, width, channels).
      classes: number of outputs, 2.
      mean: see `models.NETS`.
      std: see `models.NETS`.
      channels: of all feature maps.
      stem: see `ODENet`.
      groups: of the norms, at most.
      init: see `ODENet`.
      rngs: randomness of the weights.

    References:
      Anumasa and Srijith 2022, Latent time neural ordinary differential equations, arXiv:2112.12728.
    """

    def __init__(
        self, shape, classes=2, mean=None, std=None, *, channels: int = 64, stem: int = 3, groups: int = 32,
        init: str = "torch", rngs: nnx.Rngs,
    ):  # fmt: skip
        super().__init__(shape, classes, mean, std)
        self.stem = Stem(shape, channels, stem, normed=stem - 1, groups=groups, init=init, rngs=rngs)
        self.norm = GroupNorm(channels, groups=groups)
        self.linear = dense(channels, classes, init=init, rngs=rngs)

    def forward(self, x):
        """Return `[b, 2]` from the normalized input."""
        return self.linear(jax.nn.relu(self.norm(self.stem(x))).mean((1, 2)))


def lt_node_net(
    shape, classes, mean=None, std=None, *, encoder: bool = False, points: int = 16, channels: int = 64, stem: int = 3,
    cfg: Mapping | SolveCfg | None = None, groups: int = 32, init: str = "torch", rngs: nnx.Rngs,
) -> Trainable:  # fmt: skip
    """Return LT-NODE, or ALT-NODE, on `odenet_mnist`: the end time of the solve is random, see `lt_node`.

    Two parameters more than `odenet_mnist`, or 132,354 more with an encoder. Trained by `latent_time`.

    Args:
      shape: (height, width, channels).
      classes: number of classes.
      mean: see `models.NETS`.
      std: see `models.NETS`.
      encoder: whether each example has a distribution of its own (ALT-NODE).
      points: see `lt_node`.
      channels: of all feature maps.
      stem: see `ODENet`.
      cfg: settings of `SolveCfg`; default Dormand-Prince to t=3, the latest end time, at tolerances of 1e-2, as
        published.
      groups: of the norms, at most.
      init: see `ODENet`.
      rngs: randomness of the weights.

    Returns:
      The trainable.

    References:
      Anumasa and Srijith 2022, Latent time neural ordinary differential equations, arXiv:2112.12728.
    """
    solver = cfg if isinstance(cfg, SolveCfg) else _solver({"t1": 3.0, "rtol": 1e-2, "atol": 1e-2} | dict(cfg or {}))
    same: dict[str, Any] = {"channels": channels, "stem": stem, "groups": groups, "init": init, "rngs": rngs}
    net = trainable(ODENetMNIST(shape, classes, mean, std, cfg=solver, **same))
    read = trainable(TimeEncoder(shape, 2, mean, std, **same)) if encoder else None
    return lt_node(net, solver, encoder=read, points=points)


NETS: dict[str, Builder] = {
    "odenet_mnist": ODENetMNIST,
    "odenet_tis": ODENetTis,
    "lt_node": lt_node_net,
    "sodef": SODEF,
    "lyanet": LyaNet,
    "sonet": SONet,
}
"""Name of a network of continuous depth to its class or builder; `models.save` and `models.load` take it as `nets=`."""


def time_encoder(key, *, shape: Sequence[int], **options: Any) -> Trainable:
    """Build the network that reads the time's distribution off an example.

    Args:
      key: a typed key.
      shape: shape of one example, (height, width, channels).
      **options: of `TimeEncoder`.

    Returns:
      The trainable; two outputs for each example.
    """
    return models_create("time_encoder", key, shape=shape, classes=2, nets={"time_encoder": TimeEncoder}, **options)


def create(name: str, key, *, shape: Sequence[int], classes: int, **options: Any) -> Trainable:
    """Build a network of continuous depth with fresh weights.

    Args:
      name: one of `NETS`.
      key: a typed key.
      shape: shape of one example, (height, width, channels).
      classes: number of classes.
      **options: of the network, and `mean` and `std`, see `models.create`.

    Returns:
      The trainable.

    Raises:
      ValueError: on an unknown name or option, or an impossible value.
    """
    return models_create(name, key, shape=shape, classes=classes, nets=NETS, **options)
