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
        tree = load(file)
        meta = metadata(file)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    state = tree.get("state", {})
    layers = {**state.get("layers", {}), **state.get("network", {}).get("layers", {})}
    pairs = {name: _pairs(name, layers.get(name, {}), meta) for name in meta.get("blocks", layers)}
    spectra = {title: _spectra(pair) for found in pairs.values() for title, pair in found.items()}
    if not spectra:
        fail(f"{file} holds no Kronecker factors (method {meta.get('method')}): nothing to inspect")
    rows = [_row(title, name, spectra[title], meta) for name, found in pairs.items() for title in found]
    sizes = {name: matrix.size for name, matrix in tree.get("params", {}).items()}
    covered = sum(sizes.get(name, 0) for name, found in pairs.items() if found) / max(1, sum(sizes.values()))
    if as_json:
        typer.echo(json.dumps({"meta": meta, "layers": rows, "covered": covered}, indent=2))
    else:
        _show(file, rows, covered, meta)
    if plot:
        from kfaccore.cli.plot import spectra as draw

        target = file.with_name(file.stem + "-spectra.png")
        draw(spectra, target)
        typer.echo(f"spectra: {target}", err=as_json)


def _pairs(name: str, state: dict[str, Any], meta: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What holds a pair of factors in a layer's state by title: the layer, or each of its loss terms."""
    found = {name: state}
    if "terms" in state:
        terms = meta.get("terms", sorted(state["terms"], key=int))
        found = {f"{name} {term}": state["terms"][str(i)] for i, term in enumerate(terms)}
    return {title: pair for title, pair in found.items() if {"A", "G", "weight"} <= set(pair)}


def _spectra(state: dict[str, Any]) -> dict[str, list]:
    from kfaccore.analysis import spectrum
    from kfaccore.factors import mean

    return {factor: spectrum(mean(state[factor], state["weight"])) for factor in ("A", "G")}


def _row(title: str, name: str, pair: dict[str, list], meta: dict[str, Any]) -> dict[str, Any]:
    """Figures of the worst block of each factor; damping over the block's mean and top eigenvalue, or over those of
    the factor where it is added to each of them (loss terms)."""
    damping = meta.get("damping", {}).get(name)
    figures: dict[str, Any] = {"layer": title, "blocks": len(pair["A"])}
    for factor, found in pair.items():
        worst = max(found, key=lambda s: s.condition)
        figures[factor] = {
            "size": len(worst.values),
            "condition": worst.condition if worst.condition < float("inf") else None,
            "effective_rank": worst.effective_rank,
            "trace": worst.trace,
        }
        if "terms" in meta:
            figures[factor] |= _ratios(damping, [(s.trace / len(s.values), s.values[-1]) for s in found])
    both = zip(pair["A"], pair["G"], strict=True)
    of_blocks = [(a.trace / len(a.values) * g.trace / len(g.values), a.values[-1] * g.values[-1]) for a, g in both]
    return {**figures, "damping": damping, **_ratios(None if "terms" in meta else damping, of_blocks)}


def _ratios(damping: float | None, sizes: list[tuple[float, float]]) -> dict[str, float | None]:
    """Damping over the largest of (mean, top) eigenvalues of the blocks."""
    mean, top = (max(column) for column in zip(*sizes, strict=True))
    if damping is None or not top > 0:
        return {"damping_over_mean": None, "damping_over_top": None}
    return {"damping_over_mean": damping / mean, "damping_over_top": damping / top}


def _show(file: Path, rows: list[dict[str, Any]], covered: float, meta: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    heads = ("layer", "factor", "size", "condition", "eff. rank", "trace", "λ / mean", "λ / top")
    table = Table(title=f"{file.name}: {meta.get('method')} on {meta.get('task')}")
    for head in heads:
        table.add_column(head, no_wrap=head == "layer")
    for row in rows:
        for factor in ("A", "G"):
            found = row[factor]
            condition = "singular" if found["condition"] is None else f"{found['condition']:.1e}"
            cells = (str(found["size"]), condition, f"{found['effective_rank']:.1f}", f"{found['trace']:.3g}")
            first = factor == "A"
            of = found if "damping_over_mean" in found else row if first else {}
            ratios = (f"{of[key]:.1e}" if of.get(key) else "" for key in ("damping_over_mean", "damping_over_top"))
            table.add_row(row["layer"] if first else "", factor, *cells, *ratios)
    each = ", added to each factor" if "terms" in meta else ""
    console = Console()
    console.print(table)
    console.print(f"{covered:.0%} of the parameters are covered by Kronecker factors; λ is the damping{each}.")
