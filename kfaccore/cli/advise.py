"""`kfaccore advise`: a method for each layer under a budget of memory or time, and the line of Python that says so."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kfaccore.cli import options
from kfaccore.cli.fail import fail
from kfaccore.cli.options import chosen, survey
from kfaccore.cli.results import text
from kfaccore.cli.survey import BUDGET, UNITS, quantity
from kfaccore.cli.table import duration, lines, size

SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


def advise(
    context: typer.Context,
    records: options.Records,
    memory: Annotated[str, typer.Option(help="Budget of all states: 800kB, 4MB, 1GiB")] = "",
    time: Annotated[str, typer.Option(help="Budget of a step: 500us, 20ms, 1s")] = "",
    methods: options.Methods = "",
    layers: options.Layers = "",
    damping: options.Damping = None,
    by: Annotated[str, typer.Option(help="What to be good in: gain, direction, block")] = "gain",
    update: options.Update = 1,
    refresh: options.Refresh = 5,
    peak: options.Peak = "1GiB",
    budget: options.Budget = BUDGET,
    backend: options.Backend = "numpy",
    as_json: options.AsJson = False,
) -> None:
    """The methods of most gain on RECORDS within --memory or --time; what `compare` measured is not measured again."""
    from kfaccore.analysis.advise import BY
    from kfaccore.analysis.advise import advise as plan
    from kfaccore.analysis.figures import FLOOR

    if by not in BY:
        fail(f"--by is {by!r}; there are {', '.join(BY)}")
    if bool(memory) == bool(time):
        fail("give one budget: --memory 4MB or --time 20ms")
    allowed = quantity("--memory", memory, UNITS) if memory else quantity("--time", time, SECONDS)
    asked = chosen(methods, own=False)
    # what a recommendation must beat is measured whether it was asked for or not
    named = asked if by != "gain" else {**asked, **chosen(",".join(FLOOR))}
    found = survey(context, records, named, layers, damping, peak, budget, backend)
    figures = [f for f in found.figures if f.seconds]
    try:
        answers = plan(figures, lambda f: float(f.bytes) if memory else f.per_step(update, refresh), allowed, BY[by])
    except ValueError as error:
        found.end()
        fail(str(error))
    answer = answers.best or answers.cheapest
    missing = [name for name in found.shapes if name not in answer.methods]
    line = _python({layer: named[name] for layer, name in answer.methods.items()}, update, refresh, not missing)
    if as_json:
        typer.echo(_as_json(found, answer, answers.best is not None and not missing, allowed, line, by, missing))
    elif answer.methods:
        typer.echo("\n".join([*_shown(answer, found, by, memory != "", update, refresh), line]))
    found.end()
    if missing:
        notes = [f.note for f in found.figures if f.layer in missing and f.note]
        fail(f"nothing could be measured on {', '.join(missing)}{f': {notes[0]}' if notes else ''}", 1)
    if answers.best is None:
        cost = size(answer.cost) if memory else duration(answer.cost)
        most = size(allowed) if memory else duration(allowed)
        fail(f"no choice of methods fits {most}; the smallest needs {cost} and is the one printed", 1)


def _python(methods: dict[str, Any], update: int, refresh: int, whole: bool) -> str:
    """What to paste: one method for the `whole` network, or a mapping when layers differ or some are missing."""
    calls = {layer: f"kf.{type(method).__name__}()" for layer, method in methods.items()}
    kinds = set(calls.values())
    each = ", ".join(f"{name!r}: {call}" for name, call in calls.items())
    shown = kinds.pop() if len(kinds) == 1 and whole else f"{{{each}}}"
    return f"kf.Preconditioner({shown}, clocks=kf.Clocks({update}, {refresh}))"


def _as_json(found: Any, answer: Any, feasible: bool, budget: float, line: str, by: str, missing: list[str]) -> str:
    """`gain` and `error` are those of the layers in `methods`, null where there are none."""
    error, gain = (answer.error, answer.gain) if answer.methods else (None, None)
    told = {"feasible": feasible, "budget": budget, "cost": answer.cost, "error": error, "not_measured": missing}
    told |= {"gain": gain} if by == "gain" else {}
    told |= {"fits_none": _unfit(found), "methods": answer.methods, "python": line, "notes": found.notes}
    return text({**told, "interrupted": found.interrupted})


def _unfit(found: Any) -> list[str]:
    """Layers that no measured method fits."""
    from kfaccore.analysis import fits

    layers = dict.fromkeys(f.layer for f in found.figures)
    return [name for name in layers if not fits([f for f in found.figures if f.layer == name])]


def _shown(answer: Any, found: Any, by: str, memory: bool, update: int, refresh: int) -> list[str]:
    """A line a layer, the total, and what has to be said."""
    from kfaccore.analysis import FITS

    rows = {(f.layer, f.method): f for f in found.figures}
    body: list[tuple[str, ...] | str] = []
    for layer, method in answer.methods.items():
        f = rows[layer, method]
        gain = f"{f.gain:.2f}" if f.gain == f.gain else "-"
        length = f"{f.length:.3g}" if f.length == f.length else "-"
        body.append((layer, method, gain, length, size(f.bytes), duration(f.per_step(update, refresh))))
    whole = size(answer.cost) if memory else duration(answer.cost)
    body.append(("all", "", "", "", *((whole, "") if memory else ("", whole))))
    what = f"{answer.gain:.0%} of the best decrease" if by == "gain" else f"error of the {by}: {answer.error:.3g}"
    told = [f"most within the budget: {what}", *lines(("layer", "method", "gain", "length", "state", "step"), body)]
    unfit = _unfit(found)
    if unfit:
        told.append(f"no method fits {', '.join(unfit)}: no gain reaches {FITS} there")
    still = [layer for layer, method in answer.methods.items() if rows[layer, method].best == 0]
    if still:
        told.append(f"nothing to gain on {', '.join(still)}: the gradient is zero there")
    left = found.left_out()
    if left:
        told.append(f"not all methods were measured in time on {', '.join(left)}: run it again, or --budget 0")
    return told + [f"- {note}" for note in found.notes]
