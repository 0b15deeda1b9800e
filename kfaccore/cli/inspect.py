"""`kfaccore inspect`: what the curvature of a saved run, or of records, looks like, layer by layer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kfaccore.cli.contents import Contents, told
from kfaccore.cli.fail import fail, or_fail
from kfaccore.cli.reading import Step
from kfaccore.cli.results import text
from kfaccore.cli.table import lines

WIDEST = 2560  # of a dense factor that is decomposed without being asked

FORMATS = {"damping_over_mean": ".1e", "damping_over_top": ".1e", "gamma": ".1f"}


def inspect(
    file: Annotated[Path, typer.Argument(help="run.safetensors of a preconditioned run, or a file of records")],
    plot: Annotated[bool, typer.Option("--plot", help="Write the spectra beside FILE.")] = False,
    full: Annotated[bool, typer.Option("--full", help=f"Decompose factors wider than {WIDEST}, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Condition numbers, effective ranks, traces and damping against the spectrum, for each layer; nothing that the
    file does not know."""
    try:
        if file.suffix == ".npz" or _of_records(file):
            _records(file, plot, full, as_json)
        else:
            _state(Contents(file), plot, full, as_json)
    except (ValueError, TypeError, KeyError, FileNotFoundError) as error:
        fail(str(error))


def _of_records(file: Path) -> bool:
    from kfaccore.io import Opened

    return any(name.startswith("records/") for name in Opened(file).names)


def _records(file: Path, plot: bool, full: bool, as_json: bool) -> None:
    """The report of `kf.analysis`, and what a step on these records would be."""
    from kfaccore.analysis import report
    from kfaccore.record.stored import Stored

    stored = Stored(file)
    found = report(file)
    step = Step(stored, sys.maxsize if full else WIDEST)
    if as_json:
        layers = found.to_dict()["layers"]
        typer.echo(text({"meta": stored.meta, "layers": layers, "reading": step.to_dict()}))
    else:
        sizes = [row.parameters for row in found.rows]
        typer.echo("\n".join([f"records of {_title(file, stored.meta)}", *_report_lines(found)]))
        typer.echo("\n".join([*told(stored.meta, sum(sizes)), *step.text()]))
    if plot:
        _drawn(file, found.spectra, as_json)


def _report_lines(found: Any) -> list[str]:
    from kfaccore.analysis.report import HEADS

    wanted = [name for name in HEADS if any(found.cell(row, name) for row in found.rows)]
    head = tuple(HEADS[name] for name in wanted)
    return lines(head, [tuple(found.cell(row, name) for name in wanted) for row in found.rows])


def _state(held: Contents, plot: bool, full: bool, as_json: bool) -> None:
    """Factors of a saved run, read one pair at a time."""
    pairs = held.pairs()
    if not pairs:
        method = held.meta.get("method")
        fail(f"{held.path} holds no Kronecker factors (method {method}): nothing to inspect")
    rows = []
    spectra = {}
    for title, layer in pairs:
        found = {name: _spectra(x, full) for name, x in held.factors(title).items()}
        rows.append(_row(title, found, held.damping(layer), "terms" in held.meta))
        spectra[title] = {name: [s.values for s in of] for name, of in found.items()}
    covered = held.covered()
    if as_json:
        total = held.meta.get("parameters")
        share = covered / total if isinstance(total, int) and total > 0 else None
        whole = {"meta": held.meta, "layers": rows, "covered": share, "held": held.held()}
        typer.echo(text(whole))
    else:
        typer.echo("\n".join([_title(held.path, held.meta), *_table(rows), *told(held.meta, covered)]))
    if plot:
        import numpy as np

        flat = {title: {k: np.sort(np.concatenate(v)) for k, v in of.items()} for title, of in spectra.items()}
        _drawn(held.path, flat, as_json)


def _drawn(file: Path, spectra: Any, as_json: bool) -> None:
    from kfaccore.cli.plot import spectra as draw

    target = file.with_name(file.stem + "-spectra.png")
    with or_fail():
        draw(spectra, target)
    typer.echo(f"spectra: {target}", err=as_json)


def _title(file: Path, meta: Mapping[str, Any]) -> str:
    """File, and of method, model and task what is known."""
    words = [
        f"{word} {meta[key]}" for key, word in (("method", "by"), ("model", "of"), ("task", "on")) if meta.get(key)
    ]
    return " ".join([f"{file.name}:" if words else file.name, *words])


def _spectra(factor: Any, full: bool) -> list[Any]:
    """One a block; of a factor too wide to decompose only its trace, spread evenly, is known: none."""
    from kfaccore.analysis import spectrum

    return spectrum(factor) if full or factor.ndim == 2 or factor.shape[-1] <= WIDEST else []


def _row(title: str, pair: dict[str, list], damping: float | None, terms: bool) -> dict[str, Any]:
    """Figures of the worst block of each factor; damping over the block's mean and top eigenvalue, or over those of
    the factor where it is added to each of them (loss terms)."""
    figures: dict[str, Any] = {"layer": title, "blocks": max(len(pair["A"]), len(pair["G"]), 1)}
    for factor, found in pair.items():
        if not found:
            figures[factor] = {"size": None, "condition": None, "effective_rank": None, "trace": None}
            continue
        worst = max(found, key=lambda s: s.condition)
        figures[factor] = {
            "size": len(worst.values),
            "condition": worst.condition if worst.condition < float("inf") else None,
            "effective_rank": worst.effective_rank,
            "trace": worst.trace,
        }
        if terms:
            figures[factor] |= _ratios(damping, [(s.trace / len(s.values), s.values[-1]) for s in found])
    both = zip(pair["A"], pair["G"], strict=True) if pair["A"] and pair["G"] else ()
    of_blocks = [(a.trace / len(a.values) * g.trace / len(g.values), a.values[-1] * g.values[-1]) for a, g in both]
    whole = None if terms else damping
    gamma = _gamma(pair, whole) if whole and of_blocks else None
    return {**figures, "damping": damping, **_ratios(whole, of_blocks), "gamma": gamma}


def _gamma(pair: dict[str, list], damping: float) -> float:
    """How many parameters the data decide against the damping: sum of s / (s + damping) over eigenvalues s of G (x) A.
    An eigenvalue of the smaller factor at a time, so that not all products are held."""
    total = 0.0
    for a, g in zip(pair["A"], pair["G"], strict=True):
        few, many = sorted((a.values, g.values), key=len)
        total += sum(float((s * many / (s * many + damping)).sum()) for s in few)
    return total


def _ratios(damping: float | None, sizes: list[tuple[float, float]]) -> dict[str, float | None]:
    """Damping over the largest of (mean, top) eigenvalues of the blocks."""
    if damping is None or not sizes or not max(top for _, top in sizes) > 0:
        return {"damping_over_mean": None, "damping_over_top": None}
    mean, top = (max(column) for column in zip(*sizes, strict=True))
    return {"damping_over_mean": damping / mean, "damping_over_top": damping / top}


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """A line a factor; damping only where the file has it."""
    ratios = ("damping_over_mean", "damping_over_top") if any(row["damping"] is not None for row in rows) else ()
    ratios += ("gamma",) if any(row["gamma"] is not None for row in rows) else ()
    heads = ("layer", "factor", "size", "condition", "eff. rank", "trace")
    body: list[tuple[str, ...] | str] = []
    for row in rows:
        for factor in ("A", "G"):
            found = row[factor]
            cells = [row["layer"] if factor == "A" else "", factor, *_figures(found)]
            of = found if "damping_over_mean" in found else row if factor == "A" else {}
            cells += [f"{of[key]:{FORMATS[key]}}" if of.get(key) else "" for key in ratios]
            body.append(tuple(cells))
    named = {"damping_over_mean": "damping/mean", "damping_over_top": "damping/top", "gamma": "decided"}
    return lines((*heads, *(named[key] for key in ratios)), body)


def _figures(found: dict[str, Any]) -> tuple[str, ...]:
    if found["size"] is None:
        return "wide", "--full", "", ""
    condition = "singular" if found["condition"] is None else f"{found['condition']:.1e}"
    return str(found["size"]), condition, f"{found['effective_rank']:.1f}", f"{found['trace']:.3g}"
