"""One Kronecker product a block: F ~ G (x) A, so x = (G + d_g I)^-1 V (A + d_a I)^-1.

    KFAC     A = mean of a a^T, G = (1/n) sum of g g^T            the default: cheapest, and rarely beaten a step
    EKFAC    exact second moments in the eigenvectors of G (x) A  refreshes are dear or rare: its scale follows updates
    TKFAC    factors from partial traces, so that tr(F~) = tr(F)  the block's trace matters; relative damping
    TEKFAC   TKFAC's eigenvectors with exact second moments       both

Shared: `product`, solving with one product of two averages (KFAC, TKFAC); `moments`, the second moments of
per-example gradients in the basis of two factors (EKFAC, TEKFAC).
"""

from kfaccore.methods.kronecker.ekfac import EKFAC
from kfaccore.methods.kronecker.kfac import KFAC
from kfaccore.methods.kronecker.tekfac import TEKFAC
from kfaccore.methods.kronecker.tkfac import TKFAC

__all__ = ["EKFAC", "KFAC", "TEKFAC", "TKFAC"]
