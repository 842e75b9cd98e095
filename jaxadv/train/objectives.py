"""What training minimizes: pure functions from parameters and a batch to one loss for each example.

What lives here: what all objectives share (`adversarial`), `standard`, adversarial training (`pgd_at`) and its
single-step wirings (`fgsm_at`, `fgsm_rs`, `n_fgsm`). What does not: regularized losses (`regularized.py`), adversaries
of the weights (`perturbed.py`), optimizers, averages and devices (`trainer.py`), and the attacks themselves.

An objective is `(apply, params, state, batch, key) -> (losses [b], (state, metrics))`. It never averages over the
batch: padding, devices and private training need the loss of each example. Its randomness belongs to examples: attacks
get the step's key and the dataset index, so the iterates do not depend on the order of rows or on the number of
devices.

Published methods differ on few axes, and each axis is an argument of `adversarial`: where the search starts and what it
maximizes (the attack and its guide), batch norm inside it, the loss at what it found, which passes move the running
statistics. A method is one call. An adversarial objective has two halves, the search and the loss at its points, so
that an adversary of the weights can move between them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxadv import attacks, losses
from jaxadv.core import Attack, Model, Objective, Threat, check, example_keys, loop, robust
from jaxadv.train import starts

ATTACK_BN = ("eval", "local", "train")
"""Batch norm inside the attack: running statistics, those of the batch without updating the running ones, or with."""

BN = ("train", "local", "eval")
"""Batch norm of the training pass."""

STATISTICS = "statistics"
"""Where a batch holds the running statistics that a search left."""

POINTS = {"clean": "x", "robust": "found"}
"""The points at which a loss may ask for logits, and where a batch holds them: the examples, what the search found."""


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """An objective in two halves: `find` the points, then the `loss` at them. Calling it does both.

    Attributes:
      find: `(apply, params, state, batch, key) -> batch` with the points, held constant, as `found`.
      loss: the objective on a batch that has `found`.
    """

    find: Callable
    loss: Callable

    def __call__(self, apply, params, state, batch, key):
        """Search at these parameters, then return the losses at what was found."""
        return self.loss(apply, params, state, self.find(apply, params, state, batch, key), key)

    @property
    def keywords(self) -> dict[str, Any]:
        """The settings of the search, by name."""
        return getattr(self.find, "keywords", {})


def halves(objective: Objective) -> tuple[Callable, Callable]:
    """Part an objective into its search and its loss.

    Args:
      objective: any.

    Returns:
      (find, loss) as in `Adversarial`; where nothing is searched, `find` returns the batch as it is.
    """
    if isinstance(objective, Adversarial):
        return objective.find, objective.loss
    return _nothing, objective


def _nothing(apply, params, state, batch, key):
    del apply, params, state, key
    return batch


def frozen(apply, params, state, *, bn: str = "eval") -> Model:
    """Return the model as the attack sees it: constant parameters, so that only input gradients are computed.

    Args:
      apply: of a `Trainable`.
      params: its parameters.
      state: its state.
      bn: one of `ATTACK_BN`; the attack sees the same in `'train'` as in `'local'`.

    Returns:
      Logits from a batch, as a callable pytree.
    """

    def forward(params, state, x):
        return apply(params, state, x, bn="local" if bn == "train" else bn)[0]

    return Model(forward, lax.stop_gradient(params), lax.stop_gradient(state))


def smoothed_cross_entropy(logits, y, smoothing: float):
    """Return the cross-entropy against labels that keep `1 - smoothing` and spread the rest over all classes.

    Args:
      logits: `[b, k]`.
      y: int `[b]`.
      smoothing: weight of the uniform distribution, in [0, 1); 0 is plain cross-entropy, to the bit.

    Returns:
      `[b]`.
    """
    plain = losses.cross_entropy(logits, y)
    if not smoothing:
        return plain
    return (1 - smoothing) * plain - smoothing * jax.nn.log_softmax(logits, axis=-1).mean(-1)


def labels(model, batch):
    """Guide an attack by the true labels.

    Args:
      model: the frozen model.
      batch: the batch.

    Returns:
      int `[b]`.
    """
    del model
    return batch["y"]


def clean_logits(model, batch):
    """Guide an attack by the logits at the clean examples, for losses that compare two predictions.

    Args:
      model: the frozen model.
      batch: the batch.

    Returns:
      `[b, k]`, computed once for all steps.
    """
    return lax.stop_gradient(model(batch["x"]))


def targets(model, batch):
    """Guide an attack by what a batch is learned with: probabilities, where labels are soft or mixed, or labels.

    Args:
      model: the frozen model.
      batch: the batch.

    Returns:
      `[b, k]` or int `[b]`; `minus_soft_cross_entropy` takes either.
    """
    del model
    return batch.get("target", batch["y"])


def minus_soft_cross_entropy(logits, y):
    """Return minus the cross-entropy to probabilities or labels: what an attack guided by `targets` minimizes.

    Args:
      logits: `[b, k]`.
      y: `[b, k]` probabilities, or int `[b]`.

    Returns:
      `[b]`. Up to a constant, and in its gradient, it is `losses.minus_kl` from a prediction with these probabilities.
    """
    return -losses.cross_entropy(logits, y)


def _find(apply, params, state, batch, key, *, attack, guide, growth, bn_attack):
    """The batch, and what an attack on the frozen model finds from it."""
    model = frozen(apply, params, state, bn=bn_attack)
    if growth is not None:
        attack = attacks.scaled(attack, growth(batch["step"]))
    if bn_attack == "train":
        passes = partial(apply, lax.stop_gradient(params), bn="train")
        x, state = _moving(attack, key, model, batch["x"], guide(model, batch), batch["index"], passes, state)
        return batch | {"found": lax.stop_gradient(x), STATISTICS: state}
    result = attack.run(key, model, batch["x"], guide(model, batch), index=batch["index"])
    return batch | {"found": lax.stop_gradient(result.x)}


def _moving(attack, key, model, x, y, index, passes, state):
    """Run an attack step by step, and move running statistics at each of its points before it is left."""
    start = attack.init(example_keys(key, attack.name, index, 0), model, x, y)

    def step(carry):
        search, state = carry
        return attack.step(search, model, x, y), passes(state, search.point)[1]

    search, state = loop(step, (start, state), attack.max_steps)
    return attack.result(search, model, x, y).x, state


def begun(state, batch):
    """Return the running statistics with which the pass of the loss begins: those that the search left, if it did.

    Args:
      state: of the network before the step.
      batch: what a search returned, or a batch.

    Returns:
      The state.
    """
    return batch.get(STATISTICS, state)


def _loss(apply, params, state, batch, key, *, loss, points, running, bn, taps=(), hints=None):
    """Logits at the points, in the order of the passes that move running statistics, and the loss of each row.

    The key feeds dropout, anew for each point and in each part of a batch.
    """
    logits, settings = {}, ({"taps": taps} if taps else {}) | ({"hints": hints(batch)} if hints else {})
    state = begun(state, batch)
    for name in (*running, *(p for p in points if p not in running)):
        noise = jax.random.fold_in(jax.random.fold_in(key, 1 + points.index(name)), batch["index"][0])
        mode = bn if name in running or bn == "eval" else "local"
        out, state = apply(params, state, batch[POINTS[name]], bn=mode, key=noise, **settings)
        logits[name], seen = out if taps else (out, {})
        logits |= {(name, tap): value for tap, value in seen.items()}
        check.logits(logits[name], batch["x"].shape[0])
    y = batch["y"] if batch["y"].ndim == 1 else jnp.argmax(batch["y"], axis=-1)  # of a mixture, its largest class
    metrics = {name: robust(logits[name], y).astype(jnp.float32) for name in points}
    return loss(logits, batch), (state, metrics)


def _cross_entropy(logits, batch, *, point, smoothing):
    return smoothed_cross_entropy(logits[point], batch["y"], smoothing)


def check_smoothing(value: float) -> float:
    """Refuse a label smoothing that is none.

    Args:
      value: weight of the uniform distribution.

    Returns:
      The value.

    Raises:
      ValueError: if it is outside [0, 1).
    """
    if not 0 <= value < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1); got {value}. 0.1 is usual, 0 switches it off.")
    return value


def adversarial(
    attack: Attack,
    loss: Callable,
    *,
    points: Sequence[str] = ("clean", "robust"),
    running: Sequence[str] | None = None,
    guide: Callable = labels,
    growth: Callable | None = None,
    bn_attack: str = "eval",
    bn: str = "train",
    taps: Sequence[str] = (),
    hints: Callable | None = None,
) -> Adversarial:
    """Build an objective from its axes: an attack, what guides it, and a loss of the logits at both points.

    Args:
      attack: finds the points; it sees frozen parameters.
      loss: `(logits, batch) -> [b]`, `logits` a dict from the names in `points` to `[b, k]`.
      points: where the loss asks for logits: `'clean'` examples, the `'robust'` ones that the attack found.
      running: the passes that move the running statistics, in order; a name may come twice (the second pass computes
        the same logits, which a compiler does once). None is each of `points` once. The others use the statistics of
        the batch without updating.
      guide: `(model, batch) -> y`, what the attack's loss gets beside the logits: `labels`, `clean_logits`, ...
      growth: number of the step (int `[b]`) to the share of budget and step size that the attack has there, above 0;
        `schedules.growth` rises linearly to 1. None attacks with the whole budget from the first step.
      bn_attack: batch norm inside the attack: `'eval'` (running statistics, as TRADES does), `'local'` (statistics of
        the batch; the running ones stay) or `'train'` (statistics of the batch, and every step of the attack moves the
        running ones, as in Madry's, Wong's and Rice's codes). The attack finds the same in the last two; with `'train'`
        running statistics are mostly those of the last batch, which the evaluation then works with.
      bn: batch norm of the training passes.
      taps: layers whose values the loss gets, too, as `logits[point, tap]`; see `models.apply`.
      hints: `batch -> dict`, what layers that ask for it are told in the training passes.

    Returns:
      The objective; metrics: for each point, whether it is classified correctly.

    Raises:
      ValueError: on a mode or a point that does not exist.
      TypeError: if `attack` cannot be run.
    """
    if not hasattr(attack, "run"):
        raise TypeError(
            f"attack must be an attack, built from a threat; got {type(attack).__name__}. "
            "For example attacks.pgd(threats.linf(0.3))."
        )
    check.choice("bn_attack", bn_attack, ATTACK_BN)
    if bn_attack == "train" and (not isinstance(attack, attacks.GradientAttack | starts.Started) or attack.early):
        raise ValueError(
            "bn_attack='train' moves the running statistics at every step of an attack that follows the gradient and "
            f"takes all its steps; got {type(attack).__name__}{' with early=True' if attack.early else ''}. "
            "'local' gives the same points."
        )
    check.choice("bn", bn, BN)
    points, running = tuple(points), tuple(points if running is None else running)
    for name in points:
        check.choice("point", name, POINTS)
    for name in running:
        check.choice("pass in running", name, points)
    return Adversarial(
        partial(_find, attack=attack, guide=guide, growth=growth, bn_attack=bn_attack),
        partial(_loss, loss=loss, points=points, running=running, bn=bn, taps=tuple(taps), hints=hints),
    )


def standard(*, bn: str = "train", label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy on the examples as they are.

    Args:
      bn: mode of batch norm, `'train'`, `'local'` or `'eval'`.
      label_smoothing: see `smoothed_cross_entropy`.

    Returns:
      The objective; metric `clean`, whether the example is classified correctly.

    Raises:
      ValueError: on a mode or a smoothing that does not exist.
    """
    check.choice("bn", bn, BN)
    loss = partial(_cross_entropy, point="clean", smoothing=check_smoothing(label_smoothing))
    return partial(_loss, loss=loss, points=("clean",), running=("clean",), bn=bn)


def pgd_at(attack: Attack, *, label_smoothing: float = 0.0, **axes: Any) -> Adversarial:
    """Adversarial training: cross-entropy at the points that an attack finds.

    min over the parameters of E[max over the threat of CE(f(x'), y)]; the maximum is whatever `attack` returns, held
    constant.

    Args:
      attack: finds the points; it sees frozen parameters.
      label_smoothing: see `smoothed_cross_entropy`.
      **axes: `growth`, `bn_attack` (default `'eval'`), `bn`: see `adversarial`.

    Returns:
      The objective; metric `robust`, whether the attacked example is classified correctly.

    Raises:
      ValueError: on a mode or a smoothing that does not exist.
      TypeError: if `attack` cannot be run.

    References:
      Madry et al. 2018, Towards deep learning models resistant to adversarial attacks, arXiv:1706.06083, eq. 2.1.
    """
    loss = partial(_cross_entropy, point="robust", smoothing=check_smoothing(label_smoothing))
    return adversarial(attack, loss, points=("robust",), **axes)


def fgsm_at(threat: Threat, *, alpha: Any = None, bn_attack: str = "local", **axes: Any) -> Adversarial:
    """Adversarial training with the fast gradient sign method: one step of length `alpha` from the example itself.

    The cheapest of all, and the one that collapses: beyond small budgets the network learns to spoil the one gradient
    that it is attacked with (catastrophic overfitting), unless something holds it back, such as the noise of
    `n_fgsm`.

    Args:
      threat: linf, with its budget.
      alpha: step length in units of `x`; None is eps.
      bn_attack: see `adversarial`.
      **axes: further arguments of `pgd_at`.

    Returns:
      The objective; metric `robust`.

    Raises:
      ValueError: if `alpha` is not positive.

    References:
      Goodfellow et al. 2015, Explaining and harnessing adversarial examples, arXiv:1412.6572, section 6 (there half of
      the loss is that of the clean examples).
    """
    attack = attacks.fgsm(threat, step_size=_length(alpha, threat.eps, "eps"), keep="last", name="fgsm_at")
    return pgd_at(attack, bn_attack=bn_attack, **axes)


def fgsm_rs(
    threat: Threat, *, alpha: Any = None, start: str = "random", bn_attack: str = "local", **axes: Any
) -> Adversarial:
    """Fast adversarial training: one signed step of length `alpha` from a uniform random start.

    δ0 ~ U(-eps, eps), by default clipped to the bounds; δ = Π(δ0 + α sign ∇CE(f(x + δ0))); a wiring of `pgd_at`.

    Args:
      threat: linf, with its budget.
      alpha: step length in units of `x`; None is 1.25 eps. Twice the budget collapses; so may long runs and large
        budgets.
      start: `'random'` within the bounds, as in the authors' CIFAR-10 code, or `'unclipped'`, as in their MNIST code.
        Where many features stand at a bound (the black of MNIST) that decides between robust and not at all.
      bn_attack: see `adversarial`; published with `'train'`, which finds the same points.
      **axes: further arguments of `pgd_at`.

    Returns:
      The objective; metric `robust`.

    Raises:
      ValueError: if `alpha` is not positive, or `start` is unknown.

    References:
      Wong, Rice and Kolter 2020, Fast is better than free: revisiting adversarial training, arXiv:2001.03994, algorithm
      3.
    """
    alpha = _length(alpha, 1.25 * threat.eps, "1.25 eps")
    check.choice("start", start, ("random", "unclipped"))
    attack = attacks.fgsm(threat, start=start, step_size=alpha, keep="last", name="fgsm_rs")
    return pgd_at(attack, bn_attack=bn_attack, **axes)


def n_fgsm(
    threat: Threat,
    *,
    noise: float = 2.0,
    alpha: Any = None,
    clip: float | None = None,
    bn_attack: str = "local",
    **axes: Any,
) -> Adversarial:
    """Noise-FGSM: one step of length `alpha` from strong noise, not projected back to the budget.

    η ~ U(-k eps, k eps), clipped to the bounds; δ = η + α sign ∇CE(f(x + η)), clipped to the bounds alone. So a change
    may be as large as `k eps + α`.

    | `noise` | `clip` | `alpha` | is |
    | --- | --- | --- | --- |
    | 2 | None | eps | N-FGSM |
    | 1 | 1 | 1.25 eps | `fgsm_rs` |
    | 0 | 1 or None | eps | `fgsm_at` |

    Args:
      threat: linf, with its budget.
      noise: the factor k of the noise, at least 0. At large budgets 3 holds where 2 collapses.
      alpha: step length in units of `x`; None is eps.
      clip: project to this many budgets after the step; None does not project.
      bn_attack: see `adversarial`; published with `'train'`, which finds the same points.
      **axes: further arguments of `pgd_at`.

    Returns:
      The objective; metric `robust`.

    Raises:
      ValueError: if `alpha` or `clip` is not positive, or `noise` is negative.

    References:
      de Jorge et al. 2022, Make some noise: reliable and efficient single-step adversarial training, arXiv:2202.01181,
      algorithm 1. The authors' code scales budget and bounds by the standard deviation of the data; here the network
      normalizes.
    """
    alpha = _length(alpha, threat.eps, "eps")
    if clip is not None:
        check.positive("clip", clip, "None does not project.")
    if noise:
        check.positive("noise", noise, "0 starts at the example.")
    reach = noise + alpha / threat.eps if clip is None else clip  # a ball so wide that it never binds
    wide = dataclasses.replace(threat, eps=reach * threat.eps)  # pyright: ignore[reportArgumentType]
    attack = attacks.fgsm(wide, step_size=alpha, keep="last", name="n_fgsm")
    return pgd_at(starts.started(attack, starts.uniform(noise / reach)), bn_attack=bn_attack, **axes)


def _length(alpha: Any, default: Any, words: str) -> Any:
    """The step length, or its default."""
    alpha = default if alpha is None else alpha
    check.positive("alpha", alpha, f"None stands for {words}.")
    return alpha
