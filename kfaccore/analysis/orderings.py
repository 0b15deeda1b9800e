"""What theory says about the figures of `compare`: orderings of block errors, and traces that are preserved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kfaccore.analysis.compare import Figures

# (never further from F in Frobenius norm, than this one): both converged on the same record
ORDERINGS = (
    ("EKFAC", "KFAC"),  # the best diagonal in its basis
    ("TEKFAC", "TKFAC"),
    ("KPSVD", "KFAC"),  # the best Kronecker product
    ("KPSVD", "TKFAC"),
    ("Deflation", "KPSVD"),  # one more term
    ("Lanczos", "KPSVD"),
    ("KFACCorrected", "KFAC"),
)
EQUAL = (("Deflation", "Lanczos"),)
EXACT = ("Exact",)
KEEP_TRACE = (("Exact", False), ("EKFAC", False), ("TEKFAC", False), ("Diagonal", False), ("TKFAC", True))


def violations(figures: Sequence[Figures], methods: Mapping[str, Any], tolerance: float = 1e-6) -> list[str]:
    """A sentence for each known ordering that `compare(..., converged=True)` breaks by more than `tolerance`, absolute,
    and three standard errors."""
    kinds = {label: type(method).__name__ for label, method in methods.items()}
    found = []
    for layer in dict.fromkeys(f.layer for f in figures):
        rows = {kinds[f.method]: f for f in figures if f.layer == layer and f.error == f.error}
        for better, worse in ORDERINGS:
            if better in rows and worse in rows:
                low, high = rows[better], rows[worse]
                if low.error > high.error + tolerance + 3 * (low.standard_error + high.standard_error):
                    found.append(f"{layer}: error of {low.method} {low.error:.7g} > {high.method} {high.error:.7g}")
        for one, other in EQUAL:
            if one in rows and other in rows:
                gap = abs(rows[one].error - rows[other].error)
                if gap > tolerance + 3 * (rows[one].standard_error + rows[other].standard_error):
                    found.append(f"{layer}: errors of {one} and {other} differ by {gap:.3g}")
        for kind in EXACT:
            if kind in rows and rows[kind].error > tolerance + 3 * rows[kind].standard_error:
                found.append(f"{layer}: error of {rows[kind].method} {rows[kind].error:.4g}, must be 0")
        for kind, plain in KEEP_TRACE:
            kept = kind in rows and not (plain and rows[kind].shared > 1) and not rows[kind].standard_error
            if kept and abs(rows[kind].trace_ratio - 1) > tolerance:
                found.append(f"{layer}: trace ratio of {rows[kind].method} {rows[kind].trace_ratio:.7g}, must be 1")
    return found
