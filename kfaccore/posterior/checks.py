"""What a posterior refuses, and in which words."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, prod

import numpy as np

from kfaccore.linalg.basis import Basis
from kfaccore.options import by_layer
from kfaccore.record import Record
from kfaccore.xp.arrays import Array, is_tracer, namespace, to_host
from kfaccore.xp.ranges import Range, within

_NUMBER = Range("a number", lambda x: True)


def check_layers(what: str, first: Mapping[str, object], second: Mapping[str, object]) -> None:
    """ValueError unless both have the same layers, TypeError for what is no mapping."""
    by_layer(**{f"one of {what}": x for x in (first, second) if not isinstance(x, Mapping)})
    if set(first) != set(second):
        raise ValueError(
            f"layers of {what} differ: only in the first {sorted(set(first) - set(second))}, only in the second "
            f"{sorted(set(second) - set(first))}; for a part of the layers give all of them that part alone"
        )


def check_shapes(name: str, mean: Array, basis: Basis) -> None:
    """ValueError unless the mean is a matrix of its layer."""
    shape = basis.shape
    if tuple(mean.shape) != shape and not (shape[0] == 1 and tuple(mean.shape) == shape[1:]):
        raise ValueError(f"mean of layer {name!r} has shape {tuple(mean.shape)}; need (blocks, d_out, d_in) = {shape}")


def check_positive(name: str, basis: Basis, precision: float | Array, scale: float | Array) -> None:
    """ValueError unless scale F~ + precision I is positive definite; tracers are believed."""
    if any(is_tracer(x) for x in (basis.values, precision, scale)):
        return
    for what, number in (("precision", precision), ("scale", scale)):
        within(f"{what} of layer {name!r}", number, _NUMBER)
    values = Basis(to_host(basis.values), basis.Qg, basis.Qa).cleaned(signed=True)
    shift = float(to_host(precision))
    times = float(to_host(scale))
    if not (isfinite(shift) and shift >= 0 and isfinite(times) and times > 0):
        raise ValueError(f"layer {name!r} has precision {shift} and scale {times}; need finite numbers, >= 0 and > 0")
    for what, number in (("precision", shift), ("scale", times)):
        with np.errstate(over="ignore", under="ignore"):
            held = float(np.asarray(number, np.asarray(to_host(basis.values)).dtype))
        if not isfinite(held) or (number > 0) != (held > 0):
            raise ValueError(
                f"layer {name!r} has {what} {number:.6g}, {held} in the {basis.values.dtype} of its curvature: "
                f"need a number that this dtype holds, or a curvature in float64"
            )
    smallest = times * float(namespace(values).min(values))
    if not smallest + shift > 0:
        need = "any precision > 0" if smallest >= 0 else f"a precision above {-smallest:.6g}"
        kind = "singular" if smallest == 0 else "indefinite"
        raise ValueError(
            f"layer {name!r}: scale F~ is {kind}, its smallest eigenvalue is {smallest:.6g}, and precision {shift:.6g} "
            f"leaves scale F~ + precision I without an inverse; need {need}"
        )


def check_records(layers: Mapping[str, Basis], records: Mapping[str, Record], positions: bool = False) -> None:
    """ValueError unless the records are of these layers and of the same examples."""
    check_layers("records and curvature", records, layers)
    for name, record in records.items():
        shape = (record.blocks, record.d_out, record.d_in)
        if shape != layers[name].shape:
            raise ValueError(
                f"the record of layer {name!r} is of (blocks, d_out, d_in) = {shape}, the curvature of "
                f"{layers[name].shape} ({prod(layers[name].shape)} parameters): they are of different models"
            )
    counts = {name: (record.draws, record.batch) for name, record in records.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"records differ in (draws, batch): {counts}; what all examples share, or mixes them, has no gradient of "
            f"one example: leave those layers out of mean, curvature and records"
        )
    shared = {name: record.shared for name, record in records.items()}
    if positions and len(set(shared.values())) > 1:
        raise ValueError(f"layers differ in positions: {shared}; only equal ones can be told apart: leave others out")
