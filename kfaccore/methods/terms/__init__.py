"""The nearest Kronecker products, and sums of them: F ~ G_1 (x) A_1 + G_2 (x) A_2.

    KPSVD          the nearest product, by power iteration               K-FAC's independence of a and g is far off
    Deflation      and the nearest product to what it leaves             a block of two terms
    Lanczos        both at once, from each update's own block            as Deflation, without memory of old products
    KFACCorrected  K-FAC and the nearest product to its residual         K-FAC with one exact correction
    PINNKFAC       one product a loss term, their sum solved exactly     differential equations: residual and boundary

Shared: `rearranged` (F with entries permuted so that G (x) A is vec(G) vec(A)^T, and its power iteration), `sandwich`
(sums J V J^T from rows), `bidiagonal` (leading singular triples), `two_terms` (solving with a sum by whitening).
"""

from kfaccore.methods.terms.deflation import Deflation
from kfaccore.methods.terms.kfac_corrected import KFACCorrected
from kfaccore.methods.terms.kpsvd import KPSVD
from kfaccore.methods.terms.lanczos import Lanczos
from kfaccore.methods.terms.pinn_kfac import PINNKFAC

__all__ = ["KPSVD", "PINNKFAC", "Deflation", "KFACCorrected", "Lanczos"]
