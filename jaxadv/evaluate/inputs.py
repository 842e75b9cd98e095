"""What an evaluation is given: checked, brought to the host, named and marked.

What lives here: the checks of model, budgets and targets before anything is computed, and the fingerprints by which
data and runs are recognized. What does not: the evaluation (`engine`).
"""

import dataclasses
import hashlib
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import __version__
from jaxadv.core import Targets, Threat, as_callable, check, example_keys
from jaxadv.evaluate.verdict import Verdict, cut, host, judge

TARGET_RULES = ("random", "next", "least_likely")


class Problem(NamedTuple):
    """Checked arguments, on the host."""

    key: Any
    model: Any
    x: np.ndarray
    y: np.ndarray
    target: np.ndarray | None
    index: np.ndarray
    batch: int

    def goal(self, rows: Any = slice(None)) -> Any:
        """Return what the attacks on these rows are given in the place of `y`."""
        if self.target is None:
            return self.y[rows]
        return Targets(self.y[rows], self.target[rows])  # pyright: ignore[reportArgumentType]

    def judge(self, rows: np.ndarray, points: np.ndarray, threat: Threat, batch: int | None = None) -> Verdict:
        """Return the verdict on points for these rows, under a threat cut for them."""
        batch = self.batch if batch is None else batch
        return judge(self.model, points, self.x[rows], self.goal(rows), host(threat), batch)


def check_model(model: Any, x: np.ndarray) -> int:
    """Trace the model once on abstract values.

    Args:
      model: logits from a batch.
      x: `[n, ...]` examples.

    Returns:
      The number of classes.

    Raises:
      ValueError: if the model does not take such a batch, with a guess why, or returns no logits.
    """
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    try:
        out = jax.eval_shape(model, shape)
    except Exception as error:
        hint = "Examples of another data set, or a model that takes keyword arguments?"
        if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
            hint = "This looks like channels first (NCHW); images are [b, h, w, c]: pass x.transpose(0, 2, 3, 1)."
        elif x.ndim == 4:
            hint = "A model that wants channels first (NCHW)? Transpose inside the model: x.transpose(0, 3, 1, 2)."
        elif x.ndim in (2, 3):
            hint = "A model that wants images [b, h, w, c]? Reshape x, or reshape inside the model."
        short = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ValueError(
            f"the model must take a batch of shape {x.shape}; it raised {type(error).__name__}: {short}. {hint}"
        ) from error
    check.logits(out, x.shape[0])
    return int(out.shape[1])


def check_curve(threat: Threat, eps_curve: Sequence[float]) -> tuple[float, ...]:
    """Return the budgets to evaluate, rising; the threat's own is among them if there is a curve.

    Args:
      threat: the allowed set.
      eps_curve: further budgets.

    Returns:
      The budgets.

    Raises:
      ValueError: on budgets that are not positive, or a threat without one number as its budget.
    """
    names = [f.name for f in dataclasses.fields(threat)] if dataclasses.is_dataclass(threat) else []
    for eps in eps_curve:
        check.positive("every eps of eps_curve", eps, "The accuracy at 0 is the clean accuracy.")
    if len(eps_curve) and ("eps" not in names or np.ndim(threat.eps)):
        raise ValueError(
            f"eps_curve needs a threat with one number as its budget; got {threat.norm!r}. Evaluate each budget by "
            f"itself."
        )
    main = float(np.max(np.asarray(threat.eps)))
    return tuple(sorted({float(e) for e in eps_curve if not math.isclose(e, main, rel_tol=1e-6)} | {main}))


def choose_targets(
    targets: Any, key: Any, y: np.ndarray, index: np.ndarray, logits: np.ndarray
) -> tuple[np.ndarray, str]:
    """Return the target class of every example and the name of the rule.

    Args:
      targets: int `[n]`, or a rule of `TARGET_RULES`.
      key: a typed key.
      y: int `[n]` labels.
      index: int `[n]` dataset indices.
      logits: `[n, k]` clean logits.

    Returns:
      int32 `[n]`, and the name.

    Raises:
      ValueError: on an unknown rule, or a target that is the label.
    """
    k = logits.shape[1]
    if not isinstance(targets, str):
        check.labels(targets, len(y), k, name="targets")
        target, rule = np.asarray(targets, np.int32), "given"
    else:
        rule = check.choice("rule for targets", targets, TARGET_RULES)
        if rule == "next":
            target = (y + 1) % k
        elif rule == "random":
            keys = example_keys(key, "targets", jnp.asarray(index))
            draw = np.asarray(jax.vmap(lambda one: jax.random.randint(one, (), 1, k))(keys))
            target = (y + draw) % k
        else:
            others = np.where(np.arange(k) == y[:, None], np.inf, np.nan_to_num(logits, nan=np.inf))
            target = others.argmin(-1)
    same = np.flatnonzero(target == y)
    if len(same):
        raise ValueError(
            f"targets must differ from the labels; got the label itself for {len(same)} examples, first at row "
            f"{same[0]}. "
            "Leave those examples out, or pass targets='next'."
        )
    return target.astype(np.int32), rule


def data_entry(data: Any, problem: Problem, classes: int) -> dict[str, Any]:
    """Return name and fingerprint of the examples for the report.

    Args:
      data: a name, a mapping or a source with `name` and `split`.
      problem: the examples.
      classes: number of classes.

    Returns:
      The entry.
    """
    get = data.get if isinstance(data, Mapping) else lambda name, default: getattr(data, name, default)
    name, split = (data, "") if isinstance(data, str) else (str(get("name", "")), str(get("split", "")))
    mark = hashlib.sha256(repr((problem.x.shape, classes)).encode())
    for array in (problem.x, problem.y, problem.index):
        mark.update(np.ascontiguousarray(array).tobytes())
    shape = list(problem.x.shape[1:])
    out = {"name": name, "split": split, "n": len(problem.x), "shape": shape, "classes": classes}
    return out | {"fingerprint": mark.hexdigest()[:16]}


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    own = {"jaxadv": __version__, "jax": jax.__version__}
    return own | {"numpy": np.__version__, "python": platform.python_version()}


def problem_of(
    key: Any, model: Any, x: Any, y: Any, threat: Threat, index: Any, batch_size: int
) -> tuple[Problem, int]:
    """Check the arguments and bring them to the host.

    Args:
      key: a typed key.
      model: logits from a batch.
      x: float `[n, ...]` examples.
      y: int `[n]` labels.
      threat: the allowed set.
      index: int `[n]` dataset indices, or None.
      batch_size: rows of a forward pass.

    Returns:
      The problem and the number of classes.

    Raises:
      ValueError: on impossible values.
      TypeError: on an untyped key, another thing than a threat, or wrong dtypes.
    """
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
        raise TypeError(f"key must be one typed key; got {type(key).__name__}. Pass jax.random.key(0).")
    if not isinstance(threat, Threat):
        raise TypeError(f"threat must be a Threat; got {type(threat).__name__}. Pass threats.linf(8 / 255).")
    check.whole("batch_size", batch_size)
    check.positive("eps", threat.eps, "For no attack at all report the clean accuracy.")
    x = np.asarray(x)
    check.inputs(x)
    x = np.ascontiguousarray(x, np.float32)
    low, high = (np.asarray(b, np.float32) for b in threat.bounds)
    check.inputs(x, (low, high))
    y = np.asarray(y)
    check.labels(y, len(x))
    cut(threat, np.zeros(1, int), len(x))
    model = as_callable(model)
    classes = check_model(model, x[: min(batch_size, len(x))])
    check.labels(y, len(x), classes)
    index = np.arange(len(x)) if index is None else np.asarray(index)
    check.labels(index, len(x), name="index")
    problem = Problem(key, model, x, y.astype(np.int32), None, index.astype(np.int32), min(batch_size, len(x)))
    return problem, classes
