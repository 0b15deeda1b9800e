"""One pass over layers: each with its share of the time, the narrow ones side by side.

A layer of narrow sides is measured by one thread (`analysis.threads`), so that other cores can do other layers. Its
figures are those it would have alone: layers are side by side only where all have room at once, whatever is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from kfaccore.analysis.compare import figures_of
from kfaccore.analysis.figures import Figures
from kfaccore.analysis.price import rate
from kfaccore.analysis.room import narrow
from kfaccore.analysis.survey import Survey
from kfaccore.cli.crew import Send, shared_out
from kfaccore.method import Method
from kfaccore.record import Record
from kfaccore.record.stored import Stored

Methods = dict[str, Method]
Moved = Callable[[Record], Record]  # to where methods run
PROCESS = 1 << 26  # bytes that a process takes by itself


@dataclass(frozen=True)
class Shape:
    """A layer could be read; what it has in common with layers that are shown together."""

    text: str


@dataclass(frozen=True)
class Refused:
    """Why a layer could not be read."""

    text: str


@dataclass(frozen=True)
class Begun:
    """Before a method is measured."""

    method: str


@dataclass(frozen=True)
class Row:
    """Figures, and what is kept of them."""

    figures: Figures
    kept: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Wide:
    """A layer that wants the whole machine."""


@dataclass(frozen=True)
class Pass:
    """What is measured on which layer, and how."""

    stored: Stored
    wanted: dict[str, Methods]
    survey: Survey
    moved: Moved

    def run(self, hands: int, layer: Callable[[str, int], None], take: Callable[[str, Any], None]) -> None:
        """All layers: `layer(name, how many before)` as one begins, `take(name, message)` for what comes of it.

        hands   processes that there may be; fewer where the memory allowed is little
        """
        limits = self.survey.limits
        count = min(hands, len(self.wanted), (limits.peak - limits.room) // PROCESS)
        names = list(self.wanted)
        if count > 1:
            rate()  # of this machine at rest
            wide = []
            with closing(shared_out(self._jobs(names, count, layer), self._aside(count), count)) as messages:
                for (name, _), message in messages:
                    if isinstance(message, Wide):
                        wide.append(name)
                    else:
                        take(name, message)
            names = wide
        for name, _ in self._jobs(names, 1, layer):
            self._measure(name, self.survey, self.stored, lambda message, name=name: take(name, message))

    def _jobs(self, names: list[str], count: int, layer: Callable[[str, int], None]) -> Iterator[tuple[str, float]]:
        """Layers and until when each may take: `count` at once share the time that is left."""
        for index, name in enumerate(names):
            layer(name, len(self.wanted) - len(names) + index)
            self.survey.grant(min(1.0, count / (len(names) - index)))
            yield name, self.survey.until

    def _aside(self, count: int) -> Callable[[tuple[str, float], Send], None]:
        """What one of `count` processes does with a layer."""
        stored: list[Stored] = []

        def work(job: tuple[str, float], send: Send) -> None:
            name, until = job
            if not stored:  # opened anew: places in open files are shared with the process that this one came from
                stored.append(self.stored.again())
            survey = replace(self.survey, told=lambda _, method: send(Begun(method)))
            survey.until = until
            self._measure(name, survey, stored[0], send, count)

        return work

    def _measure(self, name: str, survey: Survey, stored: Stored, send: Send, beside: int = 1) -> None:
        """Send what comes of a layer, `beside` of which are measured at once."""
        known = set(survey.kept.rows)
        methods = self.wanted[name]
        try:
            record = stored[name]
            if beside > 1 and not narrow(record, methods.values(), survey.limits, beside):
                return send(Wide())
            send(Shape(_shape(record)))
            for row in figures_of(name, self.moved(record), methods, stored.finite_grad(name), survey):
                kept = {key: survey.kept.rows[key] for key in survey.kept.rows.keys() - known}
                known |= kept.keys()
                send(Row(row, kept))
        except ValueError as error:
            text = str(error)
            send(Refused(text if repr(name) in text else f"layer {name!r}: {text}"))


def _shape(record: Record) -> str:
    """What layers have in common that are shown together."""
    blocks = f"{record.blocks} x " if record.blocks > 1 else ""
    shared = f", {record.shared} positions" if record.shared > 1 else ""
    kind = type(record.a).__name__
    what = {"Ids": "embedding ", "Patches": "convolution "}.get(kind, "")
    return f"{what}{blocks}{record.d_out} x {record.d_in}{shared}"
