"""Claim: keeping the logits of attacked examples near the clean ones flattens the loss and narrows the robust gap.

MNIST, `cnn_small`, linf, few training images and many epochs, so that PGD training overfits. Arms (see `arms`), all
with a search of equal length: PGD training (the reduced objective, no weight on the term), the term over all logits,
and over the largest tenth of the batch as published. The gap is between training and test images under one PGD. Flat:
by how much the loss rises from a test image to what PGD finds, and how far input gradients near a test image point
elsewhere (free of the scale of logits).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jaxadv as ja
from benchmarks.claims import arms, framework

CLAIM = {
    "sentence": "Penalizing the largest changes of logits under attack flattens the loss around the input and narrows "
    "the gap between robust accuracy on training and on test images.",
    "source": "Li and Spratling 2023, Understanding and combating robust overfitting via input loss landscape analysis "
    "and regularization, arXiv:2212.04985",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 8,
    "settings": arms.SETTINGS | {"train": 1_000, "epochs": 100, "weight": 0.3, "top": 0.1},
    "smoke": arms.SMOKE,
}
ARMS = ("PGD", "all logits", "AdvLC")
RISE, TURN = "rise of the loss, hundredths", "misalignment, hundredths"


def _arms(shared: arms.Setup) -> dict[str, dict[str, Any]]:
    settings = shared.settings
    tops = {"all logits": 1.0, "AdvLC": settings["top"]}
    made: dict[str, Any] = {"PGD": ja.train.pgd_at(shared.inner, growth=shared.growth)}
    made |= {
        arm: ja.train.advlc(shared.inner, weight=settings["weight"], top=top, growth=shared.growth)
        for arm, top in tops.items()
    }
    return {arm: {"objective": objective} for arm, objective in made.items()}


@partial(jax.jit, static_argnames=("apply",))
def _flat(key, apply, params, state, x, y, attack):
    """How much the loss rises under the attack, and how far gradients turn, in the mean example."""
    index = jnp.arange(len(y))
    model = ja.train.frozen(apply, params, state)
    found = attack.run(key, model, x, y, index=index).x
    rise = ja.losses.cross_entropy(model(found), y) - ja.losses.cross_entropy(model(x), y)
    turn = ja.train.terms.alignment(attack.threat, bn="eval")
    return rise.mean(), turn(apply, params, state, {"x": x, "y": y, "index": index}, key).mean()


def _judged(shared: arms.Setup, made: framework.Trained, seed: int) -> dict[str, float]:
    found = arms.overfitting(shared, made, seed)
    if shared.smoke:
        return found | {RISE: 0.0, TURN: 0.0}
    net, (x, y) = made.net, shared.test.all()
    both = _flat(jax.random.key(seed), net.apply, net.params, net.state, x, y, shared.judge)
    return found | {what: 100 * float(value) for what, value in zip((RISE, TURN), both)}


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train and judge; percent of the test images, and of the training images."""
    return arms.run(settings, seeds, smoke, _arms, _judged)


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: a narrower gap, clear of zero; a flatter loss by both measures; no robust accuracy lost."""
    narrower, lower, straighter = (arms.gain(numbers, "PGD", "AdvLC", what) for what in (arms.GAP, RISE, TURN))
    robust = arms.gain(numbers, "AdvLC", "PGD")
    return arms.word(arms.learned(numbers) and narrower[1] > 0, lower[1] > 0 and straighter[1] > 0, robust[0] >= 0), (
        arms.told(numbers, ARMS, arms.CLEAN, arms.AUTO, arms.TRAINING, arms.GAP, RISE, TURN)
        + f"; AdvLC's gap is narrower by {arms.signed(narrower)} points, its robust accuracy under AutoAttack differs "
        f"by {arms.signed(robust)}"
    )
