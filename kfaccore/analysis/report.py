"""What the curvature of each layer looks like, from its records alone.

A and G are those of `sides`, F is the exact block. Noise is of the loss's own gradients: blank unless the mean gradient
stored with the records is seen to be theirs (`own`).
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

import numpy as np

from kfaccore.analysis.exact import ExactBlock, hosted
from kfaccore.analysis.kept import finite
from kfaccore.analysis.kronecker import share_of_first_term
from kfaccore.analysis.own import noise
from kfaccore.analysis.sides import side_of_gradients, side_of_inputs
from kfaccore.analysis.spectrum import Spectrum
from kfaccore.linalg.grams import present
from kfaccore.options import by_layer
from kfaccore.record import Record
from kfaccore.record.stored import Stored
from kfaccore.xp.arrays import Array, to_host

ROWS = 2048  # of J up to which the spectrum of F is

Given = Mapping[str, Record | tuple[Array, Array]] | str | PathLike[str]
HEADS = {  # field of a row: how it is headed
    "layer": "layer",
    "shape": "shape",
    "examples": "examples",
    "condition_a": "cond A",
    "rank_a": "eff. rank A",
    "condition_g": "cond G",
    "rank_g": "eff. rank G",
    "condition": "cond F",
    "rank": "eff. rank F",
    "trace": "trace F",
    "kronecker": "Kronecker",
    "dead_inputs": "dead in",
    "dead_outputs": "dead out",
    "duplicated": "duplicated",
    "noise": "noise",
}


@dataclass(frozen=True)
class Row:
    """One layer; what is not known is NaN. Conditions and ranks of blocks are those of the worst conditioned.

    condition*    largest over smallest eigenvalue, inf where singular; F's over its eigenvalues that are not zero
    rank*         effective rank, exp of the entropy of the eigenvalues' shares
    kronecker     share of ||F||^2 in the first term of its best sum of Kronecker products; 1: it is one
    dead_inputs, dead_outputs    columns of a, units of the output, that are zero in every row
    noise         tr Sigma / |G|^2 in examples: the batch beyond which larger ones stop helping
    duplicated    columns of a that are a multiple of an earlier one; NaN where A is too wide to be made
    """

    layer: str
    shape: str
    examples: int
    condition_a: float
    rank_a: float
    condition_g: float
    rank_g: float
    condition: float
    rank: float
    trace: float
    kronecker: float
    dead_inputs: int
    dead_outputs: int
    duplicated: float
    parameters: int
    noise: float = float("nan")


@dataclass(frozen=True)
class Report:
    """`rows`, and the spectra they were made of: {layer: {"A" | "G" | "F": eigenvalues, ascending}}."""

    rows: tuple[Row, ...]
    spectra: Mapping[str, Mapping[str, np.ndarray]]

    def cell(self, row: Row, name: str) -> str:
        """A field of a row for people; blank where nothing is known."""
        return _text(getattr(row, name))

    def to_dict(self) -> dict[str, object]:
        """For JSON: NaN and infinity are None."""
        spectra = {name: {kind: x.tolist() for kind, x in found.items()} for name, found in self.spectra.items()}
        return {"layers": [finite(asdict(row)) for row in self.rows], "spectra": spectra}

    def plot(self) -> object:
        """A matplotlib figure: eigenvalues of A, G and F, largest first, a line a layer."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4), layout="constrained")
        panels: Any = figure.subplots(1, 3)
        for panel, kind in zip(panels, "AGF", strict=True):
            for name, found in self.spectra.items():
                values = found.get(kind, np.zeros(0))[::-1]
                shown = values[values > 0]
                panel.plot(range(1, len(shown) + 1), shown, label=name, linewidth=1.2)
            panel.set(title=f"eigenvalues of {kind}", xlabel="index", yscale="log")
            panel.grid(alpha=0.3)
        panels[0].legend(frameon=False, fontsize="small")
        return figure

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{text}</th>" for text in HEADS.values())
        body = "".join(f"<tr>{_cells(row)}</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __str__(self) -> str:
        cells = [list(HEADS.values()), *[[_text(getattr(row, name)) for name in HEADS] for row in self.rows]]
        widths = [max(len(line[i]) for line in cells) for i in range(len(HEADS))]
        aligned = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
        return "\n".join("  ".join(line) for line in aligned)


def report(records: Given, grads: Mapping[str, Array] | None = None) -> Report:
    """The report of {layer: Record}, {layer: (a, g)} with arrays of any framework, or of a file of records.

    grads   the mean gradients of the batch, of which noise is told; a file may hold its own

    Raises ValueError for records without draws or with values that are not finite, and what `load_records` raises.
    """
    stored = Stored(records) if isinstance(records, str | PathLike) else None
    if stored is None:
        by_layer(" to Record or (a, g), or a file", records=records)
    layers: Mapping[str, Record | tuple[Array, Array]] = records if stored is None else stored  # type: ignore[assignment]
    rows = []
    spectra = {}
    for name in layers:
        given = layers[name]
        record = _of_pair(*given) if isinstance(given, tuple) else given
        grad = (grads or {}).get(name)
        if grad is None and stored is not None:
            grad = stored.finite_grad(name)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is named, or stands as no number
            row, found = _of_layer(name, record, grad)
        rows.append(row)
        spectra[name] = found
    return Report(tuple(rows), spectra)


def _of_pair(a: Any, g: Array) -> Record:
    """Of a mean loss over the examples."""
    record = Record(a, g, n=1.0)
    return replace(record, n=float(record.batch))


def _of_layer(name: str, record: Record, grad: Array | None) -> tuple[Row, dict[str, np.ndarray]]:
    if record.draws == 0:
        raise ValueError(f"the record of layer {name!r} has no draws: its F is not defined")
    host = hosted(record)
    A = side_of_inputs(host)
    G = side_of_gradients(host)
    if not (A.finite and G.finite):
        raise ValueError(f"layer {name!r}: a or g holds values that are not finite, or whose squares are not")
    exact = ExactBlock(host, ROWS, wide=True)
    if not np.isfinite(exact.trace):
        raise ValueError(f"layer {name!r}: the trace of F is no number: a times g is too large for squares in float64")
    of_f = [_of_rows(rows, exact) for rows in exact.grams] if exact.exact else []
    found = {"A": A.spectra, "G": G.spectra, "F": of_f}
    blocks = f"{record.blocks} x " if record.blocks > 1 else ""
    row = Row(
        name,
        f"{blocks}{record.d_out} x {record.d_in}",
        present(record),
        *_worst(found["A"]),
        *_worst(found["G"]),
        *_worst(of_f, positive=True),
        trace=exact.trace,
        kronecker=share_of_first_term(exact),
        dead_inputs=A.dead,
        dead_outputs=G.dead,
        parameters=record.blocks * record.d_out * record.d_in,
        duplicated=A.duplicated,
        noise=noise(host, None if grad is None else to_host(grad)),
    )
    return row, {kind: np.sort(np.concatenate([s.values for s in of])) for kind, of in found.items() if of}


def _of_rows(gram: np.ndarray, exact: ExactBlock) -> Spectrum:
    """The eigenvalues of F that can be other than zero: those of J J^T / n."""
    values = np.linalg.eigvalsh(gram) / exact.record.n
    many = min(exact.rows, exact.shape[1] * exact.shape[2])
    return Spectrum(np.maximum(values[-many:], 0.0))


def _worst(found: Sequence[Spectrum], positive: bool = False) -> tuple[float, float]:
    """(condition, effective rank) of the worst conditioned block."""
    if not found:
        return float("nan"), float("nan")
    if positive:
        found = [Spectrum(s.values[s.values > 1e-14 * s.values[-1]]) for s in found]
        found = [s for s in found if s.values.size] or [Spectrum(np.zeros(1))]
    worst = max(found, key=lambda s: s.condition)
    return worst.condition, worst.effective_rank


def _cells(row: Row) -> str:
    return "".join(f"<td>{html.escape(_text(getattr(row, name)))}</td>" for name in HEADS)


def _text(value: object) -> str:
    """Blank where nothing is known."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.3g}"
    return str(value)
