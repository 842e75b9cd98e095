"""Store what torchattacks' FGSM, PGD, BIM and MIFGSM return on a small network, for the parity test of the engine.

Needs torch and torchattacks; jaxadv is not imported. The network is fast_adversarial's MNIST net on 8 x 8 images,
trained for a few steps on blobs, so that its gradients are those of a classifier. Stored arrays are channels-last.

Usage: python benchmarks/parity/gradient.py tests/fixtures/gradient_torch.npz
"""

import sys

import numpy as np
import torch
import torchattacks

EPS, STEPS, STEP_SIZE = 0.1, 10, 0.02


def network() -> torch.nn.Sequential:
    """Two strided convolutions and two dense layers, with the names of the original."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 4, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 4, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * 2 * 2, 100),
        torch.nn.ReLU(),
        torch.nn.Linear(100, 10),
    )


def main(path: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    centers = torch.rand(10, 1, 8, 8)
    y = torch.arange(10).repeat(20)
    x = (centers[y] + 0.25 * torch.randn(200, 1, 8, 8)).clamp(0, 1)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()
    x, y = x[:60], y[:60]
    attacks = {
        "fgsm": torchattacks.FGSM(net, eps=EPS),
        "pgd": torchattacks.PGD(net, eps=EPS, alpha=STEP_SIZE, steps=STEPS, random_start=False),
        "bim": torchattacks.BIM(net, eps=EPS, alpha=STEP_SIZE, steps=STEPS),
        "mi_fgsm": torchattacks.MIFGSM(net, eps=EPS, alpha=STEP_SIZE, steps=STEPS, decay=1.0),
    }

    def last(images: torch.Tensor) -> np.ndarray:
        return images.detach().permute(0, 2, 3, 1).contiguous().numpy()

    stored = {f"w.{name}": value.detach().numpy() for name, value in net.named_parameters()}
    stored |= {"x": last(x), "y": y.numpy().astype(np.int32), "logits": net(x).detach().numpy()}
    stored |= {name: last(attack(x, y)) for name, attack in attacks.items()}
    np.savez_compressed(path, eps=EPS, steps=STEPS, step_size=STEP_SIZE, **stored)
    wrong = {
        name: (net(torch.tensor(stored[name]).permute(0, 3, 1, 2)).argmax(1) != y).sum().item() for name in attacks
    }
    print(f"{path}: clean errors {(net(x).argmax(1) != y).sum().item()}, under attack {wrong} of {len(y)}")


if __name__ == "__main__":
    main(sys.argv[1])
