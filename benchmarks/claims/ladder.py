"""Claim: examples moved across class borders in latent space train networks that keep clean accuracy and are robust.

MNIST, `cnn_small`. For each seed a network is trained without attacks; a decoder learns to undo its last hidden layer;
what separates the latents of each two classes is fitted; and the network is trained on with decoded examples that climb
across these borders (LADDER). Beside it the network that is trained on for as long with the examples alone, and one
that is trained on against PGD. AutoAttack (the protocol `fast`) at a small budget judges robustness in input space,
which none but the last was trained for; the third measure is the accuracy on test images that climbed on the first
network.
"""

from typing import Any

import jax
import numpy as np
import optax

import jaxadv as ja
from benchmarks.claims import framework

CLAIM = {
    "sentence": "Training on examples that are moved across class borders in latent space and decoded makes a network "
    "robust with a better trade-off against clean accuracy than adversarial training in input space.",
    "source": "Zhou, Tsang and Yin 2022, LADDER: latent boundary-guided adversarial training, arXiv:2206.03717",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 20,
    "settings": {
        "data": "mnist",
        "eps": 0.1,
        "train": 5_000,
        "epochs": 10,
        "decoder_epochs": 40,
        "pgd_steps": 5,
        "lengths": (0.5, 2.0, 5.0, 10.0, 15.0, 20.0, 25.0),
        "separated": 200,
        "attend": True,
        "test": 500,
        "judge": "fast",
    },
    "smoke": {
        "data": "digits",
        "train": 100,
        "epochs": 1,
        "decoder_epochs": 1,
        "pgd_steps": 1,
        "separated": 5,
        "test": 10,
    },
}
ARMS = ("trained on", "LADDER", "PGD")


def _decoder(encoder, data, seed: int, settings: dict[str, Any], smoke: bool):
    """A perceptron that learns to undo the encoder."""
    width, pixels = encoder(data.all()[0][:1]).shape[-1], int(np.prod(data.shape))
    net = ja.models.create("mlp", jax.random.key(2000 + seed), shape=(width,), classes=pixels, widths=(256, 512))
    steps = 1 if smoke else settings["decoder_epochs"] * ja.data.steps_per_epoch(len(data), 100)
    objective = ja.train.latent.reconstruction(encoder)
    optimizer = optax.adam(ja.train.schedules.triangular(2e-3, steps, peak=0.1))
    state = ja.fit(jax.random.key(seed), net, objective, optimizer, data, steps=steps, batch_size=100)
    return ja.models.model(ja.train.trained(net, state))


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train, undo, separate, climb and judge; percent of the test images."""
    threat = ja.linf(settings["eps"])
    whole, held, test = (ja.data.load(settings["data"], split) for split in ("train", "validation", "test"))
    data, test = ja.data.evaluation_subset(whole, settings["train"]), ja.data.evaluation_subset(test, settings["test"])
    common = {"validation": held, "epochs": settings["epochs"]} | ({"steps": 1} if smoke else {})
    judge = ja.pgd(threat, steps=1) if smoke else settings["judge"]
    x, y = data.all()
    shown, labels = test.all()
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        first = framework.train(ja.recipes.standard_mnist, data, seed, **common)
        encoder = ja.models.features(first.net, at="dense2:in")
        decoder = _decoder(encoder, data, seed, settings, smoke)
        fitted = ja.train.latent.separators(
            jax.random.key(seed),
            encoder(x),
            y,
            classes=data.classes,
            most=settings["separated"],
            attend=settings["attend"],
        )
        climb = ja.train.climb(encoder, decoder, fitted, eps=settings["lengths"])
        moved = jax.jit(climb.run)(jax.random.key(seed), first.model, shown, labels)
        objectives = {
            "trained on": ja.train.standard(),
            "LADDER": ja.train.ladder(climb),
            "PGD": ja.train.pgd_at(ja.pgd(threat, steps=settings["pgd_steps"], keep="last")),
        }
        for arm in ARMS:
            more = {"trainable": first.net, "objective": objectives[arm], "lr_max": 2e-3}
            made = framework.train(ja.recipes.standard_mnist, data, 10 + seed, **common, **more)
            clean, robust = framework.accuracies(made.model, test, threat, judge, seed)
            kept = 100 * float(np.mean(np.asarray(ja.robust(made.model(moved.x), labels))))
            found = {"clean %": clean, "AutoAttack, robust %": robust, "climbed, robust %": kept}
            for what, value in found.items():
                numbers.setdefault(f"{arm}: {what}", []).append(value)
        numbers.setdefault("first network: climbs that break it, %", []).append(100 * float(np.mean(moved.success)))
    return numbers


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: clean accuracy above PGD's, and a robust gain over more training that is at least half of PGD's."""
    mean = {key: float(np.mean(values)) for key, values in numbers.items()}
    gain, low, high = framework.gain(numbers, "LADDER: AutoAttack, robust %", "trained on: AutoAttack, robust %")
    most = framework.gain(numbers, "PGD: AutoAttack, robust %", "trained on: AutoAttack, robust %")[0]
    clean = framework.gain(numbers, "LADDER: clean %", "PGD: clean %")[0]
    own = framework.gain(numbers, "LADDER: climbed, robust %", "trained on: climbed, robust %")[1] > 0
    gains = low > 0
    word = "does not hold here"
    if gains or own:
        word = "holds" if gains and clean >= 0 and gain >= most / 2 else "holds in part"
    three = "; ".join(
        f"{what.removesuffix(' %').removesuffix(',')} " + ", ".join(f"{mean[f'{arm}: {what}']:.1f}" for arm in ARMS)
        for what in ("clean %", "AutoAttack, robust %", "climbed, robust %")
    )
    return word, (
        f"percent for {', '.join(ARMS)}: {three}; LADDER's robust gain {gain:+.1f} ({low:+.1f} to {high:+.1f}) points "
        f"against {most:+.1f} of PGD"
    )
