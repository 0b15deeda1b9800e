"""How a verb ends early: one line on standard error and an exit code."""

from __future__ import annotations

from typing import NoReturn

import typer

FAILED = 1
BAD_INPUT = 2
UNFINISHED = 3
INTERRUPTED = 130


def fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    """Print `message` to standard error and exit with `code`."""
    typer.echo(f"kfaccore: {message}", err=True)
    raise typer.Exit(code)
