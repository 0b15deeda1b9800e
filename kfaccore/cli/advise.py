"""`kfaccore advise`: a method for each layer under a budget of memory or time, and the line of Python that says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from kfaccore.cli.compare import size
from kfaccore.cli.fail import fail
from kfaccore.cli.figures import chosen, measured, read

BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


def advise(
    records: Annotated[list[Path], typer.Argument(help="Files of save_records, or .npz of layer.a and layer.g")],
    memory: Annotated[str, typer.Option(help="Budget of all states: 800kB, 4MB, 1GiB")] = "",
    time: Annotated[str, typer.Option(help="Budget of a step: 500us, 20ms, 1s")] = "",
    methods: Annotated[str, typer.Option(help="kfac,ekfac,... (default all)")] = "",
    damping: Annotated[float | None, typer.Option(help="Absolute; default 0.1 of the layer's mean eigenvalue.")] = None,
    by: Annotated[str, typer.Option(help="What to be close in: direction, block")] = "direction",
    update: Annotated[int, typer.Option(min=1, help="Steps between updates.")] = 1,
    refresh: Annotated[int, typer.Option(min=1, help="Steps between refreshes.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """The methods of least error on RECORDS within --memory or --time."""
    from kfaccore.analysis.advise import BY
    from kfaccore.analysis.advise import advise as plan

    if by not in BY:
        fail(f"--by is {by!r}; there are {', '.join(BY)}")

    if bool(memory) == bool(time):
        fail("give one budget: --memory 4MB or --time 20ms")
    budget = _number("--memory", memory, BYTES) if memory else _number("--time", time, SECONDS)
    named = chosen(methods, own=False)
    layers, grads = read(records)
    figures = measured(layers, named, grads, damping)
    try:
        found = plan(figures, lambda f: float(f.bytes) if memory else f.per_step(update, refresh), budget, BY[by])
    except ValueError as error:
        fail(str(error))
    answer = found.best or found.cheapest
    line = _python({layer: named[name] for layer, name in answer.methods.items()}, update, refresh)
    if as_json:
        told = {"feasible": found.best is not None, "budget": budget, "cost": answer.cost, "error": answer.error}
        typer.echo(json.dumps({**told, "methods": answer.methods, "python": line}, indent=2))
    else:
        _show(answer, figures, by, memory != "", update, refresh)
        typer.echo(line)
    if found.best is None:
        shown = size(answer.cost) if memory else f"{answer.cost * 1e3:.3g} ms"
        fail(f"no choice of methods fits {memory or time}; the smallest needs {shown} and is the one printed", 1)


def _number(option: str, text: str, units: dict[str, float] | dict[str, int]) -> float:
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zµ]*)\s*", text.lower())
    try:
        return float(match[1]) * units[match[2]]  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        return fail(f"{option} is {text!r}; need a number with one of {', '.join(filter(None, units))}")


def _python(methods: dict[str, Any], update: int, refresh: int) -> str:
    """What to paste: one method, or a mapping when layers differ."""
    calls = {layer: f"kf.{type(method).__name__}()" for layer, method in methods.items()}
    kinds = set(calls.values())
    shown = kinds.pop() if len(kinds) == 1 else "{" + ", ".join(f'"{n}": {call}' for n, call in calls.items()) + "}"
    return f"kf.Preconditioner({shown}, clocks=kf.Clocks({update}, {refresh}))"


def _show(answer: Any, figures: list[Any], by: str, memory: bool, update: int, refresh: int) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"least error of the {by} within the budget: {answer.error:.3g}"
    table = Table("layer", "method", "F error", "x error", "state", "a step", title=title)
    rows = {(f.layer, f.method): f for f in figures}
    for layer, method in answer.methods.items():
        f = rows[layer, method]
        table.add_row(
            layer,
            method,
            f"{f.error:.3g}",
            f"{f.inverse_error:.3g}",
            size(f.bytes),
            f"{f.per_step(update, refresh) * 1e3:.3g} ms",
        )
    total = size(answer.cost) if memory else f"{answer.cost * 1e3:.3g} ms"
    table.add_section()
    table.add_row("all", "", "", "", *((total, "") if memory else ("", total)))
    Console().print(table)
