"""Claim: an ODE network that averages over a random end time is more robust to attacks than one with a fixed time.

MNIST, linf. NODE, LT-NODE and ALT-NODE of one architecture, trained alike on clean images. The paper attacks with few
steps and judges the averaged prediction with samples of its own; here every network is also judged by the worst case of
attacks on the exact average over the end time (by quadrature, which no draw can help), PGD through draws (expectation
over transformation), and Square.
"""

from typing import Any

import jax
import numpy as np

import jaxadv as ja
from benchmarks.claims import framework, odenet
from jaxadv import attacks, continuous

CLAIM = {
    "sentence": "Networks that average over a latent end time (LT-NODE, ALT-NODE) are more robust to attacks than the "
    "ODE network with a fixed end time.",
    "source": "Anumasa and Srijith 2022, Latent time neural ordinary differential equations, arXiv:2112.12728",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 20,
    "settings": odenet.CLAIM["settings"]
    | {"epochs": 6, "test": 100, "until": 3.0, "times": 5, "points": 8, "draws": 8},
    "smoke": odenet.CLAIM["smoke"] | {"times": 1, "points": 2, "draws": 1},
}
ARMS = ("NODE", "LT-NODE", "ALT-NODE")
JUDGED = ("FGSM 0.15 %", "FGSM 0.3 %", "worst case %")


def network(settings: dict[str, Any], data: Any, seed: int, arm: str) -> tuple[Any, Any]:
    """The trainable of an arm, and its objective."""
    net = odenet.network(settings, data, seed, time=True, steps=None)
    if arm == "NODE":
        return net, ja.train.standard()
    cfg = continuous.SolveCfg("euler", "fixed", t1=settings["until"], n_steps=settings["steps"])
    options = {"channels": settings["channels"], "stem": settings["stem"]}
    encoder = continuous.time_encoder(jax.random.key(seed), shape=data.shape, **options)
    made = continuous.lt_node(net, cfg, points=settings["points"], encoder=encoder if arm == "ALT-NODE" else None)
    return made, continuous.latent_time(estimator="quadrature", n_samples=settings["times"], kl_weight=1 / len(data))


def judged(settings: dict[str, Any], net: Any, arm: str, test: Any, seed: int) -> dict[str, float]:
    """Accuracies in percent: clean, under one step with draws of its own, and in the worst case."""
    out, exact = {}, ja.models.model(net)
    drawn = exact
    if arm != "NODE":
        drawn = attacks.eot(
            continuous.sampled(net, settings["draws"]), jax.random.key(seed), samples=1, mean="probabilities"
        )
    for eps in settings["eps"]:
        clean, robust = framework.accuracies(drawn, test, ja.linf(eps), ja.fgsm(ja.linf(eps)), seed)
        out |= {"clean %": clean, f"FGSM {eps:g} %": robust}
    threat = ja.linf(settings["pgd"])
    found = [ja.evaluate.Stage("pgd", (("steps", settings["search"]),))]
    if settings["grids"]:
        found.append(ja.evaluate.Stage("apgd_dlr", (("steps", settings["search"]),)))
    if settings["grids"] and arm != "NODE":
        found.append(ja.evaluate.Stage(lambda threat: attacks.transfer(threat, drawn, name="through draws")))
    found.append(ja.evaluate.Stage("square", (("queries", settings["queries"]),)))
    out["worst case %"] = framework.accuracies(exact, test, threat, tuple(found), seed)[1]
    return out


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train the three, and judge them."""
    data, held, test = odenet.sources(settings)
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        for arm in ARMS[2 if smoke else 0 :]:
            net, objective = network(settings, data, seed, arm)
            net = odenet.trained(settings, data, held, seed, smoke, net, objective)
            for what, value in judged(settings, net, arm, test, seed).items():
                numbers.setdefault(f"{arm}: {what}", []).append(value)
    return framework.filled(numbers, ARMS)


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge both against the fixed end time: gains clear of zero in the paper's attack and in the worst case."""
    won, parts = [], []
    for arm in ARMS[1:]:
        gains = {what: framework.gain(numbers, f"{arm}: {what}", f"NODE: {what}") for what in JUDGED}
        won += [low > 0 for _, low, _ in gains.values()]
        told = (f"{what[:-2]} {mean:+.1f} ({low:+.1f} to {high:+.1f})" for what, (mean, low, high) in gains.items())
        parts.append(f"{arm} over NODE: {', '.join(told)}")
    level = float(np.mean(numbers["NODE: worst case %"]))
    word = "holds" if all(won) else "holds in part" if any(won) else "does not hold here"
    return word, f"{'; '.join(parts)}; worst case of NODE {level:.1f} %"
