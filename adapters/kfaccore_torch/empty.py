"""Rows that hold nothing, as free slots of a buffer that data fill: they count as rows of A, and are named once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from kfaccore.layers import Linear
from kfaccore_torch.calls import Call
from kfaccore_torch.kinds import Stack
from kfaccore_torch.masks import Told
from kfaccore_torch.settle import Layer

MOST = 0.1  # of the rows


def tell(
    calls: Sequence[tuple[str, Call]],
    grads: Sequence[torch.Tensor],
    layers: Mapping[str, Layer],
    told: Told,
    named: set[str],
) -> None:
    """A warning for layers of which more than MOST of the rows are zero and have a gradient of zero, unless they are
    among those `named`, which they join, or masked. `grads` are (rows, blocks d), a call each."""
    found = {}
    for (name, call), g in zip(calls, grads, strict=True):
        kind = layers[name].kind
        if name in named or told.mask is not None or any(fnmatchcase(name, pattern) for pattern in told.masks):
            continue
        if isinstance(kind, Linear | Stack):
            share = _share(kind, call, g)
            if share > MOST:
                found[name] = share
    named.update(found)
    if found:
        shares = ", ".join(f"{name!r}: {share:.0%}" for name, share in found.items())
        warnings.warn(
            f"rows of these layers are empty, zero and without a gradient ({shares}), and count as rows of A, so that "
            f"the direction depends on how many there are: give capture(examples={{{next(iter(found))!r}: ...}}) the "
            f"example of each row, -1 where there is none, or masks=, or call a layer on the rows that are there; a "
            f"stack of matrices takes only the last",
            stacklevel=2,
        )


def _share(kind: Linear | Stack, call: Call, g: torch.Tensor) -> float:
    """How many of the rows of a call are empty."""
    if not g.numel():
        return 0.0
    x = call.x.movedim(0, -2) if isinstance(kind, Stack) else call.x
    blocks = kind.blocks if isinstance(kind, Stack) else 1
    inputs = x.reshape(len(g), blocks, -1)
    outputs = g.reshape(len(g), blocks, -1)
    empty = (inputs == 0).all(-1) & (outputs == 0).all(-1)
    return float(empty.float().mean())
