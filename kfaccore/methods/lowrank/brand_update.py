"""Updates of a low-rank symmetric factor: Brand's for new rows, and a correction of some modes by the factor itself.

keep U diag(D) U^T + add X^T X = W diag(keep D, add) W^T with W = [U, X^T] = Q R by one qr, so the eigenpairs come from
R diag(..) R^T and U <- Q V. The qr of W as a whole leaves Q orthonormal whatever X holds: zero rows, duplicates,
rows inside span(U); that of X - X U U^T alone does not.
Source: Brand 2006 (low-rank modifications of the thin SVD); Puiu 2022 (2210.08494).
Cost: d (k + n)^2 + (k + n)^3 for n rows, linear in d; d^2 (k + n) + d^3 once k + n >= d.
"""

from __future__ import annotations

from dataclasses import replace

from kfaccore import xp as kernels
from kfaccore.linalg import equal
from kfaccore.methods.lowrank import lowrank
from kfaccore.methods.lowrank.lowrank import LowRank, Outside, Rank
from kfaccore.xp.arrays import Array, all_finite, namespace
from kfaccore.xp.asking import Ask, Asks
from kfaccore.xp.codes import Code, choose


def moved(low: LowRank, rows: Array, keep: Array, add: Array, rank: Rank, outside: Outside) -> LowRank:
    """The factor keep M + add rows^T rows, of whose modes the state's many are held; rows (blocks, n, d).

    Only the `low.rank` largest old modes go in, at most rank.cap. keep, add (blocks,).
    """
    xp = namespace(rows)
    d, held = low.U.shape[-2:]
    before = max(held - rank.cap, 0)  # modes that are held but do not go in
    n = max(rows.shape[1], before)  # with zero rows, so that there are `held` modes to be held again
    if n > rows.shape[1]:
        zeros = xp.zeros_like(low.U[:, :, : n - rows.shape[1]]).mT
        rows = xp.concat([rows, zeros], axis=1)
    D = xp.where(lowrank.counted(low), low.D, xp.zeros_like(low.D))[:, before:] * keep[:, None]
    U = low.U[:, :, before:]
    if U.shape[-1] + n >= d:  # W would be square or wider: the matrix itself is cheaper
        M = xp.matmul(U * D[:, None, :], U.mT) + add[:, None, None] * kernels.gram(rows)
        values, vectors, _ = kernels.eigh(M)
    else:
        Q, R = kernels.qr(xp.concat([U, rows.mT], axis=-1))
        middle = xp.concat([D, add[:, None] + xp.zeros_like(rows[:, :, 0])], axis=-1)
        values, small, _ = kernels.eigh(xp.matmul(R * middle[:, None, :], R.mT))
        vectors = xp.matmul(Q, small)
    values, vectors = equal.leading(values, vectors, held)
    trace = keep * low.trace + add * xp.sum(rows * rows, axis=(-2, -1))
    return held_modes(low, vectors, values, trace, rank, outside)


def held_modes(low: LowRank, U: Array, D: Array, trace: Array, rank: Rank, outside: Outside) -> LowRank:
    """`low` with all of U, D in use, whatever goes into the next update, and the count for that."""
    xp = namespace(D)
    count = xp.zeros_like(low.rank) + D.shape[-1]
    new = lowrank.with_modes(replace(low, rank=count), U, D, trace, outside)
    return replace(new, rank=rank.next(replace(new, rank=low.rank)))


def corrected(low: LowRank, M: Array, chosen: Array, rest: Array, outside: Outside) -> Asks[tuple[LowRank, Array]]:
    """Modes numbered `chosen` (blocks, m) replaced by the Ritz pairs of M in their span, those of `rest` kept, and all
    sorted again; and a code.

    |M - U diag(D) U^T|_F never grows; with all modes chosen the D is the best for the span. Cost: 2 m d^2 for m chosen,
    and 2 k^2 d + k^3 for which they are.
    """
    xp = namespace(M)
    # of modes of one eigenvalue, such as 0, rounding picked the directions: it has no say in which are chosen
    ((_, turn, _),) = yield (Ask(kernels.eigh, (equal.weighed(low.D, low.U),)),)
    held = xp.matmul(low.U, turn)
    U = _taken(held, chosen)
    kept = _taken(held, rest)
    inner = xp.matmul(U.mT, xp.matmul(M, U))
    ((values, vectors, _),) = yield (Ask(kernels.eigh, (inner,)),)
    code = choose(all_finite(inner), Code.OK, Code.INDEFINITE)
    U = xp.concat([xp.matmul(U, vectors), kept], axis=-1)
    D = xp.concat([values, _taken(low.D, rest)], axis=-1)
    order = xp.argsort(D, axis=-1)
    U = _taken(U, order)
    D = _taken(D, order)
    new = lowrank.with_modes(replace(low, rank=xp.zeros_like(low.rank) + D.shape[-1]), U, D, low.trace, outside)
    return replace(new, rank=low.rank), code


def _taken(x: Array, index: Array) -> Array:
    """x (blocks, ..., k) at `index` (blocks, m) of its last axis: each block's own, which `take` knows one by one."""
    xp = namespace(x)
    return xp.stack([xp.take(x[b, ...], index[b, ...], axis=-1) for b in range(x.shape[0])])
