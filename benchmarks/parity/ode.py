"""Make the fixture that compares our ODE networks with torchdiffeq on the same weights and grids.

Needs an environment with torch and torchdiffeq; jaxadv is not imported. The two networks are written down here in plain
torch, from their descriptions: what is compared is the solver, the place of the time, norms and heads. For each network
the file holds

    NAME/spec            JSON: name, shape, classes and options of `jaxadv.models.make_spec`
    NAME/weights/PATH    the parameters, under the paths and in the layouts of jaxadv
    NAME/x, NAME/y       inputs, channels-last, and labels
    NAME/METHOD/logits   for METHOD in euler, midpoint, rk38 (torchdiffeq's rk4), each with four steps, and dopri5
                         (whole batch, tolerances 1e-4)
    NAME/METHOD/grad     gradient of the summed cross-entropy to the input

Usage: python benchmarks/parity/ode.py [--out tests/fixtures/ode_torchdiffeq.npz]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torchdiffeq import odeint

METHODS = {"euler": "euler", "midpoint": "midpoint", "rk38": "rk4", "dopri5": "dopri5"}
STEPS, CHANNELS, SIDE, TOLERANCE = 4, 4, 12, 1e-4
SPECS = {
    "odenet_mnist": {"channels": CHANNELS, "stem": 3},
    "odenet_tis": {"channels": CHANNELS, "stem": 2, "time": False},
}


def normed(z, w, name):
    """Group normalization with at most 32 groups."""
    return functional.group_norm(z, min(32, CHANNELS), w[f"{name}.scale"], w[f"{name}.bias"], 1e-5)


def convolved(z, w, name, **settings):
    """A convolution; kernels are kept as [h, w, in, out]."""
    return functional.conv2d(z, w[f"{name}.kernel"].permute(3, 2, 0, 1), w.get(f"{name}.bias"), **settings)


def field(name, w):
    """The vector field as torchdiffeq calls it."""

    def seen(t, z, layer):
        if f"block.field.{layer}.bias" in w:  # it sees the time, as the first channel
            z = torch.cat([torch.ones_like(z[:, :1]) * t, z], 1)
        return convolved(z, w, f"block.field.{layer}", padding=1)

    def mnist(t, z):
        for number, layer in enumerate(("conv1", "conv2")):
            z = seen(t, functional.relu(normed(z, w, f"block.field.norms.{number}")), layer)
        return normed(z, w, "block.field.norms.2")

    def tis(t, z):
        for number, layer in enumerate(("conv1", "conv2")):
            z = functional.relu(normed(seen(t, z, layer), w, f"block.field.norms.{number}"))
        return z

    return mnist if name == "odenet_mnist" else tis


def logits(name, w, x, method):
    """The network on a batch [b, c, h, w]."""
    stem, norms = SPECS[name]["stem"], sum(key.startswith("stem.norms") for key in w) // 2
    for number in range(stem):
        x = convolved(x, w, f"stem.convs.{number}", **({"stride": 2, "padding": 1} if number else {}))
        if number < norms:
            x = functional.relu(normed(x, w, f"stem.norms.{number}"))
    times = torch.tensor([0.0, 1.0])
    if method == "dopri5":
        settings = {"rtol": TOLERANCE, "atol": TOLERANCE}
    else:
        settings = {"options": {"step_size": 1 / STEPS}}
    x = odeint(field(name, w), x, times, method=METHODS[method], **settings)[-1]
    if name == "odenet_mnist":
        x = functional.relu(normed(x, w, "norm"))
    return x.mean((2, 3)) @ w["linear.kernel"] + w["linear.bias"]


def weights(name, rng):
    """Random parameters under the paths of jaxadv."""
    spec, time = SPECS[name], SPECS[name].get("time", True)
    first = name == "odenet_mnist"
    shapes = {"stem.convs.0.kernel": (3, 3, 1, CHANNELS), "stem.convs.0.bias": (CHANNELS,)}
    for i in range(1, spec["stem"]):
        shapes |= {f"stem.convs.{i}.kernel": (4, 4, CHANNELS, CHANNELS), f"stem.convs.{i}.bias": (CHANNELS,)}
    norms = [f"stem.norms.{i}" for i in range(spec["stem"] - first)]
    norms += [f"block.field.norms.{i}" for i in range(3 if first else 2)] + (["norm"] if first else [])
    for layer in ("conv1", "conv2"):
        shapes[f"block.field.{layer}.kernel"] = (3, 3, CHANNELS + time, CHANNELS)
        if time:
            shapes[f"block.field.{layer}.bias"] = (CHANNELS,)
    shapes |= {"linear.kernel": (CHANNELS, 10), "linear.bias": (10,)}
    drawn = {key: rng.normal(size=shape) / np.sqrt(max(1, np.prod(shape[:-1]))) for key, shape in shapes.items()}
    for norm in norms:
        drawn |= {f"{norm}.scale": 1 + 0.3 * rng.normal(size=CHANNELS), f"{norm}.bias": 0.3 * rng.normal(size=CHANNELS)}
    return {key: value.astype(np.float32) for key, value in drawn.items()}


def main() -> None:
    """Write the fixture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures/ode_torchdiffeq.npz"))
    args = parser.parse_args()
    rng, arrays = np.random.default_rng(0), {}
    for name, options in SPECS.items():
        made = weights(name, rng)
        x, y = rng.uniform(size=(3, SIDE, SIDE, 1)).astype(np.float32), np.array([1, 7, 3])
        spec = {"name": name, "shape": [SIDE, SIDE, 1], "classes": 10, "options": options}
        arrays |= {f"{name}/spec": json.dumps(spec), f"{name}/x": x, f"{name}/y": y}
        arrays |= {f"{name}/weights/{key}": value for key, value in made.items()}
        w = {key: torch.tensor(value) for key, value in made.items()}
        for method in METHODS:
            images = torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)
            out = logits(name, w, images, method)
            functional.cross_entropy(out, torch.tensor(y), reduction="sum").backward()
            arrays[f"{name}/{method}/logits"] = out.detach().numpy()
            arrays[f"{name}/{method}/grad"] = images.grad.numpy().transpose(0, 2, 3, 1)
    np.savez_compressed(args.out, **arrays)
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
