"""A model that needs no training, and the command line called in this process."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, data, models, threats, train
from jaxadv.cli import main, training


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd) -> Callable[..., Ran]:
    """Run `jaxadv` on words; gives the exit code and what was printed."""

    def run(*words: object) -> Ran:
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return run


@pytest.fixture
def refused(cli) -> Callable[..., str]:
    """Run `jaxadv` on words that must be refused; gives the one paragraph that says why."""

    def run(*words: object) -> str:
        ran = cli(*words)
        assert ran.code == 2, ran
        message = ran.err[ran.err.index("jaxadv: ") :]
        assert message.count("\n") == 1 and message.endswith("\n")
        assert "Traceback" not in ran.err + ran.out
        return message

    return run


@pytest.fixture(scope="session")
def nearest_mean(tmp_path_factory):
    """A file of weights: the linear classifier that compares an image with the mean of each class of the digits.

    logits_k = 20 (mu_k . x - |mu_k|^2 / 2), so argmax is the nearest mean: about 90 % correct.
    """
    x, y = data.load("digits", "train").all()
    means = np.stack([x[y == k].reshape(-1, 64).mean(0) for k in range(10)])
    spec = models.make_spec("mlp", shape=(8, 8, 1), classes=10, widths=())
    blank = models.from_spec(spec, jax.random.key(0))
    layer = {"kernel": jnp.asarray(20 * means.T), "bias": jnp.asarray(-10 * (means**2).sum(-1))}
    assert jax.tree.map(jnp.shape, blank.params) == {"layers": {"0": jax.tree.map(jnp.shape, layer)}}
    path = tmp_path_factory.mktemp("model") / "nearest_mean.safetensors"
    models.save(path, blank._replace(params={"layers": {"0": layer}}), spec)
    return path


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """Write a module into the current folder; gives its name. Each test gets a module of its own."""
    monkeypatch.chdir(tmp_path)
    made = []

    def write(code: str) -> str:
        name = f"own_{tmp_path.name}_{len(made)}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text("import jax\nimport jax.numpy as jnp\n" + code)
        made.append(name)
        return name

    return write


@pytest.fixture
def digits_npz(tmp_path):
    """Write an npz file of 20 test digits, with changes; gives its path."""
    few = data.evaluation_subset(data.load("digits", "test"), 20)
    x, y = few.all()

    def write(name: str = "few.npz", **changes) -> str:
        path = tmp_path / name
        np.savez(path, **({"x": x, "y": y} | changes))
        return str(path)

    write.x, write.y = x, y
    return write


@pytest.fixture
def tiny(monkeypatch):
    """A recipe that compiles in a moment, `tiny_digits`: a linear model, FGSM in training and validation."""

    def tiny_digits(source, *, seed=0, eps=None, epochs=1, validation=None, trainable=None, batch_size=64, **overrides):
        """Train a linear model on the digits; for tests."""
        attack = attacks.fgsm(threats.linf(0.15 if eps is None else eps), start="random")
        return {
            "trainable": trainable, "objective": train.pgd_at(attack), "optimizer": optax.adam(0.01), "data": source,
            "steps": epochs * (len(source) // batch_size), "batch_size": batch_size, "attack": attack,
            "validation": data.evaluation_subset(validation, min(64, len(validation))),
        } | overrides  # fmt: skip

    monkeypatch.setitem(train.RECIPES, "tiny_digits", tiny_digits)
    monkeypatch.setitem(training.NETWORKS, "tiny_digits", ("mlp", {"widths": ()}))
    return tiny_digits
