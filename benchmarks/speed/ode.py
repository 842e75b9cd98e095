"""ODE networks and small fields against torchdiffeq: same weights, same grid, so the same evaluations by construction.

Rows: forward pass, input gradient, training step (gradients of all parameters and an update) and PGD with 20 steps on
`odenet_mnist`, then forward and gradient of a perceptron of width 64 as field. All solve with the 3/8 rule on a fixed
grid, which torchdiffeq calls rk4; `--adaptive` solves with Dormand-Prince for the whole batch instead, with the same
tolerances, and reports the evaluations of both beside the times. Gradients have convolutions in their fast forms, as
attacks and the trainer have them. Last: what a solve costs over its bare evaluations in a compiled loop, and that new
weights do not trace again. First calls, compilation included, are reported apart; times are medians of calls in turn.

Usage: python benchmarks/speed/ode.py [--batches 1 128] [--channels 64] [--steps 4] [--rounds 5] [--adaptive] [--store]
The peer needs its own environment: pip install . torch==2.13.0 torchdiffeq
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxadv as ja
from jaxadv import continuous, core, losses
from jaxadv.continuous import SolveCfg, ode_solve
from jaxadv.models.adapt import unflatten

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
import harness

TOLERANCE, EPS, WIDTH = 1e-3, 0.3, 64


def solver(args: argparse.Namespace) -> SolveCfg:
    """What we solve with."""
    if args.adaptive:
        return SolveCfg("dopri5", rtol=TOLERANCE, atol=TOLERANCE, batching="joint", max_steps=64)
    return SolveCfg("rk38", "fixed", n_steps=args.steps)


def blocked(fn: Callable, *given: Any) -> Callable:
    """A call that waits for its result."""
    return lambda: jax.block_until_ready(fn(*given))


def evaluations(parity: Any, forward: Callable) -> int:
    """How often the peer asks its field in a forward pass."""
    plain, asked = parity.field, []

    def counting(name, w):
        inner = plain(name, w)

        def field(t, z):
            asked.append(t)
            return inner(t, z)

        return field

    parity.field = counting
    forward()
    parity.field = plain
    return len(asked)


def network(args: argparse.Namespace, batch: int) -> tuple[dict[str, dict[str, Callable]], dict[str, int]]:
    """Row to contenders, on `odenet_mnist`, and how often each asks its field in a forward pass."""
    import ode as parity  # the peer's network, written down for the parity fixture
    import torch
    from torch.nn import functional

    torch.set_num_threads(args.threads)
    parity.CHANNELS, parity.STEPS, parity.TOLERANCE = args.channels, args.steps, TOLERANCE
    parity.SPECS = {"odenet_mnist": {"channels": args.channels, "stem": 3}}
    rng = np.random.default_rng(0)
    made, cfg, peer = parity.weights("odenet_mnist", rng), solver(args), "dopri5" if args.adaptive else "rk38"
    x, y = rng.uniform(size=(batch, 28, 28, 1)).astype(np.float32), rng.integers(0, 10, batch)
    net = continuous.create(
        "odenet_mnist", jax.random.key(0), shape=(28, 28, 1), classes=10, channels=args.channels, cfg=cfg
    )
    params = unflatten({tuple(name.split(".")): jnp.asarray(value) for name, value in made.items()})
    model, threat, images = continuous.ode_model(net._replace(params=params)), ja.linf(EPS), jnp.asarray(x)
    attack = ja.pgd(threat, steps=20, start="zero", keep="last")

    def loss(params, x):
        return losses.cross_entropy(net.apply(params, net.state, x)[0], y).mean()

    def update(params, x):
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, jax.grad(loss)(params, x))

    run: Callable = jax.jit(lambda model, x: attack.run(jax.random.key(0), model, x, jnp.asarray(y, jnp.int32)).x)
    ours = {
        "forward": blocked(jax.jit(lambda model, x: model(x)), model, images),
        "input gradient": blocked(jax.jit(core.canonical(jax.grad(loss, 1))), params, images),
        "training step": blocked(jax.jit(core.canonical(update)), params, images),
        "PGD-20": blocked(run, model, images),
    }
    w = {name: torch.tensor(value, requires_grad=True) for name, value in made.items()}
    pixels, labels = torch.tensor(x.transpose(0, 3, 1, 2).copy()), torch.tensor(y)

    def slope(point, wanted):
        out = parity.logits("odenet_mnist", w, point, peer)
        return torch.autograd.grad(functional.cross_entropy(out, labels), wanted)

    def forward():
        with torch.no_grad():
            return parity.logits("odenet_mnist", w, pixels, peer)

    def input_gradient():
        point = pixels.clone().requires_grad_()
        return slope(point, [point])[0]

    def training_step():
        for p, g in zip(w.values(), slope(pixels, list(w.values()))):
            p.data -= 1e-3 * g

    def attacked():
        point = pixels.clone()
        for _ in range(20):
            point.requires_grad_()
            moved = point + 2.5 * EPS / 20 * slope(point, [point])[0].sign()
            point = torch.clamp(pixels + torch.clamp(moved - pixels, -EPS, EPS), 0, 1).detach()
        return point

    theirs = {"forward": forward, "input gradient": input_gradient, "training step": training_step, "PGD-20": attacked}
    apart = float(np.abs(np.asarray(model(x)) - forward().numpy()).max())
    asked = {"ours": int(continuous.solved(model, images)[1].nfe.max()), "torchdiffeq": evaluations(parity, forward)}
    print(f"batch {batch}: logits differ by {apart:.1e}; evaluations of the field {asked}")
    return {f"{row}, batch {batch}": {"ours": ours[row], "torchdiffeq": theirs[row]} for row in ours}, asked


def perceptron(params: Any, t: Any, z: Any) -> Any:
    """A field of two layers."""
    del t
    return jnp.tanh(z @ params[0]) @ params[1]


def small(args: argparse.Namespace) -> dict[str, dict[str, Callable]]:
    """Row to contenders, with a perceptron as field."""
    import ode as parity
    import torch
    from torchdiffeq import odeint

    rng, cfg = np.random.default_rng(1), solver(args)
    weights = [rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 8 for _ in range(2)]
    z = rng.normal(size=(64, WIDTH)).astype(np.float32)

    def total(params, z):
        return jnp.sum(ode_solve(perceptron, params, z, cfg)[0] ** 2)

    ours = {
        "field, forward": blocked(jax.jit(total), weights, z),
        "field, gradient": blocked(jax.jit(jax.grad(total)), weights, z),
    }
    w, state = [torch.tensor(v, requires_grad=True) for v in weights], torch.tensor(z)
    settings: dict[str, Any] = {"method": "rk4", "options": {"step_size": 1 / args.steps}}
    if args.adaptive:
        settings = {"method": "dopri5", "rtol": parity.TOLERANCE, "atol": parity.TOLERANCE}

    def end():
        times = torch.tensor([0.0, 1.0])
        return (odeint(lambda t, z: torch.tanh(z @ w[0]) @ w[1], state, times, **settings)[-1] ** 2).sum()

    def forward():
        with torch.no_grad():
            return end()

    theirs = {"field, forward": forward, "field, gradient": lambda: torch.autograd.grad(end(), w)}
    return {row: {"ours": ours[row], "torchdiffeq": theirs[row]} for row in ours}


def bare(args: argparse.Namespace) -> dict[str, dict[str, Callable]]:
    """A solve beside as many bare evaluations of its field in a compiled loop; and how often new weights trace."""
    rng, cfg, traces = np.random.default_rng(2), SolveCfg("rk38", "fixed", n_steps=4 * args.steps), []
    weights = [rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 8 for _ in range(2)]
    z = rng.normal(size=(1024, WIDTH)).astype(np.float32)

    def counted(params, t, z):
        traces.append(0)
        return perceptron(params, t, z)

    solve = jax.jit(lambda params, z: ode_solve(counted, params, z, cfg)[0])
    loop = jax.jit(lambda params, z: jax.lax.fori_loop(0, 16 * args.steps, lambda i, z: perceptron(params, i, z), z))
    solve(weights, z)
    first = len(traces)
    for factor in (2.0, 3.0):
        solve([factor * v for v in weights], z)
    print(f"traces of the field: {first} at first, {len(traces) - first} for new weights")
    return {"overhead": {"ours": blocked(solve, weights, z), "bare field": blocked(loop, weights, z)}}


def main() -> None:
    """Measure, print the table, store the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adaptive", action="store_true")
    parser.add_argument("--store", action="store_true", help="write results/ode.json, or ode_adaptive.json")
    args = parser.parse_args()
    contenders: dict[str, dict[str, Callable]] = {}
    asked = {}
    for batch in args.batches:
        made, asked[f"batch {batch}"] = network(args, batch)
        contenders |= made
    contenders |= small(args) | bare(args)
    rows, record = [["row", "ours, ms", "other, ms", "ratio", "first call, s"]], {}
    for row, pair in contenders.items():
        found = record[row] = harness.side_by_side(pair, args.rounds)
        ours, other = found["ours"], next(v for name, v in found.items() if name != "ours")
        times = [f"{1000 * side['median']:.2f}" for side in (ours, other)]
        rows.append([row, *times, f"{other['median'] / ours['median']:.2f}", f"{ours['first_call']:.2f}"])
    print(harness.table(rows))
    if args.store:
        told = {name: value for name, value in vars(args).items() if name != "store"}
        name = "ode_adaptive" if args.adaptive else "ode"
        found = {"settings": told, "environment": harness.environment(), "seconds": record, "evaluations": asked}
        print(harness.store(name, found))


if __name__ == "__main__":
    main()
