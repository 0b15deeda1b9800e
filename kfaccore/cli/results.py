"""What a verb leaves behind: JSON that every reader takes, and files that are there whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import typer

from kfaccore.cli.fail import UNFINISHED, fail
from kfaccore.written import written

FILES = ("run.json", "run.safetensors", "curves.png")  # of `train --out`
Writers = Mapping[str, Callable[[Path], None]]


def text(found: Mapping[str, object]) -> str:
    """Indented JSON; NaN and infinity, which it does not have, are null."""
    from kfaccore.analysis.kept import finite

    return json.dumps(finite(found), indent=2, allow_nan=False)


def folder(out: Path) -> None:
    """Make the folder `out`; exit 2 where the files of a run could not be written to it, before any time is spent."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        for name in FILES:
            if (out / name).is_dir():
                raise IsADirectoryError(f"{out / name} is a folder; need the name of a file")
    except OSError as error:
        fail(f"--out {out}: {error}")


def put(out: Path, writers: Writers) -> list[str]:
    """Write each file of `out` by its own function; why some could not be written."""
    troubles = []
    for name, write in writers.items():
        try:
            write(out / name)
        except OSError as error:
            troubles.append(f"{out / name}: {error}")
    return troubles


def put_text(found: Mapping[str, object]) -> Callable[[Path], None]:
    """A writer of `found` as JSON."""

    def write(path: Path) -> None:
        with written(path) as file:
            file.write_text(text(found) + "\n", encoding="utf-8")

    return write


class Trial(Protocol):
    """One call of `train`."""

    def summary(self) -> dict[str, Any]: ...

    def writers(self) -> Writers: ...

    def show(self, out: Path | None) -> None: ...

    def diverged(self) -> str: ...


def end(trial: Trial, out: Path | None, as_json: bool, code: int) -> None:
    """Files, table or JSON, and an exit code: `code` of a run that was stopped, else as it ended. What was found is
    shown even where it could not be written."""
    troubles = [] if out is None else put(out, trial.writers())
    typer.echo(text(trial.summary())) if as_json else trial.show(out)
    if troubles:
        fail("; ".join(troubles))
    if code:
        raise typer.Exit(code)
    if trial.diverged():
        fail(f"a run diverged: {trial.diverged()}", UNFINISHED)
