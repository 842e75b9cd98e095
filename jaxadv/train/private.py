"""Private training: the gradient of a plan, what a private run refuses, and its ledger.

What lives here: `private_grad_fn` (a gradient function of the trainer's form, clipped example by example), the checks
of `fit(..., private=plan)`, and `Ledger`, which carries what was spent through crashes. What does not: clip, noise,
samples and accounting (room `privacy`), and the loop (`driver.py`).

An objective is given one example at a time, or the views of one, and an attack runs inside of it. So nothing can mix
examples: that an objective would like to is found out before the first step, and refused.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxadv import parallel
from jaxadv.core import Objective, Trainable, atomic_write, example_keys
from jaxadv.privacy.plan import Plan
from jaxadv.privacy.plan import plan as plan_of
from jaxadv.train.objectives import halves, standard
from jaxadv.train.trainer import Gradient, TrainState, counted, grad_fn, make_step

LEDGER = "privacy.json"
"""File in the run folder that says what was spent so far."""


def _views(batch: dict[str, Any], views: int, augment: Callable | None, key) -> dict[str, Any]:
    """Rows of one example each: leaves `[b, views, ...]`, every view augmented with a key of its own."""
    rows = {name: jnp.repeat(a[:, None], views, axis=1) for name, a in batch.items()}
    if views > 1:
        rows["index"] = rows["index"] * views + jnp.arange(views, dtype=jnp.int32)[None]
    if augment is not None:
        flat = rows["x"].reshape(-1, *rows["x"].shape[2:])
        keys = example_keys(key, "augment", rows["index"].reshape(-1))
        rows["x"] = jax.vmap(augment)(keys, flat).reshape(rows["x"].shape)
    return rows | {"mask": jnp.ones_like(rows["mask"])}


def private_grad_fn(plan: Plan, augment: Callable | None = None) -> Callable[[Objective], Callable[..., Gradient]]:
    """Turn a plan into what makes gradient functions of objectives: per-example gradients, clipped, then summed.

    The gradient of an example is that of its mean loss over `plan.views` augmented views, each attacked for itself;
    it is clipped once. The search of an adversarial objective runs for all rows first, then the loss is differentiated
    at its points. The network's other variables stay as they are.

    | case | result |
    | --- | --- |
    | one view, no augmentation, a clip that does not bind | the sum of `grad_fn`, to rounding |
    | an example whose gradient is not finite | contributes exactly nothing, and counts in the metric `nonfinite` |
    | padding | contributes exactly nothing |

    Args:
      plan: how to clip.
      augment: `(key, x) -> x` for one example, drawn anew for every view.

    Returns:
      What `fit` and `make_step` take as `gradient`. Metrics (private data, all of them): `loss`, the `norm` before the
      clip, the shares `clipped` and `nonfinite`.

    References:
      De et al. 2022, Unlocking high-accuracy differentially private image classification through scale,
      arXiv:2204.13650, sections 3.1 and 3.2.
    """

    def of(objective: Objective) -> Callable[..., Gradient]:
        find, loss = halves(objective)

        def gradient(apply, params, state, batch, key, *, axis_name=None) -> Gradient:
            own, mask = parallel.varying(params, axis_name), batch["mask"]
            rows = _views(batch, plan.views, augment, key)
            rows = jax.vmap(lambda example: find(apply, own, state, example, key))(rows)

            def one(params, example, _):
                return loss(apply, params, state, example, key)[0].mean()

            total, seen = plan.clipped(one)(params, rows, mask, None, axis_name)
            norms, bad = seen["norms"], mask & ~(jnp.isfinite(seen["norms"]) & jnp.isfinite(seen["losses"]))
            shown = {
                "loss": jnp.where(bad, 0, seen["losses"]),
                "norm": jnp.where(bad, 0, norms),
                "clipped": norms > plan.clip_norm,
                "nonfinite": bad,
            }
            sums = {name: jnp.sum(jnp.where(mask, value, 0).astype(jnp.float32)) for name, value in shown.items()}
            return Gradient(total, counted(mask), state, sums)

        return gradient

    return of


# ------------------------------------------------------------------------------------------------------------- refusals


def check_private(plan: Plan, objective: Objective, trainable: Trainable, data: Any, settings: dict[str, Any]) -> None:
    """Refuse a run that would not be private, or not the one that was planned.

    Args:
      plan: the plan.
      objective: what is to be minimized.
      trainable: the network.
      data: the training source.
      settings: arguments of `fit`: `gradient`, `replays`, `bn_groups`, `collapse`, `keep`, `batch_size`, `steps`.

    Raises:
      ValueError: with the reason.
      BudgetError: if the steps would spend more than the budget.
    """
    if settings["gradient"] is not grad_fn:
        raise ValueError(
            "private training must make its own gradients; got another gradient function. Adversarial weight "
            "perturbation moves the weights by the gradient of all examples before any is clipped, and free training "
            "carries data of examples from step to step. Leave out gradient=."
        )
    ordinary = {
        "replays": (1, "a minibatch that is replayed is no new sample"),
        "bn_groups": (1, "batch statistics mix examples"),
        "collapse": (None, "stopping by a look at training data is not counted"),
        "keep": ("last", "choosing weights by a look at held-out data is not counted"),
    }
    for name, (value, reason) in ordinary.items():
        if settings[name] != value:
            raise ValueError(f"{name} must be {value!r} in private training: {reason}; got {settings[name]!r}.")
    if plan.sampler.n != len(data):
        raise ValueError(
            f"the plan must be for the {len(data)} training examples; got one for {plan.sampler.n}. Build it from the "
            "data that is trained on, after validation data is held out."
        )
    if round(plan.size) != settings["batch_size"]:
        raise ValueError(
            f"batch_size must be the plan's expected size, {round(plan.size)}; got {settings['batch_size']}. Sums are "
            "divided by it, whatever number a sample has."
        )
    _check_alone(objective, trainable, data)
    plan.admit(settings["steps"])


def _check_alone(objective: Objective, trainable: Trainable, data: Any) -> None:
    """Refuse running statistics, and an objective whose loss of one row changes with another row."""
    low, high = (float(b) for b in data.bounds)
    x = np.random.Generator(np.random.Philox(0)).uniform(low, high, (3, *data.shape)).astype(np.float32)

    def losses(x):
        two = jnp.arange(2, dtype=jnp.int32)
        batch = {"x": x, "y": two % data.classes, "index": two, "mask": two >= 0, "step": two * 0}
        found, (state, _) = objective(trainable.apply, trainable.params, trainable.state, batch, jax.random.key(0))
        return found, state

    run = jax.jit(losses)
    (first, state), (second, _) = run(x[:2]), run(x[::2])
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b, equal_nan=True), trainable.state, state)
    if any(jax.tree.leaves(moved)):
        raise ValueError(
            "a private network must have no running statistics; got one whose state changes with the batch (batch "
            "norm?). They mix examples and would be released without noise. Use norm='group' or norm='none'."
        )
    if not np.allclose(first[0], second[0], rtol=1e-5, atol=1e-6, equal_nan=True):
        raise ValueError(
            f"a private objective must give each example a loss of its own; the loss of one row went from {first[0]} "
            f"to {second[0]} as another row changed. Batch statistics, mixing, or a mean over the batch? Drop them."
        )


# --------------------------------------------------------------------------------------------------------------- ledger


def program_of(how: str, mesh: Any) -> dict[str, Any]:
    """Describe what decides the rounding of a step: the same program repeats its bits.

    Args:
      how: the executor.
      mesh: the devices, or None for one.

    Returns:
      Plain values.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    shape = [] if mesh is None else list(mesh.devices.shape)
    kind = f"{device.platform} {device.device_kind}"
    return {"how": how, "mesh": shape, "device": kind, "processes": jax.process_count(), "jax": jax.__version__}


class Ledger:
    """What a run has spent; it survives crashes, and counts steps twice that may have been taken twice with other bits.

    Args:
      plan: the plan.
      steps: number of steps of the run.
      every: steps between checkpoints.
      program: see `program_of`.
    """

    def __init__(self, plan: Plan, steps: int, every: int, program: dict[str, Any]):
        self.plan, self.steps, self.every, self.program, self.repeated = plan, steps, every, program, 0

    def open(self, folder: Path, step: int, newest: int) -> None:
        """Begin, or go on from a checkpoint; called before any step is taken.

        Between a checkpoint and a crash lie fewer than two intervals of steps, as the next checkpoint waits for the one
        before. So many, and those of later checkpoints that are dropped, count twice unless the program is the same.

        Args:
          folder: of the run.
          step: where the run goes on.
          newest: the newest checkpoint that there is, 0 if none.

        Raises:
          BudgetError: if the steps to come would then spend more than the budget.
        """
        path = folder / LEDGER
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            self.repeated = known["repeated"]
            if known["program"] != self.program:
                self.repeated += min(self.steps - step, newest - step + 2 * self.every)
                self.plan.admit(self.steps + self.repeated)
        self.facts(step, folder)

    def facts(self, step: int, folder: Path | None = None) -> dict[str, Any]:
        """State what was spent, for a checkpoint.

        Args:
          step: number of steps done.
          folder: of the run; the file in it is brought up to date.

        Returns:
          Plain values; see `Plan.ledger`.
        """
        made = self.plan.ledger(step + self.repeated)
        made |= {"steps": step, "repeated": self.repeated, "program": self.program}
        if folder is not None:
            self._put(folder, made)
        return made

    @staticmethod
    def _put(folder: Path, made: dict[str, Any]) -> None:
        if jax.process_index() == 0:
            text = json.dumps(made, indent=1)
            atomic_write(folder / LEDGER, lambda file: file.write(text.encode()))


def spent_line(facts: dict[str, Any]) -> dict[str, Any]:
    """Pick what belongs into the metrics of a run.

    Args:
      facts: from `Ledger.facts`.

    Returns:
      `epsilon`, `delta`, `accountant` and `repeated`.
    """
    return {name: facts[name] for name in ("epsilon", "delta", "accountant", "repeated")}


def one_step(
    noise_multiplier: float, clip_norm: float = 1.0, *, gradient: Callable | None = None
) -> tuple[Callable[[Any, Any], Any], Any]:
    """Return one private step of the trainer on a net of three numbers, to be audited with `privacy.audit.white_box`.

    Five examples all take part; the gradient of the last, the canary, has an axis almost to itself and is far beyond
    the clip. So the answers with and without it are two Gaussians, `1 / noise_multiplier` standard deviations apart.

    Args:
      noise_multiplier: of the plan.
      clip_norm: of the plan.
      gradient: a gradient function of another kind in the place of the plan's.

    Returns:
      (release, canary): `release(key, included)` is the change of the parameters under SGD of rate one.
    """
    made = plan_of(5, size=5, steps=1, delta=1e-5, noise_multiplier=noise_multiplier, clip_norm=clip_norm)
    rows = np.random.Generator(np.random.Philox(0)).uniform(-1, 1, (5, 3)).astype(np.float32) * [1, 1, 0.01]
    rows[4] = [0, 0, 40]
    five = np.arange(5, dtype=np.int32)

    def apply(params, state, x, **settings):
        del settings
        score = x @ params
        return jnp.stack([jnp.zeros_like(score), score], -1), state

    def release(key, included):
        params = jnp.array([0.2, -0.1, 0.3])
        optimizer = optax.chain(made.stage(key), optax.sgd(1.0))
        settings = {"gradient": gradient or private_grad_fn(made), "divisor": made.size}
        step = make_step(apply, standard(), optimizer, **settings)
        mask = jnp.asarray(five < 4) | (included & jnp.asarray(five == 4))
        batch = {"x": jnp.asarray(rows, jnp.float32), "y": jnp.asarray(five * 0), "index": jnp.asarray(five)}
        state = TrainState(jnp.zeros((), jnp.int32), key, params, {}, optimizer.init(params), None)
        return params - step(state, batch | {"mask": mask})[0].params

    return release, jnp.array([0.0, 0.0, 1.0])
