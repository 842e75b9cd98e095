"""Residual networks read as multistep methods, with coefficients chosen by zero-stability: ZeroSNet.

What lives here: the one-parameter family of consistent coefficients, its characteristic roots and zero-stability, the
recurrence, and the network built on it. What does not: solvers with a step control (`solve.py`).

A block computes `x_{n+1} = a0 x_n + a1 x_{n-1} + a2 x_{n-2} + h b0 F(x_n)`. A history is a tuple of states, newest
first, everywhere in this file.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxadv import models
from jaxadv.core import Trainable, check
from jaxadv.models.nets import Net, conv, dense, image_shape, normalizer
from jaxadv.models.norms import NoNorm

OPT_K = -9 / 5
"""The k whose largest extraneous root is least (a double root at -1/3): coefficients 1/3, 5/9, 1/9 and 16/9."""

UNSTABLE = (1.0, 1.0, 1.0, 1.0)
"""Coefficients a0, a1, a2, b0 of the control that is neither consistent nor zero-stable: its largest root is 1.839."""

DEPTHS = {20: 3, 32: 5, 44: 7, 56: 9, 110: 18}
"""Published depth to the number of blocks in each of the three stages (6 n + 2 layers)."""

BOTTLENECK_DEPTHS = {164: 18, 326: 36, 650: 72, 1298: 144}
"""Published depth to the number of bottleneck blocks in each stage (9 n + 2 layers)."""

_KINDS = ("opt", "trainable", "free")


def coeffs_from_k(k: Any) -> tuple[tuple[Any, Any, Any], Any]:
    """Return the coefficients of the three-step methods that are consistent to second order.

    a0 = (3 k + 3) / (4 k), a1 = -1 / k, a2 = (k + 1) / (4 k), b0 = (3 k - 1) / (2 k). They fulfill a0 + a1 + a2 = 1,
    b0 - a1 - 2 a2 = 1 and a1 + 4 a2 = 1. Zero-stable if and only if k <= -1 or k > 1/3.

    Args:
      k: the free number, not 0; may be traced.

    Returns:
      `((a0, a1, a2), b0)`.

    Raises:
      ValueError: if k is known to be 0.

    References:
      Chen, Jin and Shang 2022, Zero stability well predicts performance of convolutional neural networks,
      arXiv:2206.13100.
    """
    known = check.concrete(k)
    if known is not None and np.any(known == 0):
        raise ValueError(f"k must not be 0; got {k}. Zero-stable: k <= -1 or k > 1/3; the best is k = -9/5.")
    return ((3 * k + 3) / (4 * k), -1 / k, (k + 1) / (4 * k)), (3 * k - 1) / (2 * k)


def char_roots(a: Sequence[Any]) -> np.ndarray:
    """Return the roots of the characteristic polynomial `rho^s - a0 rho^(s-1) - ... - a_{s-1}`.

    Args:
      a: known numbers, newest state first.

    Returns:
      complex128 `[s]`, by falling modulus.
    """
    roots = np.roots([1.0, *(-float(v) for v in a)]).astype(complex)
    roots = np.concatenate([roots, np.zeros(len(a) - len(roots))])  # np.roots drops zeros at the end
    return roots[np.argsort(-np.abs(roots), kind="stable")]


def is_zero_stable(a: Sequence[Any], tol: float = 1e-6) -> bool:
    """Tell whether a perturbation stays bounded however many steps are taken.

    That is the root condition: every root in the closed unit disc, those on its edge simple.

    Args:
      a: known numbers, newest state first.
      tol: roots nearer than this count as one, and as on the edge. A double root is found with an error of 1e-8.

    Returns:
      Whether the root condition holds.
    """
    roots = char_roots(a)
    edge = roots[np.abs(roots) > 1 - tol]
    apart = np.abs(edge[:, None] - edge[None, :]) + 2 * np.eye(len(edge))
    return bool(np.all(np.abs(roots) <= 1 + tol) and np.all(apart > tol))


def extraneous(a: Sequence[Any]) -> float:
    """Return the largest modulus of the roots that do not carry the solution: all but the one nearest to 1.

    Args:
      a: known numbers, newest state first.

    Returns:
      The modulus; a perturbation beside the solution shrinks by it in each step.
    """
    roots = char_roots(a)
    return float(np.abs(np.delete(roots, np.argmin(np.abs(roots - 1)))).max(initial=0.0))


def stable_k(u: Any) -> Any:
    """Map any number to a zero-stable k below -1: `-1 - softplus(u)`.

    A k that is trained itself may cross the unstable band (-1, 1/3] and the pole at 0.

    Args:
      u: any number, may be traced.

    Returns:
      k, below -1.
    """
    return -1 - jax.nn.softplus(u)


def advance(history: tuple[Any, ...], slope: Any, a: Sequence[Any], b: Any, h: Any = 1.0) -> tuple[Any, ...]:
    """Take one step of a multistep method.

    Args:
      history: states, newest first, as many as `a` has numbers.
      slope: F at the newest state.
      a: weights of the states.
      b: weight of the slope.
      h: length of the step.

    Returns:
      The history with the new state.
    """
    new = h * b * slope
    for weight, state in zip(a, history, strict=True):
        new = new + weight * state
    return (new, *history[:-1])


def multistep(field: Callable, history: tuple[Any, ...], steps: int, h: Any, a: Sequence[Any], b: Any) -> Any:
    """Integrate `dx/dt = field(x)` by the explicit multistep method with weights `a` and `b`.

    Args:
      field: state to slope.
      history: the first states, newest first, `h` apart.
      steps: number of steps.
      h: length of a step.
      a: weights of the states.
      b: weight of the slope.

    Returns:
      The states after each step, `[steps, ...]`.
    """

    def step(history, _):
        history = advance(history, field(history[0]), a, b, h)
        return history, history[0]

    return lax.scan(step, history, None, length=steps)[1]


# -------------------------------------------------------------------------------------------------------------- network


class Block(nnx.Module):
    """Weighs the last three states and adds a branch: norm, activation, convolution, twice (bottleneck: 1-3-1, thrice).

    While the history is not full the block is a plain residual one. States whose channels differ from the block's go
    through a 1x1 convolution of their own, and stay projected in the history.
    """

    def __init__(self, inputs, width, stride, history, *, coefficients, bottleneck, norm, rngs: nnx.Rngs):
        make = partial(conv, bias=False, init="kaiming_normal", rngs=rngs)
        outputs = 4 * width if bottleneck else width
        shapes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        if bottleneck:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.norms = nnx.List([normalizer(before, norm) for before, *_ in shapes])
        self.convs = nnx.List([make(i, o, s, stride=t, padding=s // 2) for i, o, s, t in shapes])
        self.full = len(history) == 3
        carried = history if self.full else ()
        self.projections = nnx.List(
            [NoNorm() if (c, stride) == (outputs, 1) else make(c, outputs, 1, stride=stride) for c in carried]
        )
        self.side = not self.full and (inputs, stride) != (outputs, 1)
        if self.side:
            self.side_norm, self.side_conv = normalizer(inputs, norm), make(inputs, outputs, 1, stride=stride)
        self.fixed = coefficients if isinstance(coefficients, tuple) else None
        self.kept = coefficients == "trainable"
        if self.full and self.fixed is None:  # k = -9/5 where it is kept stable, 1 where it is free, as published
            self.k = nnx.Param(jnp.full((), math.log(math.expm1(-1 - OPT_K)) if self.kept else 1.0))

    def coefficients(self) -> tuple[Any, Any]:
        """Return the weights of the states and that of the branch."""
        if self.fixed is not None:
            return self.fixed[:3], self.fixed[3]
        k = self.k[...]
        return coeffs_from_k(stable_k(k) if self.kept else k)

    def __call__(self, history: tuple) -> tuple:
        """Return the history with the new state in front, three states at most."""
        branch = history[0]
        for norm, layer in zip(self.norms, self.convs):
            branch = layer(jax.nn.relu(norm(branch)))
        if self.full:
            history = tuple(project(state) for project, state in zip(self.projections, history))
            return advance(history, branch, *self.coefficients())
        old = history[0]
        side = self.side_conv(jax.nn.relu(self.side_norm(old))) if self.side else old
        return (side + branch, *history)


class ZeroSNet(Net):
    """A residual network for small images whose blocks are steps of a zero-stable three-step method.

    A 3x3 convolution, three stages of blocks with half the side and twice the channels in each, norm, activation,
    global mean, dense. The first two blocks are plain residual ones, so the first stage has two blocks at least.

    Args:
      shape: (height, width, channels).
      classes: number of classes.
      mean: see `models.nets.Net`.
      std: see `models.nets.Net`.
      blocks: blocks in each stage; (3, 3, 3) is ZeroSNet-20, see `DEPTHS`.
      widths: channels of the stages (four times as many come out of a bottleneck); the first convolution has those of
        the first stage.
      coefficients: `'opt'` (k = -9/5), a number k, four numbers a0, a1, a2, b0, `'trainable'` (one number in each block
        that keeps k below -1), or `'free'` (one k in each block from 1 on, as published: nothing keeps it stable).
      bottleneck: whether blocks are 1-3-1 bottlenecks, as in the nets of 164 layers and more.
      norm: `'batch'` (as published) or `'group'`.
      stem_stride: stride of the first convolution (1 as published; 2 makes it four times cheaper).
      rngs: randomness of the weights.

    References:
      Chen, Jin and Shang 2022, Zero stability well predicts performance of convolutional neural networks,
      arXiv:2206.13100; code LongJin-lab/ZeroSNet, CIFAR/models/ZeroSNet.py, of which layers that it never calls are
      left out. There the last mean is over 8x8, which is global for CIFAR.
    """

    def __init__(
        self,
        shape,
        classes,
        mean=None,
        std=None,
        *,
        blocks=(3, 3, 3),
        widths=(16, 32, 64),
        coefficients="opt",
        bottleneck=False,
        norm="batch",
        stem_stride=1,
        rngs: nnx.Rngs,
    ):
        super().__init__(shape, classes, mean, std)
        inputs = image_shape("zerosnet", shape)[2]
        check.choice("norm", norm, ("batch", "group"))
        if len(blocks) != len(widths) or not blocks or blocks[0] < 2 or min(blocks) < 1:
            raise ValueError(
                "blocks must hold one number for each of widths, the first at least 2 (two blocks fill the history); "
                f"got blocks={tuple(blocks)}, widths={tuple(widths)}. ZeroSNet-20 has (3, 3, 3)."
            )
        settings = {"coefficients": _coefficients(coefficients), "bottleneck": bottleneck, "norm": norm, "rngs": rngs}
        first = widths[0]
        self.conv1 = conv(inputs, first, 3, stride=stem_stride, padding=1, bias=False, init="kaiming_normal", rngs=rngs)
        made, history = [], (first,)
        for stage, (count, width) in enumerate(zip(blocks, widths)):
            for place in range(count):
                stride = 2 if stage and not place else 1
                made.append(Block(history[0], width, stride, history, **settings))
                outputs = 4 * width if bottleneck else width
                history = (outputs,) * 3 if len(history) == 3 else (outputs, *history)
        self.blocks = nnx.List(made)
        self.bn = normalizer(history[0], norm)
        self.linear = dense(history[0], classes, rngs=rngs)

    def forward(self, x):
        """Return logits from the normalized input."""
        history = (self.conv1(x),)
        for block in self.blocks:
            history = block(history)
        return self.linear(jax.nn.relu(self.bn(history[0])).mean((1, 2)))


ZEROSNETS: dict[str, type[Net]] = {"zerosnet": ZeroSNet}
"""Name to class, for what builds networks by name; nothing in it is solved."""


def _coefficients(given: Any) -> Any:
    """Four numbers, or the name of a kind that is trained."""
    if isinstance(given, str):
        check.choice("coefficients", given, _KINDS)
        given = OPT_K if given == "opt" else given
    if isinstance(given, (int, float)):
        a, b = coeffs_from_k(float(given))
        return (*a, b)
    if not isinstance(given, str) and len(given) != 4:
        raise ValueError(f"coefficients must be four numbers a0, a1, a2, b0; got {given}. One number is taken as k.")
    return given if isinstance(given, str) else tuple(float(v) for v in given)


def zerosnet(key, *, shape: Sequence[int], classes: int, mean=None, std=None, **options: Any) -> Trainable:
    """Build a ZeroSNet with fresh weights.

    Args:
      key: a typed key.
      shape: shape of one example, (height, width, channels).
      classes: number of classes.
      mean: subtracted inside the network.
      std: divides after that.
      **options: of `ZeroSNet`.

    Returns:
      The trainable.

    Raises:
      ValueError: on impossible options.
    """
    return models.trainable(ZeroSNet(tuple(shape), classes, mean, std, **options, rngs=nnx.Rngs(key)))
