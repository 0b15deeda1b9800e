"""Reading curvature: functions of records and states only."""

from kfaccore.analysis.spectrum import Spectrum, spectrum

__all__ = ["Spectrum", "spectrum"]
