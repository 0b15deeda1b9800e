"""Sums of outer products on a GPU: rows in the precision in force, sums in float32, widths that its matrix units take.

A Gram of rounded rows stays positive semidefinite. Widths are padded to multiples of 8: a product of 3073 columns takes
four times that of 3080. Of tensors on a CPU the arithmetic is the same, where tests compare it; a product an image
serves there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import array_api_compat as aac

from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.precision import BFLOAT16, FLOAT32, TF32, products, statistics, torch_from

ALIGNED = 8  # columns: 16 bytes of bfloat16
_WIDE = 2048  # columns from which block rows up to the diagonal, and their mirror image, are cheaper in float32
_BLOCK_ROWS = 4
_BY_IMAGE = 28 * 28  # positions from which a product an image is cheaper than laying out rows
_INSIDE = "inside"  # an attribute of memory that `cut` was given: rows and columns outside of which all is zero
_HELD = 1 << 25  # numbers of the products of all images


def gram(x: Array) -> Array:
    """x^T x of rows (blocks, rows, d) of torch, or of CuPy: (blocks, d, d)."""
    how = statistics()
    if aac.is_cupy_array(x):
        with products(TF32 if how == BFLOAT16 else how):  # the nearest that CuPy multiplies, in products of two axes
            grams = [x[i, ...].T @ x[i, ...] for i in range(x.shape[0])]
        return namespace(x).stack(grams) if len(grams) > 1 else grams[0][None, ...]
    return _gram(x, how)


def _gram(x: Any, how: str | None) -> Any:
    import torch

    d = x.shape[-1]
    half = x.dtype == torch.bfloat16
    if not half and (x.dtype != torch.float32 or how in (None, FLOAT32)):
        with products(how):
            return _mirrored(x) if d >= _WIDE and x.shape[-2] * 4 >= d else x.mT @ x
    x = aligned(x, torch.bfloat16 if half or how == BFLOAT16 else torch.float32)
    return _rounded(x)[:, :d, :d]


def narrowed(x: Array) -> Array:
    """Rows of torch on CUDA in bfloat16 where they will be read so: before they are laid out, which moves half the
    bytes then."""
    known: Any = x
    if not (aac.is_torch_array(x) and known.is_cuda and statistics() == BFLOAT16):
        return x
    import torch

    return known.bfloat16() if known.dtype == torch.float32 else x


def aligned(x: Any, dtype: Any) -> Any:
    """Rows (..., d) as tensors of `dtype`, and anything up to an aligned width: no sum over rows mixes columns."""
    d = x.shape[-1]
    wide = -(-d // ALIGNED) * ALIGNED
    if wide == d:
        return x.to(dtype)
    out = x.new_empty((*x.shape[:-1], wide), dtype=dtype)
    out[..., :d] = x
    return out


def product(x: Array, y: Array) -> Array:
    """x y of (blocks, m, k) and (blocks, k, n) of torch on CUDA, with zeros up to sizes that matrix units take: of 769
    columns a product in TF32 takes three times as long as of 776."""
    import torch

    a: Any = x
    b: Any = y
    if a.ndim != 3 or b.ndim != 3 or len(a) != len(b) or a.dtype != torch.float32:
        return a @ b
    return cut(torch.bmm(_whole(a), _whole(b)), a.shape[1], b.shape[2])


def cut(whole: Any, rows: int, columns: int) -> Any:
    """The first rows and columns of matrices whose others are zero, which `product` will find behind them, or behind
    some of them: `whole` is memory of its own, that nobody else writes to."""
    if whole.shape[-2:] == (rows, columns):
        return whole
    vars(whole)[_INSIDE] = rows, columns
    return whole[:, :rows, :columns]


def zeros(like: Any, rows: int, columns: int) -> Any:
    """Zeros of rows and columns as long as matrix units want them, for matrices of that size; to be `cut`."""
    return like.new_zeros((len(like), -(-rows // ALIGNED) * ALIGNED, -(-columns // ALIGNED) * ALIGNED))


def laid_out(x: Array) -> Array:
    """Matrices that many products will read, with the zeros behind them that `product` wants; others as they are."""
    return cut(_whole(x), *x.shape[1:]) if x.ndim == 3 and wants_zeros(x) else x


def wants_zeros(x: Any) -> bool:
    """Whether x is float32 of torch on CUDA, whose matrix units take sizes that are multiples of 8."""
    return aac.is_torch_array(x) and x.is_cuda and str(x.dtype) == "torch.float32"


def _whole(x: Any) -> Any:
    """x and its zeros: itself, what it was cut out of, or a copy."""
    rows, columns = x.shape[1:]
    if rows % ALIGNED == 0 and columns % ALIGNED == 0:
        return x
    known = around(x)
    if known is not None:
        return known
    if rows % ALIGNED == 0:  # one pass, where zeros first would be two
        return _wide([x])
    out = zeros(x, rows, columns)
    out[:, :rows, :columns] = x
    return out


def around(x: Any) -> Any | None:
    """The matrices in whose memory those of x lie, with zeros around; None where that is not known."""
    base = x._base
    if base is None or vars(base).get(_INSIDE) != tuple(x.shape[1:]) or x.stride()[1:] != base.stride()[1:]:
        return None
    if len(x) > 1 and x.stride(0) != base.stride(0):
        return None
    first, apart = divmod(x.data_ptr() - base.data_ptr(), base.stride(0) * base.element_size())
    fits = not apart and first >= 0 and first + len(x) <= len(base)
    return base[first : first + len(x)] if fits else None


def _wide(parts: Sequence[Any]) -> Any:
    """Parts (..., rows, columns of each) side by side, and zeros up to an aligned width."""
    import torch

    columns = sum(part.shape[-1] for part in parts)
    missing = -columns % ALIGNED
    behind = [parts[0].new_zeros(()).expand(*parts[0].shape[:-1], missing)] if missing else []
    return torch.cat([*parts, *behind], -1)


def with_column(w: Array, column: Array) -> Array:
    """Matrices ([k,] rows, columns) and a column ([k,] rows) of each behind them; of torch on CUDA with the zeros that
    `product` wants."""
    if wants_zeros(w):
        return with_zeros(w, column) if w.ndim == 3 else with_zeros(w[None, ...], column[None, ...])[0]
    return namespace(w).concat([w, column[..., None]], axis=-1)


def with_zeros(w: Any, column: Any) -> Any:
    """As `with_column`, of float32 on any device."""
    if w.shape[1] % ALIGNED:  # rows want zeros too
        out = zeros(w, w.shape[1], w.shape[2] + 1)
        out[:, : w.shape[1], : w.shape[2]] = w
        out[:, : w.shape[1], w.shape[2]] = column
    else:
        out = _wide([w, column[..., None]])
    return cut(out, w.shape[1], w.shape[2] + 1)


def _rounded(x: Any) -> Any:
    """x^T x of bfloat16 rows, or of float32 ones in TF32, with float32 sums."""
    import torch

    if x.dtype == torch.bfloat16 and x.is_cuda and torch_from(2, 8):
        if len(x) == 1:
            return torch.mm(x[0].mT, x[0], out_dtype=torch.float32)[None]
        return torch.bmm(x.mT, x, out_dtype=torch.float32)
    with products(TF32):
        x = x.float()  # TF32 holds bfloat16's bits, so that its products are those
        return x.mT @ x


def _mirrored(x: Any) -> Any:
    """x^T x from its lower block rows: 5/8 of the products, all float32."""
    d = x.shape[-1]
    step = -(-d // _BLOCK_ROWS // ALIGNED) * ALIGNED
    out = x.new_empty((len(x), d, d))
    for start in range(0, d, step):
        end = min(start + step, d)
        out[:, start:end, :end] = x[..., start:end].mT @ x[..., :end]
        out[:, :start, start:end] = out[:, start:end, :start].mT
    return out


def by_image_pays(x: Array) -> bool:
    """Whether rows (..., images, positions, d) of torch lie with their features first, as images with many positions
    do, so that a product an image needs no copy of them, and all products take less than it."""
    known: Any = x
    if not aac.is_torch_array(x):
        return False
    images, positions, d = x.shape[-3:]
    lies = known.stride(-2) == 1 and known.stride(-1) == positions
    if not lies or positions < _BY_IMAGE:
        return False
    if known.is_cuda:
        return str(x.dtype) == "torch.float32" and images * d * d <= _HELD
    return statistics() != BFLOAT16 and 4 * d <= positions


def gram_by_image(x: Array) -> Array:
    """Sum of x^T x over all axes but the second of x (draws, blocks, images, positions, d): (blocks, d, d). TF32 where
    rows may be rounded at all: what they would be copied for costs more."""
    how = statistics()
    with products(TF32 if how == BFLOAT16 else how):
        xp = namespace(x)
        return xp.sum(xp.matmul(x.mT, x), axis=(0, 2))
