"""`kfaccore compare`: how much each method gains on each layer, how far it is from the exact block, what it costs."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from kfaccore.analysis.figures import Figures
from kfaccore.cli import options
from kfaccore.cli.fail import fail, or_fail
from kfaccore.cli.options import chosen, survey
from kfaccore.cli.ranking import Summary, shown
from kfaccore.cli.results import text
from kfaccore.cli.survey import BUDGET, Found


def compare(
    context: typer.Context,
    records: options.Records,
    methods: options.Methods = "",
    layers: options.Layers = "",
    damping: options.Damping = None,
    update: options.Update = 1,
    refresh: options.Refresh = 5,
    peak: options.Peak = "1GiB",
    budget: options.Budget = BUDGET,
    backend: options.Backend = "numpy",
    plot: Annotated[Path | None, typer.Option(help="Picture of gain against bytes and seconds.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Iterate to convergence; exit 1 if a known ordering breaks.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Every method and figure of every layer.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="A line a layer and method.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Gain, error, memory and time of every method on the layers of RECORDS."""
    from kfaccore.analysis import violations

    if as_csv and as_json:
        fail("--csv and --json: give one of them")
    if plot is not None and not plot.absolute().parent.is_dir():
        fail(f"--plot {plot}: {plot.parent} is no folder; make it first, as measuring takes a while")
    named = chosen(methods)
    found = survey(context, records, named, layers, damping, peak, budget, backend, check)
    summary = total(found.figures, update, refresh)
    broken = violations(found.figures, named) if check else []
    plain = not (as_csv or as_json)
    if as_json:
        typer.echo(_as_json(found, summary, broken, update, refresh))
    elif as_csv:
        typer.echo(_as_csv(found, update, refresh), nl=False)
    else:
        typer.echo("\n".join(shown(found, summary, update, refresh, full)))
    if plot is not None:
        from kfaccore.cli.plot import gains

        with or_fail():
            gains(summary, plot)
        typer.echo(f"plot: {plot}", err=not plain)
    for line in broken:
        typer.echo(f"violated: {line}", err=not plain)
    if check:
        typer.echo(f"known orderings: {'violated' if broken else 'hold'}", err=not plain)
    found.end()
    if broken:
        raise typer.Exit(1)


def _as_json(found: Found, summary: Summary, broken: list[str], update: int, refresh: int) -> str:
    """All figures; NaN and infinity are null."""
    from kfaccore.analysis import fits

    rows = [{**asdict(f), "per_step": f.per_step(update, refresh)} for f in found.figures]
    layers = dict.fromkeys(f.layer for f in found.figures)
    fitted = {name: fits([f for f in found.figures if f.layer == name]) for name in layers}
    told = {"layers": rows, "methods": summary, "fits": fitted, "violations": broken, "notes": found.notes}
    return text({**told, "interrupted": found.interrupted})


def _as_csv(found: Found, update: int, refresh: int) -> str:
    """A header and a line a figure; empty where there is none."""
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for f in found.figures:
        row = asdict(f)
        seconds = row.pop("seconds")
        row |= {name: seconds.get(name, "") for name in ("update", "refresh", "solve")}
        row |= {"per_step": f.per_step(update, refresh)}
        if writer is None:
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow({key: "" if value != value else value for key, value in row.items()})
    return text.getvalue()


def total(figures: list[Figures], update: int, refresh: int) -> dict[str, dict[str, float]]:
    """Per method over all layers: joint gain and errors (root of weighted sums of squares), seconds, bytes; NaN where
    it was not measured on one of them."""
    layers = dict.fromkeys(f.layer for f in figures)
    found = {}
    for method in dict.fromkeys(f.method for f in figures):
        rows = [f for f in figures if f.method == method]
        moving = [f for f in rows if f.best > 0 or f.best != f.best]
        best = sum(f.best for f in moving)
        whole = len(rows) == len(layers) and best > 0
        found[method] = {
            "gain": sum(f.gain * f.best for f in moving) / best if whole else float("nan"),
            "error": _joint([(f.error, f.norm) for f in rows]),
            "inverse_error": _joint([(f.inverse_error, f.size) for f in rows]),
            "seconds": sum(f.per_step(update, refresh) for f in rows),
            "bytes": sum(f.bytes for f in rows),
        }
    return found


def _joint(pairs: list[tuple[float, float]]) -> float:
    weights = np.array([weight for _, weight in pairs])
    errors = np.array([error for error, _ in pairs])
    top = weights.max(initial=0.0)
    if not top > 0:
        return float("nan")
    with np.errstate(over="ignore", invalid="ignore"):
        shares = weights / top  # whose squares do not overflow
        return float(np.sqrt(np.sum((errors * shares) ** 2) / np.sum(shares**2)))
