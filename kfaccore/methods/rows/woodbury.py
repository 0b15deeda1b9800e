"""The damped inverse of a factor kept as rows: (Y^T D^2 Y + c I)^-1 = (I - Y^T D S D Y) / c, S = (D Y Y^T D + c I)^-1.

S is capacity x capacity and lives in float64 where the namespace has it, as does the product with I - Y^T D S D Y,
which cancels. Rows of Y itself need no difference: y_i (Y^T D^2 Y + c I)^-1 is row i of D^-1 S D Y (push-through).
Where c is next to nothing S is made on the span of D Y alone: of rows that depend on each other, as those of repeated
examples do, an inverse has no digits in their null space, and D Y has nothing there.
Of more rows than their width S would be singular but for c, and all digits lost by c / eps: the inverse itself is kept.
Source: Woodbury 1950; Tang et al. 2021 (CVPR, SKFAC), theorem 1.
Cost: capacity^2 d + capacity^3 to make; 2 m capacity d + m capacity^2 on m rows, m capacity d by push-through; with
capacity > d capacity d^2 + d^3 and m d^2.
"""

from __future__ import annotations

from dataclasses import dataclass

from kfaccore import tree
from kfaccore import xp as kernels
from kfaccore.linalg import refined
from kfaccore.methods.rows import stack as stacks
from kfaccore.methods.rows.stack import Stack
from kfaccore.xp.arrays import Array, device_of, loop, namespace, select
from kfaccore.xp.asking import Ask, Asks, alone
from kfaccore.xp.codes import Code, choose

_WELL = 1e3  # trace over c from which rows that depend on each other cost v of their span eps of its square


@dataclass(frozen=True)
class LowRank:
    """rows Y (blocks, capacity, d); scale, the diagonal of D, (blocks, capacity); small S; shift c (blocks,).

    With capacity > d `small` is the inverse itself, (blocks, d, d).
    """

    rows: Array
    scale: Array
    small: Array
    shift: Array


def identity(stack: Stack) -> LowRank:
    """The inverse before the first refresh: I."""
    xp = namespace(stack.rows)
    blocks, capacity, d = stack.rows.shape
    size = min(capacity, d)
    wide = kernels.widest(stack.rows)
    eye = xp.eye(size, dtype=wide, device=device_of(stack.rows))
    small = xp.zeros((blocks, size, size), dtype=wide, device=device_of(stack.rows)) + eye
    return LowRank(stack.rows, xp.zeros_like(stack.share), small, xp.ones_like(stack.share[:, 0]))


def inverse(stack: Stack, shift: Array) -> tuple[LowRank, Array]:
    """(A + shift I)^-1 for shift (blocks,), and a code: JITTERED where a zero shift was lifted to eps."""
    return alone(inverting(stack, shift))


def inverting(stack: Stack, shift: Array) -> Asks[tuple[LowRank, Array]]:
    """`inverse` in steps."""
    xp = namespace(stack.rows)
    shift, lifted = stacks.floored(shift, stacks.scale(stack).mean)
    scale = stacks.scales(stack)
    wide = kernels.widest(stack.rows)
    rows = xp.astype(stack.rows, wide) * xp.astype(scale, wide)[:, :, None]
    gram = kernels.gram(rows if _tall(stack.rows) else rows.mT)
    ((small, code),) = yield (Ask(kernels.spd_inverse, (kernels.shifted(gram, xp.astype(shift, wide)),)),)
    if not _tall(stack.rows):
        small = refined.on_span(small, gram, xp.astype(shift, wide))
    code = choose(lifted & (code == int(Code.OK)), Code.JITTERED, code)
    return LowRank(stack.rows, scale, small, shift), code


def times(v: Array, inverse: LowRank) -> Array:
    """v (A + c I)^-1 for any v (blocks, m, d), by a difference taken in the widest dtype; returned in it."""
    xp = namespace(v)
    exact = v.dtype == inverse.small.dtype
    v = xp.astype(v, inverse.small.dtype)
    if _tall(inverse.rows):
        return xp.matmul(v, inverse.small)
    wide = _wide(inverse)
    rows = wide.rows * wide.scale[:, :, None]
    z = xp.matmul(v, rows.mT)
    y = xp.matmul(z, wide.small)
    if exact:  # otherwise the rounding of v is more than what is lost
        lost = xp.sum(xp.sum(rows * rows, axis=-1), axis=-1) > _WELL * wide.shift
        (y,) = loop(lambda _: xp.any(lost), lambda _: (_refined(z, rows, wide),), (y,), 1)
    return (v - xp.matmul(y, rows)) / wide.shift[:, None, None]


def _refined(z: Array, rows: Array, inverse: LowRank) -> Array:
    """z S, refined by S^-1 = rows rows^T + c I; both are symmetric."""
    system = kernels.shifted(kernels.gram(rows.mT), inverse.shift)
    return refined.solved(system, inverse.small, z.mT).mT


def times_rows(v: Array, inverse: LowRank) -> Array:
    """v (A + c I)^-1 for v (blocks, m, d): by push-through in blocks where v is the newest rows of A, else as `times`.

    Whether it is, is read off the values: a gradient of another batch, or of other draws, does not match.
    """
    xp = namespace(v)
    count = v.shape[1]
    if count > inverse.rows.shape[1] or _tall(inverse.rows):
        return times(v, inverse)
    own = xp.all(v == inverse.rows[:, :count, :], axis=(-2, -1)) & xp.all(inverse.scale[:, :count] > 0, axis=-1)
    zero = xp.zeros(v.shape, dtype=inverse.small.dtype, device=device_of(v))
    # loops of at most one turn: either way is computed only where a block needs it, also under a trace
    (x,) = loop(lambda _: xp.any(own), lambda _: (_pushed(inverse, count),), (zero,), 1)
    (x,) = loop(lambda _: ~xp.all(own), lambda x: (select(own, x[0], times(v, inverse)),), (x,), 1)
    return x


def dense(inverse: LowRank) -> Array:
    """(A + c I)^-1 itself, (blocks, d, d)."""
    xp = namespace(inverse.rows)
    eye = xp.eye(inverse.rows.shape[-1], dtype=inverse.small.dtype, device=device_of(inverse.rows))
    stacked = xp.zeros((inverse.rows.shape[0], 1, 1), dtype=eye.dtype, device=device_of(eye)) + eye
    return times(stacked, inverse)


def _tall(rows: Array) -> bool:
    """Whether there are more rows than their width."""
    return rows.shape[1] > rows.shape[2]


def _pushed(inverse: LowRank, count: int) -> Array:
    """The first `count` rows of D^-1 S D Y: no difference."""
    xp = namespace(inverse.rows)
    wide = _wide(inverse)
    first = wide.scale[:, :count]
    first = xp.where(first > 0, first, xp.ones_like(first))
    return xp.matmul(wide.small[:, :count, :] * wide.scale[:, None, :] / first[:, :, None], wide.rows)


def _wide(inverse: LowRank) -> LowRank:
    """The inverse with all its parts in the dtype of S."""
    return tree.map(lambda x: namespace(x).astype(x, inverse.small.dtype), inverse)
