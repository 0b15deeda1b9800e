"""Reading curvature: functions of records and states only."""

from kfaccore.analysis.advise import Advice, Plan, advise
from kfaccore.analysis.compare import compare
from kfaccore.analysis.figures import FITS, FLOOR, Figures, fits, ranked
from kfaccore.analysis.operator import LayerOperator
from kfaccore.analysis.orderings import violations
from kfaccore.analysis.report import Report, report
from kfaccore.analysis.spectrum import Spectrum, spectrum
from kfaccore.analysis.whole import NetworkOperator, operator

__all__ = [
    "FITS",
    "FLOOR",
    "Advice",
    "Figures",
    "LayerOperator",
    "NetworkOperator",
    "Plan",
    "Report",
    "Spectrum",
    "advise",
    "compare",
    "fits",
    "operator",
    "ranked",
    "report",
    "spectrum",
    "violations",
]
