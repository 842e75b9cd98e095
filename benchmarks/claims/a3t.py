"""Claim: examples that are misclassified already should not be made harder; then less robustness is memorized.

MNIST, `cnn_small`, linf, few training images and many epochs, so that PGD training overfits. Arms (see `arms`), all
with a search of equal length from a random start: PGD training (the reduced objective: each example is driven from its
label) and three readings of what happens to a misclassified one: left as it is, moved toward its label, or driven from
the class that it was taken for. The last is the default of `train.a3t`. The gap is between training and test images
under one PGD. Refuted if that gap is not narrower than PGD training's.
"""

from typing import Any

import jaxadv as ja
from benchmarks.claims import arms

CLAIM = {
    "sentence": "Adversarial training that does not drive misclassified examples further from their label has a "
    "smaller gap between robust accuracy on training and on test images than PGD training.",
    "source": "Altinisik et al. 2023, A3T: accuracy aware adversarial training, arXiv:2211.16316",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 11,
    "settings": arms.SETTINGS | {"train": 1_000, "epochs": 100},
    "smoke": arms.SMOKE,
}
MODES = {"left": "clean", "toward": "toward_label", "from prediction": "from_prediction"}
ARMS = ("PGD", *MODES)


def _arms(shared: arms.Setup) -> dict[str, dict[str, Any]]:
    steps, growth = shared.settings["steps"], shared.growth
    made: dict[str, Any] = {"PGD": ja.train.pgd_at(shared.inner, bn_attack="local", growth=growth)}
    made |= {arm: ja.train.a3t(shared.threat, mode=mode, steps=steps, growth=growth) for arm, mode in MODES.items()}
    return {arm: {"objective": objective} for arm, objective in made.items()}


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train and judge; percent of the test images, and of the training images."""
    return arms.run(settings, seeds, smoke, _arms, arms.overfitting)


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge the default reading: a narrower gap, clear of zero; at most a point of robust accuracy lost."""
    gaps = {arm: arms.gain(numbers, "PGD", arm, arms.GAP) for arm in MODES}
    robust = {arm: arms.gain(numbers, arm, "PGD") for arm in MODES}
    return arms.word(arms.learned(numbers) and gaps[ARMS[-1]][1] > 0, robust[ARMS[-1]][0] >= -1), (
        arms.told(numbers, ARMS, arms.CLEAN, arms.AUTO, arms.TRAINING, arms.GAP)
        + "; narrower by: "
        + ", ".join(f"{arm} {arms.signed(gap)}" for arm, gap in gaps.items())
        + "; robust accuracy over PGD: "
        + ", ".join(f"{arm} {arms.signed(gain)}" for arm, gain in robust.items())
    )
