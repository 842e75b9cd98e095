"""Store what torchattacks' transfer attacks return on a small network in float64, for the parity test of the family.

Needs torch and torchattacks; jaxadv is not imported. Randomness is taken out: DI's smaller size and place are the only
ones that 8 pixels leave at a rate of 0.9 (7 pixels, in the first corner) and its chance is 1; the one neighbor of VMI
lies at a fixed `pattern` times the radius. Stored arrays are channels-last; points are rounded to float32.

Usage: python benchmarks/parity/transferable.py tests/fixtures/transferable_torch.npz
"""

import sys
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchattacks
from torch.nn import functional

EPS, STEPS, STEP_SIZE, COPIES, KERNEL, LEAST, BETA = 0.15, 8, 0.03, 3, 5, 0.9, 1.5
PLACES = ((4, 0, 0), (5, 1, 3), (7, 1, 0), (8, 0, 0))
"""Sizes and first pixels of shrunk images."""


def network() -> torch.nn.Sequential:
    """Two strided convolutions and two dense layers."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 4, stride=2, padding=1),
        torch.nn.Softplus(),
        torch.nn.Conv2d(8, 16, 4, stride=2, padding=1),
        torch.nn.Softplus(),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * 2 * 2, 32),
        torch.nn.Softplus(),
        torch.nn.Linear(32, 10),
    )


class Pattern:
    """Stands for noise: `uniform_` gives a fixed pattern times the upper end."""

    def __init__(self, values: torch.Tensor):
        """Keep the pattern, `[h, w, c]` in [-1, 1]."""
        self.values = values.permute(2, 0, 1)

    def uniform_(self, low: float, high: float) -> torch.Tensor:
        """Return what is drawn between `low = -high` and `high`."""
        del low
        return high * self.values


def main(path: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    centers = torch.rand(10, 3, 8, 8)
    y = torch.arange(10).repeat(20)
    x = (centers[y] + 0.3 * torch.randn(200, 3, 8, 8)).clamp(0, 1)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net, x, y = net.double().eval(), x[:20].double(), y[:20]
    pattern = torch.cos(2.3 * torch.arange(192)).reshape(8, 8, 3).double()
    steps = {"eps": EPS, "alpha": STEP_SIZE, "steps": STEPS, "decay": 1.0}
    attacks: dict[str, Any] = {
        "mi": torchattacks.MIFGSM(net, **steps),
        "ni": torchattacks.NIFGSM(net, **steps),
        "di": torchattacks.DIFGSM(net, **steps, resize_rate=LEAST, diversity_prob=1.0),
        "ti": torchattacks.TIFGSM(net, **steps, len_kernel=KERNEL, diversity_prob=0.0),
        "ti_di": torchattacks.TIFGSM(net, **steps, len_kernel=KERNEL, resize_rate=LEAST, diversity_prob=1.0),
        "si_ni": torchattacks.SINIFGSM(net, **steps, m=COPIES),
        "vmi": torchattacks.VMIFGSM(net, **steps, N=1, beta=BETA),
        "vni": torchattacks.VNIFGSM(net, **steps, N=1, beta=BETA),
    }
    for attack in attacks.values():
        if hasattr(attack, "stacked_kernel"):
            attack.stacked_kernel = attack.stacked_kernel.double()

    def last(images: torch.Tensor) -> np.ndarray:
        return images.detach().permute(0, 2, 3, 1).contiguous().numpy().astype(np.float32)

    stored = {f"w.{name}": value.detach().numpy().astype(np.float32) for name, value in net.named_parameters()}
    stored |= {"x": last(x), "y": y.numpy().astype(np.int32), "logits": net(x).detach().numpy()}
    stored |= {"pattern": pattern.numpy(), "places": np.asarray(PLACES, np.int32)}
    with mock.patch.object(torch, "randn_like", lambda _: Pattern(pattern)):
        stored |= {name: last(attack(x, y)) for name, attack in attacks.items()}
    for mode in ("bilinear", "nearest"):
        options = {"align_corners": False} if mode == "bilinear" else {}
        small = [functional.interpolate(x[:1], size=[size, size], mode=mode, **options) for size, _, _ in PLACES]
        laid = [functional.pad(s, [c, 8 - n - c, r, 8 - n - r]) for s, (n, r, c) in zip(small, PLACES)]
        stored[mode] = last(torch.cat(laid))
    numbers = {"eps": EPS, "steps": STEPS, "step_size": STEP_SIZE, "copies": COPIES, "kernel": KERNEL}
    np.savez_compressed(path, **numbers, least=LEAST, beta=BETA, **stored)
    wrong = {
        name: (net(torch.tensor(stored[name]).double().permute(0, 3, 1, 2)).argmax(1) != y).sum().item()
        for name in attacks
    }
    print(f"{path}: clean errors {(net(x).argmax(1) != y).sum().item()}, under attack {wrong} of {len(y)}")


if __name__ == "__main__":
    main(sys.argv[1])
