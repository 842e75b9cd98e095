"""AutoAttack beside the official code: the same weights, the same examples, every attack alone and all together.

Three commands, each writing to files that the next reads. `nets` trains the networks with jaxadv and stores them as
`tests/fixtures/autoattack_NET.npz` (float16 weights, so that the file is small; both sides compute with exactly these
in float32) and the examples in a file of your choice. `official` needs torch and a checkout of
fra31/auto-attack and does not import jaxadv; it runs every attack of the standard suite on all examples, so that the
verdict of the suite is that of the worst. `ours` does the same with jaxadv and prints both side by side; where ours is
lower by more than half a point, the extra broken examples are judged again in float64.

    python benchmarks/parity/autoattack.py nets EXAMPLES.npz
    python benchmarks/parity/autoattack.py official EXAMPLES.npz CHECKOUT
    python benchmarks/parity/autoattack.py ours EXAMPLES.npz

Runs that are stored are not repeated. `official` adds its verdicts to `tests/fixtures/autoattack_official.npz`: for
each NET/NORM/SEED the array `[4, n]` of which examples were robust against APGD-CE, APGD-T, FAB-T and Square alone.
With `--alone ATTACK` it runs one of them, on seeds of which the whole suite would cost too much, and adds an array
`[1, n]` under NET/NORM/SEED/ATTACK; `ours` follows it there. Data: the folder that JAXADV_DATA names.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
FIXTURES = HERE.parent.parent / "tests" / "fixtures"
OFFICIAL = FIXTURES / "autoattack_official.npz"
STORED = HERE / "results" / "autoattack.json"
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
NETS = {  # data, epochs, budget of training (0: standard), budgets of the attacks
    "mnist_standard": ("mnist", 3, 0.0, {"Linf": 0.1, "L2": 1.0, "L1": 5.0}),
    "mnist_robust": ("mnist", 10, 0.3, {"Linf": 0.3, "L2": 1.0, "L1": 5.0}),
    "cifar_small": ("cifar10_jpeg", 6, 4 / 255, {"Linf": 4 / 255, "L2": 0.25, "L1": 3.0}),
}


def weights_of(net: str) -> Path:
    """The fixture that holds a network."""
    return FIXTURES / f"autoattack_{net}.npz"


def examples(net: str, n: int):
    """The first n test images of the network's data that a fixed shuffle names, float32 NHWC, and labels."""
    import jaxadv as ja

    return ja.data.evaluation_subset(ja.data.load(NETS[net][0], "test"), n)


def train(path: str, n: int) -> None:
    """Train the three networks and store weights and examples' numbers."""
    import jax

    import jaxadv as ja

    arrays, images = {}, {}
    for net, (name, epochs, eps, _) in NETS.items():
        data = ja.data.load(name, "train")
        recipe = ja.recipes.fast_mnist if eps else ja.recipes.standard_mnist
        more = {"eps": eps} if eps else {}
        given = recipe(data, epochs=epochs, **more) | {"attack": None, "validation": None, "collapse": None}
        trained = ja.train.trained(given["trainable"], ja.fit(jax.random.key(0), **given))
        for layer, parts in trained.params.items():
            for part, value in parts.items():
                arrays[f"{net}/{layer}/{part}"] = np.asarray(value, np.float16)
        test = examples(net, n)
        x, y = test.all()
        arrays[f"{net}/index"] = np.asarray(test.index, np.int32)
        images[f"{net}/x"], images[f"{net}/y"] = np.asarray(x, np.float32), np.asarray(y, np.int32)
        print(net, "clean accuracy", float(np.mean(np.argmax(forward(arrays, net)(x), -1) == y)), flush=True)
    for net in NETS:
        np.savez_compressed(weights_of(net), **{k: v for k, v in arrays.items() if k.startswith(f"{net}/")})
    np.savez_compressed(path, **images)


def forward(arrays, net: str, dtype=np.float32):
    """The network as a jaxadv model."""
    import jax
    import jax.numpy as jnp

    weights = {k.split("/", 1)[1]: jnp.asarray(v, dtype) for k, v in arrays.items() if k.startswith(f"{net}/")}
    weights.pop("index", None)
    return jax.tree_util.Partial(_apply, weights)


def _apply(weights, x):
    import jax

    for layer in ("conv1", "conv2"):
        x = jax.lax.conv_general_dilated(
            x, weights[f"{layer}/kernel"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + weights[f"{layer}/bias"][None, None, None])
    x = x.reshape(x.shape[0], -1)
    x = jax.nn.relu(x @ weights["dense1/kernel"] + weights["dense1/bias"][None])
    return x @ weights["dense2/kernel"] + weights["dense2/bias"][None]


def torch_net(arrays, net: str):
    """The same network for PyTorch: images come channels first, features leave channels last."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            get = lambda name: torch.tensor(arrays[f"{net}/{name}"].astype(np.float32))  # noqa: E731
            self.convs = torch.nn.ParameterList(
                [torch.nn.Parameter(get(f"conv{i}/kernel").permute(3, 2, 0, 1).contiguous()) for i in (1, 2)]
            )
            self.biases = torch.nn.ParameterList([torch.nn.Parameter(get(f"conv{i}/bias")) for i in (1, 2)])
            self.denses = torch.nn.ParameterList([torch.nn.Parameter(get(f"dense{i}/kernel")) for i in (1, 2)])
            self.rest = torch.nn.ParameterList([torch.nn.Parameter(get(f"dense{i}/bias")) for i in (1, 2)])

        def forward(self, x):
            for w, b in zip(self.convs, self.biases):
                x = torch.relu(torch.nn.functional.conv2d(x, w, b, stride=2, padding=1))
            x = x.permute(0, 2, 3, 1).flatten(1)
            x = torch.relu(x @ self.denses[0] + self.rest[0])
            return x @ self.denses[1] + self.rest[1]

    return Net().eval().requires_grad_(False)


def official(path: str, checkout: str, nets, norms, seeds, n: int, alone: str | None) -> None:
    """Run the official suite or one of its attacks, each on all examples, and add the verdicts to the fixture."""
    import torch

    sys.path.insert(0, checkout)
    from autoattack import AutoAttack

    images = np.load(path)
    done = dict(np.load(OFFICIAL)) if OFFICIAL.exists() else {}
    for net in nets:
        model = torch_net(np.load(weights_of(net)), net)
        x = torch.tensor(images[f"{net}/x"][:n].transpose(0, 3, 1, 2).copy())
        y = torch.tensor(images[f"{net}/y"][:n].astype(np.int64))
        for norm in norms:
            for seed in seeds:
                name = f"{net}/{norm}/{seed}" + (f"/{alone}" if alone else "")
                if done.get(name, np.zeros((0, 0))).shape[1] == n:
                    continue  # done before
                start = time.perf_counter()
                suite = AutoAttack(model, norm=norm, eps=NETS[net][3][norm], seed=seed, verbose=False, device="cpu")
                suite.attacks_to_run = [alone] if alone else list(ATTACKS)
                found = suite.run_standard_evaluation_individual(x, y, bs=n)
                with torch.no_grad():
                    rows = [(model(x_adv).argmax(1) == y).numpy() for x_adv in found.values()]
                done[name] = np.stack(rows)
                np.savez_compressed(OFFICIAL, **done)
                each = " ".join(f"{attack} {100 * r.mean():.1f}" for attack, r in zip(found, rows))
                all_ = 100 * np.all(rows, axis=0).mean()
                print(f"{name}: {each} all {all_:.1f} ({time.perf_counter() - start:.0f} s)", flush=True)


def ours(path: str, nets, norms, seeds, n: int, alone: str | None) -> None:
    """Run our suite where the official one was run, print both, and judge extra broken examples in float64."""
    import jax

    import jaxadv as ja

    images, done = np.load(path), np.load(OFFICIAL)
    record = json.loads(STORED.read_text()) if STORED.exists() else {}
    for name in done.files:
        net, norm, seed, *one = name.split("/")
        if net not in nets or norm not in norms or int(seed) not in seeds or done[name].shape[1] != n:
            continue
        if one != ([alone] if alone else []):
            continue
        if name in record:
            print(name, "was done before", flush=True)
            continue
        start = time.perf_counter()
        eps = NETS[net][3][norm]
        threat = getattr(ja, norm.lower())(eps)
        x, y = images[f"{net}/x"][:n], images[f"{net}/y"][:n]
        arrays = np.load(weights_of(net))
        model = forward(arrays, net)
        rows, points = [], np.zeros_like(x)
        stages = dict(zip(ATTACKS, ja.evaluate.PROTOCOLS["standard"](threat.norm), strict=True))
        for stage in [stages[alone]] if alone else stages.values():
            report = ja.evaluate(jax.random.key(int(seed)), model, x, y, threat, attacks=(stage,))
            by = np.asarray(report.models[0].examples["by"])
            rows.append(by == -1)
            points = np.where((by >= 0)[:, None, None, None], report.models[0].x_adv, points)
        theirs = done[name]
        pair = {}
        labels = (alone,) if alone else (*ATTACKS, "all")
        for label, a, b in zip(labels, (*theirs, theirs.all(0)), (*rows, np.all(rows, axis=0))):
            pair[label] = {"official": 100 * a.mean(), "jaxadv": 100 * b.mean(), "agree": 100 * (a == b).mean()}
        extra = np.flatnonzero(theirs.all(0) & ~np.all(rows, axis=0))
        pair["extra broken"] = {"n": len(extra), "hold in float64": recheck(arrays, net, x, y, points, extra, threat)}
        pair["seconds"] = time.perf_counter() - start
        record[name] = pair
        STORED.parent.mkdir(exist_ok=True)
        STORED.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        print(name, json.dumps(pair), flush=True)


def recheck(arrays, net, x, y, points, rows, threat) -> int:
    """How many of the rows are misclassified by the network in float64 at feasible points."""
    import jaxadv as ja

    if not len(rows):
        return 0
    w = {k.split("/", 1)[1]: arrays[k].astype(np.float64) for k in arrays.files if k.startswith(f"{net}/")}
    z = points[rows].astype(np.float64)
    for i in range(2):
        kernel = w[f"conv{i + 1}/kernel"]
        padded = np.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), axis=(1, 2))[:, ::2, ::2]
        z = np.maximum(np.einsum("bhwcij,ijco->bhwo", windows, kernel) + w[f"conv{i + 1}/bias"], 0)
    z = np.maximum(z.reshape(len(z), -1) @ w["dense1/kernel"] + w["dense1/bias"], 0)
    logits = z @ w["dense2/kernel"] + w["dense2/bias"]
    allowed = ja.core.feasible(threat, points[rows], x[rows])
    return int(np.sum((logits.argmax(-1) != y[rows]) & allowed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("nets", "official", "ours"))
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--norms", nargs="+", default=["Linf", "L2", "L1"], choices=["Linf", "L2", "L1"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--alone", choices=ATTACKS, help="this attack only")
    parser.add_argument("-n", type=int, default=1000)
    args = parser.parse_args()
    if args.what == "nets":
        train(args.paths[0], args.n)
    elif args.what == "official":
        official(*args.paths, args.nets, args.norms, args.seeds, args.n, args.alone)
    else:
        ours(args.paths[0], args.nets, args.norms, args.seeds, args.n, args.alone)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
