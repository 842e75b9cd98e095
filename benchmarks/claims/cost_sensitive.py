"""Claim: where mistakes about two classes cost more, these become more robust, at little loss in all.

MNIST, `cnn_small`, linf. Two classes are protected: their mistakes, either way, cost more than others. Arms (see
`arms`), all with a search of equal length: PGD training; the same loss with all costs alike (the reduced objective);
these costs; and these costs with the penalty that asks for the Min-Max property, few large weights among many small
ones. Robust accuracy is counted apart on the protected classes and on the others, by AutoAttack. Refuted if the
protected classes do not gain; a gain that the others pay for is a gain in part.
"""

from typing import Any

import jax
import numpy as np

import jaxadv as ja
from benchmarks.claims import arms, framework
from jaxadv.evaluate.report import ROBUST
from jaxadv.train import perturbed, terms

CLAIM = {
    "sentence": "Adversarial training whose costs protect chosen classes makes these more robust than the others, and "
    "asking for few large weights among many small ones helps further.",
    "source": "Shen et al. 2021, Adversarial learning with cost-sensitive classes, arXiv:2101.12372",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 11,
    "settings": arms.SETTINGS | {"protected": (4, 9), "cost": 5.0, "minmax": 0.1},
    "smoke": arms.SMOKE,
}
ARMS = ("PGD", "costs alike", "costs", "costs and Min-Max")
PROTECTED, OTHERS, SPARSE = "protected, robust %", "others, robust %", "Hoyer's sparseness, hundredths"


def _costs(classes: int, protected: tuple[int, ...], cost: float) -> np.ndarray:
    """What each mistake costs: `cost` where a protected class is on either side, else 1."""
    chosen = np.isin(np.arange(classes), protected)
    return np.where(chosen[:, None] | chosen, cost, 1.0) * (1 - np.eye(classes))


def _arms(shared: arms.Setup) -> dict[str, dict[str, Any]]:
    settings, inner, growth = shared.settings, shared.inner, shared.growth
    alike, dear = (
        ja.train.cost_sensitive(inner, _costs(shared.data.classes, settings["protected"], cost), growth=growth)
        for cost in (1.0, settings["cost"])
    )
    sparse = ja.train.plus(dear, terms.of_weights(terms.minmax), settings["minmax"])
    made = (ja.train.pgd_at(inner, growth=growth), alike, dear, sparse)
    return {arm: {"objective": objective} for arm, objective in zip(ARMS, made, strict=True)}


def _judged(shared: arms.Setup, made: framework.Trained, seed: int) -> dict[str, float]:
    """As `arms.judged`, with AutoAttack's outcome on the protected classes and on the others."""
    weak, found = arms.reports(shared, made, seed)
    mine = np.isin(found.examples["label"], shared.settings["protected"])
    kept = 100 * (np.asarray(found.examples["by"]) == ROBUST)
    leaves = jax.tree_util.tree_leaves_with_path(made.net.params)
    sizes = [100 * float(terms.hoyer(leaf)) for path, leaf in leaves if perturbed.kernels(path, leaf)]
    apart = {PROTECTED: float(kept[mine].mean()), OTHERS: float(kept[~mine].mean()), SPARSE: float(np.mean(sizes))}
    return arms.measured(weak, found, made) | apart


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train and judge; percent of the test images."""
    return arms.run(settings, seeds, smoke, _arms, _judged)


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: protected classes gain clear of zero, and pass the others; at most 2 points lost in all; Min-Max gains."""
    gain, total = (arms.gain(numbers, "costs", "costs alike", what) for what in (PROTECTED, arms.AUTO))
    penalty = arms.gain(numbers, "costs and Min-Max", "costs", PROTECTED)
    above = arms.mean(numbers, "costs", PROTECTED) > arms.mean(numbers, "costs", OTHERS)
    return arms.word(arms.learned(numbers) and gain[1] > 0, above, total[0] >= -2, penalty[1] > 0), (
        arms.told(numbers, ARMS, arms.CLEAN, arms.PGD, arms.AUTO, PROTECTED, OTHERS, SPARSE)
        + f"; costs over costs alike: protected {arms.signed(gain)} points, all {arms.signed(total)}; Min-Max over "
        f"costs: protected {arms.signed(penalty)}"
    )
