"""Claim: few-shot segmentation by a neural ODE with consistent features withstands attacks, trained on clean images.

Synthetic organs (the generator is `continuous.phantoms`), one way, one shot; two organs in training, the third is
novel. Three arms for each seed, of the same weights, optimizer and number of episodes: the block as one residual step,
the ODE block (PNODE), and the ODE block with the losses of clusters and consistency (R-PNODE). Queries are attacked as
in the paper (FGSM, and BIM whose five steps cannot reach the budget), and in the worst case, image by image, over
these, long PGD with restarts, the dense adversary and SMIA. Steps of the solver are fixed, so gradients are exact.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxadv as ja
from benchmarks.claims import framework
from jaxadv.continuous import SolveCfg, prototypes

CLAIM = {
    "sentence": "Neural-ODE prototypes with cluster and consistency losses segment novel organs from few examples more "
    "robustly, without adversarial training.",
    "source": "Pandey et al. 2022, Robust prototypical few-shot organ segmentation with regularized neural-ODEs, "
    "arXiv:2208.12428",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 15,
    "settings": {
        "size": 32,
        "channels": (8, 16, 32),
        "layers": 2,
        "t1": 4.0,
        "solver steps": 8,
        "episodes": 400,
        "rate": 3e-3,
        "noise": 0.1,
        "eps": 0.035,
        "steps": 100,
        "restarts": 3,
        "test episodes": 10,
        "queries": 4,
    },
    "smoke": {
        "size": 16,
        "channels": (4, 4),
        "layers": 1,
        "solver steps": 1,
        "episodes": 1,
        "steps": 1,
        "restarts": 1,
        "test episodes": 1,
        "queries": 1,
    },
}
ARMS = {"residual": (False, (0.0, 0.0)), "PNODE": (True, (0.0, 0.0)), "R-PNODE": (True, (1.0, 1.0))}
"""Arm to whether its block is solved, and the weights of the cluster and the consistency loss."""


def judged(encode: Any, params: Any, episode: Any, key: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the Dice score of each query, clean and under each attack."""
    threat = ja.linf(settings["eps"])
    model = prototypes.query_model(encode, params, episode.support, episode.masks)
    label = episode.truth.reshape(len(episode.truth), -1)
    score = lambda x: prototypes.dice(prototypes.maps(model(x), episode.truth.shape[1:], 2), episode.truth)  # noqa: E731
    kinds = {
        "FGSM": ({"kind": "fgsm"}, 1),
        "BIM": ({"kind": "bim", "steps": 5, "step_size": settings["eps"] / 10}, 1),
        "PGD": ({"kind": "pgd", "steps": settings["steps"]}, settings["restarts"]),
        "DAG": ({"kind": "dag", "steps": settings["steps"]}, 1),
        "SMIA": ({"kind": "smia", "steps": min(20, settings["steps"])}, 1),
    }
    found = {"clean": score(episode.query)}
    for name, (more, restarts) in kinds.items():
        y = prototypes.dag_aims(key, episode.truth, 2) if name == "DAG" else label
        attack = prototypes.seg_attack(threat, **more)
        tries = [score(attack.run(key, model, episode.query, y, restart=i).x) for i in range(restarts)]
        found[name] = jnp.stack(tries).min(0)
    return found | {"worst case": jnp.stack(list(found.values())).min(0)}


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train the arms, and judge on the novel organ; mean Dice in percent."""
    cfg = SolveCfg("euler", "fixed", t1=settings["t1"], n_steps=settings["solver steps"])
    numbers: dict[str, list[float]] = {}

    def draw(key):
        k_organ, k = jax.random.split(key)
        organ = jax.random.randint(k_organ, (), 1, prototypes.ORGANS)
        return prototypes.sample_episode(k, (organ,), queries=1, size=settings["size"])

    for name, (solved, weights) in list(ARMS.items())[2 if smoke else 0 :]:
        net = prototypes.Encoder(settings["channels"], settings["layers"], cfg if solved else None)
        encode = jax.tree_util.Partial(prototypes.encode, net)
        loss = partial(_loss, encode, weights, settings["noise"])
        train = jax.jit(
            lambda params, key, loss=loss: prototypes.meta_train(
                key, params, loss, draw, optax.adam(settings["rate"]), steps=settings["episodes"]
            )[0]
        )
        judge = jax.jit(lambda params, episode, key, encode=encode: judged(encode, params, episode, key, settings))
        for seed in seeds:
            params = train(prototypes.encoder_init(jax.random.key(1000 + seed), net), jax.random.key(seed))
            scores: dict[str, list] = {}
            for number in range(settings["test episodes"]):
                key = jax.random.fold_in(jax.random.key(10_000 + seed), number)
                novel = prototypes.sample_episode(
                    key, (prototypes.ORGANS,), queries=settings["queries"], size=settings["size"]
                )
                for what, values in judge(params, novel, key).items():
                    scores.setdefault(what, []).append(np.asarray(values))
            for what, values in scores.items():
                numbers.setdefault(f"{name}: {what}, Dice %", []).append(100 * float(np.mean(values)))
    return framework.filled(numbers, ARMS)


def _loss(encode, weights, noise, params, episode, key):
    return prototypes.pnode_episode_loss(encode, params, episode, key, weights=weights, noise=noise)


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge: in the worst case a gain over the residual arm clear of zero, at most two points of Dice lost clean."""
    mean = {key: float(np.mean(values)) for key, values in numbers.items()}
    over = lambda what: framework.gain(numbers, f"R-PNODE: {what}, Dice %", f"residual: {what}, Dice %")  # noqa: E731
    worst, clean = over("worst case"), over("clean")[0]
    known = {what: over(what) for what in ("FGSM", "BIM")}
    word = "does not hold here"
    if clean >= -2 and worst[1] > 0:
        word = "holds"
    elif clean >= -2 and min(low for _, low, _ in known.values()) > 0:
        word = "holds in part"
    told = ", ".join(f"{what} {gain:+.1f}" for what, (gain, _, _) in known.items())
    left = {arm: mean[f"{arm}: worst case, Dice %"] for arm in ("R-PNODE", "PNODE")}
    why = (
        f"R-PNODE over the residual arm, points of Dice: worst case {worst[0]:+.1f} ({worst[1]:+.1f} to "
        f"{worst[2]:+.1f}), {told}, clean {clean:+.1f}; in the worst case {left['R-PNODE']:.1f} % (PNODE "
        f"{left['PNODE']:.1f} %) of {mean['R-PNODE: clean, Dice %']:.1f} % clean"
    )
    return word, why
