"""Claim: three textbook defenses resist PGD and fall to attacks that are told of them.

Each defense stands around the same networks, trained without attacks: (1) rounding to few levels, which has no
gradient; (2) strong noise at each query, then rounding; (3) a detector that rejects inputs whose features lie far from
all training examples of the predicted class, with a fixed rate of false alarms on the validation images. PGD is run on
each as it is (for the detector: on the network, as one does who does not know of it); the adapted attacks have the same
budget and steps and use BPDA, EOT around BPDA, and the margin loss on the rejecting model aimed at each class. Accuracy
under attack counts rejected inputs as defended; random models are judged by fresh draws. The undefended network under
the same PGD says what there was to be found.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import jaxadv as ja

CLAIM = {
    "sentence": "Defenses that resist a standard attack by masking gradients, by randomness or by detection fall to "
    "attacks adapted to them.",
    "source": "Tramèr, Carlini, Brendel and Madry 2020, On adaptive attacks to adversarial example defenses, "
    "arXiv:2002.08347",
    "tier": "digits",
    "seeds": (0, 1, 2),
    "minutes": 3,
    "settings": {
        "eps": 0.15,
        "epochs": 30,
        "steps": 40,
        "levels": 8,
        "noise": 0.3,
        "draws": 16,
        "judging_draws": 100,
        "false_alarms": 0.05,
        "test": 300,
    },
    "smoke": {"epochs": 1, "steps": 1, "draws": 2, "judging_draws": 2, "test": 10},
}


def rounded(levels, x):
    """Round to so many levels."""
    return jnp.round(x * (levels - 1)) / (levels - 1)


def drowned(sigma, x, *, keys):
    """Add noise."""
    return x + sigma * jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)


def drowned_and_rounded(levels, sigma, x, *, keys):
    """Add noise, then round."""
    return rounded(levels, drowned(sigma, x, keys=keys))


def oddity(network, nearest, x):
    """The detector: distance of the features to the nearest training example of the predicted class."""
    said = jax.nn.one_hot(jnp.argmax(network(x), axis=-1), 10)
    return -jnp.sum(said * nearest(x), axis=-1)


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train without attacks, defend, attack; percent of the test images."""
    from jaxadv import attacks

    train, held = ja.data.load("digits"), ja.data.load("digits", "validation")
    test = ja.data.evaluation_subset(ja.data.load("digits", "test"), settings["test"])
    x, y = test.all()
    threat, numbers = ja.linf(settings["eps"]), {}
    attack = ja.pgd(threat, steps=settings["steps"])
    margin = ja.pgd(threat, steps=settings["steps"], loss=ja.losses.margin)
    go = jax.jit(lambda attack, key, model, x, y: attack.run(key, model, x, y).x)

    def note(name, share):
        numbers.setdefault(name, []).append(100 * float(np.mean(np.asarray(share))))

    for seed in seeds:
        key = jax.random.key(seed)
        recipe = ja.recipes.standard_digits(train, seed=seed, epochs=settings["epochs"])
        recipe |= {"validation": None, "attack": None} | ({"steps": 1} if smoke else {})
        trained = ja.train.trained(recipe["trainable"], ja.fit(key, **recipe))
        network = ja.models.model(trained)
        found = go(attack, key, network, x, y)
        note("no defense: clean %", ja.robust(network(x), y))
        note("no defense: PGD %", ja.robust(network(found), y))

        rounding = Partial(rounded, settings["levels"])
        masked, adapted = attacks.preprocessed(network, rounding), attacks.bpda(network, rounding)
        note("rounding: clean %", ja.robust(masked(x), y))
        note("rounding: PGD %", ja.robust(masked(go(attack, key, masked, x, y)), y))
        note("rounding: adapted %", ja.robust(masked(go(attack, key, adapted, x, y)), y))

        noise, soft = (
            Partial(drowned_and_rounded, settings["levels"], settings["noise"]),
            Partial(drowned, settings["noise"]),
        )
        random = attacks.preprocessed(network, noise)
        once = attacks.eot(random, key, samples=1)
        many = attacks.eot(attacks.bpda(network, noise, soft), key, samples=settings["draws"])
        fresh = jax.random.key(1000 + seed)

        def survives(points, random=random, fresh=fresh):
            return attacks.survival(fresh, random, points, y, samples=settings["judging_draws"])

        note("noise: clean %", survives(x))
        note("noise: PGD %", survives(go(attack, key, once, x, y)))
        note("noise: adapted %", survives(go(attack, key, many, x, y)))

        nearest = attacks.matched(ja.models.features(trained, at="dense2:in"), *train.all(), classes=10)
        detector = Partial(oddity, network, nearest)
        threshold = float(jnp.quantile(detector(held.all()[0]), 1 - settings["false_alarms"]))
        guarded = attacks.rejecting(network, detector, threshold=threshold, factor=1 / threshold)
        swept = jax.jit(lambda k, m: attacks.sweep(margin, k, m, x, y, classes=10).x)(key, guarded)

        def defended(points, guarded=guarded):
            said = np.asarray(guarded(points)).argmax(-1)
            return (said == y) | (said == 10)

        note("detector: clean %", ja.robust(guarded(x), y))
        note("detector: PGD %", defended(found))
        note("detector: adapted %", defended(swept))
    return numbers


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge each defense: PGD leaves half of the clean accuracy or more, the adapted attack less than a third of it."""
    mean = {key: float(np.mean(values)) for key, values in numbers.items()}
    clean = mean["no defense: clean %"]
    resists, falls, parts = [], [], []
    for name in ("rounding", "noise", "detector"):
        pgd, adapted = mean[f"{name}: PGD %"], mean[f"{name}: adapted %"]
        resists.append(pgd >= clean / 2)
        falls.append(adapted < clean / 3)
        parts.append(f"{name} {pgd:.1f} % under PGD, {adapted:.1f} % under the adapted attack")
    good = sum(a and b for a, b in zip(resists, falls))
    word = "holds" if good == 3 else "holds in part" if good or all(falls) else "does not hold here"
    return word, f"undefended {clean:.1f} %, {mean['no defense: PGD %']:.1f} % under PGD; " + "; ".join(parts)
