"""Store what ART, torchattacks and adv-lib reach on two MNIST networks, with attacks that no other file here holds.

Needs torch, adversarial-robustness-toolbox, torchattacks and adv-lib; jaxadv is not imported. The networks are those
of `autoattack.py`; the examples are the first test images that both have right. For each NET that is named the file
holds

- `square/NORM`: `[seed, example]` who is broken by ART's Square after `SQUARE` proposals within `EPS`. No test reads
  it: three seeds differ by ten points, on either side, and cannot tell 2 %;
- `spatial/cubic`: `[transformation, example]` who is fooled at each point of ART's grid, three shifts to the right
  (where channels come first ART takes their number for the height, and shifts by no row) and then five angles;
  `spatial/linear`: the same where ART's rotation interpolates linearly and not by cubic splines;
- `universal/NORM`: `[seed]` share of the examples that ART's universal perturbation fools after `PASSES` passes;
- `jsma/l0`: for the first examples the number of features that torchattacks' JSMA changes on the way to the class
  after the label, infinite where it does not arrive within a tenth of the features;
- `carlini/l2`, `ead/l1`, `ead/en`: what torchattacks' Carlini-Wagner (one constant), EADL1 and EADEN minimize, at the
  points they return; `ddn/l2`, the size in l2 of adv-lib's, with pixels that are not rounded.

What the file holds already is not run again.

Usage: OMP_NUM_THREADS=1 python benchmarks/parity/peers.py MNIST_FOLDER tests/fixtures/peers_torch.npz mnist_standard
"""

import functools
import importlib
import importlib.util
import random
import sys
import time
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchattacks
from art.attacks.evasion import SpatialTransformation, SquareAttack, UniversalPerturbation, spatial_transformation
from art.estimators.classification import PyTorchClassifier
from autoattack import torch_net, weights_of
from scipy import ndimage
from square import mnist

NETS, EXAMPLES, SEEDS = ("mnist_standard", "mnist_robust"), 50, 3
SQUARE, PASSES, STEPS, ROUNDS, BETA, JSMA = 150, 3, 100, 5, 0.01, 25
DEGREES, PIXELS = 20.0, 2
EPS = {  # budgets of Square and of a universal perturbation
    "mnist_standard": ({"linf": 0.15, "l2": 3.0}, {"linf": 0.3, "l2": 4.5}),
    "mnist_robust": ({"linf": 0.35, "l2": 3.0}, {"linf": 0.4, "l2": 4.5}),
}
ORDER = {"linf": np.inf, "l2": 2}


class Listening(torch.nn.Module):
    """A network that remembers which classes it has told."""

    def __init__(self, net):
        super().__init__()
        self.net, self.told = net, []

    def forward(self, x):
        """Logits."""
        logits = self.net(x)
        self.told.append(logits.detach().argmax(1).numpy())
        return logits


def adv_lib_ddn():
    """DDN of adv-lib, without what the package imports beside it (torchvision's models, a plotter)."""
    folder = Path(importlib.util.find_spec("adv_lib").origin).parent
    rest = types.ModuleType("adv_lib.attacks")
    rest.__path__ = [str(folder / "attacks")]
    sys.modules |= {"adv_lib.attacks": rest, "visdom": types.ModuleType("visdom")}
    return importlib.import_module("adv_lib.attacks.decoupled_direction_norm").ddn


def art_of(net):
    """A network as ART's classifier."""
    loss = torch.nn.CrossEntropyLoss()
    return PyTorchClassifier(net, loss, (1, 28, 28), 10, clip_values=(0.0, 1.0), device_type="cpu")


def seeded(seed: int) -> None:
    """ART draws by two generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def square(net, x, y, norm: str, eps: float) -> np.ndarray:
    """Who is broken, `[seed, example]`."""
    broken = []
    for seed in range(SEEDS):
        seeded(seed)
        attack = SquareAttack(art_of(net), norm=ORDER[norm], max_iter=SQUARE, eps=eps, verbose=False)
        points = torch.from_numpy(attack.generate(x.numpy().copy(), y.numpy()))
        size = torch.linalg.vector_norm((points - x).flatten(1), ORDER[norm], dim=1)
        if not (size <= eps * (1 + 1e-5)).all():
            raise RuntimeError(f"points of ART's Square leave the budget in {norm}: {size.max():.4f} > {eps}")
        broken.append((net(points).argmax(1) != y).numpy())
    return np.stack(broken)


def spatial(net, x, y, order: int) -> np.ndarray:
    """Who is fooled by each transformation; ART's answer is the one that fools most."""
    ears = Listening(net).eval()
    attack = SpatialTransformation(
        art_of(ears), 100 * PIXELS / 28, num_translations=3, max_rotation=DEGREES, num_rotations=5, verbose=False
    )
    with mock.patch.object(spatial_transformation, "rotate", functools.partial(ndimage.rotate, order=order)):
        attack.generate(x.numpy().copy())
    told = np.concatenate(ears.told).reshape(-1, len(x))
    fooled = told[1:] != y.numpy()
    if (told[0] != y.numpy()).any() or len(fooled) != 15 or abs(fooled.mean(1).max() - attack.fooling_rate) > 1e-9:
        raise RuntimeError("ART has asked at other points than those of its grid")
    return fooled


def universal(net, x, norm: str, eps: float) -> np.ndarray:
    """Share of fooled examples, `[seed]`."""
    rates = []
    for seed in range(SEEDS):
        seeded(seed)
        inner = {"max_iter": 10, "epsilon": 0.02, "nb_grads": 10, "verbose": False}
        attack = UniversalPerturbation(
            art_of(net), "deepfool", inner, delta=0.0, max_iter=PASSES, eps=eps, norm=ORDER[norm], verbose=False
        )
        attack.generate(x.numpy().copy())
        rates.append(attack.fooling_rate)
    return np.array(rates)


def sized(net, x, y, points, measure, reached=None) -> np.ndarray:
    """What a measure says of each move, infinite where the point does not fail (or reach a class)."""
    told = net(points).argmax(1)
    hit = told != y if reached is None else told == reached
    return torch.where(hit, measure((points - x).flatten(1)), torch.inf).detach().numpy().astype(np.float32)


def nearest(net, x, y):
    """Names, and the distances of the minimum-norm attacks."""
    elastic = {"max_iterations": STEPS, "binary_search_steps": ROUNDS, "initial_const": 0.1, "beta": BETA}
    elastic |= {"abort_early": False}

    def length(move):
        return torch.linalg.vector_norm(move, dim=1)

    def total(move):
        return move.abs().sum(1)

    def both(move):
        return move.square().sum(1) + BETA * total(move)

    yield "carlini/l2", lambda: sized(net, x, y, torchattacks.CW(net, c=10, steps=100)(x, y), length)
    yield "ead/l1", lambda: sized(net, x, y, torchattacks.EADL1(net, **elastic)(x, y), total)
    yield "ead/en", lambda: sized(net, x, y, torchattacks.EADEN(net, **elastic)(x, y), both)
    yield "ddn/l2", lambda: sized(net, x, y, adv_lib_ddn()(net, x, y, steps=100, levels=None), length)


def searches(name: str, net, x, y):
    """What is stored for a network: names to functions without arguments."""
    square_eps, universal_eps = EPS[name]

    def changed(move):
        return (move != 0).sum(1).float()

    yield "spatial/cubic", lambda: spatial(net, x, y, 3)
    yield "spatial/linear", lambda: spatial(net, x, y, 1)
    for norm, eps in square_eps.items():
        yield f"square/{norm}", lambda norm=norm, eps=eps: square(net, x, y, norm, eps)
    yield from nearest(net, x, y)
    target = (y[:JSMA] + 1) % 10
    yield (
        "jsma/l0",
        lambda: sized(net, x[:JSMA], y[:JSMA], torchattacks.JSMA(net)(x[:JSMA], y[:JSMA]), changed, target),
    )
    for norm, eps in universal_eps.items():
        yield f"universal/{norm}", lambda norm=norm, eps=eps: universal(net, x, norm, eps)


def told(search: str, found: np.ndarray) -> str:
    """One line about what was found."""
    if search.split("/")[0] == "spatial":
        return f"worst for all {found.mean(1).max():.3f}, for each {found.any(0).mean():.3f}"
    if search.split("/")[0] in ("square", "universal"):
        return f"rates {found.reshape(SEEDS, -1).mean(1).round(3)}"
    return f"median {np.median(found):.4f}, found {np.isfinite(found).sum()} of {len(found)}"


def main(folder: str, path: str, *names: str) -> None:
    torch.set_num_threads(1)
    images, labels = mnist(Path(folder), "t10k", 2 * EXAMPLES)
    nets = {name: torch_net(np.load(weights_of(name)), name) for name in NETS}
    right = torch.stack([net(images).argmax(1) == labels for net in nets.values()]).all(0)
    x, y = (values[right][:EXAMPLES] for values in (images, labels))
    done = dict(np.load(path)) if Path(path).exists() else {}
    done |= {"x": np.round(x.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8), "y": y.numpy().astype(np.int32)}
    for name in names:
        net = nets[name]
        done |= {f"{name}/{a}/{n}/eps": e for a, row in zip(("square", "universal"), EPS[name]) for n, e in row.items()}
        for search, run in searches(name, net, x, y):
            if f"{name}/{search}" in done:
                continue
            start = time.process_time()
            seeded(0)
            done[f"{name}/{search}"] = found = run()
            print(f"{name} {search}: {told(search, found)} ({time.process_time() - start:.0f} s)", flush=True)
            np.savez_compressed(path, **done)


if __name__ == "__main__":
    main(*sys.argv[1:])
