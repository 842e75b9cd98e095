"""The slot driver: a fixed number of rows is worked on at once, and a row that is done makes place for the next.

What lives here: the pure program (`begin`, `advance_board`) that keeps slots full from a queue of rows, and `serve`,
which runs a whole queue in one call. What does not: how many slots, several devices, memory, files (room `evaluate`).

| part | shape | what it is |
| --- | --- | --- |
| `Data` | `[n, ...]` | the examples, resident on the device |
| queue | `[n]`, with a count | numbers of the rows to work on, in any order |
| `Board` | `[s, ...]` | the slots: the attack's state, the examples they hold, and counters |
| `Out` | `[f, ...]` | rows that were finished, in the order in which they were |

Slots are exchanged in blocks of `block` rows: the results of so many rows that are done, then the first states of the
next ones, each a batch of its own fixed shape, so that an exchange costs a fraction of a step. It happens when a whole
block is ready, or when the slots that wait have idled away as many row-steps as an exchange costs. All shapes are fixed
by the number of slots, so at one number of slots the bits of a row's answer depend on nothing beside the row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxadv.core import check
from jaxadv.core.keys import example_keys
from jaxadv.core.loop import canonical
from jaxadv.core.rows import select
from jaxadv.core.types import Attack, PyTree, Result, as_callable


class Data(NamedTuple):
    """Examples: every leaf `[n, ...]`; `eps` holds a budget for each row, or is None."""

    x: Float[Array, "n ..."]
    y: PyTree
    index: Int[Array, " n"]
    eps: Any = None


class Board(NamedTuple):
    """What the slots hold; counters have one entry, so that shards can be laid side by side.

    Attributes:
      state: the attack's state.
      data: the examples in the slots.
      held: row number of each slot, -1 where it is idle.
      taken: steps that the row in each slot took.
      pointer: how much of the queue was handed out.
      waste: row-steps that slots idled away since the last exchange.
      steps: steps of the whole board.
      swaps: exchanges.
    """

    state: PyTree
    data: Data
    held: Int[Array, " s"]
    taken: Int[Array, " s"]
    pointer: Int[Array, " 1"]
    waste: Int[Array, " 1"]
    steps: Int[Array, " 1"]
    swaps: Int[Array, " 1"]


class Out(NamedTuple):
    """Finished rows: the first `filled` entries hold results, row numbers and steps taken."""

    result: Result
    row: Int[Array, " f"]
    taken: Int[Array, " f"]
    filled: Int[Array, " 1"]


def block_of(slots: int) -> int:
    """Return how many rows are exchanged at once: an eighth of the slots.

    Args:
      slots: number of slots.

    Returns:
      At least 1.
    """
    return max(slots // 8, 1)


def _take(tree: PyTree, rows: Any) -> PyTree:
    return jax.tree.map(lambda a: a[rows], tree)


def _on(attack: Any, data: Data) -> Attack:
    """The attack on these rows: itself, or what a function of budgets makes of theirs."""
    return attack if isinstance(attack, Attack) else attack(data.eps)


def _fresh(attack: Any, key: Any, model: Any, data: Data, restart: Any) -> PyTree:
    own = _on(attack, data)
    return own.init(example_keys(key, own.name, data.index, restart), model, data.x, data.y)


def begin(attack: Any, key: Any, model: Any, data: Data, queue: Any, restart: Any, *, slots: int) -> Board:
    """Return a board of idle slots.

    Args:
      attack: an attack, or a pytree that makes one of budgets `[b]`.
      key: a typed key.
      model: logits from a batch.
      data: all examples.
      queue: int32 `[n]` row numbers.
      restart: number of the restart.
      slots: number of slots.

    Returns:
      The board before the first exchange.
    """
    held = _take(data, jnp.zeros(slots, jnp.int32))

    def blank(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(key, leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype)

    state = jax.tree.map(blank, jax.eval_shape(_fresh, attack, key, model, held, restart))
    zero = queue[:1] * 0
    none = jnp.broadcast_to(zero, (slots,))
    return Board(state, held, none - 1, none, zero, zero, zero, zero)


def advance_board(
    board: Board, attack: Any, key: Any, model: Any, data: Data, queue: Any, count: Any, restart: Any, limit: Any, *,
    room: int,
) -> tuple[Board, Out]:  # fmt: skip
    """Work on the queue until it is served, `limit` steps are done, or no room is left for results.

    Args:
      board: the slots.
      attack: as for `begin`.
      key: a typed key.
      model: logits from a batch.
      data: all examples.
      queue: int32 `[n]` row numbers; the first `count` are to be served.
      count: int32 `[1]`.
      restart: number of the restart.
      limit: int32, at most so many steps.
      room: rows of `Out`, at least a block.

    Returns:
      The board and the rows that were finished.
    """
    block = block_of(board.held.shape[0])
    sub = jax.eval_shape(_take, (board.state, board.data), jax.ShapeDtypeStruct((room,), jnp.int32))
    shape = jax.eval_shape(lambda s, d: _on(attack, d).result(s, model, d.x, d.y), *sub)
    row = jnp.broadcast_to(queue[:1] * 0, (room,))
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
    out = Out(empty, row, row, row[:1])
    last = board.steps + limit

    def idle(b: Board):
        return (b.held < 0) | _on(attack, b.data).done(b.state)

    def counts(b: Board):
        """How many slots are at work, how many wait for an exchange, and whether rows are left."""
        rest = b.pointer[0] < count[0]
        done = idle(b)
        return jnp.sum(~done), jnp.sum(done & ((b.held >= 0) | rest)), rest

    def busy(b: Board):
        working, waiting, rest = counts(b)
        due = (waiting >= block) | (rest & (b.waste[0] >= block))
        return (working > 0) & ~due & (b.steps[0] < last[0])

    def move(b: Board):
        waits = idle(b)
        state = select(waits, b.state, _on(attack, b.data).step(b.state, model, b.data.x, b.data.y))
        lost = jnp.sum(waits).astype(jnp.int32)
        return b._replace(
            state=state, taken=b.taken + ~waits, waste=b.waste + lost * (b.pointer[0] < count[0]), steps=b.steps + 1
        )

    def exchange(b: Board, out: Out):
        rest = b.pointer[0] < count[0]
        ready = idle(b) & ((b.held >= 0) | rest)
        at = jnp.nonzero(ready, size=block, fill_value=ready.shape[0])[0]
        chosen, at = at < ready.shape[0], jnp.minimum(at, ready.shape[0] - 1)
        left = chosen & (b.held[at] >= 0)

        def finish(out: Out):
            data = _take(b.data, at)
            found = _on(attack, data).result(_take(b.state, at), model, data.x, data.y)
            place = jnp.where(left, out.filled[0] + jnp.cumsum(left) - 1, room)
            put = jax.tree.map(lambda a, v: a.at[place].set(v, mode="drop"), out[:3], (found, b.held[at], b.taken[at]))
            return Out(*put, filled=out.filled + jnp.sum(left).astype(jnp.int32))

        out = lax.cond(jnp.any(left), finish, lambda out: out, out)
        turn = b.pointer[0] + jnp.cumsum(chosen).astype(jnp.int32) - 1
        comes = chosen & (turn < count[0])
        rows = queue[jnp.minimum(turn, queue.shape[0] - 1)]
        # slot -> its place in the block, or one past it
        inverse = jnp.full(ready.shape, block).at[jnp.where(chosen, at, ready.shape[0])].set(
            jnp.arange(block), mode="drop"
        )  # fmt: skip
        inside, inverse = inverse < block, jnp.minimum(inverse, block - 1)

        def refill(b: Board):
            new = _take(data, rows)
            new = (_fresh(attack, key, model, new, restart), new)
            state, held = select(inside & comes[inverse], _take(new, inverse), (b.state, b.data))
            return b._replace(state=state, data=held)

        b = lax.cond(jnp.any(comes), refill, lambda b: b, b)
        held = jnp.where(inside, jnp.where(comes, rows, -1)[inverse], b.held)
        return b._replace(
            held=held,
            taken=jnp.where(inside, 0, b.taken),
            pointer=b.pointer + jnp.sum(comes).astype(jnp.int32),
            waste=b.waste * 0,
            swaps=b.swaps + 1,
        ), out

    def goes_on(carry):
        b, out = carry
        served = jnp.all(b.held < 0) & (b.pointer[0] >= count[0])
        return ~served & (out.filled[0] + block <= room) & (b.steps[0] < last[0])

    def body(carry):
        b, out = exchange(*carry)
        return lax.while_loop(busy, move, b), out

    return lax.while_loop(goes_on, body, (board, out))


def serve(
    attack: Any, key: Any, model: Any, x: Any, y: Any, *, slots: int, index: Any = None, restart: Any = 0,
    rows: Any = None,
) -> Result:  # fmt: skip
    """Run an attack on a queue of examples with a fixed number of slots. Pure: the whole queue in one call.

    The answer is that of `run`, whatever the slots hold beside a row; rows that end early cost no more than they need.

    Args:
      attack: any attack.
      key: a typed key.
      model: logits from a batch.
      x: `[n, ...]` the queue.
      y: `[n]` labels, or a pytree with leading axis `[n]`.
      slots: how many rows are worked on at once.
      index: int `[n]` dataset indices; defaults to `arange(n)`.
      restart: number of the restart.
      rows: bool `[n]`, which examples to attack, may be traced; None is all. The others cost nothing, and their rows of
        the result are zeros.

    Returns:
      The result for all `n` rows, in the order of the queue.

    Raises:
      ValueError: if `slots` is not at least 1, or on inputs of a wrong shape, empty, or outside the threat's bounds.
      TypeError: on integer inputs, labels that are not integers, or a model that cannot be called.
    """
    model = as_callable(model)
    check.whole("slots", slots)
    check.inputs(x, attack.threat.bounds)
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    n = x.shape[0]
    index = jnp.arange(n, dtype=jnp.int32) if index is None else jnp.asarray(index, jnp.int32)
    if index.shape != (n,):
        raise ValueError(
            f"index must hold one dataset index for each of the {n} examples; got {index.shape}. Slice it like x."
        )
    slots = min(slots, n)
    return _serve(attack, key, model, Data(x, jax.tree.map(jnp.asarray, y), index), rows, restart, slots)


@jax.jit(static_argnums=6)
def _serve(attack: Any, key: Any, model: Any, data: Data, rows: Any, restart: Any, slots: int) -> Result:
    n = data.index.shape[0]
    chosen = jnp.ones(n, bool) if rows is None else rows
    queue = jnp.nonzero(chosen, size=n, fill_value=0)[0].astype(jnp.int32)
    count = jnp.sum(chosen).astype(jnp.int32)[None]

    def whole(attack, key, model, data, queue, count, restart):
        board = begin(attack, key, model, data, queue, restart, slots=slots)
        room = n + block_of(slots)
        limit = jnp.int32(2**30)
        return advance_board(board, attack, key, model, data, queue, count, restart, limit, room=room)[1]

    out = canonical(whole)(attack, key, model, data, queue, count, restart)
    place = jnp.where(jnp.arange(out.row.shape[0]) < out.filled[0], out.row, n)
    return jax.tree.map(
        lambda leaf: jnp.zeros((n, *leaf.shape[1:]), leaf.dtype).at[place].set(leaf, mode="drop"), out.result
    )
