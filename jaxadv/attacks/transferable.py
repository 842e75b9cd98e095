"""Gradients that carry over to other models: look-ahead, variance tuning, and views of the input that are averaged.

A *view* changes how a gradient is asked for: `view(ask) -> ask`, with `ask(model, keys, point) -> gradient`, row by
row. Views compose, the first one outermost, so that NI-SI-TI-DIM with variance tuning is

    transferable(threat, look_ahead=True, neighbors=20, views=(Translations(), Scales(), Diverse()))

What lives here: the views, `transferable` and its named wirings, and ensembles of source models. What does not:
momentum and the step (`gradient`), and the judgment on a victim (`autoattack.transfer`, `evaluate.transfers`). By
default the best point on the source is returned, as everywhere; `keep="last"` returns the last one, as the papers do.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxadv.attacks.draws import descend
from jaxadv.attacks.gradient import GradientAttack, State, mi_fgsm
from jaxadv.attacks.judge import judge
from jaxadv.attacks.minimum import ball
from jaxadv.core import Threat, as_callable, check, pytree, select, static, step_keys
from jaxadv.core.rows import flat, wide

Ask = Callable[[Any, Any, Array], Array]
"""`(model, keys [b], point [b, ...]) -> [b, ...]`: the gradient of the loss at the point, row by row."""

_DRAWS = 2**31 - 1
"""What the keys of an attack are folded with to make those of its views: no step and no start uses it."""


@dataclasses.dataclass(frozen=True)
class View:
    """A way of asking for a gradient. Equal settings are equal views, so equal attacks share one compiled program."""

    def __call__(self, ask: Ask) -> Ask:
        """Return what asks in this way."""
        raise TypeError(f"{type(self).__name__} must define __call__")

    def times(self, model: Any) -> int:
        """Return how many gradients it asks for in the place of one."""
        del model
        return 1

    @property
    def __name__(self) -> str:
        """How reports tell of it: with its settings."""
        return repr(self)


def _fold(keys, number):
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _mean(one: Callable, count: int, like: Array) -> Array:
    """The mean of `one(0), ..., one(count - 1)`, made one after the other: memory does not grow with their number."""
    if count == 1:
        return one(0)
    return lax.scan(lambda total, i: (total + one(i), None), jnp.zeros_like(like), jnp.arange(count))[0] / count


def _images(point, what: str) -> None:
    if point.ndim != 4:
        raise ValueError(f"{what} needs images [b, h, w, c]; got {point.shape}. Reshape inside the model.")


@dataclasses.dataclass(frozen=True)
class Scales(View):
    """Average the loss over copies of the input at 1, 1/2, 1/4, ... of its contrast (SI).

    Attributes:
      copies: number of copies; 1 changes nothing.
      center: the value that copies shrink toward.

    References:
      Lin et al. 2020, Nesterov accelerated gradient and scale invariance for adversarial attacks, sec. 3.3,
      arXiv:1908.06281. The authors' inputs lie in [-1, 1], so that theirs shrink toward gray: `center=0.5` here.
    """

    copies: int = 5
    center: float = 0.0

    def __post_init__(self):
        """Check the settings."""
        check.whole("copies", self.copies)

    def __call__(self, ask: Ask) -> Ask:
        """Return what asks for the gradient of the mean loss over the copies."""

        def asked(model, keys, point):
            def copy(i):
                share = 1 / jnp.left_shift(1, i).astype(point.dtype)
                return share * ask(model, _fold(keys, i), share * point + (1 - share) * self.center)

            return _mean(copy, self.copies, point)

        return asked

    def times(self, model: Any) -> int:
        """Return the number of copies."""
        del model
        return self.copies


def sampling(n: int, size: Int[Array, " b"], start: Int[Array, " b"], nearest: bool = False) -> Float[Array, "b n n"]:
    """Return the matrices that shrink a line of pixels and lay it somewhere on a line of the same length.

    Args:
      n: pixels of the line.
      size: `[b]` pixels that it is shrunk to.
      start: `[b]` where the first of them comes to lie.
      nearest: take the nearest pixel instead of interpolating linearly.

    Returns:
      `[b, n, n]`, new pixels by old ones; rows of pixels that nothing is laid on are zero.
    """
    place = jnp.arange(n)[None] - start[:, None]
    inside = (place >= 0) & (place < size[:, None])
    if nearest:
        source = (place * n // size[:, None]).astype(jnp.float32)
    else:
        source = (place + 0.5) * (n / size)[:, None] - 0.5
    source = jnp.clip(source, 0, n - 1)[..., None]
    return jnp.where(inside[..., None], jnp.maximum(1 - jnp.abs(source - jnp.arange(n)[None, None]), 0), 0)


@dataclasses.dataclass(frozen=True)
class Diverse(View):
    """Ask at a smaller copy of the image, laid at a random place on a plain ground, with some chance (DI).

    Attributes:
      chance: that an image is changed, drawn for each image by itself; 0 changes nothing.
      least: smallest size as a share of the full one, in (0, 1].
      fill: value of the ground.
      nearest: take the nearest pixel instead of interpolating linearly.

    References:
      Xie et al. 2019, Improving transferability of adversarial examples with input diversity, sec. 3.3,
      arXiv:1803.06978. The authors' code enlarges 299 pixels to less than 330; networks of a fixed size need the
      reverse, here as in torchattacks. As in both, the size stays below the full one and the place short of the far
      end; they draw once for a batch, and the authors' ground is gray: `fill=0.5`.
    """

    chance: float = 0.5
    least: float = 0.9
    fill: float = 0.0
    nearest: bool = False

    def __post_init__(self):
        """Check the settings."""
        if not (0 <= self.chance <= 1 and 0 < self.least <= 1):
            raise ValueError(
                f"chance must lie in [0, 1] and least in (0, 1]; got {self.chance} and {self.least}. "
                "Usual are 0.5 and 0.9."
            )

    def __call__(self, ask: Ask) -> Ask:
        """Return what asks for the gradient through a random smaller copy."""

        def asked(model, keys, point):
            _images(point, "Diverse")
            seen, back = jax.vjp(lambda p: self.view(keys, p), point)
            return back(ask(model, _fold(keys, 0), seen))[0]

        return asked

    def view(self, keys: Any, point: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return the images as the model is to see them.

        Args:
          keys: `[b]` typed keys.
          point: `[b, h, w, c]`.

        Returns:
          `[b, h, w, c]`.
        """
        chance, share, *places = jax.vmap(lambda key: jax.random.uniform(key, (4,)))(keys).T
        matrices = []
        for n, place in zip(point.shape[1:3], places):
            least = max(int(n * self.least), 1)
            size = least + (share * (n - least)).astype(jnp.int32)
            matrices.append(sampling(n, size, (place * (n - size)).astype(jnp.int32), self.nearest).astype(point.dtype))
        small = jnp.einsum("bpq,bqwc,brw->bprc", matrices[0], point - self.fill, matrices[1], precision="highest")
        return select(chance < self.chance, small + self.fill, point)


@dataclasses.dataclass(frozen=True)
class Translations(View):
    """Smooth the gradient with a Gaussian kernel, in the place of averaging over shifted images (TI).

    Attributes:
      kernel: its number of pixels across, odd; 1 changes nothing.
      spread: how many standard deviations there are from its middle to its edge.

    References:
      Dong et al. 2019, Evading defenses to transferable adversarial examples by translation-invariant attacks, sec.
      3.2, arXiv:1904.02884. Their kernel has 15 pixels on images of 299; later work uses 7.
    """

    kernel: int = 7
    spread: float = 3.0

    def __post_init__(self):
        """Check the settings."""
        check.whole("kernel", self.kernel)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that it has a middle; got {self.kernel}. Usual are 7 and 15.")

    def weights(self) -> np.ndarray:
        """Return the kernel of one axis, float64 `[kernel]`; it sums to one."""
        bell = np.exp(-(np.linspace(-self.spread, self.spread, self.kernel) ** 2) / 2)
        return bell / bell.sum()

    def __call__(self, ask: Ask) -> Ask:
        """Return what asks for the smoothed gradient."""

        def asked(model, keys, point):
            _images(point, "Translations")
            grad = ask(model, keys, point)
            for axis in (1, 2):
                ends = [(self.kernel // 2,) * 2 if a == axis else (0, 0) for a in range(4)]
                wider, n = jnp.pad(grad, ends), grad.shape[axis]
                first, *others = (
                    float(w) * lax.slice_in_dim(wider, i, i + n, axis=axis) for i, w in enumerate(self.weights())
                )
                grad = sum(others, first)
            return grad

        return asked


# ---------------------------------------------------------------------------------------------------------- ensembles


@pytree
class Ensemble:
    """Several models as one, built by `mean_logits` or `mean_probabilities`; itself a model."""

    members: tuple[Any, ...]
    weights: Any
    mix: str = static()

    def __call__(self, x):
        """Return the mixed logits `[b, k]`."""
        logits = [member(x) for member in self.members]
        if self.mix == "logits":
            return sum(w * z for w, z in zip(self.weights, logits))
        return jax.nn.logsumexp(
            jnp.stack([jnp.log(w) + jax.nn.log_softmax(z) for w, z in zip(self.weights, logits)]), axis=0
        )


def _ensemble(models: Sequence[Any], weights: Any, mix: str) -> Ensemble:
    if not models:
        raise ValueError("an ensemble needs at least one model; got none. Pass the models one by one.")
    shares = np.ones(len(models)) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != (len(models),) or np.any(~np.isfinite(shares)) or np.any(shares <= 0):
        raise ValueError(
            f"weights must be {len(models)} positive numbers, one for each model; got {weights}. Leave out what is to "
            "count nothing."
        )
    return Ensemble(tuple(map(as_callable, models)), tuple((shares / shares.sum()).astype(np.float32)), mix)


def mean_logits(*models: Any, weights: Any = None) -> Ensemble:
    """Return the ensemble whose logits are the mean of its members'.

    Args:
      *models: each logits `[b, k]` from a batch.
      weights: a positive number for each model; brought to a sum of one. Equal by default.

    Returns:
      A model. Under the view `Members` attacks average its members' losses instead.

    Raises:
      ValueError: without models, or with weights that do not fit.

    References:
      Dong et al. 2018, Boosting adversarial attacks with momentum, sec. 3.4, arXiv:1710.06081.
    """
    return _ensemble(models, weights, "logits")


def mean_probabilities(*models: Any, weights: Any = None) -> Ensemble:
    """Return the ensemble whose probabilities are the mean of its members'; its logits are their logarithms.

    Args:
      *models: each logits `[b, k]` from a batch.
      weights: a positive number for each model; brought to a sum of one. Equal by default.

    Returns:
      A model.

    Raises:
      ValueError: without models, or with weights that do not fit.

    References:
      Liu et al. 2017, Delving into transferable adversarial examples and black-box attacks, sec. 5, arXiv:1611.02770.
    """
    return _ensemble(models, weights, "probabilities")


@dataclasses.dataclass(frozen=True)
class Members(View):
    """Average over the members of an ensemble what each is asked for by itself: losses, or gradients of equal size.

    Attributes:
      equal: bring each member's gradient to the L1 size one before they are averaged, so that no member drowns the
        others; without it the gradient is that of the mean loss.

    References:
      Dong et al. 2018, Boosting adversarial attacks with momentum, sec. 3.4 (ensemble in loss), arXiv:1710.06081.
    """

    equal: bool = False

    def __call__(self, ask: Ask) -> Ask:
        """Return what asks each member by itself."""

        def asked(model, keys, point):
            total = jnp.zeros_like(point)
            for i, (member, weight) in enumerate(zip(self._of(model).members, model.weights)):
                grad = ask(member, _fold(keys, i), point)
                if self.equal:
                    size = jnp.sum(flat(jnp.abs(grad)), axis=-1)
                    grad = grad / wide(jnp.where(size > 0, size, 1), grad)
                total = total + weight * grad
            return total

        return asked

    def times(self, model: Any) -> int:
        """Return the number of members."""
        return len(self._of(model).members)

    def _of(self, model: Any) -> Ensemble:
        if not isinstance(model, Ensemble):
            raise ValueError(
                f"Members needs an ensemble as the model; got {type(model).__name__}. Build one: mean_logits(*models)."
            )
        return model


# ------------------------------------------------------------------------------------------------------------- wirings


@pytree
class Transferable(GradientAttack):
    """Momentum steps along gradients asked for through views; built by `transferable` and its kin."""

    views: tuple[View, ...] = static()
    look_ahead: bool = static()
    neighbors: int = static()
    beta: float = static()

    def init(self, keys, model, x, y) -> State:
        """Start as the momentum iterative method does."""
        state = super().init(keys, model, x, y)
        nothing = jnp.zeros_like(state.point)
        return state._replace(memory=(_fold(keys, _DRAWS), nothing if self.neighbors else ()))

    def _ask(self, state: State, model, x, y):
        def slope(model, keys, point):
            del keys
            grad = descend(model, point, lambda z: self.loss(z, y), lambda z: ())[0]
            return jnp.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)

        ask: Ask = slope
        for view in reversed(self.views):
            ask = view(ask)
        base, variance = state.memory
        keys = step_keys(base, state.step)
        grad = ask(model, _fold(keys, 0), self._ahead(state, x) if self.look_ahead else state.point)
        if self.neighbors:

            def near(i):
                mine = _fold(keys, i + 1)
                return ask(model, _fold(mine, 0), self._around(_fold(mine, 1), state.point, self.beta))

            around = _mean(near, self.neighbors, state.point)
            grad, variance = grad + variance, around - grad
        if self._judges:
            verdict = judge(model(state.point), y, self.criterion)
        else:
            verdict = state.score, state.broken, ~state.nonfinite
        return grad, verdict, (base, variance)

    def _cost(self, model) -> tuple[int, int]:
        grads = math.prod(view.times(model) for view in self.views) * (1 + self.neighbors)
        return grads + self._judges, grads

    @property
    def _judges(self) -> bool:
        """Whether anything depends on the verdict on a point of the path."""
        return self.early or self.keep == "best"

    def _ahead(self, state: State, x):
        """Where the memory of the optimizer alone would lead: what it makes of a gradient of zero."""
        update: Callable[..., Any] = jax.vmap(self.transform.update)
        rise, _ = update(jnp.zeros_like(state.point), state.opt, state.point)
        threat: Any = self.threat
        unit = math.prod(x.shape[1:]) ** (1 - 1 / threat.p)  # the largest L1 size of a step of size one
        return state.point + unit * self._length(state, x) * rise


def transferable(
    threat: Threat,
    *,
    steps: int = 10,
    decay: float = 1.0,
    views: Sequence[Any] = (),
    look_ahead: bool = False,
    neighbors: int = 0,
    beta: float = 1.5,
    name: str = "transferable",
    **settings: Any,
) -> Transferable:
    """Return the momentum iterative method on gradients that are asked for in other ways, in any combination.

    `g <- decay g + (grad + v) / ||grad + v||_1`, a step along `steepest(g)`, and `v <- mean_i grad_i - grad` with
    `grad_i` at random neighbors of the point; `grad` through the views, at the point or ahead of it.

    Args:
      threat: a norm ball `linf`, `l2` or `l1`.
      steps: number of gradient steps.
      decay: factor of the accumulated gradient; 0 forgets.
      views: how gradients are asked for, the first one outermost: `Scales`, `Diverse`, `Translations`, `Members`.
      look_ahead: ask where the accumulated gradient alone would lead (Nesterov).
      neighbors: random points around the current one, whose gradients tune the next step; 0 is none.
      beta: how far neighbors lie, at most, in units of the budget; they may lie outside the bounds.
      name: enters the random keys.
      **settings: further settings of `pgd` but `transform`; the step size is `eps / steps` by default.

    Returns:
      The attack.

    Raises:
      ValueError: on settings out of range, or a threat of another norm.

    References:
      Lin et al. 2020, arXiv:1908.06281 (look-ahead); Wang and He 2021, Enhancing the transferability of adversarial
      attacks through variance tuning, alg. 1, arXiv:2103.15571. As in the authors' codes, the look-ahead takes
      gradients as brought to a mean size of one per feature in linf, not to a sum of one, and `v` is what the
      neighbors add to the gradient that was asked. Differs from them: labels are given, not those predicted first.
    """
    ball(threat, ("linf", "l2", "l1"), name, fences=True)
    check.whole("neighbors", neighbors, least=0)
    check.not_negative("beta", beta, "It is in units of the budget; usual is 1.5.")
    wrong = [type(view).__name__ for view in views if not isinstance(view, View)]
    if wrong or "transform" in settings:
        raise ValueError(
            f"views must hold views, such as Scales(), and the optimizer is the momentum; got {wrong or 'transform'}. "
            "For another optimizer use pgd."
        )
    base = mi_fgsm(threat, steps=steps, decay=decay, name=name, **settings)
    return Transferable(
        **{field.name: getattr(base, field.name) for field in dataclasses.fields(base)},
        views=tuple(views),
        look_ahead=look_ahead,
        neighbors=neighbors,
        beta=float(beta),
    )


def ni_fgsm(threat: Threat, *, name: str = "ni_fgsm", **settings: Any) -> Transferable:
    """Return the Nesterov iterative method: the gradient is asked where the momentum alone would lead.

    Args:
      threat: a norm ball `linf`, `l2` or `l1`.
      name: enters the random keys.
      **settings: of `transferable`.

    Returns:
      The attack.

    References:
      Lin et al. 2020, Nesterov accelerated gradient and scale invariance for adversarial attacks, sec. 3.2,
      arXiv:1908.06281.
    """
    return transferable(threat, **{"look_ahead": True, "name": name} | settings)


def si_fgsm(threat: Threat, *, name: str = "si_fgsm", **settings: Any) -> Transferable:
    """Return the momentum iterative method with the loss averaged over scaled copies (SI); see `Scales`.

    Args:
      threat: a norm ball `linf`, `l2` or `l1`.
      name: enters the random keys.
      **settings: of `transferable`.

    Returns:
      The attack; SI-NI-FGSM with `look_ahead=True`.

    References:
      Lin et al. 2020, Nesterov accelerated gradient and scale invariance for adversarial attacks, sec. 3.3,
      arXiv:1908.06281.
    """
    return transferable(threat, **{"views": (Scales(),), "name": name} | settings)


def di_fgsm(threat: Threat, *, name: str = "di_fgsm", **settings: Any) -> Transferable:
    """Return the momentum iterative method with randomly shrunk and padded images (M-DI2-FGSM); see `Diverse`.

    Args:
      threat: a norm ball `linf`, `l2` or `l1`, of images.
      name: enters the random keys.
      **settings: of `transferable`.

    Returns:
      The attack.

    References:
      Xie et al. 2019, Improving transferability of adversarial examples with input diversity, arXiv:1803.06978.
    """
    return transferable(threat, **{"views": (Diverse(),), "name": name} | settings)


def ti_fgsm(threat: Threat, *, name: str = "ti_fgsm", **settings: Any) -> Transferable:
    """Return the momentum iterative method with smoothed gradients (TI); see `Translations`.

    Args:
      threat: a norm ball `linf`, `l2` or `l1`, of images.
      name: enters the random keys.
      **settings: of `transferable`.

    Returns:
      The attack; TI-DIM with `views=(Translations(), Diverse())`.

    References:
      Dong et al. 2019, Evading defenses to transferable adversarial examples by translation-invariant attacks,
      arXiv:1904.02884.
    """
    return transferable(threat, **{"views": (Translations(),), "name": name} | settings)


def vmi_fgsm(threat: Threat, *, name: str = "vmi_fgsm", **settings: Any) -> Transferable:
    """Return the momentum iterative method with variance tuning: gradients around the last point correct the next one.

    Args:
      threat: a norm ball `linf`, `l2` or `l1`.
      name: enters the random keys.
      **settings: of `transferable`; 20 neighbors by default.

    Returns:
      The attack; VNI-FGSM with `look_ahead=True`.

    References:
      Wang and He 2021, Enhancing the transferability of adversarial attacks through variance tuning, alg. 1,
      arXiv:2103.15571.
    """
    return transferable(threat, **{"neighbors": 20, "name": name} | settings)
