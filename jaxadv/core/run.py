"""From an attack's four functions to an answer: the derived `run` for one batch.

It and the driver of queues (`core.serve`) obey the same two rules, so their answers are the same: a row that is done is
never stepped again, and a row's randomness comes from its dataset index.
"""

import jax
import jax.numpy as jnp

from jaxadv.core import check
from jaxadv.core.keys import example_keys
from jaxadv.core.loop import canonical, loop
from jaxadv.core.rows import select
from jaxadv.core.shardings import untyped
from jaxadv.core.types import Attack, PyTree, Result, as_callable


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


@untyped
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
      TypeError: on integer inputs, labels that are not integers, or a model that cannot be called.
    """
    model = as_callable(model)
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


def joined(best: Result, found: Result) -> Result:
    """Keep the worst case of every row of two results for the same examples.

    Args:
      best: a result; what is equally good stays its own.
      found: another one, with the same flags.

    Returns:
      The better of each row by (success, lowest score); queries and gradients are summed, flags joined.
    """
    better = (found.success & ~best.success) | ((found.success == best.success) & (found.score < best.score))
    kept: Result = select(better, found, best)
    return kept._replace(
        queries=best.queries + found.queries,
        grads=best.grads + found.grads,
        flags={name: best.flags[name] | found.flags[name] for name in best.flags},
    )


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
        return joined(best, run(attack, key, model, x, y, index=index, restart=restart))

    return jax.lax.fori_loop(1, restarts, again, first)
