"""Where parameters meet an example: the uses of every parameter in a loss, and what each use adds to a gradient.

What lives here: reading the jaxpr of a loss of one example (`trace`), and three formulas for the layers that it knows
(`rows`, `gram_norm`, `formed`). What does not: which formula is taken, clipping and sums (`methods.py`).

The idea: a program splits into the part that depends on parameters alone (casts, reshapes, weight standardization) and
the part that sees the example. Where a value `W` of the first part enters a matrix product, a convolution or a table
look-up of the second, the output is linear in `W`. So the cotangent `b` of that output and the other operand `a` give
all there is to know about the gradient of `W`; no layer must be named, registered or rewritten. `b` comes from
differentiating with respect to a zero that is added to the output. Where `W` enters anything else (biases, scales,
loops, functions with their own derivatives) it is differentiated row by row, which is right for every program.

Everything is written for one example and mapped over the batch by `jax.vmap`, so that no axis has to be recognized as
the batch. A loss over several views, or a clean and an adversarial pass, makes several uses of the same `W` (or longer
ones); they are joined along the axis of positions, so cross terms are in.

References: Goodfellow 2015, Efficient per-example gradient computations, arXiv:1510.01799. Li et al. 2022, Large
language models can be strong differentially private learners, arXiv:2110.05679 (norms from Gram matrices). Bu et al.
2022, Scalable and efficient training of large convolutional neural networks with differential privacy,
arXiv:2205.10683 (convolutions, choice for each layer). The Gram matrix of the patches of a convolution is summed here
from that of the pixels, which these do not do.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from jaxadv.core import PyTree
from jaxadv.core.jaxprs import bind, held, read

_INLINE = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2")
_LAYOUT = ("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type", "copy", "rev")
"""What a parameter may pass on its way to a use without becoming another parameter."""


class Use(NamedTuple):
    """One place where a parameter meets the example in a way that is known.

    Attributes:
      eqn: the equation.
      place: which operand is the parameter.
      kind: `'dense'`, `'conv'` or `'gather'`.
      chain: the layout equations between the root and the operand, first to last.
    """

    eqn: Any
    place: int
    kind: str
    chain: tuple[Any, ...]

    @property
    def other(self) -> Any:
        """The operand that comes from the example."""
        return self.eqn.invars[1 - self.place]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter as this use sees it."""
        return self.eqn.invars[self.place].aval.shape

    def sizes(self) -> tuple[int, int, int]:
        """Positions, inputs and outputs: the gradient is a sum over positions of inputs times outputs."""
        out = math.prod(self.eqn.outvars[0].aval.shape)
        if self.kind == "gather":
            return out // max(1, math.prod(self.shape[1:])), self.shape[0], math.prod(self.shape[1:])
        if self.kind == "conv":
            spec = self.eqn.params["dimension_numbers"].rhs_spec
            outputs = self.shape[spec[0]]
            return out // max(1, outputs), math.prod(self.shape) // max(1, outputs), outputs
        contracted, free = _dense_axes(self)
        inputs = math.prod(self.shape[i] for i in contracted)
        outputs = math.prod(self.shape[i] for i in free)
        return out // max(1, outputs), inputs, outputs

    def isometric(self) -> bool:
        """Whether the gradient of the root has the norm of that of the operand: nothing is repeated on the way."""
        sizes = [math.prod(eqn.invars[0].aval.shape) for eqn in self.chain]
        return all(size == math.prod(self.shape) for size in sizes)

    def groups(self) -> int:
        """Number of groups of a convolution; 1 elsewhere."""
        return self.eqn.params["feature_group_count"] if self.kind == "conv" else 1

    def view(self) -> Any:
        """What must be the same for uses of one root to be joined along their positions."""
        steps = tuple((eqn.primitive.name, str(eqn.params)) for eqn in self.chain)
        if self.kind == "dense":
            return "dense", steps, _dense_axes(self)
        if self.kind == "conv":
            return "conv", steps, self.eqn.params["dimension_numbers"].rhs_spec, self.groups()
        return "gather", steps


@dataclass(frozen=True, eq=False)
class Graph:
    """The program of a loss of one example, split at the uses of its parameters.

    Attributes:
      jaxpr: the program; its inputs are the leaves of the parameters, then those of the example and its key.
      consts: values of the constants.
      leaves: the variables of the parameters.
      outer: equations that do not depend on the example.
      inner: equations that do.
      parents: variable to the leaves (their numbers) that it is a function of, for variables of `outer`.
      made: variable to the layout equation that makes it, for variables of `outer`.
      uses: root to its known uses.
      others: roots that are used in other ways too, in order.
      live: variables that the loss depends on, other than through `stop_gradient`.
      hidden: whether a parameter enters a convolution in another way than as its kernel, or inside a closed function or
        loop.
    """

    jaxpr: Any
    consts: Sequence[Any]
    leaves: list[Any]
    outer: list[Any]
    inner: list[Any]
    parents: dict[Any, frozenset[int]]
    made: dict[Any, Any]
    uses: dict[Any, list[Use]]
    others: list[Any]
    live: set[Any]
    hidden: bool

    @property
    def loss(self) -> Any:
        """The variable of the loss."""
        return self.jaxpr.outvars[0]

    def root(self, var: Any) -> Any:
        """The value that `var` is another layout of: a leaf, or what a proper function of leaves made."""
        while var in self.made:
            var = self.made[var].invars[0]
        return var

    def chain(self, var: Any) -> tuple[Any, ...]:
        """The layout equations from the root to `var`."""
        steps = []
        while var in self.made:
            steps.append(self.made[var])
            var = steps[-1].invars[0]
        return tuple(reversed(steps))

    def known(self, leaves: Sequence[Any]) -> dict[Any, Any]:
        """Evaluate what does not depend on the example."""
        known = dict(zip([*self.jaxpr.constvars, *self.leaves], [*self.consts, *leaves], strict=True))
        _evaluate(self.outer, known)
        return known


def trace(loss_fn: Callable, params: PyTree, batch: PyTree, keys: PyTree) -> Graph:
    """Read the program of a loss and find the uses of its parameters.

    Args:
      loss_fn: `loss_fn(params, example, key) -> scalar` for one example.
      params: the parameters, arrays or tracers.
      batch: pytree of `[b, ...]`.
      keys: typed keys `[b]`, or None.

    Returns:
      The graph.

    Raises:
      ValueError: if the loss is not one number for each example.
    """
    found = []

    def probe(params, example, key):  # under vmap, so that what is traced is one example in every executor
        leaves, tree = jax.tree.flatten((params, example, key))
        closed = jax.make_jaxpr(lambda *args: loss_fn(*jax.tree.unflatten(tree, args)))(*leaves)
        found.append(jax.make_jaxpr(lambda *args: _inlined(closed.jaxpr, closed.consts, args))(*leaves))
        return 0.0

    jax.vmap(probe, in_axes=(None, 0, 0), out_axes=None)(params, batch, keys)
    (closed,) = found
    shapes = [getattr(v.aval, "shape", None) for v in closed.jaxpr.outvars]
    if shapes != [()]:
        raise ValueError(
            f"loss_fn must return one number for one example; got outputs of shapes {shapes}. "
            "The mean over the batch is taken elsewhere; sum or average over what belongs to the example."
        )
    return _split(closed, len(jax.tree.leaves(params)))


def _inlined(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list:
    """Evaluate a program with the calls in it opened; custom derivatives stay closed."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        values = [read(atom, known) for atom in eqn.invars]
        if eqn.primitive.name in _INLINE:
            called = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            is_open = not hasattr(called, "consts")
            out = _inlined(*((called, ()) if is_open else (called.jaxpr, called.consts)), values)
        else:
            out = bind(eqn, values, eqn.params)
            out = out if eqn.primitive.multiple_results else [out]
        known.update(zip(eqn.outvars, out, strict=True))
    return [read(atom, known) for atom in jaxpr.outvars]


def _evaluate(equations: Sequence[Any], known: dict) -> None:
    for eqn in equations:
        out = bind(eqn, [read(a, known) for a in eqn.invars], eqn.params)
        known.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))


def _variables(eqn: Any) -> list:
    return [a for a in eqn.invars if not isinstance(a, jex.Literal)]


def _floating(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.floating)


def _split(closed: Any, count: int) -> Graph:
    jaxpr = closed.jaxpr
    leaves, example = list(jaxpr.invars[:count]), set(jaxpr.invars[count:])
    parents: dict[Any, frozenset[int]] = {v: frozenset([i]) for i, v in enumerate(leaves) if _floating(v)}
    inner, outer, made = [], [], {}
    for eqn in jaxpr.eqns:
        given = _variables(eqn)
        if example.intersection(given):
            inner.append(eqn)
            example.update(eqn.outvars)
            continue
        outer.append(eqn)
        above = frozenset().union(*(parents.get(v, frozenset()) for v in given))
        if above and eqn.primitive.name != "stop_gradient":
            parents.update((v, above) for v in eqn.outvars if _floating(v))
            if eqn.primitive.name in _LAYOUT and eqn.outvars[0] in parents:
                made[eqn.outvars[0]] = eqn
    graph = Graph(jaxpr, closed.consts, leaves, outer, inner, parents, made, {}, [], set(), False)
    live = graph.live
    live.update(v for v in jaxpr.outvars if not isinstance(v, jex.Literal))
    for eqn in reversed(inner):  # what the loss depends on, other than through stop_gradient
        if eqn.primitive.name != "stop_gradient" and any(v in live and _floating(v) for v in eqn.outvars):
            live.update(v for v in _variables(eqn) if _floating(v))
    others, hidden = dict[Any, None](), False
    for eqn in inner:
        if not live.intersection(eqn.outvars):
            continue
        for place, var in enumerate(eqn.invars):
            if isinstance(var, jex.Literal) or var not in parents:
                continue
            kind = _kind(eqn, place)
            if kind:
                graph.uses.setdefault(graph.root(var), []).append(Use(eqn, place, kind, graph.chain(var)))
            else:
                others[graph.root(var)] = None
                hidden = hidden or convolves(eqn)
    if not isinstance(graph.loss, jex.Literal) and graph.loss in parents:
        others[graph.root(graph.loss)] = None
    graph.others.extend(others)
    return replace(graph, hidden=hidden)


def convolves(eqn: Any) -> bool:
    """Return whether an equation is a convolution or holds one.

    Args:
      eqn: of a jaxpr.

    Returns:
      Whether it does, at any depth.
    """
    inner = [e for value in eqn.params.values() for j in held(value) for e in j.eqns]
    return eqn.primitive.name == "conv_general_dilated" or any(convolves(e) for e in inner)


def _kind(eqn: Any, place: int) -> str | None:
    """The kind of a known use, or None."""
    params, name = eqn.params, eqn.primitive.name
    if name == "dot_general":
        return None if params["dimension_numbers"][1][0] else "dense"
    if name == "conv_general_dilated":
        return "conv" if params["batch_group_count"] == 1 and place == 1 else None
    if name == "gather" and place == 0:
        numbers, shape = params["dimension_numbers"], eqn.invars[0].aval.shape
        plain = numbers.collapsed_slice_dims == numbers.start_index_map == (0,) and not numbers.operand_batching_dims
        return "gather" if plain and tuple(params["slice_sizes"]) == (1, *shape[1:]) else None
    return None


# ------------------------------------------------------------------------------------------------------ the formulas


def wide(value: Any) -> Any:
    """Return an array in at least float32.

    Args:
      value: an array; one that holds no floating-point numbers comes back as it is.

    Returns:
      The array.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return value
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _apply(use: Use, root: Any, other: Any) -> Any:
    """The use as a function of its root, for one example, in at least float32."""
    for eqn in use.chain:
        root = root if eqn.primitive.name == "convert_element_type" else bind(eqn, [root], eqn.params)
    params = use.eqn.params
    if "preferred_element_type" in params:
        params = params | {"preferred_element_type": None}
    return bind(use.eqn, [root, other] if use.place == 0 else [other, root], params)


def formed(use: Use, root: Any, others: Any, cotangents: Any) -> Any:
    """The sum over the batch of the gradients of the root: one weighted product, as in a gradient without privacy.

    Args:
      use: the use.
      root: value of the root.
      others: the other operand, `[b, ...]`.
      cotangents: of the output, `[b, ...]`, already multiplied by what each example weighs.

    Returns:
      The sum, in the shape of the root and at least float32.
    """
    _, pull = jax.vjp(lambda root: jax.vmap(lambda a: _apply(use, root, a))(wide(others)), wide(root))
    return pull(wide(cotangents))[0]


def rows(use: Use, root: Any, other: Any, cotangent: Any) -> Any:
    """Return the gradient of a use's root for one example; map it over the batch.

    Args:
      use: of a parameter.
      root: the parameter, before the chain of the use.
      other: the operand that the parameter meets, of one example.
      cotangent: of the result, of one example.

    Returns:
      The gradient in the shape of the root, in at least float32.
    """
    other, cotangent, root = wide(other), wide(cotangent), wide(root)
    if use.kind != "conv":
        return jax.vjp(lambda root: _apply(use, root, other), root)[1](cotangent)[0]
    grad = _kernel_gradient(use, other, cotangent)
    for eqn in reversed(use.chain):  # undo the layout
        if eqn.primitive.name != "convert_element_type":
            like = jax.ShapeDtypeStruct(eqn.invars[0].aval.shape, grad.dtype)
            grad = jax.linear_transpose(lambda a, eqn=eqn: bind(eqn, [a], eqn.params), like)(grad)[0]
    return grad


def _dense_axes(use: Use) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of the parameter that are contracted and that are free, both in order."""
    contracted = tuple(sorted(use.eqn.params["dimension_numbers"][0][use.place]))
    return contracted, tuple(i for i in range(len(use.shape)) if i not in contracted)


def _dense_parts(use: Use, other: Any, cotangent: Any) -> tuple[Any, Any]:
    """Inputs [1, T, i] and cotangents [1, T, o] of a product."""
    ours, theirs = (use.eqn.params["dimension_numbers"][0][p] for p in (use.place, 1 - use.place))
    order = [t for _, t in sorted(zip(ours, theirs))]
    positions, inputs, outputs = use.sizes()
    free = [i for i in range(other.ndim) if i not in order]
    a = jnp.transpose(other, (*free, *order)).reshape(1, positions, inputs)
    if use.place == 0:
        cotangent = jnp.moveaxis(cotangent.reshape(outputs, positions), 0, 1)
    return a, cotangent.reshape(1, positions, outputs)


def _conv_parts(use: Use, other: Any, cotangent: Any) -> tuple[Any, Any]:
    """Padded input [n, *space, c] and cotangents [T, o] of a convolution, channels last."""
    spec = use.eqn.params["dimension_numbers"]
    x = jnp.transpose(other, (spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1]))
    edges = [(lo, hi, d - 1) for (lo, hi), d in zip(use.eqn.params["padding"], use.eqn.params["lhs_dilation"])]
    edges = [(0, 0, 0), *edges, (0, 0, 0)]
    b = jnp.transpose(cotangent, (spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1]))
    return lax.pad(x, jnp.zeros((), x.dtype), edges), b.reshape(-1, b.shape[-1])


def _windows(use: Use) -> Iterator[tuple[slice, ...]]:
    """For each place of the kernel, which pixels of the padded input it meets."""
    params, spec = use.eqn.params, use.eqn.params["dimension_numbers"]
    kernel = [use.shape[i] for i in spec.rhs_spec[2:]]
    out = [use.eqn.outvars[0].aval.shape[i] for i in spec.out_spec[2:]]
    for place in itertools.product(*map(range, kernel)):
        steps = zip(place, params["rhs_dilation"], params["window_strides"], out)
        yield tuple(slice(k * d, k * d + (n - 1) * s + 1, s) for k, d, s, n in steps)


def _patches(use: Use, x: Any) -> list[Any]:
    """The input that each place of the kernel meets, [T, groups, c / groups]."""
    return [x[:, *window].reshape(-1, use.groups(), x.shape[-1] // use.groups()) for window in _windows(use)]


def _kernel_gradient(use: Use, other: Any, cotangent: Any) -> Any:
    """Matrix products of shifted slices: the compilers' own form, a convolution with b groups, is many times slower."""
    spec = use.eqn.params["dimension_numbers"]
    x, b = _conv_parts(use, other, cotangent)
    groups = use.groups()
    b = b.reshape(-1, groups, b.shape[-1] // groups)
    parts = _patches(use, x)
    if parts[0].shape[-1] < 16:  # few channels: one product
        parts = [jnp.concatenate(parts, -1)]
    products = [jnp.einsum("tgi,tgo->igo", a, b, precision=use.eqn.params["precision"]) for a in parts]
    kernel = [use.shape[i] for i in spec.rhs_spec[2:]]
    grad = jnp.concatenate(products).reshape(*kernel, use.shape[spec.rhs_spec[1]], use.shape[spec.rhs_spec[0]])
    order = (*spec.rhs_spec[2:], spec.rhs_spec[1], spec.rhs_spec[0])
    return jnp.transpose(grad, [order.index(i) for i in range(len(order))])


def gram_norm(uses: Sequence[Use], others: Sequence[Any], cotangents: Sequence[Any]) -> Any:
    """The norm of the gradient of a root for one example (map it over the batch), without forming the gradient.

    `|sum_t a_t b_t'|^2 = sum_ts (a_t . a_s)(b_t . b_s)` over the positions of all uses together.

    Products of size `eps (sum_t |a_t| |b_t|)^2` are lost to rounding. Where the gradient is so much smaller than its
    terms that this matters (by a factor of 256 in float32), the norm is taken to be that much instead: clipping may
    then be harder than it must be, never weaker.

    Args:
      uses: all uses of the root; their views are the same.
      others: the other operand of each.
      cotangents: of the output of each.

    Returns:
      The norm, a scalar.
    """
    others, cotangents = [wide(a) for a in others], [wide(b) for b in cotangents]
    use = uses[0]
    positions = sum(u.sizes()[0] for u in uses)
    if positions == 1 and use.kind == "dense":
        (a, b) = _dense_parts(use, others[0], cotangents[0])
        return row_norm(a) * row_norm(b)
    if use.kind == "gather":
        same, b = _tokens(uses, others, cotangents)
        first, second = same[None], _products(b[None])
        size = jnp.sqrt(jnp.diagonal(second[0])).sum()
    elif use.kind == "conv" and len(uses) == 1 and _by_pixels(use):
        first, second = _pixel_gram(use, others[0], cotangents[0])
        size = _size(first, second)
    else:
        parts = _dense_parts if use.kind == "dense" else _patch_parts
        pairs = [parts(u, a, b) for u, a, b in zip(uses, others, cotangents)]
        first, second = (_products(jnp.concatenate(side, 1)) for side in zip(*pairs))
        size = _size(first, second)
    square = (first * second).sum()
    least = float(jnp.finfo(square.dtype).eps / 2) ** (2 / 3)
    return jnp.sqrt(jnp.maximum(square, least * jnp.square(size)))


def _products(a: Any) -> Any:
    """[g, T, i] to its Gram matrices [g, T, T]."""
    return jnp.einsum("gti,gsi->gts", a, a, precision="highest")


def _size(first: Any, second: Any) -> Any:
    """The sum over positions of |a_t| |b_t|."""
    a, b = (jnp.diagonal(m, axis1=1, axis2=2) for m in (first, second))
    return jnp.sqrt(jnp.maximum(a * b, 0)).sum()


def _patch_parts(use: Use, other: Any, cotangent: Any) -> tuple[Any, Any]:
    """Patches [g, T, k c / g] and cotangents [g, T, o / g]."""
    x, b = _conv_parts(use, other, cotangent)
    b = b.reshape(-1, use.groups(), b.shape[-1] // use.groups())
    return jnp.concatenate(_patches(use, x), -1).swapaxes(0, 1), b.swapaxes(0, 1)


def _by_pixels(use: Use) -> bool:
    """Whether products of pixels are fewer than products of patches."""
    return use.other.aval.shape[use.eqn.params["dimension_numbers"].lhs_spec[0]] == 1 and gram_cost(use) < _plain(use)


def _plain(use: Use) -> int:
    positions, inputs, _ = use.sizes()
    return positions**2 * inputs * use.groups()


def gram_cost(use: Use) -> int:
    """Return how many multiplications the Gram matrix of the inputs of one use takes.

    Args:
      use: of a parameter.

    Returns:
      The number for one example; for a convolution the smaller of two ways.
    """
    if use.kind != "conv":
        return use.sizes()[0] ** 2 * (use.sizes()[1] if use.kind == "dense" else 1)
    spec, shape = use.eqn.params["dimension_numbers"], use.other.aval.shape
    if shape[spec.lhs_spec[0]] != 1:
        return _plain(use)
    sides = zip(spec.lhs_spec[2:], use.eqn.params["lhs_dilation"], use.eqn.params["padding"])
    padded = [(shape[i] - 1) * d + 1 + lo + hi for i, d, (lo, hi) in sides]
    places = math.prod(use.shape[i] for i in spec.rhs_spec[2:])
    by_pixels = math.prod(padded) ** 2 * shape[spec.lhs_spec[1]] + use.groups() * places * use.sizes()[0] ** 2
    return min(by_pixels, _plain(use))


def _pixel_gram(use: Use, other: Any, cotangent: Any) -> tuple[Any, Any]:
    """The Gram matrix of patches as a sum of windows of the Gram matrix of pixels."""
    x, b = _conv_parts(use, other, cotangent)
    space, groups = x.shape[1:-1], use.groups()
    pixels = _products(x.reshape(-1, groups, x.shape[-1] // groups).swapaxes(0, 1)).reshape(groups, *space, *space)
    patches = sum(pixels[:, *window, *window] for window in _windows(use))
    b = b.reshape(-1, groups, b.shape[-1] // groups).swapaxes(0, 1)
    return jnp.asarray(patches).reshape(groups, b.shape[1], b.shape[1]), _products(b)


def _tokens(uses: Sequence[Use], others: Sequence[Any], cotangents: Sequence[Any]) -> tuple[Any, Any]:
    """Which positions [T, T] read the same row of a table, and the cotangents [T, o]."""
    numbers, valid, parts = [], [], []
    for use, index, b in zip(uses, others, cotangents):
        where = index.reshape(-1)
        inside = (where >= 0) & (where < use.shape[0])
        if use.eqn.params["mode"] == lax.GatherScatterMode.CLIP:
            where, inside = jnp.clip(where, 0, use.shape[0] - 1), jnp.ones_like(inside)
        dims = use.eqn.params["dimension_numbers"].offset_dims
        b = jnp.transpose(b, (*(i for i in range(b.ndim) if i not in dims), *dims))
        numbers, valid = [*numbers, where], [*valid, inside]
        parts.append(b.reshape(where.shape[0], -1))
    where, inside, b = jnp.concatenate(numbers), jnp.concatenate(valid), jnp.concatenate(parts)
    b = jnp.where(inside[:, None], b, 0)
    return (where[:, None] == where[None, :]).astype(b.dtype), b


def row_norm(a: Any) -> Any:
    """Return the l2 norm of an array; the squares of small values do not underflow.

    Args:
      a: any shape.

    Returns:
      The norm, a float32 scalar.
    """
    a = wide(a)
    top = jnp.abs(a).max(initial=0)
    unit = jnp.where((top > 0) & (top < 1), top, 1)
    return (unit * jnp.sqrt(jnp.square(a / unit).sum())).astype(jnp.float32)
