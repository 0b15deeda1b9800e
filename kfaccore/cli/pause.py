"""Ctrl-C in a training loop."""

from __future__ import annotations

import signal


class Pause:
    """Ctrl-C takes effect between two steps, where parameters and state belong together; the second time at once."""

    asked = torn = False

    def __enter__(self) -> Pause:
        self.old = signal.signal(signal.SIGINT, self._seen)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self.old)

    def _seen(self, *arguments: object) -> None:
        import typer

        if self.asked:
            self.torn = True
            raise KeyboardInterrupt
        self.asked = True
        typer.echo("stopping after this step; Ctrl-C again: at once, without run.safetensors", err=True)

    def between(self) -> None:
        """KeyboardInterrupt if it was asked for."""
        if self.asked:
            raise KeyboardInterrupt
