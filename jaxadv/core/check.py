"""Argument checks with one voice: what must hold; what was got; the usual cause or fix.

Shapes, dtypes and static settings are refused at trace time. Values are looked at only when they are concrete: under
`jit` they become flags in results and reports, never errors inside compiled code.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jax.core import Tracer


def concrete(value: Any) -> np.ndarray | None:
    """Return the value as a numpy array if it is known now, else None (a traced value).

    Args:
      value: a number, a numpy array or a jax array.

    Returns:
      The array, or None under a transformation.
    """
    return None if isinstance(value, Tracer) else np.asarray(value)


def _got(value: Any) -> str:
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"


def labels(y: Any, batch: int | None = None, classes: int | None = None, name: str = "y") -> None:
    """Refuse labels that are not integers of shape [b] in [0, classes).

    Args:
      y: the labels.
      batch: how many rows there must be, or None.
      classes: number of classes, or None.
      name: the argument's name for the message.

    Raises:
      ValueError: on one-hot labels, wrong length, or labels outside [0, classes).
      TypeError: on labels that are not integers.
    """
    y = y if hasattr(y, "dtype") else np.asarray(y)
    if y.ndim == 2:
        raise ValueError(
            f"{name} must be integer labels of shape [b]; got {_got(y)}. One-hot labels? Pass {name}.argmax(-1). "
            "Mixed or smoothed ones? Take an objective or loss that knows them."
        )
    if y.ndim != 1:
        raise ValueError(f"{name} must be integer labels of shape [b]; got {_got(y)}. Pass one label for each example.")
    if not np.issubdtype(y.dtype, np.integer):
        raise TypeError(
            f"{name} must be integer labels of shape [b]; got {_got(y)}. "
            f"Float labels? Pass {name}.astype('int32') if they count classes."
        )
    if batch is not None and y.shape[0] != batch:
        raise ValueError(
            f"{name} must have one label for each of the {batch} examples; got {_got(y)}. Slice both alike."
        )
    known = concrete(y)
    if known is not None and known.size and classes is not None:
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"{name} must lie in [0, {classes}) for a model of {classes} classes; got labels {low} to {high}. "
                "Labels that start at 1, or another data set than the model was trained on?"
            )


def inputs(x: Any, bounds: tuple[Any, Any] | None = None, name: str = "x") -> None:
    """Refuse inputs that are empty, not floating point, not finite, or outside the bounds.

    Args:
      x: `[b, ...]` the examples.
      bounds: lowest and highest allowed value, or None.
      name: the argument's name for the message.

    Raises:
      ValueError: on an empty set, missing batch axis, non-finite values, or values outside the bounds.
      TypeError: on integers.
    """
    x = x if hasattr(x, "dtype") else np.asarray(x)
    if x.ndim < 2:
        raise ValueError(
            f"{name} must be a batch of shape [b, ...]; got {_got(x)}. A single example? Pass {name}[None]."
        )
    if x.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one example; got {_got(x)}. An empty selection?")
    if not np.issubdtype(x.dtype, np.floating) and str(x.dtype) != "bfloat16":
        raise TypeError(
            f"{name} must be floating point in the range of the data; got {_got(x)}. Pass {name} / 255 for bytes."
        )
    known = concrete(x)
    if known is None:
        return
    low, high = float(known.min()), float(known.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{name} must be finite; got values from {low} to {high}. Remove or repair those rows first.")
    if bounds is None:
        return
    least, most = concrete(bounds[0]), concrete(bounds[1])
    if least is None or most is None:
        return
    if np.any(known < least) or np.any(known > most):
        raise ValueError(
            f"{name} must lie within bounds [{float(least.min()):g}, {float(most.max()):g}]; "
            f"got values from {low:g} to {high:g}. "
            "Pass the data before any normalization (it belongs inside the model), or give the threat its bounds."
        )


def logits(z: Any, batch: int | None = None, name: str = "the model's output") -> None:
    """Refuse a model output that is not floating-point logits of shape [b, k] with k >= 2.

    Args:
      z: what the model returned.
      batch: how many rows there must be, or None.
      name: what to call it in the message.

    Raises:
      ValueError: on any other shape or dtype.
    """
    if not hasattr(z, "ndim") or z.ndim != 2 or (batch is not None and z.shape[0] != batch) or z.shape[-1] < 2:
        got = _got(z) if hasattr(z, "dtype") else type(z).__name__
        want = "b" if batch is None else str(batch)
        raise ValueError(
            f"{name} must be logits of shape [{want}, k] with k >= 2; got {got}. "
            "Return the logits alone, batch first; a binary score s becomes stack([0 * s, s], -1)."
        )
    if not np.issubdtype(z.dtype, np.floating) and str(z.dtype) != "bfloat16":
        raise ValueError(f"{name} must be floating-point logits; got {_got(z)}. Return scores, not class numbers.")


def positive(name: str, value: Any, hint: str = "") -> None:
    """Refuse a number that is not finite and greater than zero. Traced values pass.

    Args:
      name: the argument's name.
      value: a number or an array.
      hint: what to do instead, added to the message.

    Raises:
      ValueError: if a known value is zero, negative, NaN or infinite.
    """
    known = concrete(value)
    if known is None:
        return
    if known.size == 0 or not np.all(np.isfinite(known)) or np.any(known <= 0):
        raise ValueError(f"{name} must be finite and greater than 0; got {value}.{' ' + hint if hint else ''}")


def not_negative(name: str, value: Any, hint: str = "") -> None:
    """Refuse a number that is negative or not finite. Traced values pass.

    Args:
      name: the argument's name.
      value: a number or an array.
      hint: what is usual, added to the message.

    Raises:
      ValueError: if a known value is negative, NaN or infinite.
    """
    known = concrete(value)
    if known is not None and not np.all((known >= 0) & (known < np.inf)):
        raise ValueError(f"{name} must be finite and at least 0; got {value}.{' ' + hint if hint else ''}")


def fraction(name: str, value: float) -> None:
    """Refuse what is no share of a run.

    Args:
      name: the argument's name.
      value: a number.

    Raises:
      ValueError: if it does not lie in [0, 1].
    """
    if not 0 <= value <= 1:
        raise ValueError(
            f"{name} must be a fraction of the steps in [0, 1]; got {value}. Divide by the number of steps."
        )


def whole(name: str, value: Any, least: int = 1) -> None:
    """Refuse a count that is not a whole number of at least `least`.

    Args:
      name: the argument's name.
      value: the count.
      least: the smallest allowed value.

    Raises:
      ValueError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}. Pass int({name})?")


def choice(what: str, name: Any, table: Mapping[str, Any] | Iterable[str]) -> Any:
    """Look a name up in a table.

    Args:
      what: what the table holds, for the message ("attack", "recipe").
      name: the wanted name.
      table: name to thing, or just the names.

    Returns:
      The thing (or the name itself where the table has names only).

    Raises:
      ValueError: if the name is unknown; the message offers the nearest ones and lists all.
    """
    names = sorted(table)
    if name in names:
        return table[name] if isinstance(table, Mapping) else name
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    offer = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}.{offer} Known: {', '.join(names)}.")
