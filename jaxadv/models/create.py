"""The bundled networks by name, and the description (`spec`) from which a network is built again.

A spec is a plain dict that survives JSON: `name`, `shape`, `classes`, `mean`, `std`, `options`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from jaxadv.core import Trainable, check
from jaxadv.models.adapt import trainable
from jaxadv.models.bottlenecks import ResNet50
from jaxadv.models.nets import MLP, MadryCNN, Net, SmallCNN
from jaxadv.models.resnets import PreActResNet18, PrivateWideResNet, WideResNet
from jaxadv.models.vit import ViT

Builder = Callable[..., Net | Trainable]
"""A class of networks, or a function of what such a class takes that returns a trainable."""

NETS: dict[str, Builder] = {
    "mlp": MLP,
    "cnn_small": SmallCNN,
    "cnn_madry": MadryCNN,
    "preact_resnet18": PreActResNet18,
    "resnet50": ResNet50,
    "wide_resnet": WideResNet,
    "wide_resnet_private": PrivateWideResNet,
    "vit": ViT,
}
"""Name of a network to its class or builder."""

_COMMON = ("self", "shape", "classes", "mean", "std", "rngs")
_SPEC = ("name", "shape", "classes", "mean", "std", "options")


def create(
    name: str, key, *, shape: Sequence[int], classes: int, mean=None, std=None, nets: Mapping[str, Builder] = NETS,
    **options: Any,
) -> Trainable:  # fmt: skip
    """Build a bundled network with fresh weights.

    Args:
      name: one of `NETS`.
      key: a typed key.
      shape: shape of one example, channels last, e.g. (28, 28, 1).
      classes: number of classes.
      mean: subtracted inside the network, one number or one for each channel; None for 0.
      std: divides after that; None for 1.
      nets: name to network; other rooms have tables of their own.
      **options: of the network, e.g. `width=16`, `norm='group'`; see the classes in `NETS`. Weights are drawn by
        `init='torch'` (PyTorch's default, the default) or `init='kaiming_normal'`.

    Returns:
      The trainable; `model(...)` of it is the model to evaluate.

    Raises:
      ValueError: on an unknown name or option (the message names the nearest or the valid ones), or an impossible
        value.
    """
    net = check.choice("network", name, nets)
    made_by = net.__init__ if isinstance(net, type) else net
    valid = [option for option in inspect.signature(made_by).parameters if option not in _COMMON]
    for option in options:
        if option not in valid:
            raise ValueError(f"{name} must get options it has; got {option!r}. Valid: {', '.join(valid)}.")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    made = net(tuple(shape), classes, mean, std, **options, rngs=nnx.Rngs(key))
    return made if isinstance(made, Trainable) else trainable(made)


def make_spec(
    name: str, *, shape: Sequence[int], classes: int, mean=None, std=None, nets: Mapping[str, Builder] = NETS,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Describe a network by the arguments of `create`, as plain values that survive JSON.

    Args:
      name: one of `NETS`.
      shape: shape of one example.
      classes: number of classes.
      mean: see `create`.
      std: see `create`.
      nets: see `create`.
      **options: see `create`.

    Returns:
      The spec.

    Raises:
      ValueError: if the name is unknown.
    """
    check.choice("network", name, nets)

    def plain(value):
        if value is None or isinstance(value, (bool, str)):
            return value
        if hasattr(value, "tolist"):
            value = value.tolist()
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return {
        "name": name,
        "shape": [int(n) for n in shape],
        "classes": int(classes),
        "mean": plain(mean),
        "std": plain(std),
        "options": {k: plain(v) for k, v in options.items()},
    }


def from_spec(spec: Mapping[str, Any], key, *, nets: Mapping[str, Builder] = NETS) -> Trainable:
    """Build the network that a spec describes, with fresh weights.

    Args:
      spec: what `make_spec` returns; `mean`, `std` and `options` may be left out.
      key: a typed key.
      nets: see `create`.

    Returns:
      The trainable.

    Raises:
      ValueError: if entries are missing or unknown, or `create` refuses.
    """
    lacking = [k for k in ("name", "shape", "classes") if k not in spec]
    unknown = [k for k in spec if k not in _SPEC]
    if lacking or unknown:
        raise ValueError(
            f"a spec must have name, shape and classes, and may have mean, std and options; got {sorted(spec)}. "
            "Build it with jaxadv.models.make_spec."
        )
    return create(
        spec["name"],
        key,
        shape=spec["shape"],
        classes=spec["classes"],
        mean=spec.get("mean"),
        std=spec.get("std"),
        nets=nets,
        **(spec.get("options") or {}),
    )
