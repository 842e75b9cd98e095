"""The price of privacy: a private step beside the same step without privacy, by method, and beside the peers.

For each network: seconds of one SGD step with clipping and noise over seconds of the plain step, and the working memory
of the compiled program over that of the plain one; both with convolutions in their fast forms, as the trainer has them.
Peers: jax-privacy on the same network and parameters; Opacus (hooks and ghost) on the same layers in PyTorch, over
PyTorch's own plain step; layers that it has no rules for, as standardized convolutions, it differentiates with
functorch. A peer that is not installed is a printed line.

Usage: python benchmarks/speed/privacy.py [--nets cnn_small wrn_16_4] [--methods auto] [--batch N] [--rounds 5]
       [--microbatch 8 64] [--smoke]
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxadv import core, models, privacy
from jaxadv.privacy.methods import METHODS

sys.path.insert(0, str(Path(__file__).parent))
import harness

# name: network, shape, options, batch
NETS = {
    "mlp": ("mlp", (28, 28, 1), {"widths": (1000, 1000)}, 256),
    "cnn_small": ("cnn_small", (28, 28, 1), {}, 256),
    "wrn_16_4": ("wide_resnet_private", (32, 32, 3), {}, 64),
    "vit_tiny": ("vit", (32, 32, 3), {"width": 192, "depth": 6, "heads": 3}, 64),
}
SMOKE = {
    "mlp": {"widths": (20,)},
    "wrn_16_4": {"depth": 10, "width": 1},
    "vit_tiny": {"width": 12, "depth": 1, "heads": 3},
}
BOUND, NOISE, RATE = 1.0, 1.0, 0.1


def loss_of(net):
    """The loss of one example, and the mean loss of a batch."""

    def batched(params, batch):
        logits, _ = net.apply(params, net.state, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    def one(params, example, key=None):
        return batched(params, jax.tree.map(lambda a: a[None], example))[0]

    return one, lambda params, batch: batched(params, batch).mean()


def steps(net, size: int, methods, microbatch):
    """Name to step, `(params, batch, key) -> params`."""
    one, mean = loss_of(net)

    def move(params, grads):
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads)

    def noisy(params, sums, key):
        return move(params, jax.tree.map(lambda s: s / size, privacy.add_noise(key, sums, BOUND * NOISE)))

    made = {"plain": lambda params, batch, key: move(params, core.canonical(jax.grad(mean))(params, batch))}
    for method in methods:
        for rows in (None, *(rows for rows in microbatch if rows < size)):
            clip = privacy.clipped_grads(one, clip_norm=BOUND, method=method, microbatch=rows)
            name = method if rows is None else f"{method}, {rows} at a time"
            made[name] = lambda params, batch, key, clip=clip: noisy(params, clip(params, batch)[0], key)
    if importlib.util.find_spec("jax_privacy"):
        from jax_privacy import clipping

        peer = clipping.clipped_grad(one, l2_clip_norm=BOUND, keep_batch_dim=False, microbatch_size=microbatch[0])
        made["jax-privacy"] = lambda params, batch, key: noisy(params, peer(params, batch), key)
    else:
        print('jax-privacy is not installed: pip install "jaxadv[privacy]"')
    return made


def compiled(net, size: int, shape, methods, microbatch):
    """Name to (blocking call, bytes that the program works in)."""
    rng = np.random.default_rng(0)
    batch = {
        "x": jnp.asarray(rng.uniform(size=(size, *shape)), jnp.float32),
        "y": jnp.asarray(rng.integers(0, 10, size)),
    }
    calls, memory = {}, {}
    for name, step in steps(net, size, methods, microbatch).items():
        run = jax.jit(step).lower(net.params, batch, jax.random.key(0)).compile()
        memory[name] = run.memory_analysis().temp_size_in_bytes
        calls[name] = lambda run=run: jax.block_until_ready(run(net.params, batch, jax.random.key(1)))
    return calls, memory


def torch_net(name: str, options):
    """The same layers in PyTorch; attention is written out, because Opacus has no rules for PyTorch's own."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Function(nn.Module):
        def __init__(self, fn):
            super().__init__()
            self.fn = fn

        def forward(self, x):
            return self.fn(x)

    class Residual(nn.Module):
        def __init__(self, *inner, side=None):
            super().__init__()
            self.inner, self.side = nn.Sequential(*inner), side

        def forward(self, x):
            return self.inner(x) + (x if self.side is None else self.side(x))

    class StandardizedConv(nn.Conv2d):
        def __init__(self, inputs, outputs, size, stride=1):
            super().__init__(inputs, outputs, size, stride, size // 2)
            self.gain = nn.Parameter(torch.ones(outputs))

        def forward(self, x):
            center = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            spread = center.square().sum((1, 2, 3), keepdim=True).clamp(min=1e-4)
            kernel = center * self.gain.reshape(-1, 1, 1, 1) / spread.sqrt()
            return functional.conv2d(x, kernel, self.bias, self.stride, self.padding)

    class Positions(nn.Module):
        def __init__(self, count, width):
            super().__init__()
            self.table = nn.Parameter(0.02 * torch.randn(count, width))

        def forward(self, x):
            return x + self.table

    class Attention(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

        def forward(self, x):
            b, t, c = x.shape
            q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).reshape(b, t, c))

    if name == "mlp":
        sizes = [784, *options["widths"], 10]
        layers: list = [nn.Flatten()]
        for a, b in zip(sizes, sizes[1:]):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
    if name == "cnn_small":
        convs = [nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()]
        return nn.Sequential(*convs, nn.Flatten(), nn.Linear(32 * 49, 100), nn.ReLU(), nn.Linear(100, 10))
    if name == "wrn_16_4":
        depth, width = options.get("depth", 16), options.get("width", 4)
        layers, channels = [StandardizedConv(3, 16, 3)], 16
        for outputs, stride in zip((16 * width, 32 * width, 64 * width), (1, 2, 2)):
            for place in range((depth - 4) // 6):
                step, side = stride if place == 0 else 1, None
                if place == 0:
                    side = nn.Sequential(
                        nn.ReLU(), nn.GroupNorm(16, channels), StandardizedConv(channels, outputs, 1, step)
                    )
                inner = [nn.ReLU(), nn.GroupNorm(16, channels), StandardizedConv(channels, outputs, 3, step)]
                inner += [nn.ReLU(), nn.GroupNorm(16, outputs), StandardizedConv(outputs, outputs, 3)]
                layers.append(Residual(*inner, side=side))
                channels = outputs
        pooled = [nn.ReLU(), nn.GroupNorm(16, channels), Function(lambda x: x.mean((2, 3)))]
        return nn.Sequential(*layers, *pooled, nn.Linear(channels, 10))
    width, depth, heads = options["width"], options["depth"], options["heads"]
    layers = [nn.Conv2d(3, width, 4, 4), Function(lambda x: x.flatten(2).transpose(1, 2)), Positions(64, width)]
    for _ in range(depth):
        layers.append(Residual(nn.LayerNorm(width), Attention(width, heads)))
        hidden = [nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)]
        layers.append(Residual(nn.LayerNorm(width), *hidden))
    return nn.Sequential(*layers, nn.LayerNorm(width), Function(lambda x: x.mean(1)), nn.Linear(width, 10))


def opacus_calls(name: str, options, size: int, count: int):
    """Blocking calls of PyTorch's plain step and Opacus's private ones, on a network of so many parameters."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("opacus")):
        print("opacus is not installed: pip install opacus")
        return {}
    import torch
    from opacus import PrivacyEngine

    rng = np.random.default_rng(0)
    height, width, channels = NETS[name][1]
    x = torch.tensor(rng.uniform(size=(size, channels, height, width)), dtype=torch.float32)
    y = torch.tensor(rng.integers(0, 10, size))

    found = sum(p.numel() for p in torch_net(name, options).parameters())
    if found != count:
        raise ValueError(f"both networks must have as many parameters; {name} has {count} here, {found} in PyTorch.")

    def call(mode):
        net, loss = torch_net(name, options), torch.nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
        if mode:
            loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=size)
            private = PrivacyEngine().make_private(
                module=net,
                optimizer=optimizer,
                criterion=loss,
                data_loader=loader,
                noise_multiplier=NOISE,
                max_grad_norm=BOUND,
                poisson_sampling=False,
                grad_sample_mode=mode,
            )
            net, optimizer, loss = private[0], private[1], private[2] if mode == "ghost" else loss

        def step():
            optimizer.zero_grad()
            loss(net(x), y).backward()
            optimizer.step()

        return step

    return {"torch plain": call(None), "opacus hooks": call("hooks"), "opacus ghost": call("ghost")}


def main() -> None:
    """Measure, print the table, store the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--batch", type=int)
    parser.add_argument(
        "--microbatch", nargs="+", type=int, default=[8, 64], help="also so many rows at a time; jax-privacy the first"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny networks, nothing is stored")
    args = parser.parse_args()
    stored = harness.RESULTS / "privacy.json"
    record = json.loads(stored.read_text())["nets"] if stored.exists() else {}
    rows = [["network", "step", "time / plain", "memory / plain", "milliseconds", "range"]]
    for name in args.nets:
        net_name, shape, options, size = NETS[name]
        size, options = args.batch or size, SMOKE.get(name, options) if args.smoke else options
        net = models.create(net_name, jax.random.key(0), shape=shape, classes=10, **options)
        calls, memory = compiled(net, size, shape, args.methods, args.microbatch)
        count = sum(p.size for p in jax.tree.leaves(net.params))
        times = harness.side_by_side(calls | opacus_calls(name, options, size, count), args.rounds)
        record[name] = {}
        for step, t in times.items():
            base = "torch plain" if step.startswith(("torch", "opacus")) else "plain"
            ratio = t["median"] / times[base]["median"]
            share = memory[step] / memory["plain"] if step in memory else None
            record[name][step] = t | {"ratio": ratio, "bytes": memory.get(step), "memory_ratio": share, "batch": size}
            span = f"{1e3 * t['least']:.1f} to {1e3 * t['most']:.1f}"
            shown = "" if share is None else f"{share:.2f}"
            rows.append([name, step, f"{ratio:.2f}", shown, f"{1e3 * t['median']:.1f}", span])
        print(name, "measured", flush=True)
    print(harness.table(rows))
    if not args.smoke:
        found = {"nets": record, "environment": harness.environment()}
        print(f"stored in {harness.store('privacy', found)}")


if __name__ == "__main__":
    main()
