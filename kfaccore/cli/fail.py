"""How a verb ends early: one line on standard error and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

FAILED = 1
BAD_INPUT = 2
UNFINISHED = 3
INTERRUPTED = 130
TERMINATED = 143


def fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    """Print `message` to standard error and exit with `code`."""
    typer.echo(f"kfaccore: {message}", err=True)
    raise typer.Exit(code)


@contextmanager
def or_fail() -> Iterator[None]:
    """Exit 2 for what the file system refuses."""
    try:
        yield
    except OSError as error:
        fail(str(error))
