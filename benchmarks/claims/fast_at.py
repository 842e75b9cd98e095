"""Claim: FGSM with a random start trains as well as PGD, at a fraction of the cost; without the start it collapses.

Two experiments on MNIST with `cnn_small`, linf. (1) On the training images (5,000 of them are held out and not looked
at): the authors' setting (one step, their schedule), our recipe `fast_mnist` (five steps, a budget that grows), and the
same network trained without attacks, all under the strong attack (PGD, many steps and restarts) on the whole test
set. (2) On fewer training images, one optimizer, schedule and growth of the budget, three inner attacks: one step from
a random start, one step from the clean point, and PGD; robust accuracy and processor time side by side. The attack that
judges is none of those trained on: it has more steps, restarts, and keeps the best point.
"""

from typing import Any

import numpy as np

import jaxadv as ja
from benchmarks.claims import framework

CLAIM = {
    "sentence": "Adversarial training with one gradient step from a random start is as robust as PGD training at a "
    "fraction of its cost; without the random start it collapses.",
    "source": "Wong, Rice and Kolter 2020, Fast is better than free, arXiv:2001.03994",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 20,
    "settings": {
        "data": "mnist",
        "eps": 0.3,
        "train": 10_000,
        "epochs": 30,
        "pgd_steps": 10,
        "test": 10_000,
        "test_side_by_side": 1_000,
        "judge_steps": 50,
        "judge_step_size": 0.01,
        "judge_restarts": 10,
    },
    "smoke": {
        "data": "digits",
        "train": 100,
        "epochs": 1,
        "pgd_steps": 1,
        "test": 20,
        "test_side_by_side": 20,
        "judge_steps": 1,
        "judge_restarts": 1,
    },
}


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train and judge; percent of the test images, and minutes of training."""
    threat = ja.linf(settings["eps"])
    whole, held, test = (ja.data.load(settings["data"], split) for split in ("train", "validation", "test"))
    few = ja.data.evaluation_subset(whole, settings["train"])
    judge = ja.pgd(threat, steps=settings["judge_steps"], step_size=settings["judge_step_size"])
    common = {"eps": settings["eps"], "validation": held} | ({"steps": 1} if smoke else {})
    steps = settings["epochs"] * ja.data.steps_per_epoch(len(few), 100)
    growth = ja.train.schedules.growth(max(1, steps // 5))
    clean_start = ja.train.pgd_at(ja.fgsm(threat, keep="last"), growth=growth)
    inner = {
        "random start": {"attack_steps": 1},
        "no random start": {"objective": clean_start},
        "PGD": {"attack_steps": settings["pgd_steps"]},
    }
    numbers: dict[str, list[float]] = {}

    def measure(name, recipe, data, n, seed, **changes):
        found = framework.train(recipe, data, seed, **(changes | common))
        subset = ja.data.evaluation_subset(test, n)
        restarts = settings["judge_restarts"]
        clean, robust = framework.accuracies(found.model, subset, threat, judge, seed, restarts=restarts)
        costs = (("training minutes", found.minutes), ("processor minutes", found.processor_minutes))
        for what, value in (("clean %", clean), ("robust %", robust), *costs):
            numbers.setdefault(f"{name}: {what}", []).append(value)

    published = {"attack_steps": 1, "growth": 0, "lr_max": 5e-3}
    for seed in seeds:
        measure("recipe", ja.recipes.fast_mnist, whole, settings["test"], seed)
        measure("as published", ja.recipes.fast_mnist, whole, settings["test"], seed, **published)
        measure("standard training", ja.recipes.standard_mnist, whole, settings["test"], seed)
        for name, changes in inner.items():
            size = {"epochs": settings["epochs"]}
            measure(name, ja.recipes.fast_mnist, few, settings["test_side_by_side"], seed, **changes, **size)
    return numbers


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: within 3 points of PGD at a third of its cost or less; without the start at least 30 points lost."""
    mean = {key: float(np.mean(values)) for key, values in numbers.items()}
    full = numbers["as published: robust %"]
    gap = mean["PGD: robust %"] - mean["random start: robust %"]
    cost = mean["random start: processor minutes"] / mean["PGD: processor minutes"]
    lost = mean["random start: robust %"] - mean["no random start: robust %"]
    useful, level, cheap, collapsed = min(full) >= 50, gap <= 3, cost <= 1 / 3, lost >= 30
    word = "holds" if useful and level and cheap and collapsed else "does not hold here"
    if word != "holds" and useful and level and cheap:
        word = "holds in part"

    def seeds(name):
        values = numbers[f"{name}: robust %"]
        return f"{np.mean(values):.1f} % ({', '.join(f'{v:.1f}' for v in values)})"

    why = (
        f"robust, mean and seeds: as published {seeds('as published')}, our recipe of five steps {seeds('recipe')}, "
        f"standard training {seeds('standard training')}; side by side {seeds('random start')} against {seeds('PGD')} "
        f"for PGD at {cost:.2f} of its processor time, {seeds('no random start')} without the random start"
    )
    return word, why
