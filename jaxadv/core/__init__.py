"""Protocols and value types, argument checks, keys, the derived `run`, the loop door and the two verdicts."""

from jaxadv.core import check as check
from jaxadv.core.convolution import FORMS as FORMS
from jaxadv.core.feasible import feasible as feasible
from jaxadv.core.feasible import is_labels as is_labels
from jaxadv.core.feasible import label_of as label_of
from jaxadv.core.feasible import robust as robust
from jaxadv.core.feasible import tolerance as tolerance
from jaxadv.core.keys import example_keys as example_keys
from jaxadv.core.keys import step_keys as step_keys
from jaxadv.core.loop import canonical as canonical
from jaxadv.core.loop import loop as loop
from jaxadv.core.run import advance as advance
from jaxadv.core.run import best_of as best_of
from jaxadv.core.run import run as run
from jaxadv.core.run import select as select
from jaxadv.core.run import serve as serve
from jaxadv.core.types import Attack as Attack
from jaxadv.core.types import Model as Model
from jaxadv.core.types import Objective as Objective
from jaxadv.core.types import PyTree as PyTree
from jaxadv.core.types import Result as Result
from jaxadv.core.types import Targets as Targets
from jaxadv.core.types import Threat as Threat
from jaxadv.core.types import Trainable as Trainable
from jaxadv.core.types import pytree as pytree
from jaxadv.core.types import static as static
