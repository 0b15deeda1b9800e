"""Pictures, with matplotlib if it is there."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import typer


def curves(found: dict[str, dict[str, list]], title: str, path: Path) -> None:
    """Loss against steps and against training seconds."""
    plt = pyplot(path)
    if plt is None:
        return
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, key, label in zip(panels, ("step", "seconds"), ("step", "training time [s]"), strict=True):
        for name, curve in found.items():
            panel.plot(curve[key], curve["loss"], label=name, linewidth=1.8)
        panel.set(xlabel=label, yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("mean loss")
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def spectra(found: dict[str, Any], path: Path) -> None:
    """Eigenvalues of every factor, largest first."""
    plt = pyplot(path)
    if plt is None:
        return
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, factor in zip(panels, ("A", "G"), strict=True):
        for layer, pair in found.items():
            for spectrum in pair[factor]:
                panel.plot(range(1, len(spectrum.values) + 1), spectrum.values[::-1], label=layer, linewidth=1.2)
        panel.set(xlabel="index", yscale="log", title=f"eigenvalues of {factor}")
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def costs(found: dict[str, dict[str, float]], path: Path) -> None:
    """Errors of the block and of the damped direction against seconds a step, a point a method."""
    plt = pyplot(path)
    if plt is None:
        return
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), sharex=True, layout="constrained")
    keys = {"error": "block: ‖F - F~‖ / ‖F‖", "inverse_error": "direction: ‖x~ - x‖ / ‖x‖"}
    for panel, (key, title) in zip(panels, keys.items(), strict=True):
        for index, (name, row) in enumerate(found.items()):
            error = min(max(row[key], 1e-3), 2.0)  # what is off the scale sits on its edge
            if row[key] == row[key] and row["seconds"] == row["seconds"]:
                marker = "osD^vPX*"[index % 8]
                colour = f"C{index % 10}"
                panel.scatter(row["seconds"], error, s=60, marker=marker, color=colour, label=name, alpha=0.8)
        panel.set(xlabel="seconds a step", ylabel="error, from 0.001 to 2", xscale="log", yscale="log", title=title)
        panel.grid(alpha=0.3, which="both")
    handles = {}
    for panel in panels:
        points, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, points, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def solution(pinn: Any, params: Any, found: dict[str, dict[str, list]], title: str, path: Path) -> None:
    """The network and its error over the first two coordinates (others in mid-domain), and relative L2 errors."""
    plt = pyplot(path)
    if plt is None:
        return
    import numpy as np

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
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
