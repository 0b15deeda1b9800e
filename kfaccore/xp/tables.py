"""A number for each row of several tables (rows, ...) of any sizes: on CUDA a few launches for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat as aac

from kfaccore.xp.arrays import Array, all_finite, device_of, on_gpu
from kfaccore.xp.gpu import around
from kfaccore.xp.gram import squares

INFINITE = float("inf")


def squares_of(tables: Sequence[Array]) -> list[Array]:
    """The squared norms of the rows, (rows,) each."""
    known = _of_norms(tables, 2.0, lambda norms: norms**2)
    return [known[i] if i in known else squares(x) for i, x in enumerate(tables)]


def finite_of(tables: Sequence[Array]) -> list[Array]:
    """Whether all of a row is finite, (rows,) each."""
    known = _of_norms(tables, INFINITE, lambda norms: norms < INFINITE)
    return [known[i] if i in known else all_finite(x) for i, x in enumerate(tables)]


def _of_norms(tables: Sequence[Array], order: float, answer: Callable[[Any], Any]) -> dict[int, Any]:
    """What is asked of the norms of the rows, by place: of those tables that torch's operations on lists take as they
    lie, if there are several."""
    kinds: dict[object, list[int]] = {}
    whole: list[Any] = [_dense(x) for x in tables]
    for i, x in enumerate(whole):
        if x is not None:
            kinds.setdefault((x.dtype, device_of(x)), []).append(i)
    found: dict[int, Any] = {}
    for places in kinds.values():
        if len(places) > 1:
            norms = _at_once([row for i in places for row in whole[i].unbind(0)], order)
            parts = answer(norms).split([len(whole[i]) for i in places])
            found |= dict(zip(places, parts, strict=True))
    return found


def _dense(x: Array) -> Any | None:
    """x of torch on CUDA, or what it was cut out of, whose zeros change no norm; None where it does not lie densely."""
    known: Any = x
    if not aac.is_torch_array(x) or not on_gpu(x) or not known.numel():
        return None
    return known if known.is_contiguous() else around(known)


def _at_once(rows: list[Any], order: float) -> Any:
    import torch

    return torch.stack(torch._foreach_norm(rows, order))
