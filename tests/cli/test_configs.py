"""The dataclasses of the commands: frozen, documented, with defaults that exist."""

import dataclasses
import inspect
import typing
from pathlib import Path

import pytest

from jaxadv import data, evaluate, threats, train
from jaxadv.cli import configs
from jaxadv.cli.parsing import fraction

NEEDED = {
    "train": {"out": Path("run")},
    "evaluate": {"model": "m"},
    "attack": {"model": "m"},
    "verify-report": {"report": Path("r")},
    "data": {"action": "prepare", "raw": Path("raw"), "name": "small", "out": Path("sets")},
}


@pytest.mark.parametrize("command", configs.COMMANDS)
def test_a_command_is_a_frozen_dataclass_that_says_what_it_does(command):
    cls = configs.COMMANDS[command]
    config = cls(**NEEDED.get(command, {}))
    assert cls.__doc__.split("\n")[0].endswith(".")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.traceback = True


@pytest.mark.parametrize("command", configs.COMMANDS)
def test_every_argument_has_a_help_text_and_a_type(command):
    cls = configs.COMMANDS[command]
    for owner in cls.__mro__[:-1]:
        source = inspect.getsource(owner)
        for name in getattr(owner, "__annotations__", {}):
            lines = source.split(f"    {name}: ", 1)[1].split("\n")
            assert lines[1].strip().startswith('"""'), f"{owner.__name__}.{name} has no help text"
    assert {f.name for f in dataclasses.fields(cls)} == set(typing.get_type_hints(cls))


def test_the_commands_share_their_bases():
    for command in ("demo", "train", "evaluate", "attack", "verify-report", "privacy"):
        assert issubclass(configs.COMMANDS[command], configs.Machine)
    for command in ("report", "list", "data", "claims", "bench"):
        assert not issubclass(configs.COMMANDS[command], configs.Machine)
    names = {c.__name__ for c in configs.COMMANDS.values()} - {"Privacy"}
    assert names == {"Demo", "Train", "Evaluate", "Attack", "Report", "VerifyReport", "List", "Data", "Claims", "Bench"}
    assert all(issubclass(c, configs.Common) for c in configs.COMMANDS.values())


def test_defaults_are_things_that_exist():
    assert configs.Train(out=Path("x")).recipe in train.RECIPES
    assert configs.Attack(model="m").attack == "pgd"
    assert configs.Evaluate(model="m").norm in threats.THREATS
    assert "standard" in evaluate.PROTOCOLS
    assert set(typing.get_args(configs.Topic)) >= {"attacks", "recipes", "protocols"}


def test_published_budgets_are_numbers_of_known_data_sets_and_threats():
    for (source, norm), eps in configs.PUBLISHED_EPS.items():
        assert source in data.SOURCES and norm in threats.THREATS
        assert 0 < fraction(eps) < 10
    assert fraction(configs.PUBLISHED_EPS["cifar10_jpeg", "linf"]) == 8 / 255
    assert fraction(configs.PUBLISHED_EPS["mnist", "linf"]) == 0.3
