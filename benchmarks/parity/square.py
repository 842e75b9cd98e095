"""Store what the official Square attack does to a small MNIST network, and its bumps, for the tests of our Square.

Needs torch and a checkout of fra31/auto-attack; jaxadv is not imported. The network is fast_adversarial's MNIST net,
trained for two epochs on 10,000 images; weights are rounded to few bits so that they are stored without loss. For
each norm the file holds, for three seeds, the robust accuracy and each example's verdict after so many queries; and
the official bump of several sizes, upright. Arrays are channels-last.

Usage: python benchmarks/parity/square.py AUTO_ATTACK_FOLDER MNIST_FOLDER tests/fixtures/square_torch.npz
"""

import gzip
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

EPS = {"linf": 0.1, "l2": 1.5, "l1": 12.0}
QUERIES, EXAMPLES, SEEDS = 300, 200, 3
SIDES = (1, 2, 3, 5, 6, 7, 11, 15, 21, 25)


def mnist(folder: Path, split: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first n images, channels first, and their labels."""
    images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    x = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)[:n].astype(np.float32) / 255
    return torch.from_numpy(x), torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8)[:n].astype(np.int64))


def network() -> nn.Sequential:
    """Two strided convolutions and two dense layers, with the names of the original."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def train(folder: Path) -> nn.Sequential:
    """A network of about 96 % accuracy, its weights exact in bfloat16."""
    x, y = mnist(folder, "train", 10_000)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(2):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(value.bfloat16().half().float())
    return net.eval()


def upright(attack, side: int) -> np.ndarray:
    """The official bump before the coin that turns it."""
    while True:
        bump = attack.eta(side).numpy()
        if side == 1 or np.abs(bump.sum(1)[0]) >= np.abs(bump.sum(0)[0]):
            return bump


def main(auto_attack: str, folder: str, path: str) -> None:
    sys.path.insert(0, auto_attack)
    from autoattack.square import SquareAttack

    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = train(Path(folder))
    x, y = mnist(Path(folder), "t10k", 2 * EXAMPLES)
    with torch.no_grad():
        right = (net(x).argmax(1) == y).nonzero().squeeze()[:EXAMPLES]
    x, y = x[right], y[right]
    stored = {f"w.{k}": v.numpy().astype(np.float16) for k, v in net.state_dict().items()}
    stored |= {"x": (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), "y": y.numpy().astype(np.int32)}
    with torch.no_grad():
        stored["logits"] = net(x).numpy()
    for norm, eps in EPS.items():
        upper = norm.replace("l", "L")
        settings = {"norm": upper, "n_queries": QUERIES, "eps": eps, "device": "cpu", "resc_schedule": False}
        verdicts = []
        for seed in range(SEEDS):
            attack = SquareAttack(net, seed=seed, **settings)
            with torch.no_grad():
                verdicts.append((net(attack.perturb(x, y)).argmax(1) != y).numpy())
        stored[norm] = np.stack(verdicts)
        print(norm, eps, "broken", stored[norm].mean(1))
        if norm != "linf":
            stored |= {f"bump.{norm}.{side}": upright(attack, side) for side in SIDES}
    np.savez_compressed(path, queries=QUERIES, eps=np.array([EPS[n] for n in ("linf", "l2", "l1")]), **stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
