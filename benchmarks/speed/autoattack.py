"""AutoAttack against the official code on the same weights and examples, and what each attack costs beyond the model.

Three questions, each answered by medians taken in turn in one process:

1. `suite`: the standard suite (linf) on `cnn_small`, ours and the official one, to the end, with both accuracies.
2. `slice`: on PreAct-ResNet-18 at a budget so small that every example survives, 20 steps of APGD, 10 of FAB-T and 200
   of Square: the same work on both sides.
3. `overhead`: the time of each attack over (its gradients x one jitted value-and-input-gradient + its forward passes x
   one jitted forward pass), where every example survives.

Usage: python benchmarks/speed/autoattack.py [--official CHECKOUT] [--parts suite slice overhead] [--rounds 3] [--n 200]
[--kinds apgd-ce fab-t square]
The official code needs torch and a checkout of fra31/auto-attack; without them it is said so. What is not measured
keeps its record.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxadv as ja
from jaxadv import models

sys.path.insert(0, str(Path(__file__).parent))
import attacks as pgd_speed
import harness

SHAPES = {"cnn_small": (28, 28, 1), "preact_resnet18": (32, 32, 3)}
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def both_nets(name: str):
    """The network with the same random weights on both sides; None for torch where it is not installed."""
    spec = models.make_spec(name, shape=SHAPES[name], classes=10)
    try:
        net = pgd_speed.torch_net(name, 0)
    except ImportError:
        print("torch is not installed: there is no peer, and weights are jaxadv's own")
        return models.model(models.create(name, jax.random.key(0), shape=SHAPES[name], classes=10)), None
    arrays = {k: v.detach().numpy() for k, v in net.state_dict().items()}
    return models.model(models.from_torch_arrays(spec, arrays)), net.requires_grad_(False)


def trained_net():
    """`cnn_small` trained against PGD on MNIST for two epochs, on both sides, with test examples."""
    data, test = ja.data.load("mnist", "train"), ja.data.evaluation_subset(ja.data.load("mnist", "test"), 1000)
    given = ja.recipes.fast_mnist(data, epochs=2, growth=0.3, attack_steps=3)
    given |= {"attack": None, "validation": None, "collapse": None}
    trained = ja.train.trained(given["trainable"], ja.fit(jax.random.key(0), **given))
    return ja.models.model(trained), jax.tree.map(np.asarray, trained.params), *test.all()


def torch_twin(weights):
    """The trained network for PyTorch; features leave the convolutions channels last, as here."""
    import torch

    held = {}
    for layer, parts in weights.items():
        kernel = parts["kernel"].transpose(3, 2, 0, 1) if parts["kernel"].ndim == 4 else parts["kernel"]
        held[layer] = torch.tensor(kernel.copy()), torch.tensor(parts["bias"].copy())

    class Twin(torch.nn.Module):
        def forward(self, x):
            for layer in ("conv1", "conv2"):
                x = torch.relu(torch.nn.functional.conv2d(x, *held[layer], stride=2, padding=1))
            kernel, bias = held["dense1"]
            x = torch.relu(x.permute(0, 2, 3, 1).flatten(1) @ kernel + bias)
            return x @ held["dense2"][0] + held["dense2"][1]

    return Twin().eval()


def official_suite(checkout: str, net, x, y, norm: str, eps: float, **changes):
    """A blocking call of the official suite; `changes` shorten it: steps of each attack."""
    import torch

    sys.path.insert(0, checkout)
    from autoattack import AutoAttack

    images = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy())
    labels = torch.tensor(np.asarray(y).astype(np.int64))
    suite = AutoAttack(net, norm=norm, eps=eps, seed=0, verbose=False, device="cpu")
    if changes:
        suite.attacks_to_run = list(changes["attacks"])
        suite.apgd.n_iter, suite.fab.n_iter, suite.square.n_queries = (changes[k] for k in ("apgd", "fab", "square"))
        suite.fab.n_target_classes = 1

    def call():
        found = suite.run_standard_evaluation(images, labels, bs=len(images))
        with torch.no_grad():
            return float((net(found).argmax(1) == labels).float().mean())

    return call


def suite_part(checkout: str | None, rounds: int, n: int) -> dict:
    """The whole suite on a trained small network."""
    model, weights, x, y = trained_net()
    x, y, eps = x[:n], y[:n], 0.2
    threat, found = ja.linf(eps), {}

    def ours():
        report = ja.evaluate(jax.random.key(0), model, x, y, threat, keep_adversarial=False).models[0]
        found["jaxadv"] = report.robust_accuracy

    contenders = {"jaxadv": ours}
    if checkout:
        call = official_suite(checkout, torch_twin(weights), x, y, "Linf", eps)
        contenders["official"] = lambda: found.__setitem__("official", call())
    record = {"n": n, "eps": eps, "times": harness.side_by_side(contenders, rounds)}
    return record | {"robust_accuracy": found}


def slice_part(checkout: str | None, rounds: int, n: int, kinds) -> dict:
    """Equal work on PreAct-ResNet-18: every example survives."""
    model, net = both_nets("preact_resnet18")
    rng = np.random.default_rng(0)
    x = rng.uniform(0.1, 0.9, (n, 32, 32, 3)).astype(np.float32)
    y = np.asarray(jnp.argmax(jax.jit(lambda m, x: m(x))(model, x), -1), np.int32)
    threat = ja.linf(1e-4)
    chain = {
        "apgd-ce": ja.attacks.apgd_ce(threat, steps=20),
        "fab-t": ja.attacks.fab_t(threat, targets=1, steps=10),
        "square": ja.attacks.square(threat, queries=200),
    }
    run = jax.jit(lambda a, m, x, y: a.run(jax.random.key(0), m, x, y))
    record = {"n": n}
    for name, attack in [(kind, chain[kind]) for kind in kinds]:
        contenders = {"jaxadv": lambda a=attack: jax.block_until_ready(run(a, model, x, y))}
        if checkout and net is not None:
            work = {"attacks": [name], "apgd": 20, "fab": 10, "square": 200}
            contenders["official"] = official_suite(checkout, net, x, y, "Linf", 1e-4, **work)
        record[name] = harness.side_by_side(contenders, rounds)
        record[name]["survivors"] = int(np.sum(~np.asarray(run(attack, model, x, y).success)))
    return record


def overhead_part(name: str, rounds: int, n: int) -> dict:
    """Each attack over the time of its gradients and forward passes."""
    model, _ = both_nets(name)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(0.1, 0.9, (n, *SHAPES[name])), jnp.float32)
    y = jnp.argmax(jax.jit(lambda m, x: m(x))(model, x), -1).astype(jnp.int32)

    def total(point, m, y):
        logits = m(point)
        return jnp.sum(ja.losses.minus_cross_entropy(logits, y)), logits

    grad = jax.jit(lambda m, x, y: jax.value_and_grad(total, has_aux=True)(x, m, y))
    forward = jax.jit(lambda m, x: m(x))
    run = jax.jit(lambda a, m, x, y: a.run(jax.random.key(0), m, x, y))
    record = {"n": n}
    for norm in NORMS:
        threat = ja.threats.THREATS[norm](1e-4)
        members = {
            "apgd_ce": ja.attacks.apgd_ce(threat, steps=20),
            "fab_t": ja.attacks.fab_t(threat, targets=1, steps=20),
            "square": ja.attacks.square(threat, queries=40),
        }
        for kind, attack in members.items():
            times = harness.side_by_side(
                {
                    "attack": lambda a=attack: jax.block_until_ready(run(a, model, x, y)),
                    "gradient": lambda: [jax.block_until_ready(grad(model, x, y)) for _ in range(10)],
                    "forward": lambda: [jax.block_until_ready(forward(model, x)) for _ in range(10)],
                },
                rounds,
            )
            spent = run(attack, model, x, y)
            grads, passes = int(np.max(spent.grads)), int(np.max(spent.queries) - np.max(spent.grads))
            t = {k: v["median"] for k, v in times.items()}
            record[f"{kind} {norm}"] = t["attack"] / (grads * t["gradient"] / 10 + passes * t["forward"] / 10)
    return record


def main() -> None:
    """Measure, print the table, store the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", help="folder of a checkout of fra31/auto-attack")
    parser.add_argument("--parts", nargs="+", default=["suite", "slice", "overhead"])
    kinds = ["apgd-ce", "fab-t", "square"]
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds, help="attacks of the slice")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n", type=int, default=200)
    args = parser.parse_args()
    if args.official is None:
        print("no checkout of the official code was given: there is no peer")
    stored = harness.RESULTS / "autoattack.json"  # parts that are not measured now keep their record
    record: dict = json.loads(stored.read_text()) if stored.exists() else {}
    rows = [["what", "seconds (range)", "ratio"]]

    def lines(what, times):
        for peer, t in times.items():
            if isinstance(t, dict):
                ratio = t["median"] / times["jaxadv"]["median"]
                rows.append(
                    [f"{what}: {peer}", f"{t['median']:.2f} ({t['least']:.2f}-{t['most']:.2f})", f"{ratio:.2f}"]
                )

    if "suite" in args.parts:
        record["suite"] = suite_part(args.official, args.rounds, args.n)
        lines(f"suite, cnn_small, {args.n} examples", record["suite"]["times"])
        rows.append(["suite: robust accuracy", str(record["suite"]["robust_accuracy"]), ""])
    if "slice" in args.parts:
        found = slice_part(args.official, args.rounds, min(args.n, 64), args.kinds)
        record["slice"] = record.get("slice", {}) | found
        for kind in args.kinds:
            lines(f"slice, preact_resnet18, {kind}", record["slice"][kind])
    if "overhead" in args.parts:
        record["overhead"] = overhead_part("cnn_small", args.rounds, args.n)
        rows += [[f"overhead, cnn_small, {k}", "", f"{v:.2f}"] for k, v in record["overhead"].items() if k != "n"]
    record["environment"] = harness.environment()
    print(harness.table(rows))
    print(f"stored in {harness.store('autoattack', record)}")


if __name__ == "__main__":
    main()
