"""The commands that train: `train` (one run folder, interruptible) and `demo` (two networks on digits, compared).

What lives here: run folders, what is logged and printed, how a recipe becomes a run. What does not: any training (room
`train`).

A run folder holds `config.json` (arguments, versions, seed, device, revision), `run.json` and `checkpoints/` (by which
a resumed run is checked and continued), `metrics.jsonl`, `train.log` (what happened when) and, once finished,
`model.safetensors`.
"""

import inspect
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxadv import data as data_room
from jaxadv import evaluate, models, parallel, train
from jaxadv.cli import files, sources
from jaxadv.cli.commands import exit_code, show_flags, show_models
from jaxadv.cli.configs import Demo, Train
from jaxadv.cli.errors import INTERRUPTED, OK, Stopped, UsageError
from jaxadv.cli.parsing import fraction, plain, setting
from jaxadv.cli.privacy import secret_key, spent_words
from jaxadv.cli.progress import Progress, note, say
from jaxadv.core import check
from jaxadv.evaluate.engine import evaluate as measure
from jaxadv.train.imagenet_recipes import IMAGENET_MEAN, IMAGENET_STD
from jaxadv.train.private_recipes import DP_MEAN, DP_STD

DATA_OF = {"mnist": "mnist", "digits": "digits", "cifar10": "cifar10_jpeg", "imagenet": "tfds:imagenet"}
"""Word of a recipe's name to the data set it is made for."""

_CIFAR10 = {"mean": train.recipes.CIFAR10_MEAN, "std": train.recipes.CIFAR10_STD}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("standard_mnist", "fast_mnist", "pgd_mnist"), ("cnn_small", {})),
    **dict.fromkeys(("standard_digits", "fast_digits", "pgd_digits"), ("cnn_small", {})),
    "fast_cifar10": ("preact_resnet18", {**_CIFAR10, "shortcut": "raw", "width": 64}),
    "pgd_cifar10": ("preact_resnet18", {**_CIFAR10, "shortcut": "preact", "width": 64}),
    "trades_cifar10_wrn28_10": ("wide_resnet", {**_CIFAR10, "depth": 28, "width": 10, "activation": "silu"}),
    "pgd_imagenet": ("resnet50", {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "width": 64, "depths": (3, 4, 6, 3)}),
    "dp_mnist": ("cnn_small", {}),
    "dp_cifar10_wrn16_4": (
        "wide_resnet_private",
        {
            "mean": DP_MEAN,
            "std": DP_STD,
            "depth": 16,
            "width": 4,
        },
    ),
    "odenet_mnist": ("odenet_mnist", {}),
    "tisode_mnist": ("odenet_tis", train.recipes.TIS_OPTIONS),
    "ltnode_mnist": ("lt_node", {}),
    "altnode_mnist": ("lt_node", {"encoder": True}),
    "sodef_mnist": ("sodef", {}),
    "lyanet_mnist": ("lyanet", {}),
    "sonet_cifar10": ("sonet", {**_CIFAR10, "channels": 64}),
    "zerosnet_cifar10": ("zerosnet", {**_CIFAR10, "widths": (16, 32, 64)}),
}
"""Recipe to its network and options: what is written beside the weights so that they can be loaded alone."""


_FLAGS = (
    "epochs", "batch_size", "keep", "validate_every", "save_every", "precision", "eps", "epsilon", "delta", "devices",
    "how", "seed", "resume", "data",
)  # fmt: skip
_BUILT = frozenset(
    ("key", "trainable", "objective", "optimizer", "validation", "attack", "collapse", "augment", "gradient")
    + ("private", "mesh", "layout", "checkpoint", "callbacks", "log_every", "steps", "net")
)
"""Arguments of training that no words can give."""


def data_of(recipe: str) -> str:
    """Return the data set that a recipe is made for.

    Args:
      recipe: its name.

    Returns:
      The name of the data set.
    """
    return next(DATA_OF[word] for word in recipe.split("_") if word in DATA_OF)


class Log:
    """A file of dated lines about a run."""

    def __init__(self, path: Path):
        """Open the file for appending.

        Args:
          path: the file.
        """
        self.path = path

    def __call__(self, text: str) -> None:
        """Append a line."""
        if not files.lead():
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def follow(progress: Progress, stage: str, steps: int, log: Callable[[str], Any]) -> Callable:
    """Return a callback of `fit` that draws progress and logs what matters.

    Args:
      progress: the display.
      stage: what to call the run.
      steps: its number of steps.
      log: takes lines.

    Returns:
      `callback(step, state, metrics)`.
    """

    def callback(step: int, state: Any, metrics: dict[str, Any]) -> None:
        del state
        event = metrics["event"]
        share = {name: f"{100 * metrics[name]:.1f} %" for name in ("clean", "robust") if metrics.get(name) is not None}
        words = ", ".join(f"{name} {value}" for name, value in share.items())
        if event == "train":
            idle = metrics["waiting"] / max(metrics["seconds"], 1e-9)
            slow = f"; {100 * idle:.0f} % of the time went into waiting for data" if idle > 0.5 else ""
            progress(step, steps, stage, f"loss {metrics['loss']:.3f}, {words}{slow}")
        elif event == "validation":
            log(f"step {step}: validation {words}{' (best so far)' if metrics['best'] else ''}")
        elif event == "collapse":
            text = f"step {step}: catastrophic overfitting, robust accuracy on training data fell from "
            f"{metrics['before']:.3f} to "
            log(f"{text}{metrics['robust']:.3f}; action: {metrics['action']}")
            note(f"{stage}: {text}{metrics['robust']:.3f}")
        elif event == "skipped":
            log(metrics["why"])
            note(f"{stage}: {metrics['why']} Going on from step {step}.")
        elif event == "check" and metrics["collapsed"]:
            log(
                f"step {step}: catastrophic overfitting: robust accuracy on training data fell to "
                f"{metrics['robust']:.3f}"
            )

    return callback


def _parameters(function: Any) -> set[str]:
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds} - {"self"}


def _recipe(
    name: str, source: Any, seed: int, given: dict[str, Any], more: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of `fit` and the spec of the network; `more` came by --set, for any of the three."""
    net, options = check.choice("recipe with a network known here", name, NETWORKS)
    more, recipe = dict(more or {}), train.recipe(name)
    if "net" in more:
        net = more.pop("net")
        valid = _parameters(check.choice("network", net, sources.NETS).__init__)
        options = {key: value for key, value in options.items() if key in valid}
    layers = _parameters(sources.NETS[net].__init__) - {"shape", "classes", "rngs"}
    others = (_parameters(recipe) | _parameters(train.fit)) - _BUILT - set(_FLAGS)
    for key in more:
        if key in _FLAGS:
            raise UsageError(f"--set must not hold {key}, which has an option of its own: --{key.replace('_', '-')}.")
        check.choice(f"setting of {name}, of {net} or of training", key, layers | others)
    options |= {key: value for key, value in more.items() if key in layers}
    spec = models.make_spec(net, shape=source.shape, classes=source.classes, nets=sources.NETS, **options)
    trainable = models.from_spec(spec, jax.random.key(seed), nets=sources.NETS)
    given = given | {key: value for key, value in more.items() if key in others}
    unsure = [key for key in more if key in _parameters(recipe) and key not in layers]
    if unsure:  # whatever the recipe makes of them must be the network that is written beside the weights
        own = recipe(source, seed=seed, **given)["trainable"]
        if jax.tree.structure(own) != jax.tree.structure(trainable):
            raise UsageError(
                f"--set must change the network by options of {net} ({', '.join(sorted(layers))}), because they are "
                f"written beside its weights; got {', '.join(unsure)}."
            )
    return recipe(source, seed=seed, trainable=trainable, **given), spec


# ---------------------------------------------------------------------------------------------------------------- train


def run_train(config: Train) -> int:
    """Train by a recipe into a run folder.

    Args:
      config: the arguments.

    Returns:
      The exit code.

    Raises:
      UsageError: on arguments that cannot be used.
      Stopped: after an interruption.
    """
    check.choice("recipe", config.recipe, train.RECIPES)
    name = config.data or data_of(config.recipe)
    _positive(config)
    given = _given(config)
    if not config.resume and config.out.is_dir() and any(config.out.iterdir()):
        begun = (config.out / "config.json").exists()
        fix = f"Continue it with: {resume_command(config.out)}" if begun else "Choose another folder, or empty it."
        raise UsageError(
            f"--out must be a new or empty folder; got {config.out}, which holds {'a run' if begun else 'files'}. {fix}"
        )
    parallel.agree(True)  # all have looked at --out before one of them writes there
    source = sources.load_data(name, "train", config.data_root)
    given["validation"] = sources.load_data(name, "validation", config.data_root)
    more = dict(setting(text) for text in config.set)
    if isinstance(more.get("extra"), str):
        more["extra"] = sources.load_data(more["extra"], "train", config.data_root)
    arguments, spec = _recipe(config.recipe, source, config.seed, given, more)
    files.writable(config.out)
    log = Log(config.out / "train.log")
    if not config.resume:
        root = data_room.root(config.data_root)
        stored = plain(config) | {"data": str(Path(name).resolve()) if name.endswith(".npz") else name, "resume": False}
        stored |= {"data_root": str(root.resolve()) if root else None}
        run = {"arguments": stored, "network": spec, "steps": arguments["steps"], "batch_size": arguments["batch_size"]}
        files.write_run(
            config.out,
            "train",
            config,
            **run,
            data={"name": source.name, "fingerprint": source.fingerprint, "n": len(source)},
        )
    steps = arguments["steps"]
    log(
        f"{'resumed' if config.resume else 'started'}: recipe {config.recipe} on {name}, {steps} steps of "
        f"{arguments['batch_size']}"
    )
    note(
        f"{config.recipe} on {name}: {steps} steps of {arguments['batch_size']}. If interrupted: "
        f"{resume_command(config.out)}"
    )
    arguments |= {"checkpoint": config.out, "resume": config.resume, "log_every": max(1, min(50, steps // 20))}
    arguments |= {
        "how": config.how,
        "mesh": mesh_of(config.devices),
        "layout": parallel.fsdp() if config.fsdp else None,
    }
    began = time.perf_counter()
    try:
        with Progress() as progress:
            arguments["callbacks"] = (follow(progress, "train", steps, log),)
            private = arguments.get("private") is not None
            key = secret_key(config.out) if private else jax.random.key(config.seed)
            state = train.fit(key, **arguments)
    except train.Interrupted as stop:
        log(f"interrupted at step {stop.step}, saved")
        raise Stopped(
            f"interrupted at step {stop.step} of {steps}; saved in {config.out}. Resume "
            f"with:\n{resume_command(config.out)}",
            OK if stop.preempted else INTERRUPTED,
        ) from None
    except KeyboardInterrupt:
        log("interrupted")
        raise Stopped(
            f"interrupted; what was saved before is in {config.out}. Resume with:\n{resume_command(config.out)}"
        ) from None
    _finish(config, arguments, state, spec, steps, time.perf_counter() - began, log)
    return 0


def _finish(
    config: Train, arguments: dict[str, Any], state: Any, spec: dict[str, Any], steps: int, seconds: float, log: Log
) -> None:
    """Export the weights and say which they are."""
    weights = config.out / sources.WEIGHTS
    trained = train.trained(arguments["trainable"], state)
    trained = trained._replace(params=parallel.whole(trained.params), state=parallel.whole(trained.state))
    if not files.lead():
        return
    models.save(weights, trained, spec, nets=sources.NETS)
    step, best = int(state.step), arguments.get("keep", "last") == "best"
    which = (
        f"the best by robust accuracy on validation data, step {step}" if best else f"those of the last step, {step}"
    )
    seen = [m for m in train.read_metrics(config.out / "metrics.jsonl") if m.get("event") == "validation"]
    mine = next((m for m in reversed(seen) if m["step"] == step), seen[-1] if seen else None)
    log(f"finished: {weights.name} holds the weights: {which}")
    say(f"{weights}: {which} of {steps}; {seconds:.0f} s.")
    if arguments.get("private") is not None:
        say(spent_words(config.out))
    if mine is not None:
        say(
            f"Validation (step {mine['step']}): clean {100 * mine['clean']:.1f} %, robust "
            f"{100 * mine['robust']:.1f} % under a short attack."
        )
    say(
        f"Measure it properly: jaxadv evaluate {shlex.quote(str(config.out))} --out "
        f"{shlex.quote(str(config.out / 'evaluation'))}"
    )


def mesh_of(devices: int | None) -> Any:
    """Return the devices to train on.

    Args:
      devices: how many, of all processes; None is one, or with several processes all.

    Returns:
      A mesh, or None for one device.
    """
    if devices is None:
        return None if jax.process_count() == 1 else parallel.make_mesh()
    return parallel.make_mesh(devices)


def resume_command(out: Path) -> str:
    """Return the command that continues a run.

    Args:
      out: the run folder.

    Returns:
      The command, quoted for a shell.
    """
    return f"jaxadv train --out {shlex.quote(str(out))} --resume"


def _positive(config: Any) -> None:
    for name in ("epochs", "batch_size", "validate_every", "save_every", "n"):
        value = getattr(config, name, None)
        if value is not None:
            check.whole(name, value)


def _given(config: Train) -> dict[str, Any]:
    """What was given beside the recipe, in the words of `fit`."""
    names = ("epochs", "batch_size", "keep", "validate_every", "save_every", "precision")
    given: dict[str, Any] = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.eps is not None:
        eps = fraction(config.eps)
        check.positive("eps", eps, "It is in the units of x, e.g. 0.3 or 8/255.")
        given["eps"] = eps
    spends = {name: fraction(getattr(config, name), name) for name in ("epsilon", "delta") if getattr(config, name)}
    valid = inspect.signature(train.recipe(config.recipe)).parameters
    for name in spends:
        if name not in valid:
            private = [known for known in train.RECIPES if known.startswith("dp_")]
            raise UsageError(f"--{name} needs a private recipe ({', '.join(private)}); got {config.recipe}.")
    if config.devices is not None and "devices" in valid:
        given["devices"] = config.devices
    return given | spends


# ----------------------------------------------------------------------------------------------------------------- demo


def run_demo(config: Demo) -> int:
    """Train two networks on the digits, one of them robustly, attack both and write a report.

    Args:
      config: the arguments.

    Returns:
      The exit code.

    Raises:
      UsageError: on arguments that cannot be used.
    """
    if jax.process_count() > 1:
        raise UsageError("--distributed must be 'off' for demo, which runs in one process. Use train and evaluate.")
    _positive(config)
    eps = fraction(config.eps)
    test = sources.load_data("digits", "test", None, config.n)
    threat = sources.threat("linf", eps, test)
    files.writable(config.out)
    began = time.perf_counter()
    mesh = None if config.devices is None else parallel.make_mesh(config.devices)
    parts = (("standard", "standard_digits", "standard training"), ("robust", "pgd_digits", "adversarial training"))
    key, reports = jax.random.key(config.seed), []
    x, y = test.all()
    with Progress() as progress:
        for folder, recipe, title in parts:
            model = _demo_train(config, config.out / folder, recipe, title, eps, mesh, progress)

            def tell(done: int, total: int, words: str, title: str = title) -> None:
                progress(done, total, f"attack ({title})", words)

            curve = sorted({*(math.ldexp(round(eps * f * 2**20), -20) for f in (1 / 3, 2 / 3, 4 / 3)), eps})
            reports.append(
                measure(
                    key,
                    model,
                    x,
                    y,
                    threat,
                    attacks="gradient",
                    name=title,
                    index=test.index,
                    data=test,
                    seed=config.seed,
                    eps_curve=curve,
                    progress=tell,
                )
            )
    report = evaluate.merge(*reports)
    report.save(config.out)
    say(
        f"Two networks of one architecture (cnn_small), {len(data_room.load('digits', 'train'))} training images, "
        f"{len(test)} test images that neither has seen."
    )
    show_models(report)
    show_flags(report)
    out = shlex.quote(str(config.out))
    say(
        f"Robust accuracy counts the test images that no attack of the protocol broke within linf {eps:g}: an "
        f"upper bound; "
        "intervals are 95 % (Clopper-Pearson)."
    )
    say(f"Report: {config.out / 'report.html'} (and report.json, report.md), {time.perf_counter() - began:.0f} s.")
    say(f"Go on: jaxadv attack {shlex.quote(str(config.out / 'robust'))} --eps 0.2   or   jaxadv report {out}")
    return exit_code(report)


def _demo_train(config: Demo, folder: Path, recipe: str, title: str, eps: float, mesh: Any, progress: Progress) -> Any:
    """Train one network of the demo, export it, and return the model."""
    given: dict[str, Any] = {"eps": eps, "validation": data_room.load("digits", "validation")}
    if config.epochs is not None:
        given["epochs"] = config.epochs
    arguments, spec = _recipe(recipe, data_room.load("digits", "train"), config.seed, given)
    files.writable(folder)
    stage, steps = f"train ({title})", arguments["steps"]
    arguments |= {"mesh": mesh, "log_every": max(1, min(50, steps // 20))}
    state = train.fit(
        jax.random.key(config.seed), callbacks=(follow(progress, stage, steps, lambda text: None),), **arguments
    )
    trained = train.trained(arguments["trainable"], jax.device_get(state))
    models.save(folder / sources.WEIGHTS, trained, spec)
    stored = {"recipe": recipe, "data": "digits", "eps": config.eps, "epochs": config.epochs, "seed": config.seed}
    files.write_run(
        folder, "demo", config, arguments=stored, network=spec, steps=steps, batch_size=arguments["batch_size"]
    )
    return models.model(trained)
