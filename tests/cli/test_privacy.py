"""The command `privacy`, and private runs of `train`."""

import json
import re

import jax
import numpy as np
import pytest

from jaxadv import privacy, train
from jaxadv.cli import training
from jaxadv.cli.privacy import SECRET, run_privacy, secret_key, spent_words

RUN = ["--n", 1437, "--batch-size", 128, "--accountant", "rdp"]


def test_epsilon_is_that_of_the_plan(cli):
    ran = cli("privacy", "epsilon", *RUN, "--steps", 500, "--noise-multiplier", "3/2")
    assert ran.code == 0 and "epsilon 7.965 at delta 1e-05" in ran.out and "Poisson" in ran.out
    assert callable(run_privacy)


def test_calibrate_finds_the_noise_or_the_steps(cli, refused):
    ran = cli("privacy", "calibrate", *RUN, "--steps", 500, "--epsilon", 3)
    noise = float(re.search(r"noise multiplier ([0-9.]+)", ran.out)[1])
    assert ran.code == 0 and float(re.search(r"epsilon ([0-9.]+)", ran.out)[1]) <= 3
    back = cli("privacy", "calibrate", *RUN, "--noise-multiplier", noise, "--epsilon", 3)
    assert 495 <= int(re.search(r"(\d+) steps", back.out)[1]) <= 505
    assert "either --steps" in refused("privacy", "calibrate", *RUN, "--epsilon", 3)
    assert "needs --epsilon" in refused("privacy", "calibrate", *RUN, "--steps", 3)
    assert "no step keeps" in refused("privacy", "calibrate", *RUN, "--noise-multiplier", "0.1", "--epsilon", "0.01")
    assert "delta must lie" in refused("privacy", *RUN, "--steps", 3, "--noise-multiplier", 1, "--delta", "1/1437")


def test_the_audit_of_our_own_step_does_not_refute_it(cli):
    ran = cli("privacy", "audit", "--trials", 2000)
    assert ran.code == 0 and "does not refute the claim" in ran.out and "claims epsilon 4.377" in ran.out


def test_the_secret_is_drawn_once_and_kept_from_others(tmp_path):
    first = jax.random.key_data(secret_key(tmp_path))
    np.testing.assert_array_equal(first, jax.random.key_data(secret_key(tmp_path)))
    assert (tmp_path / SECRET).stat().st_mode & 0o077 == 0
    other = tmp_path / "other"
    other.mkdir()
    assert (jax.random.key_data(secret_key(other)) != first).any()
    (tmp_path / SECRET).write_text("no")
    with pytest.raises(Exception, match="16 hexadecimal digits"):
        secret_key(tmp_path)


def test_budgets_are_for_private_recipes(refused, tmp_path):
    said = refused("train", "--recipe", "fast_digits", "--epsilon", 8, "--out", tmp_path / "run")
    assert "--epsilon needs a private recipe (dp_mnist, dp_cifar10_wrn16_4); got fast_digits" in said
    assert training.data_of("dp_cifar10_wrn16_4") == "cifar10_jpeg" and training.data_of("dp_mnist") == "mnist"


@pytest.mark.slow
def test_a_private_run_says_what_it_spent(cli, tmp_path, monkeypatch):
    """The recipe on the digits, a few steps: ledger, secret, weights; the budget is kept."""
    out = tmp_path / "run"
    words = ["--recipe", "dp_mnist", "--data", "digits", "--epochs", 1, "--epsilon", 8, "--delta", "1e-4"]
    ran = cli("train", *words, "--out", out)
    assert ran.code == 0, ran
    ledger = json.loads((out / "privacy.json").read_text())
    assert 7.9 < ledger["epsilon"] <= 8 and ledger["delta"] == 1e-4 and ledger["steps"] == ledger["counted_steps"]
    assert spent_words(out) in ran.out and (out / SECRET).exists() and (out / "model.safetensors").exists()
    events = [line for line in train.read_metrics(out / "metrics.jsonl") if line["event"] == "privacy"]
    assert events[-1]["epsilon"] == ledger["epsilon"] and isinstance(privacy.Gaussian(), privacy.Gaussian)
