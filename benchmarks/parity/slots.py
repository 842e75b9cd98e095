"""Verdicts at other numbers of slots and devices: the keys are the same, so only rounding may tell them apart.

The standard suite on the parity nets (see `autoattack.py` beside this file), linf, at 64 slots on one device, and again
at 7 and at 500 slots and on eight devices; how many examples of n have another verdict. The same in float64, in the
search and in the verdict, where rounding should tell nothing apart.

    python benchmarks/parity/slots.py [--nets mnist_robust ...] [-n 1000] [--double 100]
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
from jaxadv.evaluate import PROTOCOLS, Server
from jaxadv.evaluate.protocols import build

STORED = Path(__file__).parent / "results" / "slots.json"
CASES = {"64 slots": (64, 1), "7 slots": (7, 1), "500 slots": (500, 1), "8 devices": (64, 8)}


def mesh_of(devices: int):
    """A mesh, or None for one device."""
    return None if devices == 1 else jax.make_mesh((devices,), ("data",))


def single(model, x, y, threat, slots: int, devices: int) -> np.ndarray:
    """Verdicts of the evaluation: which examples hold."""
    report = ja.evaluate(
        jax.random.key(0), model, x, y, threat, slots=slots, mesh=mesh_of(devices), keep_adversarial=False
    )
    return np.asarray(report.models[0].examples["by"]) == -1


def double(model, x, y, threat, slots: int, devices: int) -> np.ndarray:
    """The same in float64: every attack of the suite on the survivors of those before it."""
    server = Server(model, x.astype(np.float64), y, slots=slots, mesh=mesh_of(devices))
    holds = np.asarray(jax.numpy.argmax(model(x.astype(np.float64)), -1)) == y
    for stage in PROTOCOLS["standard"](threat.norm):
        for rows, result in server.drain(build(stage, threat, threat), jax.random.key(0), np.flatnonzero(holds)):
            holds[rows] = ~np.asarray(result.success)
    return holds


def measure(net: str, verdicts, n: int, dtype) -> dict:
    """Number of other verdicts in each case."""
    arrays, (x, y) = np.load(parity.weights_of(net)), parity.examples(net, 1000).all()
    x, y = np.asarray(x[:n], dtype), np.asarray(y[:n], np.int32)
    model, threat = parity.forward(arrays, net, dtype), ja.linf(parity.NETS[net][3]["Linf"])
    found = {case: verdicts(model, x, y, threat, *how) for case, how in CASES.items()}
    base = found.pop("64 slots")
    return {"n": n, "hold": int(base.sum())} | {case: int(np.sum(held != base)) for case, held in found.items()}


def main() -> None:
    """Measure, print, store after every net."""
    parser = argparse.ArgumentParser(description="Verdicts at other numbers of slots and devices.")
    parser.add_argument("--nets", nargs="+", default=list(parity.NETS), choices=list(parity.NETS))
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--double", type=int, default=100, help="examples in float64")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    record = json.loads(STORED.read_text()) if STORED.exists() else {}
    for net in args.nets:
        with jax.enable_x64(True):
            record[f"{net}, float64"] = measure(net, double, args.double, np.float64)
        print(net, "float64", record[f"{net}, float64"], flush=True)
        record[net] = measure(net, single, args.n, np.float32)
        print(net, "float32", record[net], flush=True)
        STORED.parent.mkdir(exist_ok=True)
        STORED.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
