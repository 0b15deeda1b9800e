"""The `kfaccore` command: one file a verb.

Exit codes: 0 ok, 1 a claim failed, 2 bad input, 3 did not finish, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from kfaccore import __version__
from kfaccore.cli.advise import advise
from kfaccore.cli.compare import compare
from kfaccore.cli.crew import hands
from kfaccore.cli.doctor import doctor
from kfaccore.cli.fail import BAD_INPUT, FAILED, INTERRUPTED, TERMINATED
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
    debug: Annotated[bool, typer.Option("--debug", help="Show where an unexpected error came from.")] = False,
) -> None:
    """K-FAC on the Array API: train, inspect, compare methods and choose them, use a curvature, check this machine."""


def main() -> None:
    """Entry point of the `kfaccore` script: whatever happens ends with a line and an exit code, not a traceback."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # terminals that lack a character
                setattr(sys, name, _whole(stream))
        except OSError:  # closed since Python began
            stream = None
        if stream is None:  # closed: what is opened next would take its number, and be printed into
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    signal.signal(signal.SIGTERM, _terminated)
    code = FAILED
    try:
        code = _run()
        sys.stdout.flush()
    except OSError as error:  # a full disk, a closed pipe
        code = BAD_INPUT
        _close()
        if not isinstance(error, BrokenPipeError):
            _say(f"kfaccore: {error}")
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        kind = type(error).__name__
        _say(f"kfaccore: unexpected {kind}: {' '.join(str(error).split())[:300]}; kfaccore --debug ... shows where")
    gc.freeze()  # or Python looks through every module for garbage before it ends, which takes a tenth of a second
    sys.exit(code)


def _whole(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The stream, with a buffer where Python was told to have none (PYTHONUNBUFFERED): it drops what one write of the
    system leaves, as on a disk that fills, and says nothing."""
    if not isinstance(stream.buffer, io.RawIOBase):
        return stream
    encoding = stream.encoding
    writer = io.BufferedWriter(stream.detach())  # pyright: ignore[reportArgumentType]
    return io.TextIOWrapper(writer, encoding, "replace", line_buffering=True)


def _run() -> int:
    """The exit code of the command."""
    try:
        app(standalone_mode=True, obj=hands)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FAILED if end.code else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _terminated(*_: object) -> NoReturn:
    """SIGTERM takes what is half written along."""
    sys.exit(TERMINATED)


def _close() -> None:
    """Standard output cannot be written to: nothing more shall be tried when Python ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr)
