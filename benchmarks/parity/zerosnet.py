"""Make the fixture that compares our ZeroSNet with the authors' code on the same weights.

Needs an environment with torch and a checkout of github.com/LongJin-lab/ZeroSNet; jaxadv is not imported. Weights are
not stored: each is drawn from a generator seeded with the checksum of its name, on both sides. The file holds

    NAME/layers          blocks in each stage
    NAME/logits          of the inputs `x`, channels-last, with running statistics
    NAME/parameters      how many there are in layers that the authors' forward pass uses

Usage: python benchmarks/parity/zerosnet.py CHECKOUT [--out tests/fixtures/zerosnet_torch.npz]
"""

import argparse
import sys
import types
import zlib
from pathlib import Path

import numpy as np

NETS = {
    "trained": ("ZeroSNet_Tra", "ZeroSBlock", (2, 1, 1)),
    "bottleneck": ("ZeroSNet_Opt", "ZeroSBottleneck", (3, 1, 1)),
}
PUBLISHED = {"depth 20": ("ZeroSNet_Opt", "ZeroSBlock", (3, 3, 3))}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the weight of that name: positive for scales and variances, around -2 for the k of a block."""
    rng = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    value = rng.uniform(-1, 1, shape)
    if name.endswith(".coe"):
        return (-2 + 0.5 * value).astype(np.float32)
    if len(shape) > 1:
        return (value * np.sqrt(3 / np.prod(shape[1:]))).astype(np.float32)
    return (1 + value / 2 if name.endswith(("running_var", "weight")) else value / 2).astype(np.float32)


def build(authors, kind: str, block: str, layers: tuple[int, ...]):
    """Build one of the authors' networks with drawn weights, in evaluation."""
    import torch

    net = getattr(authors, kind)(getattr(authors, block), list(layers)).eval()
    state = {k: torch.from_numpy(draw(k, tuple(v.shape))) if v.ndim else v for k, v in net.state_dict().items()}
    net.load_state_dict({k: v.reshape(net.state_dict()[k].shape) for k, v in state.items()})
    return net


def used(net, x) -> int:
    """Count the parameters that the logits depend on."""
    net.zero_grad()
    net(x)[0].sum().backward()
    return sum(p.numel() for p in net.parameters() if p.grad is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures/zerosnet_torch.npz"))
    arguments = parser.parse_args()
    sys.modules["netron"] = types.ModuleType("netron")  # which their file imports and does not use
    import torch

    sys.path.insert(0, str(arguments.checkout / "CIFAR" / "models"))
    import ZeroSNet as authors

    x = np.random.Generator(np.random.Philox(0)).uniform(size=(2, 32, 32, 3)).astype(np.float32)
    held = {"x": x.astype(np.float16)}
    given = torch.from_numpy(held["x"].astype(np.float32).transpose(0, 3, 1, 2).copy())
    for name, (kind, block, layers) in NETS.items():
        net = build(authors, kind, block, layers)
        with torch.no_grad():
            held[f"{name}/logits"] = net(given)[0].numpy()
        held[f"{name}/layers"] = np.asarray(layers)
    for name, (kind, block, layers) in (NETS | PUBLISHED).items():
        held[f"{name}/parameters"] = np.asarray(used(build(authors, kind, block, layers), given))
    np.savez_compressed(arguments.out, **held)


if __name__ == "__main__":
    main()
