"""Inverse-free K-FAC: (G + ..)^-1 (x) (A + ..)^-1 ~ C C^T (x) K K^T, the roots C and K grown by matrix products alone.

    SINGD   the sides' moves coupled through their traces (INGD with dense structures)   half precision, little memory
    IKFAC   the sides apart: K-FAC's own average, inverted by its Taylor expansion       to stand in for K-FAC

Shared: `structured` and its kinds in `blocks`, `triangular` and `toeplitz` (sets of matrices closed under products),
`recursion` (one move of a root) within `limits`.
"""

from kfaccore.methods.singd.singd import IKFAC, SINGD

__all__ = ["IKFAC", "SINGD"]
