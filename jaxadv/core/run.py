"""From an attack's four functions to an answer: the derived `run`, and the slot driver that serves a queue.

Both drivers obey the same two rules, so their answers are the same: a row that is done is never stepped again, and a
row's randomness comes from its dataset index.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv.core import check
from jaxadv.core.keys import example_keys
from jaxadv.core.loop import canonical, loop
from jaxadv.core.types import Attack, PyTree, Result


def select(rows, yes: PyTree, no: PyTree) -> PyTree:
    """Choose between two states row by row.

    Args:
      rows: bool `[b]`.
      yes: the state taken where `rows` is True; every leaf `[b, ...]`.
      no: the state taken elsewhere.

    Returns:
      The mixed state.
    """

    def leaf(a, b):
        return jnp.where(rows.reshape(rows.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(leaf, yes, no)


def advance(attack: Attack, state: PyTree, model, x, y) -> PyTree:
    """Step the rows that are not done and leave the others as they are.

    Args:
      attack: the attack.
      state: its state, every leaf `[b, ...]`.
      model: logits from a batch.
      x: `[b, ...]` examples.
      y: labels or what else the attack's loss takes.

    Returns:
      The next state.
    """
    return select(attack.done(state), state, attack.step(state, model, x, y))


def run(attack: Attack, key, model, x, y, *, index=None, restart=0) -> Result:
    """Run an attack to its end on one batch. Pure: jit, vmap or shard it as you like.

    Args:
      attack: any attack.
      key: a typed key.
      model: logits `[b, k]` from a batch.
      x: `[b, ...]` float examples, inside the threat's bounds; lower precision is raised to float32.
      y: int `[b]` labels, `Targets`, or what else the attack's loss takes.
      index: int `[b]` dataset indices, from which the random keys come; defaults to `arange(b)`.
      restart: number of the restart; each has randomness of its own.

    Returns:
      The verified result, one row for each example.

    Raises:
      ValueError: on inputs of a wrong shape, empty, or (when known now) outside the threat's bounds.
      TypeError: on integer inputs or labels that are not integers.
    """
    check.inputs(x, attack.threat.bounds)
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # budgets and boxes are not representable in bfloat16
    index = jnp.arange(x.shape[0], dtype=jnp.int32) if index is None else jnp.asarray(index, jnp.int32)
    if index.shape != (x.shape[0],):
        raise ValueError(
            f"index must hold one dataset index for each of the {x.shape[0]} examples; got {index.shape}. "
            "Slice it like x."
        )
    keys = example_keys(key, attack.name, index, restart)
    state = canonical(attack.init)(keys, model, x, y)
    if attack.early:
        state = loop(lambda s: advance(attack, s, model, x, y), state, attack.max_steps, until=attack.done)
    else:
        state = loop(lambda s: attack.step(s, model, x, y), state, attack.max_steps)
    return attack.result(state, model, x, y)


def serve(attack: Attack, key, model, x, y, *, slots: int, index=None, restart=0) -> Result:
    """Run an attack on a queue of examples with a fixed number of slots, refilling a slot when its row is done.

    A small host-driven driver that shows what the protocol promises: the answer of `run`, whatever the slots hold
    beside a row.

    Args:
      attack: any attack.
      key: a typed key.
      model: logits from a batch.
      x: `[n, ...]` the queue.
      y: `[n]` labels, or a pytree with leading axis `[n]`.
      slots: how many rows are worked on at once.
      index: int `[n]` dataset indices; defaults to `arange(n)`.
      restart: number of the restart.

    Returns:
      The result for all `n` rows, in the order of the queue.

    Raises:
      ValueError: if `slots` is not at least 1.
    """
    check.whole("slots", slots)
    check.inputs(x, attack.threat.bounds if hasattr(attack, "threat") else None)
    n = x.shape[0]
    index = np.arange(n, dtype=np.int32) if index is None else np.asarray(index, np.int32)
    keys = example_keys(key, attack.name, jnp.asarray(index), restart)

    def rows(tree, where):
        return jax.tree.map(lambda a: a[where], tree)

    start = jax.jit(attack.init)
    move = jax.jit(lambda s, m, x, y: (s := advance(attack, s, m, x, y), attack.done(s)))
    refill = jax.jit(lambda fresh, new, old: select(fresh, new, old))
    finish = jax.jit(attack.result)

    held = np.full(slots, -1)  # which row of the queue a slot works on; -1 is an idle slot that holds row 0
    queue = list(range(n))
    answer: list = [None] * n
    state, inside, labels = None, x[np.zeros(slots, int)], rows(y, np.zeros(slots, int))
    while queue or (held >= 0).any():
        fresh = np.zeros(slots, bool)
        for slot in np.flatnonzero(held < 0)[: len(queue)]:
            held[slot], fresh[slot] = queue.pop(0), True
        if fresh.any():
            at = np.maximum(held, 0)
            inside, labels = x[at], rows(y, at)
            new = start(keys[at], model, inside, labels)
            state = new if state is None else refill(jnp.asarray(fresh), new, state)
        state, done = move(state, model, inside, labels)
        ready = np.flatnonzero(np.asarray(done) & (held >= 0))
        if ready.size:
            found = jax.device_get(finish(state, model, inside, labels))
            for slot in ready:
                answer[held[slot]] = rows(found, slot)
                held[slot] = -1
    return jax.tree.map(lambda *parts: jnp.stack([jnp.asarray(p) for p in parts]), *answer)


def best_of(attack: Attack, key, model, x, y, *, restarts: int, index=None) -> Result:
    """Run an attack several times with randomness of its own each time, and keep the worst case of every row.

    Args:
      attack: any attack with a random start or random steps.
      key: a typed key.
      model: logits from a batch.
      x: `[b, ...]` examples.
      y: labels, `Targets`, or what else the attack's loss takes.
      restarts: number of runs.
      index: int `[b]` dataset indices; defaults to `arange(b)`.

    Returns:
      The best result of each row by (success, lowest score); queries and gradients are summed, flags joined.

    Raises:
      ValueError: if `restarts` is not at least 1.
    """
    check.whole("restarts", restarts)
    first = run(attack, key, model, x, y, index=index)

    def again(restart, best: Result) -> Result:
        found = run(attack, key, model, x, y, index=index, restart=restart)
        better = (found.success & ~best.success) | ((found.success == best.success) & (found.score < best.score))
        kept: Result = select(better, found, best)
        return kept._replace(
            queries=best.queries + found.queries,
            grads=best.grads + found.grads,
            flags={name: best.flags[name] | found.flags[name] for name in best.flags},
        )

    return jax.lax.fori_loop(1, restarts, again, first)
