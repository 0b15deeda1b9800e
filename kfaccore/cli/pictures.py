"""Pictures of what a posterior says: queries beside examples, reliability, pruning."""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from kfaccore.cli.plot import pyplot, saved

QUERIES, SIDE = 6, 5  # rows, and examples on either side


def influence(rows: list[dict], asked: np.ndarray, data: np.ndarray, path: Path) -> None:
    """Each query image beside its most helpful and most harmful training images."""
    plt = pyplot(path)
    if plt is None:
        return
    rows = rows[:QUERIES]
    side = max(1, min(SIDE, max(len(row[kind]) for row in rows for kind in ("helpful", "harmful"))))
    width = 2 * side + 1
    figure, panels = plt.subplots(
        len(rows), width, figsize=(1.05 * width, 1.3 * len(rows) + 0.6), squeeze=False, layout="constrained"
    )
    for line, row in zip(panels, rows, strict=True):
        _image(line[0], asked[row["query"]], f"query\n{row.get('label', row['query'])}", "black")
        for panel in line[1:]:
            panel.axis("off")  # until an image is put there
        for kind, start, colour in (("helpful", 1, "tab:green"), ("harmful", 1 + side, "tab:red")):
            for panel, found in zip(line[start : start + side], row[kind], strict=False):
                _image(panel, data[found["example"]], f"{found.get('label', '')}  {found['effect']:+.2g}", colour)
    figure.suptitle("most helpful (green) and most harmful (red) examples: label, effect on the log odds", fontsize=10)
    saved(figure, path)
    plt.close(figure)


def _image(panel: Any, x: np.ndarray, title: str, colour: str) -> None:
    panel.axis("on")
    size = isqrt(x.size)
    flat = np.ravel(x)[: size * size]
    panel.imshow(flat.reshape(size, size), cmap="gray_r")
    panel.set_title(title, fontsize=7, color=colour)
    panel.set(xticks=[], yticks=[])
    for spine in panel.spines.values():
        spine.set_color(colour)


def reliability(curves: dict[str, dict[str, list[float]]], title: str, path: Path) -> None:
    """How many of the examples of each confidence are right."""
    plt = pyplot(path)
    if plt is None:
        return
    figure, panel = plt.subplots(figsize=(5, 4.5), layout="constrained")
    panel.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    titles = {"parameters": "parameters alone", "before": "probit, prior as given", "after": "probit, prior tuned"}
    for kind, curve in curves.items():
        sizes = [15 + 150 * share for share in curve["share"]]
        line = panel.plot(curve["confidence"], curve["right"], linewidth=1.2, label=titles[kind])[0]
        panel.scatter(curve["confidence"], curve["right"], s=sizes, color=line.get_color(), alpha=0.6)
    panel.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.02), title=title)
    panel.legend(frameon=False, fontsize="small")
    saved(figure, path)
    plt.close(figure)


def pruning(found: dict, path: Path) -> None:
    """Accuracy against the share kept."""
    plt = pyplot(path)
    if plt is None:
        return
    figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, row in found["accuracy"].items():
        panel.plot(found["kept"], row, marker="o", markersize=4, label=name, linewidth=1.6)
    panel.set(xlabel="share of the weights kept", ylabel="accuracy", title=f"{found['task']}, not retrained")
    panel.invert_xaxis()
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    saved(figure, path)
    plt.close(figure)
