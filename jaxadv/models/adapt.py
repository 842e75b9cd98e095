"""The border: how a network of any framework becomes a pure function and a pytree.

What lives here: `trainable` (NNX module to `Trainable`), `model` (`Trainable` to `Model`), and the doors for networks
that are only evaluated: `from_nnx`, `from_linen`, `from_equinox`, `pure`. What does not: the networks, and files of
weights.

One idea: everything static (the graph of a module) goes into a hashable object that is a pytree without leaves,
everything else is leaves, and the function itself is one function of this file. So two networks of one architecture
have the same tree structure, and a program compiled for one serves the other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxadv.core import Model, Trainable, check
from jaxadv.models.norms import BN_MODES, Call, configure
from jaxadv.models.taps import recorded

Partial = jax.tree_util.Partial
_Path = tuple[Any, ...]


@jax.tree_util.register_static
class Static:
    """Hashable values as a pytree without leaves. The hash is computed once: graphs of deep networks are long.

    Args:
      *values: hashable values.
    """

    __slots__ = ("_hash", "values")

    def __init__(self, *values: Any):
        self.values = values
        self._hash = hash(values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Static) and self._hash == other._hash and self.values == other.values
        )

    def __repr__(self) -> str:
        return f"Static({', '.join(type(v).__name__ for v in self.values)})"


def flatten(tree: Mapping[Any, Any], above: _Path = ()) -> dict[_Path, Any]:
    """List the leaves of nested dicts by path.

    Args:
      tree: nested dicts.
      above: path of `tree` itself.

    Returns:
      Path (tuple of keys) to leaf.
    """
    leaves = {}
    for name, value in tree.items():
        below = (*above, name)
        leaves.update(flatten(value, below) if isinstance(value, Mapping) else {below: value})
    return leaves


def unflatten(leaves: Mapping[_Path, Any]) -> dict[Any, Any]:
    """Build nested dicts from their leaves; the inverse of `flatten` up to empty dicts.

    Args:
      leaves: path to leaf.

    Returns:
      Nested dicts.
    """
    tree: dict[Any, Any] = {}
    for path, value in leaves.items():
        at = tree
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = value
    return tree


def _text(path: _Path) -> _Path:
    return tuple(map(str, path))


def _noise(entries, key, axis_name) -> dict[_Path, Any]:
    """Return fresh values for the random streams of flax's own layers: keys derived from `key`, counters at zero."""
    if not entries:
        return {}
    key = jax.random.key(0) if key is None else key
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    made = {}
    for number, (path, is_key, shape) in enumerate(entries):
        stream = jax.random.fold_in(key, number)
        made[path] = (
            jnp.zeros(shape, jnp.uint32) if not is_key else jax.random.split(stream, shape) if shape else stream
        )
    return made


def _merge(graph: Static, params, state, key=None, axis_name=None):
    """Rebuild the module that `graph` describes with the given variables."""
    graphdef, paths, noise = graph.values
    given = {**flatten(params), **flatten(state)}
    names = dict(paths)
    if given.keys() != names.keys():
        lacking, extra = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
        raise ValueError(
            "params and state must be those of this network; "
            f"got missing {['.'.join(p) for p in lacking[:5]]}, unexpected {['.'.join(p) for p in extra[:5]]}. "
            "Take both from the same Trainable as apply."
        )
    leaves = {names[path]: value for path, value in given.items()}
    return nnx.merge(graphdef, unflatten({**leaves, **_noise(noise, key, axis_name)}))


def _variables(module, wanted) -> dict[_Path, Any]:
    return flatten(nnx.to_pure_dict(nnx.state(module, wanted)))


def apply(
    graph: Static,
    params,
    state,
    x,
    *,
    bn: str = "eval",
    bn_groups: int = 1,
    axis_name: Any = None,
    mask=None,
    key=None,
    taps: Sequence[str] = (),
    hints: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Call an NNX module as a pure function; `Trainable.apply` is this with the graph filled in.

    Computes in the dtype of `params` and `x`; batch statistics are float32 in any case, and so are the logits at least.

    Args:
      graph: the static part of the module.
      params: nested dicts of trained arrays.
      state: nested dicts of other arrays (running statistics).
      x: `[b, ...]` inputs in the range of the data.
      bn: `'eval'` running statistics; `'train'` batch statistics and updated state; `'local'` batch statistics, same
        state.
      bn_groups: number of contiguous groups of the global batch with statistics of their own.
      axis_name: mapped axis over which batch statistics are global.
      mask: bool `[b]`; rows that are False are replaced by zeros at the input and stay out of the statistics.
      key: typed key of dropout; None switches dropout off.
      taps: layers whose values are returned beside the logits, see `taps.recorded`.
      hints: what layers that ask for it are told, by name, e.g. the labels (`channels.Gate`).

    Returns:
      Logits `[b, k]` and the state: the given one unless `bn='train'`. With `taps`, the pair of the logits and a dict
      from names to values in the place of the logits.

    Raises:
      ValueError: on an unknown mode, groups that do not divide the batch, a mask of another shape, foreign params, or
        taps that name no layer.
    """
    check.choice("bn mode", bn, BN_MODES)
    check.whole("bn_groups", bn_groups)
    x = jnp.asarray(x)
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.shape != x.shape[:1] or mask.dtype != bool:
            raise ValueError(
                f"mask must be bool[{x.shape[0]}], one for each row; got {mask.dtype}{list(mask.shape)}. "
                "Numbers? Pass mask > 0."
            )
        x = jnp.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x))
    module = _merge(graph, params, state, key, axis_name)
    configure(module, Call(bn, bn_groups, axis_name, mask, key, hints or {}))
    with recorded(module, taps) as seen:
        logits = module(x)
    if jnp.issubdtype(logits.dtype, jnp.floating):
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    out = (logits, seen()) if taps else logits
    if bn != "train" or not state:
        return out, state
    new = {_text(path): value for path, value in _variables(module, nnx.Not(nnx.Param)).items()}
    return out, unflatten({path: new[path] for path in flatten(state)})


def trainable(module: Any) -> Trainable:
    """Turn an NNX module, called as `module(x)`, into a pure `apply` with parameters and state.

    `params` holds the variables of type `nnx.Param`, `state` the others except random streams; both are nested dicts
    with string keys. Layers of jaxadv follow all keywords of `apply`; flax's `nnx.BatchNorm` follows `bn` and
    `axis_name`, flax's dropout is random if and only if `key` is given. The module itself is not changed.

    Args:
      module: any NNX module.

    Returns:
      The trainable. Its `apply` is a pytree without leaves: equal architectures share compiled programs.

    Raises:
      TypeError: if `module` is not an NNX module, or holds static attributes that cannot be hashed.
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"module must be a flax NNX module; got {type(module).__name__}. "
            "For other networks: from_linen, from_equinox, or pure(function, params)."
        )
    graphdef, params, noise, state = nnx.split(module, nnx.Param, nnx.RngState, ...)
    params, noise, state = (flatten(nnx.to_pure_dict(part)) for part in (params, noise, state))
    streams = tuple((path, jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key), leaf.shape) for path, leaf in noise.items())
    try:
        graph = Static(graphdef, tuple((_text(path), path) for path in (*params, *state)), streams)
    except TypeError as error:
        raise TypeError(
            f"static attributes of {type(module).__name__} must be hashable; got {error}. "
            "Use tuples for lists, nnx.List for lists of modules, and nnx.Variable for arrays."
        ) from error
    text_params, text_state = ({_text(path): leaf for path, leaf in part.items()} for part in (params, state))
    return Trainable(Partial(apply, graph), unflatten(text_params), unflatten(text_state))


def _logits(apply_fn, params, state, x):
    return apply_fn(params, state, x, bn="eval")[0]


def model(trainable: Trainable) -> Model:
    """Return the model that a trainable is in evaluation: running statistics, no dropout.

    Args:
      trainable: apply, params and state. An `apply` that is not a pytree (a plain function) should live at module
        level, else every new one compiles anew.

    Returns:
      Logits from a batch, as a callable pytree; new weights of the same architecture do not compile again.
    """
    fn = trainable.apply if isinstance(trainable.apply, Partial) else Partial(trainable.apply)
    return Partial(_logits, fn, trainable.params, trainable.state)


def _value(apply_fn, tap: Static, params, state, x):
    (_, seen), _ = apply_fn(params, state, x, bn="eval", taps=tap.values)
    (value,) = seen.values()
    return value.reshape(x.shape[0], -1)


def features(trainable: Trainable, *, at: str) -> Model:
    """Return what passes through a layer of a network in evaluation, as a function of the input.

    Args:
      trainable: a network whose `apply` knows `taps`.
      at: one tap, see `apply`: `'linear:in'` is what the layer `linear` is given.

    Returns:
      Flat features `[b, d]` from a batch, as a callable pytree.
    """
    fn = trainable.apply if isinstance(trainable.apply, Partial) else Partial(trainable.apply)
    return Partial(_value, fn, Static(at), trainable.params, trainable.state)


def pure(fn: Any, *variables: Any) -> Model:
    """Take a function `fn(*variables, x) -> logits` as a model.

    Args:
      fn: a pure function; one that lives at module level, since each new lambda compiles anew.
      *variables: pytrees of arrays that come before `x`, usually one: the parameters.

    Returns:
      The model.

    Raises:
      TypeError: if `fn` cannot be called.
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable as fn(*variables, x); got {type(fn).__name__}. Arguments swapped?")
    return Partial(fn, *variables)


def from_nnx(module: Any) -> Model:
    """Take an NNX module, called as `module(x)`, as a model: running statistics, no dropout.

    Args:
      module: any NNX module; it is not changed.

    Returns:
      The model.

    Raises:
      TypeError: see `trainable`.
    """
    return model(trainable(module))


def _call_linen(static: Static, variables, x):
    module, fixed = static.values
    return module.apply(variables, x, **dict(fixed))


def from_linen(module: Any, variables: Mapping[str, Any], **fixed: Any) -> Model:
    """Take a linen module as a model.

    Args:
      module: a `flax.linen` module.
      variables: its collections, `{'params': ..., 'batch_stats': ...}`.
      **fixed: keywords of the call that put it into evaluation, e.g. `train=False` or `use_running_average=True`.

    Returns:
      The model.

    Raises:
      TypeError: if `module` is no linen module, or a keyword cannot be hashed.
      ValueError: if variables lack `'params'` though there are some, or `mutable` is among the keywords.
    """
    import flax.linen as nn

    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a flax.linen module; got {type(module).__name__}. NNX? Use from_nnx.")
    if "mutable" in fixed:
        raise ValueError(
            "a model must not change variables; got mutable. Leave it out and pass what selects evaluation."
        )
    if variables and not any(k in variables for k in ("params", "batch_stats")):
        raise ValueError(
            f"variables must be the collections that init returned; got {sorted(variables)[:5]}. "
            "Only the parameters? Pass {'params': variables}."
        )
    try:
        static = Static(module, tuple(sorted(fixed.items())))
    except TypeError as error:
        raise TypeError(
            f"the module's fields and the fixed keywords must be hashable; got {error}. Use tuples."
        ) from error
    return Partial(_call_linen, static, dict(variables))


def _call_equinox(static: Static, arrays, state, x):
    import equinox as eqx

    leaves, structure, per_example, channels_first = static.values
    module = eqx.combine(arrays, jax.tree.unflatten(structure, leaves))
    x = jnp.asarray(x)
    if channels_first:
        x = jnp.moveaxis(x, -1, 1)
    if state is None:
        return jax.vmap(module)(x) if per_example else module(x)
    if per_example:
        return jax.vmap(module, in_axes=(0, None), out_axes=(0, None))(x, state)[0]
    return module(x, state)[0]


def from_equinox(module: Any, state: Any = None, *, per_example: bool = True, channels_first: bool = False) -> Model:
    """Take an equinox module as a model, in its inference mode (no dropout, running statistics).

    Args:
      module: an equinox module, called as `module(x)`, or as `module(x, state)` if it is stateful.
      state: the `eqx.nn.State` of a stateful module (batch normalization); None if it has none.
      per_example: whether the module takes one example (equinox's custom, the default) or a batch.
      channels_first: whether it takes images as `[c, h, w]`, as equinox's convolutions do; `x` stays `[b, h, w, c]`.

    Returns:
      The model.

    Raises:
      TypeError: if `module` is no equinox module, or holds a static value that cannot be hashed.
      ValueError: if the module is stateful and no state is given.
    """
    import equinox as eqx

    if not isinstance(module, eqx.Module):
        raise TypeError(f"module must be an equinox module; got {type(module).__name__}. A function? Use pure.")
    stateful = any(
        isinstance(part, eqx.nn.StateIndex)
        for part in jax.tree.leaves(module, is_leaf=lambda part: isinstance(part, eqx.nn.StateIndex))
    )
    if stateful and state is None:
        raise ValueError(
            "a stateful equinox module must come with its state; got state=None. "
            "Pass the state that eqx.nn.make_with_state and training gave: from_equinox(module, state)."
        )
    arrays, rest = eqx.partition(eqx.nn.inference_mode(module), eqx.is_array)
    leaves, structure = jax.tree.flatten(rest)
    try:
        static = Static(tuple(leaves), structure, per_example, channels_first)
    except TypeError as error:
        raise TypeError(f"what is not an array in the module must be hashable; got {error}. Use tuples.") from error
    return Partial(_call_equinox, static, arrays, state)
