"""Network-level methods: they see all layers of one batch."""

from kfaccore.network.gauss_newton import GaussNewton

__all__ = ["GaussNewton"]
