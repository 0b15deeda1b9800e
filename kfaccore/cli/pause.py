"""Ctrl-C and SIGTERM in a training loop."""

from __future__ import annotations

import signal
import threading

from kfaccore.cli.fail import INTERRUPTED, TERMINATED


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends before it takes the machine away."""


class Pause:
    """Both take effect between two steps, where parameters and state belong together; the second time at once."""

    asked = torn = False
    kind: type[KeyboardInterrupt] = KeyboardInterrupt

    def __enter__(self) -> Pause:
        here = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
        wanted = (signal.SIGINT, signal.SIGTERM) if here else ()
        self.old = {number: signal.signal(number, self._seen) for number in wanted}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _seen(self, number: int, frame: object) -> None:
        import typer

        self.kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if self.asked:
            self.torn = True
            raise self.kind
        self.asked = True
        typer.echo("stopping after this step; Ctrl-C again: at once, without run.safetensors", err=True)

    def between(self) -> None:
        """KeyboardInterrupt if it was asked for."""
        if self.asked:
            raise self.kind


def stopped(error: KeyboardInterrupt) -> int:
    """The exit code of a run that was stopped so."""
    return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
