"""Sets of inputs that an attacker may present: norm balls, unions, bounded transformations, structure."""

from jaxadv.threats.balls import THREATS as THREATS
from jaxadv.threats.balls import Ball as Ball
from jaxadv.threats.balls import Union as Union
from jaxadv.threats.balls import l0 as l0
from jaxadv.threats.balls import l1 as l1
from jaxadv.threats.balls import l2 as l2
from jaxadv.threats.balls import linf as linf
from jaxadv.threats.balls import union as union
from jaxadv.threats.semantic import Behind as Behind
from jaxadv.threats.semantic import Component as Component
from jaxadv.threats.semantic import Semantic as Semantic
from jaxadv.threats.semantic import behind as behind
from jaxadv.threats.semantic import semantic as semantic
from jaxadv.threats.structured import Categorical as Categorical
from jaxadv.threats.structured import Fenced as Fenced
from jaxadv.threats.structured import ZeroMean as ZeroMean
from jaxadv.threats.structured import categorical as categorical
from jaxadv.threats.structured import masked as masked
from jaxadv.threats.structured import patch as patch
from jaxadv.threats.structured import tabular as tabular
from jaxadv.threats.structured import weighted as weighted
from jaxadv.threats.structured import zero_mean as zero_mean
