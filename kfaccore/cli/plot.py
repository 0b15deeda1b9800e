"""Pictures, with matplotlib if it is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import typer

from kfaccore.written import written


def curves(found: dict[str, dict[str, list]], title: str, path: Path, batch: int) -> None:
    """Loss against steps and against training seconds; of methods that know the noise of their batches rho, and the
    critical batch beside the `batch` they have."""
    plt = pyplot(path)
    if plt is None:
        return
    noisy = {name: curve for name, curve in found.items() if "rho" in curve}
    count = 4 if noisy else 2
    figure, panels = plt.subplots(1, count, figsize=(5 * count, 4), layout="constrained")
    panels[1].sharey(panels[0])
    for panel, key, label in zip(panels, ("step", "seconds"), ("step", "training time [s]"), strict=False):
        for name, curve in found.items():
            panel.plot(curve[key], curve["loss"], label=name, linewidth=1.8)
        panel.set(xlabel=label, yscale="log")
    panels[0].set_ylabel("mean loss")
    panels[0].legend(frameon=False)
    for panel, key in zip(panels[2:], ("rho", "critical_batch"), strict=False):
        for name, curve in noisy.items():
            values = [np.nan if x is None else x for x in curve[key]]
            panel.plot(curve["step"], values, label=name, color=f"C{[*found].index(name)}", linewidth=1.8)
        panel.set(xlabel="step")
    if noisy:
        panels[2].set(ylim=(0, 1.02), title="rho: share of a batch's slope that is real")
        panels[3].axhline(batch, color="0.4", linestyle="--", label="batch")
        panels[3].set(yscale="log", title="critical batch")
        panels[3].legend(frameon=False)
    for panel in panels:
        panel.grid(alpha=0.3, which="both")
    figure.suptitle(title)
    saved(figure, path)
    plt.close(figure)


def spectra(found: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> None:
    """Eigenvalues of every factor, and of the block where they are known, largest first: {layer: {"A": values}}."""
    plt = pyplot(path)
    if plt is None:
        return
    kinds = [kind for kind in ("A", "G", "F") if any(len(of.get(kind, ())) for of in found.values())]
    figure, panels = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 4), layout="constrained", squeeze=False)
    for panel, kind in zip(panels[0], kinds, strict=True):
        for layer, of in found.items():
            values = [x for x in of.get(kind, ())[::-1] if x > 0]
            panel.plot(range(1, len(values) + 1), values, label=layer, linewidth=1.2)
        panel.set(xlabel="index", yscale="log", title=f"eigenvalues of {kind}")
        panel.grid(alpha=0.3)
    panels[0][0].legend(frameon=False, fontsize="small")
    saved(figure, path)
    plt.close(figure)


def gains(summary: dict[str, dict[str, float]], path: Path) -> None:
    """Gain against bytes and against seconds a step, a point a method that was measured on all layers."""
    plt = pyplot(path)
    if plt is None:
        return
    known = {name: row for name, row in summary.items() if row["gain"] == row["gain"]}
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    keys = {"bytes": "bytes of all states", "seconds": "seconds a step, all layers"}
    for panel, (key, title) in zip(panels, keys.items(), strict=True):
        for index, (name, row) in enumerate(known.items()):
            marker = "osD^vPX*"[index % 8]
            colour = f"C{index % 10}"
            panel.scatter(row[key], row["gain"], s=60, marker=marker, color=colour, label=name, alpha=0.85)
        panel.set(xlabel=title, xscale="log", ylim=(-0.03, 1.05))
        panel.axhline(0.3, color="0.6", linewidth=0.8, linestyle="--")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("gain: share of the best decrease")
    points, labels = panels[0].get_legend_handles_labels()
    figure.legend(points, labels, loc="outside right upper", frameon=False)
    saved(figure, path)
    plt.close(figure)


def solution(pinn: Any, params: Any, found: dict[str, dict[str, list]], title: str, path: Path) -> None:
    """The network and its error over the first two coordinates (others in mid-domain), and relative L2 errors."""
    plt = pyplot(path)
    if plt is None:
        return
    box = pinn.problem.box
    axes = [np.linspace(low, high, 81) for low, high in box[:2]]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    x = np.concatenate([grid, np.tile([(low + high) / 2 for low, high in box[2:]], (len(grid), 1))], axis=1)
    u = pinn.predict(params, x)
    figure, panels = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for panel, field, name in zip(panels, (u, u - pinn.problem.solution(x)), ("network", "error"), strict=False):
        top = float(np.abs(field).max())
        shade = {"cmap": "RdBu_r", "vmin": -top, "vmax": top} if name == "error" else {"cmap": "viridis"}
        picture = panel.pcolormesh(*axes, field.reshape(81, 81).T, shading="gouraud", **shade)
        figure.colorbar(picture, ax=panel)
        panel.set(title=name, xlabel="coordinate 0", ylabel="coordinate 1")
    for name, curve in found.items():
        panels[2].plot(curve["seconds"], curve["relative"], label=name, linewidth=1.8)
    panels[2].set(title="relative L2 error", xlabel="training time [s]", yscale="log")
    panels[2].grid(alpha=0.3, which="both")
    panels[2].legend(frameon=False)
    figure.suptitle(title)
    saved(figure, path)
    plt.close(figure)


def saved(figure: Any, path: Path) -> None:
    """To `path`, whole or not at all. OSError where it cannot be written, or is of a kind of picture there is not."""
    try:
        with written(path) as file:
            figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise OSError(f"{path} could not be drawn: {error}") from error


def pyplot(path: Path) -> ModuleType | None:
    """matplotlib.pyplot drawing to files; None, after a word, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        typer.echo(f"{path} was not drawn: pip install 'kfaccore[plot]'", err=True)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
