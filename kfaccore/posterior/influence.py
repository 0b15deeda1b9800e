"""Influence of training examples on measurements, score[q, t] = grad m_q . L^-1 grad l_t.

Positive means that more weight on t lowers m_q; taking t out of a mean over N raises m_q by score / N.
Source: Koh & Liang 2017; Grosse et al. 2023 (EK-FAC); the low rank of queries is theirs too.
Cost: Q T d_in d_out a layer of one position, (Q + S) T d_in d_out of S.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, reduce
from math import ceil
from operator import add, length_hint

from kfaccore import xp as kernels
from kfaccore.linalg import forms
from kfaccore.posterior.blocks import Blocks
from kfaccore.posterior.checks import check_records
from kfaccore.posterior.gaussian import Posterior, Records
from kfaccore.posterior.lowrank import Thin, thin
from kfaccore.posterior.turned import Turned
from kfaccore.record import Record
from kfaccore.record.chunks import parts
from kfaccore.record.digest import digest
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.codes import Code, choose
from kfaccore.xp.ranges import ANY, COUNT, within

Ready = Mapping[str, Turned | Thin]

_OTHER = (
    "is not as in the first: queries are scored in groups of what `memory` holds, a pass each, and scores stand by "
    "place; give batches in one order (no shuffling), or more memory"
)


def scores(
    P: Posterior,
    queries: Records,
    batches: Iterable[Records],
    memory: int = 1 << 30,
    rank: int | None = None,
    positions: bool = False,
    out: str | os.PathLike | None = None,
) -> Array:
    """score[q, t] (Q, T) of every query and every example of `batches`, in their order; draws outermost.

    queries     records of measurements' gradients, from an adapter's `measured`
    batches     records of the training loss's own gradients, iterable again
    memory      bytes that the queries times L^-1 may take: more pass over `batches` several times
    rank        keep so many singular terms of each query in a layer, r (d_in + d_out) numbers instead of d_in d_out
    positions   (Q, T, shared): what each position of an example adds; they add up to the example's
    out         an .npy that the scores are written to, and read from: a block for each batch, in OUT.parts until all
                are there, so that memory holds one, and a run that was stopped computes only what is missing

    ValueError for layers that differ, for records without gradients, and where one pass is not enough for batches that
    cannot be iterated again or come in another order.
    """
    check_records(P.curvature.layers, queries)
    within("rank", 1 if rank is None else rank, COUNT)
    within("memory", memory, ANY)
    groups = list(_groups(P, queries, memory, rank))
    if isinstance(batches, Mapping):
        raise ValueError("batches is one mapping; need an iterable of them: put it into a list")
    if len(groups) > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"batches is an iterator, and {memory} bytes hold the queries in {len(groups)} parts, each of which needs "
            f"a pass: give a list, an object whose __iter__ starts anew, or more memory"
        )
    draws = next(iter(queries.values())).draws
    order = _Order() if len(groups) > 1 else None

    def again() -> Iterator[tuple[int, Records]]:
        checked = _checked(P, batches, positions)
        return checked if order is None else order.of(checked)

    if out is not None:
        return _on_disk(P, groups, again, rank, positions, out).joined(draws)
    found = [_one_pass(P, group, again(), rank, positions) for group in groups]
    xp = namespace(found[0])
    apart = [xp.reshape(x, (draws, -1, *x.shape[1:])) for x in found]
    whole = xp.concat(apart, axis=1) if len(apart) > 1 else apart[0]
    return xp.reshape(whole, (-1, *whole.shape[2:]))


def passes(P: Posterior, queries: Records, memory: int = 1 << 30, rank: int | None = None) -> int:
    """How often `scores` goes over the batches: the bytes of the queries over `memory`, rounded up."""
    first = next(iter(queries.values()))
    return ceil(first.batch / _at_once(P, first, memory, rank))


def _at_once(P: Posterior, first: Record, memory: int, rank: int | None) -> int:
    """Queries whose L^-1 grad fit into `memory` bytes; at least one."""
    sizes = [basis.shape for basis in P.curvature.layers.values()]
    numbers = [blocks * (out * into if rank is None else rank * (out + into)) for blocks, out, into in sizes]
    wide = 4 if "32" in str(first.g.dtype) else 8
    return max(1, memory // max(1, sum(numbers) * wide * max(1, first.draws)))


def _groups(P: Posterior, queries: Records, memory: int, rank: int | None) -> Iterator[Records]:
    """The queries in groups of examples."""
    first = next(iter(queries.values()))
    for record in queries.values():
        forms.check_draws(record)
    many = ceil(first.batch / passes(P, queries, memory, rank))
    columns = [list(parts(record, many)) for record in queries.values()]
    for row in zip(*columns, strict=True):
        yield dict(zip(queries, row, strict=True))


class _Order:
    """The batches of the first pass, in theirs: each group of queries is a pass of its own."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.passes = 0

    def of(self, checked: Iterator[tuple[int, Records]]) -> Iterator[tuple[int, Records]]:
        """The same batches; ValueError where a later pass has others, or them in another order."""
        place = 0
        for sure, batch in checked:
            name = digest(batch)
            if not self.passes:
                self.first.append(name)
            elif place >= len(self.first) or self.first[place] != name:
                raise ValueError(f"batch {place} of pass {self.passes + 1} {_OTHER}")
            place += 1
            yield sure, batch
        if place < len(self.first):
            raise ValueError(f"pass {self.passes + 1} ended after {place} of {len(self.first)} batches: it {_OTHER}")
        self.passes += 1


def _one_pass(
    P: Posterior,
    group: Records,
    checked: Iterator[tuple[int, Records]],
    rank: int | None,
    positions: bool,
) -> Array:
    """The scores of one group of queries, (draws * queries, T)."""
    ready = _ready(P, group, rank)
    found = [_block(ready, batch, positions, sure) for sure, batch in checked]
    return namespace(found[0]).concat(found, axis=1) if len(found) > 1 else found[0]


def _on_disk(
    P: Posterior,
    groups: list[Records],
    again: Callable[[], Iterator[tuple[int, Records]]],
    rank: int | None,
    positions: bool,
    out: str | os.PathLike,
) -> Blocks:
    """As `_one_pass` for every group, block by block; a group whose blocks are all there is not even solved for."""
    blocks = Blocks(out)
    of = digest(P, rank, positions)
    for group in groups:
        blocks.group()
        mine = digest(of, group)
        solved = cache(lambda group=group: _ready(P, group, rank))
        for sure, batch in again():
            blocks.put(
                digest(mine, batch),
                lambda sure=sure, batch=batch, solved=solved: _block(solved(), batch, positions, sure),
            )
    return blocks


def _checked(P: Posterior, batches: Iterable[Records], positions: bool) -> Iterator[tuple[int, Records]]:
    """(examples that are met for certain, batch) of the batches, at least one."""
    many = length_hint(batches)  # 0 where there is none
    seen = 0
    for batch in batches:
        check_records(P.curvature.layers, batch, positions)
        size = next(iter(batch.values())).batch
        seen += size
        yield max(seen, (many - 1) * size), batch  # the last one is often shorter
    if not seen:
        raise ValueError("batches gave nothing: need at least one {layer: Record}, again in every pass")


def _ready(P: Posterior, group: Records, rank: int | None) -> Ready:
    """L^-1 times the queries' gradients, or their leading terms."""
    if rank is not None:
        return thin(P, group, rank)
    layers = P.curvature.layers
    return {
        name: Turned(forms.weighted(record, layers[name], 1.0 / P.spectrum(name)), layers[name])
        for name, record in group.items()
    }


def _block(ready: Ready, batch: Records, positions: bool, sure: int) -> Array:
    """The scores of one group and one batch, in a pass that meets so many examples for certain."""
    return reduce(add, [ready[name].cross(record, positions, sure) for name, record in batch.items()])


def removal(P: Posterior, hessian: Array, residual: Array, queries: Records, records: Records) -> tuple[Array, Array]:
    """(by how much m_q rises when example t is taken out (Q, T), a code for each t): K_qt (I - H_t K_tt)^-1 r_t.

    hessian    (batch, C, C): of example t's loss in the model's outputs, as P's scale F~ sums it: where scale is N it
               is the example's own, where scale is 1 (a mean loss) it is that over N, and the result times N
    residual   (batch, C): the gradient of example t's loss in the outputs
    records    of `outputs`, whose draws are the C outputs

    Exact for ridge regression. An example of leverage >= 1 (largest eigenvalue of H K) gets the first-order score, code
    INDEFINITE. For single examples only: of groups the plain scores do better.
    Source: Pregibon 1981 (leave-one-out with leverage).
    """
    xp = namespace(residual)
    count = next(iter(records.values())).draws
    batch, units = residual.shape
    if count != units or tuple(hessian.shape) != (batch, units, units):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, hessian {tuple(hessian.shape)}, and the records {count} "
            f"draws; need (batch, C), (batch, C, C) and C"
        )
    K = P.covariance(records)
    values, Q, _ = kernels.eigh(hessian)
    R = xp.matmul(Q * xp.sqrt(xp.where(values > 0, values, xp.zeros_like(values)))[:, None, :], Q.mT)
    leverage, Z, _ = kernels.eigh(xp.matmul(xp.matmul(R, K), R))
    good = leverage[:, -1] < 1
    # (I - R R K)^-1 r = r + R (I - R K R)^-1 R K r
    r = residual[:, :, None]
    inside = xp.matmul(Z.mT, xp.matmul(R, xp.matmul(K, r)))
    divided = inside / xp.where(good[:, None], 1.0 - leverage, xp.ones_like(leverage))[:, :, None]
    lifted = r + xp.matmul(R, xp.matmul(Z, divided))
    moved = xp.where(good[:, None, None], lifted, r)[:, :, 0]
    crossed = xp.reshape(P.cross(queries, records), (-1, units, batch))
    return xp.sum(crossed * moved.mT[None, ...], axis=1), choose(good, Code.OK, Code.INDEFINITE)
