"""`kfaccore methods`: what can be chosen, with formula, source and cost."""

from __future__ import annotations

import sys


def methods() -> None:
    """List the methods with their formula, source and cost."""
    from rich.console import Console
    from rich.table import Table

    from kfaccore.methods import CATALOGUE

    table = Table(show_lines=True)
    for head in ("method", "formula", "exact when", "source", "cost"):
        table.add_column(head, overflow="fold")  # on a narrow terminal nothing is cut
    for name, method in CATALOGUE.items():
        text = sys.modules[method.__module__].__doc__ or ""
        formula = text.split("\n\n")[0].split(":", 1)[1].strip().replace("\n", " ")
        table.add_row(name, formula, *(_line(text, key) for key in ("Exact", "Source:", "Cost:")))
    Console().print(table)


def _line(text: str, key: str) -> str:
    """The paragraph lines from `key` up to the next key or blank line."""
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith(key):
            found = [line.removeprefix(key).removeprefix(" when").strip(" :")]
        elif found and (not line.strip() or line.startswith(("Source:", "Cost:", "Exact"))):
            break
        elif found:
            found.append(line.strip())
    return " ".join(found)
