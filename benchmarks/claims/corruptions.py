"""Claim: a network that withstands the worst small perturbation need not withstand changes that no adversary chose.

MNIST. A network trained against PGD in an linf ball, one trained without attacks, and one trained on uniform noise in
the same ball, which tells what noise alone would do. Each is shown the fifteen common corruptions at five severities
(the settings for small images) and the rest of Borji's card: the worst of a grid of rotations and shifts, gray squares,
shuffled patches, outlines, silhouettes. That the one is robust in the ball and the other is not is the premise, and is
measured, too. The claim falls if the robust network is as accurate as the standard one under every corruption, and if
none takes more from it than the adversary does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import jaxadv as ja
from benchmarks.claims import framework

CLAIM = {
    "sentence": "Networks that are robust in an lp ball are not robust to all common corruptions: under some they are "
    "less accurate than networks trained without attacks.",
    "source": "Borji 2022, Is current research on adversarial robustness addressing the right problem?, "
    "arXiv:2208.00539; the corruptions are those of Hendrycks and Dietterich 2019, arXiv:1903.12261",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 12,
    "settings": {
        "data": "mnist",
        "eps": 0.3,
        "train": 10_000,
        "epochs": 10,
        "test": 500,
        "judge_steps": 50,
        "corruptions": "benchmark",
        "rotations": (-30, -15, 0, 15, 30),
        "shifts": (-0.1, 0.0, 0.1),
    },
    "smoke": {
        "data": "digits",
        "train": 100,
        "epochs": 1,
        "test": 10,
        "judge_steps": 1,
        "corruptions": "contrast",
        "rotations": (15,),
        "shifts": (0.1,),
    },
}
STANDARD, NOISE, ROBUST = "standard", "trained on noise", "PGD-trained"
ATTACKED = "linf attack %"


def within(eps, key, x):
    """Add uniform noise of at most `eps` to an image in [0, 1]."""
    return jnp.clip(x + jax.random.uniform(key, x.shape, minval=-eps, maxval=eps), 0, 1)


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train, attack, and measure the cards; percent of the test images."""
    whole, held, test = (ja.data.load(settings["data"], split) for split in ("train", "validation", "test"))
    data, test = ja.data.evaluation_subset(whole, settings["train"]), ja.data.evaluation_subset(test, settings["test"])
    x, y = test.all()
    threat, chosen = ja.linf(settings["eps"]), settings["corruptions"]
    attack = ja.pgd(threat, steps=settings["judge_steps"], loss=ja.losses.margin)
    go = jax.jit(lambda key, model: attack.run(key, model, x, y, index=test.index).success)
    names = ja.corruptions.BENCHMARK if chosen == "benchmark" else tuple(chosen.split(","))
    card = {"names": names, "index": test.index, "grid": {"scales": (1.0,)}}
    card["grid"] |= {name: settings[name] for name in ("rotations", "shifts")}
    card |= {"sides": (0.5,), "patches": (2,)} if smoke else {}
    arms = {
        STANDARD: (ja.recipes.standard_mnist, {}),
        NOISE: (ja.recipes.standard_mnist, {"augment": Partial(within, settings["eps"])}),
        ROBUST: (ja.recipes.fast_mnist, {"eps": settings["eps"]} | ({"attack_steps": 1} if smoke else {})),
    }
    common = {"validation": held, "epochs": settings["epochs"]} | ({"steps": 1} if smoke else {})
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        for arm, (recipe, own) in arms.items():
            key, model = jax.random.key(seed), framework.train(recipe, data, seed, **common | own).model
            kept = 1 - float(np.mean(np.asarray(go(key, model))))
            found = ja.evaluate.report_card(key, model, x, y, **card)
            for what, share in [(ATTACKED.removesuffix(" %"), kept), *found.rows()]:
                numbers.setdefault(f"{arm}: {what} %", []).append(100 * share)
    return numbers


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: under some corruption below the standard network, and under some below what the adversary leaves.

    Below means in each seed, and by a point or more in the mean. The premise is that the attack leaves half of the
    images or more to the network trained against it, and a tenth at most to the standard one; without it nothing holds.
    """

    def of(arm, what):
        return np.asarray(numbers[f"{arm}: {what}"])

    def below(less, more):
        return bool(np.all(less < more) and np.mean(more - less) >= 1)

    left = {arm: of(arm, ATTACKED).mean() for arm in (STANDARD, NOISE, ROBUST)}
    premise = bool(left[ROBUST] >= 50 and left[STANDARD] <= 10)
    words = [name.replace("_", " ") + " %" for name in ja.corruptions.BENCHMARK]
    words = [what for what in words if f"{ROBUST}: {what}" in numbers]
    worse = [what for what in words if below(of(ROBUST, what), of(STANDARD, what))]
    fallen = [what for what in words if below(of(ROBUST, what), of(ROBUST, ATTACKED))]
    word = "does not hold here"
    if premise and (worse or fallen):
        word = "holds" if worse and fallen else "holds in part"

    pairs = (f"{w[:-2]} ({of(ROBUST, w).mean():.1f} against {of(STANDARD, w).mean():.1f} %)" for w in worse)
    means = ", ".join(f"{arm} {of(arm, 'corruptions, mean %').mean():.1f} %" for arm in (STANDARD, NOISE, ROBUST))
    return word, (
        f"{left[ROBUST]:.1f} % right under the linf attack (standard {left[STANDARD]:.1f} %, trained on noise "
        f"{left[NOISE]:.1f} %); under corruptions, mean: {means}; below the standard network under "
        f"{', '.join(pairs) or 'none'}; below what the attack leaves under "
        f"{', '.join(w[:-2] for w in fallen) or 'none'}"
    )
