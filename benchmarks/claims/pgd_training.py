"""Claim: a network trained against PGD resists attacks it was never trained on, and more capacity helps.

MNIST, `cnn_small` in three widths, linf. Each width is trained against PGD with the cross-entropy loss. The
network of full width is then attacked with other steps, losses, momentum and restarts, and with examples made
on a network that was trained without attacks (transfer); the same network without adversarial training is the
baseline. The claim falls if one of these goes far below the attack trained on. Capacity: the same training,
three widths, one strong judge.
"""

from typing import Any

import jax
import numpy as np

import jaxadv as ja
from benchmarks.claims import framework

CLAIM = {
    "sentence": "A network trained against PGD also resists first-order and transfer attacks that it was not trained "
    "on, and networks of more capacity become more robust by the same training.",
    "source": "Madry et al. 2018, Towards deep learning models resistant to adversarial attacks, arXiv:1706.06083",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 20,
    "settings": {
        "data": "mnist",
        "eps": 0.3,
        "train": 10_000,
        "epochs": 20,
        "pgd_steps": 10,
        "test": 1_000,
        "judge_steps": 50,
        "judge_restarts": 3,
        "widths": ((2, 4, 12), (4, 8, 25), (16, 32, 100)),
    },
    "smoke": {
        "data": "digits",
        "train": 100,
        "epochs": 1,
        "pgd_steps": 1,
        "test": 20,
        "judge_steps": 1,
        "judge_restarts": 1,
        "widths": ((2, 4, 12), (2, 4, 12), (2, 4, 12)),
    },
}
SIZES = ("narrow", "medium", "full")


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train three widths and a baseline for each seed; percent of the test images."""
    threat = ja.linf(settings["eps"])
    whole, held, test = (ja.data.load(settings["data"], split) for split in ("train", "validation", "test"))
    data, test = ja.data.evaluation_subset(whole, settings["train"]), ja.data.evaluation_subset(test, settings["test"])
    steps, restarts = settings["judge_steps"], settings["judge_restarts"]
    judge = ja.pgd(threat, steps=steps, loss=ja.losses.margin, name="pgd_margin")
    unseen = {
        "FGSM": (ja.fgsm(threat), 1),
        "MI-FGSM": (ja.attacks.mi_fgsm(threat, steps=steps), 1),
        "PGD, more steps and restarts": (ja.pgd(threat, steps=steps), restarts),
        "PGD on the margin": (judge, restarts),
    }
    common = {"eps": settings["eps"], "validation": held, "epochs": settings["epochs"]} | (
        {"steps": 1} if smoke else {}
    )
    numbers: dict[str, list[float]] = {}

    def note(measure, value):
        numbers.setdefault(measure, []).append(value)

    def robust(model, attack, seed, restarts=1):
        return framework.accuracies(model, test, threat, attack, seed, restarts=restarts)[1]

    def fit(recipe, seed, widths, **more):
        first, second, hidden = widths
        net = ja.models.create(
            "cnn_small",
            jax.random.key(1000 + seed),
            shape=data.shape,
            classes=data.classes,
            channels=(first, second),
            hidden=hidden,
        )
        return framework.train(recipe, data, seed, trainable=net, **common, **more).model

    for seed in seeds:
        standard = fit(ja.recipes.standard_mnist, seed, settings["widths"][-1])
        note("standard training: PGD on the margin, robust %", robust(standard, judge, seed, restarts))
        for size, widths in zip(SIZES, settings["widths"]):
            model = fit(ja.recipes.fast_mnist, seed, widths, attack_steps=settings["pgd_steps"])
            note(f"{size}: PGD on the margin, robust %", robust(model, judge, seed, restarts))
            if size != SIZES[-1]:
                continue
            clean, same = framework.accuracies(model, test, threat, ja.pgd(threat, steps=settings["pgd_steps"]), seed)
            note("full: clean %", clean)
            note("full: the attack trained on, robust %", same)
            for name, (attack, times) in unseen.items():
                if name != "PGD on the margin":
                    note(f"full: {name}, robust %", robust(model, attack, seed, times))
            note("full: transfer, robust %", _transfer(standard, model, judge, test, seed))
    return numbers


def _transfer(source, model, attack, test, seed: int) -> float:
    """Percent that `model` classifies correctly among examples made on another network."""
    x, y = test.all()
    found = jax.jit(attack.run)(jax.random.key(seed), source, x, y).x
    return 100 * float(np.mean(np.asarray(ja.robust(model(found), y))))


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge the claim: no unseen attack over 5 points below the one trained on, and robustness rises with width."""
    mean = {key: float(np.mean(values)) for key, values in numbers.items()}
    same = mean["full: the attack trained on, robust %"]
    clean = mean["full: clean %"]
    attacks = {k: v for k, v in mean.items() if k.startswith("full: ") and "trained on" not in k and "clean" not in k}
    worst = min(attacks, key=attacks.__getitem__)
    widths = [mean[f"{size}: PGD on the margin, robust %"] for size in SIZES]
    resists = same >= max(50, clean / 2) and attacks[worst] >= same - 5
    grows = widths[-1] >= widths[0] + 5 and widths == sorted(widths)
    word = "holds" if resists and grows else "holds in part" if resists or grows else "does not hold here"
    why = (
        f"{same:.1f} % under the attack trained on, {attacks[worst]:.1f} % under the worst of {len(attacks)} others "
        f"({worst.removeprefix('full: ').removesuffix(', robust %')}), standard training "
        f"{mean['standard training: PGD on the margin, robust %']:.1f} %; over the widths "
        + ", ".join(f"{w:.1f}" for w in widths)
        + " %"
    )
    return word, why
