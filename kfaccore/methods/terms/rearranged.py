"""Power iteration on the rearranged block Z, in which G (x) A is vec(G) vec(A)^T, from records.

Z vec(V) = (1/n) sum J V J^T and Z^T vec(U) = (1/n) sum J^T U J over the per-example gradients J, summed over shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Protocol

from kfaccore import factors, tree
from kfaccore import xp as kernels
from kfaccore.linalg import side
from kfaccore.methods.terms.sandwich import products
from kfaccore.record import Record
from kfaccore.record.chunks import input_chunks
from kfaccore.xp.arrays import Array, device_of, eps, kept, namespace, scalar, select

if TYPE_CHECKING:
    from kfaccore.method import Block, Hyper

_ROUNDING = 64.0  # eps of the first term: sums over rows in another order differ by less


class FirstTerm(factors.Averages, Protocol):
    """A state with averages of Q in A, of P in G and of s in `core` (blocks,), times their `weight`."""

    @property
    def core(self) -> Array: ...


@dataclass(frozen=True)
class Sweep:
    """Sums of J V J^T (G) and J^T U J (A) for matrices V, U."""

    G: Array
    A: Array


@dataclass(frozen=True)
class Pair:
    """A second term G (x) V: averages G of R vec(V) and A of R^T vec(U), R the rearranged residual of the first term,
    and the unit matrices V (blocks, d_in, d_in), U (blocks, d_out, d_out) of the last update."""

    G: Array
    A: Array
    U: Array
    V: Array


def refuse(name: str, block: Block) -> None:
    """ValueError for a diagonal side, such as an embedding's: these factors are dense."""
    why = side.dense_only(name, block)
    if why:
        raise ValueError(why)


def sweep(record: Record, U: Array, V: Array, positive: bool = False) -> Sweep:
    """One pass over the record; `positive` promises positive semidefinite U and V."""
    return sweeps(record, (U, V, positive))[0]


def sweeps(record: Record, *matrices: tuple[Array, Array, bool]) -> list[Sweep]:
    """As `sweep` for each (U, V, positive), in one pass: rows are unfolded and J is made once for all."""
    factors.needs_draws(record)
    parts = []
    for start, a in input_chunks(record):
        a = a[None, ...]  # inputs have one "draw"
        g = record.g[:, :, start : start + a.shape[2], ...]
        outputs, inputs = products(a, g)
        parts.append([Sweep(outputs(V, positive), inputs(U, positive)) for U, V, positive in matrices])
    return [reduce(tree.add, of) for of in zip(*parts, strict=True)]


def bad(sums: Sweep, n: Array) -> Array:
    """1 for each block with a sum that is not finite over n, (blocks,)."""
    return factors.not_finite(sums.A, n, sums.G, n)


def inner(x: Array, y: Array) -> Array:
    """Frobenius inner product, (blocks,) or with the leading axes there are."""
    xp = namespace(x)
    flat = (*x.shape[:-2], -1)
    return xp.vecdot(xp.reshape(x, flat), xp.reshape(y, flat))


def norm(x: Array) -> Array:
    """Frobenius norm, (blocks,); of entries over their largest, as squares leave the range of float32."""
    xp = namespace(x)
    top = xp.max(xp.abs(x), axis=(-2, -1))
    scale = xp.where((top > 0) & (top < float("inf")), top, xp.ones_like(top))
    x = x / scale[:, None, None]
    return scale * xp.sqrt(inner(x, x))


def unit(x: Array, otherwise: Array) -> Array:
    """x over its Frobenius norm, `otherwise` where it is zero."""
    xp = namespace(x)
    size = norm(x)
    usable = size > 0
    return select(usable, x / xp.where(usable, size, xp.ones_like(size))[:, None, None], otherwise)


def generic(like: Array) -> Array:
    """A fixed symmetric unit matrix without structure: cos(i j) for i, j = 1, 2, ..."""
    xp = namespace(like)
    i = xp.arange(1, like.shape[-1] + 1, dtype=like.dtype, device=device_of(like))
    x = xp.zeros_like(like) + xp.cos(i[:, None] * i[None, :])
    return unit(x, x)


def positive(A: Array, G: Array) -> tuple[Array, Array]:
    """(U, V) of the next sweep of a first term: its averages, of trace 1; at first the identity over its size."""
    return _traced(G), _traced(A)


def averaged(state: FirstTerm, sums: Sweep, n: Array, ok: Array, hyper: Hyper, donate: bool) -> dict[str, Array]:
    """A, G, core and weight of a first term one sweep on; core averages <U, Z vec(V)> = <V, Z^T vec(U)>."""
    core = inner(_traced(state.G), sums.G)
    decay = scalar(hyper.decay, core)
    core = namespace(core).where(ok, decay * state.core + (1 - decay) * core / factors.positive(n), state.core)
    A, weight = factors.moved(state.A, state.weight, sums.A, n, ok, hyper, donate)
    G, _ = factors.moved(state.G, state.weight, sums.G, n, ok, hyper, donate)
    return {"A": A, "G": G, "core": core, "weight": weight}


def balanced(state: FirstTerm) -> tuple[Array, Array]:
    """(A, G) of the first term: G (x) A interpolates Z at the last U and V; half the scale in each."""
    A, G = factors.means(state)
    core = factors.mean(state.core, state.weight)
    xp = namespace(core)
    root = xp.sqrt(xp.where(core > 0, core, xp.ones_like(core)))
    return factors.mean(A, root), factors.mean(G, root)


def start(A: Array, G: Array) -> Pair:
    """No second term yet, and matrices to start from."""
    xp = namespace(A)
    return Pair(xp.zeros_like(G), xp.zeros_like(A), generic(G), generic(A))


def ahead(pair: Pair) -> tuple[Array, Array]:
    """(U, V) of the next sweep, with the signs of the last ones: averages over sweeps must not cancel."""
    return _onward(pair.G, pair.U), _onward(pair.A, pair.V)


def _onward(x: Array, old: Array) -> Array:
    """x over its norm, pointing as `old` does."""
    xp = namespace(x)
    x = unit(x, old)
    return xp.where(inner(x, old)[:, None, None] < 0, -x, x)


def moved(pair: Pair, sums: Sweep, n: Array, first: tuple[Array, Array], ok: Array, hyper: Hyper) -> Pair:
    """The pair one sweep on: its averages move towards the sums over n less the first term (A, G)."""
    A, G = first
    U, V = ahead(pair)
    n = factors.positive(n)[:, None, None]
    size = norm(A) * norm(G)  # of the first term, and so of what rounding leaves of the difference
    rest_g = _beyond_rounding(sums.G / n - G * inner(A, V)[:, None, None], size)
    rest_a = _beyond_rounding(sums.A / n - A * inner(G, U)[:, None, None], size)
    decay = scalar(hyper.decay, G)
    return Pair(
        G=kernels.average(pair.G, rest_g, decay, 1 - decay, ok),
        A=kernels.average(pair.A, rest_a, decay, 1 - decay, ok),
        U=select(ok, U, pair.U),
        V=select(ok, V, pair.V),
    )


def _beyond_rounding(rest: Array, size: Array) -> Array:
    """What is left of matrices of this `size` (blocks,) once one was subtracted; zero where that is rounding, which
    `unit` would make a whole direction of."""
    rounding = _ROUNDING * eps(rest.dtype, namespace(rest)) * size
    return kept(rest, namespace(rest).logical_not(norm(rest) <= rounding), 0.0)


def second(pair: Pair, weight: Array) -> tuple[Array, Array]:
    """(A, G) of the second term: for its V no other G is nearer."""
    return pair.V, factors.mean(pair.G, weight)


def _traced(x: Array) -> Array:
    """A positive semidefinite matrix over its trace; the identity over its size where that cannot be divided by."""
    xp = namespace(x)
    trace = xp.sum(side.diagonal(x), axis=-1)
    usable = trace >= float(xp.finfo(x.dtype).smallest_normal)
    size = x.shape[-1]
    eye = xp.broadcast_to(xp.eye(size, dtype=x.dtype, device=device_of(x)), x.shape)
    scale = 1.0 / xp.where(usable, trace, xp.full_like(trace, float(size)))
    return select(usable, x, eye) * scale[:, None, None]
