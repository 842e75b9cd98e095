"""Searches for failing inputs. Each attack is a pytree with four pure functions; `run` is derived from them."""

from collections.abc import Callable

from jaxadv.attacks.adaptive import bpda as bpda
from jaxadv.attacks.adaptive import feature_distance as feature_distance
from jaxadv.attacks.adaptive import identity as identity
from jaxadv.attacks.adaptive import matched as matched
from jaxadv.attacks.adaptive import preprocessed as preprocessed
from jaxadv.attacks.adaptive import rejecting as rejecting
from jaxadv.attacks.adaptive import rescaled as rescaled
from jaxadv.attacks.adaptive import smoothed as smoothed
from jaxadv.attacks.adaptive import straight as straight
from jaxadv.attacks.adaptive import sweep as sweep
from jaxadv.attacks.adaptive import unrolled as unrolled
from jaxadv.attacks.apgd import APGD as APGD
from jaxadv.attacks.apgd import apgd as apgd
from jaxadv.attacks.apgd import apgd_ce as apgd_ce
from jaxadv.attacks.apgd import apgd_dlr as apgd_dlr
from jaxadv.attacks.apgd import apgd_t as apgd_t
from jaxadv.attacks.autoattack import Chain as Chain
from jaxadv.attacks.autoattack import Stage as Stage
from jaxadv.attacks.autoattack import Transfer as Transfer
from jaxadv.attacks.autoattack import autoattack as autoattack
from jaxadv.attacks.autoattack import transfer as transfer
from jaxadv.attacks.bethge import BrendelBethge as BrendelBethge
from jaxadv.attacks.bethge import brendel_bethge as brendel_bethge
from jaxadv.attacks.blackbox import SquareAttack as SquareAttack
from jaxadv.attacks.blackbox import square as square
from jaxadv.attacks.composite import Composite as Composite
from jaxadv.attacks.composite import composite as composite
from jaxadv.attacks.decisions import Boundary as Boundary
from jaxadv.attacks.decisions import Decision as Decision
from jaxadv.attacks.decisions import GeoDA as GeoDA
from jaxadv.attacks.decisions import HopSkipJump as HopSkipJump
from jaxadv.attacks.decisions import SignOPT as SignOPT
from jaxadv.attacks.decisions import Walk as Walk
from jaxadv.attacks.decisions import boundary as boundary
from jaxadv.attacks.decisions import geoda as geoda
from jaxadv.attacks.decisions import hopskipjump as hopskipjump
from jaxadv.attacks.decisions import signopt as signopt
from jaxadv.attacks.detectors import Evading as Evading
from jaxadv.attacks.detectors import evading as evading
from jaxadv.attacks.detectors import without as without
from jaxadv.attacks.draws import Expectation as Expectation
from jaxadv.attacks.draws import eot as eot
from jaxadv.attacks.draws import noisy as noisy
from jaxadv.attacks.draws import survival as survival
from jaxadv.attacks.estimates import Estimated as Estimated
from jaxadv.attacks.estimates import estimated as estimated
from jaxadv.attacks.estimates import estimating as estimating
from jaxadv.attacks.estimates import nes as nes
from jaxadv.attacks.estimates import spsa as spsa
from jaxadv.attacks.estimates import zoo as zoo
from jaxadv.attacks.fab import FAB as FAB
from jaxadv.attacks.fab import fab as fab
from jaxadv.attacks.fab import fab_t as fab_t
from jaxadv.attacks.gradient import GradientAttack as GradientAttack
from jaxadv.attacks.gradient import bim as bim
from jaxadv.attacks.gradient import fgsm as fgsm
from jaxadv.attacks.gradient import mi_fgsm as mi_fgsm
from jaxadv.attacks.gradient import pgd as pgd
from jaxadv.attacks.gradient import r_fgsm as r_fgsm
from jaxadv.attacks.minimum import DDN as DDN
from jaxadv.attacks.minimum import FMN as FMN
from jaxadv.attacks.minimum import DeepFool as DeepFool
from jaxadv.attacks.minimum import MinimumNorm as MinimumNorm
from jaxadv.attacks.minimum import NewtonFool as NewtonFool
from jaxadv.attacks.minimum import ddn as ddn
from jaxadv.attacks.minimum import deepfool as deepfool
from jaxadv.attacks.minimum import fmn as fmn
from jaxadv.attacks.minimum import nearest as nearest
from jaxadv.attacks.minimum import newtonfool as newtonfool
from jaxadv.attacks.minimum import within as within
from jaxadv.attacks.noise import SaltAndPepper as SaltAndPepper
from jaxadv.attacks.noise import salt_and_pepper as salt_and_pepper
from jaxadv.attacks.optimizers import ACG as ACG
from jaxadv.attacks.optimizers import acg as acg
from jaxadv.attacks.optimizers import adam_pgd as adam_pgd
from jaxadv.attacks.outputs import flattened as flattened
from jaxadv.attacks.outputs import minus_squared_error as minus_squared_error
from jaxadv.attacks.outputs import obs_atk as obs_atk
from jaxadv.attacks.outputs import pixel_margin as pixel_margin
from jaxadv.attacks.scale import scaled as scaled
from jaxadv.attacks.scores import OnePixel as OnePixel
from jaxadv.attacks.scores import Search as Search
from jaxadv.attacks.scores import SimBA as SimBA
from jaxadv.attacks.scores import one_pixel as one_pixel
from jaxadv.attacks.scores import simba as simba
from jaxadv.attacks.sparse import JSMA as JSMA
from jaxadv.attacks.sparse import Sparse as Sparse
from jaxadv.attacks.sparse import SparseFool as SparseFool
from jaxadv.attacks.sparse import jsma as jsma
from jaxadv.attacks.sparse import sparsefool as sparsefool
from jaxadv.attacks.spatial import Affine as Affine
from jaxadv.attacks.spatial import Brightness as Brightness
from jaxadv.attacks.spatial import Contrast as Contrast
from jaxadv.attacks.spatial import Flow as Flow
from jaxadv.attacks.spatial import Hue as Hue
from jaxadv.attacks.spatial import Pixels as Pixels
from jaxadv.attacks.spatial import Saturation as Saturation
from jaxadv.attacks.spatial import StAdv as StAdv
from jaxadv.attacks.spatial import WorstOf as WorstOf
from jaxadv.attacks.spatial import roughness as roughness
from jaxadv.attacks.spatial import stadv as stadv
from jaxadv.attacks.spatial import worst_of as worst_of
from jaxadv.attacks.tighten import CarliniL0 as CarliniL0
from jaxadv.attacks.tighten import CarliniLinf as CarliniLinf
from jaxadv.attacks.tighten import Tightening as Tightening
from jaxadv.attacks.tighten import carlini_l0 as carlini_l0
from jaxadv.attacks.tighten import carlini_linf as carlini_linf
from jaxadv.attacks.tradeoff import EAD as EAD
from jaxadv.attacks.tradeoff import LBFGS as LBFGS
from jaxadv.attacks.tradeoff import Carlini as Carlini
from jaxadv.attacks.tradeoff import Tradeoff as Tradeoff
from jaxadv.attacks.tradeoff import carlini as carlini
from jaxadv.attacks.tradeoff import ead as ead
from jaxadv.attacks.tradeoff import lbfgs as lbfgs
from jaxadv.attacks.transferable import Diverse as Diverse
from jaxadv.attacks.transferable import Ensemble as Ensemble
from jaxadv.attacks.transferable import Members as Members
from jaxadv.attacks.transferable import Scales as Scales
from jaxadv.attacks.transferable import Transferable as Transferable
from jaxadv.attacks.transferable import Translations as Translations
from jaxadv.attacks.transferable import View as View
from jaxadv.attacks.transferable import di_fgsm as di_fgsm
from jaxadv.attacks.transferable import mean_logits as mean_logits
from jaxadv.attacks.transferable import mean_probabilities as mean_probabilities
from jaxadv.attacks.transferable import ni_fgsm as ni_fgsm
from jaxadv.attacks.transferable import si_fgsm as si_fgsm
from jaxadv.attacks.transferable import ti_fgsm as ti_fgsm
from jaxadv.attacks.transferable import transferable as transferable
from jaxadv.attacks.transferable import vmi_fgsm as vmi_fgsm
from jaxadv.attacks.universal import UNIVERSAL as UNIVERSAL
from jaxadv.attacks.universal import Found as Found
from jaxadv.attacks.universal import Patch as Patch
from jaxadv.attacks.universal import Placement as Placement
from jaxadv.attacks.universal import Universal as Universal
from jaxadv.attacks.universal import UniversalDeepFool as UniversalDeepFool
from jaxadv.attacks.universal import UniversalGradient as UniversalGradient
from jaxadv.attacks.universal import patch as patch
from jaxadv.attacks.universal import patched as patched
from jaxadv.attacks.universal import universal as universal
from jaxadv.attacks.universal import universal_gradient as universal_gradient
from jaxadv.core.run import best_of as best_of
from jaxadv.core.types import Attack

ATTACKS: dict[str, Callable[..., Attack]] = {
    "fgsm": fgsm,
    "r_fgsm": r_fgsm,
    "bim": bim,
    "pgd": pgd,
    "mi_fgsm": mi_fgsm,
    "adam_pgd": adam_pgd,
    "ni_fgsm": ni_fgsm,
    "si_fgsm": si_fgsm,
    "di_fgsm": di_fgsm,
    "ti_fgsm": ti_fgsm,
    "vmi_fgsm": vmi_fgsm,
    "apgd_ce": apgd_ce,
    "apgd_dlr": apgd_dlr,
    "apgd_t": apgd_t,
    "acg": acg,
    "fab": fab,
    "fab_t": fab_t,
    "square": square,
    "deepfool": deepfool,
    "ddn": ddn,
    "fmn": fmn,
    "newtonfool": newtonfool,
    "brendel_bethge": brendel_bethge,
    "carlini": carlini,
    "carlini_linf": carlini_linf,
    "carlini_l0": carlini_l0,
    "ead": ead,
    "lbfgs": lbfgs,
    "jsma": jsma,
    "sparsefool": sparsefool,
    "nes": nes,
    "spsa": spsa,
    "zoo": zoo,
    "simba": simba,
    "one_pixel": one_pixel,
    "hopskipjump": hopskipjump,
    "boundary": boundary,
    "geoda": geoda,
    "signopt": signopt,
    "salt_and_pepper": salt_and_pepper,
}
"""Attacks by name, each a function of a threat."""
