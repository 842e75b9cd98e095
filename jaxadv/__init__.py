"""jaxadv: attack, train, certify, privatize, explain and analyze any classifier that is a pure function.

`import jaxadv as ja` loads nothing heavy: a room or a name is imported when it is first used, and no backend is
initialized. What lives here: the list of public names. What does not: their code; each stands in the room it
comes from.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxadv import attacks as attacks
    from jaxadv import certify as certify
    from jaxadv import continuous as continuous
    from jaxadv import core as core
    from jaxadv import corruptions as corruptions
    from jaxadv import data as data
    from jaxadv import evaluate as evaluate
    from jaxadv import losses as losses
    from jaxadv import models as models
    from jaxadv import parallel as parallel
    from jaxadv import privacy as privacy
    from jaxadv import threats as threats
    from jaxadv import train as train
    from jaxadv.attacks import best_of as best_of
    from jaxadv.attacks import fgsm as fgsm
    from jaxadv.attacks import pgd as pgd
    from jaxadv.core import Attack as Attack
    from jaxadv.core import Model as Model
    from jaxadv.core import Result as Result
    from jaxadv.core import Targets as Targets
    from jaxadv.core import Threat as Threat
    from jaxadv.core import Trainable as Trainable
    from jaxadv.core import feasible as feasible
    from jaxadv.core import robust as robust
    from jaxadv.losses import cross_entropy as cross_entropy
    from jaxadv.losses import margin as margin
    from jaxadv.models import from_nnx as from_nnx
    from jaxadv.models import pure as pure
    from jaxadv.threats import l0 as l0
    from jaxadv.threats import l1 as l1
    from jaxadv.threats import l2 as l2
    from jaxadv.threats import linf as linf
    from jaxadv.threats import union as union
    from jaxadv.train import fit as fit
    from jaxadv.train import recipes as recipes

__version__ = "0.1.0"

_ROOMS = (
    "attacks",
    "certify",
    "continuous",
    "core",
    "corruptions",
    "data",
    "evaluate",
    "losses",
    "models",
    "parallel",
    "privacy",
    "threats",
    "train",
)
_NAMES = {
    "attacks": ("best_of", "fgsm", "pgd"),
    "core": ("Attack", "Model", "Result", "Targets", "Threat", "Trainable", "feasible", "robust"),
    "losses": ("cross_entropy", "margin"),
    "models": ("from_nnx", "pure"),
    "threats": ("l0", "l1", "l2", "linf", "union"),
    "train": ("fit", "recipes"),
}
_HOME = {name: room for room, names in _NAMES.items() for name in names}

__all__ = sorted([*_ROOMS, *_HOME, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a room, or a name from its room, when it is first asked for."""
    if name in _ROOMS:
        return import_module(f"jaxadv.{name}")
    if name in _HOME:
        room = import_module(f"jaxadv.{_HOME[name]}")
        value = getattr(room, name)
        globals()[name] = value
        return value
    raise AttributeError(
        f"jaxadv has no public name {name!r}. Known: {', '.join(__all__)}. Each room has more, e.g. attacks.ATTACKS."
    )


def __dir__() -> list[str]:
    """List the public names."""
    return list(__all__)
