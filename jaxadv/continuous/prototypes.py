"""Few-shot segmentation by prototypes, with an encoder that ends in a neural ODE: PNODE, R-PNODE, and attacks on them.

What lives here: the encoder, prototypes and scores, the losses, the Dice score, and attacks on segmentations, which are
attacks of the library on losses over pixels. What does not: the images (`organs`).

An episode has support images with masks of organs, and query images. Masks are label maps: 0 is background, then one
number for each way. A segmentation becomes a model that attacks can take by putting the logits of its pixels in a line,
`[b, pixels * classes]`; then `y` is the label map in a line, `[b, pixels]`, and losses are means over pixels.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxadv import attacks
from jaxadv.continuous.organs import IGNORED as IGNORED
from jaxadv.continuous.organs import ORGANS as ORGANS
from jaxadv.continuous.organs import Episode as Episode
from jaxadv.continuous.organs import phantoms as phantoms
from jaxadv.continuous.organs import sample_episode as sample_episode
from jaxadv.continuous.solve import SolveCfg, ode_solve
from jaxadv.core import Attack, Model, Result, Threat, check, pytree, static
from jaxadv.core.rows import flat
from jaxadv.models import group_norm
from jaxadv.models.adapt import Static

Partial = jax.tree_util.Partial
# ------------------------------------------------------------------------------------------------------------- encoder


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Encoder:
    """Convolutions with pooling, and a block whose field is norm, then activation, convolution, norm, repeated.

    Attributes:
      channels: of the stages; each but the last is followed by 3x3 max pooling with stride 2.
      layers: convolutions of the field, which see the time as a further channel.
      cfg: what the block is solved with; None takes one step of length 1 in its place, a residual block with the same
        weights.
    """

    channels: tuple[int, ...] = (16, 32, 64)
    layers: int = 3
    cfg: SolveCfg | None = SolveCfg("dopri5", t1=4.0)

    def __post_init__(self):
        check.whole("layers", self.layers)
        for width in self.channels:
            check.whole("channels", width)


def encoder_init(key, net: Encoder, inputs: int = 1) -> dict[str, Any]:
    """Draw the weights of an encoder.

    Args:
      key: a typed key.
      net: the encoder.
      inputs: channels of the images.

    Returns:
      The weights.
    """
    width = net.channels[-1]
    shapes = list(zip((inputs, *net.channels), net.channels)) + [(width + 1, width)] * net.layers
    keys = jax.random.split(key, len(shapes))
    made = [
        {"kernel": math.sqrt(2 / (9 * i)) * jax.random.normal(k, (3, 3, i, o)), "bias": jnp.zeros(o)}
        for k, (i, o) in zip(keys, shapes)
    ]
    norms = {"scale": jnp.ones((net.layers + 1, width)), "bias": jnp.zeros((net.layers + 1, width))}
    stages = len(net.channels)
    return {"convs": made[:stages], "field": {"convs": made[stages:], "norms": norms}}


def _conv(layer, x):
    out = lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return out + layer["bias"].reshape(1, 1, 1, -1)


def encoder_field(params: Any, t: Any, z: Any) -> Any:
    """The field of the encoder's block: group norm, then ReLU, convolution with the time as a channel, group norm.

    Args:
      params: `field` of the encoder's weights.
      t: the time.
      z: `[b, h, w, c]`.

    Returns:
      `[b, h, w, c]`.
    """
    scale, bias = params["norms"]["scale"], params["norms"]["bias"]
    z = group_norm(z, scale[0], bias[0], groups=32)
    for number, layer in enumerate(params["convs"], 1):
        clock = jnp.broadcast_to(jnp.asarray(t, z.dtype), (*z.shape[:-1], 1))
        z = _conv(layer, jnp.concatenate([clock, jax.nn.relu(z)], axis=-1))
        z = group_norm(z, scale[number], bias[number], groups=32)
    return z


def encode(net: Encoder, params: Any, x: Any) -> Any:
    """Return feature maps; `Partial(encode, net)` is the `encode` of the other functions of this file.

    Args:
      net: the encoder.
      params: its weights.
      x: `[b, h, w, c]`.

    Returns:
      `[b, h / p, w / p, d]` with p twice as large for each stage beyond the first.
    """
    for number, layer in enumerate(params["convs"]):
        if number:
            window = (1, 3, 3, 1), (1, 2, 2, 1)
            x = lax.reduce_window(x, -jnp.inf, lax.max, *window, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = jax.nn.relu(_conv(layer, x))
    if net.cfg is None:
        return x + encoder_field(params["field"], 0.0, x)
    return ode_solve(encoder_field, params["field"], x, net.cfg)[0]


# ---------------------------------------------------------------------------------------------------------- prototypes


def _unit(v):
    return v * lax.rsqrt(jnp.maximum(jnp.square(v).sum(-1, keepdims=True), 1e-16))


def cosine(a: Any, b: Any) -> Any:
    """Return the cosine of the angle between vectors, 0 where one vanishes.

    Args:
      a: `[..., d]`.
      b: `[..., d]`.

    Returns:
      `[...]`.
    """
    return (_unit(a) * _unit(b)).sum(-1)


def _resized(x, size: tuple[int, int]):
    return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "bilinear")


def masked_average(features: Any, mask: Any) -> Any:
    """Return the mean feature under a mask: `sum m F / (sum m + 1e-5)`, features brought to the size of the mask.

    Args:
      features: `[n, h, w, d]`.
      mask: `[n, height, width]`, numbers or truth values.

    Returns:
      `[n, d]`; zero where the mask is empty.
    """
    big, mask = _resized(features, mask.shape[1:]), mask.astype(features.dtype)[..., None]
    return (big * mask).sum((1, 2)) / (mask.sum((1, 2)) + 1e-5)


def prototypes(features: Any, masks: Any, ways: int = 1) -> Any:
    """Return one prototype for the background and one for each way.

    Args:
      features: `[s, h, w, d]` of the support.
      masks: int `[s, height, width]` label maps.
      ways: number of organs.

    Returns:
      `[1 + ways, d]`: means over shots of `masked_average`; that of the background is also the mean over ways of what
      is not that way.
    """
    inside = [masked_average(features, masks == way).mean(0) for way in range(1, ways + 1)]
    outside = [masked_average(features, masks != way).mean(0) for way in range(1, ways + 1)]
    return jnp.stack([sum(outside[1:], outside[0]) / ways, *inside])


def proto_scores(features: Any, protos: Any, size: tuple[int, int]) -> Any:
    """Return 20 times the cosine of each feature with each prototype, brought to the size of the image.

    Args:
      features: `[q, h, w, d]` of the query.
      protos: `[k, d]`.
      size: height and width of the image.

    Returns:
      Logits `[q, height, width, k]`.
    """
    return _resized(20 * jnp.einsum("qhwd,kd->qhwk", _unit(features), _unit(protos)), size)


def proto_segment(encode: Callable, params: Any, xs: Any, ms: Any, xq: Any, *, ways: int = 1) -> Any:
    """Segment query images by the prototypes of the support.

    Args:
      encode: `(params, x) -> features`, at any lower resolution.
      params: of the encoder.
      xs: `[s, h, w, c]` support images.
      ms: int `[s, h, w]` their label maps.
      xq: `[q, h, w, c]` query images.
      ways: number of organs.

    Returns:
      Logits `[q, h, w, 1 + ways]`.

    References:
      Wang et al. 2019, PANet: few-shot image semantic segmentation with prototype alignment, arXiv:1908.06391. Pandey
      et al. 2022, Adversarially robust prototypical few-shot segmentation with neural ODEs, arXiv:2210.03429.
    """
    protos = prototypes(encode(params, xs), ms, ways)
    return proto_scores(encode(params, xq), protos, xq.shape[1:3])


# -------------------------------------------------------------------------------------------------------------- losses


def pixel_cross_entropy(logits: Any, truth: Any) -> Any:
    """Return the mean cross-entropy over the pixels of each image.

    Args:
      logits: `[b, ..., k]`.
      truth: int `[b, ...]`; pixels with the label `IGNORED` do not count.

    Returns:
      `[b]`.
    """
    counts = flat(truth != IGNORED)
    known = jnp.where(truth == IGNORED, 0, truth)
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits), known[..., None], axis=-1)[..., 0]
    return jnp.where(counts, flat(each), 0).sum(-1) / jnp.maximum(counts.sum(-1), 1)


def consistency_loss(one: Any, other: Any) -> Any:
    """Return by how much features differ in direction: one minus their mean cosine over space.

    Args:
      one: `[b, h, w, d]`.
      other: `[b, h, w, d]`.

    Returns:
      `[b]`.
    """
    return 1 - cosine(one, other).mean((1, 2))


def cluster_loss(features: Any, truth: Any, protos: Any) -> Any:
    """Return by how much the mean query feature of each class departs from the class's prototype.

    Args:
      features: `[q, h, w, d]` of the query.
      truth: int `[q, height, width]`.
      protos: `[k, d]`.

    Returns:
      `[q]`: one minus the cosine, averaged over the classes that the image has.
    """
    there = jnp.stack([(truth == k).any((1, 2)) for k in range(len(protos))])
    away = jnp.stack([1 - cosine(masked_average(features, truth == k), p[None]) for k, p in enumerate(protos)])
    return jnp.where(there, away, 0).sum(0) / jnp.maximum(there.sum(0), 1)


def pnode_episode_loss(
    encode: Callable,
    params: Any,
    episode: Episode,
    key,
    *,
    weights: tuple[float, float] = (1.0, 1.0),
    noise: float = 0.1,
    multiplicative: bool = False,
    ways: int = 1,
) -> tuple[Any, dict[str, Any]]:
    """Return the loss of R-PNODE on an episode: segmentation, and features that hold under noise and near prototypes.

    `CE + λ1 cluster + λ2 (consistency of the support + that of the query)`, the latter between clean and noisy images.
    With weights (0, 0) it is PNODE's.

    Args:
      encode: `(params, x) -> features`.
      params: of the encoder.
      episode: the episode.
      key: a typed key, for the noise.
      weights: λ1 and λ2.
      noise: deviation of the noise.
      multiplicative: `x (1 + noise)` in the place of `x + noise`.
      ways: number of organs.

    Returns:
      The loss, a number, and its parts by name.

    References:
      Pandey et al. 2022, Robust prototypical few-shot organ segmentation with regularized neural-ODEs,
      arXiv:2208.12428; code rpnode-fss/RPNODE_FSS, where the term called cluster loss is our consistency; the cluster
      term is that of the paper's text, as we read it.
    """
    support, query = encode(params, episode.support), encode(params, episode.query)
    protos = prototypes(support, episode.masks, ways)
    logits = proto_scores(query, protos, episode.truth.shape[1:])
    parts = {"segmentation": pixel_cross_entropy(logits, episode.truth).mean()}
    if weights[0]:
        parts["cluster"] = cluster_loss(query, episode.truth, protos).mean()
    if weights[1]:
        terms = []
        for k, x, clean in zip(jax.random.split(key), (episode.support, episode.query), (support, query)):
            drawn = noise * jax.random.normal(k, x.shape, x.dtype)
            terms.append(
                consistency_loss(encode(params, x * (1 + drawn) if multiplicative else x + drawn), clean).mean()
            )
        parts["consistency"] = terms[0] + terms[1]
    scale = {"segmentation": 1.0, "cluster": weights[0], "consistency": weights[1]}
    return sum((scale[name] * part for name, part in parts.items()), jnp.zeros(())), parts


def meta_train(
    key, params: Any, loss: Callable, draw: Callable, optimizer: optax.GradientTransformation, *, steps: int
) -> tuple[Any, Any]:
    """Train on episodes that are drawn while training, in one program.

    Args:
      key: a typed key.
      params: the first weights.
      loss: `(params, episode, key) -> (number, parts)`.
      draw: key to episode.
      optimizer: an optax transformation.
      steps: number of episodes.

    Returns:
      The weights, and the loss of each step `[steps]`.
    """

    def step(carry, number):
        params, state = carry
        k_draw, k_loss = jax.random.split(jax.random.fold_in(key, number))
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, draw(k_draw), k_loss)
        move, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, move), state), value

    (params, _), values = lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
    return params, values


def dice(found: Any, truth: Any) -> Any:
    """Return the Dice score `2 |A and B| / (|A| + |B|)` of foregrounds, image by image; 1 where both are empty.

    Args:
      found: `[b, ...]`, what is not 0 is foreground.
      truth: `[b, ...]`, likewise.

    Returns:
      float32 `[b]`.
    """
    a, b = flat(found != 0), flat(truth != 0)
    both, total = (a & b).sum(-1), a.sum(-1) + b.sum(-1)
    return jnp.where(total > 0, 2 * both / jnp.maximum(total, 1), 1.0).astype(jnp.float32)


# ------------------------------------------------------------------------------------------------------------- attacks


def _by_query(encode_fn, ways, params, xs, ms, x):
    return flat(proto_segment(encode_fn, params, xs, ms, x, ways=ways.values[0]))


def query_model(encode: Callable, params: Any, xs: Any, ms: Any, *, ways: int = 1) -> Model:
    """Return the segmentation of query images as a model that attacks take.

    Args:
      encode: `(params, x) -> features`, at module level or a `Partial`.
      params: of the encoder.
      xs: `[s, h, w, c]` support images.
      ms: int `[s, h, w]` their label maps.
      ways: number of organs.

    Returns:
      Logits `[b, h w (1 + ways)]` from query images `[b, h, w, c]`.
    """
    return Partial(_by_query, Partial(encode), Static(ways), params, xs, ms)


def _by_support(encode_fn, params, ms, xq, x):
    one = lambda xs, ms, xq: proto_segment(encode_fn, params, xs[None], ms[None], xq[None])[0]  # noqa: E731
    return flat(jax.vmap(one)(x, ms, xq))


def support_model(encode: Callable, params: Any, ms: Any, xq: Any) -> Model:
    """Return one-shot segmentations as a model of the support images: row i segments query i by support i.

    Args:
      encode: `(params, x) -> features`.
      params: of the encoder.
      ms: int `[b, h, w]` masks of the support images.
      xq: `[b, h, w, c]` query images.

    Returns:
      Logits `[b, h w 2]` from support images `[b, h, w, c]`.
    """
    return Partial(_by_support, Partial(encode), params, ms, xq)


def maps(logits: Any, size: Sequence[int], classes: int) -> Any:
    """Return the label maps of logits in a line.

    Args:
      logits: `[b, h w k]`.
      size: height and width.
      classes: k.

    Returns:
      int `[b, h, w]`.
    """
    return logits.reshape(logits.shape[0], *size, classes).argmax(-1)


class Aims(NamedTuple):
    """What the dense adversary is given for each pixel.

    Attributes:
      label: int `[b, pixels]`.
      target: int `[b, pixels]`; pixels whose target is their label are left alone.
    """

    label: Any
    target: Any


def _pixels(logits, labels):
    return logits.reshape(*labels.shape, -1)


def minus_pixels(logits: Any, y: Any) -> Any:
    """The loss of attacks on segmentations: minus the mean cross-entropy over pixels.

    Args:
      logits: `[b, pixels k]`.
      y: int `[b, pixels]`, or `Aims`.

    Returns:
      `[b]`.
    """
    label = y.label if isinstance(y, Aims) else y
    return -pixel_cross_entropy(_pixels(logits, label), label)


def held(logits: Any, y: Any) -> Any:
    """The criterion of attacks on segmentations: the share of pixels that keep their label.

    Args:
      logits: `[b, pixels k]`.
      y: int `[b, pixels]`, or `Aims`: then of the pixels that are aimed at.

    Returns:
      `[b]`, in [0, 1].
    """
    label = y.label if isinstance(y, Aims) else y
    counts = (y.target != y.label) if isinstance(y, Aims) else (label != IGNORED)
    right = (_pixels(logits, label).argmax(-1) == label) & counts
    return right.sum(-1) / jnp.maximum(counts.sum(-1), 1)


def dag_loss(logits: Any, y: Aims) -> Any:
    """The loss of the dense adversary: logit of the label minus that of the target, summed over pixels not yet changed.

    Args:
      logits: `[b, pixels k]`.
      y: labels and targets.

    Returns:
      `[b]`; its gradient vanishes where no aimed pixel keeps its label.
    """
    z = _pixels(logits, y.label)
    gap = [jnp.take_along_axis(z, at[..., None], axis=-1)[..., 0] for at in (y.label, y.target)]
    active = (z.argmax(-1) == y.label) & (y.target != y.label)
    return jnp.where(active, gap[0] - gap[1], 0).sum(-1)


def dag_aims(key, truth: Any, classes: int) -> Aims:
    """Draw a random wrong target for each pixel of the foreground; the background is left alone.

    Args:
      key: a typed key.
      truth: int `[b, h, w]` or `[b, pixels]`.
      classes: number of classes, the background among them.

    Returns:
      Labels and targets in a line.
    """
    label = flat(truth)
    other = (label + jax.random.randint(key, label.shape, 1, classes)) % classes
    return Aims(label, jnp.where((label == 0) | (label == IGNORED), label, other))


def _longest(grad, params=None):
    del params
    long = jnp.abs(grad).max()
    return grad / jnp.where(long > 0, long, 1)


_LONGEST = optax.stateless(_longest)


def dag(threat: Threat, *, steps: int = 20, step_size: Any = None, name: str = "dag", **settings: Any) -> Attack:
    """Return the dense adversary generation: steps along the gradient of `dag_loss`, its largest entry made one.

    A step moves only what aimed pixels that keep their label ask for, and nothing once there is none. Every point is
    projected into the threat, which the original does not do.

    Args:
      threat: the allowed set, linf.
      steps: number of steps.
      step_size: γ, the largest change of a pixel in a step; None is `2.5 eps / steps`.
      name: enters the random keys.
      **settings: of `attacks.pgd`.

    Returns:
      The attack; its `y` is `Aims`.

    References:
      Xie et al. 2017, Adversarial examples for semantic segmentation and object detection, alg. 1, arXiv:1703.08603.
      The code of R-PNODE makes the Euclidean norm of a step equal to the budget, without projection.
    """
    wiring = {"loss": dag_loss, "criterion": held, "start": "zero", "transform": _LONGEST, "steep": False}
    return attacks.pgd(threat, steps=steps, step_size=step_size, name=name, **wiring | settings)


# ----------------------------------------------------------------------------------------------------------------- SMIA


def blurred(d: Any, sigma: float) -> Any:
    """Convolve maps with a Gaussian, cut at three deviations and normalized; zeros beyond the edges.

    Args:
      d: `[b, h, w, c]`.
      sigma: deviation in pixels.

    Returns:
      `[b, h, w, c]`.
    """
    reach = math.ceil(3 * sigma)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    for axis in (1, 2):
        n, wide = d.shape[axis], [(reach, reach) if at == axis else (0, 0) for at in range(d.ndim)]
        far = jnp.pad(d, wide)
        shifted = (lax.slice_in_dim(far, at, at + n, axis=axis) for at in range(len(weights)))
        d = sum(float(w) * part for w, part in zip(weights / weights.sum(), shifted))
    return d


def _unstable(about, model, alpha, clean, x):
    """Logits, and beside them what the perturbation loses where it is blurred."""
    (sigma,) = about.values
    logits = model(x)
    other = model(clean + blurred(x - clean, sigma))
    logp, logq = (jax.nn.log_softmax(z.reshape(len(x), math.prod(x.shape[1:3]), -1)) for z in (logits, other))
    apart = jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1).mean(-1)
    return jnp.concatenate([logits, alpha * apart[:, None]], axis=-1)


def _smia_loss(z, y):
    return minus_pixels(z[:, :-1], y) + z[:, -1]


def _smia_held(z, y):
    return held(z[:, :-1], y)


@pytree
class Stabilized(Attack):
    """An attack on what a perturbation changes and its blurred copy does not lose; built by `smia`."""

    threat: Threat
    inner: Attack
    alpha: Any
    name: str = static()
    max_steps: int = static()
    early: bool = static()
    sigma: float = static()

    def _seen(self, model, x):
        return Partial(_unstable, Static(self.sigma), model, self.alpha, x)

    def init(self, keys, model, x, y):
        """Start."""
        return self.inner.init(keys, self._seen(model, x), x, y)

    def step(self, state, model, x, y):
        """Take a step."""
        return self.inner.step(state, self._seen(model, x), x, y)

    def done(self, state):
        """A row is done when the inner attack is."""
        return self.inner.done(state)

    def result(self, state, model, x, y) -> Result:
        """Return what was found; every question was two for the model."""
        found = self.inner.result(state, self._seen(model, x), x, y)
        return found._replace(queries=2 * found.queries, grads=2 * found.grads)


def smia(
    threat: Threat, *, steps: int = 10, alpha: float = 1.0, sigma: float = 1.0, name: str = "smia", **settings: Any
) -> Stabilized:
    """Return the stabilized attack on medical images: ascent on `deviation - alpha * instability`.

    The deviation is the mean cross-entropy over pixels. The instability is the divergence (Kullback-Leibler, mean over
    pixels) of the segmentation with the perturbation from that with the perturbation blurred by a Gaussian, so smooth
    perturbations are preferred. `alpha=0` is BIM.

    Args:
      threat: the allowed set.
      steps: sign steps with projection.
      alpha: weight of the instability; not negative.
      sigma: deviation of the Gaussian in pixels.
      name: enters the random keys.
      **settings: of `attacks.bim`.

    Returns:
      The attack, for models whose logits are those of `h w` pixels in a line.

    Raises:
      ValueError: if `alpha` is negative or `sigma` not positive.

    References:
      Qi et al. 2021, Stabilized medical image attacks, ICLR 2021, arXiv:2103.05232. The measure of instability and its
      weight are ours. The code that R-PNODE compares with takes ten steps of the whole budget without projection.
    """
    check.positive("sigma", sigma, "It is in pixels; a usual value is 1.")
    if alpha:
        check.positive("alpha", alpha, "0 is BIM.")
    given: dict[str, Any] = {"loss": _smia_loss, "criterion": _smia_held, "steps": steps, "name": name}
    inner = attacks.bim(threat, **given | settings)
    return Stabilized(
        threat=threat, inner=inner, alpha=alpha, name=name, max_steps=inner.max_steps, early=inner.early,
        sigma=float(sigma),
    )  # fmt: skip


_SEEN = {"loss": minus_pixels, "criterion": held}
SEGMENTATION_ATTACKS: dict[str, Callable[..., Attack]] = {
    "fgsm": partial(attacks.fgsm, **_SEEN),
    "bim": partial(attacks.bim, **_SEEN),
    "pgd": partial(attacks.pgd, **_SEEN),
    "dag": dag,
    "smia": smia,
}
"""Name to an attack on segmentations, a function of a threat; all are wirings of `attacks.pgd`."""


def seg_attack(threat: Threat, *, kind: str = "pgd", **settings: Any) -> Attack:
    """Return an attack on segmentations by name; run it on `query_model` or `support_model`.

    Args:
      threat: the allowed set.
      kind: one of `SEGMENTATION_ATTACKS`.
      **settings: of that attack.

    Returns:
      The attack. Its `score` is the share of pixels that hold; `success` says only whether logits are not finite.

    Raises:
      ValueError: on an unknown kind.
    """
    return check.choice("attack on segmentations", kind, SEGMENTATION_ATTACKS)(threat, **settings)
