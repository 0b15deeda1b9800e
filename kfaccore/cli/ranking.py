"""What `compare` prints: methods by gain, a table a group of layers of one shape; of every layer with `--full`."""

from __future__ import annotations

import re

from kfaccore.analysis.figures import Figures
from kfaccore.cli.survey import Found
from kfaccore.cli.table import COLUMNS, LEGEND, USUAL, cell, groups, height, lines

Summary = dict[str, dict[str, float]]  # figures of a method over all layers
FEW = 3  # rows a group where five groups share a screen of 24 lines


def shown(found: Found, summary: Summary, update: int, refresh: int, full: bool) -> list[str]:
    """All lines: groups, the layers together, notes."""
    by_title = groups(found.figures, found.shapes) if not full else _by_layer(found)
    columns = tuple(COLUMNS) if full else USUAL
    many = None if full else max(FEW, min(6, (height() - 6) // max(1, len(by_title)) - 1))
    rows: list[tuple[str, ...] | str] = []
    for title, figures in by_title.items():
        known = [f for f in figures if f.gain == f.gain]
        if not known and not full and any("--budget" in f.note for f in figures):
            rows.append(f"{title} - not measured yet")
            continue
        rows.append(title + _verdict(figures))
        rows += [_row(label, mine, columns, update, refresh) for label, mine in _best(figures, many)]
    told = lines(("  method", *columns), rows, told=full)  # else a screen has no line left
    if len({f.layer for f in found.figures}) > 1:
        told.append(_together(summary))
    return [*told, *LEGEND, *_notes(found, full)]


def _by_layer(found: Found) -> dict[str, list[Figures]]:
    layers = dict.fromkeys(f.layer for f in found.figures)
    return {f"{name}: {found.shapes[name]}": [f for f in found.figures if f.layer == name] for name in layers}


def _best(figures: list[Figures], many: int | None) -> list[tuple[str, list[Figures]]]:
    """Methods by gain, the best first; of `many` the last is the better of what costs next to nothing."""
    from kfaccore.analysis import FLOOR

    by_method: dict[str, list[Figures]] = {}
    for f in figures:
        by_method.setdefault(f.method, []).append(f)
    known = [label for label in by_method if many is None or any(f.gain == f.gain for f in by_method[label])]
    order = sorted(known or by_method, key=lambda label: -_typical(by_method[label]))  # notes tell of the others
    if many is not None and len(order) > many:
        floor = [label for label in order if label in FLOOR][:1]
        others = [label for label in order if label not in floor]
        wanted = {*others[: many - len(floor)], *floor}
        order = [label for label in order if label in wanted]
    return [(label, by_method[label]) for label in order]


def _typical(figures: list[Figures]) -> float:
    known = sorted(f.gain for f in figures if f.gain == f.gain and not f.own)
    return known[len(known) // 2] if known else float("-inf")


def _verdict(figures: list[Figures]) -> str:
    """Which layers of a group no method fits."""
    from kfaccore.analysis import FITS, fits

    layers = {f.layer: [x for x in figures if x.layer == f.layer] for f in figures}
    bad = [name for name, rows in layers.items() if not fits(rows)]
    if not bad:
        return ""
    best = max(f.gain for name in bad for f in layers[name] if f.gain == f.gain and not f.own)
    where = "" if len(bad) == len(layers) else f" {', '.join(bad[:3])}{' ...' if len(bad) > 3 else ''}"
    return f" - no method fits{where}: the best gain is {best:.2f}, below {FITS}"


def _row(label: str, figures: list[Figures], columns: tuple[str, ...], update: int, refresh: int) -> tuple[str, ...]:
    cells = []
    for name in columns:
        spread = {"F error": figures[0].standard_error, "gain": figures[0].gain_error}.get(name, 0.0)
        cells.append(cell(name, [COLUMNS[name](f, update, refresh) for f in figures], spread))
    return f"  {label}", *cells


def _together(summary: Summary) -> str:
    known = {label: row["gain"] for label, row in summary.items() if row["gain"] == row["gain"]}
    order = sorted(known, key=lambda label: -known[label])
    few = [*order[:4], *[label for label in order[4:] if label in ("identity", "diagonal")]]
    return "all layers together: " + (", ".join(f"{label} {known[label]:.2f}" for label in few) or "-")


def _notes(found: Found, full: bool) -> list[str]:
    """Each note once, whatever sizes are in it, with the methods and the layers that it is about. Unless `full` only
    the beginnings, and only of what kept a method from being ranked."""
    about: dict[str, tuple[str, list[Figures]]] = {}
    for f in found.figures:
        for note in filter(None, f.note.split("\n")):
            if not full and f.gain == f.gain and not note.startswith("code"):
                continue
            # times differ from layer to layer: one note for all of them
            text = "not measured for want of time (--budget)" if "--budget" in note else note
            text = "not measured within the memory allowed (--peak)" if "--peak" in note and not full else text
            text = text if full else re.split("[;:] ", text)[0]
            about.setdefault(re.sub(r"[A-Z]\w+ |\d+", "", text), (text, []))[1].append(f)
    every = {f.method for f in found.figures}
    told = [f"- {text}: {_whom(rows, every)}" for text, rows in about.values()]
    if any(f.own for f in found.figures):
        told.append(
            f"- solves with the batch it is judged by: {', '.join({f.method: 0 for f in found.figures if f.own})}"
        )
    if found.left_out():
        told.append("- run it again to go on where this stopped: what was measured is kept beside the file")
    return told + [f"- {note}" for note in found.notes]


def _whom(rows: list[Figures], every: set[str]) -> str:
    """Methods and layers of a note, and how many of their pairs if not all; many methods by those it is not about."""
    methods = list(dict.fromkeys(f.method for f in rows))
    layers = list(dict.fromkeys(f.layer for f in rows))
    pairs = len(methods) * len(layers)
    some = "" if len(rows) == pairs else f"{len(rows)} of {pairs} figures of "
    others = sorted(every - set(methods))
    if len(methods) > 8:
        methods = ["every method" + (f" but {', '.join(others)}" if others else "")]
    where = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    return f"{some}{', '.join(methods)} on {where}"
