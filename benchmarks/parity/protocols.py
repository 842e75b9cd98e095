"""How often the protocol `fast` gives another verdict than `standard`, and at what share of the cost.

The parity nets (see `autoattack.py` beside this file) in linf, l2 and l1; verdicts of both protocols on the same
examples. `fast` can only miss what `standard` finds and the other way round; both are counted, with an interval for the
gap in robust accuracy over all nets.

    python benchmarks/parity/protocols.py [--nets mnist_robust ...] [--norms linf l2 l1] [-n 1000]
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import jaxadv as ja
from benchmarks.parity import autoattack as parity
from jaxadv.evaluate.intervals import share

STORED = Path(__file__).parent / "results" / "protocols.json"
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def judged(protocol: str, model, x, y, threat) -> dict:
    """Which examples hold, as a word of bits, what broke the others, and the gradients and forward passes it took."""
    report = ja.evaluate(jax.random.key(0), model, x, y, threat, attacks=protocol, keep_adversarial=False).models[0]
    held = np.asarray(report.examples["by"]) == -1
    cost = {what: sum(attack[what] for attack in report.attacks) for what in ("grads", "queries")}
    broken = {attack["name"]: attack["broken"] for attack in report.attacks}
    return {"holds": np.packbits(held).tobytes().hex(), "robust %": 100 * float(held.mean()), "broken": broken} | cost


def cell(net: str, norm: str, n: int, before: dict | None) -> dict:
    """Both protocols on one network and norm; what is known of `standard` is not run again."""
    model, (x, y) = parity.forward(np.load(parity.weights_of(net)), net), parity.examples(net, 1000).all()
    x, y, threat = x[:n], y[:n], getattr(ja, norm)(parity.NETS[net][3][NORMS[norm]])
    known = before is not None and before["n"] == n
    standard = before["standard"] if before and known else judged("standard", model, x, y, threat)
    fast = judged("fast", model, x, y, threat)
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(p["holds"]), np.uint8))[:n] == 1 for p in (fast, standard)]
    return {
        "n": n,
        "fast": fast,
        "standard": standard,
        "only fast holds": int(np.sum(bits[0] & ~bits[1])),
        "only standard holds": int(np.sum(~bits[0] & bits[1])),
        "share of gradients": fast["grads"] / standard["grads"],
        "share of passes": fast["queries"] / standard["queries"],
    }


def main() -> None:
    """Measure, print, store after every cell."""
    parser = argparse.ArgumentParser(description="Verdicts of the protocol fast beside those of standard.")
    parser.add_argument("--nets", nargs="+", default=list(parity.NETS), choices=list(parity.NETS))
    parser.add_argument("--norms", nargs="+", default=list(NORMS), choices=list(NORMS))
    parser.add_argument("-n", type=int, default=1000)
    args = parser.parse_args()
    record = json.loads(STORED.read_text()) if STORED.exists() else {}
    for net in args.nets:
        for norm in args.norms:
            found = cell(net, norm, args.n, record.get(f"{net}/{norm}"))
            record[f"{net}/{norm}"] = found
            print(net, norm, {k: v for k, v in found.items() if not isinstance(v, dict)}, flush=True)
            print(*(found[p]["broken"] for p in ("fast", "standard")), sep="\n", flush=True)
            STORED.parent.mkdir(exist_ok=True)
            STORED.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    n, missed, lost = (sum(c[k] for c in record.values()) for k in ("n", "only fast holds", "only standard holds"))
    for what, count in (("only fast holds", missed), ("only standard holds", lost)):
        value, (low, high) = share(count, n)
        print(f"{what}: {count} of {n}, {100 * value:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f})")


if __name__ == "__main__":
    main()
