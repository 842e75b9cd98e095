"""Claim: networks whose recurrences are zero-stable, with small extraneous roots, classify better, also under noise.

MNIST, pre-activation residual networks of one size that differ in the four coefficients of their blocks alone: the best
zero-stable ones, the residual network, stable ones with larger roots, and two that are not zero-stable. One optimizer,
one schedule. Judged as in the paper, under noise and a shift of brightness, and by the four attacks of AutoAttack
with fewer steps (protocol `fast`), which the paper leaves out.
"""

from typing import Any

import jax
import numpy as np

import jaxadv as ja
from benchmarks.claims import framework
from jaxadv.continuous import zerostable

CLAIM = {
    "sentence": "Zero-stable coefficients with small extraneous roots make a residual network more accurate and less "
    "sensitive to noise; a root outside the unit disc makes it worse.",
    "source": "Chen, Jin and Shang 2022, Zero stability well predicts performance of convolutional neural networks, "
    "arXiv:2206.13100",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 20,
    "settings": {
        "data": "mnist",
        "train": 2_000,
        "epochs": 8,
        "rate": 5e-3,
        "blocks": (3, 3, 3),
        "widths": (8, 16, 32),
        "stem_stride": 2,
        "noise": 0.3,
        "eps": 0.05,
        "test": 2_000,
        "attacked": 50,
        "judge": "fast",
    },
    "smoke": {
        "data": "digits",
        "train": 100,
        "epochs": 1,
        "blocks": (2, 1),
        "widths": (2, 4),
        "stem_stride": 1,
        "test": 20,
        "attacked": 10,
    },
}

ARMS: dict[str, Any] = {
    "best (root 0.33)": "opt",
    "residual (root 0)": (1.0, 0.0, 0.0, 1.0),
    "k = 1 (root 0.71)": 1.0,
    "k = 0.34 (root 0.99)": 0.34,
    "k = -0.5 (root 1.88)": -0.5,
    "all ones (root 1.84)": zerostable.UNSTABLE,
}
"""Arm to the coefficients of its blocks."""
STABLE, UNSTABLE = tuple(ARMS)[:3], tuple(ARMS)[4:]


def noisy(x: np.ndarray, kind: str, size: float, seed: int) -> np.ndarray:
    """Return images with normal noise, uniform noise, or more brightness, cut to [0, 1], as the authors' code does."""
    rng = np.random.default_rng(seed)
    drawn = {"normal": rng.normal(size=x.shape), "uniform": rng.uniform(size=x.shape), "constant": np.ones(x.shape)}
    return np.clip(x + size * drawn[kind], 0, 1).astype(np.float32)


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train the arms, and judge; percent of the test images."""
    threat = ja.linf(settings["eps"])
    whole, held, test = (ja.data.load(settings["data"], split) for split in ("train", "validation", "test"))
    data, test = ja.data.evaluation_subset(whole, settings["train"]), ja.data.evaluation_subset(test, settings["test"])
    few = ja.data.evaluation_subset(test, settings["attacked"])
    steps = 1 if smoke else settings["epochs"] * ja.data.steps_per_epoch(len(data), 100)
    judge = (ja.pgd(threat, steps=1),) if smoke else settings["judge"]
    x, y = test.all()
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        for name, coefficients in list(ARMS.items())[: 1 if smoke else None]:
            options = {key: settings[key] for key in ("blocks", "widths", "stem_stride")}
            net = zerostable.zerosnet(
                jax.random.key(1000 + seed),
                shape=data.shape,
                classes=data.classes,
                coefficients=coefficients,
                **options,
            )
            common = {"trainable": net, "validation": held, "steps": steps, "lr_max": settings["rate"]}
            made = framework.train(ja.recipes.standard_mnist, data, seed, **common)
            ask = jax.jit(lambda model, x: model(x).argmax(-1))
            share = lambda x: 100 * float(np.mean(np.asarray(ask(made.model, x)) == y))  # noqa: B023, E731
            found = {"clean %": share(x)}
            for kind in ("normal", "uniform", "constant"):
                found[f"{kind} noise %"] = share(noisy(x, kind, settings["noise"], seed))
            found["AutoAttack, robust %"] = framework.accuracies(made.model, few, threat, judge, seed)[1]
            for what, value in found.items():
                numbers.setdefault(f"{name}: {what}", []).append(value)
    return framework.filled(numbers, ARMS)


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: unstable arms lose, and the best zero-stable one gains over the residual network under noise."""
    mean = {key: float(np.mean(values)) for key, values in numbers.items()}
    noise = {
        arm: np.mean([numbers[f"{arm}: {k} noise %"] for k in ("normal", "uniform", "constant")], 0) for arm in ARMS
    }
    best, plain = STABLE[:2]
    gain, low, high = framework.interval((noise[best] - noise[plain]).tolist())
    worst = {arm: max(mean[f"{other}: clean %"] for other in STABLE) - mean[f"{arm}: clean %"] for arm in UNSTABLE}
    lost = {arm: float(np.mean(noise[best] - noise[arm])) for arm in UNSTABLE}
    falls = min(worst.values()) > 0.5 and min(lost.values()) > 0.5
    attacked = [mean[f"{arm}: AutoAttack, robust %"] for arm in (best, plain)]
    word = "holds" if falls and low > 0 else "holds in part" if falls or low > 0 else "does not hold here"
    why = (
        f"under noise {gain:+.1f} ({low:+.1f} to {high:+.1f}) points over the residual network; unstable arms lose at "
        f"least {min(worst.values()):.1f} points clean and {min(lost.values()):.1f} under noise; AutoAttack "
        f"leaves {attacked[0]:.1f} % and {attacked[1]:.1f} % of the two"
    )
    return word, why
