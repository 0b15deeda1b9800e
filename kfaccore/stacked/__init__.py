"""Factors and Fisher operators kept as rows of records instead of d x d matrices."""

from kfaccore.factors import unrefreshed
from kfaccore.stacked.factors import combine, debiased, diagonal, init, measure, product, scale, times, update

__all__ = ["combine", "debiased", "diagonal", "init", "measure", "product", "scale", "times", "unrefreshed", "update"]
