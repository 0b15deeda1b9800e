"""Squared per-example gradients, in the standard basis or that of two factors: the diagonal of the Fisher there."""

from __future__ import annotations

from kfaccore import xp as kernels
from kfaccore.record.chunks import input_chunks
from kfaccore.record.ids import Ids
from kfaccore.record.record import Record
from kfaccore.xp.arrays import Array, device_of, namespace


def squares(record: Record, Qa: Array | None = None, Qg: Array | None = None) -> Array:
    """Sum over draws and examples of (Qg^T J Qa)^2 elementwise, J summed over shared: (blocks, d_out, d_in).

    Without Qa, Qg in the standard basis. An embedding never forms J: positions with equal ids are paired instead.
    """
    if isinstance(record.a, Ids):
        return _squares_of_ids(record, record.g if Qg is None else kernels.turned(record.g, Qg))
    xp = namespace(record.g)
    total = xp.zeros((record.blocks, record.d_out, record.d_in), dtype=record.g.dtype, device=device_of(record.g))
    size = record.d_out * record.d_in
    many = record.batch if record.shared == 1 else kernels.read_again(size * record.blocks, record.g)
    for start, a in input_chunks(record, many):
        a = a if Qa is None else kernels.turned(a, Qa)
        for draw in range(record.draws):
            g = record.g[draw, :, start : start + a.shape[1], :, :]
            g = g if Qg is None else kernels.turned(g, Qg)
            if record.shared == 1:
                total = total + xp.matmul((g * g)[:, :, 0, :].mT, (a * a)[:, :, 0, :])
            else:
                j = xp.reshape(xp.matmul(g.mT, a), (record.blocks, -1, size))
                total = total + xp.reshape(kernels.gram_diagonal(j), total.shape)
    return total


def _squares_of_ids(record: Record, g: Array) -> Array:
    """Column i of J is the sum of g over positions with id i, so its square sums g_s * g_t over equal ids s, t."""
    xp = namespace(g)
    index = record.a.index

    def pairs(span: slice) -> Array:
        own = index[span, :]
        same = xp.astype(own[:, :, None] == own[:, None, :], g.dtype)
        some = g[:, :, span, ...]
        return xp.sum(some * xp.matmul(same, some), axis=0)[0, ...]

    found = [pairs(span) for span in kernels.spans(record.batch, kernels.at_once(record.shared**2))]
    paired = found[0] if len(found) == 1 else xp.concat(found, axis=0)
    rows = xp.reshape(paired, (-1, record.d_out))
    return kernels.segment_sum(rows, xp.reshape(index, (-1,)), record.a.size).mT[None, ...]
