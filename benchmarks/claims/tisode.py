"""Claim: a field without time whose motion after the answer is penalized makes an ODE network more robust.

MNIST, linf. The same ODE network without and with TisODE's loss, trained alike on clean images; judged by the paper's
attacks and by the worst case of the protocol `ode`, as in `odenet`.
"""

from typing import Any

import jaxadv as ja
from benchmarks.claims import framework, odenet
from jaxadv import continuous

CLAIM = {
    "sentence": "TisODE, a time-invariant field with a steady-state penalty, classifies noisy and attacked images "
    "better than the ODE network without them.",
    "source": "Yan, Du, Tan and Feng 2020, On robustness of neural ordinary differential equations, arXiv:1910.05513",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 20,
    "settings": odenet.CLAIM["settings"] | {"weight": 0.1, "window": (1.0, 1.5)},
    "smoke": odenet.CLAIM["smoke"],
}


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train without and with the penalty, and judge both."""
    data, held, test = odenet.sources(settings)
    arms = {
        "ODE": (True, ja.train.standard()),
        "TisODE": (False, continuous.tisode(settings["weight"], window=tuple(settings["window"]))),
    }
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        for arm, (time, objective) in list(arms.items())[1 if smoke else 0 :]:
            net = odenet.network(settings, data, seed, time=time, steps=None)
            net = odenet.trained(settings, data, held, seed, smoke, net, objective)
            for what, value in odenet.judged(settings, continuous.ode_model(net), test, seed).items():
                numbers.setdefault(f"{arm}: {what}", []).append(value)
    return framework.filled(numbers, arms)


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge the gains of TisODE."""
    return odenet.compare(numbers, "TisODE", "ODE")
