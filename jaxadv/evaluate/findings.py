"""What is told about an evaluation: the entry of a model, its flags, its costs, and the sentences to read with it.

What lives here: from the records of an evaluation to a `ModelReport`. What does not: the records (`ledger`), and pages.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv.core import Threat
from jaxadv.evaluate import flags as red
from jaxadv.evaluate.inputs import Problem
from jaxadv.evaluate.intervals import share
from jaxadv.evaluate.ledger import Ledger, Seen, Work
from jaxadv.evaluate.report import CERTIFIED, ROBUST, ModelReport
from jaxadv.evaluate.verdict import forward, host


def _statements(work: Work, threat: Threat, curve: Sequence, rule: str | None, noise: bool) -> list[str]:
    """The sentences that a reader of the numbers must know."""
    out = [
        "Robust accuracy is an upper bound: the share of examples classified correctly at every point that these "
        "attacks found. "
        "A stronger attack may lower it.",
        "Misclassified examples are not robust and were not attacked.",
        "Every counted point was verified apart from the attack: float32, inside the bounds, its size in float64 at "
        "most eps plus "
        "one rounding of each coordinate, and the model asked again at matrix precision 'highest'. Logits that are "
        "not finite "
        "never count as robust.",
        "Intervals are 95 % Clopper-Pearson: they tell of the sampling of examples, not of the strength of the "
        "attacks.",
    ]
    if work.certificate is not None:
        out.append(
            "Certified accuracy is a lower bound: the share of examples for which a certificate shows that nothing "
            "within the budget changes the prediction. Certified examples were not attacked, so an attack that would "
            "contradict the certificate was not looked for."
        )
    if len(work.searches) > 1:
        out.append(
            "The attacks followed the model in bfloat16. Verdicts are of the float32 model alone, and examples that "
            "only the lower precision took for broken were attacked again in float32."
        )
    if noise:
        out.append(
            "After the attacks one draw of random noise was tried on the survivors; what it breaks counts as broken."
        )
    if threat.norm == "union":
        members = ", ".join(f"{m.norm} {float(np.max(np.asarray(m.eps))):g}" for m in getattr(threat, "members", ()))
        out.append(f"The threat is a union of {members}; sizes are shares of a member's budget.")
    if curve:
        out.append(
            "A point found within a smaller budget lies within every larger one: it was verified there and carried "
            "over, and the "
            "curve is the pointwise minimum, so it cannot rise."
        )
    if rule is not None:
        out.append(
            f"The evaluation is targeted (rule: {rule}): an example is broken only when its target class is reached "
            f"(or logits are "
            "not finite). Untargeted robust accuracy may be much lower."
        )
    return out


def _flags(
    problem: Problem, threat: Threat, clean: np.ndarray, kept: Ledger, seen: Sequence[Seen], interval: Any
) -> list:
    """Collect the red flags of one model, worst first."""
    n, survivors_left = len(problem.x), len(kept.open())
    attacks = [s for s in seen if s.row["name"] != "noise"]
    sizes = np.concatenate([s.sizes for s in attacks])
    sizes = sizes[np.isfinite(sizes[:, 0])]
    used = sizes[sizes[:, 1] > 0] if (sizes[:, 1] > 0).any() else sizes
    rows = np.resize(np.arange(n), min(8, problem.batch) if problem.batch > 1 else 2)
    model, bad = problem.model, np.any([s.nonfinite for s in seen], axis=0)
    again = jax.jit(lambda m, x: m(x))
    with jax.default_matmul_precision("highest"):
        found = red.forward_passes(
            lambda x: forward(model, x), lambda x: again(model, x), problem.x[rows], threat.bounds
        )
    found += [
        red.nonfinite_logits(int((~np.isfinite(clean).all(-1)).sum()), int(bad.sum()), n),
        red.label_mismatch(clean, problem.y),
        red.budget_unusable(threat, problem.x),
        red.probabilities(clean),
        red.input_range(problem.x, threat.bounds),
        red.zero_gradient([(s.row["name"], s.zero_gradient, s.rows) for s in attacks]),
        red.claims_refused([(s.row["name"], s.row["refused"], s.row["claimed"]) for s in attacks]),
        red.budget_unused(1.0, used[:, 0], survivors_left),
        red.few_examples(interval, n),
    ]
    noise = next((s.row for s in seen if s.row["name"] == "noise"), None)
    if noise is not None:
        found.append(red.weaker_than_noise(noise["broken"], noise["attacked"]))
    return sorted((f for f in found if f is not None), key=lambda f: red.SEVERITIES.index(f.severity))


def _examples(problem: Problem, kept: Ledger, predicted: np.ndarray) -> dict[str, list]:
    """The outcome table, by columns."""
    sizes = [None if by in (ROBUST, CERTIFIED) else float(f"{size:.9g}") for by, size in zip(kept.by, kept.size)]
    return {
        "index": problem.index.tolist(),
        "label": problem.y.tolist(),
        "clean": predicted.tolist(),
        "adversarial": np.where(np.isin(kept.by, (ROBUST, CERTIFIED)), predicted, kept.adversarial).tolist(),
        "by": kept.by.tolist(),
        "restart": kept.restart.tolist(),
        "size": sizes,
    }


def entry_of(
    work: Work, name: str, kept: Ledger, seen: Sequence[Seen], curve: list[dict], clean: np.ndarray,
    predicted: np.ndarray, rule: str | None, keep_adversarial: bool,
) -> ModelReport:  # fmt: skip
    """Put together what was found about the model.

    Args:
      work: what the passes shared.
      name: the model's name.
      kept: the outcomes at the threat's own budget.
      seen: what each attack showed there.
      curve: robust accuracy over budgets, or nothing.
      clean: `[n, k]` clean logits.
      predicted: int `[n]` clean predictions, -1 where logits are not finite.
      rule: of the targets, or None.
      keep_adversarial: keep the points.

    Returns:
      The entry of the report.
    """
    problem, threat, n = work.problem, work.base, len(work.problem.x)
    correct = int((predicted == problem.y).sum())
    clean_accuracy, clean_interval = share(correct, n)
    robust_accuracy, robust_interval = share(kept.held(), n)
    certified_accuracy, certified_interval = None, None
    if work.certificate is not None:
        certified_accuracy, certified_interval = share(len(kept.certified()), n)
    noise = seen[-1].row["name"] == "noise"
    targeted = None
    if rule is not None:
        targeted = {"rule": rule, "success_rate": len(kept.broken()) / max(correct, 1)}
    return ModelReport(
        name=name,
        n=n,
        clean_accuracy=clean_accuracy,
        clean_interval=clean_interval,
        robust_accuracy=robust_accuracy,
        robust_interval=robust_interval,
        certified_accuracy=certified_accuracy,
        certified_interval=certified_interval,
        threat={
            "norm": threat.norm,
            "eps": np.asarray(threat.eps).tolist(),
            "bounds": [np.asarray(b).tolist() for b in threat.bounds],
        },
        attacks=[s.row for s in seen],
        search={
            "slots": work.server.slots,
            "devices": work.server.devices,
            "dtype": work.searches[0][0],
            "retried": work.retried,
        },
        flags=_flags(problem, host(threat), clean, kept, seen, robust_interval),
        curve=curve,
        examples=_examples(problem, kept, predicted),
        targeted=targeted,
        diagnostics=None,
        statements=_statements(work, threat, curve, rule, noise),
        x_adv=kept.x if keep_adversarial else None,
    )


def diagnosed(diagnostics: Any, problem: Problem, threat: Threat, entry: ModelReport) -> ModelReport:
    """Add what the diagnosis of the evaluation itself says.

    Args:
      diagnostics: True for `diagnose`, or a function of its signature.
      problem: the examples.
      threat: the allowed set.
      entry: of the report.

    Returns:
      The entry with further flags and numbers.
    """
    if diagnostics is True:
        from jaxadv.evaluate.diagnostics import diagnose as diagnostics
    said = diagnostics(problem.key, problem.model, problem.x, problem.y, threat, index=problem.index)
    known = {flag.name for flag in entry.flags}
    flags = [*entry.flags, *(flag for flag in said.flags if flag.name not in known)]
    flags = sorted(flags, key=lambda f: red.SEVERITIES.index(f.severity))
    return dataclasses.replace(entry, flags=flags, diagnostics=dict(said.numbers))


def cost_of(work: Work, seen: Sequence[Seen]) -> dict[str, Any]:
    """Measure a gradient and a forward pass of a full board, and what each attack took beyond its own.

    Args:
      work: what the passes shared.
      seen: what each attack showed.

    Returns:
      Seconds of a gradient and of a forward pass of one row, and for each attack its time over that of its gradients
      and forward passes alone.
    """
    problem, size = work.problem, work.server.slots
    x = jnp.asarray(np.resize(problem.x, (size, *problem.x.shape[1:])))
    y = jnp.asarray(np.resize(problem.y, size))
    _, model = work.searches[0]

    def total(x, model):
        return jnp.sum(jnp.take_along_axis(model(x), y[:, None], axis=1))

    def once(fn):
        def timed():
            start = time.perf_counter()
            jax.block_until_ready(fn(x, model))
            return time.perf_counter() - start

        timed()
        return float(np.median([timed() for _ in range(5)])) / size

    t_grad, t_fwd = once(jax.jit(jax.value_and_grad(total))), once(jax.jit(lambda x, model: model(x)))
    factors = []
    for one in seen:
        floor = one.row["grads"] * t_grad + max(one.row["queries"] - one.row["grads"], 0) * t_fwd
        factors.append({"name": one.row["name"], "overhead": one.seconds / floor if floor else 0.0})
    return {"t_grad": t_grad, "t_fwd": t_fwd, "attacks": factors}
