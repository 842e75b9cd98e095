"""Clean and robust accuracy with intervals, flags and reports. The module is the function: `jaxadv.evaluate(...)`."""

import inspect
import sys
import types

from jaxadv.evaluate import engine
from jaxadv.evaluate.card import Card as Card
from jaxadv.evaluate.card import mce as mce
from jaxadv.evaluate.card import relative_mce as relative_mce
from jaxadv.evaluate.card import report_card as report_card
from jaxadv.evaluate.diagnostics import CHECKS as CHECKS
from jaxadv.evaluate.diagnostics import Diagnosis as Diagnosis
from jaxadv.evaluate.diagnostics import diagnose as diagnose
from jaxadv.evaluate.flags import FLAGS as FLAGS
from jaxadv.evaluate.flags import Flag as Flag
from jaxadv.evaluate.inputs import TARGET_RULES as TARGET_RULES
from jaxadv.evaluate.intervals import clopper_pearson as clopper_pearson
from jaxadv.evaluate.journal import Journal as Journal
from jaxadv.evaluate.odes import ode_report as ode_report
from jaxadv.evaluate.protocols import PROTOCOLS as PROTOCOLS
from jaxadv.evaluate.protocols import Stage as Stage
from jaxadv.evaluate.report import SCHEMA as SCHEMA
from jaxadv.evaluate.report import ModelReport as ModelReport
from jaxadv.evaluate.report import Report as Report
from jaxadv.evaluate.report import load as load
from jaxadv.evaluate.report import merge as merge
from jaxadv.evaluate.slots import Server as Server
from jaxadv.evaluate.slots import drain as drain
from jaxadv.evaluate.transfers import TransferTable as TransferTable
from jaxadv.evaluate.transfers import transfer_table as transfer_table
from jaxadv.evaluate.verdict import Verdict as Verdict
from jaxadv.evaluate.verdict import logits_of as logits_of
from jaxadv.evaluate.verdict import verify as verify
from jaxadv.evaluate.verdict import verify_report as verify_report


class _Room(types.ModuleType):
    """A module that can be called: `jaxadv.evaluate(key, model, x, y, threat)`."""

    __call__ = staticmethod(engine.evaluate)


__signature__ = inspect.signature(engine.evaluate)
sys.modules[__name__].__class__ = _Room
