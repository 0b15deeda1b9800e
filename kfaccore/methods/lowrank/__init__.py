"""K-FAC with factors of low rank: A ~ U_a D_a U_a^T and G likewise, so a solve costs rank x d, never d^3.

    RandomizedKFAC  A and G are kept, a refresh sketches their leading modes      wide layers whose factors still fit
    BrandKFAC       modes alone, grown from each batch's rows (linear in d)       layers too wide for a d x d factor
    BrandRKFAC      as Brand between refreshes; a refresh sketches A anew         Brand's drift, at a sketch's price
    BrandCKFAC      as Brand; a refresh corrects a share of the modes by A        between the two

Shared: `lowrank` (the factor and its rank rules), `modes` (damped solves, of all four), `grown` (Stats of rows and
their updates, of the Brand three), `brand_update`, `sketch`.
"""

from kfaccore.methods.lowrank.brand import BrandKFAC
from kfaccore.methods.lowrank.brand_c import BrandCKFAC
from kfaccore.methods.lowrank.brand_r import BrandRKFAC
from kfaccore.methods.lowrank.randomized import RandomizedKFAC

__all__ = ["BrandCKFAC", "BrandKFAC", "BrandRKFAC", "RandomizedKFAC"]
