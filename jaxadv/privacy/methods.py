"""Methods of per-example clipping: the same sum with less work and memory than a gradient for each example.

What lives here: which formula serves which parameter (`arrange`, `ClipPlan`) and the methods themselves (`METHODS`).
What does not: reading programs and the formulas (`uses.py`), bounds and what they promise (`clipping.py`).

A method is `method(loss_fn, params, batch, keys, axis_name, weigh) -> (sums, norms, losses)`, where `weigh` turns the
norms of the leaves, each `[b]`, into what each example weighs in each leaf. Parameters are varying already.

| method | norms | sum |
| --- | --- | --- |
| `vmap` | a gradient for each example | of these gradients |
| `two_pass` | a gradient for each example, not kept | a second, weighted backward pass |
| `ghost` | Gram matrices, from one backward pass | a second, weighted backward pass |
| `book_keeping` | the same | weighted products of what the first pass left |
| `mixed` | for each parameter Gram matrices or gradients, as 2 T^2 < inputs x outputs says | the same |
| `auto` | the same, as the number of multiplications and the memory say | the same |

References: Lee and Kifer 2021, Scaling up differentially private deep learning with fast per-example gradient clipping,
arXiv:2009.03106 (`two_pass`). Li et al. 2022, arXiv:2110.05679 (`ghost`). Bu et al. 2022, Differentially private
optimization on large model at small cost, arXiv:2210.00038 (`book_keeping`); arXiv:2205.10683 (`mixed`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from jaxadv import parallel
from jaxadv.core import PyTree
from jaxadv.core.jaxprs import bind
from jaxadv.privacy import uses as layers
from jaxadv.privacy.uses import Graph, row_norm, wide

Weigh = Callable[[list], tuple[list, Any]]
"""Norms `[b]` of the leaves to (factor `[b]` for each leaf, bool `[b]` which examples count)."""


class Part(NamedTuple):
    """Leaves that are treated together, because some value depends on all of them.

    Attributes:
      leaves: their numbers.
      roots: the values made of them that meet the example.
      formula: `'gram'`, `'rows'` (the gradients of the examples are formed and kept) or `'rows, product'` (they are
        formed for their norms; the sum is a weighted product).
      positions: number of terms of the gradient of one example.
      inputs: rows of the matrix that the leaves are.
      outputs: its columns.
      multiplications: for one example, beyond those of the gradients of activations.
    """

    leaves: tuple[int, ...]
    roots: tuple[Any, ...]
    formula: str
    positions: int
    inputs: int
    outputs: int
    multiplications: int


class LeafPlan(NamedTuple):
    """How one parameter is treated; the fields are those of `Part`.

    Attributes:
      name: path of the leaf.
      uses: where it meets the example, e.g. `'conv'`, `'dense, dense'`, `'other'`.
      formula: see `Part`; for the methods with a second pass, that of the norm.
      positions: see `Part`.
      inputs: see `Part`.
      outputs: see `Part`.
      multiplications: see `Part`; counted once for leaves that are treated together.
    """

    name: str
    uses: str
    formula: str
    positions: int
    inputs: int
    outputs: int
    multiplications: int


class ClipPlan(NamedTuple):
    """What a clipped gradient will do, parameter by parameter; `str(plan)` is a table.

    Attributes:
      method: the method.
      leaves: one entry for each leaf of the parameters.
    """

    method: str
    leaves: tuple[LeafPlan, ...]

    def __str__(self) -> str:
        """Return a table with one line for each leaf."""
        rows = [("parameter", "uses", "formula", "T x in x out", "multiplications")]
        for leaf in self.leaves:
            size = f"{leaf.positions} x {leaf.inputs} x {leaf.outputs}" if leaf.positions else ""
            rows.append((leaf.name, leaf.uses, leaf.formula, size, f"{leaf.multiplications:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([f"method {self.method}", *lines])


# -------------------------------------------------------------------------------------------------- which formula


def arrange(graph: Graph, method: str) -> list[Part]:
    """Choose a formula for every parameter.

    Args:
      graph: the program.
      method: `'ghost'`, `'book_keeping'`, `'mixed'` or `'auto'`.

    Returns:
      The parts; leaves in none of them do not enter the loss.
    """
    groups: list[tuple[frozenset[int], list]] = []
    for root in dict.fromkeys([*graph.uses, *graph.others]):
        leaves, roots = graph.parents[root], [root]
        for group in [g for g in groups if g[0] & leaves]:
            leaves, roots = leaves | group[0], group[1] + roots
            groups.remove(group)
        groups.append((leaves, roots))
    return [_part(graph, sorted(leaves), roots, method) for leaves, roots in groups]


def _part(graph: Graph, leaves: Sequence[int], roots: Sequence[Any], method: str) -> Part:
    uses = [use for root in roots for use in graph.uses.get(root, ())]
    direct = _direct(graph, leaves, roots)
    alone = direct and bool(uses) and roots[0] not in graph.others
    alone = alone and all(u.isometric() and u.view() == uses[0].view() for u in uses)
    numbers = [use.sizes() for use in uses]
    positions = sum(n[0] for n in numbers)
    inputs, outputs = numbers[0][1:] if numbers else (0, 0)
    size = sum(math.prod(graph.leaves[i].aval.shape) for i in leaves)
    held = sum(math.prod(v.aval.shape) for use in uses for v in (use.other, use.eqn.outvars[0]))
    product = sum(math.prod(n) for use, n in zip(uses, numbers) if use.kind != "gather")
    gram = layers.gram_cost(uses[0]) if len(uses) == 1 else positions**2 * inputs
    gram += positions**2 * outputs + product
    narrow = any(jnp.finfo(graph.leaves[i].aval.dtype).bits < 32 for i in leaves if _floats(graph.leaves[i]))
    keep = not uses or size <= held or (narrow and not direct)  # gradients no larger than what they replace
    formed = (1 if keep else 2) * product + size
    take = {
        "ghost": alone,
        "book_keeping": alone,
        "mixed": alone and (2 * positions**2 < inputs * outputs or uses[0].kind == "gather"),
        "auto": alone and gram < formed,
    }[method]
    formula = "gram" if take else "rows" if keep else "rows, product"
    return Part(tuple(leaves), tuple(roots), formula, positions, inputs, outputs, gram if take else formed)


def _floats(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.floating)


def _direct(graph: Graph, leaves: Sequence[int], roots: Sequence[Any]) -> bool:
    """Whether the part is one leaf that meets the example as it is."""
    return len(leaves) == len(roots) == 1 and roots[0] is graph.leaves[leaves[0]]


def describe(method: str, loss_fn: Callable, params: PyTree, batch: PyTree, keys: PyTree) -> ClipPlan:
    """Tell how each parameter is treated.

    Args:
      method: one of `METHODS`.
      loss_fn: the loss of one example.
      params: parameters.
      batch: pytree of `[b, ...]`.
      keys: typed keys `[b]`, or None.

    Returns:
      The plan.
    """
    names = [jax.tree_util.keystr(path) or "params" for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    graph = layers.trace(loss_fn, params, batch, keys)
    entries = [LeafPlan(name, "none", "none", 0, 0, 0, 0) for name in names]
    rows = method in ("vmap", "two_pass") or graph.hidden
    for part in arrange(graph, "auto" if rows else method):
        met = [use.kind for root in part.roots for use in graph.uses.get(root, ())]
        met += ["other"] * sum(root in graph.others for root in part.roots)
        for place, leaf in enumerate(part.leaves):
            cost = 0 if place else part.multiplications
            numbers = (part.positions, part.inputs, part.outputs, cost)
            if rows:
                work = part.positions * part.inputs * part.outputs
                numbers = (*numbers[:3], 0 if place else work)
            formula = "rows" if rows else part.formula
            entries[leaf] = LeafPlan(names[leaf], ", ".join(met), formula, *numbers)
    fallback = " (as vmap: a convolution is hidden in a function or a loop)" if graph.hidden else ""
    return ClipPlan(method + fallback, tuple(entries))


# -------------------------------------------------------------------------------------------------- the methods


def _rows(loss_fn, params, batch, keys):
    """Losses `[b]` and a gradient for each example.

    Under `vmap` the gradients of the kernels of a convolution are one convolution with b groups. XLA may compute it as
    a dense one whose other groups are multiplied by 0, and then one example that is not finite breaks all others: the
    sum would move by more than the bound. So where anything is not finite, examples are taken one at a time.
    """
    run = jax.value_and_grad(loss_fn)
    made = jax.vmap(run, in_axes=(None, 0, 0))(params, batch, keys)
    if not any(layers.convolves(eqn) for eqn in layers.trace(loss_fn, params, batch, keys).inner):
        return made
    finite = jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(made)]))
    return lax.cond(finite, lambda: made, lambda: lax.map(lambda row: run(params, *row), (batch, keys)))


def _leaf_norms(grads: PyTree) -> list:
    return [jax.vmap(row_norm)(leaf) for leaf in jax.tree.leaves(grads)]


def _total(rows: Any, factor: Any, counts: Any) -> Any:
    """Sum of weighted rows; where, not times 0: NaN * 0 is NaN."""
    column = (-1,) + (1,) * (rows.ndim - 1)
    return jnp.where(counts.reshape(column), wide(rows) * factor.reshape(column), 0).sum(0)


def _vmap(loss_fn, params, batch, keys, axis_name, weigh: Weigh):
    norms, losses, sums = _one_by_one(loss_fn, params, batch, keys)
    return jax.tree.unflatten(jax.tree.structure(params), sums(*weigh(norms))), norms, losses


def _weighted(loss_fn, params, batch, keys, weigh: Weigh, norms: list):
    """A backward pass of the weighted sum; what does not count is replaced by a row that does, and weighs nothing."""
    (factor, *others), counts = weigh(norms)
    if any(other is not factor for other in others):
        raise ValueError(
            "a second backward pass must have one bound for all parameters; got a bound for each group of them. "
            "Pass method='mixed' or 'auto'."
        )
    leaves = jax.tree.leaves(params)
    if any(jnp.finfo(leaf.dtype).bits < 32 for leaf in leaves):
        raise ValueError(
            "parameters must be float32 or wider for a second backward pass, which sums in their precision and could "
            f"pass the bound; got {sorted({str(leaf.dtype) for leaf in leaves})}. Pass method='mixed' or 'auto'."
        )
    chosen = jnp.where(counts, jnp.arange(counts.shape[0]), jnp.argmax(counts)) if counts.size else counts.astype(int)
    batch, keys = jax.tree.map(lambda a: a[chosen], (batch, keys))
    weights = jnp.where(counts, factor, 0)

    def loss(params):
        losses = jax.vmap(loss_fn, in_axes=(None, 0, 0))(params, batch, keys)
        return (weights.astype(losses.dtype) * losses).sum()

    return jax.tree.map(lambda g: jnp.where(counts.any(), wide(g), 0), jax.grad(loss)(params))


def _two_pass(loss_fn, params, batch, keys, axis_name, weigh: Weigh):
    losses, grads = _rows(loss_fn, params, batch, keys)
    norms = _leaf_norms(grads)
    return _weighted(loss_fn, params, batch, keys, weigh, norms), norms, losses


def _ghost(loss_fn, params, batch, keys, axis_name, weigh: Weigh):
    norms, losses, _ = _book(loss_fn, params, batch, keys, axis_name, "ghost")
    return _weighted(loss_fn, params, batch, keys, weigh, norms), norms, losses


def _book(loss_fn, params, batch, keys, axis_name, method: str) -> tuple[list, Any, Callable]:
    """Norms of the leaves `[b]`, losses `[b]`, and a function from factors and counts to the sums of the leaves."""
    graph, leaves = layers.trace(loss_fn, params, batch, keys), jax.tree.leaves(params)
    if graph.hidden:
        return _one_by_one(loss_fn, params, batch, keys)
    known = graph.known(leaves)
    losses, others, cotangents, free = _backward(graph, known, jax.tree.leaves((batch, keys)), axis_name)
    parts = arrange(graph, method)
    norms: list = [jnp.zeros(losses.shape, jnp.float32)] * len(leaves)
    kept: dict[int, Any] = {}
    for part in parts:
        if part.formula == "gram":
            uses = graph.uses[part.roots[0]]
            a, b = [others[id(u.eqn)] for u in uses], [cotangents[id(u.eqn)] for u in uses]
            norms[part.leaves[0]] = jax.vmap(lambda a, b, uses=uses: layers.gram_norm(uses, a, b))(a, b)
            continue
        rows = [_root_rows(graph, root, known, others, cotangents, free) for root in part.roots]
        if not _direct(graph, part.leaves, part.roots):
            pull = _pull(graph, part, known)
            rows = jax.vmap(pull)(rows)
        for leaf, grads in zip(part.leaves, rows):
            norms[leaf] = jax.vmap(row_norm)(grads)
            if part.formula == "rows":
                kept[leaf] = grads

    def sums(factors: list, counts: Any) -> list:
        totals: list = [jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]
        for part in parts:
            if part.formula == "rows":
                for leaf in part.leaves:
                    totals[leaf] = _total(kept[leaf], factors[leaf], counts)
                continue
            for factor in {id(factors[leaf]): factors[leaf] for leaf in part.leaves}.values():
                made = [_root_sum(graph, root, known, others, cotangents, free, factor, counts) for root in part.roots]
                if not _direct(graph, part.leaves, part.roots):
                    made = _pull(graph, part, known)(made)
                for leaf, total in zip(part.leaves, made):
                    if factors[leaf] is factor:
                        totals[leaf] = total
        return totals

    return norms, losses, sums


def _one_by_one(loss_fn, params, batch, keys) -> tuple[list, Any, Callable]:
    """The same by `vmap`."""
    losses, grads = _rows(loss_fn, params, batch, keys)
    leaves = jax.tree.leaves(grads)

    def sums(factors, counts):
        return [_total(rows, factor, counts) for rows, factor in zip(leaves, factors)]

    return _leaf_norms(grads), losses, sums


def _bookkeeper(method: str) -> Callable:
    def run(loss_fn, params, batch, keys, axis_name, weigh: Weigh):
        norms, losses, sums = _book(loss_fn, params, batch, keys, axis_name, method)
        return jax.tree.unflatten(jax.tree.structure(params), sums(*weigh(norms))), norms, losses

    return run


def _backward(graph: Graph, known: dict, rows: list, axis_name) -> tuple[Any, dict, dict, dict]:
    """One backward pass over all examples.

    Returns losses `[b]`; for each known use, by its equation, the other operand and the cotangent of the output; for
    each root that is used in other ways, the gradients `[b, ...]` through these.
    """
    tapped = {id(use.eqn): use for uses in graph.uses.values() for use in uses}
    outputs = [use.eqn.outvars[0].aval for use in tapped.values()]
    taps = {k: jnp.zeros(a.shape, a.dtype) for k, a in zip(tapped, outputs)}
    taps = parallel.varying(taps, axis_name)  # or each would hear of the rows on all devices
    inputs = graph.jaxpr.invars[len(graph.leaves) :]

    def forward(free, taps, *row):
        seen, seen_free = dict(zip(inputs, row, strict=True)), dict(zip(graph.others, free, strict=True))

        def read(atom, live):
            if isinstance(atom, jex.Literal):
                return atom.val
            if atom in seen:
                return seen[atom]
            if not live or graph.root(atom) not in seen_free:
                return known[atom]
            for eqn in graph.chain(atom):
                if eqn.outvars[0] not in seen_free:
                    seen_free[eqn.outvars[0]] = bind(eqn, [seen_free[eqn.invars[0]]], eqn.params)
            return seen_free[atom]

        met = {}
        for eqn in graph.inner:
            use, live = tapped.get(id(eqn)), bool(graph.live.intersection(eqn.outvars))
            out = bind(eqn, [read(a, live and use is None) for a in eqn.invars], eqn.params)
            if use is not None:
                met[id(eqn)], out = read(use.other, False), out + taps[id(eqn)]
            seen.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))
        return jnp.asarray(read(graph.loss, True)), met

    free = [known[root] for root in graph.others]
    run = jax.vmap(jax.value_and_grad(forward, (0, 1), has_aux=True), (None, None, *[0] * len(rows)))
    (losses, met), (free, cotangents) = run(free, taps, *rows)
    return losses, met, cotangents, dict(zip(graph.others, free))


def _root_rows(graph, root, known, others, cotangents, free) -> Any:
    """The gradients `[b, ...]` of a root, over all its uses."""
    parts = [wide(free[root])] if root in free else []
    for use in graph.uses.get(root, ()):
        grad = jax.vmap(lambda a, b, use=use: layers.rows(use, known[root], a, b))
        parts.append(grad(others[id(use.eqn)], cotangents[id(use.eqn)]))
    return sum(parts[1:], start=parts[0])


def _root_sum(graph, root, known, others, cotangents, free, factor, counts) -> Any:
    """The weighted sum of the gradients of a root, without forming those of its known uses."""
    parts = [_total(free[root], factor, counts)] if root in free else []

    def masked(rows, weights=None):
        if not jnp.issubdtype(rows.dtype, jnp.floating):
            return rows
        column = (-1,) + (1,) * (rows.ndim - 1)
        rows = wide(rows) if weights is None else wide(rows) * weights.reshape(column)
        return jnp.where(counts.reshape(column), rows, 0)

    for use in graph.uses.get(root, ()):
        a, b = masked(others[id(use.eqn)]), masked(cotangents[id(use.eqn)], factor)
        parts.append(layers.formed(use, known[root], a, b))
    return sum(parts[1:], start=parts[0])


def _pull(graph: Graph, part: Part, known: dict) -> Callable:
    """From gradients of the roots of a part to those of its leaves, through what makes the roots of the leaves."""
    members, own = set(part.leaves), [graph.leaves[i] for i in part.leaves]
    steps = [e for e in graph.outer if any(members.intersection(graph.parents.get(v, ())) for v in e.outvars)]

    def outer(values):
        seen = known | dict(zip(own, values))
        layers._evaluate(steps, seen)
        return [seen[root] for root in part.roots]

    _, pull = jax.vjp(outer, [known[v] for v in own])

    def narrowed(grads):
        return pull([g.astype(root.aval.dtype) for g, root in zip(grads, part.roots)])[0]

    return narrowed


METHODS: dict[str, Callable] = {
    "vmap": _vmap,
    "two_pass": _two_pass,
    "ghost": _ghost,
    "book_keeping": _bookkeeper("book_keeping"),
    "mixed": _bookkeeper("mixed"),
    "auto": _bookkeeper("auto"),
}
"""Name of a method to the function; the names are what `clipped_grads` takes as `method`."""
