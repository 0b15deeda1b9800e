"""Factors A and G, each alone as stacked rows or as a matrix: rows where they are fewer than its dimension.

A = mean over rows of a a^T, G = (1/n) sum of g g^T after the method's sharing, as moving averages: exact for a matrix,
exact for the rows that still fit for a stack.
Source: Tang et al. 2021 (CVPR, SKFAC): the branch rows < d, taken for A and G separately.
Cost: memory min(capacity, d) d a side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kfaccore import factors
from kfaccore import xp as kernels
from kfaccore.linalg import side
from kfaccore.method import Block, Hyper
from kfaccore.methods.rows import stack as stacks
from kfaccore.methods.rows.stack import Stack
from kfaccore.record import Record
from kfaccore.xp.arrays import Array, all_finite, namespace, place, scalar

Factor = Array | Stack
Branch = Callable[[int, int], bool]

_MIXED = "a side came as rows and as a matrix: Stats and State must be of one method and one Block"


def fewer_rows(rows: int, d: int) -> bool:
    """Rows where they are cheaper to keep and to invert than the matrix."""
    return rows < d


def always(rows: int, d: int) -> bool:
    """Rows whatever their number."""
    return True


def never(rows: int, d: int) -> bool:
    """Whatever their number, not."""
    return False


def cheaper_dense(rows: int, d: int) -> bool:
    """Where one product with a d x d inverse is less than 2 with the rows and one with their small system."""
    return 2 * rows * d + rows * rows > d * d


@dataclass(frozen=True)
class Factors:
    """A and G, each a Stack (debiased by itself), or a matrix or a diagonal times `weight` (blocks,)."""

    A: Factor
    G: Factor
    weight: Array


@dataclass(frozen=True)
class Rows:
    """Rows of a record that wait to be stacked, (blocks, count, d): Stats of a side that is a Stack."""

    values: Array


@dataclass(frozen=True)
class Stats:
    """Sums (matrices) or rows of one record, their denominators, and how many records were not finite."""

    A: Array | Rows
    rows: Array
    G: Array | Rows
    n: Array
    bad: Array


def init(block: Block, like: Array, capacity: int, branch: Branch) -> Factors:
    """Zero averages; `Block.rows` wins over `capacity`."""
    capacity = block.rows or capacity

    def one(d: int, diagonal: bool) -> Factor:
        if not diagonal and branch(capacity, d):
            return stacks.empty(block.blocks, capacity, d, like)
        return side.zeros(block.blocks, d, diagonal, like)

    weight = namespace(like).zeros((block.blocks,), **place(like))
    return Factors(one(block.d_in, block.diagonal_in), one(block.d_out, block.diagonal_out), weight)


def measure(state: Factors, record: Record) -> Stats:
    """Stats of a record to which the method's sharing was applied; ValueError for zero draws where G is a Stack."""
    xp = namespace(record.g)
    if isinstance(state.A, Stack):
        A = Rows(inputs(record))
    else:
        A = factors.gram_of_inputs(record, side.is_diagonal(state.A))
    if isinstance(state.G, Stack) and record.draws == 0:
        raise ValueError("a record of zero draws (forward only) has G = I, which rows cannot hold: give gradients")
    if isinstance(state.G, Stack):
        G = Rows(gradients(record))
    else:
        G = factors.gram_of_gradients(record, side.is_diagonal(state.G))
    rows = factors.valid_rows(record)
    n = factors.per_block(record.n, rows)
    finite = _finite(A, rows) & _finite(G, n)
    return Stats(A, rows, G, n, xp.astype(~finite, record.g.dtype))


def combine(first: Stats, second: Stats) -> Stats:
    """Rows one after the other, sums added."""
    return Stats(
        A=_join(first.A, second.A),
        rows=first.rows + second.rows,
        G=_join(first.G, second.G),
        n=first.n + second.n,
        bad=first.bad + second.bad,
    )


def update(state: Factors, stats: Stats, hyper: Hyper, rank: int = 0, donate: bool = False) -> Factors:
    """Averages moved towards the Stats, untouched where these are not usable."""
    xp = namespace(state.weight)
    ok = factors.counts(stats.bad == 0, stats.rows, stats.n)
    decay = scalar(hyper.decay, state.weight)

    def moved(old: Factor, new: Array | Rows, count: Array) -> Factor:
        if isinstance(old, Stack) and isinstance(new, Rows):
            return stacks.push(old, new.values, (1 - decay) / count, decay, ok, rank)
        if isinstance(old, Stack) or isinstance(new, Rows):
            raise TypeError(_MIXED)
        return kernels.average(old, new, decay, (1 - decay) / count, ok, donate)

    weight = xp.where(ok, decay * state.weight + (1 - decay), state.weight)
    return Factors(
        moved(state.A, stats.A, factors.positive(stats.rows)),
        moved(state.G, stats.G, factors.positive(stats.n)),
        weight,
    )


def debiased(state: Factors) -> tuple[Factor, Factor]:
    """A and G: a Stack as it is, a matrix divided by its weight."""
    return _mean(state.A, state.weight), _mean(state.G, state.weight)


def filled(state: Factors) -> tuple[Factor, Factor]:
    """`debiased` for products: a Stack without its empty slots."""
    A, G = (stacks.filled(x) if isinstance(x, Stack) else x for x in debiased(state))
    return A, G


def size(factor: Factor) -> int:
    """d."""
    return (factor.rows if isinstance(factor, Stack) else factor).shape[-1]


def times(v: Array, factor: Factor) -> Array:
    """v A for v (blocks, m, d)."""
    return stacks.times(v, factor) if isinstance(factor, Stack) else side.times(v, factor)


def diagonal(factor: Factor) -> Array:
    """Diagonal (blocks, d)."""
    return stacks.diagonal(factor) if isinstance(factor, Stack) else side.diagonal(factor)


def scale(factor: Factor) -> side.Scale:
    """Mean and largest eigenvalue."""
    return stacks.scale(factor) if isinstance(factor, Stack) else side.Scale.of_factor(factor)


def product(G: Factor, v: Array, A: Factor, through_batch: bool | None = None) -> Array:
    """G v A, associated by cost.

    Both sides rows: through the batch, g^T ((g v a^T) a), in rows_a rows_g (d_in + d_out) + P (rows_a + rows_g)
    multiplications, or through the factors in 2 P (rows_a + rows_g), P = d_in d_out. through_batch=False forbids the
    former, whose middle is rows_g x rows_a: right for the unfolded rows of a convolution.
    """
    if not (isinstance(G, Stack) and isinstance(A, Stack)):
        return times(times(v, A).mT, G).mT
    _, rows_a, d_in = A.rows.shape
    _, rows_g, d_out = G.rows.shape
    cheaper = rows_a * rows_g * (d_in + d_out) < d_in * d_out * (rows_a + rows_g)
    if not (cheaper if through_batch is None else through_batch):
        return times(times(v, A).mT, G).mT
    xp = namespace(v)
    weights = (stacks.scales(G) ** 2)[:, :, None] * (stacks.scales(A) ** 2)[:, None, :]
    middle = xp.matmul(G.rows, xp.matmul(v, A.rows.mT)) * weights
    return xp.matmul(G.rows.mT, xp.matmul(middle, A.rows))


def inputs(record: Record) -> Array:
    """a as rows (blocks, batch shared, d_in)."""
    return namespace(record.g).reshape(record.rows(), (record.blocks, -1, record.d_in))


def gradients(record: Record) -> Array:
    """g as rows (blocks, batch draws shared, d_out), examples first, so that halves concatenate."""
    xp = namespace(record.g)
    return xp.reshape(xp.permute_dims(record.g, (1, 2, 0, 3, 4)), (record.blocks, -1, record.d_out))


def _mean(factor: Factor, weight: Array) -> Factor:
    return factor if isinstance(factor, Stack) else factors.mean(factor, weight)


def _finite(x: Array | Rows, count: Array) -> Array:
    """Whether a side's mean over `count` is finite; a bad row shows on a gram's diagonal."""
    per = 1 / factors.positive(count)
    if isinstance(x, Rows):
        return all_finite(x.values) & namespace(per).isfinite(per)
    return all_finite(side.diagonal(x) * per[:, None])


def _join(x: Array | Rows, y: Array | Rows) -> Array | Rows:
    if isinstance(x, Rows) and isinstance(y, Rows):
        return Rows(namespace(x.values).concat([x.values, y.values], axis=1))
    if isinstance(x, Rows) or isinstance(y, Rows):
        raise TypeError(_MIXED)
    return x + y
