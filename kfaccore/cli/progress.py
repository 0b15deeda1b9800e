"""Where a long command is, on standard error: a line that is written over on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time

from kfaccore.analysis.figures import Figures

EVERY = 2.0  # seconds between lines where they stay


class Progress:
    """Layer and method that are being measured, and the newest figure."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = not quiet and sys.stderr.isatty()
        self.where: dict[str, str] = {}
        self.last = 0.0
        self.newest = ""

    def layer(self, name: str, index: int, count: int) -> None:
        """A layer begins."""
        self.where[name] = f"[{index + 1}/{count}] {name}"

    def method(self, layer: str, method: str) -> None:
        """Called before a method is measured."""
        if self.live:
            self._over(f"{self.where[layer]}: {method} ... {self.newest}")

    def row(self, f: Figures) -> None:
        """Called with figures; the first are always shown."""
        shown = f"gain {f.gain:.2f}" if f.gain == f.gain else "-"
        self.newest = f"{f.method} {shown}"
        now = time.perf_counter()
        if self.live or self.quiet or (self.last and now - self.last < EVERY):
            return
        self.last = now
        sys.stderr.write(f"{self.where[f.layer]}: {self.newest}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Wipe the line."""
        if self.live:
            self._over("")

    def _over(self, text: str) -> None:
        """Write over the line; no longer than it is."""
        import shutil

        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r{text[:width]:{width}}\r" if not text else f"\r{text[:width]:{width}}")
        sys.stderr.flush()
