"""Arithmetic on the arrays of many layers: of torch one operation for all of them, of others one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import array_api_compat as aac

from kfaccore.xp.arrays import Array, scalar
from kfaccore.xp.numbers import Number


def times(xs: Sequence[Array], factors: Sequence[Number]) -> list[Array]:
    """Each x times its factor."""
    lists = _lists(xs, factors)
    if lists is None:
        return [x * scalar(c, x) for x, c in zip(xs, factors, strict=True)]
    return list(lists._foreach_mul(list(xs), [float(c) for c in factors]))


def weighted(a: Number, xs: Sequence[Array], b: Number, ys: Sequence[Array]) -> list[Array]:
    """a x + b y of each pair; a b that is the number 1 costs no pass over y."""
    one = isinstance(b, float) and b == 1.0
    lists = _lists(xs, (a, b))
    if lists is None:
        pairs = zip(xs, ys, strict=True)
        return [scalar(a, x) * x + (y if one else scalar(b, y) * y) for x, y in pairs]
    found = lists._foreach_mul(list(xs), float(a))
    lists._foreach_add_(found, list(ys) if one else lists._foreach_mul(list(ys), float(b)))
    return list(found)


def _lists(xs: Sequence[Array], factors: Sequence[Number]) -> Any | None:
    """torch, which has operations on lists, if the arrays are its own and the factors numbers."""
    if not xs or not aac.is_torch_array(xs[0]) or not all(isinstance(c, int | float) for c in factors):
        return None
    import torch

    return torch
