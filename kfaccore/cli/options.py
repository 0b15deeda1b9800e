"""Options that `compare` and `advise` have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kfaccore.cli.fail import fail
from kfaccore.cli.progress import Progress
from kfaccore.cli.survey import BUDGET, Found, Moved, chosen, layers_of, measured, number_of_bytes, opened
from kfaccore.method import Method

Records = Annotated[list[Path], typer.Argument(help="Files of save_records, or .npz of layer.a and layer.g")]
Methods = Annotated[str, typer.Option(help="kfac,ekfac,... (default all)")]
Layers = Annotated[str, typer.Option(help="Names or patterns of layers: conv1,fc* (default all)")]
Damping = Annotated[float | None, typer.Option(help="Absolute; default 0.1 of the layer's mean eigenvalue.")]
Update = Annotated[int, typer.Option(min=1, help="Steps between updates, for seconds a step.")]
Refresh = Annotated[int, typer.Option(min=1, help="Steps between refreshes, for seconds a step.")]
Peak = Annotated[str, typer.Option(help="Memory that the command may hold: 500MB, 1GiB")]
Budget = Annotated[float, typer.Option(help="Seconds that measuring may take; 0: as long as it takes.")]
Backend = Annotated[str, typer.Option(help="Where methods run: numpy or cupy")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def survey(
    context: typer.Context,
    records: list[Path],
    methods: dict[str, Method],
    layers: str,
    damping: float | None,
    peak: str,
    budget: float,
    backend: str,
    converged: bool = False,
    quiet: bool = False,
) -> Found:
    """What is `Found` on these files under these options; exit 2 for options that make no sense."""
    from kfaccore.analysis.kept import Kept
    from kfaccore.analysis.survey import Survey
    from kfaccore.analysis.target import Limits

    if damping is not None and not 0 < damping < float("inf"):
        fail(f"--damping is {damping}; need a positive number")
    if not 0 <= budget < float("inf"):
        fail(f"--budget is {budget}; need seconds, or 0 for as long as it takes")
    limits = Limits(number_of_bytes("--peak", peak))
    moved = _placed(backend)
    stored = opened(records, limits.peak)
    wanted = layers_of(stored, layers)
    told = Progress(quiet)
    kept = Kept.beside(records[0], backend)
    made = Survey(damping, 5, converged, limits, budget or float("inf"), kept, told.method)
    # a device does one layer at a time; and only a process of the command's own, which `main` knows, is safe to fork
    many = context.obj() if context.obj is not None and backend == "numpy" else 1
    return measured(stored, wanted, methods, made, told, moved, many)


def _placed(backend: str) -> Moved:
    """How a record gets to where methods shall run."""
    from kfaccore.cli.train import _backend

    if backend == "numpy":
        return lambda record: record
    xp = _backend(backend)
    from kfaccore.record.moved import moved

    return lambda record: moved(record, xp.asarray)


__all__ = ["BUDGET", "Records", "chosen", "survey"]
