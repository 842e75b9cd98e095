"""Searches for failing inputs. Each attack is a pytree with four pure functions; `run` is derived from them."""

from jaxadv.attacks.gradient import ATTACKS as ATTACKS
from jaxadv.attacks.gradient import GradientAttack as GradientAttack
from jaxadv.attacks.gradient import bim as bim
from jaxadv.attacks.gradient import fgsm as fgsm
from jaxadv.attacks.gradient import mi_fgsm as mi_fgsm
from jaxadv.attacks.gradient import pgd as pgd
from jaxadv.attacks.gradient import r_fgsm as r_fgsm
from jaxadv.core.run import best_of as best_of
