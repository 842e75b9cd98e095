"""Store the iterates of the official AutoAttack's APGD and FAB on a small network, in float64, for differential tests.

Needs torch and a checkout of fra31/auto-attack; jaxadv is not imported. The network is fast_adversarial's MNIST net on
8 x 8 images, trained for a few steps on blobs. Every point at which the official code asks the network is recorded by a
wrapper around the network, so the official code runs as it is; only its casts to float32 are turned into casts to
float64, so that rounding decides nothing. Stored arrays are channels-last. For each run NAME the apgd file holds

    NAME/start    the random start (drawn with the official code's own calls and seed)
    NAME/path     the points asked at the steps of `at`, the start included
    NAME/loss     the loss at every point asked (bigger is worse for the network)
    NAME/best     the point of the highest loss

and the fab file `NAME/path`, the points at which gradients are taken, `NAME/adv`, the nearest failing points, and
`P/NORM/...`, projections onto hyperplanes within the box.

Usage: python benchmarks/parity/apgd.py CHECKOUT tests/fixtures/apgd_torch.npz tests/fixtures/fab_torch.npz
"""

import sys

import numpy as np
import torch

EPS = {"Linf": 0.1, "L2": 0.6, "L1": 3.0}
STEPS, ROWS = 100, 10
AT = np.array([0, 1, 2, 3, 5, 10, 21, 22, 23, 24, 40, 42, 57, 58, 70, 71, 80, 90, 95, 100])
FAB_STEPS, FAB_AT = 30, np.array([0, 1, 2, 3, 5, 8, 12, 16, 20, 25, 29])


def network() -> torch.nn.Sequential:
    """Two strided convolutions and two dense layers, with the names of the original."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 4, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 4, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * 2 * 2, 50),
        torch.nn.ReLU(),
        torch.nn.Linear(50, 10),
    )


def trained() -> tuple[torch.nn.Sequential, torch.Tensor, torch.Tensor]:
    """A classifier of blobs and examples that it gets right, weights rounded so that float32 holds them."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    centers = torch.rand(10, 1, 8, 8)
    y = torch.arange(10).repeat(20)
    x = (centers[y] + 0.25 * torch.randn(200, 1, 8, 8)).clamp(0, 1).float()
    x = x.to(torch.float64)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(value.float().to(torch.float64))
    right = net(x).argmax(1) == y
    return net, x[right][:ROWS], y[right][:ROWS]


def last(images: torch.Tensor) -> np.ndarray:
    return images.detach().permute(0, 2, 3, 1).contiguous().numpy()


class Recorder:
    """A network that remembers where it was asked, in rows `[b]`."""

    def __init__(self, net):
        self.net, self.seen = net, []

    def __call__(self, x):
        """Ask the network; remember the point if a gradient is about to be taken there."""
        if x.requires_grad:
            self.seen.append(x.detach().clone())
        return self.net(x)


def losses(net, points, y, target=None):
    """Cross-entropy, or the targeted DLR written down anew."""
    z = net(points).detach()
    rows = torch.arange(len(y))
    if target is None:
        return torch.logsumexp(z, 1) - z[rows, y]
    top = z.sort(dim=1, descending=True)[0]
    return -(z[rows, y] - z[rows, target]) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def apgd(base, net, x, y) -> dict[str, np.ndarray]:
    stored = {"at": AT, "eps": np.array(list(EPS.values())), "steps": np.array(STEPS)}
    runs = [(norm, "ce", False) for norm in EPS] + [("Linf", "t", False), ("L1", "ce", True)]
    for norm, kind, large in runs:
        name = f"{norm.lower()}_{kind}{'_large' if large else ''}"
        recorder, eps = Recorder(net), EPS[norm]
        made = base.APGDAttack_targeted if kind == "t" else base.APGDAttack
        attack = made(recorder, n_iter=STEPS, norm=norm, eps=eps, use_largereps=large)
        attack.init_hyperparam(x)
        target = None
        if kind == "t":
            target = attack.y_target = net(x).sort(dim=1)[1][:, -2]
        torch.manual_seed(1)
        if large:
            moves = [30, 30, 40]
            best = attack.decr_eps_pgd(x, y, [3 * eps, 2 * eps, eps], moves)[0]
        else:
            best = attack.attack_single_run(x, y)[0]
        path = torch.stack(recorder.seen)
        at = AT if not large else np.array([0, 1, 5, 30, 31, 32, 61, 62, 63, 80, 102])
        stored |= {
            f"{name}/start": last(recorder.seen[0]),
            f"{name}/path": np.stack([last(p) for p in path[at]]),
            f"{name}/at": at,
            f"{name}/loss": np.stack([losses(net, p, y, target).numpy() for p in path]).astype(np.float32),
            f"{name}/best": last(best),
        }
        print(name, len(path), "wrong at the best", (net(best).argmax(1) != y).sum().item(), "of", len(y))
    return stored


def fab(base, projections, net, x, y) -> dict[str, np.ndarray]:
    stored = {"at": FAB_AT, "steps": np.array(FAB_STEPS)}
    for norm in EPS:
        for targeted in (False, True):
            name = f"{norm.lower()}_{'t' if targeted else 'u'}"
            recorder = Recorder(net)
            attack = base.FABAttack_PT(recorder, norm=norm, n_iter=FAB_STEPS, eps=EPS[norm], targeted=targeted)
            attack.target_class = 2
            with torch.no_grad():
                adv = attack.attack_single_run(x, y, is_targeted=targeted)
            path = torch.stack(recorder.seen)
            stored |= {f"{name}/path": np.stack([last(p) for p in path[FAB_AT]]), f"{name}/adv": last(adv)}
            print(name, len(path), "wrong", (net(adv).argmax(1) != y).sum().item(), "of", len(y))
    torch.manual_seed(2)
    points, w = torch.rand(40, 12), torch.randn(40, 12)
    points[:10, :4] = (points[:10, :4] > 0.5).to(torch.float64)
    w[10:20, ::3] = 0
    b = (w * torch.rand(40, 12)).sum(1)
    b[30:35] = w[30:35].clamp(min=0).sum(1) + 1  # out of reach within the box
    stored |= {"P/points": points.numpy(), "P/w": w.numpy(), "P/b": b.numpy()}
    for norm in EPS:
        moved = getattr(projections, f"projection_{norm.lower()}")(points.clone(), w.clone(), b.clone())
        stored[f"P/{norm.lower()}"] = moved.numpy()
    return stored


def main(checkout: str, path: str, fab_path: str) -> None:
    sys.path.insert(0, checkout)
    from autoattack import autopgd_base, fab_projections, fab_pt

    net, x, y = trained()
    torch.Tensor.float = torch.Tensor.double  # the official casts, one precision up
    common = {f"w.{name}": value.detach().numpy().astype(np.float32) for name, value in net.named_parameters()}
    common |= {"x": last(x).astype(np.float32), "y": y.numpy().astype(np.int32)}
    np.savez_compressed(path, **common, **apgd(autopgd_base, net, x, y))
    np.savez_compressed(fab_path, **fab(fab_pt, fab_projections, net, x, y))


if __name__ == "__main__":
    main(*sys.argv[1:])
