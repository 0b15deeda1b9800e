"""Figures as text: plain characters, as many columns as the terminal has room for, a few rows a group of layers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from statistics import median

from kfaccore.analysis.figures import Figures

LEGEND = (
    "against the exact block: gain is the share of the best decrease, at the length",
    "wanted; x error is of the direction, F error of the block; times a step",
)
COLUMNS: dict[str, Callable[[Figures, int, int], float]] = {
    "gain": lambda f, u, r: f.gain,
    "length": lambda f, u, r: f.length,
    "cosine": lambda f, u, r: f.cosine,
    "x error": lambda f, u, r: f.inverse_error,
    "F error": lambda f, u, r: f.error,
    "trace": lambda f, u, r: f.trace_ratio,
    "state": lambda f, u, r: float(f.bytes) if f.seconds else float("nan"),
    "step": lambda f, u, r: f.per_step(u, r),
    "update": lambda f, u, r: f.seconds.get("update", float("nan")),
    "refresh": lambda f, u, r: f.seconds.get("refresh", float("nan")),
    "solve": lambda f, u, r: f.seconds.get("solve", float("nan")),
}
USUAL = ("gain", "length", "cosine", "x error", "F error", "state", "step")
KEPT_LONGEST = (  # the last of these are the first to go
    *("gain", "step", "state", "length", "F error", "cosine", "x error", "trace", "update", "refresh", "solve"),
    *("shape", "Kronecker", "cond F", "eff. rank F", "cond A", "cond G", "dead in", "dead out", "duplicated"),
    *("eff. rank A", "eff. rank G", "trace F", "examples", "noise"),
)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}GB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g}us"
    return f"{seconds * 1e3:.3g}ms" if seconds < 0.9995 else f"{seconds:.3g}s"


def width() -> int:
    """Columns of the terminal; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


def height() -> int:
    """Lines of the terminal; 24 where there is none."""
    return shutil.get_terminal_size((100, 24)).lines


def lines(head: tuple[str, ...], rows: Iterable[tuple[str, ...] | str], least: int = 2, told: bool = True) -> list[str]:
    """Aligned text; a row that is a string is a title. Columns from the right are left out where a line would be longer
    than the terminal, but never the first `least`; a last line names them unless not `told`."""
    given = [_in_one_line(row) if isinstance(row, str) else tuple(map(_in_one_line, row)) for row in rows]
    cells = [head, *(row for row in given if not isinstance(row, str))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    shown = list(range(len(head)))
    order = [
        0,
        *sorted(range(1, len(head)), key=lambda i: KEPT_LONGEST.index(head[i]) if head[i] in KEPT_LONGEST else i),
    ]
    while sum(widths[i] + 2 for i in shown) > width() and len(shown) > least:
        dropped = order.pop()
        shown.remove(dropped)
    found = [row if isinstance(row, str) else _aligned(row, shown, widths) for row in (head, *given)]
    hidden = [head[i] for i in range(len(head)) if i not in shown]
    if hidden and told:
        found.append(f"not shown, for want of width: {', '.join(hidden)}")
    return found


def _in_one_line(text: str) -> str:
    """With what is no character of a line, as in the name of a layer, spelt out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _aligned(row: tuple[str, ...], shown: list[int], widths: list[int]) -> str:
    cells = [row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in shown]
    return "  ".join(cells).rstrip()


def cell(name: str, values: list[float], spread: float = 0.0) -> str:
    """The figure of a group: the median of its layers, of gain with the lowest beside it."""
    known = [x for x in values if x == x]
    if not known:
        return "-"
    middle = median(known)
    if name == "state":
        return size(middle)
    if name in ("step", "update", "refresh", "solve"):
        return duration(middle)
    text = f"{middle:.2f}" if name in ("gain", "cosine") else f"{middle:.3g}"
    if name == "gain" and len(known) > 1:
        return f"{text} ({min(known):.2f})"
    return text + (f" +- {spread:.1g}" if spread else "")


def groups(figures: list[Figures], shapes: dict[str, str]) -> dict[str, list[Figures]]:
    """Figures of layers of one shape, by a title that names them."""
    by_shape: dict[str, list[Figures]] = {}
    for f in figures:
        by_shape.setdefault(shapes[f.layer], []).append(f)
    found = {}
    for shape, rows in by_shape.items():
        names = list(dict.fromkeys(f.layer for f in rows))
        called = (
            ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)} layers)"
        )
        found[f"{called}: {shape}"] = rows
    return found
