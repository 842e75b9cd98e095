"""PGD-50 against torchattacks and foolbox on the same weights and points, and what a step costs beyond its gradient.

Three questions, each answered by medians taken in turn in one process:

1. `peers`: PGD-50 of jaxadv (best point kept, verified) against torchattacks and foolbox (last point), same network,
weights, points. 2. `overhead`: the attack's time over (its gradients x one jitted value-and-input-gradient + its
forwards x one jitted forward). 3. `loop`: PGD-10 in one compiled loop over 10 x one step compiled alone (the CPU trap
that `core.canonical` cures); `plain` is
   the same loop without the cure.

Usage: python benchmarks/speed/attacks.py [--nets cnn_small preact_resnet18] [--rounds 5] [--batch N] [--parts peers
overhead loop] The peers need their own environment: pip install . torch==2.13.0 torchattacks foolbox. A peer that is
absent is said so.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxadv as ja
from jaxadv import core, models

sys.path.insert(0, str(Path(__file__).parent))
import harness

NETS = {"cnn_small": ((28, 28, 1), 478, 0.3), "preact_resnet18": ((32, 32, 3), 64, 8 / 255)}


def torch_net(name: str, seed: int):
    """Build the PyTorch network of the parity scripts with random weights; statistics of BatchNorm as initialized."""
    import torch

    place = Path(__file__).parent.parent / "parity" / "models.py"
    spec = importlib.util.spec_from_file_location("parity_models", place)
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    torch.manual_seed(seed)
    if name == "cnn_small":
        return nets.cnn_small(1, 10, 49).eval()
    return nets.PreActResNet18(3, 10, 64, "preact", True).eval()


def peers_of(name, net, x, y, eps, steps, step_size):
    """Return the contenders that are installed, each a blocking call on the same points; say which are not."""
    import torch

    images = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy())
    labels = torch.tensor(np.asarray(y).astype(np.int64))
    found = {}
    try:
        import torchattacks

        attack = torchattacks.PGD(net, eps=eps, alpha=step_size, steps=steps, random_start=True)
        found["torchattacks"] = lambda: attack(images, labels)
    except ImportError:
        print(f"{name}: torchattacks is not installed, left out")
    try:
        import foolbox

        wrapped = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        pgd = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=steps, random_start=True)
        found["foolbox"] = lambda: pgd(wrapped, images, labels, epsilons=eps)
    except ImportError:
        print(f"{name}: foolbox is not installed, left out")
    return found


def measure(name: str, parts, rounds: int, batch: int | None, steps: int = 50) -> dict:
    """Answer the three questions for one network."""
    shape, usual, eps = NETS[name]
    batch = batch or usual
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(batch, *shape)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, batch), jnp.int32)
    spec = models.make_spec(name, shape=shape, classes=10)
    torch_model = None
    try:
        torch_model = torch_net(name, 0)
        arrays = {k: v.detach().numpy() for k, v in torch_model.state_dict().items()}
        trainable = models.from_torch_arrays(spec, arrays)
    except ImportError:
        print(f"{name}: torch is not installed; weights are jaxadv's own and there are no peers")
        trainable = models.create(name, jax.random.key(0), shape=shape, classes=10)
    model = models.model(trainable)
    key, step_size = jax.random.key(0), eps / 20
    attack = ja.attacks.pgd(ja.threats.linf(eps), steps=steps, step_size=step_size)
    run = jax.jit(lambda a, k, m, x, y: a.run(k, m, x, y))
    record: dict = {"batch": batch, "steps": steps, "eps": eps}

    def ours():
        return jax.block_until_ready(run(attack, key, model, x, y))

    if "peers" in parts and torch_model is not None:
        contenders = {"jaxadv": ours} | peers_of(name, torch_model, x, y, eps, steps, step_size)
        record["peers"] = harness.side_by_side(contenders, rounds)
    if "overhead" in parts:

        def total(point, m, y):
            logits = m(point)
            return jnp.sum(ja.losses.minus_cross_entropy(logits, y)), logits

        grad = jax.jit(lambda m, x, y: jax.value_and_grad(total, has_aux=True)(x, m, y))
        forward = jax.jit(lambda m, x: m(x))
        record["overhead"] = harness.side_by_side(
            {
                "attack": ours,
                "gradient": lambda: [jax.block_until_ready(grad(model, x, y)) for _ in range(10)],
                "forward": lambda: [jax.block_until_ready(forward(model, x)) for _ in range(10)],
            },
            rounds,
        )
        spent = run(attack, key, model, x, y)
        grads, forwards = int(spent.grads[0]), int(spent.queries[0] - spent.grads[0])
        t = {k: v["median"] for k, v in record["overhead"].items()}
        necessary = grads * t["gradient"] / 10 + forwards * t["forward"] / 10
        record["overhead_factor"] = t["attack"] / necessary
    if "loop" in parts:
        record |= loop_part(attack, key, model, x, y, rounds)
    return record


def loop_part(attack, key, model, x, y, rounds):
    """Ten steps in one compiled loop, with and without the cure, against ten calls of one compiled step."""
    keys = core.example_keys(key, attack.name, jnp.arange(x.shape[0]))
    state = jax.jit(attack.init)(keys, model, x, y)
    alone = jax.jit(lambda s, m, x, y: attack.step(s, m, x, y))
    cured = jax.jit(lambda s, m, x, y: core.loop(lambda t: attack.step(t, m, x, y), s, 10))
    plain = jax.jit(lambda s, m, x, y: jax.lax.fori_loop(0, 10, lambda _, t: attack.step(t, m, x, y), s))

    def ten():
        s = state
        for _ in range(10):
            s = alone(s, model, x, y)
        return jax.block_until_ready(s)

    times = harness.side_by_side(
        {
            "ten_steps": ten,
            "loop": lambda: jax.block_until_ready(cured(state, model, x, y)),
            "plain_loop": lambda: jax.block_until_ready(plain(state, model, x, y)),
        },
        rounds,
    )
    base = times["ten_steps"]["median"]
    return {
        "loop": times,
        "loop_factor": times["loop"]["median"] / base,
        "plain_loop_factor": times["plain_loop"]["median"] / base,
    }


def main() -> None:
    """Measure, print the table, store the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument(
        "--parts", nargs="+", default=["peers", "overhead", "loop"], choices=["peers", "overhead", "loop"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int)
    args = parser.parse_args()
    stored = harness.RESULTS / "attacks.json"  # networks that are not measured now keep their record
    record: dict = {"nets": json.loads(stored.read_text())["nets"] if stored.exists() else {}}
    rows = [["network", "what", "seconds (range)", "ratio"]]
    for name in args.nets:
        found = record["nets"][name] = measure(name, args.parts, args.rounds, args.batch)
        for peer, t in found.get("peers", {}).items():
            ratio = t["median"] / found["peers"]["jaxadv"]["median"]
            what = "PGD-50 jaxadv" if peer == "jaxadv" else f"PGD-50 {peer}, times jaxadv"
            rows.append([name, what, f"{t['median']:.2f} ({t['least']:.2f}-{t['most']:.2f})", f"{ratio:.2f}"])
        if "overhead_factor" in found:
            rows.append([name, "PGD-50 overhead factor", "", f"{found['overhead_factor']:.3f}"])
        if "loop" in found:
            rows.append([name, "PGD-10 loop / 10 steps alone", "", f"{found['loop_factor']:.3f}"])
            rows.append([name, "the same without the cure", "", f"{found['plain_loop_factor']:.3f}"])
    record["environment"] = harness.environment()
    print(harness.table(rows))
    print(f"stored in {harness.store('attacks', record)}")


if __name__ == "__main__":
    main()
