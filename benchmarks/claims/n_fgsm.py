"""Claim: noise that is not cut back holds off the collapse of single-step training, at the cost of a single step.

MNIST, `cnn_small`, linf at a budget where FGSM from the clean point collapses. Five arms (see `arms`): that FGSM, FGSM
from a random start, GradAlign, PGD as the level to reach, and N-FGSM. An arm has collapsed with a seed where AutoAttack
leaves it less than half of what it leaves PGD's network in the mean. Refuted if N-FGSM collapses, too; void if FGSM
does not.
"""

from typing import Any

import jaxadv as ja
from benchmarks.claims import arms

CLAIM = {
    "sentence": "Single-step training from strong noise that is not projected back to the budget does not collapse at "
    "large budgets, where FGSM training does, and costs no more than that.",
    "source": "de Jorge et al. 2022, Make some noise: reliable and efficient single-step adversarial training, "
    "arXiv:2202.01181",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 12,
    "settings": arms.SETTINGS | {"noise": 2.0, "alignment": 0.2},
    "smoke": arms.SMOKE,
}
ARMS = ("FGSM", "random start", "GradAlign", "PGD", "N-FGSM")


def _arms(shared: arms.Setup) -> dict[str, dict[str, Any]]:
    threat = shared.threat
    growth: dict[str, Any] = {"growth": shared.growth}
    made = (
        ja.train.fgsm_at(threat, **growth),
        ja.train.fgsm_rs(threat, start="unclipped", **growth),
        ja.train.grad_align(threat, weight=shared.settings["alignment"], **growth),
        ja.train.pgd_at(shared.inner, **growth),
        ja.train.n_fgsm(threat, noise=shared.settings["noise"], **growth),
    )
    return {arm: {"objective": objective} for arm, objective in zip(ARMS, made)}


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train and judge; percent of the test images, and minutes of training."""
    return arms.run(settings, seeds, smoke, _arms)


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: FGSM collapses, N-FGSM gains on it clear of zero; with no seed lost, at 1.25 times the cost or less."""
    half = arms.mean(numbers, "PGD", arms.AUTO) / 2
    collapsed = {arm: sum(v < half for v in numbers[f"{arm}: {arms.AUTO}"]) for arm in ARMS if arm != "PGD"}
    gain = arms.gain(numbers, "N-FGSM", "FGSM")
    cost = {arm: arms.mean(numbers, arm, arms.COST) / arms.mean(numbers, "FGSM", arms.COST) for arm in ARMS}
    seeds = len(numbers[f"PGD: {arms.AUTO}"])
    main = arms.learned(numbers) and collapsed["FGSM"] == seeds and gain[1] > 0
    return arms.word(main, collapsed["N-FGSM"] == 0, cost["N-FGSM"] <= 1.25), (
        arms.told(numbers, ARMS, arms.CLEAN, arms.AUTO)
        + f"; seeds of {seeds} that collapse: "
        + ", ".join(f"{arm} {count}" for arm, count in collapsed.items())
        + f"; N-FGSM over FGSM {arms.signed(gain)}; cost by that of FGSM: "
        + ", ".join(f"{arm} {value:.2f}" for arm, value in cost.items() if arm != "FGSM")
    )
