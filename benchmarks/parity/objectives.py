"""Store losses and gradients of the authors' codes of eight objectives, for the parity tests of ours.

Needs torch; jaxadv is not imported. The codes are read from checkouts of yaodongyu/TRADES, YisenWang/MART,
csdongxian/AWP, pdejorge/N-FGSM, tml-epfl/understanding-fast-adv-training, TreeLLi/Combating-RO-AdvLC, matanle51/DIAL,
HanshuYAN/CIFS and locuslab/fast_adversarial and run as they are, on the CPU, in float64, on small networks whose
weights are written down here. The random starts are stored, so that the search can be repeated. The single-step
methods, Free and AdvLC are no functions there: the lines of their training loops are cut out of the files. The
objectives that need a network of their own (DIAL, CIFS) go to a second file, fast_adversarial's to a third.

Usage: python benchmarks/parity/objectives.py FOLDER tests/fixtures/objectives_torch.npz
       tests/fixtures/objectives_torch2.npz tests/fixtures/objectives_torch3.npz
(FOLDER holds the checkouts TRADES, MART, AWP, N-FGSM, GradAlign, AdvLC, DIAL, CIFS, fast_adversarial; `-` in the place
of a file leaves it out)
"""

import contextlib
import copy
import importlib.util
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional

EPS, STEP_SIZE, STEPS, BETA, WEIGHT, GAMMA = 0.1, 0.02, 5, 6.0, 5.0, {"at": 0.01, "trades": 0.005}
TOP, CONSISTENCY, ALIGNMENT = 0.1, 0.3, 0.2
FEATURES, HIDDEN, CLASSES, ROWS = 12, 10, 4, 9
WIDTH, CHANNELS, DOMAIN, REVERSAL, GATES, RATE = 7, (4, 5), 6.0, 0.7, 2.0, 0.1


class Network(torch.nn.Module):
    """Linear, batch norm, tanh, linear: smooth, so that equal formulas give equal numbers."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(FEATURES, HIDDEN)
        self.norm = torch.nn.BatchNorm1d(HIDDEN)
        self.last = torch.nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        """Logits of rows or of images."""
        return self.last(torch.tanh(self.norm(self.first(x.flatten(1)))))


def load(path: Path, name: str):
    """Import one file."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noise(seed: int, draw, *shape) -> np.ndarray:
    """What the next call of a drawing function will return."""
    torch.manual_seed(seed)
    return draw(*shape).numpy()


def take(stored: dict, name: str, net: Network, loss) -> None:
    """Keep a loss, its gradient, and the statistics after the passes."""
    net.zero_grad()
    loss.backward()
    stored[f"{name}/loss"] = loss.item()
    for key, value in net.named_parameters():
        stored[f"{name}/grad/{key}"] = value.grad.numpy().copy()
    for key in ("running_mean", "running_var"):
        stored[f"{name}/after/{key}"] = getattr(net.norm, key).numpy().copy()


def watched(net):
    """Remember what a network is fed in train mode."""
    seen = []
    net.register_forward_pre_hook(lambda net, given: seen.append(given[0].detach().clone()) if net.training else None)
    return seen


def cut(path: Path, first: str, last: str) -> str:
    """The lines of a file from one that begins with `first` up to one that begins with `last`, dedented."""
    lines = path.read_text().split("\n")
    begin = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i in range(begin, len(lines)) if lines[i].strip().startswith(last))
    return textwrap.dedent("\n".join(lines[begin : end + 1]))


def begin():
    """The network, a batch, and both as they are stored."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.cuda = lambda self, *_: self  # the codes ask for a GPU
    torch.manual_seed(0)
    net = Network()
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape) * 0.6)
        net.norm.running_mean.copy_(torch.randn(HIDDEN) * 0.3)
        net.norm.running_var.copy_(0.5 + torch.rand(HIDDEN))
    x, y = torch.rand(ROWS, FEATURES), torch.randint(CLASSES, (ROWS,))
    stored = {f"w.{key}": value.numpy().copy() for key, value in net.state_dict().items() if value.is_floating_point()}
    return net, x, y, stored | {"x": x.numpy(), "y": y.numpy().astype(np.int32)}


def main(folder: Path, path: str) -> None:
    """Run the codes that take any network, and write the file."""
    net, x, y, stored = begin()
    optimizer = SimpleNamespace(zero_grad=lambda: None)
    settings = {"step_size": STEP_SIZE, "epsilon": EPS, "perturb_steps": STEPS}

    for name, file, beta in (("trades", "TRADES/trades.py", BETA), ("mart", "MART/mart.py", WEIGHT)):
        own = copy.deepcopy(net)
        code, seen = load(folder / file, name), watched(own)
        stored[f"{name}/noise"] = noise(1, torch.randn, *x.shape)
        torch.manual_seed(1)
        loss = getattr(code, f"{name}_loss")(own, x, y, optimizer, beta=beta, **settings)
        stored[f"{name}/found"] = seen[1].numpy()
        take(stored, name, own, loss)

    found = torch.tensor(stored["trades/found"])
    for name, file, kind in (
        ("at", "AT_AWP/utils_awp.py", "AdvWeightPerturb"),
        ("trades", "trades_AWP/utils_awp.py", "TradesAWP"),
    ):
        own, proxy = copy.deepcopy(net), copy.deepcopy(net)
        code = load(folder / "AWP" / file, f"awp_{name}")
        steps = torch.optim.SGD(proxy.parameters(), lr=0.01)
        adversary = getattr(code, kind)(model=own, proxy=proxy, proxy_optim=steps, gamma=GAMMA[name])
        own.train()
        given = {"inputs_adv": found, "targets": y}
        if name == "trades":
            given |= {"inputs_clean": x, "beta": BETA}
        adversary.perturb(adversary.calc_awp(**given))
        for key, value in own.named_parameters():
            stored[f"awp_{name}/moved/{key}"] = value.detach().numpy().copy()
        robust = own(found)
        loss = functional.cross_entropy(robust, y)
        if name == "trades":
            gap = functional.kl_div(
                functional.log_softmax(robust, 1), functional.softmax(own(x), 1), reduction="batchmean"
            )
            loss = functional.cross_entropy(own(x), y) + BETA * gap
        take(stored, f"awp_{name}", own, loss)

    images = x.reshape(ROWS, 1, 3, 4)
    limits = SimpleNamespace(
        clamp=lambda value, low, high: torch.max(torch.min(value, high), low),
        lower_limit=torch.zeros(1, 1, 1),
        upper_limit=torch.ones(1, 1, 1),
    )
    for name, unif, clip, alpha in (("n_fgsm", 2.0, -1, EPS), ("n_fgsm_clip", 1.0, 1, 1.25 * EPS)):
        own = copy.deepcopy(net).train()
        radius = torch.full((1, 1, 1), EPS)
        scope = {
            "torch": torch, "F": functional, "X": images, "y": y, "model": own, "attack_utils": limits,
            "epsilon": radius, "alpha": torch.full((1, 1, 1), alpha), "clip": clip * radius,
            "args": SimpleNamespace(unif=unif, clip=clip),
        }  # fmt: skip
        stored[f"{name}/noise"] = noise(
            2, lambda *s, u=unif: torch.empty(*s).uniform_(-u * EPS, u * EPS), *images.shape
        )
        torch.manual_seed(2)
        lines = cut(folder / "N-FGSM/train.py", "# Initialize random step", "output = model(X + delta)")
        exec(compile(lines, "N-FGSM/train.py", "exec"), scope)
        stored[f"{name}/found"] = (images + scope["delta"]).reshape(ROWS, -1).numpy()
        take(stored, name, own, functional.cross_entropy(scope["output"], y))

    own = copy.deepcopy(net).train()
    scope = {
        "model": own, "tc": torch, "criterion": torch.nn.CrossEntropyLoss(), "lgt_cle": own(x), "adv": found,
        "tgt": y, "batch_size": ROWS, "epoch": 0,
        "args": SimpleNamespace(reg_top=TOP, reg_lam=CONSISTENCY, reg_warmup=False),
    }  # fmt: skip
    exec(
        compile(cut(folder / "AdvLC/src/utils/train.py", "lgt_adv = model(adv)", "loss += lam"), "AdvLC", "exec"), scope
    )
    take(stored, "advlc", own, scope["loss"])

    sys.modules |= {"apex": SimpleNamespace(amp=None), "apex.amp": SimpleNamespace()}
    utils, file = load(folder / "GradAlign/utils.py", "utils"), folder / "GradAlign/train.py"
    own = copy.deepcopy(net).train()
    settings = {"minibatch_replay": 1, "attack_init": "zero", "dataset": "", "batch_size": ROWS, "fgsm_alpha": 1.0}
    scope = {
        "torch": torch, "F": functional, "utils": utils, "X": images, "y": y, "model": own, "eps": EPS, "opt": None,
        "clamp": torch.clamp, "half_prec": False, "double_bp": True, "iteration": 0,
        "data": SimpleNamespace(shapes_dict={"": (ROWS,)}), "loss_function": torch.nn.CrossEntropyLoss(),
        "get_input_grad": utils.get_input_grad, "l2_norm_batch": utils.l2_norm_batch,
        "args": SimpleNamespace(grad_align_cos_lambda=ALIGNMENT, **settings),
    }  # fmt: skip
    stored["grad_align/noise"] = noise(3, lambda *s: torch.zeros(*s).uniform_(-EPS, EPS), *images.shape)
    torch.manual_seed(3)
    for first, last in (
        ("if args.minibatch_replay == 1:", "delta.data = clamp(X"),
        ("delta = delta.det", "loss += reg"),
    ):
        exec(compile(cut(file, first, last), "GradAlign", "exec"), scope)
    stored["grad_align/found"] = (images + scope["delta"]).reshape(ROWS, -1).numpy()
    take(stored, "grad_align", own, scope["loss"])

    stored = {
        key: np.asarray(
            value, np.float32 if np.asarray(value).dtype == np.float64 and not key.endswith("loss") else None
        )
        for key, value in stored.items()
    }
    np.savez_compressed(
        path, eps=EPS, step_size=STEP_SIZE, steps=STEPS, beta=BETA, weight=WEIGHT, gamma_at=GAMMA["at"],
        gamma_trades=GAMMA["trades"], top=TOP, consistency=CONSISTENCY, alignment=ALIGNMENT, **stored,
    )  # fmt: skip
    told = {key.split("/")[0]: float(value) for key, value in stored.items() if key.endswith("/loss")}
    print(f"{path}: {Path(path).stat().st_size} bytes, losses {told}")


class Domains(Network):
    """The network with the head of the authors of DIAL, and their reversal."""

    def __init__(self, reverse):
        super().__init__()
        self.reverse = reverse
        self.domain = torch.nn.Sequential(
            torch.nn.Linear(HIDDEN, WIDTH), torch.nn.BatchNorm1d(WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 2)
        )

    def forward(self, x, alpha=None):
        """Logits, with `alpha` those of the head, too."""
        features = torch.tanh(self.norm(self.first(x)))
        if alpha is None:
            return self.last(features)
        return self.last(features), self.domain(self.reverse.apply(features, alpha))


class Gated(torch.nn.Module):
    """Two convolutions, each with one of the gates of the authors of CIFS; global mean, linear."""

    def __init__(self, gate):
        super().__init__()
        self.conv1, self.gate1 = torch.nn.Conv2d(1, CHANNELS[0], 3), gate(CHANNELS[0], CLASSES, "nonlinear")
        self.conv2, self.gate2 = torch.nn.Conv2d(*CHANNELS, 3), gate(CHANNELS[1], CLASSES, "linear")
        self.linear = torch.nn.Linear(CHANNELS[1], CLASSES)

    def forward(self, x, y=None):
        """Logits, and those of the gates."""
        x, first = self.gate1(torch.relu(self.conv1(x)), y)
        x, second = self.gate2(torch.relu(self.conv2(x)), y)
        return self.linear(x.mean((2, 3))), [first, second]


def fill(net) -> None:
    """Weights without any symmetry."""
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape) * 0.6 if "var" not in name else 0.5 + torch.rand(value.shape))


def keep(stored: dict, name: str, net, loss) -> None:
    """A loss, its gradient and the statistics after it."""
    net.zero_grad()
    loss.backward()
    stored[f"{name}/loss"] = loss.item()
    stored |= {f"{name}/grad/{key}": value.grad.numpy().copy() for key, value in net.named_parameters()}
    stored |= {
        f"{name}/after/{key}": value.numpy().copy() for key, value in net.state_dict().items() if "running" in key
    }


def second(folder: Path, path: str) -> None:
    """Run the codes that bring networks of their own, and write the file."""
    begin()
    torch.manual_seed(0)
    code, functions = load(folder / "DIAL/dial.py", "dial"), load(folder / "DIAL/models/functions.py", "functions")
    net = Domains(functions.ReverseLayerF)
    fill(net)
    stored = {f"dial/w.{key}": value.numpy().copy() for key, value in net.state_dict().items() if value.ndim}
    x, y = torch.rand(ROWS, FEATURES), torch.randint(CLASSES, (ROWS,))
    stored |= {"dial/x": x.numpy(), "dial/y": y.numpy().astype(np.int32)}
    optimizer = SimpleNamespace(zero_grad=lambda: None)
    for distance in ("kl", "ce"):
        own, name = copy.deepcopy(net), f"dial_{distance}"
        seen = watched(own)
        stored[f"{name}/noise"] = noise(1, torch.randn, *x.shape)
        torch.manual_seed(1)
        loss, _ = code.dial_loss(
            own, x, y, optimizer, step_size=STEP_SIZE, epsilon=EPS, perturb_steps=STEPS, beta=BETA,
            distance=f"linf_{distance}", reversal_ratio=REVERSAL, domain_ratio=DOMAIN,
        )  # fmt: skip
        stored[f"{name}/found"] = seen[1].numpy()
        keep(stored, name, own, loss)

    scope = {"torch": torch, "nn": torch.nn, "F": functional, "autograd": torch.autograd}
    for file, first, last in (
        ("models/nets/resnet_CIFS.py", "class Global_Avg_Flatten", "param.requires_grad = requires_grad"),
        ("CIFAR10_Res18_CIFS.py", "class joint_CE_loss", "return loss"),
    ):
        exec(compile(cut(folder / "CIFS" / file, first, last), file, "exec"), scope)
    net = Gated(scope["CIFS"])
    fill(net)
    x, y = torch.rand(ROWS, 1, 6, 6), torch.randint(CLASSES, (ROWS,))
    stored |= {f"cifs/w.{key}": value.numpy().copy() for key, value in net.state_dict().items()}
    stored |= {"cifs/x": x.numpy(), "cifs/y": y.numpy().astype(np.int32)}
    net.train()
    keep(stored, "cifs", net, scope["joint_CE_loss"](beta=GATES)(net(x, y), y))
    logits, scores = net.eval()(x)
    stored |= {"cifs/logits": logits.detach().numpy(), "cifs/scores": torch.stack(scores).detach().numpy()}

    stored = {key: np.asarray(value, np.float32) if np.asarray(value).dtype == np.float64 else value
              for key, value in stored.items()}  # fmt: skip
    np.savez_compressed(
        path, eps=EPS, step_size=STEP_SIZE, steps=STEPS, beta=BETA, domain=DOMAIN, reversal=REVERSAL, gates=GATES,
        **stored,
    )  # fmt: skip
    told = {key.split("/")[0]: float(value) for key, value in stored.items() if key.endswith("/loss")}
    print(f"{path}: {Path(path).stat().st_size} bytes, losses {told}")


def third(folder: Path, path: str) -> None:
    """Run fast_adversarial's loops: FGSM from a random start, for MNIST and for CIFAR-10, and two replays of Free."""
    net, x, y, stored = begin()
    images, radius = x.reshape(ROWS, 1, 3, 4), torch.full((1, 1, 1), EPS)
    given = {"epsilon": EPS, "alpha": 1.25 * EPS, "attack": "fgsm", "delta_init": "random"}
    scope = {
        "torch": torch, "F": functional, "criterion": torch.nn.CrossEntropyLoss(), "X": images, "y": y,
        "args": SimpleNamespace(**given), "epsilon": radius, "alpha": 1.25 * radius, "opt": None,
        "clamp": lambda value, low, high: torch.max(torch.min(value, high), low),
        "lower_limit": torch.zeros(1, 1, 1), "upper_limit": torch.ones(1, 1, 1),
        "amp": SimpleNamespace(scale_loss=lambda loss, _: contextlib.nullcontext(loss)),
    }  # fmt: skip
    for name, file, first, last in (
        ("mnist", "MNIST/train_mnist.py", "if args.attack == 'fgsm':", "output = model(torch.clamp(X + delta"),
        ("cifar", "CIFAR10/train_fgsm.py", "if args.delta_init != 'previous':", "loss = criterion(output, y)"),
    ):
        own = scope["model"] = copy.deepcopy(net).train()
        seen = watched(own)
        stored[f"{name}/noise"] = noise(4, lambda *s: torch.zeros(*s).uniform_(-EPS, EPS), *images.shape)
        torch.manual_seed(4)
        exec(compile(cut(folder / "fast_adversarial" / file, first, last), file, "exec"), scope)
        stored[f"{name}/found"] = seen[1].reshape(ROWS, -1).numpy()
        take(stored, name, own, scope["criterion"](scope["output"], y))

    own = scope["model"] = copy.deepcopy(net).train()
    scope |= {"delta": torch.zeros_like(images, requires_grad=True), "opt": torch.optim.SGD(own.parameters(), lr=RATE)}
    lines = cut(folder / "fast_adversarial/CIFAR10/train_free.py", "output = model(X + delta", "opt.step()")
    for replay in range(2):
        exec(compile(lines, "train_free.py", "exec"), scope)
        stored[f"free{replay}/loss"] = scope["loss"].item()
        stored[f"free{replay}/carry"] = scope["delta"].detach().reshape(ROWS, -1).numpy().copy()
        stored |= {f"free{replay}/grad/{key}": value.grad.numpy().copy() for key, value in own.named_parameters()}
        for key in ("running_mean", "running_var"):
            stored[f"free{replay}/after/{key}"] = getattr(own.norm, key).numpy().copy()
        scope["delta"].grad.zero_()

    np.savez_compressed(path, eps=EPS, rate=RATE, **{key: np.asarray(value) for key, value in stored.items()})
    told = {key.split("/")[0]: float(value) for key, value in stored.items() if key.endswith("/loss")}
    print(f"{path}: {Path(path).stat().st_size} bytes, losses {told}")


if __name__ == "__main__":
    for make, path in zip((main, second, third), sys.argv[2:], strict=True):
        if path != "-":
            make(Path(sys.argv[1]), path)
