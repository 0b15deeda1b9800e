"""What the methods of one layer are held against: its exact block, a gradient, and the best direction for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import frexp

import numpy as np

from kfaccore.analysis.exact import ROWS, ExactBlock, Solved
from kfaccore.convolution.patches import Patches
from kfaccore.record import Factored, Ids, Record
from kfaccore.xp.arrays import Array, from_host, namespace, to_host
from kfaccore.xp.chunks import HELD

PROBES = 16
FEWEST = 4
GIB = 1 << 30
_TAME = 100  # powers of two up to which squares of squares stay far from the ends of float64
_TAME_NARROW = 20  # and of float32


@dataclass(frozen=True)
class Limits:
    """How much may be held and computed for one layer.

    peak   bytes of everything at once
    rows   of J up to which nothing is estimated
    """

    peak: int = GIB
    rows: int = ROWS

    @property
    def room(self) -> int:
        """Bytes for arrays: a quarter is left to the interpreter, the libraries and what was not foreseen."""
        return self.peak - self.peak // 4

    def rows_of(self, record: Record) -> int:
        """Rows whose Gram matrices, with a copy to factorise, take at most a third of that."""
        held = self.room / 3 / 8 / (record.blocks + 1)
        return min(self.rows, int(held**0.5))


class Target:
    """One layer; made once. Its record is in units in which nothing overflows: F there is F / unit^2."""

    def __init__(
        self,
        name: str,
        record: Record,
        grad: Array | Factored | None = None,
        damping: float | None = None,
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits()
        size = record.blocks * record.d_out * record.d_in
        self.size = size
        self.name = name
        self.record = record
        self.limits = limits
        self.wide = 8 * size * 12 <= limits.room
        self.tame, self.unit = _tamed(record, self.wide)
        # a sixteenth of the room for J, in numbers of eight bytes
        self.exact = ExactBlock(self.tame, limits.rows_of(record), self.wide, min(HELD, limits.room // 128))
        self.damping = self._damping(damping)
        self.grad = self._gradient(grad)
        self._known: Solved | None = None
        self._images: list[np.ndarray] = []
        self._signs: list[np.ndarray] = []
        # F z of so many are held, in single precision where they would be few
        held = limits.room / 4 / size
        self.single = held / 8 < PROBES
        self.probes = int(min(PROBES, held / 4))

    @property
    def solved(self) -> Solved:
        """x = (F + damping I)^-1 g, solved for once."""
        if self._known is None:
            self._known = self.exact.solve(self.grad, self.damping)
        return self._known

    def _damping(self, damping: float | None) -> float:
        """In the record's units; by default a tenth of the mean eigenvalue, of a block of zeros one."""
        if damping is not None:
            return max(float(damping / self.unit**2), np.finfo(float).tiny)
        return 0.1 * self.exact.trace / float(np.prod(self.exact.shape)) or 1.0

    def _gradient(self, grad: Array | Factored | None) -> np.ndarray:
        """The given gradient, or g^T a / n of the first draw."""
        if grad is not None:
            host = to_host(grad.dense() if isinstance(grad, Factored) else grad).astype(float)
            return host.reshape(self.exact.shape) / self.unit
        w = np.zeros((self.record.draws, self.record.batch))
        w[0] = 1.0 / self.exact.record.n
        return np.stack([part.pulled(w) for part in self.exact.parts])

    def probe(self, index: int) -> np.ndarray:
        """A Rademacher vector, the same one whenever it is asked for."""
        while len(self._signs) <= index:  # kept in a byte each
            self._signs.append(np.random.default_rng(len(self._signs)).integers(0, 2, self.exact.shape, dtype=np.int8))
        return 2.0 * self._signs[index] - 1.0

    def images(self, count: int) -> list[np.ndarray]:
        """F z of the first probes, made once; in single precision where memory is short."""
        while len(self._images) < count:
            image = self.exact.matvec(self.probe(len(self._images)))
            self._images.append(image.astype(np.float32) if self.single else image)
        return self._images[:count]


def like(v: np.ndarray, g: Array) -> Array:
    """v where and of the dtype g is."""
    return namespace(g).astype(from_host(v, g), g.dtype)


def _tamed(record: Record, wide: bool) -> tuple[Record, np.float64]:
    """The record with g and a scaled by powers of two if their squares could overflow, and the unit.

    Raises ValueError for values that are not finite.
    """
    g_power = _power(record.g, "g")
    a_power = 0 if isinstance(record.a, Ids) else _power(_inputs(record), "a")
    if isinstance(record.a, Patches) and record.a.bias:
        a_power = 0  # the column of ones cannot be scaled
    if max(abs(g_power), abs(a_power)) <= (_TAME if wide else _TAME_NARROW):
        return record, np.float64(1.0)
    inputs = record.a
    if isinstance(inputs, Patches):
        inputs = replace(inputs, image=inputs.image * 2.0**-a_power)
    elif not isinstance(inputs, Ids):
        inputs = inputs * 2.0**-a_power
    return replace(record, a=inputs, g=record.g * 2.0**-g_power), np.ldexp(np.float64(1.0), g_power + a_power)


def _inputs(record: Record) -> Array:
    return record.a.image if isinstance(record.a, Patches) else record.a


def _power(x: Array, what: str) -> int:
    """The power of two just above the largest entry; 0 for zeros."""
    xp = namespace(x)
    largest = float(xp.max(xp.abs(x)))
    if not np.isfinite(largest):
        raise ValueError(f"its {what} holds values that are not finite")
    return frexp(largest)[1] if largest else 0
