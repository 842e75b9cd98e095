"""Words and YAML to configurations: types, precedence, round trips, complaints."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from jaxadv.cli import configs
from jaxadv.cli.errors import UsageError
from jaxadv.cli.parsing import fraction, from_yaml, parse, plain, setting, stored, to_yaml, typed

SAMPLES = {
    "demo": ["--out", "d", "--eps", "1/8", "--epochs", "3", "--n", "50", "--seed", "7"],
    "train": [
        "--out",
        "run",
        "--recipe",
        "fast_digits",
        "--eps",
        "8/255",
        "--keep",
        "best",
        "--precision",
        "bfloat16",
        "--devices",
        "2",
    ],
    "evaluate": [
        "runs/a",
        "--data",
        "mnist",
        "--eps",
        "8/255",
        "--eps",
        "0.1",
        "--attacks",
        "pgd,fgsm",
        "--save-adv",
        "a.npz",
    ],
    "attack": [
        "mod:f",
        "--data",
        "few.npz",
        "--attack",
        "bim",
        "--steps",
        "3",
        "--step-size",
        "1/255",
        "--targeted",
        "next",
    ],
    "report": ["a.json", "b.json", "--out", "page.html"],
    "verify-report": ["out", "--model", "mod:f"],
    "privacy": [
        "calibrate",
        "--n",
        "60000",
        "--batch-size",
        "256",
        "--epsilon",
        "3",
        "--steps",
        "100",
        "--rows",
        "512",
    ],
    "list": ["recipes"],
    "data": ["prepare", "/raw", "--name", "small", "--out", "/sets", "--size", "224"],
    "claims": ["run", "fast_at", "--root", "/src", "--smoke"],
    "bench": ["run", "speed/attacks"],
}


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("0.3", 0.3), ("1e-2", 0.01), (3, 3.0), ("2/1", 2.0), ("-1/4", -0.25)]
)
def test_fractions_are_numbers(text, value):
    assert fraction(text) == value


@pytest.mark.parametrize("text", ["eight", "8/", "/255", "1/0", "1/2/3", ""])
def test_what_is_no_number_is_refused_by_name(text):
    with pytest.raises(UsageError, match=r"step_size must be a number or a fraction such as 8/255; got"):
        fraction(text, "step_size")


@pytest.mark.parametrize("command", configs.COMMANDS)
def test_the_written_configuration_reads_back_as_the_same_arguments(command, tmp_path):
    assert set(SAMPLES) == set(configs.COMMANDS)
    name, config = parse([command, *SAMPLES[command]])
    assert name == command and type(config) is configs.COMMANDS[command]
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(command, config))
    again_name, again = parse([command, "--config", str(file)])
    assert again_name == command
    assert dataclasses.replace(again, config=None) == config
    assert set(yaml.safe_load(file.read_text())) == {"command", *plain(config)}
    assert not {"config", "print_config", "traceback"} & set(plain(config))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=3", 3), ("a=-0.5", -0.5), ("a= 1e-3", 1e-3), ("a=8/255", 8 / 255), ("a=True", True), ("a=none", None),
        ("a=[1, 2]", (1, 2)), ("a=(0.1,)", (0.1,)), ("a=wide_resnet", "wide_resnet"), ("a='b'", "b"), ("a=b=c", "b=c"),
        ("a=1/0", "1/0"), ("a=", ""),
    ],
)  # fmt: skip
def test_settings_are_read_as_what_they_look_like(text, value):
    key, read = setting(text)
    assert key == "a" and read == value and type(read) is type(value)


def test_repeated_eps_are_kept_in_order_as_typed():
    _, config = parse(["evaluate", "m", "--eps", "8/255", "--eps", "0.1"])
    assert config.eps == ("8/255", "0.1")


def test_the_command_line_overrides_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\neps: [0.1, 8/255]\nn: 7\nseed: 3\n")
    _, config = parse(["evaluate", "--config", str(file)])
    assert (config.model, config.eps, config.n, config.seed) == ("m", ("0.1", "8/255"), 7, 3)
    _, config = parse(["evaluate", "other", f"--config={file}", "--eps", "0.5", "--n", "9"])
    assert (config.model, config.eps, config.n, config.seed) == ("other", ("0.5",), 9, 3)


def test_a_file_may_leave_required_arguments_to_the_command_line(tmp_path, capfd):
    file = tmp_path / "c.yaml"
    file.write_text("recipe: fast_digits\n")
    _, config = parse(["train", "--config", str(file), "--out", "run"])
    assert (config.recipe, config.out) == ("fast_digits", Path("run"))
    with pytest.raises(SystemExit) as stop:
        parse(["train", "--config", str(file)])
    assert stop.value.code == 2 and "--out" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipee: fast_mnist", r"got 'recipee'. Did you mean recipe\?"),
        ("zzz: 1", "got 'zzz'. Known: .*recipe"),
        ("epochs: many", "epochs in .* must be a whole number; got 'many'"),
        ("epochs: 1.5", "epochs in .* must be a whole number; got 1.5"),
        ("seed: true", "seed in .* must be a whole number; got True"),
        ("keep: worst", "keep in .* must be one of best, last; got 'worst'"),
        ("resume: 1", "resume in .* must be true or false; got 1"),
        ("out: [a]", "out in .* must be text; got"),
        ("command: evaluate", "must be a configuration of `jaxadv train`; got one of `jaxadv evaluate`"),
        ("- a\n- b", "must hold lines `argument: value`; got list"),
        ("a: [", "must be a YAML file"),
    ],
)
def test_a_malformed_file_is_refused_with_the_place(text, words, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        from_yaml("train", file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--config must be a YAML file; got .*none.yaml, which cannot be read"):
        from_yaml("train", tmp_path / "none.yaml")


def test_yaml_values_become_the_types_of_the_arguments():
    got = typed(
        "evaluate", {"model": "m", "eps": 0.1, "n": None, "out": "a", "batch-size": 3, "command": "evaluate"}, "x"
    )
    assert got == {"model": "m", "eps": ("0.1",), "n": None, "out": Path("a"), "batch_size": 3}


def test_resume_takes_the_stored_arguments_and_the_command_line_overrides_them(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(
        json.dumps({"arguments": {"recipe": "fast_digits", "epochs": 3, "out": "elsewhere", "resume": False}})
    )
    assert stored(run)["out"] == run
    _, config = parse(["train", "--out", str(run), "--resume"])
    assert (config.recipe, config.epochs, config.out, config.resume) == ("fast_digits", 3, run, True)
    _, config = parse(["train", "--out", str(run), "--resume", "--epochs", "5"])
    assert config.epochs == 5


@pytest.mark.parametrize(
    ("text", "words"), [(None, "no config.json. Leave out --resume"), ("{", "Damaged"), ('{"a": 1}', "Damaged")]
)
def test_resume_of_nothing_is_refused(text, words, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=words):
        parse(["train", "--out", str(tmp_path), "--resume"])


def test_without_resume_the_stored_arguments_play_no_part(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"arguments": {"recipe": "fast_digits"}}))
    _, config = parse(["train", "--out", str(tmp_path)])
    assert config.recipe == "fast_mnist"


@pytest.mark.parametrize(
    "words", [["evaluat", "m"], ["train", "--out", "x", "--epoch", "three"], ["list", "weather"], ["evaluate"]]
)
def test_words_that_make_no_sense_exit_with_2(words, capfd):
    with pytest.raises(SystemExit) as stop:
        parse(words)
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert err and not out
