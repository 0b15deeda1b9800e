"""FNGD: x = sum_i c_i J_i with (K + n damping I) c = 1 and K the inner products of the examples' gradients J.

That is (F + damping I)^-1 of the batch's own gradient, F empirical: records must hold the training loss's own g. In the
first epoch (`steps` steps, each with a record) coefficients are computed; afterwards they are shared and the shell
multiplies the output gradients by them on the weight path (`weighted`), so that the ordinary weight gradient already is
the direction: no solve, no record, no second product. Kept is beta = n c, which does not depend on the batch size;
beta = 1 is SGD.

Exact while coefficients are computed: for any gradient, in the layer. Shared ones promise nothing, not even descent.
Source: Ou et al. 2024 (2403.03473), of which abstract and introduction were open to us; how coefficients are matched
between epochs is not in them: the four ways are our reading, and `scalar` (a rate a layer) the one to beat.
Cost: first epoch batch^2 (d_in + d_out) + batch^3 and up to two weight gradients; later batch d_out; memory the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kfaccore import factors
from kfaccore.convolution.patches import Patches
from kfaccore.method import Additive, Block, Hyper
from kfaccore.methods.rows import fisher, table, units
from kfaccore.methods.rows.shares import Coefficients, mean_vector, position, sample, scalar_rate
from kfaccore.methods.rows.table import Table
from kfaccore.record import Factored, Ids, Record
from kfaccore.record import dense as dense_block
from kfaccore.record.sharing import expand, whole
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp.arrays import Array, all_finite, device_of, loop, namespace, place, scalar, select
from kfaccore.xp.codes import Code, choose

__all__ = ["FNGD", "mean_vector", "position", "sample", "scalar_rate"]


@dataclass(frozen=True)
class State:
    """Means of beta and of how many (blocks, entries); weight (blocks,), 1 once a record was seen; code (blocks,)."""

    betas: Table
    weight: Array
    code: Array


@dataclass(frozen=True)
class Stats:
    """Nothing but how many records were not finite: the rows are used at `solve`."""

    bad: Array


@dataclass(frozen=True)
class FNGD(Additive, Coefficients):
    """x = sum_i c_i J_i with (K + n damping I) c = 1, K_ij = <J_i, J_j>: the batch's own natural gradient.

    J (batch, d_out, d_in) are gradients of the training loss itself (pass fisher=empirical). After an epoch of `steps`
    the coefficients are shared and `weighted` puts them on output gradients: no solve. x (blocks, d_out, d_in). Exact
    while they are computed, which takes a record at each step, whatever the clocks. Ou et al. 2024,
    arxiv.org/abs/2403.03473.

    share      mean_vector | position | sample | scalar_rate
    steps      steps of an epoch; 0 computes coefficients at every step
    every      epochs between epochs that compute; 0: only the first does
    sharing    whole (a unit is an example) | expand (a position) | reduce (an example, its K approximate)
    slots      most units of a batch, where Block.rows is 0
    relative   damping in units of tr(K) / n^2
    """

    cycles: ClassVar[int] = 1
    rows_at_solve: ClassVar[bool] = True

    def init(self, block: Block, like: Array) -> State:
        size = self.share.size(block.samples, block.rows or self.slots, max(self.steps, 1))
        weight = namespace(like).zeros((block.blocks,), **place(like))
        return State(table.empty(block.blocks, size, like), weight, factors.unrefreshed(block, like))

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        _needs_gradients(record)
        xp = namespace(record.g)
        fine = xp.all(all_finite(record.g, 2), axis=0)
        if isinstance(record.a, Patches):
            fine = fine & xp.all(xp.isfinite(record.a.image))
        elif not isinstance(record.a, Ids):
            fine = fine & all_finite(record.a)
        return Stats(xp.astype(~fine, record.g.dtype))

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        xp = namespace(state.weight)
        return replace(state, weight=xp.where(stats.bad == 0, xp.ones_like(state.weight), state.weight))

    def refresh(self, state: State, hyper: Hyper) -> State:
        return replace(state, code=choose(state.weight > 0, Code.OK, state.code))

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        if record is None:
            return self._handed_on(state, grad, hyper)
        _needs_gradients(record)
        given, squeeze = gradient(grad, (record.blocks, record.d_out, record.d_in))
        own = self.own(record, given)
        record = units.shared(record, self.sharing)
        if own is None:
            x, c, code = self._general(record, given, hyper.damping)
        else:
            x, c, code = self._from_rows(record, given, hyper.damping, own)
        fresh = state.code == int(Code.IDENTITY)
        state = self.filled(state, c, code, hyper, record)
        return finish(unless(fresh, x, given), choose(fresh, Code.IDENTITY, code), state, squeeze)

    def filled(self, state: State, c: Array, code: Array, hyper: Hyper, record: Record) -> State:
        """The state with beta = n c of the record's units, c (blocks, units), in the table; not where the code of c
        says that it was not solved for, before the first refresh, or in a step that rests."""
        if record.draws > 1 or not self.steps:
            return state
        xp = namespace(c)
        solved = (code < int(Code.NONFINITE)) & (state.code != int(Code.IDENTITY)) & xp.all(xp.isfinite(c), axis=-1)
        beta = xp.astype(c * scalar(record.n, c), state.betas.value.dtype)
        index = self._index(state, beta.shape[-1], record.ids, hyper)
        ok = solved & ~xp.asarray(self.rests(hyper), device=device_of(solved))
        return replace(state, betas=table.added(state.betas, index, beta, ok, hyper.step % self.steps == 0))

    def weighted(self, state: State, g: Array, hyper: Hyper, ids: Array | None = None) -> Array:
        """g for the weight path: times beta while coefficients are shared, as it is otherwise.

        g (batch, [positions,] d_out) or with blocks first; ids (batch,).
        """
        rests = self.rests(hyper)
        if rests is False:
            return g
        xp = namespace(g)
        g4 = xp.reshape(g, _axes(g, state.code.shape[0]))
        per_position = self.sharing is expand
        _, batch, positions, _ = g4.shape
        count = batch * positions if per_position else batch
        if per_position and ids is not None:
            ids = xp.repeat(ids, positions)
        beta = table.read(state.betas, self._index(state, count, ids, hyper))
        beta = xp.reshape(beta, (beta.shape[0], batch, -1, 1))
        beta = xp.where(xp.asarray(rests, device=device_of(beta)), beta, xp.ones_like(beta))
        return xp.reshape(g4 * xp.astype(beta, g.dtype), g.shape)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        raise TypeError("FNGD keeps coefficients, not curvature: CGFAC(Empirical()) has its F")

    def own(self, record: Record, grad: Array | Factored) -> Array | None:
        """(blocks,) where the rows of a gradient not multiplied out are the record's; None if they cannot be."""
        if not isinstance(grad, Factored) or isinstance(record.a, Ids | Patches):
            return None
        if grad.g.shape != record.g.shape[1:] or record.draws != 1:
            return None
        if record.shared > 1 and self.sharing not in (whole, expand):
            return None
        xp = namespace(record.g)
        axes = (-3, -2, -1)
        return xp.all(grad.g == record.g[0, ...], axis=axes) & xp.all(grad.a == record.a, axis=axes)

    def _handed_on(self, state: State, grad: Array | Factored, hyper: Hyper) -> Solution:
        """The gradient itself: of a resting step it is the direction already; others wait for a record."""
        xp = namespace(state.weight)
        v = grad.dense() if isinstance(grad, Factored) else grad
        v, squeeze = gradient(v, (state.code.shape[0], *v.shape[-2:]))
        waits = ~xp.asarray(self.rests(hyper), device=device_of(state.code)) | (state.code == int(Code.IDENTITY))
        # where it waits the direction is a copy of the gradient, never the caller's own array
        (v,) = loop(lambda _: xp.any(waits), lambda _: (v + xp.zeros_like(v),), (v,), 1)
        return finish(v, choose(waits, Code.IDENTITY, state.code), state, squeeze)

    def _index(self, state: State, units: int, ids: Array | None, hyper: Hyper) -> Array:
        return self.entries(units, ids, hyper, state.betas.value.shape[1], state.weight)

    def _from_rows(
        self, record: Record, grad: Factored, damping: float | Array, own: Array
    ) -> tuple[Array, Array, Array]:
        """sum c J where V is the record's own gradient, without a difference; as `_general` in other blocks; c; a
        code."""
        xp = namespace(own)
        K = units.damped(units.gram(record), record.n, damping, self.relative)
        c = xp.sum(K.inverse, axis=-1)
        x = units.combined(record, c) * (scalar(record.n, c) / scalar(grad.n, c))

        def general(carry: tuple[Array]) -> tuple[Array]:
            return (select(own, carry[0], self._general(record, grad, damping)[0]),)

        (x,) = loop(lambda _: ~xp.all(own), general, (x,), 1)  # at most one turn: computed where a block needs it
        return x, c, K.code

    def _general(self, record: Record, grad: Array | Factored, damping: float | Array) -> tuple[Array, Array, Array]:
        """(V - U (K + n damping I)^-1 U^T V) / damping for any V, a difference taken in the widest dtype; c; a code."""
        v = grad.dense() if isinstance(grad, Factored) else grad
        dtype = v.dtype
        wide = units.widened(record)
        xp = namespace(v)
        v = xp.astype(v, wide.g.dtype)
        K = units.damped(units.gram(wide), wide.n, damping, self.relative)
        code = K.code
        c = xp.astype(xp.sum(K.inverse, axis=-1), dtype)
        if v.shape[1] * v.shape[2] <= c.shape[-1]:  # no direction without curvature: the difference is rounding
            x, code = fisher.inverted(dense_block(wide), v, K.damping)
        else:
            y = K.solve(units.inner(wide, v))
            x = (v - units.combined(wide, y)) / K.damping[:, None, None]
        return xp.astype(x, dtype), c, code


def _needs_gradients(record: Record) -> None:
    if record.draws == 0:
        raise ValueError("FNGD got a record of zero draws (forward only): it needs the loss's own gradients")


def dense(grad: Array | Factored, like: Array) -> Array:
    """A gradient (blocks, d_out, d_in) in the dtype of `like`, rows multiplied out in that."""
    xp = namespace(like)
    if isinstance(grad, Factored):
        return Factored(xp.astype(grad.a, like.dtype), xp.astype(grad.g, like.dtype), grad.n).dense()
    return xp.astype(grad, like.dtype)


def unless(fresh: Array, x: Array, grad: Array | Factored) -> Array:
    """x, but the gradient in blocks that are `fresh`; it is multiplied out only if there is one."""
    xp = namespace(x)
    (x,) = loop(lambda _: xp.any(fresh), lambda x: (select(fresh, dense(grad, x[0]), x[0]),), (x,), 1)
    return x


def _axes(g: Array, blocks: int) -> tuple[int, int, int, int]:
    """(blocks, batch, positions, d_out) of output gradients with or without axes of blocks and positions."""
    if blocks > 1 and g.ndim != 4:
        raise ValueError(f"g has shape {tuple(g.shape)}; need (blocks, batch, positions, d_out) for {blocks} blocks")
    batch, *positions, d_out = g.shape[1:] if g.ndim == 4 else g.shape
    return blocks, batch, positions[0] if positions else 1, d_out
