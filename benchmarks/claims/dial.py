"""Claim: features in which attacked examples cannot be told from clean ones make a network more robust.

MNIST, `cnn_small` with a second head on what its convolutions return, linf. Two pairs: DIAL with the divergence of
TRADES and with the cross-entropy, each beside the same training with the weight of the domains at zero (which is
TRADES, and the half and half of clean and attacked cross-entropy). All with one optimizer, schedule, growth of the
budget and search; AutoAttack (the protocol `fast`) judges the network without its second head.
"""

from typing import Any

import jax
import numpy as np

import jaxadv as ja
from benchmarks.claims import framework

CLAIM = {
    "sentence": "Training features from which a second head cannot tell attacked from clean examples makes a network "
    "more robust than the same adversarial training without it, at no loss on clean examples.",
    "source": "Levi, Attias and Kontorovich 2021, Domain invariant adversarial learning, arXiv:2104.00322",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 20,
    "settings": {
        "data": "mnist",
        "eps": 0.3,
        "train": 5_000,
        "epochs": 20,
        "steps": 10,
        "beta": 6.0,
        "domain": {"kl": 1.0, "ce": 0.1},
        "test": 500,
        "judge": "fast",
    },
    "smoke": {"data": "digits", "train": 100, "epochs": 1, "steps": 1, "test": 10},
}
KINDS = {"kl": "divergence", "ce": "cross-entropy"}


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train both kinds with and without domains, and judge; percent of the test images."""
    threat = ja.linf(settings["eps"])
    whole, held, test = (ja.data.load(settings["data"], split) for split in ("train", "validation", "test"))
    data, test = ja.data.evaluation_subset(whole, settings["train"]), ja.data.evaluation_subset(test, settings["test"])
    steps = 1 if smoke else settings["epochs"] * ja.data.steps_per_epoch(len(data), 100)
    growth = ja.train.schedules.growth(max(1, steps // 5))
    common = {"eps": settings["eps"], "validation": held, "steps": steps}
    judge = ja.pgd(threat, steps=1) if smoke else settings["judge"]
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        first, second = jax.random.split(jax.random.key(1000 + seed))
        net = ja.models.create("cnn_small", first, shape=data.shape, classes=data.classes)
        net = ja.train.with_domains(second, net, shape=data.shape, at="dense1:in")
        for kind, words in KINDS.items():
            for domain in (0.0, settings["domain"][kind]):
                objective = ja.train.dial(
                    threat,
                    beta=settings["beta"],
                    domain=domain,
                    distance=kind,
                    steps=settings["steps"],
                    total_steps=steps,
                    growth=growth,
                )
                made = framework.train(ja.recipes.fast_mnist, data, seed, **common, trainable=net, objective=objective)
                model = ja.models.model(ja.models.trunk(made.net))
                found = framework.accuracies(model, test, threat, judge, seed)
                name = f"{words}, {'with' if domain else 'without'} domains"
                for what, value in zip(("clean %", "AutoAttack, robust %"), found):
                    numbers.setdefault(f"{name}: {what}", []).append(value)
    return numbers


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge each kind: robust gain clear of zero over the seeds, and at most half a point lost on clean examples."""
    won, parts = [], []
    for words in KINDS.values():
        names = [f"{words}, {which} domains" for which in ("with", "without")]
        robust, low, high = framework.gain(numbers, *(f"{name}: AutoAttack, robust %" for name in names))
        clean = framework.gain(numbers, *(f"{name}: clean %" for name in names))[0]
        level = float(np.mean(numbers[f"{names[1]}: AutoAttack, robust %"]))
        won.append(low > 0 and clean >= -0.5 and level >= 50)
        parts.append(
            f"{words} {level:.1f} % robust without domains, {robust:+.1f} ({low:+.1f} to {high:+.1f}) points with "
            f"them, clean {clean:+.1f}"
        )
    word = "holds" if all(won) else "holds in part" if any(won) else "does not hold here"
    return word, "under AutoAttack: " + "; ".join(parts)
