"""What `compare` and `advise` share: every method measured on every layer of the files, within memory and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import typer

from kfaccore.analysis.figures import LATER, Figures
from kfaccore.analysis.survey import Survey
from kfaccore.cli.fail import INTERRUPTED, fail
from kfaccore.cli.passes import Begun, Methods, Moved, Pass, Refused, Row, Shape
from kfaccore.cli.progress import Progress
from kfaccore.record.stored import Stored

BUDGET = 15.0  # seconds
FEW = 5  # layers that could not be read, one by one
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass
class Found:
    """Figures, the layers they are of, and what the user has to be told once."""

    figures: list[Figures] = field(default_factory=list)
    shapes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    interrupted: bool = False

    def put(self, row: Figures) -> None:
        """Keep a row; one of an earlier pass makes room for it."""
        self.figures = [f for f in self.figures if (f.layer, f.method) != (row.layer, row.method)]
        self.figures.append(row)

    def stopped(self, methods: Methods) -> None:
        """What was not come to of the layers that were begun: nothing is known of it yet."""
        there = {(f.layer, f.method) for f in self.figures}
        wanted = [(name, label) for name in self.shapes for label in methods]
        self.figures += [Figures(*pair, note=f"{LATER}: stopped") for pair in wanted if pair not in there]

    def left_out(self) -> dict[str, list[str]]:
        """Methods by layer that there was no time for."""
        rows = [f for f in self.figures if "--budget" in f.note and f.gain != f.gain]
        return {layer: [f.method for f in rows if f.layer == layer] for layer in dict.fromkeys(f.layer for f in rows)}

    def end(self) -> None:
        """Exit as the run ended: 130 after Ctrl-C, 2 where a layer could not be read."""
        if self.interrupted:
            raise typer.Exit(INTERRUPTED)
        if self.bad:
            more = f" (and {len(self.bad) - FEW} more layers)" if len(self.bad) > FEW else ""
            fail("\nkfaccore: ".join(self.bad[:FEW]) + more)


def opened(paths: list[Path], peak: int) -> Stored:
    """The records of the files, or exit 2."""
    try:
        return Stored(*paths, unpacked=peak)
    except (ValueError, TypeError, FileNotFoundError) as error:
        return fail(str(error))


def chosen(names: str, own: bool = True) -> Methods:
    """The methods of the catalogue called `names`, each as constructed; for an empty string all that take one loss
    term, and unless `own` none that solves with the very batch it is judged by."""
    from kfaccore.method import OwnGradients, Terms, declares
    from kfaccore.methods import CATALOGUE

    usual = [name for name, kind in CATALOGUE.items() if not declares(kind(), Terms)]
    usual = [name for name in usual if own or not declares(CATALOGUE[name](), OwnGradients)]
    wanted = [name for name in names.split(",") if name] or usual
    for name in wanted:
        if name not in CATALOGUE:
            fail(f"no method {name!r}; there are {', '.join(CATALOGUE)}")
        if declares(CATALOGUE[name](), Terms):
            fail(f"method {name!r} takes a record a loss term, which files of records do not hold")
    return {name: CATALOGUE[name]() for name in wanted}


def layers_of(stored: Stored, patterns: str) -> list[str]:
    """The layers called so, or that a pattern matches, in the order of the file; exit 2 for what matches none."""
    if not patterns:
        return list(stored)
    wanted: set[str] = set()
    for pattern in patterns.split(","):
        # a name is itself before it is a pattern: it may hold brackets
        hits = {pattern} & set(stored) or {name for name in stored if fnmatchcase(name, pattern)}
        if not hits:
            fail(f"--layers: no layer {pattern!r}; there are {', '.join(list(stored)[:12])}")
        wanted |= hits
    return [name for name in stored if name in wanted]


def number_of_bytes(option: str, text: str) -> int:
    """4MB, 1GiB as a number; exit 2 for what is none."""
    value = quantity(option, text, UNITS)
    return int(value)


def quantity(option: str, text: str, units: Mapping[str, float]) -> float:
    """A positive number with one of these units; exit 2 for what is none."""
    import re

    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zµ]*)\s*", text.lower())
    try:
        value = float(match[1]) * units[match[2]]  # type: ignore[index]
    except (TypeError, KeyError, ValueError, OverflowError):
        return _no_quantity(option, text, units)
    return value if 0 < value < float("inf") else _no_quantity(option, text, units)


def _no_quantity(option: str, text: str, units: Mapping[str, float]) -> NoReturn:
    fail(f"{option} is {text!r}; need a number above 0, with one of {', '.join(filter(None, units))}")


def measured(
    stored: Stored, layers: list[str], methods: Methods, survey: Survey, told: Progress, moved: Moved, hands: int = 1
) -> Found:
    """Every method on every layer, of which `hands` may be measured at once; a second pass for what the first had no
    time for. Ctrl-C ends it with what is there."""
    found = Found()

    def run(wanted: dict[str, Methods]) -> None:
        Pass(stored, wanted, survey, moved).run(
            hands, lambda name, index: told.layer(name, index, len(wanted)), _taken(found, survey, told)
        )

    try:
        run(dict.fromkeys(layers, methods))
        run({name: {m: methods[m] for m in late} for name, late in found.left_out().items()})
    except KeyboardInterrupt:
        found.interrupted = True
        found.stopped(methods)
        found.notes.append("stopped: what was measured until then is shown and kept")
    told.end()
    if not found.figures and not found.interrupted:
        found.end()  # nothing to show but why
    survey.kept.write()
    if survey.kept.trouble:
        found.notes.append(survey.kept.trouble)
    place = {label: index for index, label in enumerate(methods)}
    order = {name: index for index, name in enumerate(layers)}
    found.figures.sort(key=lambda f: (order[f.layer], place[f.method]))
    found.shapes = {name: found.shapes[name] for name in layers if name in found.shapes}
    return found


def _taken(found: Found, survey: Survey, told: Progress) -> Callable[[str, Any], None]:
    """What is done with what comes of a layer."""
    written = time.perf_counter()

    def take(name: str, message: object) -> None:
        nonlocal written
        match message:
            case Shape(text):
                found.shapes[name] = text
            case Begun(method):
                told.method(name, method)
            case Refused(text):
                found.bad.append(text)
            case Row(figures, kept):
                found.put(figures)
                told.row(figures)
                survey.kept.add(kept)
        if time.perf_counter() - written > 5:
            survey.kept.write()
            written = time.perf_counter()

    return take
