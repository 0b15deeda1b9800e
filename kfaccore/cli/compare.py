"""`kfaccore compare`: how far each method is from the exact block of each layer, and what it costs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kfaccore.cli.figures import chosen, measured, read, total


def compare(
    records: Annotated[list[Path], typer.Argument(help="Files of save_records, or .npz of layer.a and layer.g")],
    methods: Annotated[str, typer.Option(help="kfac,ekfac,... (default all)")] = "",
    damping: Annotated[float | None, typer.Option(help="Absolute; default 0.1 of the layer's mean eigenvalue.")] = None,
    update: Annotated[int, typer.Option(min=1, help="Steps between updates, for seconds a step.")] = 1,
    refresh: Annotated[int, typer.Option(min=1, help="Steps between refreshes, for seconds a step.")] = 5,
    plot: Annotated[Path | None, typer.Option(help="Picture of error against cost, a point a method.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Iterate to convergence; exit 1 if a known ordering breaks.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Error, damped-inverse error, trace, memory and time of every method on the layers of RECORDS."""
    from kfaccore.analysis import violations

    named = chosen(methods)
    layers, grads = read(records)
    figures = measured(layers, named, grads, damping, converged=check)
    summary = total(figures, update, refresh)
    broken = violations(figures, named) if check else []
    if as_json:
        rows = [_finite({**asdict(f), "per_step": f.per_step(update, refresh)}) for f in figures]
        methods_ = {name: _finite(row) for name, row in summary.items()}
        typer.echo(json.dumps({"layers": rows, "methods": methods_, "violations": broken}, indent=2))
    else:
        _show(figures, summary)
    if plot is not None:
        from kfaccore.cli.plot import costs

        costs(summary, plot)
        typer.echo(f"plot: {plot}", err=as_json)
    for line in broken:
        typer.echo(f"violated: {line}", err=as_json)
    if check:
        typer.echo(f"known orderings: {'violated' if broken else 'hold'}", err=as_json)
        if broken:
            raise typer.Exit(1)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity as null."""
    bad = (float("nan"), float("inf"), float("-inf"))
    return {key: None if isinstance(v, float) and (v != v or v in bad) else v for key, v in row.items()}


def _show(figures: list[Any], summary: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    heads = ("layer", "method", "F error", "x error", "cosine", "trace", "state", "update", "refresh", "solve")
    table = Table(*heads, title="against the exact block of each layer", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns[2:]:
        column.justify = "right"
    layer = None
    for f in figures:
        if layer not in (None, f.layer):
            table.add_section()
        error = f"{f.error:.3g}" + (f" ± {f.standard_error:.1g}" if f.standard_error else "")
        cells = [error if f.error == f.error else "-"]
        cells += [f"{x:.3g}" if x == x else "-" for x in (f.inverse_error, f.cosine, f.trace_ratio)]
        cells += [size(f.bytes), *(_time(f.seconds.get(k)) for k in ("update", "refresh", "solve"))]
        table.add_row(f.layer if f.layer != layer else "", f.method, *cells)
        layer = f.layer
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(table)
    console.print(
        "F error: ‖F - F~‖ / ‖F‖; x = (F + λ I)⁻¹ gradient, x error: ‖x~ - x‖ / ‖x‖; trace: tr F~ / tr F.",
        soft_wrap=True,
    )
    for method, row in summary.items():
        each = _time(row["seconds"]) if row["seconds"] == row["seconds"] else "-"
        errors = f"F error {row['error']:.3g}, x error {row['inverse_error']:.3g}"
        console.print(f"{method}: {errors}, {size(row['bytes'])}, {each} a step")
    for note in dict.fromkeys(f"{f.method} on {f.layer}: {f.note}" for f in figures if f.note):
        console.print(f"- {note}", soft_wrap=True, markup=False)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}GB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return (
        f"{seconds * 1e6:.3g}µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g}ms" if seconds < 1 else f"{seconds:.3g}s"
    )
