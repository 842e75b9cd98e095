"""Names, options and specs of the bundled networks."""

import json

import jax
import numpy as np
import pytest

from jaxadv import models


def test_unknown_names_get_the_nearest_ones(key):
    with pytest.raises(ValueError, match="unknown network 'cnn_smal'. Did you mean 'cnn_small'"):
        models.create("cnn_smal", key, shape=(8, 8, 1), classes=10)
    with pytest.raises(ValueError, match="unknown network 'resnet'. Did you mean"):
        models.make_spec("resnet", shape=(8, 8, 1), classes=10)


@pytest.mark.parametrize("name", models.NETS)
def test_unknown_options_get_the_valid_ones(name, key):
    with pytest.raises(ValueError, match=rf"{name} must get options it has; got 'colour'. Valid: .*norm.*init"):
        models.create(name, key, shape=(8, 8, 1), classes=10, colour=3)
    with pytest.raises(ValueError, match="got 'rngs'"):
        models.create(name, key, shape=(8, 8, 1), classes=10, rngs=3)


def test_the_same_key_gives_the_same_weights(key):
    one, two, three = (
        models.create("cnn_small", k, shape=(8, 8, 1), classes=10) for k in (key, key, jax.random.key(1))
    )
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert (one.params["conv1"]["kernel"] != three.params["conv1"]["kernel"]).all()
    layers = [one.params["conv1"]["bias"], one.params["conv2"]["bias"][:16]]
    assert (layers[0] * 4 != layers[1] * 16).all()  # layers draw from keys of their own


@pytest.mark.parametrize("name", models.NETS)
def test_a_spec_survives_json_and_builds_the_same_network(name, key):
    options = {
        "mlp": {"widths": (5, 4)},
        "preact_resnet18": {"width": 2},
        "resnet50": {"width": 2, "depths": (1, 2)},
        "wide_resnet": {"depth": 10, "width": 1},
        "wide_resnet_private": {"depth": 10, "width": 1},
    }.get(name, {})
    settings = {"shape": (8, 8, 1), "classes": 3, "mean": np.float32(0.5), "std": (0.25,), **options}
    spec = models.make_spec(name, **settings)
    again = json.loads(json.dumps(spec))
    assert again == spec

    def both(key):
        return models.from_spec(again, key), models.create(name, key, **settings)

    built, made = jax.eval_shape(both, key)
    assert jax.tree.structure(built) == jax.tree.structure(made)  # the static graph included
    assert jax.tree.leaves(built) == jax.tree.leaves(made)
    if name == "mlp":
        jax.tree.map(np.testing.assert_array_equal, *both(key))


def test_specs_that_are_none_are_refused(key):
    with pytest.raises(ValueError, match=r"must have name, shape and classes.*got \['name', 'shape'\].*make_spec"):
        models.from_spec({"name": "mlp", "shape": (3,)}, key)
    with pytest.raises(ValueError, match="got .*'width'"):
        models.from_spec({"name": "mlp", "shape": (3,), "classes": 2, "width": 3}, key)
    assert models.from_spec({"name": "mlp", "shape": (3,), "classes": 2}, key).state == {}
