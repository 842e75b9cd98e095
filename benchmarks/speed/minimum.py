"""Minimum-norm attacks against Foolbox on the same weights and points: DeepFool, Carlini-Wagner, HopSkipJump.

A MNIST network (fixture `autoattack_NET.npz`), test images that it has right, all in one batch. Both sides get the same
number of steps, rounds or queries and run all of them. Beside the times stand what was found, because a search that
stops short is quick: the median distance and the number of failing points. Where queries are what is spent, a third
time is that of the smallest of a few budgets with which ours is as near as Foolbox is in the end. Times are medians of
calls in turn.

Usage: python benchmarks/speed/minimum.py [--attacks deepfool carlini hopskipjump] [--net mnist_standard] [--rounds 3]
[--batch 64] The peer needs its own environment: pip install . torch==2.13.0 foolbox. Data: the folder of JAXADV_DATA.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxadv as ja

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
import autoattack as nets
import harness

STEPS, ROUNDS = 200, 6  # of DeepFool and Carlini-Wagner; rounds of the latter
TURNS, QUERIES = 16, 4500  # iterations of HopSkipJump there, and what they ask for, about
BUDGETS = (250, 500, 1000, 1500, 2000, 3000)  # of ours, for as near a point


def ours(name: str, queries: int = QUERIES):
    """The attack as jaxadv has it; its budget is the whole box, so that every point found counts."""
    threat = ja.l2(1e3)
    if name == "deepfool":
        return ja.attacks.deepfool(threat, steps=STEPS, early=True)
    if name == "carlini":
        return ja.attacks.carlini(threat, steps=STEPS, rounds=ROUNDS, constant=0.1, abort=False)
    return ja.attacks.hopskipjump(threat, queries=queries)


def theirs(name: str):
    """The same of Foolbox."""
    import foolbox

    if name == "deepfool":
        return foolbox.attacks.L2DeepFoolAttack(steps=STEPS, candidates=10)
    if name == "carlini":
        return foolbox.attacks.L2CarliniWagnerAttack(ROUNDS, STEPS, initial_const=0.1, abort_early=False)
    return foolbox.attacks.HopSkipJumpAttack(steps=TURNS)


def measure(name: str, net: str, batch: int, rounds: int) -> dict:
    """Times and findings of both sides."""
    import foolbox
    import torch

    arrays = np.load(nets.weights_of(net))
    model, (x, y) = nets.forward(arrays, net), nets.examples(net, 4 * batch).all()
    right = np.flatnonzero(np.asarray(model(jnp.asarray(x))).argmax(-1) == y)[:batch]
    x, y = x[right], y[right]
    torch.manual_seed(0)
    network, spent = nets.torch_net(arrays, net), [0]
    wrapped = foolbox.PyTorchModel(network, (0, 1), device="cpu")
    images, labels = torch.tensor(x.transpose(0, 3, 1, 2).copy()), torch.tensor(y.astype(np.int64))
    attack, peer = ours(name), theirs(name)
    run: Callable = jax.jit(lambda a, k, m, x, y: a.run(k, m, x, y))

    def jaxadv(attack=attack):
        return jax.block_until_ready(run(attack, jax.random.key(0), model, x, y))

    def foolbox_():
        return peer.run(wrapped, images, labels)

    def nearest(found):
        return float(np.median(np.where(found.success, found.size, np.inf)))

    found = jaxadv()
    network.register_forward_hook(lambda module, given, out: spent.__setitem__(0, spent[0] + len(out)))
    points = foolbox_().detach()
    asked = spent[0] / len(x)
    with torch.no_grad():
        fails = (network(points).argmax(1) != labels).numpy()
    size = np.linalg.norm((points - images).flatten(1).numpy(), axis=1)
    theirs_median = float(np.median(np.where(fails, size, np.inf)))
    sides: dict[str, Callable] = {"jaxadv": jaxadv, "foolbox": foolbox_}
    record = {
        "batch": len(x),
        "median distance": {"jaxadv": nearest(found), "foolbox": theirs_median},
        "found": {"jaxadv": int(found.success.sum()), "foolbox": int(fails.sum())},
        "forward passes": {"jaxadv": float(np.mean(found.queries)), "foolbox": asked},
    }
    for queries in BUDGETS if name == "hopskipjump" else ():
        reached = nearest(jaxadv(ours(name, queries)))
        if reached <= theirs_median:
            sides["as near"] = functools.partial(jaxadv, ours(name, queries))
            record["as near"] = {"queries": queries, "median distance": reached}
            break
    return record | {"times": harness.side_by_side(sides, rounds)}


def main() -> None:
    """Measure, print the table, store the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["deepfool", "carlini", "hopskipjump"]
    parser.add_argument("--attacks", nargs="+", default=names, choices=names)
    parser.add_argument("--net", default="mnist_standard", choices=list(nets.NETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    stored = harness.RESULTS / "minimum.json"  # attacks that are not measured now keep their record
    record: dict = json.loads(stored.read_text()) if stored.exists() else {"attacks": {}}
    rows = [["attack", "seconds jaxadv", "foolbox", "ratio", "to be as near", "median distance", "forward passes"]]
    for name in args.attacks:
        found = record["attacks"][name] = measure(name, args.net, args.batch, args.rounds)
        t = {side: times["median"] for side, times in found["times"].items()}
        pairs = ["{jaxadv:.3f} / {foolbox:.3f}", "{jaxadv:.0f} / {foolbox:.0f}"]
        pairs = [form.format(**found[what]) for form, what in zip(pairs, ("median distance", "forward passes"))]
        ratios = [f"{t['foolbox'] / t[side]:.2f}" if side in t else "" for side in ("jaxadv", "as near")]
        rows.append([name, f"{t['jaxadv']:.2f}", f"{t['foolbox']:.2f}", *ratios, *pairs])
    record["environment"] = harness.environment()
    print(harness.table(rows))
    print(f"stored in {harness.store('minimum', record)}")


if __name__ == "__main__":
    main()
