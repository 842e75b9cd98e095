"""Claim: hidden pixels, a wide stride with a smooth activation, or a decayed first layer keep FGSM from collapsing.

MNIST, `cnn_small`, linf at a budget where FGSM from the clean point collapses. Arms (see `arms`): FGSM as it is; PGD,
the level to reach; and FGSM with a random share of the pixels hidden, with a smooth activation, with the squared
weights of the first layer as a penalty. The network's first convolution has stride 2 in all arms, so the first arm is
the control of the second trick: the stride alone. An arm has collapsed with a seed where AutoAttack leaves it less than
half of what it leaves PGD's network in the mean.
"""

from typing import Any

import jax
import jax.numpy as jnp

import jaxadv as ja
from benchmarks.claims import arms

CLAIM = {
    "sentence": "Each of three tricks alone keeps FGSM training from collapsing: to hide pixels, a wide stride with a "
    "smooth activation, to penalize the weights of the first layer.",
    "source": "Li et al. 2022, Bag of tricks for FGSM adversarial training, arXiv:2209.02684",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 10,
    "settings": arms.SETTINGS | {"hide": 0.4, "decay": 0.01},
    "smoke": arms.SMOKE,
}
TRICKS = ("hidden pixels", "stride and smooth", "first layer")
ARMS = ("FGSM", "PGD", *TRICKS)


def _first_layer(params) -> jax.Array:
    """The sum of squares of the first kernel that the input meets."""
    found = jax.tree_util.tree_leaves_with_path(params)
    kernels = {jax.tree_util.keystr(path): leaf for path, leaf in found if leaf.ndim > 1}
    return jnp.sum(jnp.square(kernels[min(kernels)]))


def _arms(shared: arms.Setup) -> dict[str, dict[str, Any]]:
    growth: dict[str, Any] = {"growth": shared.growth}
    fgsm, decay = ja.train.fgsm_at(shared.threat, **growth), shared.settings["decay"]
    smooth = shared.settings["network"] | {"activation": "silu"}
    return {
        "FGSM": {"objective": fgsm},
        "PGD": {"objective": ja.train.pgd_at(shared.inner, **growth)},
        "hidden pixels": {"objective": ja.train.masked(fgsm, shared.settings["hide"])},
        "stride and smooth": {"objective": fgsm, "network": smooth},
        "first layer": {"objective": ja.train.plus(fgsm, ja.train.terms.of_weights(_first_layer), decay)},
    }


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train and judge; percent of the test images."""
    return arms.run(settings, seeds, smoke, _arms)


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: FGSM collapses with each seed; a trick helps where its gain is clear of zero and no seed collapses."""
    half = arms.mean(numbers, "PGD", arms.AUTO) / 2
    kept = {arm: sum(v >= half for v in numbers[f"{arm}: {arms.AUTO}"]) for arm in ARMS if arm != "PGD"}
    gains = {arm: arms.gain(numbers, arm, "FGSM") for arm in TRICKS}
    seeds = len(numbers[f"FGSM: {arms.AUTO}"])
    helps = [kept[arm] == seeds and gains[arm][1] > 0 for arm in TRICKS]
    return arms.word(arms.learned(numbers) and kept["FGSM"] == 0 and any(helps), all(helps)), (
        arms.told(numbers, ARMS, arms.CLEAN, arms.AUTO)
        + f"; seeds of {seeds} that do not collapse: "
        + ", ".join(f"{arm} {count}" for arm, count in kept.items())
        + "; over FGSM: "
        + ", ".join(f"{arm} {arms.signed(gain)}" for arm, gain in gains.items())
    )
