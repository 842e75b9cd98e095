"""What refilling of slots is worth: row-steps that were necessary over row-steps done, and against batches.

A model of which about half of the examples hold, 8 and 16 times as many examples as slots; a broken row ends early.
Three ways to serve the same queue, with the same verdicts:

- slots, firm examples first: as the evaluation does it;
- slots, random order;
- no refilling: batches of as many rows as there are slots, each until its last row is done.

Rows that hold all take the same number of steps, so the last of them may leave slots idle whatever the schedule: beside
the share of necessary row-steps stands the share of those that the best schedule needs, one that knows all lengths.
Row-steps are counted, so the figures do not depend on the machine; seconds are medians taken in turn.

Usage: python benchmarks/speed/slots.py [--slots 64] [--times 8 16] [--rounds 3]. Data: the folder of JAXADV_DATA.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np

import jaxadv as ja
from jaxadv.evaluate import Server

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from benchmarks.parity import autoattack as parity
from benchmarks.speed import harness

NET, EPS = "mnist_standard", 1.15  # l2; about half of the examples hold
KEY = jax.random.key(0)


def gathered(served, n: int):
    """Verdicts and gradients of all rows, in order."""
    success, grads = np.zeros(n, bool), np.zeros(n, int)
    for rows, result in served:
        success[rows], grads[rows] = result.success, result.grads
    return success, grads


def batches(attack, run, model, x, y, index, slots: int):
    """No refilling: a batch after the other, each until its last row is done; verdicts and row-steps done."""
    success, done = [], 0
    for at in range(0, len(x), slots):
        found = run(attack, model, x[at : at + slots], y[at : at + slots], index[at : at + slots])
        success.append(np.asarray(found.success))
        done += len(success[-1]) * int(np.max(found.grads))
    return np.concatenate(success), done


def best_schedule(lengths, slots: int) -> int:
    """Row-steps of slots that know the lengths beforehand: longest first, refilled at once, at no cost."""
    free = np.zeros(slots, int)
    for length in np.sort(lengths)[::-1]:
        free[free.argmin()] += length
    return slots * int(free.max())


def part(attack, model, x, y, slots: int, rounds: int) -> dict:
    """One attack on one queue."""
    n, index = len(x), np.arange(len(x), dtype=np.int32)
    logits = np.asarray(jax.jit(lambda m, x: m(x))(model, x))
    own = np.eye(logits.shape[1], dtype=bool)[y]
    firm = np.argsort(logits[~own].reshape(n, -1).max(1) - logits[own], kind="stable")
    run = jax.jit(lambda a, m, x, y, i: a.run(KEY, m, x, y, index=i))
    servers = {name: Server(model, x, y, slots=slots) for name in ("firm first", "random order")}
    orders, found = {"firm first": firm, "random order": np.random.default_rng(0).permutation(n)}, {}

    def served(name):
        servers[name].work |= {"needed": 0, "done": 0}
        found[name] = gathered(servers[name].drain(attack, KEY, orders[name]), n)

    contenders = {name: lambda name=name: served(name) for name in servers}
    contenders["no refilling"] = lambda: found.__setitem__(
        "no refilling", batches(attack, run, model, x, y, index, slots)
    )
    times = harness.side_by_side(contenders, rounds)
    needed, (success, done) = servers["firm first"].work["needed"], found["no refilling"]
    best = best_schedule(found["firm first"][1], slots)
    record = {"n": n, "slots": slots, "hold": 1 - float(success.mean()), "needed": needed, "best_schedule": best}
    for name in contenders:
        spent = done if name == "no refilling" else servers[name].work["done"]
        record[name] = {
            "row_steps": int(spent),
            "necessary": needed / spent,
            "of_best_schedule": best / spent,
            "other_verdicts": int(np.sum(found[name][0] != success)),
            "seconds": times[name],
        }
    return record


def main() -> None:
    """Count, print the table, store the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--times", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = parity.forward(np.load(parity.weights_of(NET)), NET)
    threat = ja.l2(EPS)
    members = {"apgd_ce": ja.attacks.apgd_ce(threat), "apgd_t": ja.attacks.apgd_t(threat, targets=4)}
    rows = [["attack, examples, served how", "necessary / done", "best / done", "gain", "seconds", "gain"]]
    stored = harness.RESULTS / "slots.json"  # sizes that are not measured now keep their record
    record: dict = (json.loads(stored.read_text()) if stored.exists() else {}) | {"net": NET, "eps": EPS}
    for times in args.times:
        x, y = (np.asarray(a) for a in parity.examples(NET, args.slots * times).all())
        for name, attack in members.items():
            found = record[f"{name}, {times} x slots"] = part(attack, model, x, y, args.slots, args.rounds)
            plain = found["no refilling"]
            print(f"{name}: {found['n']} examples, {100 * found['hold']:.0f} % hold", flush=True)
            for how in ("firm first", "random order", "no refilling"):
                own = found[how]
                gain = plain["row_steps"] / own["row_steps"]
                faster = plain["seconds"]["median"] / own["seconds"]["median"]
                seconds = f"{own['seconds']['median']:.2f}"
                shares = [f"{own['necessary']:.2f}", f"{own['of_best_schedule']:.2f}"]
                rows.append([f"{name}, {times} x slots, {how}", *shares, f"{gain:.2f}", seconds, f"{faster:.2f}"])
                if own["other_verdicts"]:
                    print(f"{how}: {own['other_verdicts']} verdicts differ from those without refilling")
    record["environment"] = harness.environment()
    print(harness.table(rows))
    print(f"stored in {harness.store('slots', record)}")


if __name__ == "__main__":
    main()
