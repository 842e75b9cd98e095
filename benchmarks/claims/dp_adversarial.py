"""Claim: private and adversarial training go together, and privacy costs more robustness than clean accuracy.

MNIST, `cnn_small`, linf, epsilon 8 at delta 1e-5. Four networks for each seed: trained on clean images or on the
examples that PGD finds for each image by itself, with and without privacy, as many passes each. Private training clips
the gradient at the attacked example, so the attack costs no budget. As in the other claims the attack's budget grows at
first: in a run without that, one of three private networks that saw attacks stayed at chance. Refuted if the private
network that saw attacks is not more robust than the private one that did not; the second half, if privacy takes no more
off the robust accuracy of adversarial training than off the clean accuracy of clean training.
"""

from typing import Any

import numpy as np

import jaxadv as ja
from benchmarks.claims import arms, framework

CLAIM = {
    "sentence": "Private training on attacked examples is robust at the budget of private training on clean ones, and "
    "privacy makes it harder to learn a robust network than an accurate one.",
    "source": "Hayes, Balle and Kumar 2022, Learning to be adversarially robust and differentially private, "
    "arXiv:2201.02265",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 15,
    "settings": {
        **arms.SETTINGS,
        "eps": 0.1,
        "train": 10_000,
        "epochs": 15,
        "steps": 5,
        "epsilon": 8.0,
        "delta": 1e-5,
        "accountant": "pld",
    },
    "smoke": arms.SMOKE | {"accountant": "rdp"},
}
ARMS = ("clean", "attacked", "private clean", "private attacked")


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train all four networks with every seed, and judge them; percent of the test images."""
    shared = arms.setup(settings, smoke)
    public: dict[str, Any] = {"eps": settings["eps"], "epochs": settings["epochs"], "validation": shared.held}
    public |= {"steps": 1} if smoke else {}
    private = public | {name: settings[name] for name in ("epsilon", "delta", "accountant")}
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        for arm in ARMS[-1:] if smoke else ARMS:
            recipe, given = (ja.recipes.dp_mnist, private) if "private" in arm else (ja.recipes.fast_mnist, public)
            given = given | {"trainable": shared.network(seed), "objective": ja.train.standard()}
            if "attacked" in arm:  # the budget rises over the first fifth of the steps, however many a recipe takes
                growth = ja.train.schedules.growth(max(1, recipe(shared.data, **given)["steps"] // 5))
                given["objective"] = ja.train.pgd_at(shared.inner, growth=growth)
            made = framework.train(recipe, shared.data, seed, **given)
            for what, value in arms.judged(shared, made, seed).items():
                numbers.setdefault(f"{arm}: {what}", []).append(value)
    return framework.filled(numbers, ARMS)


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: robustness at the same epsilon, and what privacy costs, both clear of zero over seeds."""
    gained = arms.gain(numbers, "private attacked", "private clean")
    robust, clean = (
        np.subtract(numbers[f"{trained}: {what}"], numbers[f"private {trained}: {what}"])
        for trained, what in (("attacked", arms.AUTO), ("clean", arms.CLEAN))
    )
    more = framework.interval((robust - clean).tolist())
    return arms.word(gained[1] > 0, more[1] > 0), (
        arms.told(numbers, ARMS, arms.CLEAN, arms.PGD, arms.AUTO)
        + f"; attacked over clean at this epsilon {arms.signed(gained)} points under AutoAttack; privacy takes "
        f"{robust.mean():.1f} points of robust accuracy from adversarial training and {clean.mean():.1f} points of "
        f"clean accuracy from clean training, {arms.signed(more)} more"
    )
