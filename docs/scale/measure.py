"""Print the measured table of plan.md: what a device keeps and does as forced devices are added.

Run with `JAX_PLATFORMS=cpu python docs/scale/measure.py`. Nothing is timed but compilation; all else is read from the
compiled program of one step of adversarial training (PGD with 5 steps, `cnn_small`, 16 rows of 28 x 28 on each device).
"""

import re
import time

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402
import optax  # noqa: E402

from jaxadv import attacks, models, parallel, threats, train  # noqa: E402
from jaxadv.train import trainer  # noqa: E402

EACH = 16
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}


def reduced(text: str) -> tuple[int, int]:
    """Number of all-reduces in a program, and the bytes that one device puts into them."""
    shapes = re.findall(r" = (\S.*?) all-reduce(?:-start)?\(", text)
    parts = [part for shape in shapes for part in re.findall(r"(\w+)\[([\d,]*)\]", shape)]
    return len(shapes), sum(BYTES[kind] * int(np.prod([int(d) for d in dims.split(",") if d])) for kind, dims in parts)


def row(n: int, layout=None) -> str:
    """Return one line of the table."""
    net = models.create("cnn_small", jax.random.key(0), shape=(28, 28, 1), classes=10)
    attack = attacks.pgd(threats.linf(0.3), steps=5, keep="last")
    sgd = optax.sgd(0.1, momentum=0.9)
    step = train.make_step(net.apply, train.pgd_at(attack), sgd)
    run = parallel.compile_step(step, mesh=parallel.make_mesh(n), layout=layout)
    rows = EACH * n
    batch = {"x": np.zeros((rows, 28, 28, 1), np.float32), "y": np.zeros(rows, np.int32)}
    batch |= {"index": np.arange(rows, dtype=np.int32), "mask": np.ones(rows, bool)}
    lowered = run.lower(run.place(trainer.init(jax.random.key(0), net, sgd)), batch)
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    cost, memory, (count, size) = compiled.cost_analysis(), compiled.memory_analysis(), reduced(compiled.as_text())
    mib = [f"{b / 2**20:.2f}" for b in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)]
    figures = [cost["flops"] / 1e6, cost["bytes accessed"] / 1e6]
    name = f"{n}" if layout is None else f"{n}, fsdp"
    cells = [name, *(f"{f:.1f}" for f in figures), *mib, str(count), f"{size / 2**20:.2f}", f"{seconds:.1f}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print("| devices | MFLOP | MB moved | arguments MiB | temporary MiB | all-reduces | MiB reduced | compile s |")
    print("|---|---|---|---|---|---|---|---|")
    for n in (1, 2, 4, 8):
        print(row(n), flush=True)
    print(row(8, parallel.fsdp()), flush=True)
