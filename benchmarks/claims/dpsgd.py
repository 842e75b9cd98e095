"""Claim: at one epsilon, large batches, several views of each example and averaged weights each help private training.

MNIST, 10,000 training images, `cnn_small`, epsilon 3 at delta 1e-5 for every network; the noise is what that budget
asks for. For each seed one network with all ingredients, and one without each of them: a batch of an eighth (as many
passes, so eight times the steps), one view instead of two (random shifts), the last weights instead of their average,
noise by Renyi accounting instead of privacy loss distributions. And plain DP-SGD, without any, and training without
privacy. The learning rate is chosen once for all, so an ingredient may also help because the rate suits it.
"""

from typing import Any

import jax
import numpy as np

import jaxadv as ja
from benchmarks.claims import framework

FULL = "all ingredients"
WITHOUT = ("large batch", "views", "average", "tight accountant")

CLAIM = {
    "sentence": "At the same epsilon, large batches, augmented views averaged before the clip, averaged weights and a "
    "tight accountant each make private training more accurate.",
    "source": "De et al. 2022, Unlocking high-accuracy differentially private image classification through scale, "
    "arXiv:2204.13650; Doroshenko et al. 2022, arXiv:2207.04380 (the accountant)",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 20,
    "settings": {
        "data": "mnist",
        "net": "cnn_small",
        "train": 10_000,
        "epochs": 10,
        "batch": 800,
        "fraction": 8,
        "epsilon": 3.0,
        "delta": 1e-5,
        "views": 2,
        "shift": 2,
        "rate": 0.5,
        "clip": 0.1,
        "average": 0.99,
        "tight": "pld",
        "test": 10_000,
    },
    "smoke": {"data": "digits", "net": "mlp", "train": 100, "epochs": 1, "batch": 16, "tight": "rdp", "test": 10},
}


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train with all ingredients and without each, and test; percent of the test images."""
    whole, held, test = (ja.data.load(settings["data"], split) for split in ("train", "validation", "test"))
    data, test = ja.data.evaluation_subset(whole, settings["train"]), ja.data.evaluation_subset(test, settings["test"])
    shift = ja.train.crop(settings["shift"])
    common = {"epsilon": settings["epsilon"], "delta": settings["delta"], "clip_norm": settings["clip"]}
    common |= {"lr": settings["rate"], "epochs": settings["epochs"], "validation": held, "net": settings["net"]}
    common |= {"steps": 1} if smoke else {}
    ingredients = {
        "large batch": ({"batch_size": settings["batch"]}, {"batch_size": settings["batch"] // settings["fraction"]}),
        "views": ({"views": settings["views"], "augment": shift}, {"views": 1, "augment": None}),
        "average": ({"ema": settings["average"]}, {"ema": None}),
        "tight accountant": ({"accountant": settings["tight"]}, {"accountant": "rdp"}),
    }
    arms = {FULL: (), **{f"without {name}": (name,) for name in WITHOUT}, "plain DP-SGD": WITHOUT}
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        for arm, lacking in arms.items():
            if smoke and len(lacking) == 1:  # the two ends show that all of it runs
                continue
            given = dict(common)
            for name, (with_it, without) in ingredients.items():
                given |= without if name in lacking else with_it
            made = framework.train(ja.recipes.dp_mnist, data, seed, **given)
            numbers.setdefault(f"{arm}: test %", []).append(_accuracy(made.model, test))
        plain = {"lr_max": 5e-3} | {
            name: common[name] for name in ("epochs", "validation", "net", "steps") if name in common
        }
        made = framework.train(ja.recipes.standard_mnist, data, seed, **plain)
        numbers.setdefault("without privacy: test %", []).append(_accuracy(made.model, test))
    return framework.filled(numbers, arms)


def _accuracy(model: Any, source: Any) -> float:
    x, y = source.all()
    right = [np.argmax(jax.device_get(model(x[i : i + 500])), -1) == y[i : i + 500] for i in range(0, len(y), 500)]
    return 100 * float(np.mean(np.concatenate(right)))


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: every ingredient gains, clear of zero over seeds, and all together do."""
    gains = {name: framework.gain(numbers, f"{FULL}: test %", f"without {name}: test %") for name in WITHOUT}
    together = framework.gain(numbers, f"{FULL}: test %", "plain DP-SGD: test %")
    clear = [name for name, (_, low, _) in gains.items() if low > 0]
    word = "does not hold here"
    if together[1] > 0 and clear:
        word = "holds" if len(clear) == len(gains) else "holds in part"
    mean = {key: float(np.mean(values)) for key, values in numbers.items()}
    each = ", ".join(f"{name} {gain:+.1f} ({low:+.1f} to {high:+.1f})" for name, (gain, low, high) in gains.items())
    why = (
        f"{mean[f'{FULL}: test %']:.1f} % with all, {mean['plain DP-SGD: test %']:.1f} % without any, "
        f"{mean['without privacy: test %']:.1f} % without privacy; gains in points: {each}"
    )
    return word, why
