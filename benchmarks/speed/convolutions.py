"""Which form of a convolution is fastest inside a loop: the measurements behind `core.convolution.choose`.

For the convolutions of `cnn_small`, `odenet_mnist` and PreAct-ResNet-18, forward and both gradients, inside a compiled
loop: as XLA finds it (`plain`), in each form of `core.FORMS`, and compiled alone outside any loop (`alone`). Prints
milliseconds and stores them.

Usage: python benchmarks/speed/convolutions.py [--rounds 5] [--batch N] [--only resnet]
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxadv import core

sys.path.insert(0, str(Path(__file__).parent))
import harness

# name: batch, size, channels in, channels out, kernel, stride, padding
CASES = {
    "cnn_small.1": (478, 28, 1, 16, 4, 2, 1),
    "cnn_small.2": (478, 14, 16, 32, 4, 2, 1),
    "odenet.1": (128, 26, 64, 64, 4, 2, 1),
    "odenet.field": (128, 6, 64, 64, 3, 1, 1),
    "resnet.stem": (64, 32, 3, 64, 3, 1, 1),
    "resnet.1": (64, 32, 64, 64, 3, 1, 1),
    "resnet.2.down": (64, 32, 64, 128, 3, 2, 1),
    "resnet.2.shortcut": (64, 32, 64, 128, 1, 2, 0),
    "resnet.2": (64, 16, 128, 128, 3, 1, 1),
    "resnet.3.down": (64, 16, 128, 256, 3, 2, 1),
    "resnet.3": (64, 8, 256, 256, 3, 1, 1),
    "resnet.4.down": (64, 8, 256, 512, 3, 2, 1),
    "resnet.4": (64, 4, 512, 512, 3, 1, 1),
}
REPEATS = 4


DIRECTIONS = ("forward", "input gradient", "kernel gradient")


def contenders(case, direction: str):
    """Return blocking calls of one convolution or one of its gradients in each form; all operands are arguments.

    An operand that the compiler knows would be prepared before the loop, and the form look faster than it is.
    """
    b, h, c, o, k, s, p = case
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(b, h, h, c)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(k, k, c, o)), jnp.float32)

    def forward(x, w):
        return lax.conv_general_dilated(x, w, (s, s), ((p, p), (p, p)), dimension_numbers=("NHWC", "HWIO", "NHWC"))

    slope = jax.jit(forward)(x, w)
    once, given = {
        "forward": (forward, (x, w)),
        "input gradient": (lambda g, w: jax.linear_transpose(lambda x: forward(x, w), x)(g)[0], (slope, w)),
        "kernel gradient": (lambda x, g: jax.linear_transpose(lambda w: forward(x, w), w)(g)[0], (x, slope)),
    }[direction]

    def looped(fn):
        def body(_, carry):
            inside, last = carry
            moving = inside if direction == "kernel gradient" else inside[:1]  # weights rest during an attack
            moving = tuple(a + last * 1e-30 for a in moving)
            inside = (*moving, *inside[len(moving) :])
            return inside, fn(*inside).ravel()[0]

        run = jax.jit(lambda *given: lax.fori_loop(0, REPEATS, body, (given, jnp.float32(0)))[1])
        return lambda: run(*given).block_until_ready()

    alone = jax.jit(once)
    calls = {"chosen": looped(core.canonical(once, enabled=True))}
    if direction != "kernel gradient":  # takes seconds for large ones as the compiler finds it in a loop
        calls["plain"] = looped(once)
    calls |= {form: looped(core.canonical(once, enabled=True, form=form)) for form in core.FORMS}
    return calls | {"alone": lambda: [alone(*given).block_until_ready() for _ in range(REPEATS)]}


def main() -> None:
    """Measure all cases, print the table, store the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, help="rows in the place of each case's own number")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    args = parser.parse_args()
    stored = harness.RESULTS / "convolutions.json"  # cases that are not measured now keep their record
    record: dict = json.loads(stored.read_text())["milliseconds"] if stored.exists() else {}
    rows = [["convolution", "direction", "plain", "chosen", *core.FORMS, "alone"]]
    for name, case in CASES.items():
        if not name.startswith(args.only):
            continue
        case = (args.batch or case[0], *case[1:])
        name = f"{name} x {case[0]}"
        for direction in DIRECTIONS:
            times = harness.side_by_side(contenders(case, direction), args.rounds)
            ms = {k: 1e3 * v["median"] / REPEATS for k, v in times.items()}
            record[f"{name} {direction}"] = ms
            rows.append([name, direction, *(f"{ms[k]:.1f}" if k in ms else "" for k in rows[0][2:])])
    print(harness.table(rows))
    print(f"stored in {harness.store('convolutions', {'milliseconds': record, 'environment': harness.environment()})}")


if __name__ == "__main__":
    main()
