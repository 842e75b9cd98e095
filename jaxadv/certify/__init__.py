"""Certificates: what no attack within a budget can change.

What lives here so far: randomized smoothing. What does not: attacks, and the evaluation that puts both side by side.
"""

from jaxadv.certify import smoothing as smoothing
