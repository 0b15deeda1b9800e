"""Queries of low rank: of each U = L^-1 grad in a layer its r largest singular terms, sum of u v^T."""

from __future__ import annotations

from dataclasses import dataclass

from kfaccore import xp as kernels
from kfaccore.linalg import forms
from kfaccore.posterior.gaussian import Posterior, Records
from kfaccore.record import Ids, Record
from kfaccore.record.chunks import parts
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class Thin:
    """u (queries, blocks, d_out, r), singular values in it, and v (queries, blocks, d_in, r)."""

    u: Array
    v: Array

    def cross(self, record: Record, positions: bool = False, sure: int = 0) -> Array:
        """As `forms.cross`: sum over terms and positions of (g . u) (a . v); `sure` is as `Turned.cross` has it."""
        forms.check_draws(record)
        xp = namespace(self.u)
        queries, blocks, _, rank = self.u.shape
        each = blocks * queries * rank * record.shared * (1 + record.draws)
        u = xp.reshape(xp.permute_dims(self.u, (1, 2, 0, 3)), (blocks, record.d_out, -1))
        v = xp.reshape(xp.permute_dims(self.v, (1, 2, 0, 3)), (blocks, record.d_in, -1))
        found = []
        for part in parts(record, kernels.at_once(each)):
            shape = (part.blocks, part.batch, part.shared, queries, rank)
            a = xp.reshape(_inputs(part, v), shape)
            g = xp.reshape(kernels.turned(part.g, u), (part.draws, *shape))
            dots = xp.sum(g * a[None, ...], axis=(1, -1))  # (draws, batch, shared, queries)
            dots = xp.permute_dims(dots, (3, 0, 1, 2))
            found.append(dots if positions else xp.sum(dots, axis=-1))
        whole = xp.concat(found, axis=2)
        return xp.reshape(whole, (queries, -1, *whole.shape[3:]))


def thin(P: Posterior, queries: Records, rank: int) -> dict[str, Thin]:
    """The `rank` largest singular terms of each query, {layer: Thin}."""
    return {name: _cut(U, rank) for name, U in P.queries(queries).items()}


def _cut(U: Array, rank: int) -> Thin:
    u, s, vt = namespace(U).linalg.svd(U, full_matrices=False)
    rank = min(rank, s.shape[-1])
    return Thin(u[..., :rank] * s[..., None, :rank], vt.mT[..., :rank])


def _inputs(record: Record, v: Array) -> Array:
    """a v of each position, (blocks, batch, shared, queries * rank); a row of v where `a` is an id."""
    xp = namespace(v)
    if isinstance(record.a, Ids):
        return xp.take(v[0, ...], xp.reshape(record.a.index, (-1,)), axis=0)
    return kernels.turned(record.rows(), v)
