"""Lanczos: F ~ G1 (x) A1 + G2 (x) A2 from the truncated singular decomposition of each update's rearranged block Z.

Golub-Kahan bidiagonalisation with full reorthogonalisation and thick restarts on the gathered rows of an update, begun
at the last right matrices: Z vec(V) = (1/n) sum J V J^T, Z^T vec(U) = (1/n) sum J^T U J. Each factor sqrt(s) U,
sqrt(s) V is averaged on its own, with the sign that agrees with its average; so the average is not that of F. The
damping is split over the first pair (a third term otherwise).

Exact when F is a sum of two Kronecker products of symmetric matrices; without memory no two such terms are nearer (a
second pair of antisymmetric matrices, which may be, is not looked for). The second pair is indefinite, and so may the
sum be: `indefinite` says what then, code INDEFINITE.
Source: Koroko et al. 2022 (2201.10285); Golub & Kahan 1965.
Cost: update 4 krylov rows (d_in^2 + d_out^2) a cycle at shared 1; refresh four eigendecompositions; four products a
solve; memory (krylov + 2) (d_in^2 + d_out^2) and the rows, patches unfolded, of one update.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kfaccore import factors
from kfaccore import xp as kernels
from kfaccore.damping import Split, pi
from kfaccore.linalg import side
from kfaccore.method import Block, Hyper
from kfaccore.methods.terms import rearranged, two_terms
from kfaccore.methods.terms.bidiagonal import leading
from kfaccore.methods.terms.sandwich import products
from kfaccore.methods.terms.two_terms import Term, TwoTerms
from kfaccore.record import Factored, Record
from kfaccore.solution import Solution
from kfaccore.xp import Code, choose
from kfaccore.xp.arrays import Array, all_finite, eps, namespace, scalar
from kfaccore.xp.asking import Asks
from kfaccore.xp.ranges import AT_LEAST_0, COUNT, ranged


@dataclass(frozen=True)
class State:
    """Averages A (blocks, 2, d_in, d_in), G (blocks, 2, d_out, d_out) times `weight` (blocks,); the last update's
    relative `residual` and products taken, `matvecs`, (blocks,) each; the whitened sum of the last refresh; code."""

    A: Array
    G: Array
    weight: Array
    residual: Array
    matvecs: Array
    whitened: two_terms.Whitened
    code: Array


@dataclass(frozen=True)
class Stats:
    """Rows a (blocks, batch, shared, d_in), g (draws, blocks, batch, shared, d_out), their n, how many exist, and
    non-finite records."""

    DRAWS_FIRST: ClassVar = ("g",)
    a: Array
    g: Array
    n: Array
    rows: Array
    bad: Array


@dataclass(frozen=True)
class Lanczos(TwoTerms[State]):
    """x solves (G1 (x) A1 + G2 (x) A2) vec(x) = vec(V), the two nearest terms of each update's F by Golub-Kahan.

    V and x (blocks, d_out, d_in). Rows of micro-batches are gathered, not added. Exact when F is a sum of two Kronecker
    products of symmetric matrices. Code INDEFINITE where the sum is not positive definite.
    Koroko et al. 2022, arxiv.org/abs/2201.10285.

    krylov       new vectors a cycle, of which there are at most `restarts`; a residual then over `tolerance` (relative
                 to the largest singular value) is UNCONVERGED
    split        pi | equal | per_factor | Relative(...): damping of the first term
    indefinite   absolute | first_term: what stands for the denominators of a sum that is not positive definite
    """

    krylov: int = 8
    restarts: int = 50
    tolerance: float = 1e-10
    split: Split = pi
    indefinite: two_terms.Denominators = two_terms.absolute
    cycles: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        ranged(self, krylov=COUNT, restarts=COUNT, tolerance=AT_LEAST_0)
        if self.krylov < 8:
            raise ValueError(f"krylov is {self.krylov}; need at least 8, or the second pair is lost")

    def init(self, block: Block, like: Array) -> State:
        rearranged.refuse("Lanczos", block)
        xp = namespace(like)
        fields = factors.init(block, like)
        return State(
            A=xp.stack([fields["A"]] * 2, axis=1),
            G=xp.stack([fields["G"]] * 2, axis=1),
            weight=fields["weight"],
            residual=xp.zeros_like(fields["weight"]),
            matvecs=xp.zeros_like(fields["code"]),
            whitened=two_terms.init(fields["A"], fields["G"]),
            code=fields["code"],
        )

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        xp = namespace(record.g)
        factors.needs_draws(record)
        a = record.rows()
        finite = all_finite(a) & xp.all(all_finite(record.g, axes=2), axis=0)
        n = factors.per_block(record.n, xp.astype(finite, a.dtype))
        bad = xp.astype(~(finite & xp.isfinite(n)), a.dtype)
        return Stats(a, record.g, n, factors.valid_rows(record), bad)

    def combine(self, first: Stats, second: Stats) -> Stats:
        xp = namespace(first.a)
        a = xp.concat([first.a, second.a], axis=1)
        g = xp.concat([first.g, second.g], axis=2)
        return Stats(a, g, first.n + second.n, first.rows + second.rows, first.bad + second.bad)

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        xp = namespace(state.A)
        ok = factors.counts(stats.bad == 0, stats.rows, stats.n)
        A, G, residual, matvecs = self._triples(state, stats)
        decay = scalar(hyper.decay, state.weight)
        return replace(
            state,
            A=kernels.average(state.A, A, decay, 1 - decay, ok, donate),
            G=kernels.average(state.G, G, decay, 1 - decay, ok, donate),
            weight=xp.where(ok, decay * state.weight + (1 - decay), state.weight),
            residual=xp.where(ok, residual, state.residual),
            matvecs=xp.where(ok, matvecs, state.matvecs),
        )

    def refreshing(self, state: State, hyper: Hyper) -> Asks[State]:
        state = yield from super().refreshing(state, hyper)
        loose = state.residual > self._tolerance(state.residual)
        return replace(state, code=choose(loose & (state.code == int(Code.OK)), Code.UNCONVERGED, state.code))

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        solution = super().solve(state, grad, hyper, record)
        return replace(solution, info={**solution.info, "matvecs": state.matvecs})

    def pairs(self, state: State) -> tuple[Term, Term]:
        A, G = factors.means(state)
        return (A[:, 0, ...], G[:, 0, ...]), (A[:, 1, ...], G[:, 1, ...])

    def _triples(self, state: State, stats: Stats) -> tuple[Array, Array, Array, Array]:
        """(A, G) of the rows, signs as in the averages, residual and products taken."""
        xp = namespace(stats.a)
        blocks = state.A.shape[0]
        d_in = state.A.shape[-1]
        d_out = state.G.shape[-1]
        # rows of about 1: fourth powers of them are taken, which leave float32 long before the rows themselves
        unit_a, size_a = _scaled(stats.a[None, ...])  # inputs have one "draw"
        unit_g, size_g = _scaled(stats.g)
        n = factors.positive(stats.n)[:, None]
        outputs, inputs = products(unit_a, unit_g)

        def times(v: Array) -> Array:
            v = xp.reshape(v, (blocks, d_in, d_in))
            return xp.reshape(outputs(v), (blocks, -1)) / n

        def transposed(u: Array) -> Array:
            u = xp.reshape(u, (blocks, d_out, d_out))
            return xp.reshape(inputs(u), (blocks, -1)) / n

        A = state.A[:, 0, ...]
        right = side.identity(A) / float(d_in) ** 0.5 + rearranged.generic(A)
        for k in range(2):
            right = right + rearranged.unit(state.A[:, k, ...], xp.zeros_like(A))
        start = xp.reshape(state.G[:, 0, ...], (blocks, -1)), xp.reshape(right, (blocks, -1))
        found = leading(times, transposed, start, 2, self.krylov, self.tolerance, self.restarts)
        root = xp.sqrt(found.values)[:, :, None]
        root = root * (size_a * size_g)[:, None, None]
        A = xp.reshape(found.right * root, (blocks, 2, d_in, d_in))
        G = xp.reshape(found.left * root, (blocks, 2, d_out, d_out))
        agree = rearranged.inner(A, state.A) + rearranged.inner(G, state.G)
        definite = xp.sum(xp.linalg.diagonal(A), axis=-1)
        sign = xp.where(xp.where(agree == 0, definite, agree) < 0, -xp.ones_like(agree), xp.ones_like(agree))
        sign = sign[:, :, None, None]
        return sign * (A + A.mT) / 2, sign * (G + G.mT) / 2, found.residual, found.matvecs

    def _tolerance(self, like: Array) -> float:
        return max(self.tolerance, 100.0 * eps(like.dtype, namespace(like)))


def _scaled(rows: Array) -> tuple[Array, Array]:
    """Rows (draws, blocks, batch, shared, d) over a power of two near their largest entry, and that power (blocks,)."""
    xp = namespace(rows)
    top = xp.max(xp.abs(rows), axis=(0, 2, 3, 4))
    size = 2.0 ** xp.floor(xp.log2(xp.where((top > 0) & xp.isfinite(top), top, xp.ones_like(top))))
    return rows / size[:, None, None, None], size
