"""Claim: a classifier that is one ODE, trained by conjugate Sobolev gradients, withstands more than a residual network.

MNIST averaged to 14x14 for all. Three networks for each seed: an sNODE trained by conjugate gradients on Sobolev
gradients, one on L2 gradients, and a small residual network trained by Adam. Judged by the paper's sensitivity attack
in l2, and by AutoAttack in the same ball, which the paper does not run.
"""

from typing import Any

import jax
import numpy as np

import jaxadv as ja
from benchmarks.claims import framework
from jaxadv.continuous import standalone

CLAIM = {
    "sentence": "Standalone neural ODEs trained with Sobolev gradients and conjugate gradients are more robust than a "
    "residual network.",
    "source": "Jaroudi et al. 2022, Standalone neural ODEs with sensitivity analysis, arXiv:2205.13933",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 20,
    "settings": {
        "data": "mnist",
        "pool": 2,
        "train": 4_000,
        "horizon": 3.0,
        "rate": 10,
        "epochs": 3,
        "batch": 100,
        "steps": 6,
        "method": "fr",
        "residual epochs": 10,
        "eps": 0.5,
        "attack steps": 30,
        "test": 2_000,
        "attacked": 100,
        "judge": "standard",
    },
    "smoke": {
        "data": "digits",
        "pool": 1,
        "train": 100,
        "horizon": 1.0,
        "rate": 2,
        "epochs": 1,
        "steps": 1,
        "attack steps": 1,
        "test": 10,
        "attacked": 10,
    },
}
LENGTHS = {"sNODE, Sobolev": 1.0, "sNODE, L2": None}
RESIDUAL = "residual network"


def pooled(source: Any, pool: int) -> Any:
    """Return the source with its images averaged over squares."""
    x, y = source.all()
    b, height, width, c = x.shape
    small = np.asarray(x).reshape(b, height // pool, pool, width // pool, pool, c).mean((2, 4))
    return ja.data.arrays(small.astype(np.float32), y, name=f"{source.name}_{pool}", classes=source.classes)


def trained(net: Any, data: Any, seed: int, settings: dict[str, Any], length: float | None, smoke: bool) -> Any:
    """Train an sNODE by conjugate gradients, anew on each minibatch; return its model."""
    about = net.apply.args[0]
    batch = min(settings["batch"], len(data))

    @jax.jit
    def step(params, x, y):
        more = {"steps": settings["steps"], "method": settings["method"], "length": length}
        return standalone.snode_ncg(params, standalone.snode_state(x, about), y, about, **more)

    params = net.params
    for number, given in enumerate(ja.data.batches(data, batch, seed=seed, epochs=settings["epochs"])):
        params, _ = step(params, given["x"], given["y"])
        if smoke and number == 0:
            break
    return ja.models.model(net._replace(params=params))


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train the three networks, and judge; percent of the test images."""
    threat = ja.l2(settings["eps"])
    train, held, test = (
        pooled(ja.data.evaluation_subset(source, min(n, len(source))), settings["pool"])
        for source, n in (
            (ja.data.load(settings["data"], split), n)
            for split, n in (("train", settings["train"]), ("validation", 500), ("test", settings["test"]))
        )
    )
    few = ja.data.evaluation_subset(test, settings["attacked"])
    judge = (ja.pgd(threat, steps=1),) if smoke else settings["judge"]
    attack = standalone.sensitivity_attack(threat, steps=settings["attack steps"])
    x, y = test.all()
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        models = {}
        for name, length in LENGTHS.items():
            net = standalone.snode(
                jax.random.key(1000 + seed), shape=train.shape, classes=train.classes,
                horizon=settings["horizon"], rate=settings["rate"],
            )  # fmt: skip
            models[name] = trained(net, train, seed, settings, length, smoke)
        plain = ja.models.create(
            "wide_resnet", jax.random.key(1000 + seed), shape=train.shape, classes=train.classes, depth=10, width=1
        )
        steps = 1 if smoke else settings["residual epochs"] * ja.data.steps_per_epoch(len(train), 100)
        common = {"trainable": plain, "validation": held, "steps": steps}
        models[RESIDUAL] = framework.train(ja.recipes.standard_mnist, train, seed, **common).model
        for name, model in models.items():
            clean = 100 * float(np.mean(np.asarray(jax.jit(lambda m, x: m(x).argmax(-1))(model, x)) == y))
            known = framework.accuracies(model, few, threat, attack, seed)[1]
            robust = framework.accuracies(model, few, threat, judge, seed)[1]
            found = {"clean %": clean, "sensitivity attack, robust %": known, "AutoAttack, robust %": robust}
            for what, value in found.items():
                numbers.setdefault(f"{name}: {what}", []).append(value)
    return numbers


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: a gain under AutoAttack clear of zero, with at most three points lost on clean examples."""
    mean = {key: float(np.mean(values)) for key, values in numbers.items()}
    smooth = next(iter(LENGTHS))
    gains = {
        what: framework.gain(numbers, f"{smooth}: {what}, robust %", f"{RESIDUAL}: {what}, robust %")
        for what in ("sensitivity attack", "AutoAttack")
    }
    clean = framework.gain(numbers, f"{smooth}: clean %", f"{RESIDUAL}: clean %")[0]
    word = "does not hold here"
    if gains["AutoAttack"][1] > 0:
        word = "holds" if clean >= -3 else "holds in part"
    elif gains["sensitivity attack"][1] > 0 and clean >= -3:
        word = "holds in part"
    told = "; ".join(f"{what} {gain:+.1f} ({low:+.1f} to {high:+.1f})" for what, (gain, low, high) in gains.items())
    why = (
        f"sNODE over residual network, points: {told}; clean {mean[f'{smooth}: clean %']:.1f} % against "
        f"{mean[f'{RESIDUAL}: clean %']:.1f} %; AutoAttack leaves {mean[f'{smooth}: AutoAttack, robust %']:.1f} %"
    )
    return word, why
