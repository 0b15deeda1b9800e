"""A layer in the coordinates of M's eigenvectors, where M^-1 is a division: V is Qg^T V Qa there.

J v, inner products and damping I are what they were, so a coarse level of vectors made of M^-1 and the residual is the
same level. A solve costs nothing there; records and the finished step are what is turned.
Cost: rows (d_in^2 + d_out^2) for the record, as much for a gradient not multiplied out, d_in d_out (d_in + d_out) back.
"""

from __future__ import annotations

from dataclasses import dataclass

from kfaccore.linalg import kron, side
from kfaccore.method import State
from kfaccore.network.two_level.gradients import full
from kfaccore.record import Factored, Record
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp.arrays import Array, namespace, scalar
from kfaccore.xp.memory import same


@dataclass(frozen=True)
class Turned:
    """One layer of a step: M^-1 V = Qg (Qg^T V Qa / below) Qa^T, with the method's code."""

    Qg: Array
    below: Array
    Qa: Array
    code: Array

    def record(self, record: Record) -> Record:
        """The record; its inputs must be an array."""
        return Record(_times(record.a, self.Qa), _times(record.g, self.Qg), record.n)

    def grad(self, grad: Array | Factored, before: Record, after: Record) -> Array | Factored:
        """A gradient, given the record before and after turning: inputs that they share are turned once."""
        if isinstance(grad, Factored):
            a = after.a if same(grad.a, before.a) else _times(grad.a, self.Qa)
            return Factored(a, _times(grad.g, self.Qg), grad.n)
        v = kron.apply(side.transposed(self.Qg), full(grad, self.Qg), self.Qa)
        return v if grad.ndim == 3 else v[0, ...]

    def solve(self, grad: Array | Factored, state: State) -> Solution:
        """M^-1 of a turned gradient, turned."""
        grad, squeeze = gradient(grad, tuple(self.below.shape))
        if isinstance(grad, Factored):
            a = _folded(grad.a)
            g = _folded(grad.g)
            v = namespace(g).matmul((g / scalar(grad.n, g)).mT, a)
            v /= self.below  # an array of its own
        else:
            v = full(grad, self.below) / self.below
        return finish(v, self.code, state, squeeze)

    def back(self, v: Array) -> Array:
        """A direction (blocks, d_out, d_in) as it is without turning."""
        return kron.apply(self.Qg, v, side.transposed(self.Qa))


def _folded(x: Array) -> Array:
    """Rows (blocks, batch, shared, d) as (blocks, batch shared, d)."""
    return namespace(x).reshape(x, (x.shape[0], -1, x.shape[-1]))


def _times(x: Array, Q: Array) -> Array:
    """Rows (..., blocks, batch, shared, d) times Q (blocks, d, d), in the dtype of Q."""
    xp = namespace(x)
    rows = xp.reshape(xp.astype(x, Q.dtype, copy=False), (*x.shape[:-3], -1, x.shape[-1]))
    return xp.reshape(xp.matmul(rows, Q), x.shape)
