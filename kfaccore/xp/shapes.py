"""Arrays that are only a shape and a dtype: what an `init` would allocate, without allocating it.

`Shape` stands in for `like`. Its namespace knows how an operation changes a shape: creation, reshaping, reductions and
products by a rule each, every other function elementwise. Results have the dtype of the first operand that is no
condition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np

from kfaccore.xp.typing import Operand

Axes = int | tuple[int, ...] | None
DType = np.dtype
_FLOAT = np.dtype(np.float32)
_BOOL = np.dtype(bool)
_ARITHMETIC = "add radd sub rsub mul rmul truediv rtruediv floordiv mod pow and or rand ror"
_COMPARISONS = "eq ne lt le gt ge"


class Shape:
    """A stand-in for an array of this shape and dtype; no dataclass, as a tree would take its fields for leaves."""

    device = "cpu"

    def __init__(self, shape: tuple[int, ...], dtype: DType = _FLOAT) -> None:
        self.shape = shape
        self.dtype = dtype

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """What an array of this shape and dtype takes."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def mT(self) -> Shape:
        """The last two axes exchanged."""
        return Shape((*self.shape[:-2], self.shape[-1], self.shape[-2]), self.dtype)

    def __array_namespace__(self, api_version: str | None = None) -> Namespace:
        return NAMESPACE

    def __getitem__(self, key: Operand) -> Shape:
        return Shape(_outline(self)[key].shape, self.dtype)

    def __neg__(self) -> Shape:
        return self

    def __invert__(self) -> Shape:
        return self


def elementwise(*given: Operand) -> Shape:
    """What arrays and numbers broadcast to; conditions give no dtype."""
    arrays = [x for x in given if isinstance(x, Shape)]
    dtypes = [x.dtype for x in arrays if x.dtype != _BOOL]
    return Shape(np.broadcast_shapes(*(x.shape for x in arrays)), dtypes[0] if dtypes else _BOOL)


def _compared(*given: Operand) -> Shape:
    return Shape(elementwise(*given).shape, _BOOL)


for _name in _ARITHMETIC.split():
    setattr(Shape, f"__{_name}__", elementwise)
for _name in _COMPARISONS.split():
    setattr(Shape, f"__{_name}__", _compared)


class Namespace:
    """The part of the Array API that an `init` may use, on shapes."""

    __name__ = "shapes"  # array_api_compat compares namespaces by name
    float32 = _FLOAT
    float64 = np.dtype(np.float64)
    int32 = np.dtype(np.int32)
    int64 = np.dtype(np.int64)
    bool = _BOOL
    finfo = staticmethod(np.finfo)

    def __getattr__(self, name: str) -> Callable[..., Shape]:
        """Any other function: elementwise."""
        if name.startswith("_"):
            raise AttributeError(name)
        return elementwise

    @property
    def linalg(self) -> Namespace:
        """The standard's, of shapes."""
        return self

    def zeros(self, shape: int | tuple[int, ...], dtype: DType = float32, device: object = None) -> Shape:
        """The standard's, of shapes."""
        return Shape((shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype))

    ones = zeros

    def full(self, shape: tuple[int, ...], value: float, dtype: DType = float32, device: object = None) -> Shape:
        """The standard's, of shapes."""
        return self.zeros(shape, dtype)

    def eye(
        self, rows: int, columns: int | None = None, /, *, k: int = 0, dtype: DType = float32, device: object = None
    ) -> Shape:
        return self.zeros((rows, rows if columns is None else columns), dtype)

    def arange(
        self, start: int, stop: int | None = None, step: int = 1, dtype: DType = int64, device: object = None
    ) -> Shape:
        """The standard's, of shapes."""
        return self.zeros(len(range(start) if stop is None else range(start, stop, step)), dtype)

    def asarray(self, x: Operand, dtype: DType | None = None, device: object = None) -> Shape:
        """The standard's, of shapes."""
        kept = np.asarray(x).dtype if not isinstance(x, Shape) else x.dtype
        return Shape(np.shape(x) if not isinstance(x, Shape) else x.shape, dtype or kept)

    def astype(self, x: Shape, dtype: DType, copy: bool = True) -> Shape:
        """The standard's, of shapes."""
        return Shape(x.shape, np.dtype(dtype))

    def reshape(self, x: Shape, shape: tuple[int, ...]) -> Shape:
        """The standard's, of shapes."""
        return Shape(_outline(x).reshape(shape).shape, x.dtype)

    def broadcast_to(self, x: Shape, shape: tuple[int, ...]) -> Shape:
        """The standard's, of shapes."""
        return Shape(tuple(shape), x.dtype)

    def diagonal(self, x: Shape) -> Shape:
        """The standard's, of shapes."""
        return Shape((*x.shape[:-2], min(x.shape[-2:])), x.dtype)

    def stack(self, parts: Sequence[Shape], axis: int = 0) -> Shape:
        """The standard's, of shapes."""
        inner = list(parts[0].shape)
        inner.insert(axis % (len(inner) + 1), len(parts))
        return Shape(tuple(inner), parts[0].dtype)

    def matmul(self, x: Shape, y: Shape) -> Shape:
        """The standard's, of shapes."""
        lead = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        return Shape((*lead, x.shape[-2], y.shape[-1]), x.dtype)

    def vecdot(self, x: Shape, y: Shape, axis: int = -1) -> Shape:
        """The standard's, of shapes."""
        return self.sum(elementwise(x, y), axis)

    def sum(self, x: Shape, axis: Axes = None, keepdims: bool = False) -> Shape:
        """The standard's, of shapes."""
        axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
        gone = {i % x.ndim for i in axes}
        if keepdims:
            return Shape(tuple(1 if i in gone else d for i, d in enumerate(x.shape)), x.dtype)
        return Shape(tuple(d for i, d in enumerate(x.shape) if i not in gone), x.dtype)

    max = min = mean = all = any = sum


def _outline(x: Shape) -> np.ndarray:
    """A view of one number in this shape: NumPy's own rules, and no memory."""
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)


NAMESPACE = Namespace()
