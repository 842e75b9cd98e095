"""Differentially private training, where no single example moves the parameters by more than a known amount.

What lives here so far: per-example clipping. What does not: the training loop, and anything that mixes examples.
"""

from jaxadv.privacy.clipping import clipped_grads as clipped_grads
