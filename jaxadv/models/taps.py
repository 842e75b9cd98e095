"""Looking into a network: the values of layers by name, without a change of the network's code.

What lives here: `recorded`, which `adapt.apply` opens around a call, and the names of layers. What does not: values
told to layers (`norms.Call.hints`).
"""

import contextlib
import difflib
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flax import nnx

GIVEN = ":in"
"""Ends the name of a tap that records what a layer is given in the place of what it returns."""


class _Tapped:
    """A layer that tells what passes through it; everything else is the layer's."""

    def __init__(self, layer: Any, tell: Callable):
        self._layer, self._tell = layer, tell

    def __call__(self, *args: Any, **settings: Any) -> Any:
        out = self._layer(*args, **settings)
        self._tell(args[0] if args else None, out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def layers(module: nnx.Module) -> dict[str, Any]:
    """List the layers of a module by name.

    Args:
      module: any NNX module.

    Returns:
      Name, the path joined by dots (`'layer4.0.conv1'`), to layer.
    """
    named = ((".".join(map(str, path)), part) for path, part in nnx.iter_modules(module) if path)
    return {name: part for name, part in named if not isinstance(part, nnx.List)}


@contextlib.contextmanager
def recorded(module: nnx.Module, taps: Sequence[str]) -> Iterator[Callable[[], dict[str, Any]]]:
    """Record what layers are given or return while a module is called.

    | tap | value |
    | --- | --- |
    | `'conv1'` | what the layer `conv1` returns |
    | `'linear:in'` | what the layer `linear` is given: the features, if it is the last one |
    | `'layer4.*.gate.scores'` | all layers whose names match, as shells match file names |

    Args:
      module: lives for this call only; it is changed while the context is open.
      taps: names of layers, patterns of names, each perhaps followed by `:in`.

    Yields:
      A function without arguments; after the call it returns a dict from names (not patterns) to values.

    Raises:
      ValueError: if a tap matches no layer; when the values are asked for, if a layer was not called exactly once.
    """
    if not taps:
        yield dict
        return
    known, values, replaced = layers(module), {}, []
    wanted: dict[str, list[str]] = {}
    for tap in taps:
        pattern = tap.removesuffix(GIVEN)
        matching = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            near = difflib.get_close_matches(pattern, known, 3, 0.4) or list(known)[:8]
            raise ValueError(f"a tap must name a layer; got {tap!r}. Did you mean {', '.join(map(repr, near))}?")
        for name in matching:
            wanted.setdefault(name, []).append(name + tap[len(pattern) :])
    counts = dict.fromkeys(wanted, 0)

    def listener(name):
        def tell(given, out):
            counts[name] += 1
            values.update({key: given if key.endswith(GIVEN) else out for key in wanted[name]})

        return tell

    try:
        for name in wanted:
            *above, last = name.split(".")
            parent = known[".".join(above)] if ".".join(above) in known else _inside(module, above)
            replaced.append((parent, last, known[name]))
            object.__setattr__(parent, last, _Tapped(known[name], listener(name)))
        yield lambda: _once(values, counts)
    finally:
        for parent, last, layer in replaced:
            object.__setattr__(parent, last, layer)


def _inside(module: Any, path: Sequence[str]) -> Any:
    for name in path:
        module = getattr(module, name)
    return module


def _once(values: dict[str, Any], counts: dict[str, int]) -> dict[str, Any]:
    wrong = {name: n for name, n in counts.items() if n != 1}
    if wrong:
        raise ValueError(
            f"a tapped layer must be called exactly once in a call of the network; got {wrong}. "
            "Tap the layers around it."
        )
    return values
