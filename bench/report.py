"""What every bench script prints: one table, then one line a claim."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Claim = dict[str, str]


def parser(about: str | None) -> argparse.ArgumentParser:
    """--quick: a named subset within 50 s on one core; --json: nothing but the claims."""
    found = argparse.ArgumentParser(description=about)
    found.add_argument("--quick", action="store_true", help="a named subset, within 50 s on one core")
    found.add_argument("--json", action="store_true", help="print the claims as JSON and nothing else")
    return found


def arguments(about: str | None) -> argparse.Namespace:
    """What `parser` reads from the command line."""
    return parser(about).parse_args()


def claim(name: str, figure: float | str | None, target: str, holds: bool | None) -> Claim:
    """A figure against its target; `holds` None for what this run left out."""
    verdict = {True: "holds", False: "falls short", None: "not run"}[None if holds is None else bool(holds)]
    shown = "-" if figure is None else figure if isinstance(figure, str) else f"{figure:.3g}"
    return {"claim": name, "figure": shown, "target": target, "verdict": verdict}


def at_most(name: str, figure: float | None, limit: float) -> Claim:
    """Claim that `figure` is at most `limit`."""
    return claim(name, figure, f"<= {limit:g}", None if figure is None else figure <= limit)


def at_least(name: str, figure: float | None, limit: float) -> Claim:
    """Claim that `figure` is at least `limit`."""
    return claim(name, figure, f">= {limit:g}", None if figure is None else figure >= limit)


def kernels(forced: str | None) -> Claim:
    """Which kernels NumPy's BLAS uses, and the OPENBLAS_CORETYPE that was dropped for it."""
    from kfaccore.cli.doctor import blas

    core = blas()["core"] or "unknown"
    return claim("kernels of NumPy's BLAS", f"{core} (not {forced})" if forced else core, "reported", None)


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of each function, all of them once a round after one warm-up round; by default CPU seconds, which
    other processes on the machine disturb less than the clock on the wall."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if turn:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def finish(title: str, columns: Sequence[str], rows: Sequence[Sequence], claims: list[Claim], as_json: bool) -> None:
    """Print table and claims, or JSON; exit 1 if a claim falls short."""
    if as_json:
        print(json.dumps(claims, indent=2))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
        Console(width=150).print(table)
        for c in claims:
            print(f"{c['claim']}: {c['figure']} ({c['target']}) {c['verdict']}")
    sys.exit(any(c["verdict"] == "falls short" for c in claims))
