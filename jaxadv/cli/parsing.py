"""From words to configurations: the command line (tyro), YAML files, fractions.

What lives here: `parse` (argv to a command's dataclass), the YAML form of a dataclass in and out, numbers written
as fractions. What does not: the dataclasses (`configs.py`) and what is done with them.

Precedence: the command line over `--config` (or, with `train --resume`, the stored arguments of the run) over the
defaults. A file may leave arguments out. Options that may be given several times (`--eps`) replace the file's
values, they do not add to them.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import operator
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
import yaml

from jaxadv.cli.configs import COMMANDS, Common, Train
from jaxadv.cli.errors import UsageError

ABOUT = """Attack, train and evaluate classifiers in JAX. Start with: jaxadv demo --out demo

Exit codes: 0 fine, 1 the evaluation has a red flag of severity error, 2 bad usage or input, 3 a bug of jaxadv,
130 interrupted."""

_LOCAL = ("config", "print_config", "traceback", "distributed")  # say how to run the program, not what to do


def fraction(text: str | float, name: str = "eps") -> float:
    """Read a number or a fraction.

    Args:
      text: `0.3`, `8/255`, `1e-2`.
      name: the argument's name for the message.

    Returns:
      The number; whether it is positive and finite is the threat's question.

    Raises:
      UsageError: if it is neither.
    """
    top, slash, bottom = str(text).partition("/")
    try:
        return float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{name} must be a number or a fraction such as 8/255; got {text!r}.") from None


# --- YAML ------------------------------------------------------------------------------------------------------------


def setting(text: str) -> tuple[str, Any]:
    """Read one KEY=VALUE.

    Args:
      text: such as `width=32`, `eps=8/255`, `remat=true`, `depths=[2,2]`, `net=wide_resnet`.

    Returns:
      The key and a number, truth value, None, tuple or text.

    Raises:
      UsageError: if there is no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set must be KEY=VALUE; got {text!r}. For example --set width=32.")
    words = {"true": True, "false": False, "none": None, "null": None}
    value = value.strip()
    if value.lower() in words:
        return key.strip(), words[value.lower()]
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        top, slash, bottom = value.partition("/")
        try:
            read = float(top) / float(bottom) if slash else value
        except (ValueError, ZeroDivisionError):
            read = value
    return key.strip(), tuple(read) if isinstance(read, list) else read


def plain(config: Common) -> dict[str, Any]:
    """Return a configuration as plain values, without what only says how the program is run.

    Args:
      config: any of `configs.COMMANDS`.

    Returns:
      Argument to value; paths become text, tuples lists.
    """

    def value(v: Any) -> Any:
        return str(v) if isinstance(v, Path) else [value(e) for e in v] if isinstance(v, tuple) else v

    names = [f.name for f in dataclasses.fields(config) if f.name not in _LOCAL]
    return {name: value(getattr(config, name)) for name in names}


def to_yaml(command: str, config: Common) -> str:
    """Write a configuration as YAML.

    Args:
      command: its name.
      config: its arguments.

    Returns:
      The text; `from_yaml` reads it.
    """
    return yaml.safe_dump({"command": command, **plain(config)}, sort_keys=False, allow_unicode=True)


def from_yaml(command: str, path: Path) -> dict[str, Any]:
    """Read arguments from a YAML file.

    Args:
      command: the command they are for.
      path: the file, as `to_yaml` writes it; arguments may be left out.

    Returns:
      Argument to typed value.

    Raises:
      UsageError: if the file is missing or malformed, is for another command, or holds unknown arguments or "
      "wrong types.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"--config must be a YAML file; got {path}, which cannot be read ({error.strerror}). Check the path."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--config must be a YAML file; got {path}, which is not: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(tree, dict):
        raise UsageError(
            f"--config must hold lines `argument: value`; got {type(tree).__name__} in {path}. "
            f"Write one with: jaxadv {command} --print-config"
        )
    return typed(command, tree, str(path))


def typed(command: str, tree: dict[Any, Any], where: str) -> dict[str, Any]:
    """Check plain values against the arguments of a command.

    Args:
      command: the command.
      tree: argument to plain value; `command` may be among them.
      where: the file's name for messages.

    Returns:
      Argument to typed value.

    Raises:
      UsageError: on another command, unknown arguments or wrong types.
    """
    tree = dict(tree)
    stated = tree.pop("command", command)
    if stated != command:
        raise UsageError(
            f"{where} must be a configuration of `jaxadv {command}`; got one of `jaxadv {stated}`. Use it there."
        )
    cls = COMMANDS[command]
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.name not in _LOCAL]
    out = {}
    for key, value in tree.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=2)
            offer = f" Did you mean {' or '.join(near)}?" if near else f" Known: {', '.join(names)}."
            raise UsageError(f"{where} must hold arguments of `jaxadv {command}`; got {key!r}.{offer}")
        out[name] = _coerce(name, value, hints[name], where)
    return out


def _coerce(name: str, value: Any, hint: Any, where: str) -> Any:
    """Turn a value of a YAML file into the type of an argument."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _coerce(name, value, inner[0], where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _coerce(name, value, next(t for t in inner if t is not type(None)), where)
    if origin is tuple:
        return tuple(_coerce(name, v, inner[0], where) for v in (value if isinstance(value, list) else [value]))
    if origin is Literal:
        if value in inner:
            return value
    elif hint is bool or isinstance(value, bool):
        if hint is bool and isinstance(value, bool):
            return value
    elif hint is int and isinstance(value, int):
        return value
    elif hint is str and isinstance(value, (str, int, float)):
        return str(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    want = (
        f"one of {', '.join(map(str, inner))}"
        if origin is Literal
        else {bool: "true or false", int: "a whole number"}.get(hint, "text")
    )
    raise UsageError(f"{name} in {where} must be {want}; got {value!r}.")


def stored(out: Path) -> dict[str, Any]:
    """Return the arguments that a run folder was started with.

    Args:
      out: the run folder.

    Returns:
      Argument of `train` to typed value.

    Raises:
      UsageError: if there is nothing to resume.
    """
    file = out / "config.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        arguments = tree["arguments"]
    except OSError:
        raise UsageError(
            f"--resume needs a run that was started before; got {out}, which has no config.json. Leave out --resume."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{file} must be the configuration of a run; got something else. Damaged? Start a new run elsewhere."
        ) from None
    return typed("train", arguments, str(file)) | {"out": out, "resume": True}


# --- the command line ------------------------------------------------------------------------------------------------


def _peek(argv: Sequence[str], option: str) -> str | None:
    """Find the value of an option before the real parsing."""
    found = None
    for i, word in enumerate(argv):
        if word == option and i + 1 < len(argv):
            found = argv[i + 1]
        elif word.startswith(option + "="):
            found = word.partition("=")[2]
    return found


def parse(argv: Sequence[str]) -> tuple[str, Common]:
    """Read a command line.

    Args:
      argv: the words after the program's name.

    Returns:
      The command's name and its arguments.

    Raises:
      UsageError: if a file that the arguments name cannot be used.
      SystemExit: after printing help (0) or a complaint about the words (2), as tyro does.
    """
    command = argv[0] if argv and argv[0] in COMMANDS else None
    base: dict[str, Any] = {}
    if command is not None and not {"-h", "--help"} & set(argv):
        if (file := _peek(argv, "--config")) is not None:
            base = from_yaml(command, Path(file))
        out = _peek(argv, "--out") or base.get("out")
        if COMMANDS[command] is Train and ("--resume" in argv or base.get("resume")) and out is not None:
            base = stored(Path(out)) | base | {"resume": True}
    # A switch that the file sets and the words repeat is left to the words: tyro offers only the opposite of a default.
    base = {
        name: value for name, value in base.items() if not (value is True and f"--{name.replace('_', '-')}" in argv)
    }
    # Options that append must start empty, or they would add to the file's values.
    repeated = [name for name, value in base.items() if isinstance(value, tuple) and name != "reports"]
    held = {name: base.pop(name) for name in repeated}

    members: Any = []
    for name, cls in COMMANDS.items():
        summary = inspect.cleandoc(cls.__doc__ or "")
        if name != command:
            members.append(Annotated[cls, tyro.conf.subcommand(name, description=summary.split("\n")[0])])
        elif base:
            default: Any = _with_missing(cls, base)
            members.append(Annotated[cls, tyro.conf.subcommand(name, default=default, description=summary)])
        else:
            members.append(Annotated[cls, tyro.conf.subcommand(name, description=summary)])
    options: Any = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    config = tyro.cli(
        functools.reduce(operator.or_, members), args=list(argv), prog="jaxadv", description=ABOUT, config=options
    )  # pyright: ignore
    name = next(n for n, cls in COMMANDS.items() if cls is type(config))
    left_out = {k: v for k, v in held.items() if not getattr(config, k)}
    return name, dataclasses.replace(config, **left_out)


def _with_missing(cls: type[Common], values: dict[str, Any]) -> Common:
    """Build the defaults of a command; required arguments that are not there stay required.

    Without calling `__init__`: the mark for "missing" is no value of an argument's type.
    """
    made = object.__new__(cls)
    for f in dataclasses.fields(cls):
        bare = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        value = values.get(f.name, tyro.MISSING if bare is dataclasses.MISSING else bare)
        object.__setattr__(made, f.name, value)
    return made
