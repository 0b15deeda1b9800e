"""The two ends of a solve: the gradient as it was given, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from kfaccore.record import Factored
from kfaccore.xp import Code
from kfaccore.xp.arrays import Array, all_finite, is_half, kept, on_gpu, widen
from kfaccore.xp.blocks import together
from kfaccore.xp.memory import in_rows
from kfaccore.xp.tables import finite_of

D = TypeVar("D")  # an array, or a dict of one a layer
_LATER: ContextVar[bool] = ContextVar("kfaccore_checked_later", default=False)


@dataclass(frozen=True)
class Solution(Generic[D]):
    """direction like the gradient (same sign: steps subtract it), code (blocks,), state, info of small arrays.

    Those of a network-level method are dicts {layer: ...}.
    """

    direction: D
    code: D
    state: Any
    info: dict[str, Array] = field(default_factory=dict)


def gradient(grad: Array | Factored, block_shape: tuple[int, ...]) -> tuple[Any, bool]:
    """`grad` with its blocks axis, and whether that axis was added; ValueError when it does not fit the state."""
    check_gradient(grad, block_shape)
    if isinstance(grad, Factored):
        return grad, False
    grad = widen(grad, "grad")
    added = grad.ndim == 2
    return grad[None, ...] if added else grad, added


def check_gradient(grad: Array | Factored, block_shape: tuple[int, ...]) -> None:
    """ValueError for a gradient that does not fit the state, TypeError for one that is not real."""
    if isinstance(grad, Factored):
        shape = (grad.a.shape[0], grad.g.shape[-1], grad.a.shape[-1])
    else:
        is_half(grad, "grad")  # raises for what is not real
        shape = (1, *grad.shape) if grad.ndim == 2 else tuple(grad.shape)
    if shape != block_shape:
        raise ValueError(f"grad has shape {shape}; the state was made for (blocks, d_out, d_in) = {block_shape}")


@contextmanager
def later() -> Iterator[None]:
    """Inside, `finish_later` leaves what lies on a GPU to `check`: few launches find out what would take many."""
    token = _LATER.set(True)
    try:
        yield
    finally:
        _LATER.reset(token)


def finish(direction: Array, code: Array, state: object, squeeze: bool, **info: Array) -> Solution:
    """A Solution whose non-finite blocks are zero with code NONFINITE."""
    fine = all_finite(direction)
    direction = in_rows(kept(direction, fine, 0.0))
    code = kept(code, fine, int(Code.NONFINITE))
    return Solution(direction[0, ...] if squeeze else direction, code, state, info)


def finish_later(direction: Array, code: Array, state: object, squeeze: bool) -> Solution:
    """`finish`, of a direction that nothing but the caller of `solve` reads: inside `later` a GPU's is left to
    `check`."""
    if _LATER.get() and not squeeze and on_gpu(direction):
        return Solution(direction, code, state)
    return finish(direction, code, state, squeeze)


def check(solutions: list[Solution]) -> None:
    """`finish` of those on a GPU, in the list, where each makes room for the next; what a method has finished itself
    costs a pass more."""
    ours = [i for i, each in enumerate(solutions) if on_gpu(each.direction)]
    if not ours:
        return
    fine = finite_of([solutions[i].direction for i in ours])
    codes = kept(together([solutions[i].code for i in ours]), together(fine), int(Code.NONFINITE))
    start = 0
    for i, good in zip(ours, fine, strict=True):
        end = start + len(good)
        direction = kept(solutions[i].direction, good, 0.0)
        solutions[i] = replace(solutions[i], direction=direction, code=codes[start:end])
        start = end
