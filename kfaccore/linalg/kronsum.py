"""Solving with a sum of Kronecker products, G_1 (x) A_1 + G_2 (x) A_2 + ..., all symmetric positive definite.

Two terms exactly: K_g whitens G_1 and diagonalises G_2, K_a the same for the A side,

    X -> K_g [ (K_g^T X K_a) / (1 + s_g s_a^T) ] K_a^T

More terms: conjugate gradients with that pair of the first term and the sum of the others as preconditioner.
Source: Martens & Grosse 2015 (1503.05671), appendix I. Cost: four eigendecompositions a pair, four products a solve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kfaccore import xp as kernels
from kfaccore.linalg import kron, side
from kfaccore.record import Factored
from kfaccore.xp.arrays import Array, eps, namespace, select
from kfaccore.xp.asking import Ask, Asks, alone
from kfaccore.xp.codes import Code, choose

Carry = tuple[Array, Array, Array, Array, Array]  # x, residual r, search p, <r, z> (blocks,), iterations ()


@dataclass(frozen=True)
class Pair:
    """Kg (blocks, d_out, d_out), Ka (blocks, d_in, d_in) as columns, denominators below (blocks, d_out, d_in)."""

    Kg: Array
    Ka: Array
    below: Array


def identity(G: Array, A: Array) -> Pair:
    """The pair that leaves X alone, shaped for factors like G and A."""
    ones_g = namespace(G).ones_like(side.diagonal(G))
    ones_a = namespace(A).ones_like(side.diagonal(A))
    return Pair(side.identity(G), side.identity(A), ones_g[:, :, None] * ones_a[:, None, :])


def whiten(P: Array, U: Array) -> tuple[Array, Array, Array]:
    """(K, s, code) with K^T P K = I and K^T U K = diag(s), s >= 0; P positive definite, U positive semidefinite.

    Eigenvalues of P under eps times its largest are lifted there: JITTERED.
    """
    values, vectors, code = kernels.eigh(P)
    K, s, code = whitened(values, vectors, code, U)
    xp = namespace(s)
    return K, xp.where(s > 0, s, xp.zeros_like(s)), code


def whitened(values: Array, vectors: Array, code: Array, U: Array) -> tuple[Array, Array, Array]:
    """(K, s, code) as `whiten`, from ascending eigenpairs of P and their code, for any symmetric U: signs of s stay."""
    xp = namespace(values)
    top = values[:, -1:]
    floor = eps(values.dtype, xp) * xp.where(top > 0, top, xp.ones_like(top))
    lifted = xp.any(values < floor, axis=-1)
    root = vectors / xp.sqrt(xp.where(values < floor, floor, values))[:, None, :]
    s, rotation, other = kernels.eigh(xp.matmul(root.mT, xp.matmul(U, root)))
    code = choose(lifted & (code == int(Code.OK)), Code.JITTERED, code)
    return xp.matmul(root, rotation), s, xp.maximum(code, other)


def pair(G1: Array, A1: Array, G2: Array, A2: Array) -> tuple[Pair, Array]:
    """The exact inverse of G1 (x) A1 + G2 (x) A2 and a code, (blocks, ...) each."""
    return alone(pairing(G1, A1, G2, A2))


def pairing(G1: Array, A1: Array, G2: Array, A2: Array) -> Asks[tuple[Pair, Array]]:
    """`pair` in steps."""
    (Kg, sg, code_g), (Ka, sa, code_a) = yield Ask(whiten, (G1, G2)), Ask(whiten, (A1, A2))
    return Pair(Kg, Ka, 1.0 + sg[:, :, None] * sa[:, None, :]), namespace(code_g).maximum(code_g, code_a)


def solve(found: Pair, V: Array | Factored) -> Array:
    """The inverse of the pair applied to V (blocks, d_out, d_in) or a `Factored`."""
    return kron.solve(found.Kg, V, found.Ka, found.below)


def apply(terms: Sequence[tuple[Array, Array]], V: Array) -> Array:
    """sum over terms of G V A."""
    total = kron.apply(terms[0][0], V, terms[0][1])
    for G, A in terms[1:]:
        total = total + kron.apply(G, V, A)
    return total


def conjugate_gradients(
    terms: Sequence[tuple[Array, Array]], found: Pair, V: Array, tolerance: float, limit: int
) -> tuple[Array, Array, Array]:
    """(X, iterations (), residual norm over that of V (blocks,)) of the sum of all terms, started from the pair.

    Blocks that have converged stand still while others go on.
    """
    xp = namespace(V)

    def dot(x: Array, y: Array) -> Array:
        return xp.sum(x * y, axis=(-2, -1))

    scale = dot(V, V)
    goal = tolerance * tolerance * scale

    def going(carry: Carry) -> Array:
        return xp.any(dot(carry[1], carry[1]) > goal)

    def body(carry: Carry) -> Carry:
        x, r, p, rho, count = carry
        q = apply(terms, p)
        live = dot(r, r) > goal
        alpha = _ratio(rho, dot(p, q), live)
        x = x + alpha * p
        r = r - alpha * q
        z = solve(found, r)
        new = dot(r, z)
        return x, r, select(live, z + _ratio(new, rho, live) * p, p), select(live, new, rho), count + 1.0

    x = solve(found, V)
    r = V - apply(terms, x)
    z = solve(found, r)
    x, r, _, _, count = kernels.loop(going, body, (x, r, z, dot(r, z), xp.sum(scale) * 0.0), limit)
    safe = xp.where(scale > 0, scale, xp.ones_like(scale))
    return x, count, xp.sqrt(dot(r, r) / safe)


def _ratio(above: Array, below: Array, live: Array) -> Array:
    """above / below as (blocks, 1, 1), zero where not `live` or where nothing can be divided by."""
    xp = namespace(above)
    use = live & (below > 0)
    value = xp.where(use, above / xp.where(use, below, xp.ones_like(below)), xp.zeros_like(above))
    return value[:, None, None]
