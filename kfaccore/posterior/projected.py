"""Gradients in a small space: a P_i^T and g P_o^T, a function from records to records.

So a fit and the scores on projected records are LoGra, their `cosine` TrackStar's, and a store of gradients is the J of
projected records, k_out k_in numbers an example and layer. Damping stays joint and exact in the small space.
Source: Choe et al. 2024 (LoGra); Chang et al. 2024 (TrackStar). Cost: a row (k_in d_in + k_out d_out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from kfaccore import xp as kernels
from kfaccore.convolution.patches import Patches
from kfaccore.linalg import side
from kfaccore.posterior.curvature import Curvature
from kfaccore.record import Ids, Record
from kfaccore.record.chunks import input_chunks
from kfaccore.xp.arrays import Array, device_of, namespace

Pair = tuple[Array, Array]


@dataclass(frozen=True)
class Projected:
    """Records with k_in inputs and k_out outputs; a side that is no wider stays as it is.

    Random projections have independent normal entries of variance 1/k, a function of (seed, side, width): layers of one
    shape have the same. `bases` {layer: (P_o (blocks, k_out, d_out), P_i (blocks, k_in, d_in))} take their place.
    """

    k_out: int
    k_in: int
    seed: int = 0
    bases: Mapping[str, Pair] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.k_out, self.k_in) < 1:
            raise ValueError(f"Projected got k_out={self.k_out}, k_in={self.k_in}; need at least 1")

    @classmethod
    def leading(cls, curvature: Curvature, k_out: int, k_in: int) -> Projected:
        """Onto the eigenvectors of each layer with the largest sums of eigenvalues; of whole networks only."""
        bases = {}
        for name, basis in curvature.layers.items():
            if isinstance(basis.Qa, tuple):
                raise ValueError(f"layer {name!r} has a dense block, which has no sides: fit KFAC or EKFAC instead")
            xp = namespace(basis.values)
            P_o = _leading(basis.Qg, xp.sum(basis.values, axis=2), k_out)
            bases[name] = (P_o, _leading(basis.Qa, xp.sum(basis.values, axis=1), k_in))
        return cls(k_out, k_in, 0, bases)

    def __call__(self, records: Mapping[str, Record]) -> dict[str, Record]:
        """Projected records of one batch."""
        unknown = sorted(set(records) - set(self.bases)) if self.bases else []
        if unknown:
            raise ValueError(f"no projection for layers {unknown}; there is one for {sorted(self.bases)}")
        return {name: self._one(name, record) for name, record in records.items()}

    def of(self, record: Record) -> Record:
        """One record, by random projections."""
        if self.bases:
            raise ValueError("these projections are of named layers: call with {layer: Record}")
        return self._one("", record)

    def _one(self, name: str, record: Record) -> Record:
        if self.bases:
            P_o, P_i = self.bases[name]
        else:
            P_o = self._random(0, self.k_out, record.d_out, record)
            P_i = self._random(1, self.k_in, record.d_in, record)
        g = kernels.turned(record.g, P_o.mT)
        return Record(_projected(record, P_i), g, record.n, record.mask, record.ids)

    def _random(self, which: int, k: int, d: int, record: Record) -> Array:
        """(blocks, k, d)."""
        like = record.g
        drawn = np.random.default_rng([self.seed, which, d]).normal(size=(k, d)) / np.sqrt(k)
        matrix = drawn if k < d else np.eye(d)
        xp = namespace(like)
        placed = xp.astype(kernels.from_host(matrix, like), like.dtype)
        return placed[None, ...] + xp.zeros((record.blocks, 1, 1), dtype=like.dtype, device=device_of(like))


def _leading(Q: Array, sums: Array, k: int) -> Array:
    """The k columns of Q with the largest sums, as rows (blocks, k, d)."""
    xp = namespace(Q)
    order = xp.argsort(sums, axis=-1, descending=True)[:, : min(k, sums.shape[-1])]
    full = xp.eye(Q.shape[-1], dtype=Q.dtype, device=device_of(Q))[None, ...] * Q[:, None, :]
    full = full if side.is_diagonal(Q) else Q
    return xp.stack([xp.take(full[b, ...].mT, order[b, :], axis=0) for b in range(Q.shape[0])])


def _projected(record: Record, P_i: Array) -> Array:
    """a P_i^T (blocks, batch, shared, k_in): columns of P_i for ids, patches unfolded in chunks."""
    xp = namespace(P_i)
    if isinstance(record.a, Ids):
        rows = xp.take(P_i[0, ...].mT, xp.reshape(record.a.index, (-1,)), axis=0)
        return xp.reshape(rows, (1, record.batch, record.shared, -1))
    turned = P_i.mT[:, None, :, :]
    if not isinstance(record.a, Patches):
        return xp.matmul(record.a, turned)
    return xp.concat([xp.matmul(a, turned) for _, a in input_chunks(record)], axis=1)
