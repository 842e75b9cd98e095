"""Claim: the weight of TRADES' divergence trades clean accuracy for robust accuracy.

MNIST, `cnn_small`, linf. Arms (see `arms`): no divergence (the reduced objective, which is standard training), PGD
training with a search of equal length, and TRADES with several weights. Refuted if robust accuracy does not rise from
the smallest positive weight to the largest, or clean accuracy does not fall.
"""

from typing import Any

import jaxadv as ja
from benchmarks.claims import arms

CLAIM = {
    "sentence": "The weight of the divergence between predictions for clean and attacked examples trades clean "
    "accuracy for robust accuracy.",
    "source": "Zhang et al. 2019, Theoretically principled trade-off between robustness and accuracy, arXiv:1901.08573",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 12,
    "settings": arms.SETTINGS | {"betas": (1.0, 3.0, 10.0)},
    "smoke": arms.SMOKE,
}
BETAS = ("small", "middle", "large")
ARMS = ("no divergence", "PGD", *BETAS)


def _arms(shared: arms.Setup) -> dict[str, dict[str, Any]]:
    growth: dict[str, Any] = {"growth": shared.growth}
    steps = shared.settings["steps"]
    made = [ja.train.standard(), ja.train.pgd_at(shared.inner, **growth)]
    made += [ja.train.trades(shared.threat, beta=beta, steps=steps, **growth) for beta in shared.settings["betas"]]
    return {arm: {"objective": objective} for arm, objective in zip(ARMS, made, strict=True)}


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train with every weight, and judge; percent of the test images."""
    return arms.run(settings, seeds, smoke, _arms)


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: robust accuracy higher and clean accuracy lower, both clear of zero, without a turn between."""
    robust, clean = (arms.gain(numbers, "large", "small", what) for what in (arms.AUTO, arms.CLEAN))
    rising, falling = ([arms.mean(numbers, arm, what) for arm in BETAS] for what in (arms.AUTO, arms.CLEAN))
    turns = rising != sorted(rising) or falling != sorted(falling, reverse=True)
    return arms.word(arms.learned(numbers) and robust[1] > 0, clean[2] < 0, not turns), (
        arms.told(numbers, ARMS, arms.CLEAN, arms.PGD, arms.AUTO)
        + f"; from the small weight to the large {arms.signed(robust)} points under AutoAttack, {arms.signed(clean)} "
        "on clean examples"
    )
