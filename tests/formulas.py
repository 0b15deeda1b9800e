"""Inputs, and what methods invert for them, in plain NumPy by their definitions; uses nothing of kfaccore.

Matrices are (blocks, D, D) for row-major vec, from a (blocks, batch, shared, d_in) and g (draws, blocks, batch, shared,
d_out), the normaliser n and the damping.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]


def arrays(rng: np.random.Generator, blocks=2, batch=5, shared=3, d_in=4, d_out=3, draws=2) -> Pair:
    """Correlated a (blocks, batch, shared, d_in) and g (draws, blocks, batch, shared, d_out)."""
    common = rng.normal(size=(blocks, batch, shared, 1))
    a = rng.normal(size=(blocks, batch, shared, d_in)) + common
    g = rng.normal(size=(draws, blocks, batch, shared, d_out)) * (1.0 + 0.5 * common) + 0.3
    return a, g


def one_example(rng: np.random.Generator) -> Pair:
    """One example, one position: every block is a Kronecker product."""
    return arrays(rng, batch=1, shared=1)


def constant_gradients(rng: np.random.Generator) -> Pair:
    """One example whose g is the same at all positions: reduce is exact, expand is not."""
    a, g = arrays(rng, batch=1)
    return a, np.repeat(g[..., :1, :], 3, axis=-2)


def scalars(rng: np.random.Generator) -> Pair:
    """One input, one output."""
    return arrays(rng, d_in=1, d_out=1)


def anything(rng: np.random.Generator) -> Pair:
    return arrays(rng)


def damped(a: np.ndarray, g: np.ndarray, n: float, damping: float) -> np.ndarray:
    """F + damping I from the definition, (blocks, D, D)."""
    J = np.einsum("vbnso,bnsi->bvnoi", g, a).reshape(len(a), -1, g.shape[-1] * a.shape[-1])
    return np.einsum("bkd,bke->bde", J, J) / n + damping * np.eye(J.shape[-1])


def expanded(a: np.ndarray, g: np.ndarray, n: float) -> Pair:
    """A = mean of a a^T and G = (1/n) sum of g g^T over rows, every position one."""
    return np.einsum("bnsi,bnsj->bij", a, a) / (a.shape[1] * a.shape[2]), np.einsum("vbnso,vbnsp->bop", g, g) / n


def reduced(a: np.ndarray, g: np.ndarray, n: float) -> Pair:
    """The same of the mean of a and the sum of g over an example's positions."""
    return expanded(a.mean(2, keepdims=True), g.sum(3, keepdims=True), n)


def partial_traces(a: np.ndarray, g: np.ndarray, n: float) -> Pair:
    """Sums of |g|^2 a a^T and |a|^2 g g^T over rows, over n and over the root of their common trace."""
    A = np.einsum("vbnso,vbnso,bnsi,bnsj->bij", g, g, a, a) / n
    G = np.einsum("bnsi,bnsi,vbnso,vbnsp->bop", a, a, g, g) / n
    root = np.sqrt(np.trace(A, axis1=1, axis2=2))[:, None, None]
    return A / root, G / root


def split(shifts: Callable[[float, float, float], tuple[float, float]], factors: Callable = expanded) -> Callable:
    """(G + d_g I) kron (A + d_a I) with shifts from the mean eigenvalues."""

    def matrix(a: np.ndarray, g: np.ndarray, n: float, damping: float) -> np.ndarray:
        found = []
        for A, G in zip(*factors(a, g, n), strict=True):
            d_a, d_g = shifts(np.trace(A) / len(A), np.trace(G) / len(G), damping)
            found.append(np.kron(G + d_g * np.eye(len(G)), A + d_a * np.eye(len(A))))
        return np.stack(found)

    return matrix


def pi(mean_a: float, mean_g: float, damping: float) -> tuple[float, float]:
    ratio = np.sqrt(mean_a / mean_g)
    return ratio * np.sqrt(damping), np.sqrt(damping) / ratio


def equal(mean_a: float, mean_g: float, damping: float) -> tuple[float, float]:
    return np.sqrt(damping), np.sqrt(damping)


def per_factor(mean_a: float, mean_g: float, damping: float) -> tuple[float, float]:
    return damping, damping


def joint(a: np.ndarray, g: np.ndarray, n: float, damping: float) -> np.ndarray:
    """G kron A + damping I."""
    products = [np.kron(G, A) for A, G in zip(*expanded(a, g, n), strict=True)]
    return np.stack(products) + damping * np.eye(len(products[0]))


def diagonal(a: np.ndarray, g: np.ndarray, n: float, damping: float) -> np.ndarray:
    """diag F + damping I."""
    F = damped(a, g, n, damping)
    return F * np.eye(F.shape[-1])


def eye(a: np.ndarray, g: np.ndarray, n: float, damping: float) -> np.ndarray:
    return np.broadcast_to(np.eye(g.shape[-1] * a.shape[-1]), damped(a, g, n, damping).shape)


def coupled(a: np.ndarray, g: np.ndarray, n: float, damping: float) -> np.ndarray:
    """Inverse of the Kronecker matrix Q kron P with P^-1 = (tr(QG)/d_out) A + damping (tr(Q)/d_out) I, and so for Q."""
    found = []
    for A, G in zip(*expanded(a, g, n), strict=True):
        P = np.eye(len(A))
        for _ in range(3000):
            Q = np.linalg.inv((np.trace(P @ A) * G + damping * np.trace(P) * np.eye(len(G))) / len(A))
            before = P
            P = np.linalg.inv((np.trace(Q @ G) * A + damping * np.trace(Q) * np.eye(len(A))) / len(G))
            if np.abs(P - before).max() <= 1e-15 * np.abs(P).max():
                break
        found.append(np.linalg.inv(np.kron(Q, P)))
    return np.stack(found)
