"""Make the fixture that compares our networks with PyTorch's arithmetic on the same weights.

Needs an environment with torch; jaxadv is not imported. The networks are written down here in plain torch, module
names as in the public code (fast_adversarial, robust_overfitting, GradAlign, TRADES, MNIST challenge). Weights and
running statistics are random and exactly representable in float16 with few bits, so they are stored in little space
without loss. For each network the file holds

    NAME/spec            JSON: name, shape, classes, mean, std, options of `jaxadv.models.make_spec`
    NAME/weights         JSON: under which name the state dict is stored (variants share one)
    NAME/x               inputs, channels-last
    NAME/eval            logits with running statistics
    NAME/train           logits with batch statistics
    NAME/after/KEY       running statistics after that call
    weights/NAME/KEY     the state dict

Usage: python benchmarks/parity/models.py [--out tests/fixtures/models_torch.npz]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class PreActBlock(nn.Module):
    """The block of the PreActResNet-18s; `shortcut` says what the projection reads."""

    def __init__(self, inputs, outputs, stride, shortcut):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.reads = shortcut
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x):
        """Pre-activation, two convolutions, shortcut."""
        out = functional.relu(self.bn1(x))
        side = x
        if hasattr(self, "shortcut"):
            side = self.shortcut(x if self.reads == "raw" else out)
        return self.conv2(functional.relu(self.bn2(self.conv1(out)))) + side


class PreActResNet18(nn.Module):
    """The three published variants."""

    def __init__(self, channels, classes, width, shortcut, final_norm):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        inputs = width
        for stage, stride in enumerate((1, 2, 2, 2)):
            outputs = width * 2**stage
            blocks = [PreActBlock(inputs, outputs, stride, shortcut), PreActBlock(outputs, outputs, 1, shortcut)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = outputs
        if final_norm:
            self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x):
        """Logits of channels-first images."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if hasattr(self, "bn"):
            out = functional.relu(self.bn(out))
        return self.linear(out.mean((2, 3)))


class WideBlock(nn.Module):
    """The block of wide residual networks, named as in the TRADES code."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x):
        """Pre-activation, two convolutions, shortcut."""
        out = functional.relu(self.bn1(x))
        side = x if self.convShortcut is None else self.convShortcut(out)
        return side + self.conv2(functional.relu(self.bn2(self.conv1(out))))


class Stage(nn.Module):
    """A stage, whose blocks the TRADES code calls `layer`."""

    def __init__(self, *blocks):
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        """All blocks in turn."""
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-10-1: one block in each of three stages."""

    def __init__(self, channels, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = Stage(WideBlock(16, 16, 1))
        self.block2 = Stage(WideBlock(16, 32, 2))
        self.block3 = Stage(WideBlock(32, 64, 2))
        self.bn1 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, classes)

    def forward(self, x):
        """Logits of channels-first images."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(functional.relu(self.bn1(out)).mean((2, 3)))


def cnn_small(channels, classes, flat):
    """The MNIST network of fast_adversarial."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * flat, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


def cnn_madry(channels, classes, first, second, hidden, flat):
    """The network of the MNIST challenge."""
    return nn.Sequential(
        nn.Conv2d(channels, first, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * flat, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def mlp(features, classes, widths):
    """Flatten, then linear layers with ReLU between."""
    layers = [nn.Flatten()]
    for inputs, outputs in zip([features, *widths], widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def cases():
    """Yield name, spec, name of the stored weights, network."""
    yield "mlp", spec("mlp", (3, 4, 2), 5, widths=[7, 6]), "mlp", mlp(24, 5, [7, 6])
    yield "cnn_small", spec("cnn_small", (8, 8, 1), 10), "cnn_small", cnn_small(1, 10, 4)
    net = cnn_madry(2, 4, 3, 5, 9, 6)
    yield "cnn_madry", spec("cnn_madry", (12, 8, 2), 4, channels=[3, 5], hidden=9), "cnn_madry", net
    for name, shortcut, final_norm in (("raw", "raw", True), ("preact", "preact", True), ("gradalign", "raw", False)):
        scaled = {"mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26]} if name == "gradalign" else {}
        options = {"width": 4, "shortcut": shortcut, "final_norm": final_norm}
        net = PreActResNet18(3, 10, 4, shortcut, final_norm)
        yield f"preact_resnet18_{name}", spec("preact_resnet18", (16, 16, 3), 10, **scaled, **options), "preact", net
    yield "wide_resnet", spec("wide_resnet", (16, 16, 3), 10, depth=10, width=1), "wide_resnet", WideResNet(3, 10)


def spec(name, shape, classes, mean=None, std=None, **options):
    """Describe a network as `jaxadv.models.make_spec` does."""
    return {"name": name, "shape": list(shape), "classes": classes, "mean": mean, "std": std, "options": options}


def randomize(net, generator):
    """Give norms and running statistics values that show every mistake, and round everything."""
    for key, value in net.state_dict().items():
        if not value.is_floating_point():
            continue
        norm = ".bn" in f".{key}"
        if norm and key.endswith(("weight", "running_var")):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif norm or key.endswith("bias"):
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        value.copy_(value.bfloat16().half().float())  # eight bits of mantissa, which compress well


def main():
    """Build all networks, run them, write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures/models_torch.npz"))
    out = parser.parse_args().out
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    stored, shared = {}, {}
    for name, described, weights, net in cases():
        if weights in shared:
            net.load_state_dict({k: v for k, v in shared[weights].items() if k in net.state_dict()})
        else:
            randomize(net, generator)
            shared[weights] = {k: v.clone() for k, v in net.state_dict().items()}
        x = torch.rand((6, *described["shape"]), generator=generator).half().float()
        inner = x.permute(0, 3, 1, 2)
        if described["mean"] is not None:
            mean, std = (torch.tensor(described[k]).reshape(1, -1, 1, 1) for k in ("mean", "std"))
            inner = (inner - mean) / std
        with torch.no_grad():
            stored[f"{name}/eval"] = net.eval()(inner).numpy()
            stored[f"{name}/train"] = net.train()(inner).numpy()
        stored[f"{name}/x"] = x.numpy().astype(np.float16)
        stored[f"{name}/spec"] = np.array(json.dumps(described))
        stored[f"{name}/weights"] = np.array(json.dumps(weights))
        for key, value in net.state_dict().items():
            if "running" in key:
                stored[f"{name}/after/{key}"] = value.numpy()
    for weights, state in shared.items():
        for key, value in state.items():
            value = value.numpy()
            stored[f"weights/{weights}/{key}"] = value.astype(np.float16) if value.dtype == np.float32 else value
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **stored)


if __name__ == "__main__":
    main()
