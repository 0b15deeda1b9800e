"""SINGD: (G + ..)^-1 (x) (A + ..)^-1 ~ C C^T (x) K K^T, grown by matrix products alone, so x = C C^T V K K^T.

With H_K = K^T A K, H_C = C^T G C (A and G as in K-FAC, never formed), everything from the OLD K and C:
    m_K <- momentum m_K + w [ c_K H_K + e_K K^T K - I ],    K <- K (I - rate m_K),    C likewise.
INGD couples the sides, c_K = tr(H_C) / d_out and e_K = damping |C|_F^2 / d_out (c_C, e_C with d_in); IKFAC does not:
c = 1, e = damping as published (independent) or its root (rooted). K and C live in a structure, where m holds Pi of the
bracket. w is 1/2, and (1 - momentum) / 2 with a limited step:
    INGD      SINGD(), the default
    SINGD     SINGD(inputs=Diagonal(), outputs=Hierarchical()), with the structures, not the methods, of these names:
                  from kfaccore.methods.singd.blocks import BlockDiagonal, Dense, Diagonal
                  from kfaccore.methods.singd.triangular import Hierarchical, upper, lower, upper_last, lower_last
                  from kfaccore.methods.singd.toeplitz import LowerToeplitz, UpperToeplitz
    IKFAC     IKFAC(): no momentum, so no m is kept, and coupling=rooted
The recursion is the average (`decay` is not used) and `damping` is baked at `update`. There is no F~: only inverses.

Exact at the fixed point: IKFAC's is K K^T = (A + e I)^-1 and C C^T = (G + e I)^-1, INGD's the inverse of the Kronecker
matrix closest to G (x) A + damping I in KL, so exact for one input and one output.
Source: Lin et al. 2024 (2312.05705); Lin et al. 2023 (2302.09738) for INGD.
Cost: dense rows (d_in^2 + d_out^2) + d_in^3 + d_out^3 an update, memory 2 (d_in^2 + d_out^2), less without momentum;
structures hold and make k d, diagonal and Toeplitz d. No inverse or decomposition anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from kfaccore import factors, tree
from kfaccore.linalg import kron
from kfaccore.method import Additive, Block, Hyper
from kfaccore.methods.singd import recursion, structured
from kfaccore.methods.singd.blocks import Dense, Diagonal
from kfaccore.methods.singd.recursion import Rule, coupled, rooted
from kfaccore.methods.singd.structured import Parts, Structure
from kfaccore.options import function, instance
from kfaccore.record import Factored, Ids, Record
from kfaccore.record.chunks import input_chunks
from kfaccore.record.sharing import expand
from kfaccore.solution import Solution, finish_later, gradient
from kfaccore.xp import Code, at_once, choose, spans
from kfaccore.xp.arrays import Array, all_finite, namespace, place, scalar, select
from kfaccore.xp.owned import instead

Coupling = Callable[[Array, Array, float | Array], tuple[Array, Array]]

_DENSE = Dense()
_RULE = Rule()
_ALONE = Rule(momentum=0.0)
_STRUCTURE = (
    "a structure: Dense(), Diagonal() or BlockDiagonal(k) of kfaccore.methods.singd.blocks, Hierarchical(k1, k2), "
    "upper(k), lower(k), upper_last(k) or lower_last(k) of kfaccore.methods.singd.triangular, UpperToeplitz() or "
    "LowerToeplitz() of kfaccore.methods.singd.toeplitz"
)
_CHUNK = 1 << 20  # entries of rows times K held at once


@dataclass(frozen=True)
class State:
    """K, C and their momenta as parts of the structures (inputs, outputs) of `sides`; no m (an empty dict) without
    momentum; how many `moves` were made (blocks,), code (blocks,)."""

    K: Parts
    C: Parts
    m_K: Parts
    m_C: Parts
    moves: Array
    code: Array
    sides: tuple[Structure, Structure] = tree.static()


@dataclass(frozen=True)
class Stats:
    """Sums of Pi(K^T a a^T K) over `rows` rows and of Pi(C^T g g^T C), its normaliser n; `bad` as everywhere."""

    H_K: Parts
    rows: Array
    H_C: Parts
    n: Array
    bad: Array


@dataclass(frozen=True)
class SINGD(Additive):
    """x = C C^T V K K^T with roots K (d_in, d_in) and C (d_out, d_out) of the inverses, moved by products alone.

    m <- momentum m + w [c H_K + e K^T K - I], K <- K (I - rate m), H_K = K^T A K; C likewise. V and x (blocks, d_out,
    d_in). No inverse, no F~: `matvec` refuses. Exact at its fixed point. Lin et al. 2024, arxiv.org/abs/2312.05705.

    sharing            expand | reduce
    inputs, outputs    structures of K and C; of a diagonal side, such as an embedding's, diagonal whatever is asked
    coupling           coupled (INGD) | independent, rooted (IKFAC)
    rule               Rule(momentum, rate, warm, limit, storage)
    cycles             updates on one record that `settle` makes
    """

    sharing: Callable[[Record], Record] = expand
    inputs: Structure = _DENSE
    outputs: Structure = _DENSE
    coupling: Coupling = coupled
    rule: Rule = _RULE
    cycles: int = 1
    restless: ClassVar[bool] = True  # every update multiplies the roots once more

    def __post_init__(self) -> None:
        function(self, "sharing", "expand or reduce")
        instance(self, "inputs", Structure, _STRUCTURE)
        instance(self, "outputs", Structure, _STRUCTURE)
        function(self, "coupling", "coupled, independent or rooted of kfaccore.methods.singd.recursion")
        instance(self, "rule", Rule, "Rule(...) of kfaccore.methods.singd.recursion")

    @property
    def linear_sides(self) -> bool:
        """Unless a side is dense."""
        return not any(isinstance(structure, Dense) for structure in (self.inputs, self.outputs))

    def init(self, block: Block, like: Array) -> State:
        sides = (
            Diagonal() if block.diagonal_in else self.inputs,
            Diagonal() if block.diagonal_out else self.outputs,
        )
        K = sides[0].eye(block.blocks, block.d_in, like)
        C = sides[1].eye(block.blocks, block.d_out, like)
        code = factors.unrefreshed(block, like)
        return State(
            K=tree.map(self.rule.storage.main, K),
            C=tree.map(self.rule.storage.main, C),
            m_K=self._no_momentum(K),
            m_C=self._no_momentum(C),
            moves=namespace(like).astype(0 * code, place(like)["dtype"]),
            code=code,
            sides=sides,
        )

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        record = self.sharing(record)
        inputs, outputs = state.sides
        if isinstance(record.a, Ids):
            counts = factors.gram_of_inputs(record)  # the diagonal of A's sum; K is diagonal, so K^T A K = A o K^2
            H_K = structured.scaled(1.0, {"C": counts * inputs.inner(state.K)["C"]})
        else:
            H_K = self._summed(inputs, state.K, _input_rows(record))
        if record.draws == 0:
            identity = recursion.wide(outputs.inner(state.C), record.g)
            H_C = structured.scaled(scalar(record.n, record.g), identity)
        else:
            H_C = self._summed(outputs, state.C, _output_rows(record))
        rows = factors.valid_rows(record)
        n = factors.per_block(record.n, rows)
        xp = namespace(rows)
        finite = xp.isfinite(inputs.trace(H_K) / factors.positive(rows))
        finite = finite & xp.isfinite(outputs.trace(H_C) / factors.positive(n))
        return Stats(H_K, rows, H_C, n, xp.astype(~finite, rows.dtype))

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        xp = namespace(stats.bad)
        ok = factors.counts(stats.bad == 0, stats.rows, stats.n)
        inputs, outputs = state.sides
        H_K = structured.scaled(1 / factors.positive(stats.rows), stats.H_K)
        H_C = structured.scaled(1 / factors.positive(stats.n), stats.H_C)
        from_C = self._scales(outputs, state.C, H_C, hyper.damping)
        from_K = self._scales(inputs, state.K, H_K, hyper.damping)
        K, m_K = self.rule.moved(inputs, state.K, state.m_K, H_K, from_C, state.moves)
        C, m_C = self.rule.moved(outputs, state.C, state.m_C, H_C, from_K, state.moves)
        old = (state.K, state.C, state.m_K, state.m_C)
        new = (K, C, m_K, m_C)
        finite = ok
        for x in tree.leaves(new):
            finite = finite & all_finite(x)
        kept = choose(state.code == int(Code.IDENTITY), Code.IDENTITY, Code.PREVIOUS)
        code = xp.where(ok, choose(finite, Code.OK, kept), state.code)
        K, C, m_K, m_C = tree.map(lambda n, o: select(finite, n, o), new, old)
        return State(K, C, m_K, m_C, xp.where(finite, state.moves + 1, state.moves), code, state.sides)

    def refresh(self, state: State, hyper: Hyper) -> State:
        return state

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        inputs, outputs = state.sides
        shape = (state.code.shape[0], outputs.size(state.C), inputs.size(state.K))
        grad, squeeze = gradient(grad, shape)
        direction = kron.sandwich(
            lambda g: recursion.both(outputs, self.rule.storage, state.C, g),
            grad,
            lambda a: recursion.both(inputs, self.rule.storage, state.K, a),
        )
        if not isinstance(grad, Factored):
            direction = instead(state.code == int(Code.IDENTITY), grad, direction)
        return finish_later(direction, state.code, state, squeeze)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        raise ValueError("SINGD keeps inverses only: it has no F~ to multiply by; compare directions instead")

    def _no_momentum(self, K: Parts) -> Parts:
        """m before the first move; none is kept without momentum."""
        if not self.rule.momentum:
            return {}
        return tree.map(self.rule.storage.momentum, structured.scaled(0.0, K))

    def _summed(self, side: Structure, K: Parts, rows: Iterator[Array]) -> Parts:
        """Pi(K^T x^T x K) summed over chunks of rows x."""
        total = recursion.inner(side, self.rule.storage, K, next(rows))
        for x in rows:
            total = tree.add(total, recursion.inner(side, self.rule.storage, K, x))
        return total

    def _scales(self, side: Structure, K: Parts, H: Parts, damping: float | Array) -> tuple[Array, Array]:
        """What one side gives the other: (c, e)."""
        d = side.size(K)
        square = side.square(recursion.wide(K, recursion.any_part(H)))
        return self.coupling(side.trace(H) / d, square / d, damping)


@dataclass(frozen=True)
class IKFAC(SINGD):
    """SINGD whose sides do not see each other, without momentum: K-FAC's averages to first order in the rate."""

    coupling: Coupling = rooted
    rule: Rule = _ALONE


def _input_rows(record: Record) -> Iterator[Array]:
    chunk = at_once(record.shared * record.d_in * record.blocks, _CHUNK)
    for _, a in input_chunks(record, chunk):
        yield namespace(a).reshape(a, (record.blocks, -1, record.d_in))


def _output_rows(record: Record) -> Iterator[Array]:
    chunk = at_once(record.shared * record.d_out * record.blocks, _CHUNK)
    for draw in range(record.draws):
        for span in spans(record.batch, chunk):
            g = record.g[draw, :, span, :, :]
            yield namespace(g).reshape(g, (record.blocks, -1, record.d_out))
