"""Networks of continuous depth, and those that are read as solvers: fields, solvers, their stability and defenses."""

from jaxadv.continuous.nets import NETS as NETS
from jaxadv.continuous.nets import create as create
from jaxadv.continuous.solve import METHODS as METHODS
from jaxadv.continuous.solve import SolveCfg as SolveCfg
from jaxadv.continuous.solve import SolveStats as SolveStats
from jaxadv.continuous.solve import ode_solve as ode_solve
from jaxadv.continuous.standalone import SNODE as SNODE
from jaxadv.continuous.standalone import ncg as ncg
from jaxadv.continuous.standalone import sensitivity as sensitivity
from jaxadv.continuous.standalone import sensitivity_attack as sensitivity_attack
from jaxadv.continuous.standalone import snode as snode
from jaxadv.continuous.standalone import snode_ncg as snode_ncg
from jaxadv.continuous.standalone import sobolev as sobolev
from jaxadv.continuous.zerostable import ZeroSNet as ZeroSNet
from jaxadv.continuous.zerostable import char_roots as char_roots
from jaxadv.continuous.zerostable import coeffs_from_k as coeffs_from_k
from jaxadv.continuous.zerostable import is_zero_stable as is_zero_stable
from jaxadv.continuous.zerostable import zerosnet as zerosnet
