"""Red flags: what makes the numbers of an evaluation doubtful, in plain words and with a remedy.

What lives here: the table `FLAGS` and the tests behind it, each a function that returns a `Flag` or None. What does
not: errors (impossible arguments are refused by `core.check`), and any influence on the numbers: a flag never changes
  an accuracy.

| severity | meaning |
| --- | --- |
| `error` | the numbers do not mean what they seem to mean |
| `warning` | the attack may have been blunted; the true robust accuracy may be lower |
| `note` | good to know when the numbers are quoted |
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

SEVERITIES = ("error", "warning", "note")


class Kind(NamedTuple):
    """A row of the table: how bad, what it means, what to do."""

    severity: str
    words: str
    remedy: str


FLAGS: dict[str, Kind] = {
    "nonfinite_logits": Kind(
        "error",
        "The model returned NaN or infinite logits. Such a point never counts as robust.",
        "Find where the forward pass overflows (divisions, logarithms, float16) and evaluate again.",
    ),
    "zero_gradient": Kind(
        "warning",
        "A gradient attack met gradients that are exactly zero, so it had nothing to follow.",
        "Attack with a margin loss, replace quantizers and other flat parts on the backward pass (BPDA), and add a "
        "black-box attack.",
    ),
    "probabilities": Kind(
        "warning",
        "The model returns probabilities: every row lies in [0, 1] and sums to one. Losses on them saturate and hide "
        "gradients.",
        "Return logits: leave the softmax out of the model.",
    ),
    "input_out_of_range": Kind(
        "warning",
        "The examples do not fill the range that the bounds promise, so the budget means something else than it seems "
        "to.",
        "Pass examples in the range of the bounds and put any normalization inside the model.",
    ),
    "label_mismatch": Kind(
        "error",
        "Labels and predictions do not fit: the model is not better than chance, or right only after renaming the "
        "classes.",
        "Check the order of the classes, labels that start at 1, and that this is the model's data set.",
    ),
    "budget_unusable": Kind(
        "error",
        "The budget is too small to change an input in float32, or so large that every input can be turned into plain "
        "gray.",
        "Give eps in the units of x (8/255 for images in [0, 1], not 8).",
    ),
    "budget_unused": Kind(
        "warning",
        "The perturbations stay far below the budget although examples survive: the attack did not use what it was "
        "allowed.",
        "Use larger steps or more of them, and check the units of eps and of the step size.",
    ),
    "attack_weaker_than_noise": Kind(
        "warning",
        "One draw of random noise broke examples that every attack had left standing.",
        "Use stronger attacks: more steps and restarts, another loss, a black-box attack.",
    ),
    "few_examples": Kind(
        "note",
        "The confidence interval is wide because there are few examples.",
        "Evaluate more examples: 1,000 give about plus or minus 3 points.",
    ),
    "batch_dependent": Kind(
        "error",
        "The logits of an example change with the examples beside it in the batch.",
        "Evaluate with running statistics (batch normalization in evaluation mode).",
    ),
    "randomized": Kind(
        "error",
        "Two forward passes on the same inputs gave different logits, so attack and verdict saw different models.",
        "Fix the randomness, or average over it and attack the average (expectation over transformation).",
    ),
    "claims_refused": Kind(
        "warning",
        "An attack claimed successes that did not hold when checked: points outside the budget or bounds, not finite, "
        "or classified "
        "correctly.",
        "Do not trust this attack's own numbers; give it the same threat as the evaluation. The report counts "
        "verified points only.",
    ),
    "saturated_loss": Kind(
        "warning",
        "The gradient of the cross-entropy is exactly zero where that of the margin is not: the logits are so large "
        "that their softmax is one and zero.",
        "Attack with the margin or DLR loss, or divide the logits by a constant; the predictions stay the same.",
    ),
    "gradient_mismatch": Kind(
        "warning",
        "What the gradient promises does not happen: along it the margin changes by another amount, or in the other "
        "direction.",
        "Look for custom derivatives, quantizers with straight-through gradients and parts that are cut off; add "
        "attacks that need no gradient.",
    ),
    "unstable_predictions": Kind(
        "warning",
        "The logits jump within a neighborhood far smaller than the budget, as if they were random.",
        "Average gradients over a neighborhood (smoothing) or over the defense's randomness (expectation over "
        "transformation), and add attacks that need no gradient.",
    ),
    "rough_landscape": Kind(
        "warning",
        "Along straight lines through the budget the margin goes up and down many times: gradients point nowhere.",
        "Replace the shattering part by a smooth one on the backward pass (BPDA), or attack with smoothed gradients.",
    ),
    "larger_budget_safer": Kind(
        "warning",
        "A larger budget broke fewer examples, which is impossible for attacks that work: a larger set holds the "
        "smaller.",
        "Use more steps and restarts, and step sizes that grow with the budget.",
    ),
    "unbounded_attack_fails": Kind(
        "warning",
        "With no limit but the bounds the attack still left examples standing, although any input is allowed.",
        "The gradients are masked or the attack is broken: change the loss, look for flat and cut-off parts, use "
        "attacks that need no gradient.",
    ),
    "single_step_stronger": Kind(
        "warning",
        "One step broke more examples than many.",
        "The steps follow a misleading gradient: check step size and loss, and add restarts and black-box attacks.",
    ),
    "black_box_stronger": Kind(
        "warning",
        "An attack without gradients broke more examples than the one with gradients, which knows more.",
        "The gradients are masked: adapt the attack to the defense (other loss, BPDA, expectation over "
        "transformation), and run black-box attacks with many queries.",
    ),
    "transfer_stronger": Kind(
        "warning",
        "Points made for another model broke more examples than points made for this one.",
        "The gradients of this model are masked: attack the surrogate and carry the points over, and adapt the attack.",
    ),
    "more_steps_help": Kind(
        "warning",
        "The attack had not finished: several times the steps broke more examples.",
        "Raise the number of steps until the accuracy stays the same.",
    ),
    "step_size_matters": Kind(
        "warning",
        "Another step size broke more examples than the one in use.",
        "Use the best step size of the sweep, or an attack that adapts it (APGD).",
    ),
    "silent_success": Kind(
        "warning",
        "The attack passed through failing points and returned another one, so successes were lost.",
        'Return the best point seen instead of the last one (keep="best").',
    ),
    "test_time_optimization": Kind(
        "warning",
        "The forward pass differentiates: the model optimizes something for each input before it answers.",
        "Differentiate through all its steps, attack the static model and carry the points over, and add black-box "
        "attacks.",
    ),
    "few_classes": Kind(
        "note",
        "There are too few classes for a part of the usual attacks: DLR needs three, its targeted form four.",
        "Use the margin loss in their place, and say so beside the number.",
    ),
}
"""Flags by name; each has a test with a planted defect."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """A raised flag.

    Attributes:
      name: a key of `FLAGS`.
      severity: `error`, `warning` or `note`.
      value: what was measured.
      threshold: the value beyond which the flag is raised.
      detail: what was found, with numbers.
      words: what it means.
      remedy: what to do.
    """

    name: str
    severity: str
    value: float
    threshold: float
    detail: str
    words: str
    remedy: str

    @staticmethod
    def from_dict(tree: Any) -> "Flag":
        """Read a flag from its JSON form.

        Args:
          tree: the object.

        Returns:
          The flag.

        Raises:
          ValueError: if keys or severity are wrong.
        """
        names = {f.name for f in dataclasses.fields(Flag)}
        if not isinstance(tree, dict) or set(tree) != names or tree["severity"] not in SEVERITIES:
            raise ValueError(
                f"a flag must have the keys {sorted(names)} and a severity of {SEVERITIES}; got {tree!r:.200}."
            )
        return Flag(**tree)


def flag(name: str, value: float, threshold: float, detail: str) -> Flag:
    """Raise a flag of the table.

    Args:
      name: a key of `FLAGS`.
      value: what was measured; a value that is not finite is stored as the threshold.
      threshold: the value beyond which it is raised.
      detail: what was found.

    Returns:
      The flag with its severity, words and remedy.
    """
    value = float(value) if np.isfinite(value) else float(threshold)
    return Flag(name, value=value, threshold=float(threshold), detail=detail, **FLAGS[name]._asdict())


def nonfinite_logits(clean: int, attacked: int, n: int) -> Flag | None:
    """Tell of logits that are NaN or infinite.

    Args:
      clean: number of examples whose clean logits are not finite.
      attacked: number of examples for which an attack met such logits.
      n: number of examples.

    Returns:
      A flag, or None.
    """
    if not clean and not attacked:
        return None
    return flag(
        "nonfinite_logits", max(clean, attacked) / n, 0.0, f"{clean} of {n} examples clean, {attacked} under attack."
    )


def zero_gradient(counts: Sequence[tuple[str, int, int]], threshold: float = 0.01) -> Flag | None:
    """Tell of gradients that are exactly zero.

    Args:
      counts: for each attack `(name, rows that met a zero gradient, rows attacked)`.
      threshold: share of rows above which to tell.

    Returns:
      A flag about the worst attack, or None.
    """
    shares = [(zero / rows, name, zero, rows) for name, zero, rows in counts if rows]
    worst = max(shares, default=(0.0, "", 0, 0))
    if worst[0] <= threshold:
        return None
    return flag("zero_gradient", worst[0], threshold, f"{worst[1]}: {worst[2]} of {worst[3]} attacked examples.")


def probabilities(logits: np.ndarray, slack: float = 1e-4) -> Flag | None:
    """Tell of a model that returns probabilities.

    Args:
      logits: `[n, k]` clean outputs.
      slack: how far sums and values may be off.

    Returns:
      A flag, or None.
    """
    rows = logits[np.isfinite(logits).all(-1)].astype(np.float64)
    if not rows.size:
        return None
    off = max(float(np.abs(rows.sum(-1) - 1).max()), float(-rows.min()), float(rows.max() - 1))
    if off > slack:
        return None
    return flag("probabilities", off, slack, f"All {len(rows)} rows sum to one within {off:.1g}.")


def input_range(x: np.ndarray, bounds: tuple[Any, Any], threshold: float = 0.1) -> Flag | None:
    """Tell of examples that do not fill their bounds, or that look standardized.

    Args:
      x: `[n, ...]` examples inside the bounds.
      bounds: lowest and highest value.
      threshold: share of the range that must be used.

    Returns:
      A flag, or None.
    """
    low, high = (np.asarray(b, np.float64) for b in bounds)
    found = f"values from {x.min():.4g} to {x.max():.4g} in bounds [{low.min():g}, {high.max():g}]"
    used = float((np.max(x.reshape(len(x), -1).max(0) - x.reshape(len(x), -1).min(0))) / np.max(high - low))
    if len(x) > 1 and used < threshold:
        return flag(
            "input_out_of_range",
            used,
            threshold,
            f"Only {used:.2%} of the range is used: {found}. Divided by 255 twice?",
        )
    mean, spread = float(x.mean(dtype=np.float64)), float(x.std(dtype=np.float64))
    if x.min() < -0.3 and abs(mean) < 0.25 and abs(spread - 1) < 0.25 and float(np.max(high - low)) > 2:
        detail = f"Mean {mean:.2g} and deviation {spread:.2g} look standardized ({found}): eps counts deviations."
        return flag("input_out_of_range", abs(spread - 1), 0.25, detail)
    return None


def label_mismatch(logits: np.ndarray, y: np.ndarray) -> Flag | None:
    """Tell of labels that do not fit the predictions.

    Args:
      logits: `[n, k]` clean logits.
      y: int `[n]` labels in [0, k).

    Returns:
      A flag if accuracy is at most chance (with 10 or more examples), or if a renaming of the classes lifts it from
      below one half to above 0.7 (with at least four examples for each class).
    """
    from scipy.optimize import linear_sum_assignment

    n, k = logits.shape
    predicted = np.where(np.isfinite(logits).all(-1), logits.argmax(-1), -1)
    plain = float(np.mean(predicted == y))
    if n >= 4 * k and plain < 0.5:
        shifts = {s: float(np.mean(predicted == (y + s) % k)) for s in (1, -1)} if k > 2 else {}
        shift = max(shifts, key=lambda s: shifts[s], default=0)
        if shifts and shifts[shift] > max(0.7, plain + 0.3):
            detail = f"Accuracy {plain:.3f}, but {shifts[shift]:.3f} after adding {shift} to every label."
            return flag("label_mismatch", shifts[shift], 0.7, detail)
        table = np.zeros((k, k), int)
        np.add.at(table, (y[predicted >= 0], predicted[predicted >= 0]), 1)
        best = float(table[linear_sum_assignment(-table)].sum() / n)
        if best > max(0.7, plain + 0.3):
            detail = f"Accuracy {plain:.3f}, but {best:.3f} after the best renaming of the classes."
            return flag("label_mismatch", best, 0.7, detail)
    if n >= 10 and plain <= 1 / k:
        return flag("label_mismatch", plain, 1 / k, f"Clean accuracy {plain:.3f} is not above chance ({1 / k:.3f}).")
    return None


def budget_unusable(threat: Any, x: np.ndarray) -> Flag | None:
    """Tell of a budget below the resolution of float32, or one within which plain gray lies.

    Args:
      threat: with numbers or numpy arrays as `eps` and `bounds`.
      x: float32 `[n, ...]` examples.

    Returns:
      A flag, or None.
    """
    eps = np.asarray(threat.eps, np.float64)
    if threat.norm in ("linf", "l2", "l1"):
        step = eps.astype(np.float32).reshape(eps.shape + (1,) * (x.ndim - eps.ndim) if eps.ndim else ())
        stuck = float(np.mean((x + step == x) & (x - step == x)))
        if stuck > 0.5:
            return flag(
                "budget_unusable",
                stuck,
                0.5,
                f"eps {eps.max():.3g} is below the float32 resolution of {stuck:.0%} of values.",
            )
    low, high = (np.broadcast_to(np.asarray(b, np.float64), x.shape[1:]) for b in threat.bounds)
    gray = np.broadcast_to((low + high) / 2, x.shape)
    reach = float(np.mean(threat.size(gray, x.astype(np.float64)) <= eps))
    if reach > 0.5:
        return flag(
            "budget_unusable",
            reach,
            0.5,
            f"Within eps {eps.max():.3g} plain gray is allowed for {reach:.0%} of the examples.",
        )
    return None


def budget_unused(eps: Any, sizes: np.ndarray, survivors: int, threshold: float = 0.5, least: int = 5) -> Flag | None:
    """Tell of perturbations far below the budget although examples survive.

    Args:
      eps: the budget, a number or `[m]`.
      sizes: `[m]` sizes of what the attacks returned: the successful perturbations, or all of them where none
        succeeded.
      survivors: number of examples that no attack broke.
      threshold: share of the budget.
      least: with fewer sizes nothing is said.

    Returns:
      A flag, or None.
    """
    if not survivors or len(sizes) < least:
        return None
    used = float(np.max(sizes / np.asarray(eps, np.float64)))
    if not used <= threshold:
        return None
    return flag(
        "budget_unused",
        used,
        threshold,
        f"The largest perturbation used {used:.1%} of the budget; {survivors} examples survive.",
    )


def weaker_than_noise(broken: int, survivors: int) -> Flag | None:
    """Tell of survivors of all attacks that random noise breaks.

    Args:
      broken: how many survivors the noise broke.
      survivors: how many it was tried on.

    Returns:
      A flag, or None.
    """
    if not broken:
        return None
    detail = f"{broken} of {survivors} survivors; they count as broken."
    return flag("attack_weaker_than_noise", broken / survivors, 0.0, detail)


def few_examples(interval: tuple[float, float], n: int, threshold: float = 0.1) -> Flag | None:
    """Tell of a wide interval.

    Args:
      interval: of the robust accuracy.
      n: number of examples.
      threshold: largest width without a note.

    Returns:
      A flag, or None.
    """
    width = interval[1] - interval[0]
    if width <= threshold:
        return None
    return flag("few_examples", width, threshold, f"{n} examples: the interval is {100 * width:.0f} points wide.")


def claims_refused(counts: Sequence[tuple[str, int, int]]) -> Flag | None:
    """Tell of successes that were claimed but not confirmed.

    Args:
      counts: for each attack `(name, claims refused, claims made)`.

    Returns:
      A flag, or None.
    """
    refused = [(name, no, made) for name, no, made in counts if no]
    if not refused:
        return None
    share = max(no / made for _, no, made in refused)
    return flag(
        "claims_refused", share, 0.0, "; ".join(f"{name}: {no} of {made} claims" for name, no, made in refused) + "."
    )


def forward_passes(
    forward: Callable, again: Callable, x: np.ndarray, bounds: tuple[Any, Any], threshold: float = 1e-3
) -> list[Flag]:
    """Ask the model several times about the same examples: beside themselves, beside others, and traced anew.

    Args:
      forward: compiled, logits `[m, k]` from `[m, ...]`.
      again: the same function compiled anew, so that randomness drawn while tracing shows.
      x: `[m, ...]` a few examples.
      bounds: lowest and highest value; the companions are the mirrored examples `low + high - x`.
      threshold: difference of logits, as a share of their spread, above which to tell.

    Returns:
      The flags `randomized` or `batch_dependent`, or none.
    """

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        scale = max(float(np.nanmax(np.abs(first))), 1e-30) if np.isfinite(first).any() else 1.0
        both = np.isfinite(a) & np.isfinite(b)
        return float(np.max(np.abs(a - b)[both], initial=0.0) / scale)

    first = np.asarray(forward(x))
    repeat = max(apart(first, np.asarray(forward(x))), apart(first, np.asarray(again(x))))
    if repeat > threshold:
        return [flag("randomized", repeat, threshold, f"Logits moved by {repeat:.2g} of their size.")]
    low, high = (np.asarray(b, x.dtype) for b in bounds)
    half = (len(x) + 1) // 2
    mirrored = (low + high - x).astype(x.dtype)
    one = np.concatenate([x[:half], x[half:]])
    two = np.concatenate([x[:half], mirrored[half:]])
    moved = apart(np.asarray(forward(one))[:half], np.asarray(forward(two))[:half])
    if moved > threshold:
        return [
            flag(
                "batch_dependent", moved, threshold, f"Logits moved by {moved:.2g} of their size with other companions."
            )
        ]
    return []
