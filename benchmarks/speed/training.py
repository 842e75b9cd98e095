"""What a gradient of every training objective costs: counted, and its time over the sum of the times of its parts.

The parts are those of theory (`train.costs.PARTS`): forward passes, one input gradient for each step of the search, a
weight gradient for each point of the loss, second-order gradients. Each is compiled alone and timed beside the whole,
on one network and batch; below 1 the whole is cheaper than its parts. The count is in forward passes of the network.

Usage: python benchmarks/speed/training.py [--objectives pgd_at trades] [--steps 10] [--batch 128] [--rounds 25]
       [--net cnn_small] [--store]
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxadv as ja
from jaxadv.train import costs

sys.path.insert(0, str(Path(__file__).parent))
import harness

SHAPE, CLASSES, EPS = (28, 28, 1), 10, 0.3
OF_ATTACK = {"pgd_at": {}, "iat": {}, "ladder": {}, "advlc": {}, "cost_sensitive": {"costs": 1 - np.eye(CLASSES)}}
OF_STEPS = ("trades", "mart", "a3t", "dial", "cifs")
UNSEARCHED = ("standard", "jsigr")


def built(name: str, steps: int):
    """The objective, with a search of so many steps where it has one that is longer than one."""
    threat, make = ja.linf(EPS), ja.train.OBJECTIVES[name]
    if name in UNSEARCHED:
        return make(), 0
    if name in OF_ATTACK:
        return make(ja.pgd(threat, steps=steps, keep="last"), **OF_ATTACK[name]), steps
    if name in OF_STEPS:
        return make(threat, steps=steps), steps
    return make(threat, **({"weight": 0.2} if name == "grad_align" else {})), 1


def network(kind: str, name: str):
    """The network that an objective trains."""
    key = jax.random.key(0)
    net = ja.models.create(kind, key, shape=SHAPE, classes=CLASSES, **({"gated": True} if name == "cifs" else {}))
    if name == "dial":
        at = {"cnn_small": "dense1:in"}.get(kind)
        if at is None:
            raise ValueError(f"dial needs to know where its head is attached; got network {kind!r}. Use cnn_small.")
        net = ja.train.with_domains(key, net, shape=SHAPE, at=at)
    return net


def calls(objective, net, batch) -> dict[str, Callable]:
    """The whole and its parts, each a blocking call of a compiled function."""
    apply, params, state, x, y = net.apply, net.params, net.state, batch["x"], batch["y"]
    gradient, model = ja.train.grad_fn(objective), ja.models.model(net)

    def mean(params, x):
        return ja.losses.cross_entropy(apply(params, state, x, bn="local", key=jax.random.key(0))[0], y).mean()

    def slope(params, x):
        return jnp.sum(jax.grad(mean, 1)(params, x) ** 2)

    made = {
        "step": (lambda params, batch: gradient(apply, params, state, batch, jax.random.key(1)).total, params, batch),
        "forward": (lambda model, x: model(x), model, x),
        "input_gradients": (jax.value_and_grad(mean, 1), params, x),
        "weight_gradients": (jax.value_and_grad(mean), params, x),
        "second_order": (jax.grad(slope), params, x),
    }
    runs = {name: (jax.jit(fn), given) for name, (fn, *given) in made.items()}
    return {name: partial(lambda run, given: jax.block_until_ready(run(*given)), *r) for name, r in runs.items()}


def main() -> None:
    """Measure, print the table, store the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objectives", nargs="+", default=list(costs.PARTS), choices=list(costs.PARTS))
    parser.add_argument("--net", default="cnn_small")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--store", action="store_true", help="write results/training.json")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    batch = {
        "x": jnp.asarray(rng.uniform(size=(args.batch, *SHAPE)), jnp.float32),
        "y": jnp.asarray(rng.integers(0, CLASSES, args.batch), jnp.int32),
        "index": jnp.arange(args.batch, dtype=jnp.int32),
        "mask": jnp.ones(args.batch, bool),
        "step": jnp.zeros(args.batch, jnp.int32),
    }
    rows, record = [["objective", "search", "forward passes, counted", "step, ms", "time / parts"]], {}
    for name in args.objectives:
        (objective, steps), net = built(name, args.steps), network(args.net, name)
        parts = costs.PARTS[name]
        if name == "jsigr":
            parts = parts._replace(forward=1 + (SHAPE[0] // 7) ** 2)  # a pass for each patch
        counted = ja.train.cost(objective, net, batch)
        found = harness.side_by_side(calls(objective, net, batch), args.rounds)
        t = {part: found[part]["median"] for part in found}
        total = parts.forward * t["forward"] + parts.weight_gradients * t["weight_gradients"]
        total += (parts.searches * steps + parts.input_gradients) * t["input_gradients"]
        total += parts.second_order * t["second_order"]
        record[name] = {"steps": steps, "counted": counted._asdict(), "overhead": t["step"] / total, "seconds": found}
        rows.append([name, str(steps), f"{counted.step:.1f}", f"{1e3 * t['step']:.1f}", f"{t['step'] / total:.2f}"])
        print(name, "measured", flush=True)
    print(harness.table(rows))
    if args.store:
        settings = {"net": args.net, "batch": args.batch, "rounds": args.rounds}
        found = {"objectives": record, "settings": settings, "environment": harness.environment()}
        print(f"stored in {harness.store('training', found)}")


if __name__ == "__main__":
    main()
