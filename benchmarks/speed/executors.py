"""What the executors cost on one device, over `jax.jit` of the same step with its state given away.

The step is one of adversarial training (PGD with 5 steps on `cnn_small`). Every contender carries its own state from
round to round; a round is several steps in a row, waited for once. Median seconds, and the median over that of plain
jit, are printed and stored in `results/executors.json`.

Usage: python benchmarks/speed/executors.py [--batch 512] [--steps 5] [--rounds 11]
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
import optax

from jaxadv import attacks, models, parallel, threats, train
from jaxadv.train import trainer

sys.path.insert(0, str(Path(__file__).parent))
import harness

EXECUTORS = ("jit", "explicit", "shard_map", "pmap")


def batch_of(n: int) -> dict[str, np.ndarray]:
    """A batch of noise."""
    rng = np.random.default_rng(0)
    rows = {"x": rng.uniform(0, 1, (n, 28, 28, 1)).astype(np.float32), "y": rng.integers(0, 10, n).astype(np.int32)}
    return rows | {"index": np.arange(n, dtype=np.int32), "mask": np.ones(n, bool)}


def carried(run, state, batch, steps: int):
    """A call that takes several steps and remembers where it ended."""
    at = [state]

    def call():
        for _ in range(steps):
            at[0], metrics = run(at[0], batch)
        jax.block_until_ready((at[0], metrics))

    return call


def contenders(n: int, steps: int) -> dict:
    """Plain jit, and every executor on a mesh of one device."""
    net = models.create("cnn_small", jax.random.key(0), shape=(28, 28, 1), classes=10)
    attack = attacks.pgd(threats.linf(0.3), steps=5, keep="last")
    sgd, batch = optax.sgd(0.1, momentum=0.9), batch_of(n)
    step = train.make_step(net.apply, train.pgd_at(attack), sgd)

    def start():
        return parallel.replicate(trainer.init(jax.random.key(0), net, sgd))

    calls = {"plain jit": carried(jax.jit(step, donate_argnums=0), start(), jax.device_put(batch), steps)}
    for how in EXECUTORS:
        run = parallel.compile_step(step, how=how, mesh=parallel.make_mesh(1))
        calls[how] = carried(run, run.place(start()), batch, steps)
    return calls


def main() -> None:
    """Measure, print the table, store the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    times = harness.side_by_side(contenders(args.batch, args.steps), args.rounds)
    plain = times["plain jit"]["median"]
    ratios = {name: t["median"] / plain for name, t in times.items()}
    rows = [["executor", "ms a step", "over plain jit", "first call s"]]
    for name, t in times.items():
        rows.append([name, f"{1e3 * t['median'] / args.steps:.2f}", f"{ratios[name]:.3f}", f"{t['first_call']:.1f}"])
    print(harness.table(rows))
    record = {"seconds": times, "over plain jit": ratios, "settings": vars(args), "environment": harness.environment()}
    print(f"stored in {harness.store('executors', record)}")


if __name__ == "__main__":
    main()
