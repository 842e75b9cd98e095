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


def judged(protocol: str, model, x, y, threat) -> tuple[np.ndarray, int, int]:
    """Which examples hold, and the gradients and forward passes that it took."""
    report = ja.evaluate(jax.random.key(0), model, x, y, threat, attacks=protocol, keep_adversarial=False).models[0]
    cost = [sum(attack[what] for attack in report.attacks) for what in ("grads", "queries")]
    return np.asarray(report.examples["by"]) == -1, cost[0], cost[1]


def cell(net: str, norm: str, n: int) -> dict:
    """Both protocols on one network and norm."""
    model, (x, y) = parity.forward(np.load(parity.weights_of(net)), net), parity.examples(net, 1000).all()
    x, y, threat = x[:n], y[:n], getattr(ja, norm)(parity.NETS[net][3][NORMS[norm]])
    (fast, *spent), (standard, *whole) = (judged(name, model, x, y, threat) for name in ("fast", "standard"))
    return {
        "n": n,
        "fast": 100 * float(fast.mean()),
        "standard": 100 * float(standard.mean()),
        "only fast holds": int(np.sum(fast & ~standard)),
        "only standard holds": int(np.sum(~fast & standard)),
        "share of gradients": spent[0] / whole[0],
        "share of passes": spent[1] / whole[1],
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
            record[f"{net}/{norm}"] = cell(net, norm, args.n)
            print(net, norm, record[f"{net}/{norm}"], flush=True)
            STORED.parent.mkdir(exist_ok=True)
            STORED.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    n, missed, lost = (sum(c[k] for c in record.values()) for k in ("n", "only fast holds", "only standard holds"))
    for what, count in (("only fast holds", missed), ("only standard holds", lost)):
        value, (low, high) = share(count, n)
        print(f"{what}: {count} of {n}, {100 * value:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f})")


if __name__ == "__main__":
    main()
