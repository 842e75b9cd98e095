"""Claim: small Jacobians and selective input gradients resist transferred examples, and make saliency clearer.

MNIST, `cnn_small`, no attacks in training. Three networks for each seed: standard training, the Jacobian's norm alone,
and J-SIGR. Examples of the momentum iterative method, made on two networks that were trained on other images (a
convolutional one and a perceptron), are shown to all; AutoAttack (the protocol `fast`) at a smaller budget judges them
apart, because a defense that stops transferred examples alone may do so by hiding its gradients. Clearer: the share of
the l1 norm of the input gradient that falls on the patches on which the prediction depends the most, by occlusion.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxadv as ja
from benchmarks.claims import framework

CLAIM = {
    "sentence": "Penalizing the norm of the Jacobian and the input gradients where the prediction does not depend on "
    "the input makes a network more robust to transferred attacks and its saliency clearer.",
    "source": "Liu et al. 2022, Jacobian norm with selective input gradient regularization for improved and "
    "interpretable adversarial defense, arXiv:2207.13036",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 20,
    "settings": {
        "data": "mnist",
        "eps": 0.2,
        "small": 0.1,
        "train": 5_000,
        "epochs": 15,
        "weights": (0.01, 0.01),
        "patch": 7,
        "test": 500,
        "judge": "fast",
    },
    "smoke": {"data": "digits", "train": 100, "epochs": 1, "patch": 4, "test": 10},
}
ARMS = ("standard", "Jacobian alone", "J-SIGR")


@partial(jax.jit, static_argnames=("apply", "size"))
def _share(apply, params, state, batch, size: int):
    """The share of the input gradient on the patches that matter, in the median example."""
    go = (ja.train.saliency.selective(top=top, size=size, bn="eval") for top in (0.0, 0.15))
    whole, rest = (term(apply, params, state, batch, None) for term in go)
    return jnp.median(1 - rest / jnp.maximum(whole, 1e-30))


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train three networks and two sources, and judge; percent of the test images, percent of the gradient."""
    whole, held, test = (ja.data.load(settings["data"], split) for split in ("train", "validation", "test"))
    test = ja.data.evaluation_subset(test, settings["test"])
    x, y = test.all()
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    common = {"validation": held, "epochs": settings["epochs"]} | ({"steps": 1} if smoke else {})
    one, two = settings["weights"]
    weights = {"Jacobian alone": (one, 0.0), "J-SIGR": (one, two)}
    threat, half = ja.linf(settings["eps"]), ja.linf(settings["small"])
    judge = ja.pgd(half, steps=1) if smoke else settings["judge"]
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        chosen, n = ja.data.evaluation_subset(whole, 2 * settings["train"], seed), settings["train"]
        own, other = chosen.subset(slice(0, n)), chosen.subset(slice(n, 2 * n))
        sources = [
            framework.train(ja.recipes.standard_mnist, other, 100 + seed, net=net, **common).model
            for net in ("cnn_small", "mlp")
        ]
        moved = tuple(ja.attacks.transfer(threat, source, name=f"transfer_{i}") for i, source in enumerate(sources))
        for arm in ARMS:
            objective = {}
            if arm in weights:
                jacobian, saliency = weights[arm]
                made = ja.train.jsigr(weight_jacobian=jacobian, weight_saliency=saliency, size=settings["patch"])
                objective = {"objective": made}
            net = framework.train(ja.recipes.standard_mnist, own, seed, **common, **objective)
            clean, transferred = framework.accuracies(net.model, test, threat, moved, seed)
            small = framework.accuracies(net.model, test, half, judge, seed)[1]
            share = 100 * float(_share(net.net.apply, net.net.params, net.net.state, batch, settings["patch"]))
            found = {"clean %": clean, "transferred, robust %": transferred, "AutoAttack at half, robust %": small}
            for what, value in (found | {"gradient where it matters, %": share}).items():
                numbers.setdefault(f"{arm}: {what}", []).append(value)
    return numbers


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: gains in transferred robustness and in clarity clear of zero; a robustness that AutoAttack sees, too."""
    gains, parts = {}, []
    for what in ("transferred, robust %", "AutoAttack at half, robust %", "gradient where it matters, %", "clean %"):
        gains[what] = framework.gain(numbers, f"J-SIGR: {what}", f"standard: {what}")
        level = {arm: float(np.mean(numbers[f"{arm}: {what}"])) for arm in ARMS}
        parts.append(f"{what.removesuffix(' %').removesuffix(',')} " + ", ".join(f"{v:.1f}" for v in level.values()))
    transferred, seen, clear = (low > 0 for _, low, _ in list(gains.values())[:3])
    kept = gains["clean %"][0] >= -1
    full = transferred and clear and kept and seen
    word = "holds" if full else "holds in part" if transferred or clear else "does not hold here"
    return word, f"percent for {', '.join(ARMS)}: " + "; ".join(parts)
