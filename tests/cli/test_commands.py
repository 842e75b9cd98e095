"""`evaluate`, `attack`, `report`, `list`, `claims`, `bench`: answers, files, exit codes, and each kind of bad input."""

import json

import jax
import numpy as np
import pytest

from jaxadv import attacks, data, evaluate, models, threats, train
from jaxadv.cli import commands, configs, main

KEYS = {
    "name",
    "n",
    "clean_accuracy",
    "clean_interval",
    "robust_accuracy",
    "robust_interval",
    "threat",
    "attacks",
    "flags",
}


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


# ------------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_writes_what_the_library_measures(cli, nearest_mean, tmp_path):
    out, adv = tmp_path / "out", tmp_path / "adv.npz"
    words = [
        "--data",
        "digits",
        "--n",
        40,
        "--eps",
        "1/10",
        "--eps",
        "0.05",
        "--eps",
        "0.2",
        "--attacks",
        "fgsm,bim",
        "--seed",
        3,
    ]
    ran = cli("evaluate", nearest_mean, *words, "--out", out, "--save-adv", adv)
    assert ran.code == 0, ran
    tree = report_of(out)
    assert len(tree["models"]) == 1 and set(tree["models"][0]) >= KEYS
    entry = tree["models"][0]

    source = data.evaluation_subset(data.load("digits", "test"), 40)
    x, y = source.all()
    model = models.model(models.load(nearest_mean)[0])
    want = evaluate(
        jax.random.key(3), model, x, y, threats.linf(0.1), attacks=("fgsm", "bim"), name="nearest_mean",
        index=source.index, eps_curve=(0.1, 0.05, 0.2), data=source, seed=3,
    )  # fmt: skip
    expected = json.loads(want.to_json())
    assert {k: v for k, v in tree.items() if k != "timing"} == {k: v for k, v in expected.items() if k != "timing"}
    # The headline is that of the first --eps, and the curve falls.
    curve = {point["eps"]: point["robust_accuracy"] for point in entry["curve"]}
    assert sorted(curve) == [0.05, 0.1, 0.2] and entry["threat"]["eps"] == 0.1
    assert entry["robust_accuracy"] == curve[0.1] and curve[0.05] > curve[0.1] > curve[0.2]
    assert entry["clean_accuracy"] > 0.8
    for text in (
        "nearest_mean",
        "digits (test), 40 examples",
        f"{100 * entry['robust_accuracy']:.1f} %",
        "linf 0.1",
        "bim",
        "security curve",
    ):
        assert text in ran.out

    with np.load(adv) as stored:
        assert set(stored) == {"x", "x_adv", "y", "index", "success", "size"}
        verdict = evaluate.verify(model, stored["x_adv"], stored["x"], stored["y"], threats.linf(0.1))
        by = np.asarray(entry["examples"]["by"])
        np.testing.assert_array_equal(stored["success"], by >= 0)
        assert verdict.broken[by >= 0].all() and verdict.feasible.all()
        np.testing.assert_array_equal(stored["size"], verdict.size)
        np.testing.assert_array_equal(stored["index"], source.index)


@pytest.mark.parametrize("rule", ["next", "random", "least_likely", "3"])
def test_targeted_evaluation(rule, cli, nearest_mean, tmp_path):
    out = tmp_path / "out"
    ran = cli(
        "evaluate",
        nearest_mean,
        "--data",
        "digits",
        "--n",
        40,
        "--eps",
        0.2,
        "--attacks",
        "bim",
        "--targeted",
        rule,
        "--out",
        out,
    )
    entry = report_of(out)["models"][0]
    assert ran.code == 0 and f"Targeted ({'given' if rule == '3' else rule})" in ran.out
    assert entry["targeted"]["rule"] == ("given" if rule == "3" else rule)
    if rule == "3":
        assert entry["n"] == 36 and 3 not in entry["examples"]["label"] and "are left out" in ran.err
        hit = np.asarray(entry["examples"]["by"]) >= 0
        assert hit.any() and (np.asarray(entry["examples"]["adversarial"])[hit] == 3).all()
    else:
        assert entry["n"] == 40


def test_a_protocol_is_taken_by_name_and_restarts_override_it(cli, nearest_mean, tmp_path):
    out = tmp_path / "out"
    words = [
        "--data",
        "digits",
        "--n",
        20,
        "--eps",
        0.02,
        "--protocol",
        "quick",
        "--restarts",
        2,
        "--name",
        "mine",
        "--batch-size",
        7,
    ]
    assert cli("evaluate", nearest_mean, *words, "--out", out).code == 0
    entry = report_of(out)["models"][0]
    assert entry["name"] == "mine" and [(a["name"], a["restarts"]) for a in entry["attacks"]][:2] == [
        ("fgsm", 2),
        ("pgd", 2),
    ]


def test_red_flags_are_told_and_one_of_severity_error_gives_1(cli, own_model, tmp_path):
    module = own_model(
        "def probabilities():\n    return lambda x: jax.nn.softmax(x.reshape(-1, 64)[:, :10])\n"
        "def nan():\n    bad = lambda x: jnp.where(x.mean((1, 2, 3))[:, None] > 0.3, jnp.nan, 1)\n"
        "    return lambda x: bad(x) * x.reshape(-1, 64)[:, :10]\n"
    )
    for name, flag in (("probabilities", "probabilities"), ("nan", "nonfinite_logits")):
        out = tmp_path / name
        ran = cli(
            "evaluate",
            f"{module}:{name}",
            "--data",
            "digits",
            "--n",
            20,
            "--eps",
            0.1,
            "--attacks",
            "fgsm",
            "--out",
            out,
        )
        flags = {f["name"]: f for f in report_of(out)["models"][0]["flags"]}
        severity = evaluate.FLAGS[flag].severity
        assert flag in flags and f"{severity}: {name}: {flag}: " in ran.err and flags[flag]["remedy"] in ran.err
        assert ran.code == (1 if any(f["severity"] == "error" for f in flags.values()) else 0)
        assert commands.exit_code(evaluate.load(out)) == ran.code
    assert severity == "error" and ran.code == 1  # of the last, the NaN


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eps", "0"], "eps must be finite and greater than 0; got 0.0"),
        (["--eps", "-1"], "eps must be finite and greater than 0; got -1.0"),
        (["--eps", "nan"], "eps must be finite and greater than 0; got nan"),
        (["--eps", "0.1", "--eps", "0"], "eps must be finite and greater than 0; got 0.0"),
        (["--eps", "big"], "eps must be a number or a fraction such as 8/255; got 'big'"),
        (["--norm", "linff"], "unknown threat 'linff'. Did you mean 'linf'"),
        (["--attacks", "pgdd"], "unknown attack 'pgdd'. Did you mean 'pgd'"),
        (["--attacks", ","], "--attacks must name attacks"),
        (["--protocol", "standart"], "unknown protocol 'standart'. Did you mean 'standard'"),
        (["--protocol", "quick", "--attacks", "pgd"], "give --attacks or --protocol, not both"),
        (["--restarts", "0"], "restarts must be a whole number of at least 1; got 0"),
        (["--batch-size", "0"], "batch_size must be a whole number of at least 1; got 0"),
        (["--n", "0"], "n must be a positive number of examples; got 0"),
        (["--targeted", "11"], "--targeted must be next, random, least_likely or a class from 0 to 9; got '11'"),
        (["--save-adv", "adv.npy"], "--save-adv must be a file that ends in .npz; got adv.npy"),
        (["--data", "mnits"], "unknown data set 'mnits'. Did you mean 'mnist'"),
        (["--devices", "0"], "--devices must be at least 1; got 0"),
        (["--devices", "4096"], "--devices must be at most the"),
    ],
)
def test_evaluate_refuses_bad_arguments(words, message, refused, nearest_mean, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data_words = [] if "--data" in words else ["--data", "digits"]
    assert message in refused("evaluate", nearest_mean, *data_words, *words)
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, y: {"y": y.astype(np.float32)},
            "y must be integer labels of shape [b]; got float32[20]. Float labels?",
        ),
        (lambda x, y: {"y": np.eye(10, dtype=np.int32)[y]}, "got int32[20, 10]. One-hot labels? Pass y.argmax(-1)"),
        (lambda x, y: {"x": 255 * x}, "bounds must be given for floats outside [0, 1]; got values from 0 to 255"),
        (
            lambda x, y: {"x": 3 * x, "bounds": np.array([0.0, 1.0])},
            "x must lie within bounds [0, 1]; got values from 0 to 3",
        ),
        (lambda x, y: {"x": x.transpose(0, 3, 1, 2)}, "channels-first? Save x.transpose(0, 2, 3, 1)"),
        (lambda x, y: {"x": x[:0], "y": y[:0]}, "x must hold at least one example; got float32[0, 8, 8, 1]"),
        (lambda x, y: {"y": y + 5}, "y must lie in [0, 10)"),
        (lambda x, y: {"y": y[:-1]}, "y must have one label for each of the 20 examples"),
        (lambda x, y: {"x": x * np.nan}, "x must be finite"),
        (lambda x, y: {"z": x, "x": x, "y": np.array([None] * 20)}, "must be an npz file of plain arrays"),
    ],
)
def test_evaluate_refuses_bad_data(change, message, refused, nearest_mean, digits_npz, tmp_path):
    path = digits_npz("bad.npz", **change(digits_npz.x, digits_npz.y))
    assert message in refused("evaluate", nearest_mean, "--data", path, "--eps", 0.1, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_evaluate_refuses_a_missing_data_folder(refused, nearest_mean, tmp_path, monkeypatch):
    monkeypatch.delenv("JAXADV_DATA", raising=False)
    message = refused("evaluate", nearest_mean, "--data", "mnist", "--out", tmp_path / "out")
    assert (
        "mnist/t10k-images-idx3-ubyte.gz" in message and "--data-root" in message and "'digits' is built in" in message
    )
    message = refused("evaluate", nearest_mean, "--data", "mnist", "--data-root", tmp_path, "--out", tmp_path / "out")
    assert str(tmp_path / "mnist") in message


@pytest.mark.parametrize("command", ["evaluate", "attack"])
def test_models_that_give_no_logits_are_refused(command, refused, own_model):
    module = own_model(
        "def nan():\n    return lambda x: x.reshape(-1, 64)[:, :10] * jnp.nan\n"
        "def one():\n    return lambda x: x.reshape(-1, 64)[:, 0]\n"
        "def ints():\n    return lambda x: x.reshape(-1, 64)[:, :10].astype(int)\n"
    )
    for name, message in (
        ("nan", "must return finite logits; got NaN or infinity for all 20 examples. Were weights loaded?"),
        ("one", "must be logits of shape [2, k] with k >= 2; got float32[2]"),
        ("ints", "must be floating-point logits; got int32"),
    ):
        assert message in refused(command, f"{module}:{name}", "--data", "digits", "--n", 20, "--eps", 0.1)


def test_an_output_folder_that_cannot_be_written_is_refused_before_the_work(refused, nearest_mean, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    words = ["evaluate", nearest_mean, "--data", "digits", "--n", 20]
    assert "--out must be a folder that can be written; got" in refused(*words, "--out", file / "deep")
    assert "--save-adv must be a folder that can be written; got" in refused(
        *words, "--out", tmp_path / "o", "--save-adv", file / "a.npz"
    )
    assert not (tmp_path / "o").exists()


def test_a_full_disk_leaves_nothing_half_written(refused, nearest_mean, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    monkeypatch.setattr("os.fsync", full)
    message = refused("evaluate", nearest_mean, "--data", "digits", "--n", 20, "--attacks", "fgsm", "--out", out)
    assert "No space left on device" in message
    assert list(out.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------- attack


def test_attack_saves_what_the_library_finds(cli, nearest_mean, tmp_path):
    adv = tmp_path / "adv.npz"
    words = [
        "--data",
        "digits",
        "--n",
        30,
        "--attack",
        "pgd",
        "--norm",
        "l2",
        "--eps",
        0.8,
        "--steps",
        5,
        "--step-size",
        "3/10",
        "--seed",
        1,
    ]
    ran = cli("attack", nearest_mean, *words, "--save-adv", adv)
    assert ran.code == 0, ran
    source = data.evaluation_subset(data.load("digits", "test"), 30)
    x, y = source.all()
    model, threat = models.model(models.load(nearest_mean)[0]), threats.l2(0.8)
    attack = attacks.pgd(threat, steps=5, step_size=0.3)
    want = jax.jit(lambda k: attack.run(k, model, x, y, index=source.index))(jax.random.key(1))
    with np.load(adv) as stored:
        np.testing.assert_allclose(stored["x_adv"], want.x, atol=1e-6)
        np.testing.assert_array_equal(stored["success"], want.success)
        np.testing.assert_allclose(stored["size"], want.size, atol=1e-6)
        assert evaluate.verify(model, stored["x_adv"], x, y, threat).broken[stored["success"]].all()
    robust = float(np.mean(~np.asarray(want.success)))
    assert f"{100 * robust:.1f} %" in ran.out and "l2 0.8" in ran.out and 0 < robust < 1


def test_restarts_of_an_attack_never_lose_a_success(cli, nearest_mean, tmp_path):
    found = []
    for restarts in (1, 3):
        adv = tmp_path / f"{restarts}.npz"
        words = ["--data", "digits", "--n", 40, "--eps", 0.12, "--steps", 1, "--restarts", restarts]
        assert cli("attack", nearest_mean, *words, "--save-adv", adv).code == 0
        found.append(np.load(adv))
    one, three = found
    assert (three["success"] >= one["success"]).all() and three["success"].sum() > one["success"].sum()
    np.testing.assert_array_equal(three["x_adv"][one["success"]], one["x_adv"][one["success"]])


@pytest.mark.parametrize("rule", ["next", "random", "least_likely", "7"])
def test_targeted_attack_reaches_the_target(rule, cli, nearest_mean, tmp_path):
    adv = tmp_path / "adv.npz"
    words = ["--data", "digits", "--n", 20, "--attack", "bim", "--eps", 0.4, "--targeted", rule, "--save-adv", adv]
    ran = cli("attack", nearest_mean, *words)
    assert ran.code == 0 and f"target reached ({rule})" in ran.out
    with np.load(adv) as stored:
        logits = np.asarray(models.model(models.load(nearest_mean)[0])(stored["x_adv"]))
        clean = np.asarray(models.model(models.load(nearest_mean)[0])(stored["x"]))
        y, hit = stored["y"], stored["success"]
        assert hit.mean() > 0.5
        if rule == "next":
            np.testing.assert_array_equal(hit, logits.argmax(-1) == (y + 1) % 10)
        elif rule == "7":
            assert 7 not in y
            np.testing.assert_array_equal(hit, logits.argmax(-1) == 7)
        elif rule == "least_likely":
            masked = np.where(np.arange(10) == y[:, None], np.inf, clean)
            np.testing.assert_array_equal(hit, logits.argmax(-1) == masked.argmin(-1))
        else:
            assert (logits.argmax(-1)[hit] != y[hit]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attack", "pgt"], "unknown attack 'pgt'. Did you mean 'pgd'"),
        (["--steps", 0], "steps must be a whole number of at least 1; got 0"),
        (["--step-size", "-1/2"], "step_size"),
        (["--step-size", "0"], "step_size must be finite and greater than 0; got 0.0"),
        (["--eps", "inf"], "eps must be finite and greater than 0; got inf"),
        (["--norm", "l1"], "--eps must be given for l1 on 'digits'"),
        (["--save-adv", "x"], "--save-adv must be a file that ends in .npz"),
    ],
)
def test_attack_refuses_bad_arguments(words, message, cli, nearest_mean):
    ran = cli("attack", nearest_mean, "--data", "digits", "--n", 10, *words)
    assert ran.code == 2 and message in ran.err and "Traceback" not in ran.err


def test_settings_that_an_attack_lacks_are_refused(refused, nearest_mean, monkeypatch):
    monkeypatch.setitem(attacks.ATTACKS, "bare", lambda threat: attacks.fgsm(threat))
    message = refused("attack", nearest_mean, "--data", "digits", "--attack", "bare", "--steps", 3)
    assert "--steps must be left out for bare" in message


def test_claims_of_an_attack_that_do_not_hold_are_counted_as_nothing(cli, nearest_mean, tmp_path, monkeypatch):
    """An attack that leaves the budget: it reports successes, the command line does not believe them."""
    monkeypatch.setitem(
        attacks.ATTACKS, "cheat", lambda threat: attacks.bim(threats.linf(10 * threat.eps, threat.bounds))
    )
    adv = tmp_path / "adv.npz"
    ran = cli(
        "attack", nearest_mean, "--data", "digits", "--n", 20, "--attack", "cheat", "--eps", 0.05, "--save-adv", adv
    )
    assert ran.code == 0 and "claims refused" in ran.out
    with np.load(adv) as stored:
        assert stored["size"].max() <= 0.05 + 1e-6 and not stored["success"].any()


# --------------------------------------------------------------------------------------------------------------- report


@pytest.fixture
def two_reports(cli, nearest_mean, tmp_path):
    for name, attack in (("one", "fgsm"), ("two", "bim")):
        words = ["--data", "digits", "--n", 20, "--eps", 0.1, "--attacks", attack, "--out", tmp_path / name]
        assert cli("evaluate", nearest_mean, *words).code == 0
    return tmp_path / "one", tmp_path / "two"


def test_report_shows_one_and_compares_several(cli, two_reports, tmp_path):
    one, two = two_reports
    ran = cli("report", one)
    assert ran.code == 0 and ran.out.count("nearest_mean") == 1
    assert cli("report", one / "report.json", two).out.count("nearest_mean") == 2
    page = tmp_path / "pages" / "page.html"
    assert cli("report", one / "report.json", two, "--out", page).code == 0
    text = page.read_text()
    assert "nearest_mean (one)" in text and "nearest_mean (two)" in text and "<html" in text
    assert cli("report", one, "--out", tmp_path / "page.md").code == 0
    assert "nearest_mean" in (tmp_path / "page.md").read_text()


def test_report_refuses_what_is_none(refused, two_reports, tmp_path):
    one, _ = two_reports
    assert "report needs at least one file" in refused("report")
    assert "must be a file report.json or a folder that holds one" in refused("report", tmp_path / "none")
    assert "--out must end in .html or .md" in refused("report", one, "--out", tmp_path / "page.pdf")
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    assert "a report must have schema" in refused("report", bad)
    bad.write_text("{")
    assert "must be a report of jaxadv" in refused("report", bad)
    tree = report_of(one)
    tree["models"][0]["robust_accuracy"] = 1.0
    bad.write_text(json.dumps(tree))
    assert "must be a report of jaxadv" in refused("report", bad)


def test_reports_about_other_examples_are_not_put_on_one_page(refused, cli, two_reports, nearest_mean, tmp_path):
    other = tmp_path / "other"
    assert (
        cli(
            "evaluate", nearest_mean, "--data", "digits", "--n", 30, "--eps", 0.1, "--attacks", "fgsm", "--out", other
        ).code
        == 0
    )
    assert "merged reports must have the same data" in refused(
        "report", two_reports[0], other, "--out", tmp_path / "page.html"
    )


# ----------------------------------------------------------------------------------------- list, claims, bench, helpers


def test_list_names_every_registered_thing(cli):
    out = cli("list").out
    for table in (attacks.ATTACKS, threats.THREATS, train.RECIPES, models.NETS, data.SOURCES, evaluate.PROTOCOLS):
        for name in table:
            assert f" {name} " in out
    only = cli("list", "threats").out
    assert "linf" in only and "pgd" not in only
    assert set(commands.DATA_SETS) == set(data.SOURCES)


def test_every_listed_thing_says_what_it_is():
    for table in (attacks.ATTACKS, threats.THREATS, train.RECIPES, models.NETS):
        for thing in table.values():
            line = commands.first_line(thing)
            assert len(line) > 20 and line.endswith(".") and not line.startswith("Return ")


def test_claims_and_bench_need_a_checkout(refused, tmp_path):
    for words in (
        ["claims", "list"],
        ["claims", "run", "fast_at"],
        ["claims", "table"],
        ["bench", "list"],
        ["bench", "run", "speed/x"],
    ):
        assert "needs a source checkout" in refused(*words, "--root", tmp_path)


def test_claims_and_bench_read_the_checkout(cli, refused):
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    assert "fast_at" in cli("claims", "list", "--root", root).out
    assert cli("bench", "list", "--root", root).code == 0
    assert "claims run needs the name of a claim" in refused("claims", "run", "--root", root)
    assert "bench run needs the name of a benchmark" in refused("bench", "run", "--root", root)
    assert "unknown" in refused("claims", "run", "no_claim", "--root", root)


def test_numbers_are_written_for_people():
    assert commands.percent(0.9312, (0.9, 0.955)) == "93.1 % (90.0 to 95.5)"
    assert commands.percent(0.5) == "50.0 %"
    assert commands.budget({"norm": "linf", "eps": 0.3}) == "linf 0.3"
    assert commands.budget({"norm": "l2", "eps": [1, 2]}) == "l2, eps per example"


@pytest.mark.parametrize("command", ["evaluate", "attack", "report", "verify-report", "list", "claims", "bench"])
def test_every_command_has_its_function(command):
    assert callable(getattr(commands, f"run_{command.replace('-', '_')}"))
    assert command in configs.COMMANDS and callable(main)


def test_the_model_of_these_tests_has_a_linear_margin(nearest_mean):
    """The oracle's oracle: the logits are those of the nearest mean."""
    x, y = data.load("digits", "train").all()
    means = np.stack([x[y == k].mean(0) for k in range(10)])
    logits = np.asarray(models.model(models.load(nearest_mean)[0])(x[:50]))
    np.testing.assert_array_equal(logits.argmax(-1), ((x[:50, None] - means) ** 2).sum((2, 3, 4)).argmin(-1))


# --------------------------------------------------------------------------------------------- journal, verify-report


def test_a_stopped_evaluation_is_resumed_and_its_report_verified(cli, refused, nearest_mean, tmp_path, monkeypatch):
    words = ["evaluate", nearest_mean, "--data", "digits", "--n", 40, "--eps", 0.1, "--attacks", "fgsm", "--slots", 8]
    straight, out = tmp_path / "straight", tmp_path / "out"
    assert cli(*words, "--out", straight).code == 0

    real, served = evaluate.slots.Server._serve, []

    def stopped(self, *args):
        for got in real(self, *args):
            if len(served) == 2:
                raise KeyboardInterrupt
            served.append(len(got[0]))
            yield got

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.slots.Server, "_serve", stopped)
        ran = cli(*words, "--out", out)
    assert ran.code == 130 and "--resume" in ran.err and not (out / "report.json").exists()
    assert "unfinished evaluation" in refused(*words, "--out", out)
    assert "same slots" in refused(*words[:-1], 9, "--out", out, "--resume")
    assert cli(*words, "--out", out, "--resume").code == 0
    one, two = report_of(straight), report_of(out)
    assert {k: v for k, v in one.items() if k != "timing"} == {k: v for k, v in two.items() if k != "timing"}
    assert one["models"][0]["search"]["slots"] == 8
    assert cli(*words, "--out", out).code == 0  # finished: may be repeated

    ran = cli("verify-report", out)
    by = np.asarray(one["models"][0]["examples"]["by"])
    assert ran.code == 0 and f"All {(by >= 0).sum()} adversarial examples hold" in ran.out
    assert cli("verify-report", out / "report.json", "--model", nearest_mean).code == 0
    row = int(np.flatnonzero(by >= 0)[0])
    with np.load(out / "adversarial.npz") as stored:
        arrays = dict(stored)
    arrays["adversarial_0"][row] = np.clip(arrays["adversarial_0"][row] + 0.2, 0, 1)
    np.savez(out / "adversarial.npz", **arrays)
    ran = cli("verify-report", out)
    index = one["models"][0]["examples"]["index"][row]
    assert ran.code == 1 and f"example {index} (row {row}): its size is" in ran.err and "do not hold" in ran.out
    (out / commands.EVALUATION).unlink()
    assert "--model MODEL" in refused("verify-report", out)
    (out / "adversarial.npz").unlink()
    assert "needs the examples" in refused("verify-report", out)
    rb = tmp_path / "rb.json"
    assert cli("report", straight, "--robustbench", rb).code == 0
    entry = json.loads(rb.read_text())[0]
    assert entry["autoattack_acc"] == f"{100 * one['models'][0]['robust_accuracy']:.2f}" and entry["eps"] == 0.1
    assert "--robustbench must end in .json" in refused("report", straight, "--robustbench", tmp_path / "rb.txt")
