"""Solves in the space of a batch's rows, where rows are fewer than a layer is wide.

    SKFAC   K-FAC's direction, each inverse by Woodbury                    wide layers, small batches
    CGFAC   (F~ + damping I) x = V by conjugate gradients on the rows      no d x d array fits
    FNGD    coefficients of per-example gradients, shared between epochs   dense nets over a few passes of fixed data

Shared: `factors` (A and G as rows or matrices) over `stack` (a factor kept as rows), `woodbury` and `span` (its damped
inverse), `examples` and `fisher` (F of the newest examples), `operators` with `kron` and `empirical` (Fisher products
from rows), `units` (per-example gradients by inner products), `shares` and `table` (coefficients of one epoch found
again in the next).
"""

from kfaccore.methods.rows.cgfac import CGFAC
from kfaccore.methods.rows.fngd import FNGD
from kfaccore.methods.rows.skfac import SKFAC

__all__ = ["CGFAC", "FNGD", "SKFAC"]
