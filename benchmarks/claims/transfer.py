"""Claim: adversarial examples carry over between networks of other depth, seed and training set, unlike equal noise.

MNIST. Networks are trained on two halves of the training images, without attacks: two of one shape that differ in their
first weights, one of another depth, a convolutional one, and one on the other half. Examples of least size are made for
each by box-constrained L-BFGS, as in the paper, and shown to all: as they were made, and magnified to one root mean
square. A victim counts on the images that it gets right and whose example broke the source; noise of the size of each
perturbation is shown to it on the same images. The claim falls if noise does nearly as well, or if examples rarely
carry over at all.
"""

from typing import Any

import jax
import numpy as np

import jaxadv as ja
from benchmarks.claims import framework

CLAIM = {
    "sentence": "Adversarial examples made for one network are misclassified by networks of other depth, other first "
    "weights or a disjoint training set far more often than images with noise of equal size.",
    "source": "Szegedy et al. 2014, Intriguing properties of neural networks, sec. 4.2, arXiv:1312.6199",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 15,
    "settings": {
        "data": "mnist",
        "train": 10_000,
        "epochs": 20,
        "test": 500,
        "attack_steps": 100,
        "attack_rounds": 9,
        "size": 0.1,
    },
    "smoke": {"data": "digits", "train": 200, "epochs": 1, "test": 20, "attack_steps": 2, "attack_rounds": 1},
}
NETS = {
    "reference": ("mlp", {"widths": (100, 100)}, 0, 0),
    "other seed": ("mlp", {"widths": (100, 100)}, 1, 0),
    "other depth": ("mlp", {"widths": (150, 150, 150, 150)}, 0, 0),
    "convolutional": ("cnn_small", {}, 0, 0),
    "disjoint set": ("mlp", {"widths": (100, 100)}, 0, 1),
}
"""Name to network, its options, number of its first weights, and half of the training images."""
PAIRS = tuple(name for name in NETS if name != "reference")


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train, attack and ask, both ways between the reference and each other network; percent of a victim's chances."""
    whole, held, test = (ja.data.load(settings["data"], split) for split in ("train", "validation", "test"))
    test = ja.data.evaluation_subset(test, settings["test"])
    x, y = test.all()
    bound = float(np.sqrt(np.prod(test.shape)))  # no image is farther from another: the attack is not limited
    attack = ja.attacks.lbfgs(ja.l2(bound), steps=settings["attack_steps"], rounds=settings["attack_rounds"])
    common = {"validation": held, "epochs": settings["epochs"]} | ({"steps": 1} if smoke else {})
    numbers: dict[str, list[float]] = {}

    def note(measure, value):
        numbers.setdefault(measure, []).append(100 * float(value))

    for seed in seeds:
        chosen, half = ja.data.evaluation_subset(whole, settings["train"], seed), settings["train"] // 2
        halves = (chosen.subset(slice(0, half)), chosen.subset(slice(half, 2 * half)))
        models = {}
        for number, (name, (net, options, weights, part)) in enumerate(NETS.items()):
            first = jax.random.key(10 * seed + weights)
            made = ja.models.create(net, first, shape=test.shape, classes=test.classes, **options)
            models[name] = framework.train(
                ja.recipes.standard_mnist, halves[part], 10 * seed + number, trainable=made, **common
            ).model
        key = jax.random.key(seed)
        table = ja.evaluate.transfer_table(
            key, models, x, y, attack, magnify=settings["size"], noise=(), index=test.index, data=test
        )
        for how, kinds in (("as made", ("attack", "equal")), ("magnified", ("magnified", "equal magnified"))):
            for what, kind in zip(("fooled", "fooled by noise"), kinds):
                rates = np.nan_to_num(table.fooled(kind))
                for place, name in list(enumerate(NETS))[1:]:
                    note(f"{name}, {how}: {what} %", (rates[0, place] + rates[place, 0]) / 2)
        note("size as made, hundredths", np.mean([r["size"] for r in table.rows if r["kind"] == "attack"]))
        note("broken on their source %", np.mean([r["broken"] / len(x) for r in table.rows if r["kind"] == "attack"]))
        note("clean errors %", np.mean(table.errors("clean")))
    return numbers


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: magnified, over 20 % of the chances and five times the noise for each; as made, above noise everywhere."""

    def pair(name, how):
        return (np.asarray(numbers[f"{name}, {how}: {what} %"]) for what in ("fooled", "fooled by noise"))

    far, above, words = [], [], []
    for name in PAIRS:
        fooled, noise = pair(name, "magnified")
        plain, quiet = pair(name, "as made")
        far.append(bool(fooled.mean() >= 20 and fooled.mean() >= 5 * noise.mean() and np.all(fooled > noise)))
        above.append(bool(np.all(plain > quiet) and np.all(fooled > noise)))
        words.append(
            f"{name} {fooled.mean():.1f} % against {noise.mean():.1f} % (as made {plain.mean():.1f} % against "
            f"{quiet.mean():.1f} %)"
        )
    word = "holds" if all(far) and all(above) else "holds in part" if all(above) else "does not hold here"
    return word, "fooled by magnified examples against noise of equal size, of a victim's chances: " + "; ".join(words)
