"""A model that is only a function on the host: `black_box`. It answers queries and has no gradients.

What does not live here: networks in jax (`adapt`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv.core import Model, check
from jaxadv.models.adapt import Static

Partial = jax.tree_util.Partial


@jax.custom_jvp
def _host(static: Static, x):
    fn, classes = static.values
    kind = jax.ShapeDtypeStruct((x.shape[0], classes), jnp.promote_types(x.dtype, jnp.float32))

    def called(points):
        logits = np.asarray(fn(np.asarray(points)), kind.dtype)
        if logits.shape != kind.shape:
            raise ValueError(
                f"the function must return logits of shape {list(kind.shape)}; got {list(logits.shape)}. "
                "Is `classes` what it returns for each example?"
            )
        return logits

    return jax.pure_callback(called, kind, x, vmap_method="sequential")


@_host.defjvp
def _no_gradient(primals, tangents):
    raise TypeError(
        "a gradient was asked of a model that is a function on the host; it has none. Use an attack that asks for "
        "logits or decisions only (square, simba, hopskipjump, ...), or estimate gradients: attacks.estimated(attack)."
    )


def black_box(fn: Any, classes: int) -> Model:
    """Take a function on the host as a model that answers and gives no gradients, as a remote service does.

    It works inside `jit`, loops and slots: the program stops at each query and calls the function with all rows.

    Args:
      fn: numpy `[b, ...]` to logits `[b, classes]` (log-probabilities serve as well); deterministic. One object for all
        calls, since each new lambda compiles anew. Rows that a search has finished may be among those asked.
      classes: number of classes.

    Returns:
      The model. Asking it for a gradient raises a `TypeError`.

    Raises:
      TypeError: if `fn` cannot be called, or hashed.
      ValueError: with fewer than two classes; when called, if the logits have another shape.
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable as fn(x) on numpy arrays; got {type(fn).__name__}. Arguments swapped?")
    check.whole("classes", classes, least=2)
    return Partial(_host, Static(fn, int(classes)))
