"""What `compare` and `advise` share: reading records and measuring every method on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kfaccore.cli.fail import fail


def read(paths: list[Path]) -> tuple[Any, Any]:
    """(records, gradients) of the files, or exit 2."""
    from kfaccore import load_records

    try:
        return load_records(*paths)
    except (ValueError, TypeError, FileNotFoundError) as error:
        return fail(str(error))


def chosen(names: str, own: bool = True) -> dict[str, Any]:
    """The methods of the catalogue called `names`, each as constructed; for an empty string all that take one loss
    term, and unless `own` none that solves with the very batch it is judged by."""
    from kfaccore.method import OwnGradients, Terms, declares
    from kfaccore.methods import CATALOGUE

    usual = [name for name, kind in CATALOGUE.items() if not declares(kind(), Terms)]
    usual = [name for name in usual if own or not declares(CATALOGUE[name](), OwnGradients)]
    wanted = [name for name in names.split(",") if name] or usual
    for name in wanted:
        if name not in CATALOGUE:
            fail(f"no method {name!r}; there are {', '.join(CATALOGUE)}")
    return {name: CATALOGUE[name]() for name in wanted}


def measured(
    records: Any, methods: dict[str, Any], grads: Any, damping: float | None, converged: bool = False
) -> list[Any]:
    """Figures of every method on every layer, with a bar on standard error."""
    from rich.console import Console
    from rich.progress import track

    from kfaccore.analysis import compare

    if damping is not None and not 0 < damping < float("inf"):
        fail(f"--damping is {damping}; need a positive number")
    found = []
    console = Console(stderr=True)
    with np.errstate(all="ignore"):
        for name in track(records, "comparing", console=console, disable=not console.is_terminal, transient=True):
            try:
                found += compare({name: records[name]}, methods, grads, damping, converged=converged)
            except ValueError as error:
                fail(f"layer {name!r}: {error}")
    return found


def total(figures: list[Any], update: int, refresh: int) -> dict[str, dict[str, float]]:
    """Per method, over all layers it could do: joint errors (root of weighted sums of squares), seconds, bytes."""
    found = {}
    for method in dict.fromkeys(f.method for f in figures):
        rows = [f for f in figures if f.method == method]
        found[method] = {
            "error": _joint([(f.error, f.norm) for f in rows]),
            "inverse_error": _joint([(f.inverse_error, f.size) for f in rows]),
            "seconds": sum(f.per_step(update, refresh) for f in rows),
            "bytes": sum(f.bytes for f in rows),
        }
    return found


def _joint(pairs: list[tuple[float, float]]) -> float:
    errors, weights = np.array(pairs).T
    return float(np.sqrt(((errors * weights) ** 2).sum() / (weights**2).sum()))
