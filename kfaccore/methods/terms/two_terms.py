"""Solving with G1 (x) A1 + G2 (x) A2 by whitening: x = K_g [(K_g^T V K_a) / (1 + s_g s_a^T)] K_a^T.

The first pair is damped and positive definite; K^T (A1 + d_a I) K = I and K^T A2 K = diag(s_a), alike for G. The second
pair is symmetric and mostly indefinite, so the sum may be: then a function chosen by the method replaces the
denominators of that block and the code says INDEFINITE.
Source: Martens & Grosse 2015 (1503.05671), appendix B, for the sum of two Kronecker products.
Cost: four eigendecompositions a refresh, four products a solve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kfaccore import xp as kernels
from kfaccore.linalg import kron, side
from kfaccore.xp.arrays import Array, eps, namespace, select
from kfaccore.xp.codes import Code, choose

if TYPE_CHECKING:
    from kfaccore.damping import Split

Handler = Callable[[Array], Array]


@dataclass(frozen=True)
class Whitened:
    """Ka (blocks, d_in, d_in), Kg (blocks, d_out, d_out), and the second factors' eigenvalues there: a, g."""

    Ka: Array
    Kg: Array
    a: Array
    g: Array


def absolute(ratios: Array) -> Array:
    """1 + |s_g s_a|: every curvature of the second term counted as positive."""
    return 1.0 + namespace(ratios).abs(ratios)


def first_term(ratios: Array) -> Array:
    """1: the second term left out."""
    return namespace(ratios).ones_like(ratios)


def init(A: Array, G: Array) -> Whitened:
    """Identities: the direction is the gradient."""
    zero_a, zero_g = (namespace(x).zeros_like(side.diagonal(x)) for x in (A, G))
    return Whitened(side.identity(A), side.identity(G), zero_a, zero_g)


def refresh(
    first: tuple[Array, Array], second: tuple[Array, Array], split: Split, damping: float | Array
) -> tuple[Whitened, Array]:
    """Whitened form and code (blocks,) of (G1 + d_g I) (x) (A1 + d_a I) + G2 (x) A2 from (A, G) pairs."""
    (A1, G1), (A2, G2) = first, second
    d_a, d_g = split.shifts(side.Scale.of_factor(A1), side.Scale.of_factor(G1), damping)
    Ka, a, code_a = _whiten(A1, d_a, A2)
    Kg, g, code_g = _whiten(G1, d_g, G2)
    return Whitened(Ka, Kg, a, g), namespace(code_a).maximum(code_a, code_g)


def separable(split: Split) -> None:
    """ValueError for a damping form that does not shift each factor of the first term."""
    if not split.separable:
        raise ValueError(f"split={split} does not shift each factor: two terms need pi, equal, per_factor or Relative")


def matvec(first: tuple[Array, Array], second: tuple[Array, Array], v: Array) -> Array:
    """G1 V A1 + G2 V A2 from (A, G) pairs."""
    return kron.apply(first[1], v, first[0]) + kron.apply(second[1], v, second[0])


def solve(parts: Whitened, grad: Any, handler: Handler, code: Array) -> tuple[Array, Array, Array]:
    """Direction, code and the smallest denominator 1 + s_g s_a (blocks,) before any repair."""
    xp = namespace(parts.a)
    ratios = parts.g[:, :, None] * parts.a[:, None, :]
    below = 1.0 + ratios
    smallest = xp.min(below, axis=(-2, -1))
    reach = xp.max(xp.abs(ratios), axis=(-2, -1))
    indefinite = smallest <= 100.0 * eps(below.dtype, xp) * (1.0 + reach)
    below = select(indefinite, handler(ratios), below)
    code = choose(indefinite & (code < int(Code.INDEFINITE)), Code.INDEFINITE, code)
    return kron.solve(parts.Kg, grad, parts.Ka, below), code, smallest


def _whiten(first: Array, shift: Array, second: Array) -> tuple[Array, Array, Array]:
    """K with K^T (first + shift I) K = I and K^T second K = diag(s); s; code."""
    xp = namespace(first)
    values, vectors, code = kernels.eigh(first)
    values = values + shift[:, None]
    top = xp.max(values, axis=-1, keepdims=True)
    floor = eps(values.dtype, xp) * xp.where(top > 0, top, xp.ones_like(top))
    lifted = xp.any(values < floor, axis=-1) & (code == int(Code.OK))
    root = vectors / xp.sqrt(xp.where(values < floor, floor, values))[:, None, :]
    s, rotation, failed = kernels.eigh(xp.matmul(root.mT, xp.matmul(second, root)))
    return xp.matmul(root, rotation), s, xp.maximum(choose(lifted, Code.JITTERED, code), failed)
