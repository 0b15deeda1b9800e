"""A prior of its own for a bias, or for any column: functions of records, with their twins for the mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from kfaccore.convolution.patches import Patches
from kfaccore.record import Ids, Record
from kfaccore.xp.arrays import Array, device_of, namespace

BIAS = ".bias"  # appended to a layer's name


def apart(records: Mapping[str, Record], layers: Collection[str]) -> dict[str, Record]:
    """Records in which the last column of `layers`, the ones of the bias, is a layer of its own, NAME.bias.

    The curvature fitted to them loses the correlation of bias and weights. ValueError where the column is not ones.
    """
    found = {}
    for name, record in records.items():
        if name not in layers:
            found[name] = record
            continue
        weight, bias = _columns(name, record)
        found[name] = weight
        found[name + BIAS] = bias
    _check(layers, records)
    return found


def apart_mean(mean: Mapping[str, Array], layers: Collection[str]) -> dict[str, Array]:
    """The twin of `apart` for {layer: (..., d_out, d_in)}."""
    found = {}
    for name, matrix in mean.items():
        if name in layers:
            found[name] = matrix[..., :-1]
            found[name + BIAS] = matrix[..., -1:]
        else:
            found[name] = matrix
    _check(layers, mean)
    return found


def in_units(records: Mapping[str, Record], columns: Mapping[str, Array]) -> dict[str, Record]:
    """Records whose inputs are divided by the root of a precision for each column, {layer: (d_in,) or (blocks, d_in)}:
    with precision 1 the posterior of these and of `in_units_mean` has that prior a column (ARD), exactly so for K-FAC.
    """
    _check(columns, records)
    return {name: _scaled(record, columns[name]) if name in columns else record for name, record in records.items()}


def in_units_mean(mean: Mapping[str, Array], columns: Mapping[str, Array]) -> dict[str, Array]:
    """The twin of `in_units`: columns times the root of their precision."""
    _check(columns, mean)
    found = dict(mean)
    for name, precision in columns.items():
        root = _root(precision)
        found[name] = mean[name] * (root[:, None, :] if root.ndim == 2 else root)
    return found


def _check(layers: Collection[str], known: Mapping[str, object]) -> None:
    unknown = sorted(set(layers) - set(known))
    if unknown:
        raise ValueError(f"no layers {unknown}; there are {sorted(known)}")


def _root(precision: Array) -> Array:
    xp = namespace(precision)
    if not bool(xp.all(precision > 0)):
        raise ValueError(f"the precision of a column is {float(xp.min(precision))}; need numbers > 0")
    return xp.sqrt(precision)


def _scaled(record: Record, precision: Array) -> Record:
    if isinstance(record.a, Ids):
        raise ValueError(
            "in_units got an embedding, whose inputs are ids: give its rows precisions through `precision`, or "
            "unfold it with record.rows()"
        )
    root = _root(precision)
    return replace(record, a=record.rows() / (root[:, None, None, :] if root.ndim == 2 else root))


def _columns(name: str, record: Record) -> tuple[Record, Record]:
    """The record without its last column, and that column."""
    xp = namespace(record.g)
    inputs = record.a
    if isinstance(inputs, Patches) and inputs.bias:
        shape = (record.blocks, record.batch, record.shared, 1)
        ones = xp.ones(shape, dtype=record.g.dtype, device=device_of(record.g))
        return replace(record, a=Patches(inputs.image, inputs.window)), replace(record, a=ones)
    if isinstance(inputs, Ids | Patches) or inputs.shape[-1] < 2:
        raise ValueError(f"layer {name!r} has no column of ones to set apart")
    last = inputs[..., -1:]
    expected = xp.ones_like(last)
    if record.mask is not None:
        expected = expected * xp.astype(record.mask, last.dtype)[None, :, :, None]
    if not bool(xp.all(last == expected)):
        raise ValueError(f"the last column of layer {name!r} is not ones, so it is no bias: leave it out of `layers`")
    return replace(record, a=inputs[..., :-1]), replace(record, a=last)
