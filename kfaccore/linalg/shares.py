"""What an example's own direction does to it: z_bt = (P h_b) a_bt, h_b = sum_s g_bs a_bs^T its own gradient.

J_vb P h_b = sum_t g~_vbt . z_bt for any draw g~ of it, and h_b . P h_b = sum_t g_bt . z_bt. Positions s, t are those of
one example; nothing of size examples x parameters is kept beyond a chunk. Where examples have more positions than the
layer is wide, h_b is smaller than its rows, and P h_b itself is formed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from kfaccore.convolution.patches import Patches
from kfaccore.linalg import side
from kfaccore.linalg.side import Side, Unformed
from kfaccore.record import Ids, Record
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.chunks import at_once, spans
from kfaccore.xp.memory import shared_first
from kfaccore.xp.numbers import Number, pick

_FORMED = 2  # products a position that forming J of an own and a drawn gradient takes


class Solve(Protocol):
    """A solve P that is known in closed form."""

    def outputs(self, own: Record) -> Array:
        """z (blocks, batch, shared, d_out) of a record of one draw, the loss's own gradients."""
        ...

    def applied(self, h: Array) -> Array:
        """P h_b for h (blocks, batch, d_out, d_in)."""
        ...

    def by_rows(self, shared: int, d_in: int, d_out: int) -> bool:
        """Whether `outputs` takes fewer products than forming h_b and `applied`."""
        ...


@dataclass(frozen=True)
class Inverted:
    """P V = G V A with the damped inverses A, G (blocks, d, d), (blocks, d) of a diagonal side, or unformed.

    z_t = sum_s (a_t A a_s) G g_s. Cost: rows (d_in^2 + d_out^2), or what an unformed side takes, and S (d_in + d_out) a
    row of S > 1 positions, or 2 d_in d_out where that is less.
    """

    A: Side
    G: Side

    def outputs(self, own: Record) -> Array:
        g = _times(own.g[0, ...], self.G)
        if isinstance(own.a, Ids):
            if isinstance(self.A, Unformed):
                raise TypeError("an embedding (Ids) has a diagonal side for its inputs, and an unformed one came")
            return _among_equal(own.a.index, g * _taken(self.A[:, None, :], own.a.index))
        xp = namespace(g)
        a = own.rows()
        turned = _times(a, self.A)
        if own.shared == 1:
            return g * xp.sum(a * turned, axis=-1, keepdims=True)
        if own.shared * (own.d_in + own.d_out) <= 2 * own.d_in * own.d_out:
            return xp.matmul(xp.matmul(turned, a.mT), g)
        return xp.matmul(turned, xp.matmul(a.mT, g))

    def applied(self, h: Array) -> Array:
        """G h A."""
        return _times(_times(h, self.A).mT, self.G).mT

    def by_rows(self, shared: int, d_in: int, d_out: int) -> bool:
        """Rows through both inverses and pairs of positions, against examples through both inverses."""
        A = side.products(self.A)
        G = side.products(self.G)
        rows = shared * (A + G) + shared * min(shared * (d_in + d_out), 2 * d_in * d_out)
        return rows <= d_out * A + d_in * G + d_in * d_out * _FORMED * shared


@dataclass(frozen=True)
class Rotated:
    """P V = Qg [(Qg^T V Qa) / values] Qa^T, values (blocks, d_out, d_in); a basis (blocks, d) of ones is the standard.

    Cost: rows (d_in^2 + 2 d_out^2 + 2 d_in d_out).
    """

    Qa: Array
    Qg: Array
    values: Array

    def outputs(self, own: Record) -> Array:
        xp = namespace(self.values)
        g = _times(own.g[0, ...], self.Qg)
        if isinstance(own.a, Ids):
            z = _among_equal(own.a.index, g / _taken(self.values, own.a.index))
        else:
            a = _times(own.rows(), self.Qa)
            z = self._alone(a, g) if own.shared == 1 else xp.matmul(a, (xp.matmul(g.mT, a) / self._each()).mT)
        return _times(z, side.transposed(self.Qg))

    def applied(self, h: Array) -> Array:
        """Into the basis, over the values, and back."""
        turned = _times(_times(h, self.Qa).mT, self.Qg).mT / self._each()
        return _times(_times(turned, side.transposed(self.Qa)).mT, side.transposed(self.Qg)).mT

    def by_rows(self, shared: int, d_in: int, d_out: int) -> bool:
        """Rows into the basis, outputs back, against examples into it and back."""
        rows = shared * (d_in * d_in + 2 * d_out * d_out + 2 * d_in * d_out)
        return rows <= d_in * d_out * (2 * d_in + 2 * d_out + _FORMED * shared)

    def _alone(self, a: Array, g: Array) -> Array:
        """Of rows that are examples: g_o sum_i a_i^2 / values_oi."""
        squares = (a * a)[:, :, 0, :]
        return g * namespace(g).matmul(squares, (1.0 / self.values).mT)[:, :, None, :]

    def _each(self) -> Array:
        """The values for every example, (blocks, 1, d_out, d_in)."""
        return self.values[:, None, ...]


def shares(drawn: Record, own: Record, solve: Solve) -> tuple[Array, Array]:
    """(s, q) of one layer: s (draws, batch) = J_vb P h_b of each draw and example, q = sum_b h_b . P h_b, 0-d.

    drawn, own   records of the same rows: draws of the model, and the one draw of the loss's own gradients
    """
    xp = namespace(own.g)
    found = []
    q = xp.sum(own.g[:0, ...])
    for span in spans(own.batch, at_once(_held(own))):
        part = _part(own, span)
        g = drawn.g[:, :, span, ...]
        if own.shared == 1 or isinstance(own.a, Ids) or solve.by_rows(own.shared, own.d_in, own.d_out):
            mine = part.g[0, ...]
            z = solve.outputs(part)
        else:
            a = part.rows()
            g = xp.matmul(g.mT, a[None, ...])  # J of each draw
            mine = xp.matmul(part.g[0, ...].mT, a)  # h
            z = solve.applied(mine)
        found.append(xp.sum(xp.vecdot(g, z[None, ...]), axis=(1, 3)))
        q = q + xp.sum(xp.vecdot(mine, z))
    return xp.concat(found, axis=1), q


def _held(own: Record) -> int:
    """Numbers that the temporary arrays of one example hold."""
    inner = own.shared * own.shared if own.shared == 1 or isinstance(own.a, Ids) else own.d_in * own.d_out
    rows = own.shared * own.d_in if isinstance(own.a, Patches) else 0
    return own.blocks * (inner + rows + own.shared * own.d_out)


def _part(own: Record, span: slice) -> Record:
    """Some consecutive examples."""
    if span.stop - span.start == own.batch:
        return own
    a = own.a
    if isinstance(a, Ids):
        a = Ids(a.index[span, ...], a.size)
    else:
        a = replace(a, image=a.image[:, span, ...]) if isinstance(a, Patches) else a[:, span, ...]
    mask = None if own.mask is None else own.mask[span, ...]
    return Record(a, own.g[:, :, span, ...], own.n, mask)


def _among_equal(index: Array, g: Array) -> Array:
    """Sum over positions s of [index_t = index_s] g_s, for index (batch, shared) and g (1, batch, shared, d)."""
    xp = namespace(g)
    same = index[:, :, None] == index[:, None, :]
    return xp.matmul(xp.astype(same, g.dtype)[None, ...], g)


def _taken(table: Array, index: Array) -> Array:
    """Columns of table (1, d, size) for index (batch, shared), (1, batch, shared, d)."""
    xp = namespace(table)
    found = xp.take(table[0, ...].mT, xp.reshape(index, (-1,)), axis=0)
    return xp.reshape(found, (1, *index.shape, table.shape[1]))


def _times(rows: Array, x: Side) -> Array:
    """Rows (blocks, batch, shared, d) times a side, in the order they lie in memory."""
    xp = namespace(rows)
    if shared_first(rows):
        return xp.moveaxis(_times(xp.moveaxis(rows, -2, -3), x), -2, -3)
    flat = xp.reshape(rows, (rows.shape[0], -1, rows.shape[-1]))
    return xp.reshape(side.through(flat, x), rows.shape)


def critical_batch(slope: Number, own: Number, examples: Number) -> Number:
    """The batch size beyond which larger ones stop helping: tr(P Sigma) / (G . P G).

    G the true gradient and Sigma the covariance of one example's; unbiased in both, from a batch of mean gradient
    V = (1/B) sum_b h_b: slope = V . P V, own = sum_b h_b . P h_b / B^2, examples = B. Infinite where the batch shows no
    gradient beyond its noise, slope <= own. With P = I it is the gradient noise scale; at this B the true slope along
    P V is half of the batch's. Source: McCandlish et al. 2018 (1812.06162).
    """
    left = slope - own
    known = left > 0
    scale = pick(known, (examples * own - slope) / pick(known, left, 1.0), float("inf"))
    return pick(scale > 0, scale, 0.0)
