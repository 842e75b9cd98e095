"""MODEL and DATA of the command line: from a word to a model and to examples.

What lives here: `load_model` (run folder, `.safetensors`, `package.module:callable`), `load_data` (known name or
`.npz`), the check that the two fit, and the threat. What does not: file formats (rooms `models` and `data`).
"""

import difflib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxadv import continuous, data, models
from jaxadv.cli.configs import PUBLISHED_EPS
from jaxadv.cli.errors import UsageError
from jaxadv.cli.parsing import fraction
from jaxadv.core import Model, Threat, Trainable, check
from jaxadv.threats import THREATS

WEIGHTS = "model.safetensors"
"""Name of the exported weights in a run folder."""

NETS = models.NETS | continuous.NETS | continuous.ZEROSNETS
"""Name of a network to its class, of all rooms that have networks."""

_FORMS = "a run folder, a .safetensors file, or package.module:callable that returns a model"


class Loaded(NamedTuple):
    """A model as the command line knows it.

    Attributes:
      model: logits from a batch.
      name: what to call it.
      shape: shape of one example it takes, or None if unknown.
      classes: number of classes, or None if unknown.
      run: the configuration of its run (config.json), empty for other models.
    """

    model: Model
    name: str
    shape: tuple[int, ...] | None
    classes: int | None
    run: dict[str, Any]


def load_model(text: str) -> Loaded:
    """Return the model that MODEL names.

    Args:
      text: a run folder, a `.safetensors` file, or `package.module:callable`.

    Returns:
      The model with what is known about it.

    Raises:
      UsageError: if it is none of these or cannot be loaded.
    """
    path = Path(text)
    if path.is_dir():
        return _from_run(path)
    if path.suffix == ".safetensors":
        return _from_file(path, path.stem if path.name != WEIGHTS else path.resolve().parent.name, {})
    if path.suffix == ".onnx":
        raise UsageError(
            f"MODEL must be {_FORMS}; got {text}. ONNX files cannot be read by this version: rebuild the "
            f"network in JAX and return "
            "it from a function (module:function), or load its weights with jaxadv.models.from_torch_arrays."
        )
    if ":" in text and not path.exists():
        return _from_callable(text)
    what = "a file of another kind" if path.exists() else "nothing of that name"
    raise UsageError(
        f"MODEL must be {_FORMS}; got {text!r}, which is {what}. Check the path, or train one: jaxadv train "
        f"--out {text}"
    )


def _from_run(folder: Path) -> Loaded:
    file = folder / WEIGHTS
    if not file.is_file():
        begun = (folder / "config.json").is_file()
        fix = (
            f"The run was interrupted; finish it: jaxadv train --out {folder} --resume"
            if begun
            else "Is it a run folder?"
        )
        raise UsageError(f"MODEL must be a run folder with {WEIGHTS}; got {folder}, which has none. {fix}")
    run: dict[str, Any] = {}
    try:
        run = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass  # weights alone are enough; the data set must then be named
    return _from_file(file, folder.resolve().name, run if isinstance(run, dict) else {})


def _from_file(file: Path, name: str, run: dict[str, Any]) -> Loaded:
    trainable, spec = models.load(file, nets=NETS)
    made = continuous.ode_model if spec["name"] in continuous.NETS else models.model
    return Loaded(made(trainable), name, tuple(spec["shape"]), int(spec["classes"]), run)


def _from_callable(text: str) -> Loaded:
    where, _, attribute = text.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:  # a console script does not look into the current folder by itself
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(where)
    except ImportError as error:
        raise UsageError(
            f"MODEL must be {_FORMS}; got {text!r}, and importing {where!r} failed: {error}. "
            "Run from the folder that holds it, or install it."
        ) from error
    except Exception as error:
        raise UsageError(f"importing {where!r} for MODEL {text!r} failed: {_brief(error)}") from error
    finally:
        if added:
            sys.path.remove(here)
    make: Any = module
    for part in attribute.split("."):
        if not hasattr(make, part):
            near = difflib.get_close_matches(part, [n for n in dir(make) if not n.startswith("_")], n=3)
            offer = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(f"MODEL {text!r} must name something in {where}; it has no {part!r}.{offer}")
        make = getattr(make, part)
    made = make
    if not isinstance(make, (Model, Trainable)):
        if not callable(make):
            raise UsageError(
                f"MODEL {text!r} must be a callable that returns a model; got {type(make).__name__}. Write a function."
            )
        try:
            made = make()
        except Exception as error:
            hint = " It is called without arguments; is it the model itself? Then write a function that returns it."
            raise UsageError(
                f"calling {text} failed: {_brief(error)}.{hint if isinstance(error, TypeError) else ''}"
            ) from error
    return Loaded(_as_model(made, text), attribute, None, None, {})


def _as_model(made: Any, text: str) -> Model:
    if isinstance(made, Trainable):
        return models.model(made)
    if isinstance(made, Model):
        return made
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Trainable):
        return models.model(made[0])  # what models.load returns
    if type(made).__module__.split(".")[0] == "equinox" or hasattr(made, "__equinox_module__"):
        return models.from_equinox(made)
    if any(c.__module__.startswith("flax.nnx") for c in type(made).__mro__):
        return models.from_nnx(made)
    if callable(made):
        return Model(made)
    raise UsageError(
        f"{text} must return a model: a function of a batch, a jaxadv Trainable, or an nnx module; got "
        f"{type(made).__name__}. "
        "Wrap it: return jaxadv.models.pure(apply, params)."
    )


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def load_data(name: str, split: str, root: Path | None, n: int | None = None) -> data.Source:
    """Return the examples that DATA names.

    Args:
      name: a known data set or an `.npz` file with `x` and `y`.
      split: which part; an `.npz` file is one part and is taken whole as 'test'.
      root: folder of real data, or None to ask the environment.
      n: a fixed, class-balanced choice of so many; None or more than there are: all.

    Returns:
      The source.

    Raises:
      UsageError: if `n` is not positive.
      ValueError: if the name is unknown or the file malformed.
      FileNotFoundError: if the files are not there.
    """
    if n is not None and n < 1:
        raise UsageError(f"n must be a positive number of examples; got {n}.")
    if root is not None and not root.is_dir():
        raise UsageError(
            f"--data-root must be a folder; got {root}, which is none. Check the path, or use --data digits."
        )
    try:
        source = data.load(name, split, root)
    except ValueError as error:
        if name.endswith(".npz") and "bounds" in str(error):  # Python's way to say it is an argument
            raise UsageError(
                f"{error} In an .npz file: add an array bounds of two numbers, lowest and highest."
            ) from error
        raise
    except FileNotFoundError as error:
        if name.endswith(".npz"):
            raise
        text = str(error).replace("or pass --data on the command line", "or pass --data-root on the command line")
        raise FileNotFoundError(text) from error
    return source if n is None or n >= len(source) else data.evaluation_subset(source, n)


def data_name(given: str | None, loaded: Loaded) -> str:
    """Return the data set to use: the given one, else the one that a run folder was trained on.

    Args:
      given: of `--data`, or None.
      loaded: the model.

    Returns:
      The name.

    Raises:
      UsageError: if neither is known.
    """
    name = given or (loaded.run.get("arguments") or {}).get("data")
    if not name:
        raise UsageError(
            f"--data must name a data set or an .npz file for the model {loaded.name!r}; got none, and the "
            f"model does not say what it "
            "was trained on. E.g. --data digits"
        )
    return str(name)


def fits(loaded: Loaded, source: data.Source) -> None:
    """Refuse examples that the model does not take, before anything is computed on all of them.

    Args:
      loaded: the model.
      source: the examples.

    Raises:
      UsageError: on another shape (an exchanged channel axis is named), another number of classes, a failing "
      "model, or outputs that
        are not logits.
    """
    if loaded.shape is not None and loaded.shape != source.shape:
        swapped = len(source.shape) == 3 and (*source.shape[1:], source.shape[0]) == loaded.shape
        fix = (
            "channels-first? Save x.transpose(0, 2, 3, 1)"
            if swapped
            else "Is this the data set that the model was trained on?"
        )
        raise UsageError(
            f"x must have shape [n, {', '.join(map(str, loaded.shape))}] for the model {loaded.name!r} "
            f"(channels last); "
            f"got [n, {', '.join(map(str, source.shape))}]. {fix}"
        )
    x = source[:2]["x"]
    try:
        out = jax.eval_shape(loaded.model, jax.ShapeDtypeStruct(x.shape, np.float32))
    except Exception as error:
        raise UsageError(
            f"the model {loaded.name!r} must take a batch of x, float32{list(x.shape)} (channels last); it "
            f"failed with {_brief(error)}. "
            "Channels-first? Transpose x, or the input inside the model."
        ) from error
    check.logits(out, len(x))
    classes = out.shape[-1]
    if loaded.classes is not None and classes != loaded.classes:
        raise UsageError(
            f"the model {loaded.name!r} must return {loaded.classes} logits by its spec; got {classes}. Save it again."
        )
    if int(source.y.max()) >= classes or (classes != source.classes and not _custom(source)):
        raise UsageError(
            f"y must lie in [0, {classes}) for the model {loaded.name!r} with {classes} classes; got "
            f"{source.classes} classes in "
            f"{source.name!r}, the largest label is {int(source.y.max())}. Labels that start at 1, or another "
            f"data set than the model was "
            "trained on?"
        )


def _custom(source: data.Source) -> bool:
    """Whether the number of classes was only guessed from the labels present."""
    return not source.class_names


def budgets(given: tuple[str, ...], norm: str, source_name: str, loaded: Loaded) -> tuple[float, ...]:
    """Return the budgets to evaluate, in the order given.

    Args:
      given: numbers or fractions as text; empty for the default.
      norm: name of the threat.
      source_name: name of the data set.
      loaded: the model; a run on this data set says what linf budget it was trained with.

    Returns:
      The numbers given; else the run's; else the published one.

    Raises:
      UsageError: if none is known, or one is neither number nor fraction.
    """
    check.choice("threat", norm, THREATS)
    if given:
        return tuple(fraction(text) for text in given)
    arguments = loaded.run.get("arguments") or {}
    if norm == "linf" and arguments.get("eps") is not None and arguments.get("data") == source_name:
        return (fraction(arguments["eps"]),)
    if (source_name, norm) not in PUBLISHED_EPS:
        raise UsageError(
            f"--eps must be given for {norm} on {source_name!r}, for which none is published; got none. E.g. "
            f"--eps 8/255"
        )
    return (fraction(PUBLISHED_EPS[source_name, norm]),)


def threat(norm: str, eps: float, source: data.Source) -> Threat:
    """Return the threat with the bounds of the data.

    Args:
      norm: name of the threat.
      eps: the budget.
      source: the examples.

    Returns:
      The threat.

    Raises:
      ValueError: if the name is unknown, or `eps` is not finite and positive.
    """
    return check.choice("threat", norm, THREATS)(eps, source.bounds)


def target_rule(text: str | None, classes: int) -> str | int | None:
    """Read `--targeted`.

    Args:
      text: a rule, the number of a class, or None.
      classes: number of classes.

    Returns:
      The rule, the class, or None.

    Raises:
      UsageError: if it is neither a rule nor a class.
    """
    rules = ("next", "random", "least_likely")
    if text is None or text in rules:
        return text
    if text.isdigit() and int(text) < classes:
        return int(text)
    raise UsageError(f"--targeted must be {', '.join(rules)} or a class from 0 to {classes - 1}; got {text!r}.")
