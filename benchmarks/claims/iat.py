"""Claim: adversarial training on mixed examples regains clean accuracy without a loss of robust accuracy.

MNIST, `cnn_small`, linf, few training images, where adversarial training costs clean accuracy. Arms (see `arms`), all
but the first with a search of equal length: standard training, PGD training, half of the loss on clean and half on
attacked examples without any mixing (the reduced objective), and interpolated training. Robust accuracy is what
AutoAttack leaves, since networks trained on mixed inputs have fooled the PGD of the paper.
"""

from typing import Any

import jaxadv as ja
from benchmarks.claims import arms

CLAIM = {
    "sentence": "Adversarial training on interpolated clean and interpolated attacked examples regains clean accuracy "
    "at equal robust accuracy.",
    "source": "Lamb et al. 2019, Interpolated adversarial training: achieving robust neural networks without "
    "sacrificing too much accuracy, arXiv:1906.06784",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 9,
    "settings": arms.SETTINGS | {"train": 2_000, "epochs": 50, "alpha": 1.0},
    "smoke": arms.SMOKE,
}
ARMS = ("standard", "PGD", "without mixing", "IAT")


def _arms(shared: arms.Setup) -> dict[str, dict[str, Any]]:
    inner, growth = shared.inner, shared.growth
    made = (
        ja.train.standard(),
        ja.train.pgd_at(inner, growth=growth),
        ja.train.iat(inner, alpha=0.0, growth=growth),
        ja.train.iat(inner, alpha=shared.settings["alpha"], growth=growth),
    )
    return {arm: {"objective": objective} for arm, objective in zip(ARMS, made, strict=True)}


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train and judge; percent of the test images."""
    return arms.run(settings, seeds, smoke, _arms)


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: clean accuracy over PGD's, clear of zero; at most a point of robust accuracy lost; by the mixing."""
    clean, robust = (arms.gain(numbers, "IAT", "PGD", what) for what in (arms.CLEAN, arms.AUTO))
    weak, mixing = arms.gain(numbers, "IAT", "PGD", arms.PGD), arms.gain(numbers, "IAT", "without mixing", arms.CLEAN)
    return arms.word(arms.learned(numbers) and clean[1] > 0, robust[0] >= -1, mixing[0] > 0), (
        arms.told(numbers, ARMS, arms.CLEAN, arms.PGD, arms.AUTO)
        + f"; IAT over PGD training: clean {arms.signed(clean)} points, robust {arms.signed(weak)} under PGD and "
        f"{arms.signed(robust)} under AutoAttack; clean over the same without mixing {arms.signed(mixing)}"
    )
