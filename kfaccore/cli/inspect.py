"""`kfaccore inspect`: what the curvature of a saved run looks like, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kfaccore.cli.fail import fail


def inspect(
    file: Annotated[Path, typer.Argument(help="run.safetensors of a preconditioned run")],
    plot: Annotated[bool, typer.Option("--plot", help="Write the spectra beside FILE.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Shapes, condition numbers, effective ranks, traces and damping against the spectrum, for each layer."""
    from kfaccore import load, metadata

    try:
        tree, meta = load(file), metadata(file)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    state = tree.get("state", {})
    layers = {**state.get("layers", {}), **state.get("network", {}).get("layers", {})}
    order = [name for name in meta.get("blocks", layers) if {"A", "G", "weight"} <= set(layers.get(name, ()))]
    spectra = {name: _spectra(layers[name]) for name in order}
    if not spectra:
        fail(f"{file} holds no Kronecker factors (method {meta.get('method')}): nothing to inspect")
    rows = [_row(name, pair, meta) for name, pair in spectra.items()]
    sizes = {name: matrix.size for name, matrix in tree.get("params", {}).items()}
    covered = sum(sizes.get(name, 0) for name in spectra) / max(1, sum(sizes.values()))
    if as_json:
        typer.echo(json.dumps({"meta": meta, "layers": rows, "covered": covered}, indent=2))
    else:
        _show(file, rows, covered, meta)
    if plot:
        from kfaccore.cli.plot import spectra as draw

        target = file.with_name(file.stem + "-spectra.png")
        draw(spectra, target)
        typer.echo(f"spectra: {target}", err=as_json)


def _spectra(state: dict[str, Any]) -> dict[str, list]:
    from kfaccore.analysis import spectrum
    from kfaccore.factors import mean

    return {factor: spectrum(mean(state[factor], state["weight"])) for factor in ("A", "G")}


def _row(name: str, pair: dict[str, list], meta: dict[str, Any]) -> dict[str, Any]:
    """Figures of the worst block of each factor; damping over the block's mean and top eigenvalue."""
    A, G = pair["A"], pair["G"]
    damping = meta.get("damping", {}).get(name)
    mean = max(a.trace / len(a.values) * g.trace / len(g.values) for a, g in zip(A, G, strict=True))
    top = max(a.values[-1] * g.values[-1] for a, g in zip(A, G, strict=True))
    figures: dict[str, Any] = {"layer": name, "blocks": len(A)}
    for factor, found in pair.items():
        worst = max(found, key=lambda s: s.condition)
        figures[factor] = {
            "size": len(worst.values),
            "condition": worst.condition if worst.condition < float("inf") else None,
            "effective_rank": worst.effective_rank,
            "trace": worst.trace,
        }
    ratios = {"damping": damping, "damping_over_mean": None, "damping_over_top": None}
    if damping is not None and top > 0:
        ratios |= {"damping_over_mean": damping / mean, "damping_over_top": damping / top}
    return {**figures, **ratios}


def _show(file: Path, rows: list[dict[str, Any]], covered: float, meta: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    heads = ("layer", "factor", "size", "condition", "eff. rank", "trace", "λ / mean", "λ / top")
    table = Table(*heads, title=f"{file.name}: {meta.get('method')} on {meta.get('task')}")
    for row in rows:
        for factor in ("A", "G"):
            found = row[factor]
            condition = "singular" if found["condition"] is None else f"{found['condition']:.1e}"
            cells = (str(found["size"]), condition, f"{found['effective_rank']:.1f}", f"{found['trace']:.3g}")
            ratios = [f"{row[key]:.1e}" if row[key] else "" for key in ("damping_over_mean", "damping_over_top")]
            table.add_row(
                row["layer"] if factor == "A" else "", factor, *cells, *(ratios if factor == "A" else ("", ""))
            )
    console = Console()
    console.print(table)
    console.print(f"{covered:.0%} of the parameters are covered by Kronecker factors; λ is the damping.")
