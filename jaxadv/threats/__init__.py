"""Sets of inputs that an attacker may present: norm balls, their unions, and bounded transformations."""

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
