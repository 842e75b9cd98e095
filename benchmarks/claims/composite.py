"""Claim: the order of composed transformations matters, and a scheduled order is a stronger attack than a fixed one.

Digits in color (each image tinted by a hue of its own, ground and stroke), a network trained without attacks. The
components are hue, saturation, rotation, brightness, contrast and a small linf perturbation, each in a range. The same
search with the same number of gradients is run three times: with the order fixed, with one random order for each image,
and scheduled. Beside them, for three of the components, all six fixed orders: how many images break in some order but
not in every one says whether order matters.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxadv as ja

CLAIM = {
    "sentence": "The order in which transformations are composed changes their effect on a network, and an order that "
    "is scheduled along gradients makes a stronger attack than a fixed or random one.",
    "source": "Hsiung, Tsai, Chen and Ho 2023, Towards compositional adversarial robustness, arXiv:2202.04235",
    "tier": "digits",
    "seeds": (0, 1, 2),
    "minutes": 3,
    "settings": {
        "epochs": 20,
        "test": 200,
        "outer": 5,
        "inner": 10,
        "degrees": 10.0,
        "brightness": 0.1,
        "change": 0.15,
        "eps": 0.02,
        "components": 6,
        "orders": 6,
    },
    "smoke": {"epochs": 1, "test": 8, "outer": 1, "inner": 1, "components": 2, "orders": 1},
}


def tinted(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Give every image a color of its own: `[b, h, w, 1]` to `[b, h, w, 3]`, in [0.1, 0.9]."""
    tint = np.stack([np.random.default_rng(int(i)).uniform(0.3, 1.0, 3) for i in index])
    return (0.1 + 0.8 * x * tint[:, None, None]).astype(np.float32)


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train without attacks, attack; percent of the test images."""
    from jaxadv import attacks
    from jaxadv.threats import behind, semantic

    change, numbers = settings["change"], {}
    parts = (
        attacks.Hue(-np.pi / 8, np.pi / 8),
        attacks.Saturation(1 - change, 1 + change),
        attacks.Affine(settings["degrees"], 0.0),
        attacks.Brightness(-settings["brightness"], settings["brightness"]),
        attacks.Contrast(1 - change, 1 + change),
        attacks.Pixels(settings["eps"]),
    )
    train, test = ja.data.load("digits"), ja.data.load("digits", "test")
    x, y = train.all()
    colored = ja.data.arrays(tinted(x, np.arange(len(x))), y)
    x, y = (v[: settings["test"]] for v in test.all())
    x, shape = tinted(x, 10_000 + np.arange(len(x))), (*x.shape[1:3], 3)
    go = jax.jit(lambda attack, key, model, x, y: attack.run(key, model, x, y).success)

    def note(name, share):
        numbers.setdefault(name, []).append(100 * float(np.mean(np.asarray(share))))

    for seed in seeds:
        key = jax.random.key(seed)
        recipe = ja.recipes.standard_digits(colored, seed=seed, epochs=settings["epochs"])
        recipe |= {"validation": None, "attack": None} | ({"steps": 1} if smoke else {})
        network = ja.models.model(ja.train.trained(recipe["trainable"], ja.fit(key, **recipe)))
        note("clean %", ja.robust(network(x), y))
        threat = semantic(parts[-settings["components"] :], shape)
        for order in ("fixed", "random", "scheduled"):
            attack = attacks.composite(threat, order=order, outer=settings["outer"], inner=settings["inner"])
            broken = go(attack, key, behind(threat, network), threat.pack(x), jnp.asarray(y))
            note(f"{order}: accuracy %", ~np.asarray(broken))
        each = []
        three = semantic(parts[2:5], shape)
        attack = attacks.composite(three, order="fixed", outer=settings["outer"], inner=settings["inner"])
        for order in itertools.islice(itertools.permutations(range(3)), settings["orders"]):
            each.append(np.asarray(go(attack, key, behind(three, network), three.pack(x, order), jnp.asarray(y))))
        note("three components: broken in some order %", np.any(each, axis=0))
        note("three components: broken in every order %", np.all(each, axis=0))
    return numbers


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: order matters for a point of the images or more; scheduled is below fixed and random in every seed."""
    mean = {key: float(np.mean(values)) for key, values in numbers.items()}
    some, every = (mean[f"three components: broken in {which} order %"] for which in ("some", "every"))
    matters = some - every >= 1
    scheduled = np.array(numbers["scheduled: accuracy %"])
    stronger = all(np.all(scheduled < np.array(numbers[f"{name}: accuracy %"])) for name in ("fixed", "random"))
    word = "holds" if matters and stronger else "holds in part" if matters or stronger else "does not hold here"
    listed = ", ".join(f"{name} {mean[f'{name}: accuracy %']:.1f} %" for name in ("fixed", "random", "scheduled"))
    return word, (
        f"accuracy under attack with the order {listed} (clean {mean['clean %']:.1f} %); of three components "
        f"{some:.1f} % of the images break in some order and {every:.1f} % in every one"
    )
