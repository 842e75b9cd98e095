"""Arms of one training, judged alike: what the claims about training objectives share. No claim itself.

Every arm is trained by `recipes.fast_mnist` from the same first weights, on the same examples in the same order, with
one optimizer, schedule, growth of the budget and number of steps; an arm is what it changes of that, mostly the
objective. All are judged on the same test images by PGD, which is the attack of the papers, and by AutoAttack: the
protocol `fast` (see `evaluate.PROTOCOLS`), or `standard` where a claim says so. The last arm is the method that the
claim is about; a smoke run takes that alone. Training is measured in minutes of the processors, with compilation.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxadv as ja
from benchmarks.claims import framework

SETTINGS: dict[str, Any] = {
    "data": "mnist",
    "network": {"name": "cnn_small"},
    "eps": 0.3,
    "train": 5_000,
    "epochs": 20,
    "steps": 10,
    "test": 500,
    "judge": "fast",
    "judge_steps": 20,
}
"""Settings of a claim of this kind: `steps` are those of the inner PGD, `judge_steps` those of the PGD that judges."""
SMOKE: dict[str, Any] = {
    "data": "digits",
    "network": {"name": "mlp", "widths": ()},
    "train": 100,
    "epochs": 1,
    "steps": 1,
    "test": 10,
    "judge_steps": 1,
}
"""What a smoke run changes: the same for all claims of this kind, so that they share compiled programs."""
CLEAN, PGD, AUTO, COST = "clean %", "PGD, robust %", "AutoAttack, robust %", "processor minutes"
TRAINING, GAP = "training images, PGD, robust %", "robust gap, points"


class Setup(NamedTuple):
    """What all arms of a claim are trained and judged with."""

    settings: dict[str, Any]
    data: Any
    held: Any
    test: Any
    threat: Any
    steps: int
    smoke: bool

    def network(self, seed: int, **options: Any) -> Any:
        """The untrained network of a seed, of the settings' kind unless another `name` and options are given."""
        options = options or self.settings["network"]
        return ja.models.create(
            key=jax.random.key(1000 + seed), shape=self.data.shape, classes=self.data.classes, **options
        )

    @property
    def growth(self) -> Callable:
        """The budget rises over the first fifth of the steps."""
        return ja.train.schedules.growth(max(1, self.steps // 5))

    @property
    def inner(self) -> Any:
        """The search that training runs on: PGD from a random start."""
        return ja.pgd(self.threat, steps=self.settings["steps"], keep="last")

    @property
    def judge(self) -> Any:
        """The PGD that judges."""
        return ja.pgd(self.threat, steps=self.settings["judge_steps"])


def setup(settings: dict[str, Any], smoke: bool) -> Setup:
    """Load the data and size the run.

    Args:
      settings: of the claim, with those of `SETTINGS`.
      smoke: one step.

    Returns:
      What the arms share.
    """
    whole, held, test = (ja.data.load(settings["data"], split) for split in ("train", "validation", "test"))
    data = ja.data.evaluation_subset(whole, settings["train"])
    steps = 1 if smoke else settings["epochs"] * ja.data.steps_per_epoch(len(data), 100)
    test = ja.data.evaluation_subset(test, settings["test"])
    return Setup(settings, data, held, test, ja.linf(settings["eps"]), steps, smoke)


def reports(shared: Setup, made: framework.Trained, seed: int) -> tuple[Any, Any]:
    """Judge a network by PGD and by AutoAttack on the test images.

    Args:
      shared: of the claim.
      made: the network.
      seed: of the attacks.

    Returns:
      What both found (`framework.judged`); in a smoke run PGD stands for both.
    """
    weak = framework.judged(made.model, shared.test, shared.threat, shared.judge, seed)
    if shared.smoke:
        return weak, weak
    return weak, framework.judged(made.model, shared.test, shared.threat, shared.settings["judge"], seed)


def measured(weak: Any, strong: Any, made: framework.Trained) -> dict[str, float]:
    """Return what every claim of this kind reports: percent of the test images, and minutes.

    Args:
      weak: what PGD found.
      strong: what AutoAttack found.
      made: the network.

    Returns:
      Measure to its value.
    """
    robust = {PGD: 100 * weak.robust_accuracy, AUTO: 100 * strong.robust_accuracy}
    return {CLEAN: 100 * weak.clean_accuracy} | robust | {COST: made.processor_minutes}


def judged(shared: Setup, made: framework.Trained, seed: int) -> dict[str, float]:
    """Judge a network by PGD and by AutoAttack.

    Args:
      shared: of the claim.
      made: the network.
      seed: of the attacks.

    Returns:
      Measure to its value.
    """
    return measured(*reports(shared, made, seed), made)


def overfitting(shared: Setup, made: framework.Trained, seed: int) -> dict[str, float]:
    """Judge as `judged`, and the training images as well: how much of the robustness is not carried over.

    Args:
      shared: of the claim.
      made: the network.
      seed: of the attacks.

    Returns:
      Measure to its value.
    """
    found = judged(shared, made, seed)
    seen = shared.data.subset(slice(0, len(shared.test)))
    known = framework.accuracies(made.model, seen, shared.threat, shared.judge, seed)[1]
    return found | {TRAINING: known, GAP: known - found[PGD]}


def run(
    settings: dict[str, Any],
    seeds: tuple[int, ...],
    smoke: bool,
    arms: Callable[[Setup], dict[str, dict[str, Any]]],
    judge: Callable[[Setup, framework.Trained, int], dict[str, float]] = judged,
) -> dict[str, list[float]]:
    """Train every arm with every seed, and judge it.

    Args:
      settings: of the claim.
      seeds: of weights, order and attacks.
      smoke: one step of the last arm.
      arms: what is shared -> name of an arm to what it changes: arguments of `fit`, and `network`, the name and options
        of another network than that of the settings.
      judge: `(shared, network, seed) -> {measure: value}`.

    Returns:
      `ARM: MEASURE` to one number for each seed.
    """
    shared = setup(settings, smoke)
    all_arms = arms(shared)
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        for arm, changes in list(all_arms.items())[-1 if smoke else 0 :]:
            net = shared.network(seed, **changes.get("network", {}))
            more = {key: value for key, value in changes.items() if key != "network"}
            common = {"eps": settings["eps"], "validation": shared.held, "steps": shared.steps, "trainable": net}
            made = framework.train(ja.recipes.fast_mnist, shared.data, seed, **common, **more)
            for what, value in judge(shared, made, seed).items():
                numbers.setdefault(f"{arm}: {what}", []).append(value)
    return framework.filled(numbers, all_arms)


def mean(numbers: dict[str, list[float]], arm: str, what: str) -> float:
    """Return the mean of a measure of an arm over the seeds."""
    return float(np.mean(numbers[f"{arm}: {what}"]))


def gain(numbers: dict[str, list[float]], better: str, base: str, what: str = AUTO) -> tuple[float, float, float]:
    """Return by how much an arm exceeds another, seed by seed: mean and ends of the 95 % interval."""
    return framework.gain(numbers, f"{better}: {what}", f"{base}: {what}")


def learned(numbers: dict[str, list[float]]) -> bool:
    """Return whether the arm named PGD learned at all: AutoAttack leaves it at least 30 % in the mean.

    Where even PGD training fails, an experiment says nothing about what is compared with it.
    """
    return mean(numbers, "PGD", AUTO) >= 30


def word(main: bool, *sides: bool) -> str:
    """Return the verdict: on the sentence itself, and on what goes with it.

    Args:
      main: what the paper gains is there.
      *sides: what it is to be had for.

    Returns:
      `holds` if all are true, `holds in part` if a side fails, `does not hold here` without the gain.
    """
    return "does not hold here" if not main else "holds" if all(sides) else "holds in part"


def told(numbers: dict[str, list[float]], arms: Iterable[str], *measures: str) -> str:
    """Return the means of measures for all arms, in words."""
    arms = list(arms)
    parts = (
        f"{what.removesuffix(' %').removesuffix(',')} " + ", ".join(f"{mean(numbers, arm, what):.1f}" for arm in arms)
        for what in measures
    )
    return f"percent for {', '.join(arms)}: " + "; ".join(parts)


def signed(found: tuple[float, float, float]) -> str:
    """Return a gain with its interval, in points."""
    return f"{found[0]:+.1f} ({found[1]:+.1f} to {found[2]:+.1f})"
