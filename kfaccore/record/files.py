"""Records on disk: a safetensors file that keeps images folded, or a plain .npz of `layer.a` and `layer.g`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from kfaccore.convolution.patches import Patches
from kfaccore.io import save
from kfaccore.record.ids import Ids
from kfaccore.record.record import Factored, Record
from kfaccore.record.stored import UNPACKED, Stored
from kfaccore.xp.arrays import Array

Named = dict[str, Record]
Grads = dict[str, np.ndarray]


def save_records(
    path: str | os.PathLike,
    records: Mapping[str, Record],
    grads: Mapping[str, Array | Factored] | None = None,
    **meta: object,
) -> None:
    """Write records of one batch, and the gradients to be preconditioned if there are any, for `load_records`.

    Raises ValueError for the name of an .npz: the file is a safetensors.
    """
    if str(path).endswith(".npz"):
        raise ValueError(f"path is {str(path)!r}, and the file will be a safetensors: name it .safetensors")
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


def load_records(*paths: str | os.PathLike, unpacked: int = UNPACKED) -> tuple[Named, Grads]:
    """Records by layer, several files joined as micro-batches, and the gradients stored with them (n-weighted means).

    unpacked   bytes that the arrays of a compressed .npz may take; four times the file where that is more

    Raises ValueError, naming file and layer, for what is not a record; FileNotFoundError when there is no file.
    """
    stored = Stored(*paths, unpacked=unpacked)
    grads = {name: stored.grad(name) for name in stored}
    return dict(stored), {name: grad for name, grad in grads.items() if grad is not None}
