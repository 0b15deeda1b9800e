"""Reading curvature: functions of records and states only."""

from kfaccore.analysis.advise import Advice, Plan, advise
from kfaccore.analysis.compare import Figures, compare
from kfaccore.analysis.operator import LayerOperator
from kfaccore.analysis.orderings import violations
from kfaccore.analysis.spectrum import Spectrum, spectrum
from kfaccore.analysis.whole import NetworkOperator, operator

__all__ = [
    "Advice",
    "Figures",
    "LayerOperator",
    "NetworkOperator",
    "Plan",
    "Spectrum",
    "advise",
    "compare",
    "operator",
    "spectrum",
    "violations",
]
