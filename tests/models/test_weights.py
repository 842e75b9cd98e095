"""Files of weights: round trips, damage, misfits; PyTorch state dicts under each accepted naming."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxadv import models
from jaxadv.models.weights import SCHEMA

OPTIONS = {"mlp": {"widths": (5,)}, "preact_resnet18": {"width": 2}, "wide_resnet": {"depth": 10, "width": 1}}
OPTIONS |= {
    "resnet50": {"width": 2, "depths": (1,)},
    "wide_resnet_private": OPTIONS["wide_resnet"],
    "vit": {"width": 8, "depth": 1},
}


@pytest.fixture
def made(filled):
    """A function from a name to a network and its spec."""

    def make(name, seed=0):
        settings = {"shape": (8, 8, 1), "classes": 3, "mean": 0.5, "std": (0.25,), **OPTIONS.get(name, {})}
        return filled(name, seed=seed, **settings), models.make_spec(name, **settings)

    return make


@pytest.mark.parametrize("name", models.NETS)
def test_a_round_trip_is_exact(name, tmp_path, made):
    net, spec = made(name)
    path = tmp_path / "net.safetensors"
    models.save(path, net, spec)
    again, read = models.load(path)
    assert read == spec and jax.tree.structure(again) == jax.tree.structure(net)  # the static graph included
    jax.tree.map(np.testing.assert_array_equal, again, net)
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]  # no temporary file stays


def test_the_file_names_its_arrays_by_path(tmp_path, made):
    net, spec = made("preact_resnet18")
    models.save(tmp_path / "net", net, spec)
    arrays = load_file(tmp_path / "net")
    np.testing.assert_array_equal(
        arrays["params.layer2.0.shortcut.kernel"], net.params["layer2"]["0"]["shortcut"]["kernel"]
    )
    np.testing.assert_array_equal(arrays["state.bn.mean"], net.state["bn"]["mean"])


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, made):
    net, spec = made("mlp")
    path = tmp_path / "net.safetensors"
    models.save(path, net, spec)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        models.save(path, made("mlp", 1)[0], spec)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_save_refuses_weights_of_another_network(tmp_path, made):
    net, spec = made("mlp")
    other = models.make_spec("mlp", shape=(8, 8, 1), classes=3, widths=(7,))
    with pytest.raises(ValueError, match=r"weights must hold.*has shape \(64, 5\), not \(64, 7\)"):
        models.save(tmp_path / "a", net, other)
    half = net._replace(params=jax.tree.map(lambda a: a.astype(jnp.bfloat16), net.params))
    with pytest.raises(ValueError, match="has dtype bfloat16, not float32.*float32 weights"):
        models.save(tmp_path / "a", half, spec)
    with pytest.raises(FileNotFoundError, match="Create it first"):
        models.save(tmp_path / "no" / "a", net, spec)
    assert not any(tmp_path.iterdir())


def test_load_refuses_missing_and_damaged_files(tmp_path, made):
    with pytest.raises(FileNotFoundError, match="Check the path"):
        models.load(tmp_path / "none.safetensors")
    net, spec = made("cnn_small")
    path = tmp_path / "net.safetensors"
    models.save(path, net, spec)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"\xff" * 200):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"{re.escape(str(path))} must be a whole safetensors file.*Copy or save it again"
        ):
            models.load(path)


def test_load_refuses_files_that_do_not_fit(tmp_path, made):
    net, spec = made("mlp")
    path = tmp_path / "net.safetensors"
    models.save(path, net, spec)
    arrays = load_file(path)
    good = {"schema": SCHEMA, "spec": json.dumps(spec)}

    def refused(arrays, metadata, match):
        save_file(arrays, path, metadata=metadata)
        with pytest.raises(ValueError, match=match):
            models.load(path)

    refused(arrays, None, "must have schema 'jaxadv.weights.1'.*got None")
    refused(arrays, good | {"schema": "jaxadv.weights.9"}, "got 'jaxadv.weights.9'")
    refused(arrays, {"schema": SCHEMA}, "spec that fails")
    refused(arrays, good | {"spec": "{"}, "spec that fails")
    refused(arrays, good | {"spec": json.dumps(spec | {"name": "mlpp"})}, "Did you mean 'mlp'")
    first = "params.layers.0.kernel"
    refused({k: v for k, v in arrays.items() if k != first}, good, f"missing {first}")
    refused(arrays | {"params.extra": arrays[first]}, good, "unexpected params.extra")
    refused(arrays | {first: arrays[first].T.copy()}, good, r"has shape \(5, 64\), not \(64, 5\)")
    refused(arrays | {first: arrays[first].astype(np.float16)}, good, "has dtype float16, not float32")


def same_function(spec, arrays, renamed):
    one, two = models.from_torch_arrays(spec, arrays), models.from_torch_arrays(spec, renamed)
    jax.tree.map(np.testing.assert_array_equal, (one.params, one.state), (two.params, two.state))


def test_wide_resnet_takes_both_namings(torch_case):
    spec, arrays = torch_case("wide_resnet")
    assert "block2.layer.0.convShortcut.weight" in arrays and "fc.bias" in arrays

    def kuangliu(key):
        key = re.sub(r"^block(\d)\.layer\.", r"layer\1.", key)
        return key.replace("convShortcut", "shortcut.0").replace("fc.", "linear.")

    renamed = {kuangliu(k): v for k, v in arrays.items()}
    same_function(spec, arrays, renamed)
    same_function(spec, arrays, {("bn" + k[3:] if k.startswith("bn1.") else k): v for k, v in renamed.items()})
    copies = {"sub_" + k: v for k, v in arrays.items() if k.startswith("block1.")}
    same_function(spec, arrays, arrays | copies)  # TRADES registers its first stage twice
    same_function(spec, arrays, {f"module.{k}": v for k, v in (arrays | copies).items()})


def test_state_dicts_that_do_not_fit_are_refused(torch_case):
    spec, arrays = torch_case("preact_resnet18_raw")
    with pytest.raises(ValueError, match=r"state dict of preact_resnet18 must hold.*missing params\.conv1\.kernel"):
        models.from_torch_arrays(spec, {k: v for k, v in arrays.items() if k != "conv1.weight"})
    with pytest.raises(ValueError, match=r"unexpected fancy\.weight"):
        models.from_torch_arrays(spec, arrays | {"fancy.weight": np.zeros(3)})
    wrong = spec | {"classes": 11}
    with pytest.raises(ValueError, match=r"params\.linear\.bias has shape \(10,\), not \(11,\).*Another variant"):
        models.from_torch_arrays(wrong, arrays)


def test_dense_after_flatten_is_permuted_on_a_grid_that_is_not_square(torch_case):
    spec, arrays = torch_case("cnn_madry")
    net = models.from_torch_arrays(spec, arrays)
    theirs, ours = arrays["7.weight"].reshape(9, 5, 3, 2), net.params["dense1"]["kernel"].reshape(3, 2, 5, 9)
    np.testing.assert_array_equal(ours, theirs.transpose(2, 3, 1, 0))
