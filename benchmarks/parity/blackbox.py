"""Store what the black-box attacks of Foolbox and torchattacks reach on two MNIST networks, at stated queries.

Needs torch, foolbox and torchattacks; jaxadv is not imported. The networks and examples are those of `minimum.py`,
whose fixture is read. The network counts how often each row is asked, and remembers the nearest failing point that a
row was asked at: for each NET/ATTACK/NORM the new fixture holds `[seed, queries, example]` of these distances after
the numbers of queries in `QUERIES` (infinite where none was found), which is what an attack could have returned by
then. HopSkipJump in l2 runs one example at a time: Foolbox divides its directions by the norm of those of the batch.
For attacks with a budget, NET/ATTACK holds who was broken, and NET/ATTACK/queries the mean number of queries of a row.

Usage: python benchmarks/parity/blackbox.py tests/fixtures/minimum_torch.npz tests/fixtures/blackbox_torch.npz
"""

import contextlib
import sys
import time

import foolbox
import numpy as np
import torch
import torchattacks
from autoattack import torch_net, weights_of

NETS = ("mnist_standard", "mnist_robust")
QUERIES, SEEDS = (500, 1000, 2000, 4000), 2
ALONE = "hopskipjump/l2"
SPSA = {"mnist_standard": 0.2, "mnist_robust": 0.4}


class Spent(Exception):
    """The last number of queries is reached."""


class Watched(torch.nn.Module):
    """A network that asks all rows at each call, and remembers the nearest failing point of each row."""

    def __init__(self, net, x, y, order):
        super().__init__()
        self.net, self.x, self.y, self.order = net, x, y, order
        self.calls, self.best, self.stored = 0, torch.full((len(x),), torch.inf), []

    def forward(self, points):
        """Logits; every row is asked once."""
        logits = self.net(points)
        if len(points) != len(self.x):
            raise ValueError(f"a call must ask every row once; got {len(points)} points")
        size = torch.linalg.vector_norm((points - self.x).flatten(1), self.order, dim=1)
        fails = logits.argmax(1) != self.y
        self.best = torch.where(fails & (size < self.best), size, self.best)
        self.calls += 1
        if self.calls in QUERIES:
            self.stored.append(self.best.numpy().copy())
        if self.calls == QUERIES[-1]:
            raise Spent
        return logits


class Counted(torch.nn.Module):
    """A network that counts rows."""

    def __init__(self, net):
        super().__init__()
        self.net, self.rows = net, 0

    def forward(self, points):
        """Logits."""
        self.rows += len(points)
        return self.net(points)


def walks():
    """Minimum-norm attacks of Foolbox, with steps enough for the last number of queries."""
    attacks = foolbox.attacks
    return {
        "hopskipjump/l2": (2, attacks.HopSkipJumpAttack(steps=64, constraint="l2")),
        "hopskipjump/linf": (torch.inf, attacks.HopSkipJumpAttack(steps=64, constraint="linf")),
        "boundary/l2": (2, attacks.BoundaryAttack(steps=QUERIES[-1])),
        "salt_and_pepper/l2": (2, attacks.SaltAndPepperNoiseAttack(steps=QUERIES[-1] + 9)),
    }


def walked(net, x, y, search: str) -> np.ndarray:
    """The nearest distances after each number of queries, `[queries, example]`."""
    order, attack = walks()[search]
    watched = Watched(net, x, y, order).eval()
    with torch.no_grad(), contextlib.suppress(Spent):
        attack.run(foolbox.PyTorchModel(watched, (0, 1), device="cpu"), x, y)
    if len(watched.stored) < len(QUERIES):
        raise RuntimeError(f"{search} has ended after {watched.calls} queries")
    return np.stack(watched.stored)


def main(points: str, path: str) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    given, done = np.load(points), {}
    for name in NETS:
        net = torch_net(np.load(weights_of(name)), name)
        x = torch.from_numpy(given[f"{name}/x"].astype(np.float32) / 255).permute(0, 3, 1, 2)
        y = torch.from_numpy(given[f"{name}/y"].astype(np.int64))
        for search in walks():
            start = time.perf_counter()
            parts = [slice(i, i + 1) for i in range(len(x))] if search == ALONE else [slice(None)]
            found = []
            for seed in range(1 if search == ALONE else SEEDS):
                torch.manual_seed(seed)
                np.random.seed(seed)
                found.append(np.concatenate([walked(net, x[p], y[p], search) for p in parts], axis=1))
            done[f"{name}/{search}"] = np.stack(found).astype(np.float32)
            medians = np.median(done[f"{name}/{search}"], axis=2).mean(0).round(4)
            print(f"{name} {search}: medians {medians} ({time.perf_counter() - start:.0f} s)", flush=True)
        counted = Counted(net).eval()
        for attack, search in (
            ("spsa", torchattacks.SPSA(counted, eps=SPSA[name], nb_iter=30, nb_sample=64)),
            ("one_pixel", torchattacks.OnePixel(counted, pixels=10, steps=20, popsize=100)),
        ):
            start, counted.rows = time.perf_counter(), 0
            found = search(x, y)
            queries = counted.rows / len(x)
            with torch.no_grad():
                done[f"{name}/{attack}"] = (net(found).argmax(1) != y).numpy()
            done[f"{name}/{attack}/queries"] = np.float64(queries)
            rate = done[f"{name}/{attack}"].mean()
            print(f"{name} {attack}: broken {rate:.3f}, {queries:.0f} queries ({time.perf_counter() - start:.0f} s)")
    np.savez_compressed(path, **done)


if __name__ == "__main__":
    main(*sys.argv[1:])
