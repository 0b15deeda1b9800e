"""Records on disk, read a layer at a time: what is not asked for is not held."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from kfaccore.convolution.patches import Patches, Window
from kfaccore.io import Opened
from kfaccore.record.ids import Ids
from kfaccore.record.npz import Npz
from kfaccore.record.record import Record
from kfaccore.record.sharing import concat

UNPACKED = 1 << 28  # bytes that the arrays of an .npz may take


class Stored(Mapping[str, Record]):
    """{layer: Record} of one file or several, joined as micro-batches; nothing is read before it is asked for.

    meta       of the first file; an .npz has none
    unpacked   bytes that the arrays of a compressed .npz, and the diagonal factor of an embedding that is only said to
               be large, may take; four times the file where that is more

    Raises ValueError, naming file and layer, for what is not a record; FileNotFoundError when there is no file.
    """

    def __init__(self, *paths: str | os.PathLike, unpacked: int = UNPACKED) -> None:
        self.files = [_File(Path(path), unpacked) for path in paths]
        first = self.files[0]
        for file in self.files:
            if set(file.layers) != set(first.layers):
                raise ValueError(
                    f"{file.path} has layers {sorted(file.layers)}, {first.path} has {sorted(first.layers)}; need the "
                    f"same"
                )
        self.meta = first.meta

    def again(self) -> Stored:
        """The same files opened anew, for another process: one that is forked shares places in open files."""
        return Stored(*(file.path for file in self.files), unpacked=self.files[0].unpacked)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files[0].layers)

    def __len__(self) -> int:
        return len(self.files[0].layers)

    def __getitem__(self, name: str) -> Record:
        return reduce(concat, (file.record(name) for file in self.files))

    def grad(self, name: str) -> np.ndarray | None:
        """The gradient stored with a layer, the n-weighted mean of the files'; None if one of them has none."""
        if not all("grad" in file.layers[name] for file in self.files):
            return None
        if len(self.files) == 1:
            return self.files[0].leaf(name, "grad")
        shares = [float(file.record(name).n) for file in self.files]
        parts = [n * file.leaf(name, "grad") for n, file in zip(shares, self.files, strict=True)]
        return sum(parts[1:], parts[0]) / sum(shares)

    def finite_grad(self, name: str) -> np.ndarray | None:
        """The same for what computes with it: ValueError where it overflowed."""
        grad = self.grad(name)
        if grad is not None and not np.isfinite(grad).all():
            raise ValueError(
                f"layer {name!r}: the gradient stored with it, of shape {grad.shape}, is not finite; store that of a "
                f"step that did not overflow, or leave it out"
            )
        return grad


class _File:
    """The layers of one file: `layers` {layer: {leaf: name in the file}}."""

    def __init__(self, path: Path, unpacked: int) -> None:
        self.path = path
        self.unpacked = unpacked
        packed = path.suffix == ".npz"
        self.source = Npz(path, unpacked) if packed else Opened(path)
        self.meta = {} if isinstance(self.source, Npz) else self.source.meta
        names = self.source.names
        if packed and not names:
            raise ValueError(f"{path} holds no arrays")
        found = _dotted(path, names) if packed else _slashed(names)
        if not found:
            raise ValueError(f"{path} holds no records: need leaves a (or index, or image), g and n for each layer")
        order = self.meta.get("order", [])
        self.windows = self.meta.get("windows", {})
        if not isinstance(order, list) or not isinstance(self.windows, dict):
            raise ValueError(f"{path} has damaged metadata: need a list `order` and an object `windows`")
        listed = [name for name in order if isinstance(name, str)]
        self.layers = {name: found[name] for name in dict.fromkeys([*listed, *found]) if name in found}

    def leaf(self, layer: str, leaf: str) -> np.ndarray:
        return self.source[self.layers[layer][leaf]]

    def record(self, name: str) -> Record:
        """ValueError, naming file and layer, for what is not a record."""
        wanted = [leaf for leaf in self.layers[name] if leaf != "grad"]
        try:
            leaves: dict[str, Any] = {leaf: self.leaf(name, leaf) for leaf in wanted}
            self._check_size(leaves)
            return _record(leaves, self.windows.get(name))
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, IndexError, MemoryError) as error:
            raise ValueError(f"{self.path}: layer {name!r}: {error}") from error

    def _check_size(self, leaves: Mapping[str, np.ndarray]) -> None:
        """ValueError for an embedding whose factor would dwarf the file: its size is a number that anyone can write."""
        size = int(_one("size", leaves.get("size", 0)))
        limit = max(self.unpacked, 4 * self.path.stat().st_size)
        if 8 * size > limit:
            raise ValueError(f"size {size} takes {8 * size} bytes a factor, and {limit} are allowed: raise `unpacked`")


def _dotted(path: Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Leaves layer.a, layer.g, ... of an .npz by layer."""
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        layer, _, leaf = name.rpartition(".")
        if not layer or leaf not in ("a", "g", "n", "mask", "ids", "grad"):
            raise ValueError(f"{path}: array {name!r} is not named layer.a, layer.g, layer.n, .mask, .ids or .grad")
        layers.setdefault(layer, {})[leaf] = name
    return layers


def _slashed(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Every folder with a leaf g, under `records` if there is such a folder; a layer's name may hold slashes."""
    names = list(names)
    inside = [name for name in names if name.startswith("records/")]
    prefix = "records/" if inside else ""
    layers: dict[str, dict[str, str]] = {}
    for name in inside or names:
        layer, _, leaf = name.removeprefix(prefix).rpartition("/")
        layers.setdefault(layer, {})[leaf] = name
    return {layer: leaves for layer, leaves in sorted(layers.items()) if "g" in leaves}


def _record(leaves: dict[str, Any], window: dict[str, Any] | None) -> Record:
    a: Any = leaves.get("a")
    if "index" in leaves:
        a = Ids(leaves["index"], int(_one("size", leaves["size"])))
    elif "image" in leaves and isinstance(window, dict):
        geometry = {key: _tuples(window[key]) for key in ("kernel", "stride", "padding", "dilation")}
        a = Patches(leaves["image"], Window(**geometry), bool(window["bias"]))
    if a is None or "g" not in leaves:
        raise ValueError(f"found {sorted(leaves)}; need a (or index and size, or image and its window) and g")
    if isinstance(a, Ids) and leaves["index"].size:
        low = leaves["index"].min()
        high = leaves["index"].max()
        if not 0 <= low <= high < a.size:
            raise ValueError(f"index goes from {low} to {high}; need 0 up to below size, {a.size}")
    record = Record(a, leaves["g"], 1.0, leaves.get("mask"), leaves.get("ids"))
    return replace(record, n=float(_one("n", leaves.get("n", record.batch))))


def _one(name: str, value: Any) -> Any:
    """A number as it is; older NumPys would take an array that holds one, with a warning."""
    if np.ndim(value):
        raise ValueError(f"{name} has shape {np.shape(value)}; need one number")
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, Sequence) and not isinstance(value, str) else value
