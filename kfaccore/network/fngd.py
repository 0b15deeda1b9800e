"""Global FNGD: one coefficient an example for all layers, from K = sum over layers of K_l.

x_l = sum_i c_i J_{l,i} with (K + n damping I) c = 1 is the natural gradient of the whole network's empirical Fisher,
layers not taken apart. Sharing between epochs is FNGD's.

Exact while coefficients are computed, for gradients of any layers together.
Source: Ou et al. 2024 (2403.03473) take layers apart; the sum over layers is F's definition.
Cost: FNGD's, with one system of batch^3 for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kfaccore import factors
from kfaccore.linalg import table
from kfaccore.linalg.table import Table
from kfaccore.method import Block, Hyper, gradient
from kfaccore.record import Factored, Record
from kfaccore.sharing import expand, whole
from kfaccore.stacked import units
from kfaccore.stacked.shares import Share, entries, epochs_rest, mean_vector
from kfaccore.xp.arrays import Array, namespace, scalar
from kfaccore.xp.codes import Code


@dataclass(frozen=True)
class State:
    """Sums of beta and how many (1, entries), and the code (1,) of the last solve."""

    betas: Table
    code: Array


@dataclass(frozen=True)
class GlobalFNGD:
    """Coefficients shared by all layers; see the module. Fields as FNGD's; sharing whole | reduce."""

    share: Share = mean_vector
    steps: int = 100
    every: int = 0
    sharing: Callable[[Record], Record] = whole
    slots: int = 512
    relative: bool = False

    def __post_init__(self) -> None:
        if self.sharing is expand:
            raise ValueError("GlobalFNGD has one coefficient an example: positions differ between layers; take whole")

    def init(self, blocks: Mapping[str, Block], like: Array) -> State:
        samples = max((block.samples for block in blocks.values()), default=0)
        size = self.share.size(samples, self.slots, max(self.steps, 1))
        return State(table.empty(1, size, like), factors.unrefreshed(Block(1, 1), like))

    def rests(self, hyper: Hyper) -> bool | Array:
        """Whether the step uses shared coefficients: no records are needed, and gradients come weighted."""
        return epochs_rest(hyper.step, self.steps, self.every)

    def solve(
        self, state: State, grads: Mapping[str, Array | Factored], hyper: Hyper, records: Mapping[str, Record]
    ) -> tuple[dict[str, Array], State]:
        """Directions {layer: (blocks, d_out, d_in)} for any gradients of layers that have records of one batch.

        ValueError unless the records agree in n and in how many draws and examples they have.
        """
        records = {name: self.sharing(records[name]) for name in grads}
        first = next(iter(records.values()))
        for name, record in records.items():
            if (record.draws, record.batch) != (first.draws, first.batch) or record.n != first.n:
                raise ValueError(f"layer {name!r} has another batch, draws or n than the first; need one batch")
        vs = {name: _dense(grad, records[name]) for name, grad in grads.items()}
        xp = namespace(first.g)
        K = sum(xp.sum(units.gram(record), axis=0, keepdims=True) for record in records.values())
        inverse, shift, code = units.damped_inverse(K, first.n, hyper.damping, self.relative)
        inner: Array = sum(xp.sum(units.inner(records[name], v), axis=0) for name, v in vs.items())
        y = xp.matmul(inverse, inner[None, :, None])[:, :, 0]
        found = {}
        for name, v in vs.items():
            blocks = xp.broadcast_to(y, (v.shape[0], y.shape[-1]))
            found[name] = (v - units.combined(records[name], blocks)) / shift
        state = replace(state, code=code)
        if self.steps and first.draws == 1:
            beta = xp.sum(inverse, axis=-1) * scalar(first.n, inverse)
            ok = (code < int(Code.INDEFINITE)) & xp.all(xp.isfinite(beta), axis=-1) & ~xp.asarray(self.rests(hyper))
            index = self._index(state, beta.shape[-1], first.ids, hyper.step)
            betas = table.added(state.betas, index, beta, ok, hyper.step % self.steps == 0)
            state = replace(state, betas=betas)
        return found, state

    def weighted(
        self, state: State, g: Mapping[str, Array], hyper: Hyper, ids: Array | None = None
    ) -> dict[str, Array]:
        """Output gradients {layer: (batch, [positions,] d_out)} for the weight path, as FNGD's."""
        if self.rests(hyper) is False:
            return dict(g)
        found = {}
        for name, x in g.items():
            xp = namespace(x)
            index = self._index(state, x.shape[0], ids, hyper.step)
            beta = xp.astype(table.read(state.betas, index)[0, :], x.dtype)
            found[name] = x * xp.reshape(beta, (-1, *(1,) * (x.ndim - 1)))
        return found

    def _index(self, state: State, count: int, ids: Array | None, step: int | Array) -> Array:
        return entries(self.share, count, ids, step, self.steps, state.betas.total.shape[1], state.code)


def _dense(grad: Any, record: Record) -> Array:
    if isinstance(grad, Factored):
        return grad.dense()
    return gradient(grad, (record.blocks, record.d_out, record.d_in))[0]
