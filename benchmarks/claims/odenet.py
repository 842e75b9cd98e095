"""Claim: a network whose block is solved resists noise and attacks better than the residual network of equal weights.

MNIST, linf. The residual network is the same network with one Euler step and a field without time: a residual block.
Both are trained alike on clean images, and briefly, so the budget of PGD is below the paper's. Judged by the paper's
attacks (one FGSM step, PGD with 10 steps) and by the worst case of the protocol `ode` with small budgets: many steps,
restarts, gradients of other grids, Square.
"""

from typing import Any

import jax
import numpy as np

import jaxadv as ja
from benchmarks.claims import framework
from jaxadv import continuous
from jaxadv.evaluate import odes

CLAIM = {
    "sentence": "Trained alike on clean images, an ODE network classifies noisy and attacked images better than a "
    "convolutional network with the same parameters.",
    "source": "Yan, Du, Tan and Feng 2020, On robustness of neural ordinary differential equations, arXiv:1910.05513",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 20,
    "settings": {
        "data": "mnist",
        "channels": 16,
        "stem": 2,
        "train": 2_000,
        "epochs": 8,
        "steps": 10,
        "test": 200,
        "eps": (0.15, 0.3),
        "pgd": 0.1,
        "noise": 100 / 255,
        "search": 30,
        "queries": 500,
        "grids": (("rk4", 4), ("euler", 16)),
    },
    "smoke": {"data": "digits", "channels": 4, "stem": 1, "train": 100, "epochs": 1, "steps": 2, "test": 8,
              "search": 1, "queries": 2, "grids": ()},
}  # fmt: skip
ARMS = {"residual": {"time": False, "steps": 1}, "ODE": {"time": True, "steps": None}}
JUDGED = ("noise %", "FGSM 0.15 %", "FGSM 0.3 %", "PGD %", "worst case %")


def network(settings: dict[str, Any], data: Any, seed: int, *, time: bool, steps: int | None) -> Any:
    """A network of `odenet_tis` with so many Euler steps."""
    cfg = {"method": "euler", "mode": "fixed", "n_steps": steps or settings["steps"]}
    options = {"channels": settings["channels"], "stem": settings["stem"], "time": time, "cfg": cfg}
    return continuous.create(
        "odenet_tis", jax.random.key(1000 + seed), shape=data.shape, classes=data.classes, **options
    )


def trained(settings: dict[str, Any], data: Any, held: Any, seed: int, smoke: bool, net: Any, objective: Any) -> Any:
    """Train on clean images with the optimizer of TisODE."""
    steps = 1 if smoke else settings["epochs"] * ja.data.steps_per_epoch(len(data), 100)
    common = {"validation": held, "steps": steps, "batch_size": 100, "trainable": net, "objective": objective}
    return framework.train(ja.recipes.tisode_mnist, data, seed, **common).net


def sources(settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Training, validation and test examples."""
    whole, held, test = (ja.data.load(settings["data"], split) for split in ("train", "validation", "test"))
    return ja.data.evaluation_subset(whole, settings["train"]), held, ja.data.evaluation_subset(test, settings["test"])


def protocol(settings: dict[str, Any]) -> tuple:
    """The protocol `ode` with small budgets."""
    found = odes.stages(
        "linf", steps=settings["search"], restarts=1, grids=settings["grids"], tolerances=(), spsa_samples=0, version=""
    )
    found = found if settings["grids"] else found[:1]
    return (*found, ja.evaluate.Stage("square", (("queries", settings["queries"]),)))


def judged(settings: dict[str, Any], model: Any, test: Any, seed: int) -> dict[str, float]:
    """Accuracies in percent: clean, with noise, under the paper's attacks, and in the worst case."""
    x, y = test.all()
    noisy = np.clip(x + settings["noise"] * np.random.default_rng(seed).normal(size=x.shape), 0, 1).astype(np.float32)
    out = {"noise %": 100 * float(np.mean(ja.evaluate.logits_of(model, noisy).argmax(-1) == y))}
    for eps in settings["eps"]:
        found = framework.accuracies(model, test, ja.linf(eps), ja.fgsm(ja.linf(eps)), seed)
        out |= {"clean %": found[0], f"FGSM {eps:g} %": found[1]}
    threat = ja.linf(settings["pgd"])
    short = ja.pgd(threat, steps=min(10, settings["search"]), step_size=threat.eps / 5)
    out["PGD %"] = framework.accuracies(model, test, threat, short, seed)[1]
    out["worst case %"] = framework.accuracies(model, test, threat, protocol(settings), seed)[1]
    return out


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train both and judge both."""
    data, held, test = sources(settings)
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        for arm, kind in list(ARMS.items())[1 if smoke else 0 :]:
            net = trained(settings, data, held, seed, smoke, network(settings, data, seed, **kind), ja.train.standard())
            for what, value in judged(settings, continuous.ode_model(net), test, seed).items():
                numbers.setdefault(f"{arm}: {what}", []).append(value)
    return framework.filled(numbers, ARMS)


def compare(numbers: dict[str, list[float]], better: str, base: str) -> tuple[str, str]:
    """Judge one arm against another: all gains clear of zero, the worst case too; some; none."""
    gains = {what: framework.gain(numbers, f"{better}: {what}", f"{base}: {what}") for what in JUDGED}
    clear = [what for what, (_, low, _) in gains.items() if low > 0]
    worst = float(np.mean(numbers[f"{better}: worst case %"]))
    word = "does not hold here" if not clear else "holds" if len(clear) == len(gains) else "holds in part"
    told = ", ".join(
        f"{what[:-2]} {mean:+.1f} ({low:+.1f} to {high:+.1f})" for what, (mean, low, high) in gains.items()
    )
    return word, f"{better} over {base}, points: {told}; worst case {worst:.1f} % of {better}"


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge the gains of the ODE network."""
    return compare(numbers, "ODE", "residual")
