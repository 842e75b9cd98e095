"""AutoAttack: which attacks run one after the other, and the whole chain as a pure function on a batch.

What lives here: the versions as data (`Stage`, `stages`), what a stage needs of an evaluation (`fitting`), the chain
`autoattack(threat).run(...)`, and attacks that are computed on a surrogate (`transfer`). What does not: the attacks
themselves, and verdicts, tables and resuming (room `evaluate`, which runs the same stages with the same keys).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxadv.core import (
    Attack,
    Result,
    Threat,
    as_callable,
    check,
    feasible,
    pytree,
    robust,
    select,
    serve,
    static,
    untyped,
)

VERSIONS = ("standard", "plus", "rand")
"""Versions of AutoAttack."""

NEEDS: dict[str, str] = {"square": "images", "apgd_t": "labels", "fab": "labels", "fab_t": "labels"}
"""What an attack cannot do without: inputs `[b, h, w, c]`, or plain labels in the place of targets."""


class Stage(NamedTuple):
    """One attack of a protocol.

    Attributes:
      attack: a name of `attacks.ATTACKS`, a function from a threat to an attack, or an attack.
      settings: arguments for the named or given function, as pairs.
      restarts: how often it runs on the survivors, each time with other random numbers.
    """

    attack: Any
    settings: tuple[tuple[str, Any], ...] = ()
    restarts: int = 1


def stages(norm: str, version: str = "standard") -> tuple[Stage, ...]:
    """Return the attacks of AutoAttack in their order.

    | version | attacks |
    | --- | --- |
    | `standard` | APGD-CE, APGD-T (9 targets), FAB-T (9 targets), Square (5,000 queries); 100 steps each |
    | `standard`, l1 | the same with the budget shrinking from three times; 5 starts of APGD-CE, 5 targets of APGD-T |
    | `plus` | APGD-CE and APGD-DLR (5 starts), FAB (5), Square, APGD-T (9 targets), FAB-T (9 targets) |
    | `rand` | APGD-CE and APGD-DLR with gradients averaged over 20 passes, for randomized models |

    Args:
      norm: `linf`, `l2` or `l1`.
      version: one of `VERSIONS`.

    Returns:
      The stages.

    Raises:
      ValueError: on another norm or version.

    References:
      Croce and Hein 2020, Reliable evaluation of adversarial robustness, arXiv:2003.01690; l1: Croce and Hein 2021,
      Mind the box, arXiv:2103.01208. Differs from the authors' code: in l1, `plus` lets the budget shrink too.
    """
    check.choice("norm of AutoAttack", norm, dict.fromkeys(("linf", "l2", "l1")))
    check.choice("version of AutoAttack", version, dict.fromkeys(VERSIONS))
    shrink: tuple = (("large_eps", True),) if norm == "l1" else ()
    square, nine = Stage("square", (("queries", 5000),)), (("targets", 9),)
    if version == "rand":
        return (Stage("apgd_ce", (("eot", 20),)), Stage("apgd_dlr", (("eot", 20),)))
    if version == "plus":
        five = (("restarts", 5),)
        first = (Stage("apgd_ce", five + shrink), Stage("apgd_dlr", five + shrink), Stage("fab", five), square)
        return (*first, Stage("apgd_t", nine + shrink), Stage("fab_t", nine))
    if norm == "l1":
        first = (Stage("apgd_ce", (("restarts", 5), *shrink)), Stage("apgd_t", (("targets", 5), *shrink)))
    else:
        first = (Stage("apgd_ce"), Stage("apgd_t", nine))
    return (*first, Stage("fab_t", nine), square)


def fitting(chosen: Sequence[Stage], shape: Sequence[int], targeted: bool) -> tuple[tuple[Stage, ...], list[str]]:
    """Leave out the stages that cannot work on these inputs.

    Args:
      chosen: the stages of a protocol.
      shape: of one example.
      targeted: whether each example has a target of its own.

    Returns:
      The stages that can, and a sentence about each one that cannot.
    """
    kept, words = [], []
    for stage in chosen:
        need = NEEDS.get(stage.attack) if isinstance(stage.attack, str) else None
        if need == "images" and len(shape) != 3:
            words.append(f"{stage.attack} was left out: it works on images [h, w, c], and examples have {list(shape)}.")
        elif need == "labels" and targeted:
            words.append(f"{stage.attack} was left out: it chooses its targets itself, and the evaluation is targeted.")
        else:
            kept.append(stage)
    return tuple(kept), words


@pytree
class Chain(Attack):
    """Attacks one after the other, each on what those before left standing; built by `autoattack`.

    It has no steps of its own: `run` is the chain, and `evaluate` takes it apart into its stages.
    """

    threat: Threat
    parts: tuple[Attack, ...]
    name: str = static()
    restarts: tuple[int, ...] = static()
    slots: int | None = static()
    max_steps: int = static()
    early: bool = static(default=True)

    @untyped
    def run(self, key, model, x, y, *, index=None, restart: int = 0) -> Result:
        """Run the chain on one batch.

        Args:
          key: a typed key.
          model: logits `[b, k]` from a batch.
          x: `[b, ...]` float examples, inside the threat's bounds.
          y: int `[b]` labels.
          index: int `[b]` dataset indices, from which the random keys come; defaults to `arange(b)`.
          restart: number of the restart of the whole chain.

        Returns:
          For each row the first failing point, verified at matrix precision "highest", else the clean point; queries
          and gradients are sums over the attacks that were run on the row.

        Raises:
          ValueError: on inputs of a wrong shape, empty, or outside the threat's bounds.
          TypeError: on integer inputs, labels that are not integers, or a model that cannot be called.
        """
        model = as_callable(model)
        check.inputs(x, self.threat.bounds)
        x = jnp.asarray(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        b = x.shape[0]

        def holds(points):
            with jax.default_matmul_precision("highest"):
                logits = model(points)
            check.logits(logits, b)
            return robust(logits, y)

        stands = holds(x)
        zero, none = jnp.zeros(b, jnp.int32), jnp.zeros(b, bool)
        best = Result(x, zero.astype(x.dtype), ~stands, zero.astype(x.dtype), zero + 1, zero, {})
        slots = min(b, 256) if self.slots is None else self.slots
        for part, times in zip(self.parts, self.restarts):
            if NEEDS.get(part.name) == "images" and x.ndim != 4:
                continue
            for turn in range(times):
                found = serve(
                    part, key, model, x, y, slots=slots, index=index, restart=restart * times + turn, rows=stands
                )
                broken = stands & feasible(self.threat, found.x, x) & ~holds(found.x)
                flags = {name: best.flags.get(name, none) | found.flags[name] for name in found.flags}
                queries, grads = best.queries + found.queries + stands, best.grads + found.grads
                plain, old = found._replace(flags={}), best._replace(flags={})
                best = select(broken, plain, old)._replace(flags=best.flags | flags, queries=queries, grads=grads)
                stands = stands & ~broken
        return best._replace(success=~stands)


def autoattack(
    threat: Threat, *, version: str = "standard", name: str = "autoattack", slots: int | None = None
) -> Chain:
    """Return AutoAttack as one attack: `autoattack(threat).run(key, model, x, y)`, pure, to be jitted or sharded.

    Args:
      threat: a norm ball `linf`, `l2` or `l1`.
      version: one of `VERSIONS`.
      name: of the chain; random keys come from the names of its attacks, as in `evaluate`.
      slots: rows worked on at once; None is the whole batch, at most 256.

    Returns:
      The chain. On inputs that are no images it goes without Square.

    Raises:
      ValueError: on a threat of another norm, or an unknown version.

    References:
      Croce and Hein 2020, Reliable evaluation of adversarial robustness, arXiv:2003.01690.
    """
    from jaxadv.attacks import ATTACKS

    chosen = stages(threat.norm, version)
    parts = tuple(ATTACKS[stage.attack](threat, **dict(stage.settings)) for stage in chosen)
    if slots is not None:
        check.whole("slots", slots)
    return Chain(
        threat=threat,
        parts=parts,
        name=name,
        restarts=tuple(stage.restarts for stage in chosen),
        slots=slots,
        max_steps=sum(part.max_steps for part in parts),
    )


@pytree
class Transfer(Attack):
    """An attack computed on a surrogate and judged on the model; built by `transfer`."""

    threat: Threat
    inner: Attack
    surrogate: Any
    name: str = static()
    max_steps: int = static()
    early: bool = static()

    def init(self, keys, model, x, y):
        """Start on the surrogate."""
        return self.inner.init(keys, self.surrogate, x, y)

    def step(self, state, model, x, y):
        """Step on the surrogate."""
        return self.inner.step(state, self.surrogate, x, y)

    def done(self, state):
        """A row is done when the attack on the surrogate is."""
        return self.inner.done(state)

    def result(self, state, model, x, y) -> Result:
        """Ask the model at the point that the surrogate led to."""
        found = self.inner.result(state, self.surrogate, x, y)
        return found._replace(success=~robust(model(found.x), y), queries=found.queries + 1)


def transfer(threat: Threat, surrogate: Any, *, attack: Callable | None = None, name: str = "transfer") -> Transfer:
    """Return an attack that follows the gradients of another model.

    Args:
      threat: the allowed set.
      surrogate: logits from a batch, a callable pytree: the model whose gradients are followed.
      attack: a function from a threat to the attack on the surrogate; by default the momentum iterative method with 50
        steps, to their end.
      name: enters the random keys.

    Returns:
      The attack; its queries and gradients are those of the surrogate, and one query of the model.

    References:
      Dong et al. 2018, Boosting adversarial attacks with momentum, arXiv:1710.06081; Croce et al. 2022, Evaluating the
      adversarial robustness of adaptive test-time defenses, arXiv:2202.13711 (why a static model is a good surrogate).
    """
    from jaxadv.attacks import mi_fgsm

    inner = mi_fgsm(threat, steps=50) if attack is None else attack(threat)
    return Transfer(
        threat=threat,
        inner=inner,
        surrogate=surrogate,
        name=name,
        max_steps=inner.max_steps,
        early=inner.early,
    )
