"""Differentially private training, where no single example moves the parameters by more than a known amount.

`plan(n, size=256, steps=2000, epsilon=3, delta=1e-5)` binds who takes part (`sampling.py`), how much each may change
(`clipping.py`), the noise (`noise.py`) and what it costs (`accounting.py`, on dp-accounting). What does not live here:
the training loop (`train.fit(..., private=plan)`), and anything that mixes examples.
"""

from jaxadv.privacy import accounting as accounting
from jaxadv.privacy import audit as audit
from jaxadv.privacy import noise as noise
from jaxadv.privacy import sampling as sampling
from jaxadv.privacy.clipping import AdaptiveBound as AdaptiveBound
from jaxadv.privacy.clipping import Automatic as Automatic
from jaxadv.privacy.clipping import Clipped as Clipped
from jaxadv.privacy.clipping import clipped_grads as clipped_grads
from jaxadv.privacy.clipping import mean_over_views as mean_over_views
from jaxadv.privacy.methods import METHODS as METHODS
from jaxadv.privacy.noise import NOISES as NOISES
from jaxadv.privacy.noise import Gaussian as Gaussian
from jaxadv.privacy.noise import add_noise as add_noise
from jaxadv.privacy.noise import banded as banded
from jaxadv.privacy.plan import BudgetError as BudgetError
from jaxadv.privacy.plan import Plan as Plan
from jaxadv.privacy.plan import plan as plan
from jaxadv.privacy.sampling import Shuffled as Shuffled
from jaxadv.privacy.sampling import poisson as poisson
