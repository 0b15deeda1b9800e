"""Records of one batch on disk, for `kfaccore compare` and `kfaccore advise`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

import kfaccore
from kfaccore_numpy.train import Batch, Fisher, sampled

if TYPE_CHECKING:
    from kfaccore_numpy.network import Sequential

Array = Any


def save_records(
    path: str | os.PathLike,
    network: Sequential,
    params: dict[str, Array],
    data: tuple[Array, Array],
    loss: Any,
    seed: int = 0,
    fisher: Fisher = sampled,
) -> None:
    """Write the records and mean gradients of the batch `data`; labels are drawn from `seed`."""
    f, tape = network.forward(params, data[0])
    n = float(loss.normaliser(f, data[1]))
    g = network.backward(params, tape, loss.gradient(f, data[1]))
    grads = network.gradients(tape, g, n, factored=False)
    drawn = fisher(network, params, tape, Batch(f, data[1], loss), g, np.random.default_rng(seed))
    records = network.records(tape, drawn, n)
    told = {
        "model": type(network).__name__,
        "parameters": sum(int(np.prod(matrix.shape)) for matrix in params.values()),
        "uncovered": {},
    }
    kfaccore.save_records(path, {name: records[name] for name in network.blocks()}, grads, seed=seed, **told)
