"""Networks as pure functions: the bundled ones by name, doors for those of other frameworks, weights in and out.

`create(name, key, shape=..., classes=...)` gives a `Trainable`, `model(trainable)` the `Model` that attacks and
evaluation take. Input normalization sits inside the network, so budgets are always in the range of the data.
"""

from jaxadv.models.adapt import features as features
from jaxadv.models.adapt import from_equinox as from_equinox
from jaxadv.models.adapt import from_linen as from_linen
from jaxadv.models.adapt import from_nnx as from_nnx
from jaxadv.models.adapt import model as model
from jaxadv.models.adapt import pure as pure
from jaxadv.models.adapt import trainable as trainable
from jaxadv.models.branch import branched as branched
from jaxadv.models.branch import grad_reverse as grad_reverse
from jaxadv.models.branch import trunk as trunk
from jaxadv.models.create import NETS as NETS
from jaxadv.models.create import create as create
from jaxadv.models.create import from_spec as from_spec
from jaxadv.models.create import make_spec as make_spec
from jaxadv.models.hosted import black_box as black_box
from jaxadv.models.norms import BatchNorm as BatchNorm
from jaxadv.models.norms import Dropout as Dropout
from jaxadv.models.norms import GroupNorm as GroupNorm
from jaxadv.models.norms import group_norm as group_norm
from jaxadv.models.weights import from_torch_arrays as from_torch_arrays
from jaxadv.models.weights import load as load
from jaxadv.models.weights import save as save
