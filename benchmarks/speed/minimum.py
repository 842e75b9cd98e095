"""Minimum-norm attacks against Foolbox on the same weights and points: DeepFool, Carlini-Wagner, HopSkipJump.

A MNIST network (fixture `autoattack_NET.npz`), test images that it has right, all in one batch. Both sides get the same
number of steps, rounds or queries and run all of them. Beside the times stand what was found, because a search that
stops short is quick: the median distance and the number of failing points. Times are medians of calls in turn.

Usage: python benchmarks/speed/minimum.py [--attacks deepfool carlini hopskipjump] [--net mnist_standard] [--rounds 3]
[--batch 64] The peer needs its own environment: pip install . torch==2.13.0 foolbox. Data: the folder of JAXADV_DATA.
"""

import argparse
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


def ours(name: str):
    """The attack as jaxadv has it; its budget is the whole box, so that every point found counts."""
    threat = ja.l2(1e3)
    if name == "deepfool":
        return ja.attacks.deepfool(threat, steps=STEPS, early=True)
    if name == "carlini":
        return ja.attacks.carlini(threat, steps=STEPS, rounds=ROUNDS, constant=0.1, abort=False)
    return ja.attacks.hopskipjump(threat, queries=QUERIES)


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

    def jaxadv():
        return jax.block_until_ready(run(attack, jax.random.key(0), model, x, y))

    def foolbox_():
        return peer.run(wrapped, images, labels)

    found = jaxadv()
    network.register_forward_hook(lambda module, given, out: spent.__setitem__(0, spent[0] + len(out)))
    points = foolbox_().detach()
    asked = spent[0] / len(x)
    with torch.no_grad():
        fails = (network(points).argmax(1) != labels).numpy()
    size = np.linalg.norm((points - images).flatten(1).numpy(), axis=1)
    return {
        "batch": len(x),
        "times": harness.side_by_side({"jaxadv": jaxadv, "foolbox": foolbox_}, rounds),
        "median distance": {
            "jaxadv": float(np.median(np.where(found.success, found.size, np.inf))),
            "foolbox": float(np.median(np.where(fails, size, np.inf))),
        },
        "found": {"jaxadv": int(found.success.sum()), "foolbox": int(fails.sum())},
        "forward passes": {"jaxadv": float(np.mean(found.queries)), "foolbox": asked},
    }


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
    rows = [["attack", "seconds jaxadv", "foolbox", "ratio", "median distance", "forward passes"]]
    for name in args.attacks:
        found = record["attacks"][name] = measure(name, args.net, args.batch, args.rounds)
        t = {side: found["times"][side]["median"] for side in ("jaxadv", "foolbox")}
        pairs = ["{jaxadv:.3f} / {foolbox:.3f}", "{jaxadv:.0f} / {foolbox:.0f}"]
        pairs = [form.format(**found[what]) for form, what in zip(pairs, ("median distance", "forward passes"))]
        ratio = t["foolbox"] / t["jaxadv"]
        rows.append([name, f"{t['jaxadv']:.2f}", f"{t['foolbox']:.2f}", f"{ratio:.2f}", *pairs])
    record["environment"] = harness.environment()
    print(harness.table(rows))
    print(f"stored in {harness.store('minimum', record)}")


if __name__ == "__main__":
    main()
