"""The `kfaccore` command: one file a verb.

Exit codes: 0 ok, 1 a claim failed, 2 bad input, 3 did not finish, 130 Ctrl-C.
"""

from __future__ import annotations

from typing import Annotated

import typer

from kfaccore import __version__
from kfaccore.cli.advise import advise
from kfaccore.cli.compare import compare
from kfaccore.cli.doctor import doctor
from kfaccore.cli.influence import influence
from kfaccore.cli.inspect import inspect
from kfaccore.cli.laplace import laplace
from kfaccore.cli.methods import methods
from kfaccore.cli.prune import prune
from kfaccore.cli.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for verb in (train, inspect, compare, advise, influence, laplace, prune, methods, doctor):
    app.command()(verb)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kfaccore {__version__}")
        raise typer.Exit


@app.callback()
def kfaccore(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """K-FAC on the Array API: train, inspect, compare methods and choose them, use a curvature, check this machine."""


def main() -> None:
    """Entry point of the `kfaccore` script."""
    app()
