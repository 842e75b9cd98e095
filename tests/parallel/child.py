"""One process of a run, started by `test_processes`: trains by a small recipe, takes a private step, evaluates.

Arguments: folder, `--distributed`, forced devices of all processes, seconds that reading a batch takes, further words
of `train`. The small recipe is known to this process only. What the process holds of every parameter and momentum is
written down, as a part of the whole.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax

from jaxadv import attacks, data, models, parallel, privacy, threats, train
from jaxadv.cli import main, training

STEPS, ROWS, RADIUS = 200, 64, 0.1
SGD = optax.sgd(0.05, momentum=0.5)


@dataclasses.dataclass(frozen=True, eq=False)
class Slow(data.Source):
    seconds: float = 0.0

    def __getitem__(self, indices):
        time.sleep(self.seconds)
        return super().__getitem__(indices)


def recipe(source, *, seed=0, eps=None, epochs=1, validation=None, trainable=None, **overrides):
    """Train a linear model on the digits, slowly if asked to."""
    attack = attacks.pgd(threats.l2(0.5), steps=2, keep="last")  # steps along signs would amplify rounding
    slow = Slow(**{f.name: getattr(source, f.name) for f in dataclasses.fields(source)}, seconds=PAUSE)
    given = {"trainable": trainable, "objective": train.pgd_at(attack), "optimizer": SGD, "data": slow}
    given |= {"steps": STEPS, "batch_size": 32, "attack": attack, "validation": validation.take(64)}
    return given | {"save_every": 20, "validate_every": 100, "keep": "last"} | overrides


def held(leaf):
    """The part of an array that this process has, copies counted once."""
    return sum({str(shard.index): shard.data.size for shard in leaf.addressable_shards}.values()) / leaf.size


def watched(fit, folder, key, *, callbacks, **given):
    def look(step, state, line):
        kept = {"params": state.params, "momentum": state.opt_state}
        parts = {jax.tree_util.keystr(path): held(a) for path, a in jax.tree_util.tree_leaves_with_path(kept)}
        (folder / f"held-{jax.process_index()}.json").write_text(json.dumps(parts))

    return fit(key, callbacks=(*callbacks, look), **given)


def private_step(trainable, mesh):
    """One step on clipped gradients, with the rows that belong to this process."""
    source, process = data.load("digits"), (jax.process_index(), jax.process_count())
    batch = data.make_batch(source, np.arange(48), 64, process=process)

    def loss(params, example, key):
        logits, _ = trainable.apply(params, {}, example["x"][None])
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"][None])[0]

    clipped = privacy.clipped_grads(loss, clip_norm=0.5)

    def step(params, batch, *, axis_name=None):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), batch["index"])
        rows = {"x": batch["x"], "y": batch["y"]}
        total, _ = clipped(params, rows, batch["mask"], keys, axis_name=axis_name)
        return jax.tree.map(lambda p, g: p - 0.1 * g / 48, params, parallel.psum(total, axis_name)), ()

    return parallel.compile_step(step, how="shard_map", mesh=mesh)(trainable.params, batch)[0]


def run(folder, spec, devices, words):
    shared = ["--distributed", spec, "--devices", devices, "--cache", str(folder.parent / "cache")]
    code = main(["train", "--recipe", "tiny_digits", "--out", str(folder / "run"), *shared, *words])
    parallel.agree(True)  # the first one has written
    if code or not (folder / "run" / "model.safetensors").exists():
        return code
    trainable, _ = models.load(folder / "run" / "model.safetensors")
    private = parallel.whole(private_step(trainable, training.mesh_of(int(devices))))
    if jax.process_index() == 0:
        np.savez(folder / "private.npz", *jax.tree.leaves(private))
    evaluation = ["evaluate", str(folder / "run"), "--out", str(folder / "evaluation"), "--n", str(ROWS), "--eps"]
    return main([*evaluation, str(RADIUS), "--attacks", "fgsm,pgd", "--slots", "8", *shared])


if __name__ == "__main__":
    PAUSE = float(sys.argv[4])
    train.RECIPES["tiny_digits"] = recipe
    train.fit = functools.partial(watched, train.fit, Path(sys.argv[1]))
    parallel.fsdp = functools.partial(parallel.fsdp, least=64)
    training.NETWORKS["tiny_digits"] = ("mlp", {"widths": ()})
    if sys.argv[2] != "off":  # as the command line would, but a dead process is noticed sooner
        address, count, number = sys.argv[2].split(",")
        jax.distributed.initialize(address, int(count), int(number), heartbeat_timeout_seconds=15)
    sys.exit(run(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[5:]))
