"""What theory says about the figures of `compare`: orderings of block errors, and traces that are preserved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kfaccore.analysis.compare import Figures

# (never further from F in Frobenius norm, than this one, only without shared positions): why
ORDERINGS = (
    ("EKFAC", "KFAC", False),  # the best diagonal in the basis
    ("TEKFAC", "TKFAC", False),
    ("KPSVD", "KFAC", True),  # the best Kronecker product
    ("KPSVD", "TKFAC", True),
    ("Deflation", "KPSVD", True),  # one more term
    ("Lanczos", "KPSVD", True),
    ("KFACCorrected", "KFAC", True),
)
EXACT = ("Exact",)
KEEP_TRACE = (("Exact", False), ("EKFAC", False), ("TEKFAC", False), ("Diagonal", False), ("TKFAC", True))


def violations(figures: Sequence[Figures], methods: Mapping[str, Any], tolerance: float = 1e-3) -> list[str]:
    """A sentence for each known ordering that the figures break by more than `tolerance` and their errors."""
    kinds = {label: type(method).__name__ for label, method in methods.items()}
    found = []
    for layer in dict.fromkeys(f.layer for f in figures):
        rows = {kinds[f.method]: f for f in figures if f.layer == layer and f.error == f.error}
        for better, worse, plain in ORDERINGS:
            if better in rows and worse in rows and not (plain and rows[better].shared > 1):
                low, high = rows[better], rows[worse]
                slack = tolerance * high.error + 3 * (low.standard_error + high.standard_error)
                if low.error > high.error + slack:
                    found.append(f"{layer}: error of {low.method} {low.error:.4g} > {high.method} {high.error:.4g}")
        for kind in EXACT:
            if kind in rows and rows[kind].error > tolerance + 3 * rows[kind].standard_error:
                found.append(f"{layer}: error of {rows[kind].method} {rows[kind].error:.4g}, must be 0")
        for kind, plain in KEEP_TRACE:
            kept = kind in rows and not (plain and rows[kind].shared > 1) and not rows[kind].standard_error
            if kept and abs(rows[kind].trace_ratio - 1) > tolerance:
                found.append(f"{layer}: trace ratio of {rows[kind].method} {rows[kind].trace_ratio:.4g}, must be 1")
    return found
