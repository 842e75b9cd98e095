"""Claim: a divergence that counts where the clean example is misclassified makes adversarial training more robust.

MNIST, `cnn_small`, linf. Arms (see `arms`), all with a search of equal length: PGD training; the boosted cross-entropy
alone (the divergence's weight at zero); the same divergence for all examples, at the paper's weight and at a small one;
and MART. The paper judges by PGD with the cross-entropy, which MART's loss is known to mislead: AutoAttack decides.
"""

from functools import partial
from typing import Any

import jaxadv as ja
from benchmarks.claims import arms
from jaxadv.train import objectives, regularized

CLAIM = {
    "sentence": "Weighing the divergence between predictions for clean and attacked examples by the probability of "
    "misclassifying the clean one makes adversarial training more robust.",
    "source": "Wang et al. 2020, Improving adversarial robustness requires revisiting misclassified examples, ICLR, "
    "openreview rklOg6EFwS (not on arXiv)",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 14,
    "settings": arms.SETTINGS | {"weight": 5.0, "small": 0.5},
    "smoke": arms.SMOKE,
}
ARMS = ("PGD", "boosted alone", "all examples", "all examples, small weight", "MART")


def _alike(logits, batch, *, weight):
    """MART's loss without its weighing of examples."""
    clean, robust = logits["clean"], logits["robust"]
    return regularized.mart_loss(clean, robust, batch["y"], weight=0.0) + weight * ja.losses.kl(clean, robust)


def _arms(shared: arms.Setup) -> dict[str, dict[str, Any]]:
    growth: dict[str, Any] = {"growth": shared.growth}
    search = regularized.near(shared.threat, steps=shared.settings["steps"], step_size=None, spread=0.001, name="mart")
    weight, small = shared.settings["weight"], shared.settings["small"]
    made: tuple[Any, ...] = (
        ja.train.pgd_at(shared.inner, **growth),
        ja.train.mart(shared.threat, weight=0.0, attack=search, **growth),
        *(objectives.adversarial(search, partial(_alike, weight=w), **growth) for w in (weight, small)),
        ja.train.mart(shared.threat, weight=weight, attack=search, **growth),
    )
    return {arm: {"objective": objective} for arm, objective in zip(ARMS, made, strict=True)}


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train and judge; percent of the test images."""
    return arms.run(settings, seeds, smoke, _arms)


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge under AutoAttack: over PGD clear of zero; over the best of the others without the weighing, too."""
    best = max(ARMS[1:-1], key=lambda arm: arms.mean(numbers, arm, arms.AUTO))
    over, weighing = arms.gain(numbers, "MART", "PGD"), arms.gain(numbers, "MART", best)
    return arms.word(arms.learned(numbers) and over[1] > 0, weighing[1] > 0), (
        arms.told(numbers, ARMS, arms.CLEAN, arms.PGD, arms.AUTO)
        + f"; MART over PGD {arms.signed(over)} points under AutoAttack, over the best arm without the weighing "
        f"({best}) {arms.signed(weighing)}"
    )
