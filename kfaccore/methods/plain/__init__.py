"""Without a Kronecker product.

Diagonal   x = V / (diag F + damping)       gains, biases, embeddings: where factors say nothing more
Exact      x = (F + damping I)^-1 vec(V)    tests, and layers of a few dozen weights
Identity   x = V                            parameters that keep their plain gradient
"""

from kfaccore.methods.plain.diagonal import Diagonal
from kfaccore.methods.plain.exact import Exact
from kfaccore.methods.plain.identity import Identity

__all__ = ["Diagonal", "Exact", "Identity"]
