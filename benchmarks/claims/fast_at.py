"""Claim: FGSM with a random start trains as well as PGD, at a fraction of the cost; without the start it collapses.

Two experiments on MNIST with `cnn_small`, linf. (1) The published recipe `fast_mnist` on the training images
(5,000 of them are held out and not looked at), and the same network trained without attacks, both under the
strong attack (PGD, many steps and restarts) on the whole test set. (2) On fewer training images, one optimizer
and schedule, three inner attacks: one step from a random start, one step from the clean point, and PGD; robust
accuracy and minutes side by side. The attack that judges is none of those trained on: it has more steps,
restarts, and keeps the best point.
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
        "train": 5_000,
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
    inner = {
        "random start": {},
        "no random start": {"objective": ja.train.pgd_at(ja.fgsm(threat, keep="last"))},
        "PGD": {"objective": ja.train.pgd_at(ja.pgd(threat, steps=settings["pgd_steps"], keep="last"))},
    }
    numbers: dict[str, list[float]] = {}

    def measure(name, recipe, data, n, seed, **changes):
        model, minutes = framework.train(recipe, data, seed, **common, **changes)
        subset = ja.data.evaluation_subset(test, n)
        restarts = settings["judge_restarts"]
        clean, robust = framework.accuracies(model, subset, threat, judge, seed, restarts=restarts)
        for what, value in (("clean %", clean), ("robust %", robust), ("training minutes", minutes)):
            numbers.setdefault(f"{name}: {what}", []).append(value)

    for seed in seeds:
        measure("recipe", ja.recipes.fast_mnist, whole, settings["test"], seed)
        measure("standard training", ja.recipes.standard_mnist, whole, settings["test"], seed)
        for name, changes in inner.items():
            measure(name, ja.recipes.fast_mnist, few, settings["test_side_by_side"], seed, **changes)
    return numbers


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: within 3 points of PGD at a third of its cost or less; without the start at least 30 points lost."""
    mean = {key: float(np.mean(values)) for key, values in numbers.items()}
    full = numbers["recipe: robust %"]
    gap = mean["PGD: robust %"] - mean["random start: robust %"]
    cost = mean["random start: training minutes"] / mean["PGD: training minutes"]
    lost = mean["random start: robust %"] - mean["no random start: robust %"]
    useful, level, cheap, collapsed = min(full) >= 50, gap <= 3, cost <= 1 / 3, lost >= 30
    word = "holds" if useful and level and cheap and collapsed else "does not hold here"
    if word != "holds" and useful and level and cheap:
        word = "holds in part"
    why = (
        f"recipe {np.mean(full):.1f} % robust (lowest seed {min(full):.1f}), standard training "
        f"{mean['standard training: robust %']:.1f} %; side by side {mean['random start: robust %']:.1f} % against "
        f"{mean['PGD: robust %']:.1f} % for PGD at {cost:.2f} of its training time, "
        f"{mean['no random start: robust %']:.1f} % without the random start"
    )
    return word, why
