"""`fit`: the host side of training. Feeds batches to a compiled step and looks after everything around it.

What lives here: the loop, validation, the watch for catastrophic overfitting, when to save, how to resume,
interruptions. What does not: any arithmetic of training (`trainer.py`) and any file format (`checkpoint.py`,
`record.py`).

The loop never waits for the device except where it reports, judges or saves. Everything that decides what happens next
is in the checkpoint, so a run that was killed and resumed gives the bits of one that was not.
"""

# A part that was not asked for is None, and nothing is asked of it.
# pyright: reportOptionalMemberAccess=false

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxadv import data as data_room
from jaxadv import parallel
from jaxadv.core import Attack, Objective, Trainable, atomic_write, check
from jaxadv.privacy.plan import Plan
from jaxadv.train import record
from jaxadv.train.checkpoint import CheckpointError, Checkpoints
from jaxadv.train.private import Ledger, check_private, private_grad_fn, program_of, spent_line
from jaxadv.train.trainer import Judged, TrainState, co_detector, copy, grad_fn, init, make_judge, make_step, purpose

ON_COLLAPSE = ("stop", "warn", "restore")
KEEP = ("last", "best")


class Interrupted(RuntimeError):
    """Training was interrupted and saved; `step` and `folder` say where, `preempted` whether by SIGTERM."""

    def __init__(self, step: int, folder: Path, preempted: bool = False):
        super().__init__(f"training was interrupted at step {step} and saved in {folder}. Resume with resume=True.")
        self.step, self.folder, self.preempted = step, folder, preempted


@dataclasses.dataclass(frozen=True)
class Collapse:
    """How to watch for catastrophic overfitting: the robust accuracy on a fixed batch of training data, every so often.

    Differs from the published detector, which attacks one training batch in train mode once per epoch: the batch is
    fixed and larger, batch norm is in eval mode, and the check may come more often, since collapse happens within an
    epoch.

    Attributes:
      attack: usually PGD with 5 steps.
      every: steps between checks.
      size: examples attacked, at most what there is.
      threshold: see `co_detector`; the fall is measured from the check before.
      action: `'stop'` ends the run with the weights of the check before; `'restore'` goes on from them at the same
        step; `'warn'` only records it.

    References:
      Wong, Rice and Kolter 2020, Fast is better than free, arXiv:2001.03994, section 5.
    """

    attack: Attack
    every: int
    size: int = 512
    threshold: float = 0.2
    action: str = "stop"


@dataclasses.dataclass
class _Settings:
    """What `fit` was given, apart from the network; all of it but the callbacks decides the numbers."""

    steps: int
    batch_size: int
    replays: int
    attack: Attack | None
    validation: Any
    validate_every: int
    collapse: Collapse | None
    save_every: int
    log_every: int
    keep: str
    checkpoint: Path | None
    callbacks: tuple[Callable, ...]
    private: Plan | None = None


@dataclasses.dataclass
class _Facts:
    """What the host knows of a run; it is kept in every checkpoint."""

    best: dict[str, float] | None = None
    reference: float | None = None
    window: list[dict[str, float]] = dataclasses.field(default_factory=list)
    stopped: bool = False
    privacy: dict[str, Any] | None = None


def fit(
    key,
    trainable: Trainable,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    data: Any,
    *,
    steps: int,
    batch_size: int,
    attack: Attack | None = None,
    validation: Any = None,
    validate_every: int | None = None,
    keep: str = "last",
    collapse: Collapse | None = None,
    augment: Callable | None = None,
    ema: float | None = None,
    ema_warmup: bool = True,
    precision: str = "float32",
    accumulate: int = 1,
    bn_groups: int = 1,
    gradient: Callable = grad_fn,
    private: Plan | None = None,
    replays: int = 1,
    remat: bool = False,
    how: str = "jit",
    mesh: Any = None,
    layout: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    resume: bool | int = False,
    log_every: int = 50,
    workers: int = 0,
    callbacks: Iterable[Callable] = (),
) -> TrainState:
    """Train a network on any objective with any optax optimizer, on any devices, and survive being killed.

    Args:
      key: a typed key; order of the data, augmentation, attacks and noise all come from it.
      trainable: the network; its arrays are copied, not used up.
      objective: what to minimize, e.g. one of `OBJECTIVES`.
      optimizer: an optax transformation; it gets mean gradients.
      data: a `Source` of training examples.
      steps: number of updates.
      batch_size: examples in an update, over all devices.
      attack: what validation attacks with; None validates nothing.
      validation: a `Source` that decides which weights are best; never the test set.
      validate_every: steps between validations; None makes ten in a run. The last step is always validated.
      keep: which weights to return: those of the `'last'` step or the `'best'` by robust accuracy on `validation` (then
        `step` of the returned state says when that was).
      collapse: how to watch for catastrophic overfitting; None does not watch.
      augment: `(key, x) -> x` for one example.
      ema: decay of an average of the parameters; validation then judges the average.
      ema_warmup: let the average forget its start soon; see `averaged`.
      precision: `'float32'`, or `'bfloat16'` inside the network only (parameters, optimizer and losses stay float32).
      accumulate: compute each gradient in so many parts, to save memory.
      bn_groups: groups of the batch with batch statistics of their own.
      gradient: objective to gradient function; see `grad_fn`. If it has an attribute `carry`, a function of the shape
        `(batch_size, ...)` of a batch, the state carries what that returns for each row; see `free`.
      private: a `privacy.plan` for these data: samples, clipped gradients and noise come from it, and the epsilon
        spent stands in every checkpoint, in `privacy.json` and in the metrics (event `privacy`). `optimizer` then gets
        the noisy mean, so weight decay acts after the clip. The guarantee is for the returned parameters and their
        average; it needs a secret `key`, and all else in the folder is private data.
      replays: number of steps in a row that get the same minibatch; `steps` counts them all.
      remat: for large networks: backward passes keep only what blocks hand on, and compute the rest again; see
        `core.rematerialized`.
      how: executor, see `parallel.compile_step`.
      mesh: the devices, of all processes; None is one.
      layout: how parameters and averages lie on the devices, e.g. `parallel.fsdp()`; None keeps all on each.
      checkpoint: folder for checkpoints and `metrics.jsonl`; None keeps nothing.
      save_every: steps between checkpoints; None makes ten in a run. A best one and the last are always saved.
      resume: True goes on from the newest checkpoint, if there is one; a number from the checkpoint of that step.
      log_every: steps between reports (means over those steps).
      workers: processes that read and decode examples ahead, for large images; see `data.batches`. The batches are
        the same. `metrics.jsonl` tells how long steps waited for them (`waiting`).
      callbacks: each called as `callback(step, state, metrics)` at every report, validation and check. The state is
        used up by the next step: copy what you keep.

    Returns:
      The state after training; see `keep`.

    Raises:
      ValueError: on settings that cannot work, or that differ from those of the run to be resumed; on what cannot be
        private.
      ImportError: with `workers`, if grain is missing.
      BudgetError: before the first step, if a private run would spend more than its budget.
      FileExistsError: if the folder holds a run and `resume` is False.
      CheckpointError: if a checkpoint cannot be written or read.
      FloatingPointError: if the loss is not finite.
      Interrupted: on Ctrl-C or SIGTERM with a checkpoint folder, after saving.
    """
    data_room.check_workers(workers)
    settings = _settings(
        data,
        steps=steps,
        batch_size=batch_size,
        replays=replays,
        attack=attack,
        validation=validation,
        validate_every=validate_every,
        collapse=collapse,
        save_every=save_every,
        log_every=log_every,
        keep=keep,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        callbacks=tuple(callbacks),
        private=private,
    )
    parts = {"gradient": gradient, "accumulate": accumulate, "precision": precision, "bn_groups": bn_groups}
    parts |= {"ema": ema, "ema_warmup": ema_warmup, "augment": augment, "replays": replays}
    if private is not None:
        given = {"gradient": gradient, "replays": replays, "bn_groups": bn_groups, "collapse": collapse, "keep": keep}
        check_private(private, objective, trainable, data, given | {"batch_size": batch_size, "steps": steps})
        parts |= {"gradient": private_grad_fn(private, augment), "augment": None, "divisor": private.size}
        optimizer = optax.chain(private.stage(purpose(key, "noise")), optimizer)
    step = make_step(trainable.apply, objective, optimizer, remat=remat, **parts)
    carries = getattr(gradient, "carry", None)
    carry = None if carries is None else carries((batch_size, *data.shape))
    start = init(key, trainable, optimizer, ema=ema is not None, carry=carry)
    config = {} if checkpoint is None else _config(key, settings, data, start, objective, optimizer, parts)
    compiled = parallel.compile_step(step, how=how, mesh=mesh, layout=layout)
    judges = {
        a: parallel.compile_step(make_judge(trainable.apply, a), how=how, mesh=mesh, donate=False, layout=layout)
        for a in _attacks(settings)
    }
    ledger = None if private is None else Ledger(private, steps, settings.save_every, program_of(how, mesh))
    loop = _Loop(key, settings, data, compiled, judges, start, ledger, workers)
    return loop.run(config, resume)


def _settings(data, *, validate_every, save_every, **given) -> _Settings:
    """Check what `fit` was given and fill in what it was not."""
    steps, batch_size, collapse = given["steps"], given["batch_size"], given["collapse"]
    check.whole("steps", steps)
    check.whole("batch_size", batch_size)
    check.whole("replays", given["replays"])
    check.whole("log_every", given["log_every"])
    if len(data) == 0:
        raise ValueError("data must hold at least one example; got an empty source. An empty selection?")
    if batch_size > len(data):
        raise ValueError(
            f"batch_size must be at most the {len(data)} training examples; got {batch_size}. Use a smaller batch."
        )
    if (given["attack"] is None) != (given["validation"] is None):
        lacking = "attack" if given["attack"] is None else "validation"
        raise ValueError(
            f"validation needs both an attack and a source; got no {lacking}. Pass {lacking}=, or neither."
        )
    check.choice("keep", given["keep"], KEEP)
    if given["keep"] == "best" and given["validation"] is None:
        raise ValueError(
            "keep='best' needs validation to find the best weights; got none. Pass attack= and validation=."
        )
    if collapse is not None:
        check.choice("action on collapse", collapse.action, ON_COLLAPSE)
        check.whole("collapse.every", collapse.every)
        check.whole("collapse.size", collapse.size)
        check.positive("collapse.threshold", collapse.threshold)
    tenth = max(1, steps // 10)
    every = {"validate_every": validate_every, "save_every": save_every}
    for name, value in every.items():
        if value is not None:
            check.whole(name, value)
        every[name] = tenth if value is None else value
    return _Settings(**given, **every)


def _attacks(settings: _Settings) -> list[Attack]:
    wanted = [settings.attack, settings.collapse.attack if settings.collapse else None]
    return [a for a in wanted if a is not None]


def _config(key, settings: _Settings, data, start: TrainState, objective, optimizer, parts) -> dict[str, Any]:
    """Everything that decides the numbers of a run; what only decides speed (devices, executor) stays out."""
    fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    for name in ("callbacks", "checkpoint", "validation", *(["private"] if settings.private is None else [])):
        del fields[name]
    sources = {"data": data.fingerprint}
    if settings.validation is not None:
        sources["validation"] = settings.validation.fingerprint
    leaves = jax.tree_util.tree_leaves_with_path({"params": start.params, "state": start.state})
    arrays = {jax.tree_util.keystr(p): f"{a.dtype}{list(a.shape)}" for p, a in leaves}
    return record.describe(
        {
            "settings": fields,
            "sources": sources,
            "key": key,
            "arrays": arrays,
            "objective": objective,
            "optimizer": optimizer,
        }
        | parts
    )


def _batches_of(source, size: int) -> list[dict[str, np.ndarray]]:
    """Cut a source into padded batches, in its own order."""
    places = np.arange(len(source))
    process = (jax.process_index(), jax.process_count())
    return [
        data_room.make_batch(source, places[i : i + size], size, process=process) for i in range(0, len(places), size)
    ]


class _Loop:
    """The mutable side of one call of `fit`."""

    def __init__(self, key, settings: _Settings, data, compiled, judges, state, ledger: Ledger | None, workers: int):
        self.settings, self.data, self.compiled, self.judges = settings, data, compiled, judges
        self.workers = workers
        self.key, self.state, self.facts = key, compiled.place(state), _Facts()
        self.ledger = ledger
        self.best_state: TrainState | None = None
        self.good: TrainState | None = None
        self.pending: list[dict[str, Any]] = []
        self.checkpoints: Checkpoints | None = None
        self.metrics = record.Metrics(None)
        self.judged_key = purpose(key, "validation")
        size = settings.batch_size
        self.validation = [] if settings.validation is None else _batches_of(settings.validation, size)
        self.watched: list[dict[str, np.ndarray]] = []
        if settings.collapse is not None:
            self.watched = _batches_of(data_room.evaluation_subset(data, min(settings.collapse.size, len(data))), size)
            self._mark_good()
        self.stop_asked, self.preempted, self.skipped = False, False, []
        self.clock, self.waited = time.perf_counter(), 0.0

    # ----------------------------------------------------------------------------------------------------- beginning

    def run(self, config: dict[str, Any], resume: bool | int) -> TrainState:
        start = 0
        if self.settings.checkpoint is not None:
            start = self._open(self.settings.checkpoint, config, resume)
        try:
            if start < self.settings.steps and not self.facts.stopped:
                with self._signals():
                    self._train(start)
            result = self._result()
        except BaseException:
            if self.checkpoints is not None:
                with contextlib.suppress(CheckpointError):  # the error on its way says more
                    self.checkpoints.close()
            raise
        else:
            if self.checkpoints is not None:
                self.checkpoints.close()
        finally:
            self.metrics.close()
        return result

    def _open(self, folder: Path, config: dict[str, Any], resume: bool | int) -> int:
        """Take up the run in a folder, or begin one; returns the step to begin at."""
        self.checkpoints = Checkpoints(folder / "checkpoints")
        try:
            return self._take_up(folder, config, resume)
        except BaseException:
            self.checkpoints.close()
            raise

    @staticmethod
    def _describe(path: Path, config: dict[str, Any]) -> None:
        text = json.dumps({"schema": 1, "config": config}, indent=1)
        atomic_write(path, lambda file: file.write(text.encode()))

    def _take_up(self, folder: Path, config: dict[str, Any], resume: bool | int) -> int:
        store = self.checkpoints
        known, described = store.steps(), folder / "run.json"
        if resume is False:
            if known:
                raise FileExistsError(
                    f"a new run needs a folder of its own; {folder} holds a run at step {known[-1]}. "
                    "Pass resume=True to go on with it, or choose another folder."
                )
            if jax.process_index() == 0:
                self._describe(described, config)
            self._open_metrics(folder, 0)
            if self.ledger is not None:
                self.ledger.open(folder, 0, 0)
            return 0
        if described.exists():
            old = json.loads(described.read_text(encoding="utf-8"))["config"]
            changed = record.differences(old, config)
            if changed:
                raise ValueError(
                    f"a resumed run must have the settings that it began with; in {folder} these differ:\n  "
                    + "\n  ".join(changed)
                    + "\nRestore them, or begin anew in another folder."
                )
        elif jax.process_index() == 0:
            self._describe(described, config)
        step = 0
        if resume is not True:
            step = self._restore(resume)
        elif known:
            step = self._newest_whole(known)
        if self.ledger is not None:
            self.ledger.open(folder, step, known[-1] if known else 0)
        self._open_metrics(folder, step)
        for number, why in self.skipped:
            self._write({"step": step, "event": "skipped", "skipped": number, "why": why})
        return step

    def _newest_whole(self, known: list[int]) -> int:
        """Restore the newest checkpoint that can be read; those that cannot are noted and skipped."""
        for step in reversed(known[1:]):
            try:
                return self._restore(step)
            except CheckpointError as error:
                self.skipped.append((step, str(error)))
        return self._restore(known[0])

    def _open_metrics(self, folder: Path, step: int) -> None:
        self.metrics = record.Metrics(folder / "metrics.jsonl" if jax.process_index() == 0 else None, step)

    def _restore(self, step: int) -> int:
        tree, facts = self.checkpoints.restore(self._tree(), step)
        self.state, self.good, self.facts = tree["state"], tree["good"], _Facts(**facts)
        self.checkpoints.drop_after(step)
        best = self.facts.best
        if best is not None:
            self.checkpoints.best = int(best["step"])
            if self.settings.keep == "best":
                self.best_state = self.state if best["step"] == step else self._best_of(int(best["step"]))
        return step

    def _best_of(self, step: int) -> TrainState:
        return self.checkpoints.restore(self._tree(), step)[0]["state"]

    def _tree(self) -> dict[str, Any]:
        return {"state": self.state, "good": self.good}

    @contextlib.contextmanager
    def _signals(self):
        """Turn Ctrl-C and SIGTERM into a request that is answered between two steps; a second Ctrl-C breaks off."""
        if self.checkpoints is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number, frame):
            if self.stop_asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_asked, self.preempted = True, number == signal.SIGTERM

        # Several processes must stop at one step: there jax listens to SIGTERM, and `parallel.preempted` tells.
        listened = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
        before = {number: signal.signal(number, ask) for number in listened}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------------------------------------------------- the loop

    def _train(self, start: int) -> None:
        given = self.settings
        process = (jax.process_index(), jax.process_count())
        if given.private is not None:
            sampled = purpose(self.key, "sampling")
            stream = given.private.batches(self.data, sampled, start=start, process=process, workers=self.workers)
        else:
            seed = int(jax.random.bits(purpose(self.key, "order"), dtype=jnp.uint32))
            first = start // given.replays
            read = {"start": first, "process": process, "workers": self.workers}
            stream = data_room.batches(self.data, given.batch_size, seed=seed, **read)
        batch, done = None, start
        self.clock = time.perf_counter()
        with contextlib.closing(stream):
            while done < given.steps and not self.facts.stopped:
                if batch is None or done % given.replays == 0:
                    asked = time.perf_counter()
                    batch = next(stream)
                    self.waited += time.perf_counter() - asked
                self.state, metrics = self.compiled(self.state, batch)
                self.pending.append(metrics)
                done += 1
                self._after(done)
                if self.checkpoints is not None and parallel.preempted(done):
                    self.stop_asked = self.preempted = True
                if self.stop_asked:
                    self._save(done)
                    self.checkpoints.wait()
                    folder: Any = given.checkpoint
                    raise Interrupted(done, folder, self.preempted)

    def _after(self, done: int) -> None:
        """Report, judge and save where it is time to."""
        given, last = self.settings, done == self.settings.steps
        if last or done % given.log_every == 0:
            self._report(done)
        if given.collapse is not None and done % given.collapse.every == 0:
            self._watch(done)
        improved = False
        if given.validation is not None and (last or done % given.validate_every == 0 or self.facts.stopped):
            improved = self._validate(done)
        if self.ledger is not None and (last or done % given.save_every == 0):
            self._write({"step": done, "event": "privacy", **spent_line(self.ledger.facts(done))})
        if self.checkpoints is not None and (last or improved or done % given.save_every == 0 or self.facts.stopped):
            self._save(done, best=improved)

    def _gather(self, done: int) -> None:
        """Fetch what the device has reported, and refuse to go on with a loss that is not finite."""
        self.facts.window += [{k: float(v) for k, v in m.items()} for m in jax.device_get(self.pending)]
        self.pending = []
        if self.facts.window and not math.isfinite(self.facts.window[-1]["loss"]):
            bad = next(i for i, m in enumerate(self.facts.window) if not math.isfinite(m["loss"]))
            first = done - len(self.facts.window) + bad + 1
            raise FloatingPointError(
                f"the loss must stay finite; at step {first} it became {self.facts.window[bad]['loss']}. "
                "Lower the learning rate, clip gradients (optax.clip_by_global_norm), or use float32."
            )

    def _report(self, done: int) -> None:
        self._gather(done)
        window, self.facts.window = self.facts.window, []
        if not window:
            return
        now = time.perf_counter()
        means = {name: math.fsum(m[name] for m in window) / len(window) for name in window[0]}
        seconds, self.clock = now - self.clock, now
        waiting, self.waited = self.waited, 0.0  # for rows, in these seconds
        self._write({"step": done, "event": "train", **means, "seconds": seconds, "waiting": waiting})

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self.metrics.write(line)
        except OSError as error:
            raise CheckpointError(
                f"writing metrics.jsonl in {self.settings.checkpoint} failed: {error}. Is the disk full, over quota "
                "or read-only? Checkpoints already committed are intact: free some space and resume."
            ) from error
        try:
            for callback in self.settings.callbacks:
                callback(line["step"], self.state, line)
        except KeyboardInterrupt:
            if self.checkpoints is None:
                raise
            self.stop_asked = True  # answered at the end of the step

    def _judge(self, attack: Attack, batches: list, *, average: bool) -> dict[str, float]:
        """Clean and robust accuracy on fixed batches with fixed keys."""
        average = average and self.state.ema is not None
        judged = Judged(self.state.ema if average else self.state.params, self.state.state, self.judged_key)
        counts = jax.device_get([self.judges[attack](judged, batch)[1] for batch in batches])
        total = sum(int(c["count"]) for c in counts)
        return {name: sum(int(c[name]) for c in counts) / total for name in ("clean", "robust")}

    def _validate(self, done: int) -> bool:
        """Judge the weights; tells whether they are the best so far (the first of equals is)."""
        attack: Any = self.settings.attack
        found = self._judge(attack, self.validation, average=True)
        best = self.facts.best
        improved = best is None or found["robust"] > best["robust"]
        if improved:
            self.facts.best = {"step": done, **found}
            if self.settings.keep == "best":
                self.best_state = copy(self.state)
        self._write({"step": done, "event": "validation", **found, "best": improved})
        return improved

    # --------------------------------------------------------------------------------------- collapse, saving, ending

    def _mark_good(self) -> None:
        """Keep the weights to return to; with action 'warn' nobody returns."""
        if self.settings.collapse.action != "warn":
            self.good = copy(self.state)

    def _watch(self, done: int) -> None:
        watch, before = self.settings.collapse, self.facts.reference
        now = self._judge(watch.attack, self.watched, average=False)["robust"]
        tripped = before is not None and co_detector(before, now, watch.threshold)
        self._write({"step": done, "event": "check", "robust": now, "collapsed": tripped})
        if not tripped or watch.action == "warn":
            self.facts.reference = now
            self._mark_good()
            return
        self._write({"step": done, "event": "collapse", "before": before, "robust": now, "action": watch.action})
        back = copy(self.good)
        if watch.action == "stop":
            self.facts.stopped, self.state = True, back
        else:  # later keys, data and rates: the same steps are not taken again
            self.state = back._replace(step=self.state.step)

    def _save(self, done: int, *, best: bool = False) -> None:
        self._gather(done)
        if self.ledger is not None:
            self.facts.privacy = self.ledger.facts(done, self.settings.checkpoint)
        self.checkpoints.save(done, self._tree(), dataclasses.asdict(self.facts), best=best)

    def _result(self) -> TrainState:
        if self.settings.keep == "best" and self.best_state is not None:
            return self.best_state
        return self.state
