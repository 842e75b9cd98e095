"""Claim: close to nearly every image that a network gets right lies one that it gets wrong.

Digits. A linear classifier, a multilayer perceptron and a small convolutional network are trained without attacks, and
box-constrained L-BFGS looks for the smallest perturbation of each test image that the network gets right, without any
limit on its size. A perturbation is called small if it leads less than half way to the nearest training image of
another class: what it leads to is then nearer to its original than to any image of another class. Noise of the same
size, image by image, and of three times that size, shows what the direction is worth. DDN, which searches in another
way, tells whether L-BFGS found what there was to be found. The claim falls for a network where images stay right, where
perturbations are not small, or where noise does as well. A network trained against PGD is measured beside them and not
judged: it shows that sizes could have come out otherwise.
"""

from typing import Any

import jax
import numpy as np

import jaxadv as ja
from benchmarks.claims import framework

CLAIM = {
    "sentence": "For nearly every image that a network classifies correctly, a small perturbation, found by "
    "box-constrained optimization, makes it wrong, while noise of that size does not.",
    "source": "Szegedy et al. 2014, Intriguing properties of neural networks, sec. 4, arXiv:1312.6199",
    "tier": "digits",
    "seeds": (0, 1, 2),
    "minutes": 3,
    "settings": {"epochs": 30, "test": 200, "attack_steps": 100, "attack_rounds": 9, "ddn_steps": 200, "eps": 0.15},
    "smoke": {"epochs": 1, "test": 10, "attack_steps": 1, "attack_rounds": 1, "ddn_steps": 1},
}
NETS = {
    "linear": ("mlp", {"widths": ()}, "standard_digits"),
    "perceptron": ("mlp", {"widths": (100, 100)}, "standard_digits"),
    "convolutional": ("cnn_small", {}, "standard_digits"),
    "trained against PGD": ("cnn_small", {}, "pgd_digits"),
}
"""Name to network, its options, and the recipe that trains it."""
JUDGED = tuple(NETS)[:3]


def nearest_other(x: np.ndarray, y: np.ndarray, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the Euclidean distance of each image to the nearest one of another class."""
    far = np.linalg.norm((x[:, None] - images[None]).reshape(len(x), len(images), -1), axis=-1)
    return np.where(y[:, None] == labels[None], np.inf, far).min(axis=1)


def noise(rng: np.random.Generator, x: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return images with Gaussian noise of given Euclidean size, cut to [0, 1]: as large as the cut leaves it."""
    drawn = rng.normal(size=x.shape).reshape(len(x), -1)
    drawn *= (size / np.linalg.norm(drawn, axis=1))[:, None]
    return np.clip(x + drawn.reshape(x.shape), 0, 1).astype(np.float32)


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train and attack; percent of the images that a network gets right, and sizes (root mean square)."""
    train, held, test = (ja.data.load("digits", split) for split in ("train", "validation", "test"))
    test = ja.data.evaluation_subset(test, settings["test"])
    x, y = test.all()
    other = nearest_other(x, y, *train.all())
    free = ja.l2(float(np.sqrt(x[0].size)))  # no image is farther from another
    search = ja.attacks.lbfgs(free, steps=settings["attack_steps"], rounds=settings["attack_rounds"])
    beside = ja.attacks.ddn(free, steps=settings["ddn_steps"])
    go = jax.jit(lambda attack, key, model: attack.run(key, model, x, y, index=test.index))
    holds = jax.jit(lambda model, x: ja.robust(model(x), y))
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        for name, (net, options, recipe) in NETS.items():
            if smoke and name in tuple(NETS)[1:-1]:  # the two ends show that all of it runs
                numbers |= {key.replace("linear", name): value for key, value in numbers.items() if "linear" in key}
                continue
            made = ja.models.create(net, jax.random.key(seed), shape=test.shape, classes=test.classes, **options)
            common = {"trainable": made, "validation": held, "epochs": settings["epochs"], "eps": settings["eps"]}
            model = framework.train(
                getattr(ja.recipes, recipe), train, seed, **common | ({"steps": 1} if smoke else {})
            ).model
            right = np.asarray(holds(model, x))
            found, compared = (jax.device_get(go(attack, jax.random.key(seed), model)) for attack in (search, beside))
            rng = np.random.default_rng(seed)
            wrong = {m: ~np.asarray(holds(model, noise(rng, x, m * found.size))) for m in (1, 3)}
            broken = right & found.success
            measured = {
                "clean %": 100 * right.mean(),
                "broken %": _percent(found.success, right),
                "broken by a small perturbation %": _percent(found.success & (found.size < other / 2), right),
                "wrong under noise of that size %": _percent(wrong[1], right),
                "wrong under noise of three times that size %": _percent(wrong[3], right),
                "size, hundredths": 100 * _mean(found.size[broken]) / np.sqrt(x[0].size),
                "size by the way to another class": _mean((found.size / other)[broken]),
                "size by that of DDN": _mean((found.size / np.maximum(compared.size, 1e-6))[broken & compared.success]),
            }
            for what, value in measured.items():
                numbers.setdefault(f"{name}: {what}", []).append(float(value))
    return numbers


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _percent(which: np.ndarray, of: np.ndarray) -> float:
    return 100 * _mean(np.asarray(which)[of])


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge each network: 95 % broken by small perturbations, 5 % by noise of that size at most, in the mean."""
    mean = {key: float(np.mean(values)) for key, values in numbers.items()}
    small = {name: mean[f"{name}: broken by a small perturbation %"] for name in NETS}
    noisy = {name: mean[f"{name}: wrong under noise of that size %"] for name in NETS}
    good = [name for name in JUDGED if small[name] >= 95 and noisy[name] <= 5]
    word = "holds" if len(good) == len(JUDGED) else "holds in part" if good else "does not hold here"
    listed = "; ".join(
        f"{name} {small[name]:.1f} % against {noisy[name]:.1f} % (mean size {mean[f'{name}: size, hundredths']:.1f}, "
        f"{mean[f'{name}: size by that of DDN']:.2f} of DDN's)"
        for name in NETS
    )
    return word, f"wrong after a small perturbation against noise of its size, of images that were right: {listed}"
