"""What a coarse space may use of its layer, and how each block method offers it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from kfaccore.linalg import equal, side
from kfaccore.method import Block, Eigensystem, Hyper, KroneckerTerms, Method, State, declares, inverse_sides
from kfaccore.network.two_level.vectors import Outer, Vector
from kfaccore.xp.arrays import Array, namespace

X = TypeVar("X")

_UNDAMPED = Hyper(0, 0.0, 0.0)


@dataclass(frozen=True)
class Local:
    """M^-1 v, eigenpairs of M as `eigenpairs` has them, and at a step grad(), M^-1 grad and the residual.

    solve gives an `Outer` for an `Outer` where M^-1 is one Kronecker product, else an array.
    """

    solve: Callable[[Vector], Vector]
    eigensystem: Callable[[], tuple[Array, Array, Array]]
    grad: Callable[[], Array] | None = None
    direction: Array | None = None
    residual: Array | None = None


def now(x: X | None) -> X:
    """What a `Local` has at a step; ValueError elsewhere."""
    if x is None:
        raise ValueError("these coarse vectors are made anew at every step: take Krylov of Nicolaides() or Residual()")
    return x


def inverse_product(method: Method, state: State, hyper: Hyper, v: Outer) -> Outer | None:
    """M^-1 v where it is a product again; None where the method, or its options, solve otherwise."""
    parts = inverse_sides(method, state, hyper)
    if parts is None:
        return None
    Ai, Gi = parts
    return Outer(_row_times(v.left, Gi), _row_times(v.right, Ai))


def _row_times(x: Array, factor: side.Side) -> Array:
    """x (blocks, d) times a factor."""
    return side.through(x[:, None, :], factor)[:, 0, :]


def eigenpairs(method: Method, state: State, name: str, block: Block) -> tuple[Array, Array, Array]:
    """(S (blocks, d_out, d_in), Qg, Qa) of a method that is one Kronecker product or knows its eigenvectors.

    Where eigenvalues are equal the eigenvectors are those that fixed vectors make (`equal.settled`).
    """
    terms = method.kronecker_terms(state, block) if declares(method, KroneckerTerms) else ()
    system = method.eigensystem(state, _UNDAMPED) if not terms and declares(method, Eigensystem) else None
    if system is not None:
        Qa, Qg, S = system
        xp = namespace(S)
        a = xp.sum(S, axis=-2)
        g = xp.sum(S, axis=-1)
    elif len(terms) == 1:
        A, G = terms[0]
        a, Qa, _ = side.eigh(A)
        g, Qg, _ = side.eigh(G)
        S = g[:, :, None] * a[:, None, :]
    else:
        raise ValueError(f"layer {name!r}: {type(method).__name__} knows no eigenvectors; choose another coarse space")
    Qa = equal.settled(a, Qa)
    Qg = equal.settled(g, Qg)
    return S, Qg if block.diagonal_out else _full_side(Qg), Qa if block.diagonal_in else _full_side(Qa)


def _full_side(Q: Array) -> Array:
    """Eigenvectors as a matrix, also those of a standard basis, which come as a diagonal of ones."""
    return side.identity(side.zeros(Q.shape[0], Q.shape[1], False, Q)) if side.is_diagonal(Q) else Q
