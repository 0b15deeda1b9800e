"""Records on disk: a safetensors file that keeps images folded, or a plain .npz of `layer.a` and `layer.g`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from kfaccore.convolution.patches import Patches, Window
from kfaccore.io import load, metadata, save
from kfaccore.record import npz
from kfaccore.record.record import Factored, Ids, Record
from kfaccore.record.sharing import concat
from kfaccore.xp.arrays import Array

Named = dict[str, Record]
Grads = dict[str, np.ndarray]
_UNPACKED = 1 << 28


def save_records(
    path: str | os.PathLike,
    records: Mapping[str, Record],
    grads: Mapping[str, Array | Factored] | None = None,
    **meta: object,
) -> None:
    """Write records of one batch, and the gradients to be preconditioned if there are any, for `load_records`."""
    tree: dict[str, dict[str, Any]] = {}
    windows = {}
    for name, record in records.items():
        leaves = tree[name] = {"g": record.g, "n": float(record.n)}
        if isinstance(record.a, Ids):
            leaves |= {"index": record.a.index, "size": record.a.size}
        elif isinstance(record.a, Patches):
            leaves |= {"image": record.a.image}
            windows[name] = {**asdict(record.a.window), "bias": record.a.bias}
        else:
            leaves |= {"a": record.a}
        for extra in ("mask", "ids"):
            if getattr(record, extra) is not None:
                leaves[extra] = getattr(record, extra)
        if grads is not None and name in grads:
            grad = grads[name]
            leaves["grad"] = grad.dense() if isinstance(grad, Factored) else grad
    save(path, {"records": tree}, windows=windows, order=list(records), **meta)


def load_records(*paths: str | os.PathLike, unpacked: int = _UNPACKED) -> tuple[Named, Grads]:
    """Records by layer, several files joined as micro-batches, and the gradients stored with them (n-weighted means).

    unpacked   bytes that the arrays of a compressed .npz may take; four times the file where that is more

    Raises ValueError, naming file and layer, for what is not a record; FileNotFoundError when there is no file.
    """
    found = [_npz(Path(path), unpacked) if Path(path).suffix == ".npz" else _safetensors(path) for path in paths]
    first = found[0][0]
    for path, (records, _) in zip(paths, found, strict=True):
        if set(records) != set(first):
            raise ValueError(f"{path} has layers {sorted(records)}, {paths[0]} has {sorted(first)}; need the same")
    joined = {name: reduce(concat, [records[name] for records, _ in found]) for name in first}
    grads = {}
    for name, record in joined.items():
        parts = [(records[name].n, given[name]) for records, given in found if name in given]
        if len(parts) == len(found):
            grads[name] = sum(n * grad for n, grad in parts) / record.n
    return joined, grads


def _safetensors(path: str | os.PathLike) -> tuple[Named, Grads]:
    tree = load(path)
    meta = metadata(path)
    layers = _layers(tree.get("records", tree))
    if not layers:
        raise ValueError(f"{path} holds no records: need leaves a (or index, or image), g and n for each layer")
    order = meta.get("order", [])
    windows = meta.get("windows", {})
    if not isinstance(order, list) or not isinstance(windows, dict):
        raise ValueError(f"{path} has damaged metadata: need a list `order` and an object `windows`")
    order = [name for name in order if isinstance(name, str) and name in layers] or list(layers)
    records = {name: _record(path, name, layers[name], windows.get(name)) for name in order}
    return records, {name: layers[name]["grad"] for name in order if "grad" in layers[name]}


def _layers(node: Mapping[str, Any], path: str = "") -> dict[str, dict[str, Any]]:
    """Every folder with a leaf `g` and inputs beside it; a layer's name may hold slashes."""
    if "g" in node and not isinstance(node["g"], Mapping):
        return {path: dict(node)}
    found: dict[str, dict[str, Any]] = {}
    for name, child in node.items():
        if isinstance(child, Mapping):
            found |= _layers(child, f"{path}/{name}" if path else name)
    return found


def _npz(path: Path, unpacked: int) -> tuple[Named, Grads]:
    arrays = npz.read(path, unpacked)
    layers: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        layer, _, leaf = name.rpartition(".")
        if not layer or leaf not in ("a", "g", "n", "mask", "ids", "grad"):
            raise ValueError(f"{path}: array {name!r} is not named layer.a, layer.g, layer.n, .mask, .ids or .grad")
        layers.setdefault(layer, {})[leaf] = array
    if not layers:
        raise ValueError(f"{path} holds no arrays")
    records = {name: _record(path, name, leaves, None) for name, leaves in layers.items()}
    return records, {name: leaves["grad"] for name, leaves in layers.items() if "grad" in leaves}


def _record(path: Any, name: str, leaves: dict[str, Any], window: dict[str, Any] | None) -> Record:
    a: Any = leaves.get("a")
    try:
        if "index" in leaves:
            a = Ids(leaves["index"], int(leaves["size"]))
        elif "image" in leaves and isinstance(window, dict):
            geometry = {key: _tuples(window[key]) for key in ("kernel", "stride", "padding", "dilation")}
            a = Patches(leaves["image"], Window(**geometry), window["bias"])
        if a is None or "g" not in leaves:
            raise ValueError(f"found {sorted(leaves)}; need a (or index and size, or image and its window) and g")
        record = Record(a, leaves["g"], 1.0, leaves.get("mask"), leaves.get("ids"))
        return replace(record, n=float(leaves.get("n", record.batch)))
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: layer {name!r}: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, Sequence) else value
