"""Weights in files and from other frameworks' arrays.

What lives here: one-file weights (`save`, `load`; safetensors, no pickle) and PyTorch state dicts given as plain arrays
(`from_torch_arrays`; torch is not needed). What does not: checkpoints of training.

A file holds the leaves of params and state by path (`params.conv1.kernel`, `state.bn.mean`), and in its metadata the
schema and the spec as JSON. Every key, shape and dtype is compared with the network that the spec describes.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv.core import Trainable, atomic_write
from jaxadv.models.adapt import flatten, unflatten
from jaxadv.models.create import NETS, from_spec, make_spec

SCHEMA = "jaxadv.weights.1"
"""Version of the file's layout, in its metadata."""


def _expected(spec: Mapping[str, Any], nets: Mapping[str, Any] = NETS) -> Trainable:
    """Return the network of a spec with shapes and dtypes in the place of arrays; nothing is computed."""
    return jax.eval_shape(lambda key: from_spec(spec, key, nets=nets), jax.random.key(0))


def _named(trainable: Trainable) -> dict[str, Any]:
    leaves = flatten({"params": trainable.params, "state": trainable.state})
    return {".".join(path): leaf for path, leaf in leaves.items()}


def _fill(expected: Trainable, values: Mapping[str, Any]) -> Trainable:
    tree = unflatten({tuple(name.split(".")): jnp.asarray(value) for name, value in values.items()})

    def whole(want, got):  # groups without arrays are in no file
        return {k: whole(part, got.get(k, {})) if isinstance(part, Mapping) else got[k] for k, part in want.items()}

    return expected._replace(
        params=whole(expected.params, tree.get("params", {})), state=whole(expected.state, tree.get("state", {}))
    )


def _compare(want: Mapping[str, Any], got: Mapping[str, Any], what: str, fix: str) -> None:
    """Refuse arrays whose names, shapes or dtypes are not the expected ones."""
    problems = [f"missing {name}" for name in want if name not in got]
    problems += [f"unexpected {name}" for name in got if name not in want]
    for name in want:
        if name in got and tuple(got[name].shape) != tuple(want[name].shape):
            problems.append(f"{name} has shape {tuple(got[name].shape)}, not {tuple(want[name].shape)}")
        elif name in got and got[name].dtype != want[name].dtype:
            problems.append(f"{name} has dtype {got[name].dtype}, not {want[name].dtype}")
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(
            f"{what} must hold exactly the arrays of its network; got: {'; '.join(problems[:6])}{more}. {fix}"
        )


def save(
    path: str | os.PathLike, trainable: Trainable, spec: Mapping[str, Any], *, nets: Mapping[str, Any] = NETS
) -> None:
    """Write weights and their spec into one safetensors file, atomically: a reader never sees half a file.

    Args:
      path: the file; by custom it ends in `.safetensors`. Its folder must exist.
      trainable: the weights, those of the network that `spec` describes.
      spec: what `make_spec` returns.
      nets: name to network, see `create`.

    Raises:
      ValueError: if the weights do not fit the spec.
      FileNotFoundError: if the folder does not exist.
    """
    from safetensors.numpy import save as to_bytes

    spec = make_spec(**{k: v for k, v in spec.items() if k != "options"}, nets=nets, **(spec.get("options") or {}))
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in jax.device_get(_named(trainable)).items()}
    _compare(
        _named(_expected(spec, nets)),
        arrays,
        "weights",
        "Pass the spec that the network was created from, and float32 weights.",
    )
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of {path} must exist; got none. Create it first.")
    content = to_bytes(arrays, metadata={"schema": SCHEMA, "spec": json.dumps(spec, sort_keys=True)})
    atomic_write(path, lambda file: file.write(content))


def load(path: str | os.PathLike, *, nets: Mapping[str, Any] = NETS) -> tuple[Trainable, dict[str, Any]]:
    """Read a file that `save` wrote.

    Args:
      path: the file.
      nets: name to network, see `create`.

    Returns:
      The trainable and its spec.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, not of this library, or does not fit its spec.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights must be a file; got {path}, which is none. Check the path, or save them first."
        )
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} must be a whole safetensors file; got one that cannot be read ({error}). Copy or save it again."
        ) from error
    if metadata.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} must have schema {SCHEMA!r} in its metadata; got {metadata.get('schema')!r}. "
            "Arrays of another origin? Use from_torch_arrays, or fill a Trainable by hand."
        )
    try:
        spec = json.loads(metadata["spec"])
        expected = _expected(spec, nets)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must describe a network of this version; got a spec that fails: {error}. Save it again."
        ) from error
    _compare(_named(expected), arrays, str(path), "Save it again with the spec of its network.")
    return _fill(expected, arrays), spec


_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "gain": "gain",
}

_RESIDUAL = (
    (r"^block(\d+)\.layer\.", r"layer\1."),
    (r"\.convShortcut\.", ".shortcut."),
    (r"\.shortcut\.0\.", ".shortcut."),
    (r"^fc\.", "linear."),
)

_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "mlp": (),
    "cnn_small": ((r"^0\.", "conv1."), (r"^2\.", "conv2."), (r"^5\.", "dense1."), (r"^7\.", "dense2.")),
    "cnn_madry": ((r"^0\.", "conv1."), (r"^3\.", "conv2."), (r"^7\.", "dense1."), (r"^9\.", "dense2.")),
    "preact_resnet18": _RESIDUAL,
    "wide_resnet": ((r"^bn1\.", "bn."), *_RESIDUAL),
    "resnet50": ((r"\.downsample\.0\.", ".shortcut."), (r"\.downsample\.1\.", ".bn0."), (r"^fc\.", "linear.")),
}

_IGNORED = re.compile(r"(\.num_batches_tracked$|^sub_block1\.)")


def _rename(net: str, key: str) -> str:
    key = key.removeprefix("module.")
    if net == "mlp" and (linear := re.fullmatch(r"(\d+)\.(weight|bias)", key)):
        return f"layers.{(int(linear[1]) - 1) // 2}.{linear[2]}"  # Flatten, Linear, ReLU, Linear, ...
    for pattern, replacement in _RENAMES[net]:
        key = re.sub(pattern, replacement, key)
    return key


def _to_ours(name: str, value: np.ndarray, flat: tuple[str, tuple[int, ...]] | None) -> np.ndarray:
    """Bring one array of PyTorch into our layout."""
    if not name.endswith(".kernel"):
        return value
    if value.ndim == 4:  # [out, in, h, w] -> [h, w, in, out]
        return value.transpose(2, 3, 1, 0)
    if value.ndim == 2 and flat is not None and name == f"params.{flat[0]}.kernel" and flat[1]:
        pixels = int(np.prod(flat[1]))
        if value.shape[1] % pixels == 0:  # columns count (c, h, w) there, (h, w, c) here
            value = value.reshape(value.shape[0], -1, pixels).transpose(0, 2, 1).reshape(value.shape[0], -1)
    return value.T


def from_torch_arrays(spec: Mapping[str, Any], arrays: Mapping[str, Any]) -> Trainable:
    """Fill a network with the arrays of a PyTorch state dict, brought from channels-first to channels-last.

    Args:
      spec: what `make_spec` returns, with the options of the variant that the weights belong to.
      arrays: key of the state dict to array (`{k: v.numpy() for k, v in net.state_dict().items()}`). A prefix
        `module.` is dropped, `num_batches_tracked` and the unused copy `sub_block1` of the TRADES code are ignored.
        Accepted keys:

        | network | keys |
        | --- | --- |
        | `mlp` | `nn.Sequential(Flatten, Linear, ReLU, Linear, ...)`: `1.weight`, `1.bias`, `3.weight`, ... |
        | `cnn_small` | fast_adversarial's `mnist_net`: `0.*`, `2.*` convolutions, `5.*`, `7.*` linear |
        | `cnn_madry` | `nn.Sequential` with max pooling: `0.*`, `3.*` convolutions, `7.*`, `9.*` linear |
        | `preact_resnet18` | `conv1.*`, `layer1.0.bn1.*`, `layer2.0.shortcut.0.*`, `bn.*`, `linear.*`, ... |
        | `wide_resnet` | as above with `bn1` or `bn` at the end, or TRADES `block1.layer.0.*`, `convShortcut`, `fc` |
        | `resnet50` | torchvision's: `conv1.*`, `bn1.*`, `layer1.0.conv3.*`, `layer1.0.downsample.0.*`, `fc.*`, ... |

    Returns:
      The trainable.

    Raises:
      ValueError: if arrays are missing, unexpected, or of the wrong shape.
    """
    expected = _expected(spec)
    net, want = spec["name"], _named(expected)
    flat = NETS[net].flattened(spec["shape"])
    renamed: dict[str, Any] = {}
    for key, value in arrays.items():
        if not _IGNORED.search(key.removeprefix("module.")):
            renamed[_rename(net, key)] = np.asarray(value)
    ours = {}
    for name in want:
        _, *module, leaf = name.split(".")
        theirs = ".".join([*module, _LEAVES[leaf]])
        if theirs in renamed:
            ours[name] = _to_ours(name, renamed.pop(theirs), flat).astype(want[name].dtype)
    ours.update(renamed)  # what has no place here is reported under its own name
    _compare(want, ours, f"a state dict of {net}", "Another variant? Check shape, classes and options of the spec.")
    return _fill(expected, ours)
