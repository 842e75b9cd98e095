"""Claim: an ensemble of parameter-free attacks needs no tuning and sees through masked gradients, where PGD does not.

MNIST, `cnn_small`, linf. Three networks for each seed: trained against PGD; the same with its logits multiplied by
1,000 (the softmax saturates in float32, so the gradient of the cross-entropy vanishes; predictions are the same, and so
is the truth about robustness); and trained against one step without a random start, which collapses. Each is judged by
PGD with default settings, by AutoAttack, and by each of AutoAttack's four attacks alone.
"""

from typing import Any

import jax
import numpy as np

import jaxadv as ja
from benchmarks.claims import framework

CLAIM = {
    "sentence": "An ensemble of four parameter-free attacks, without any tuning, finds at least as many failing inputs "
    "as PGD and as each of its members, and is not fooled by masked gradients.",
    "source": "Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of diverse "
    "parameter-free attacks, arXiv:2003.01690",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 20,
    "settings": {
        "data": "mnist",
        "eps": 0.3,
        "train": 10_000,
        "epochs": 20,
        "test": 300,
        "pgd_steps": 40,
        "scale": 1e3,
    },
    "smoke": {"data": "digits", "train": 100, "epochs": 1, "test": 10, "pgd_steps": 1},
}
NETS = ("PGD-trained", "saturated", "collapsed")


def _scaled(model, factor, x):
    return factor * model(x)


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train, mask and judge; percent of the test images."""
    threat = ja.linf(settings["eps"])
    whole, held, test = (ja.data.load(settings["data"], split) for split in ("train", "validation", "test"))
    data, test = ja.data.evaluation_subset(whole, settings["train"]), ja.data.evaluation_subset(test, settings["test"])
    common = {"eps": settings["eps"], "validation": held, "epochs": settings["epochs"]} | (
        {"steps": 1} if smoke else {}
    )
    one_step = ja.train.pgd_at(ja.fgsm(threat, keep="last"))
    suite = ("quick",) if smoke else ("standard",)
    members = () if smoke else ja.evaluate.PROTOCOLS["standard"]("linf")
    numbers: dict[str, list[float]] = {}

    def judge(net, model, seed):
        x, y = test.all()

        def robust(what, attacks):
            found = ja.evaluate(
                jax.random.key(seed), model, x, y, threat, attacks=attacks, index=test.index, keep_adversarial=False
            ).models[0]
            numbers.setdefault(f"{net}: {what}, robust %", []).append(100 * found.robust_accuracy)

        robust("PGD", (ja.pgd(threat, steps=settings["pgd_steps"]),))
        robust("AutoAttack", suite[0])
        for stage in members:
            robust(f"{stage.attack} alone", (stage,))

    for seed in seeds:
        trained = framework.train(ja.recipes.fast_mnist, data, seed, **common).model
        judge("PGD-trained", trained, seed)
        judge("saturated", jax.tree_util.Partial(_scaled, trained, np.float32(settings["scale"])), seed)
        judge("collapsed", framework.train(ja.recipes.fast_mnist, data, seed, **common, objective=one_step).model, seed)
    return numbers


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: nowhere above PGD or a member by half a point, and where gradients are masked far below PGD."""
    mean = {key: float(np.mean(values)) for key, values in numbers.items()}
    suite = {net: mean[f"{net}: AutoAttack, robust %"] for net in NETS}
    pgd = {net: mean[f"{net}: PGD, robust %"] for net in NETS}
    others = {net: [v for k, v in mean.items() if k.startswith(f"{net}: ") and "AutoAttack" not in k] for net in NETS}
    lowest = all(suite[net] <= min(others[net]) + 0.5 for net in NETS)
    sees = suite["saturated"] <= suite["PGD-trained"] + 1 and pgd["saturated"] >= suite["saturated"] + 5
    word = "holds" if lowest and sees else "holds in part" if lowest else "does not hold here"
    parts = [f"{net} {suite[net]:.1f} % (PGD {pgd[net]:.1f} %, best member {min(others[net]):.1f} %)" for net in NETS]
    return word, "robust under AutoAttack: " + ", ".join(parts)
