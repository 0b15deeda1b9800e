"""The one page to read before writing a method.

A method is a frozen dataclass of numbers and functions; its State is a frozen dataclass of arrays. A layer gives a
record; the method measures it, updates its state, refreshes its factors, and solves. Nothing here raises on data:
failure is a `Code`, one a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from kfaccore import tree
from kfaccore.record import Factored, Ids, Record
from kfaccore.xp import Code, choose
from kfaccore.xp.arrays import Array, all_finite, blanked, widen

__all__ = ["Block", "Code", "Hyper", "Method", "Solution", "cycle", "finish", "gradient", "settle"]

State = Any
Stats = Any  # a frozen dataclass with a leaf `bad` (blocks,): how many non-finite records went in
M = TypeVar("M")


@dataclass(frozen=True)
class Block:
    """Static sizes of a layer: gradients are (blocks, d_out, d_in); rows and samples are a method's capacities."""

    d_out: int
    d_in: int
    blocks: int = 1
    diagonal_in: bool = False
    rows: int = 0
    samples: int = 0

    def __post_init__(self) -> None:
        if min(self.d_out, self.d_in, self.blocks) < 1:
            raise ValueError(f"{self}: d_out, d_in and blocks must be at least 1")

    @classmethod
    def of(cls, record: Record) -> Block:
        """The block a record belongs to."""
        return cls(record.d_out, record.d_in, record.blocks, isinstance(record.a, Ids))


@dataclass(frozen=True)
class Hyper:
    """Numbers of one step: `decay` multiplies the OLD average, `damping` is absolute unless the method says so."""

    step: int | Array
    decay: float | Array
    damping: float | Array
    epoch: int | Array = 0

    def __post_init__(self) -> None:
        if isinstance(self.damping, int | float) and not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping is {self.damping}; need a finite number >= 0")
        if isinstance(self.decay, int | float) and not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; need a number in [0, 1): it multiplies the old average")


@dataclass(frozen=True)
class Solution:
    """direction like the gradient (same sign: steps subtract it), code (blocks,), state, info of small arrays."""

    direction: Array
    code: Array
    state: State
    info: dict[str, Array] = field(default_factory=dict)


class Method(Protocol):
    """What every method offers, and on which clock the preconditioner calls it."""

    cycles: int  # measure-update-refresh rounds on one record until the last refresh is settled

    def init(self, block: Block, like: Array) -> State:
        """Once: the whole tree, in the namespace, dtype and device of `like`; leaf shapes never change again."""
        ...

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        """Update clock: sums and their own denominators of one record."""
        ...

    def combine(self, first: Stats, second: Stats) -> Stats:
        """Update clock: Stats of two micro-batches or ranks as one."""
        ...

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        """Update clock: move the averages; non-finite Stats change nothing. `donate` may reuse `state`'s buffers."""
        ...

    def refresh(self, state: State, hyper: Hyper) -> State:
        """Refresh clock: inverses from averages; writes `code` into the state."""
        ...

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        """Every step: the direction of one gradient."""
        ...

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        """The method's own F~ applied to v (blocks, d_out, d_in), undamped."""
        ...


@dataclass(frozen=True)
class Additive:
    """Base of methods whose Stats are sums."""

    def combine(self, first: Stats, second: Stats) -> Stats:
        """Leafwise sum."""
        return tree.add(first, second)


def gradient(grad: Any, block_shape: tuple[int, ...]) -> tuple[Any, bool]:
    """`grad` with its blocks axis, and whether that axis was added; ValueError when it does not fit the state."""
    if isinstance(grad, Factored):
        shape = (grad.a.shape[0], grad.g.shape[-1], grad.a.shape[-1])
        added = False
    else:
        grad = widen(grad, "grad")
        added = grad.ndim == 2
        grad = grad[None, ...] if added else grad
        shape = tuple(grad.shape)
    if shape != block_shape:
        raise ValueError(f"grad has shape {shape}; the state was made for (blocks, d_out, d_in) = {block_shape}")
    return grad, added


def finish(direction: Array, code: Array, state: State, squeeze: bool, **info: Array) -> Solution:
    """A Solution whose non-finite blocks are zero with code NONFINITE."""
    ok = all_finite(direction)
    direction = blanked(ok, direction)
    code = choose(~ok, Code.NONFINITE, code)
    return Solution(direction[0, ...] if squeeze else direction, code, state, info)


def cycle(method: Any, state: State, record: Any, hyper: Hyper) -> State:
    """One measure, update, refresh."""
    return method.refresh(method.update(state, method.measure(state, record, hyper), hyper), hyper)


def settle(method: Any, record: Any, k: int | None = None, damping: float = 1e-3) -> State:
    """State of `method` fitted to one record, or a tuple of one a loss term, without memory (decay 0).

    k cycles (default `method.cycles`), then one more measure and update, for what lives in the basis of the last
    refresh: EKFAC's moments.
    """
    hyper, one = Hyper(0, 0.0, damping), record[0] if isinstance(record, tuple) else record
    state = method.init(Block.of(one), one.g)
    for _ in range(method.cycles if k is None else k):
        state = cycle(method, state, record, hyper)
    return method.update(state, method.measure(state, record, hyper), hyper)
