"""Linear algebra on Kronecker blocks that at least two families of methods use, or a family and the analysis.

`side` is one factor, dense or diagonal; `kron` products with a block; `inverse` its two damped solves; `kronsum` solves
with a sum of blocks; `cg` conjugate gradients with a coefficient and an end for each block.
"""
