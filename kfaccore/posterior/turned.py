"""Queries L^-1 grad that stay in the eigenbasis as long as turning examples into it is the cheaper way to meet them.

<U, J_t> is the same in either basis. To turn U = Qg (W * J~) Qa^T back takes Q d_out d_in (d_out + d_in) products once,
to turn the rows of an example S (d_out^2 + d_in^2) each time. Where it is known that enough examples come U is turned
back at once, else after as many as make the two equal: never more than twice the lesser of both is spent.
"""

from __future__ import annotations

from kfaccore.convolution.patches import Patches
from kfaccore.linalg import forms, side
from kfaccore.linalg.basis import Basis
from kfaccore.record import Ids, Record
from kfaccore.xp.arrays import Array


class Turned:
    """U (queries, blocks, d_out, d_in) of one layer, made from W * J~ in the basis."""

    def __init__(self, weighted: Array, basis: Basis) -> None:
        self.basis = basis
        self._held = weighted
        self._inside = True

    def cross(self, record: Record, positions: bool, sure: int) -> Array:
        """As `forms.cross`; `sure`: so many examples are met for certain, those before and those known to come."""
        if self._inside and sure >= self._worth(record):
            self._held = self.basis.back(self._held)
            self._inside = False
        if self._inside:
            record = forms.rotated(record, self.basis)
        return forms.cross(self._held, record, positions)

    def _worth(self, record: Record) -> int:
        """So many examples are cheaper to turn than the queries; none where rows are not held as such."""
        if isinstance(self.basis.Qa, tuple) or isinstance(record.a, Ids | Patches):
            return 0
        widths = [Q.shape[-1] for Q in (self.basis.Qg, self.basis.Qa) if not side.is_diagonal(Q)]
        each = record.shared * sum(width**2 for width in widths)
        _, d_out, d_in = self.basis.shape
        return self._held.shape[0] * d_out * d_in * sum(widths) // each if each else 0
