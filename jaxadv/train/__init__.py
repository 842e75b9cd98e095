"""Training: objectives as pure functions, one step for all executors, a loop that can be killed, published recipes.

`fit(key, **recipes.fast_mnist(data))` trains; the parts are there to be used alone. Training judges its own weights on
a validation set with an attack that it is given; real evaluation is another room's work.
"""

from jaxadv.train import recipes as recipes
from jaxadv.train.augment import AUGMENTATIONS as AUGMENTATIONS
from jaxadv.train.augment import chain as chain
from jaxadv.train.augment import crop as crop
from jaxadv.train.augment import flip as flip
from jaxadv.train.checkpoint import CheckpointError as CheckpointError
from jaxadv.train.checkpoint import Checkpoints as Checkpoints
from jaxadv.train.driver import Collapse as Collapse
from jaxadv.train.driver import Interrupted as Interrupted
from jaxadv.train.driver import fit as fit
from jaxadv.train.objectives import OBJECTIVES as OBJECTIVES
from jaxadv.train.objectives import fgsm_rs as fgsm_rs
from jaxadv.train.objectives import frozen as frozen
from jaxadv.train.objectives import pgd_at as pgd_at
from jaxadv.train.objectives import smoothed_cross_entropy as smoothed_cross_entropy
from jaxadv.train.objectives import standard as standard
from jaxadv.train.recipes import RECIPES as RECIPES
from jaxadv.train.recipes import recipe as recipe
from jaxadv.train.record import read_metrics as read_metrics
from jaxadv.train.schedules import SCHEDULES as SCHEDULES
from jaxadv.train.trainer import Gradient as Gradient
from jaxadv.train.trainer import TrainState as TrainState
from jaxadv.train.trainer import accumulated as accumulated
from jaxadv.train.trainer import co_detector as co_detector
from jaxadv.train.trainer import grad_fn as grad_fn
from jaxadv.train.trainer import make_step as make_step
from jaxadv.train.trainer import trained as trained
