"""MODEL and DATA: every form is loaded, every misuse is refused by name."""

import json

import jax
import numpy as np
import pytest

from jaxadv import data, models
from jaxadv.cli import sources
from jaxadv.cli.errors import UsageError

X = np.random.default_rng(0).uniform(size=(3, 8, 8, 1)).astype(np.float32)


def reference(path):
    return np.asarray(models.model(models.load(path)[0])(X))


def test_a_file_of_weights(nearest_mean):
    loaded = sources.load_model(str(nearest_mean))
    np.testing.assert_array_equal(loaded.model(X), reference(nearest_mean))
    assert (loaded.name, loaded.shape, loaded.classes, loaded.run) == ("nearest_mean", (8, 8, 1), 10, {})


def test_a_run_folder_gives_its_weights_and_remembers_its_data(nearest_mean, tmp_path):
    run = tmp_path / "my_run"
    run.mkdir()
    (run / sources.WEIGHTS).write_bytes(nearest_mean.read_bytes())
    assert sources.load_model(str(run)).run == {}
    (run / "config.json").write_text(json.dumps({"arguments": {"data": "digits", "eps": "1/8"}}))
    loaded = sources.load_model(str(run))
    assert loaded.name == "my_run" == sources.load_model(str(run / sources.WEIGHTS)).name
    np.testing.assert_array_equal(loaded.model(X), reference(nearest_mean))
    assert sources.data_name(None, loaded) == "digits"
    assert sources.data_name("mnist", loaded) == "mnist"
    assert sources.budgets((), "linf", "digits", loaded) == (0.125,)
    assert sources.budgets(("8/255", "0.1"), "linf", "digits", loaded) == (8 / 255, 0.1)
    assert sources.budgets((), "linf", "mnist", loaded) == (0.3,)


def test_budgets_without_a_publication_must_be_given(nearest_mean):
    loaded = sources.load_model(str(nearest_mean))
    assert sources.budgets((), "linf", "digits", loaded) == (0.15,)
    with pytest.raises(UsageError, match="--eps must be given for l1 on 'digits'"):
        sources.budgets((), "l1", "digits", loaded)


def test_a_run_that_is_not_finished_says_how_to_finish_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="finish it: jaxadv train --out .* --resume"):
        sources.load_model(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match="Is it a run folder"):
        sources.load_model(str(tmp_path))


FORMS = {
    "trainable": "from jaxadv import models\ndef make():\n    return models.load({path!r})[0]",
    "pair": "from jaxadv import models\ndef make():\n    return models.load({path!r})",
    "model": "from jaxadv import models\ndef make():\n    return models.model(models.load({path!r})[0])",
    "object": "from jaxadv import models\nmake = models.model(models.load({path!r})[0])",
    "function": "from jaxadv.models import *\ndef make():\n    m = model(load({path!r})[0])\n    return lambda x: m(x)",
    "attribute": "from jaxadv.models import load\nclass zoo:\n    def make():\n        return load({path!r})",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_callable_may_return_a_model_in_any_form(form, own_model, nearest_mean):
    module = own_model(FORMS[form].format(path=str(nearest_mean)))
    loaded = sources.load_model(f"{module}:{'zoo.make' if form == 'attribute' else 'make'}")
    np.testing.assert_array_equal(jax.jit(loaded.model)(X), reference(nearest_mean))
    assert loaded.shape is None and loaded.classes is None


def test_modules_of_flax_and_equinox_enter_by_their_doors(own_model):
    module = own_model(
        "from flax import nnx\nimport equinox as eqx\n"
        "def flax():\n    return nnx.Linear(4, 3, rngs=nnx.Rngs(0))\n"
        "def equinox():\n    return eqx.nn.Linear(4, 3, key=jax.random.key(0))\n"
    )
    for name in ("flax", "equinox"):
        assert sources.load_model(f"{module}:{name}").model(np.ones((2, 4), np.float32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("net.onnx", "ONNX files cannot be read by this version"),
        ("nothing_here", "which is nothing of that name"),
        ("no.such.module:make", "importing 'no.such.module' failed"),
        ("json:dump", "calling json:dump failed: TypeError.*is it the model itself"),
        ("json:dumpz", "it has no 'dumpz'. Did you mean dumps? or dumps?"),
        ("json:__doc__", "must be a callable that returns a model; got str"),
        ("builtins:dict", "must return a model.*got dict"),
    ],
)
def test_what_is_no_model_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        sources.load_model(words)


def test_errors_in_the_users_module_are_told_as_such(own_model):
    with pytest.raises(UsageError, match="importing .* for MODEL .* failed: ZeroDivisionError: division by zero"):
        sources.load_model(f"{own_model('1 / 0')}:make")
    lost = own_model("def make():\n    return {}['weights']")
    with pytest.raises(UsageError, match="calling .* failed: KeyError: 'weights'"):
        sources.load_model(f"{lost}:make")
    other = sources.Path("text.bin")
    other.write_text("x")
    with pytest.raises(UsageError, match="a file of another kind"):
        sources.load_model("text.bin")


def test_data_by_name_and_by_file(digits_npz):
    whole = sources.load_data("digits", "test", None)
    few = sources.load_data("digits", "test", None, 20)
    own = sources.load_data(digits_npz(), "test", None, 1000)
    assert len(whole) == 360 and len(few) == len(own) == 20
    np.testing.assert_array_equal(few.all()[0], own.all()[0])
    np.testing.assert_array_equal(few.index, data.evaluation_subset(whole, 20).index)


def test_data_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXADV_DATA", raising=False)
    with pytest.raises(
        FileNotFoundError, match="needs the file mnist/.*JAXADV_DATA .or pass --data-root.*'digits' is built in"
    ):
        sources.load_data("mnist", "test", None)
    with pytest.raises(FileNotFoundError, match="no such file in"):
        sources.load_data("mnist", "test", tmp_path)
    with pytest.raises(UsageError, match="--data-root must be a folder"):
        sources.load_data("mnist", "test", tmp_path / "none")
    with pytest.raises(ValueError, match="unknown data set 'minst'. Did you mean 'mnist'"):
        sources.load_data("minst", "test", None)
    with pytest.raises(FileNotFoundError, match="no such file"):
        sources.load_data(str(tmp_path / "a.npz"), "test", None)
    with pytest.raises(UsageError, match="n must be a positive number"):
        sources.load_data("digits", "test", None, 0)


def test_a_model_that_does_not_say_its_data_needs_the_argument(nearest_mean):
    with pytest.raises(UsageError, match="--data must name a data set"):
        sources.data_name(None, sources.load_model(str(nearest_mean)))


def test_shapes_are_compared_before_anything_runs(nearest_mean, digits_npz, own_model):
    loaded = sources.load_model(str(nearest_mean))
    sources.fits(loaded, sources.load_data(digits_npz(), "test", None))
    swapped = sources.load_data(digits_npz("swapped.npz", x=digits_npz.x.transpose(0, 3, 1, 2)), "test", None)
    with pytest.raises(
        UsageError, match=r"x must have shape \[n, 8, 8, 1\].*got \[n, 1, 8, 8\]. channels-first\? Save x.transpose"
    ):
        sources.fits(loaded, swapped)
    small = sources.load_data(digits_npz("small.npz", x=digits_npz.x[:, :4]), "test", None)
    with pytest.raises(UsageError, match="Is this the data set that the model was trained on"):
        sources.fits(loaded, small)
    module = own_model("def make():\n    return lambda x: x.reshape(-1, 64) @ jnp.ones((63, 10))")
    with pytest.raises(UsageError, match="it failed with TypeError"):
        sources.fits(sources.load_model(f"{module}:make"), sources.load_data("digits", "test", None))


def test_classes_are_compared(own_model, digits_npz, nearest_mean):
    module = own_model(
        "def make():\n    return lambda x: x.reshape(-1, 64)[:, :7]\n"
        "def many():\n    return lambda x: x.reshape(-1, 64)[:, :12]\n"
    )
    seven, twelve = (sources.load_model(f"{module}:{name}") for name in ("make", "many"))
    with pytest.raises(UsageError, match=r"y must lie in \[0, 7\).*got 10 classes in 'digits', the largest label is 9"):
        sources.fits(seven, sources.load_data("digits", "test", None))
    with pytest.raises(UsageError, match=r"y must lie in \[0, 12\)"):  # a named set has exactly its classes
        sources.fits(twelve, sources.load_data("digits", "test", None))
    sources.fits(twelve, sources.load_data(digits_npz(), "test", None))  # a file may lack some classes
    with pytest.raises(UsageError, match="the largest label is 10"):
        sources.fits(
            sources.load_model(str(nearest_mean)),
            sources.load_data(digits_npz("one.npz", y=digits_npz.y + 1), "test", None),
        )


def test_the_threat_has_the_bounds_of_the_data(digits_npz):
    source = sources.load_data(
        digits_npz("wide.npz", x=2 * digits_npz.x - 1, bounds=np.array([-1.0, 1.0])), "test", None
    )
    threat = sources.threat("l2", 0.5, source)
    assert (threat.norm, threat.eps, threat.bounds) == ("l2", 0.5, (-1.0, 1.0))
    with pytest.raises(ValueError, match="unknown threat 'l3'"):
        sources.threat("l3", 0.5, source)


def test_target_rules():
    assert sources.target_rule(None, 10) is None
    assert sources.target_rule("random", 10) == "random"
    assert sources.target_rule("3", 10) == 3
    for word in ("10", "-1", "all"):
        with pytest.raises(UsageError, match="--targeted must be next, random, least_likely or a class from 0 to 9"):
            sources.target_rule(word, 10)


def test_loaded_is_what_load_model_returns(nearest_mean):
    assert isinstance(sources.load_model(str(nearest_mean)), sources.Loaded)
