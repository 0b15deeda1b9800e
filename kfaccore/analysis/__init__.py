"""Reading curvature: functions of records and states only."""

from kfaccore.analysis.operator import LayerOperator, NetworkOperator, operator
from kfaccore.analysis.spectrum import Spectrum, spectrum

__all__ = ["LayerOperator", "NetworkOperator", "Spectrum", "operator", "spectrum"]
