"""Store the distances that Foolbox and adv-lib find on two MNIST networks, for the tests of our minimum-norm attacks.

Needs torch, foolbox with numba, and a checkout of jeromerony/adversarial-library (Foolbox's FMN does not project in
l2); jaxadv is not imported. The networks are those of `autoattack.py`; the examples are the first test images that a
network has right. For each NET/ATTACK/NORM the file holds the size of each example's nearest failing point in that
norm, infinite where none was found, and the examples as bytes.

Usage: python benchmarks/parity/minimum.py ADV_LIB_FOLDER MNIST_FOLDER tests/fixtures/minimum_torch.npz [ATTACK ...]
With attacks named, only theirs are searched, and what the file holds of the others stays.
"""

import sys
import time
import types
from pathlib import Path

import foolbox
import numpy as np
import torch
from autoattack import torch_net, weights_of
from square import mnist

NETS, EXAMPLES = ("mnist_standard", "mnist_robust"), 24
STEPS, ROUNDS, LONG = 100, 6, 200  # of one search; of a search over the constant, and along a boundary
ORDER = {"linf": torch.inf, "l2": 2, "l1": 1, "l0": 0}


def searches(fmn):
    """The attacks: name and norm to a function of model, examples and labels that returns points."""
    attacks, bounds = foolbox.attacks, (0, 1)

    def of_foolbox(attack):
        return lambda net, x, y: attack.run(foolbox.PyTorchModel(net, bounds, device="cpu"), x, y)

    table = {
        "deepfool/l2": of_foolbox(attacks.L2DeepFoolAttack()),
        "deepfool/linf": of_foolbox(attacks.LinfDeepFoolAttack()),
        "ddn/l2": of_foolbox(attacks.DDNAttack(steps=STEPS)),
        "carlini/l2": of_foolbox(attacks.L2CarliniWagnerAttack(ROUNDS, LONG, initial_const=0.1, abort_early=False)),
        "ead/l1": of_foolbox(attacks.EADAttack(ROUNDS, LONG, initial_const=0.1, decision_rule="L1", abort_early=False)),
    }
    walks = {"linf": "Linfinity", "l2": "L2", "l1": "L1", "l0": "L0"}
    for norm, p in ORDER.items():
        walk = getattr(attacks, f"{walks[norm]}BrendelBethgeAttack")
        table[f"brendel_bethge/{norm}"] = of_foolbox(walk(steps=LONG))
        table[f"fmn/{norm}"] = lambda net, x, y, p=p: fmn(net, x, y, norm=p, steps=STEPS)
    return table


def main(checkout: str, folder: str, path: str, *only: str) -> None:
    sys.path.insert(0, checkout)
    rest = types.ModuleType("adv_lib.attacks")  # without what its __init__ imports
    rest.__path__ = [str(Path(checkout) / "adv_lib" / "attacks")]
    sys.modules["adv_lib.attacks"] = rest
    from adv_lib.attacks.fast_minimum_norm import fmn

    torch.manual_seed(0)
    images, labels = mnist(Path(folder), "t10k", 4 * EXAMPLES)
    done = dict(np.load(path)) if only else {}
    for name in NETS:
        net = torch_net(np.load(weights_of(name)), name)
        with torch.no_grad():
            right = torch.nonzero(net(images).argmax(1) == labels)[:EXAMPLES, 0]
        x, y = images[right], labels[right]
        done[f"{name}/x"] = np.round(x.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
        done[f"{name}/y"] = y.numpy().astype(np.int32)
        for search, attack in searches(fmn).items():
            if only and search.split("/")[0] not in only:
                continue
            start = time.perf_counter()
            points = attack(net, x, y).detach()
            with torch.no_grad():
                black = points.flatten(1).abs().amax(1) == 0  # what Foolbox returns where it has found nothing
                fails = (net(points).argmax(1) != y) & ~black
            size = torch.linalg.vector_norm((points - x).flatten(1), ORDER[search.split("/")[1]], dim=1)
            done[f"{name}/{search}"] = torch.where(fails, size, torch.inf).numpy().astype(np.float32)
            median = float(np.median(done[f"{name}/{search}"]))
            seconds = time.perf_counter() - start
            print(f"{name} {search}: median {median:.4f}, found {int(fails.sum())} ({seconds:.0f} s)", flush=True)
    np.savez_compressed(path, **done)


if __name__ == "__main__":
    main(*sys.argv[1:])
