"""Channel gates: a layer that weighs the channels of its input by how much two likely classes need them.

What lives here: the gate of CIFS and the tap of its scores. What does not: the objective that trains gated networks
(`train.channels`). Networks with the option `gated` have gates.
"""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import lax

from jaxadv.models.norms import Layer, NoNorm

SCORES = "*gates.*.scores"
"""The taps of the scores of all gates of a network."""


class Gate(Layer):
    """Weigh channels by a softmax of their relevance to two classes, which a small probe at this place predicts.

    The probe is dense on the channels' means over space, or dense, softplus (of sharpness 5), dense. Relevance is the
    gradient of the sum of two of its scores, summed over space. The scores pass through the layer `scores`, so that
    they can be tapped.

    | hint `label` | the two classes | gradients |
    | --- | --- | --- |
    | None (evaluation, attacks) | the probe's first and second | flow through the gate, too |
    | int `[b]` (training) | the label and the probe's second, as published also if they are one | stop at its input |

    The weights sum to 1, so activations shrink by about the number of channels, as published.

    Args:
      features: number of channels.
      classes: number of classes.
      hidden: width of the probe's hidden layer; None for a linear probe.
      dense: builds a layer from inputs and outputs.
    """

    def __init__(self, features: int, classes: int, *, hidden: int | None = None, dense):
        self.hidden = None if hidden is None else dense(features, hidden)
        self.out = dense(features if hidden is None else hidden, classes)
        self.scores = NoNorm()

    def probe(self, means):
        """Return the scores `[b, k]` from the means over space `[b, c]`."""
        if self.hidden is not None:
            means = jax.nn.softplus(5 * self.hidden(means)) / 5
        return self.out(means)

    def weights(self, means, label=None):
        """Return the weights of the channels `[b, c]`."""
        scores, pull = jax.vjp(self.probe, means)
        first, second = (lax.top_k(scores, 2)[1][:, place] for place in (0, 1))
        one_hot = partial(jax.nn.one_hot, num_classes=scores.shape[-1], dtype=scores.dtype)
        (relevance,) = pull(one_hot(first if label is None else label) + one_hot(second))
        return jax.nn.softmax(relevance)

    def __call__(self, x):
        """Return `x` `[b, h, w, c]` with weighted channels."""
        means, label = x.mean((1, 2)), self.call.hints.get("label")
        weights = self.weights(means if label is None else lax.stop_gradient(means), label)
        self.scores(self.probe(means))
        return x * weights[:, None, None, :].astype(x.dtype)


def gates(gated: bool, widths, classes: int, *, dense, hidden: int = 128) -> Any:
    """Build the gates of a network, the first with a hidden layer and the others linear, as published.

    Args:
      gated: whether there are any; if not, identities stand in their places.
      widths: number of channels at each.
      classes: number of classes.
      dense: builds a layer from inputs and outputs.
      hidden: width of the first one's hidden layer.

    Returns:
      The gates.

    References:
      Yan et al. 2021, CIFS: improving adversarial robustness of CNNs via channel-wise importance-based feature
      selection, arXiv:2102.05311, section 4; code HanshuYAN/CIFS.
    """
    if not gated:
        return nnx.List([NoNorm() for _ in widths])
    return nnx.List([Gate(n, classes, hidden=None if i else hidden, dense=dense) for i, n in enumerate(widths)])
