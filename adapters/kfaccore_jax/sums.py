"""Whether one equation sums over examples: an element of its result depends on several of them.

Seen from its shapes at two batch sizes, n and 2 n. Where a reshape deals the examples out to several axes, of which one
alone grows, what is done along the others cannot be seen any more: such rows count as mixed.
"""

from __future__ import annotations

from typing import Any

from kfaccore_jax.batch import jaxprs
from kfaccore_jax.order import grown

_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
_MATRICES = ("qr", "geqrf", "svd", "lu", "eigh", "eig", "schur", "cholesky", "triangular_solve", "tridiagonal_solve")


def mixes(p: Any, q: Any, n: int, within: bool = True) -> bool:
    """Whether an element of a result depends on several examples; with `within` also by what is inside the equation."""
    if any(len(grown(v, w)) > 1 for v, w in zip(p.outvars, q.outvars, strict=True)):
        return True  # a pair of examples an element
    if _alone(p, q, n):
        return True
    bodies = [list(jaxprs(x)) for x in (p, q)] if within else []
    pairs = [zip(one.eqns, two.eqns, strict=True) for one, two in zip(*bodies, strict=True)] if within else []
    return any(mixes(a, b, n) for pair in pairs for a, b in pair)


def _alone(p: Any, q: Any, n: int) -> bool:
    """By the equation's own operation."""
    name = p.primitive.name
    axes = [set(grown(v, w)) if hasattr(v, "aval") else set() for v, w in zip(p.invars, q.invars, strict=True)]
    if not any(axes):
        return False
    first = axes[0]
    rank = len(p.invars[0].aval.shape)
    if name in _REDUCTIONS:
        return bool(set(p.params["axes"]) & first)
    if name == "dot_general":
        return any(set(over) & grows for over, grows in zip(p.params["dimension_numbers"][0], axes, strict=True))
    if name == "reshape":
        return any(p.outvars[0].aval.shape[i] % n for i in grown(p.outvars[0], q.outvars[0]))
    if name == "scan":  # its turns are the examples
        return p.params["length"] != q.params["length"] and p.params["num_carry"] > 0
    if name.startswith("scatter"):  # as a sum of segments
        return not first and bool(axes[2])
    if name.startswith("reduce_window"):
        return any(p.params["window_dimensions"][axis] > 1 for axis in first)
    if name == "conv_general_dilated":
        return bool(set(p.params["dimension_numbers"].lhs_spec[2:]) & first)
    if name == "fft":
        return any(axis >= rank - len(p.params["fft_lengths"]) for axis in first)
    if name in _MATRICES:
        return any(axis >= len(v.aval.shape) - 2 for v, grows in zip(p.invars, axes, strict=True) for axis in grows)
    return False
