"""Training: objectives as pure functions, one step for all executors, a loop that can be killed, published recipes.

`fit(key, **recipes.fast_mnist(data))` trains; the parts are there to be used alone. Training judges its own weights on
a validation set with an attack that it is given; real evaluation is another room's work.
"""

from collections.abc import Callable

from jaxadv.core.types import Objective
from jaxadv.train import channels as channels
from jaxadv.train import domains as domains
from jaxadv.train import latent as latent
from jaxadv.train import perturbed as perturbed
from jaxadv.train import recipes as recipes
from jaxadv.train import regularized as regularized
from jaxadv.train import saliency as saliency
from jaxadv.train import starts as starts
from jaxadv.train import terms as terms
from jaxadv.train.augment import AUGMENTATIONS as AUGMENTATIONS
from jaxadv.train.augment import box as box
from jaxadv.train.augment import chain as chain
from jaxadv.train.augment import crop as crop
from jaxadv.train.augment import flip as flip
from jaxadv.train.augment import resized_crop as resized_crop
from jaxadv.train.channels import cifs as cifs
from jaxadv.train.channels import joint_model as joint_model
from jaxadv.train.checkpoint import CheckpointError as CheckpointError
from jaxadv.train.checkpoint import Checkpoints as Checkpoints
from jaxadv.train.costs import Cost as Cost
from jaxadv.train.costs import cost as cost
from jaxadv.train.domains import dial as dial
from jaxadv.train.domains import with_domains as with_domains
from jaxadv.train.driver import Collapse as Collapse
from jaxadv.train.driver import Interrupted as Interrupted
from jaxadv.train.driver import fit as fit
from jaxadv.train.free import free as free
from jaxadv.train.latent import climb as climb
from jaxadv.train.latent import ladder as ladder
from jaxadv.train.objectives import Adversarial as Adversarial
from jaxadv.train.objectives import adversarial as adversarial
from jaxadv.train.objectives import fgsm_at as fgsm_at
from jaxadv.train.objectives import fgsm_rs as fgsm_rs
from jaxadv.train.objectives import frozen as frozen
from jaxadv.train.objectives import n_fgsm as n_fgsm
from jaxadv.train.objectives import pgd_at as pgd_at
from jaxadv.train.objectives import smoothed_cross_entropy as smoothed_cross_entropy
from jaxadv.train.objectives import standard as standard
from jaxadv.train.perturbed import awp as awp
from jaxadv.train.private import private_grad_fn as private_grad_fn
from jaxadv.train.recipes import RECIPES as RECIPES
from jaxadv.train.recipes import recipe as recipe
from jaxadv.train.record import read_metrics as read_metrics
from jaxadv.train.regularized import a3t as a3t
from jaxadv.train.regularized import advlc as advlc
from jaxadv.train.regularized import cost_sensitive as cost_sensitive
from jaxadv.train.regularized import iat as iat
from jaxadv.train.regularized import mart as mart
from jaxadv.train.regularized import trades as trades
from jaxadv.train.saliency import jsigr as jsigr
from jaxadv.train.schedules import SCHEDULES as SCHEDULES
from jaxadv.train.starts import started as started
from jaxadv.train.terms import cutmix as cutmix
from jaxadv.train.terms import grad_align as grad_align
from jaxadv.train.terms import masked as masked
from jaxadv.train.terms import plus as plus
from jaxadv.train.terms import softened as softened
from jaxadv.train.trainer import Gradient as Gradient
from jaxadv.train.trainer import TrainState as TrainState
from jaxadv.train.trainer import accumulated as accumulated
from jaxadv.train.trainer import co_detector as co_detector
from jaxadv.train.trainer import grad_fn as grad_fn
from jaxadv.train.trainer import make_step as make_step
from jaxadv.train.trainer import trained as trained

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "standard": standard,
    "pgd_at": pgd_at,
    "fgsm_at": fgsm_at,
    "fgsm_rs": fgsm_rs,
    "n_fgsm": n_fgsm,
    "trades": trades,
    "mart": mart,
    "a3t": a3t,
    "grad_align": grad_align,
    "iat": iat,
    "advlc": advlc,
    "cost_sensitive": cost_sensitive,
    "dial": dial,
    "cifs": cifs,
    "jsigr": jsigr,
    "ladder": ladder,
}
"""Name to a function that builds the objective; its first argument is a threat, or an attack (`pgd_at`, `iat`, `advlc`,
`cost_sensitive`, `ladder`), or nothing (`standard`, `jsigr`)."""
