"""What theory says about the figures of `compare`: orderings of block errors, and traces that are preserved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isnan

from kfaccore.analysis.figures import Figures
from kfaccore.method import Method

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
KEEP_TRACE = (  # (method, only without shared positions)
    ("Exact", False),
    ("EKFAC", False),
    ("TEKFAC", False),
    ("Diagonal", False),
    ("TKFAC", True),
)


def violations(figures: Sequence[Figures], methods: Mapping[str, Method], tolerance: float = 1e-6) -> list[str]:
    """A sentence for each known ordering that `compare(..., converged=True)` breaks by more than `tolerance`, absolute,
    and three standard errors."""
    kinds = {label: type(method).__name__ for label, method in methods.items()}
    found = []
    for layer in dict.fromkeys(f.layer for f in figures):
        rows = {kinds[f.method]: f for f in figures if f.layer == layer and not isnan(f.error)}
        for sentence in _of_one_layer(rows, tolerance):
            found.append(f"{layer}: {sentence}")
    return found


def _of_one_layer(rows: Mapping[str, Figures], tolerance: float) -> Iterator[str]:
    """Sentences about the figures of one layer, {class of the method: figures}."""
    for better, worse in ORDERINGS:
        if better in rows and worse in rows:
            low = rows[better]
            high = rows[worse]
            if low.error > high.error + _slack(tolerance, low, high):
                yield f"error of {low.method} {low.error:.7g} > {high.method} {high.error:.7g}"
    for one, other in EQUAL:
        if one in rows and other in rows:
            gap = abs(rows[one].error - rows[other].error)
            if gap > _slack(tolerance, rows[one], rows[other]):
                yield f"errors of {one} and {other} differ by {gap:.3g}"
    for kind in EXACT:
        if kind in rows and rows[kind].error > _slack(tolerance, rows[kind]):
            yield f"error of {rows[kind].method} {rows[kind].error:.4g}, must be 0"
    for kind, plain in KEEP_TRACE:
        if kind not in rows or rows[kind].standard_error or (plain and rows[kind].shared > 1):
            continue
        if abs(rows[kind].trace_ratio - 1) > tolerance:
            yield f"trace ratio of {rows[kind].method} {rows[kind].trace_ratio:.7g}, must be 1"


def _slack(tolerance: float, *figures: Figures) -> float:
    return tolerance + 3 * sum(f.standard_error for f in figures)
