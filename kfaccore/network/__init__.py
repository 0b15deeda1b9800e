"""Network-level methods: the names of a method, on dicts {layer: ...} of one batch with the same draws."""

from kfaccore.network.fngd import GlobalFNGD
from kfaccore.network.gauss_newton import GaussNewton

__all__ = ["GaussNewton", "GlobalFNGD"]
