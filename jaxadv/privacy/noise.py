"""Noise on a clipped sum: one draw for each update, the same on all replicas.

What lives here: independent Gaussian noise, and correlated noise through jax-privacy, both as optax transformations
that stand first in the optimizer's chain. What does not: how much noise (`plan.py` derives it from the sensitivity of
the clip), and the clip.

The noise stage runs after the sum over shards, on a state that is the same everywhere, so every replica draws the same
noise and it is added once. Its state is a key and a counter, is saved with the optimizer's, and repeats its bits after
a resume. Samples are float32: the mathematics of a real-valued Gaussian is idealized, as in all libraries of this kind.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxadv import parallel
from jaxadv.core import PyTree, check
from jaxadv.privacy.accounting import missing


def add_noise(key, tree: PyTree, std: Any, *, axis_name: parallel.AxisName = None) -> PyTree:
    """Add independent Gaussian noise to every number of a pytree.

    Args:
      key: a typed key, secret, used for one update only; the same on all shards.
      tree: what is released; each leaf draws its own noise, named by its path.
      std: standard deviation, at least 0; 0 returns the tree.
      axis_name: the mapped axis if each shard holds **its own part of the parameters**: then the parts draw different
        noise. None where all shards hold the same, or under `jit`, where one draw is shared out with the leaf.

    Returns:
      The noisy tree; leaves of lower precision than float32 become float32.
    """
    if axis_name is not None:
        key = jax.random.fold_in(key, parallel.axis_index(axis_name))

    def leaf(path, value):
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        wide = jnp.promote_types(value.dtype, jnp.float32)
        return value.astype(wide) + std * jax.random.normal(own, value.shape, wide)

    return jax.tree_util.tree_map_with_path(leaf, tree)


class NoiseState(NamedTuple):
    """Of independent noise: the key of the run's noise, and the number of updates so far."""

    key: Any
    count: Any


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Noise that is independent from step to step: DP-SGD's."""

    bands = 1

    def __call__(self, std: float, key) -> optax.GradientTransformation:
        """Return the noise stage.

        Args:
          std: standard deviation.
          key: of the noise of this run; update t draws from `fold_in(key, t)`.

        Returns:
          An optax transformation that adds the noise to its updates.
        """

        def init(params):
            del params
            return NoiseState(key, jnp.zeros((), jnp.int32))

        def update(updates, state, params=None):
            del params
            noisy = add_noise(jax.random.fold_in(state.key, state.count), updates, std)
            return noisy, NoiseState(state.key, state.count + 1)

        return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class Banded:
    """Noise in which later steps take back a part of earlier ones; built by `banded`.

    Attributes:
      coefficients: of the strategy, a banded Toeplitz matrix; their squares sum to 1.
      steps: number of updates of the run.
    """

    coefficients: tuple[float, ...]
    steps: int

    @property
    def bands(self) -> int:
        """How many steps must lie between two in which an example takes part: the cycle of the sampler."""
        return len(self.coefficients)

    def __call__(self, std: float, key) -> optax.GradientTransformation:
        """Return the noise stage, which is jax-privacy's; see `Gaussian.__call__`.

        Raises:
          ImportError: without the extra `privacy`.
        """
        try:
            from jax_privacy import noise_addition
            from jax_privacy.matrix_factorization import toeplitz
        except ImportError as error:
            raise ImportError(missing("correlated noise", "jax-privacy")) from error
        matrix = toeplitz.inverse_as_streaming_matrix(jnp.asarray(self.coefficients), self.steps)
        return noise_addition.matrix_factorization_privatizer(matrix, stddev=std, prng_key=key)


def banded(coefficients: Sequence[float] | int, steps: int) -> Banded:
    """Correlated noise by a banded matrix: the noise on the sum of many updates grows slower than on each.

    The noise of all steps is `std * inv(C) Z` with independent Z and C the lower triangular Toeplitz matrix of the
    coefficients, its columns scaled to norm 1. An example that takes part at most once in `len(coefficients)` steps in
    a row, which a sampler with that `cycle` sees to, then costs what DP-SGD's noise of the same `std` costs in
    `ceil(steps / len(coefficients))` steps.

    Args:
      coefficients: first column of C, the first not zero; or a number of bands, for the first coefficients of the
        square root of the matrix of prefix sums.
      steps: number of updates.

    Returns:
      What a plan takes as `noise`.

    Raises:
      ValueError: if there are no coefficients, or more than steps.

    References:
      Choquette-Choo et al. 2023, (Amplified) banded matrix factorization, arXiv:2306.08153. Fichtenberger et al. 2023,
      Constant matters, arXiv:2202.11205 (the square root). The noise itself is drawn by jax-privacy.
    """
    check.whole("steps", steps)
    if isinstance(coefficients, int):
        check.whole("bands", coefficients)
        known = [1.0]
        for k in range(1, coefficients):
            known.append(known[-1] * (2 * k - 1) / (2 * k))
        coefficients = known
    values = [float(c) for c in coefficients]
    if not values or values[0] == 0 or len(values) > steps:
        raise ValueError(
            f"coefficients must be 1 to {steps} numbers (the steps), the first not zero; got {values[:4]} "
            f"({len(values)} of them). [1.0] is independent noise."
        )
    norm = math.sqrt(math.fsum(c * c for c in values))
    return Banded(tuple(c / norm for c in values), steps)


NOISES = {"gaussian": Gaussian, "banded": banded}
"""Name to what builds the noise of a plan."""
