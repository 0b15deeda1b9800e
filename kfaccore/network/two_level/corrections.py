"""From the directions z0 = M^-1 g of the layers to those of the network: corrections by a coarse level.

With R (m, N) the coarse vectors, F_d = F + damping I over the network, F_c = R F_d R^T and Q = R^T F_c^-1 R:

    deflate_last   z = z0 + Q (g - F_d z0)              A-DEF2, the residual form: never further from F_d^-1 g
    deflate_first  z = M^-1 (g - F_d Q g) + Q g         A-DEF1
    balance        z = y - Q F_d y + Q g, y = M^-1 (g - F_d Q g)      symmetric
    add            z = z0 + Q g                         may end further away
    woodbury       z = (M + R^T F_o R)^-1 g, F_o the part of R F R^T between layers; two forms of one matrix

Source: Koroko et al. 2023 (2303.18083) A-DEF2; Tselepidis et al. 2020 (2011.00573) `add` and `woodbury`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kfaccore import xp as kernels
from kfaccore.linalg import equal, refined
from kfaccore.network.two_level.gradients import Tree
from kfaccore.network.two_level.level import Level
from kfaccore.network.two_level.vectors import dense
from kfaccore.xp.arrays import Array, all_finite, device_of, eps, loop, namespace, scalar, select
from kfaccore.xp.codes import Code, choose

Solver = Callable[[Tree], Tree]


@dataclass(frozen=True)
class Change:
    """z - z0 as coarse numbers beta (m,), or as a tree d where it leaves the coarse space; code (1,)."""

    code: Array
    beta: Array | None = None
    d: Tree | None = None


def deflate_last(level: Level, matrix: Array, fine: Solver) -> Change:
    """A-DEF2."""
    coarse = matrix + level.ridge
    inverse, code = inverted(coarse)
    return Change(code, beta=_solved(coarse, inverse, level.rhs))


def add(level: Level, matrix: Array, fine: Solver) -> Change:
    """Additive."""
    coarse = matrix + level.ridge
    inverse, code = inverted(coarse)
    return Change(code, beta=_solved(coarse, inverse, level.rg))


def deflate_first(level: Level, matrix: Array, fine: Solver) -> Change:
    """A-DEF1."""
    y, coarse, _, code = _projected(level, matrix + level.ridge, fine)
    return Change(code, d={name: y[name] + coarse[name] - level.z0[name] for name in y})


def balance(level: Level, matrix: Array, fine: Solver) -> Change:
    """Balanced: A-DEF1 and A-DEF2 together, symmetric."""
    system = matrix + level.ridge
    y, coarse, inverse, code = _projected(level, system, fine)
    again = level.prolong(_solved(system, inverse, level.curved_coarse(y, level.image(y))))
    return Change(code, d={name: y[name] - again[name] + coarse[name] - level.z0[name] for name in y})


def _projected(level: Level, system: Array, fine: Solver) -> tuple[Tree, Tree, Array, Array]:
    """M^-1 (g - F_d Q g) and Q g; the inverse of the coarse matrix and its code."""
    inverse, code = inverted(system)
    beta = _solved(system, inverse, level.rg)
    g = level.g()
    coarse = level.prolong(beta)
    curved = level.curved(coarse, level.Y @ beta)
    return fine({name: g[name] - curved[name] for name in g}), coarse, inverse, code


def _solved(system: Array, inverse: Array, b: Array) -> Array:
    """system^-1 b (m,), also of vectors that nearly depend on each other."""
    return refined.solved(system, inverse, b[:, None])[:, 0]


def woodbury(level: Level, matrix: Array, fine: Solver) -> Change:
    """-M^-1 R^T (I + F_o S)^-1 F_o R z0 with S = R M^-1 R^T, for any F_o; INDEFINITE where M + R^T F_o R is."""
    S, smoothed = _smoothed(level, fine)
    Fo = matrix * level.apart()
    half, ok = _half(S)
    W = half.mT @ Fo @ half
    middle, code = _inner(W, ok)
    z = level.restrict(level.z0)
    beta = Fo @ (z - half @ (middle @ (half.mT @ (Fo @ z))))
    return Change(code, d=_against(level, smoothed, beta))


def woodbury_inverse(level: Level, matrix: Array, fine: Solver) -> Change:
    """-M^-1 R^T (F_o^-1 + S)^-1 R z0: the form for an F_o that can be inverted; else INDEFINITE as well."""
    xp = namespace(matrix)
    S, smoothed = _smoothed(level, fine)
    values, vectors, _ = kernels.eigh((matrix * level.apart())[None, ...])
    values = values[0, :]
    vectors = vectors[0, ...]
    top = xp.max(xp.abs(values))
    ok = xp.all(xp.abs(values) > values.shape[0] * eps(values.dtype, xp) * top) & (top > 0)
    safe = xp.where(ok, values, xp.ones_like(values))
    half, definite = _half(S)
    _, code = _inner(half.mT @ ((vectors * safe) @ vectors.mT) @ half, definite & ok)
    low, Q, _ = kernels.eigh(((vectors / safe) @ vectors.mT + S)[None, ...])
    low = xp.where(xp.abs(low) > 0, low, xp.ones_like(low))
    beta = Q[0, ...] @ ((Q[0, ...].mT @ level.restrict(level.z0)) / low[0, :])
    return Change(code, d=_against(level, smoothed, beta))


def _smoothed(level: Level, fine: Solver) -> tuple[Array, list[tuple[str, Array]]]:
    """S = R M^-1 R^T (m, m), and (layer, M^-1 r) of every vector."""
    xp = namespace(level.Y)
    found = [fine({name: dense(r)})[name] for name, r in zip(level.layers, level.vectors, strict=True)]
    smoothed = list(zip(level.layers, found, strict=True))
    zero = xp.sum(0.0 * level.Y)
    rows = []
    for name, r in zip(level.layers, level.vectors, strict=True):
        rows.append(xp.stack([xp.sum(dense(r) * x) if name == other else zero for other, x in smoothed]))
    S = xp.stack(rows)
    return (S + S.mT) / 2, smoothed


def _against(level: Level, smoothed: list[tuple[str, Array]], beta: Array) -> Tree:
    found = {name: namespace(z).zeros_like(z) for name, z in level.z0.items()}
    for i, (name, x) in enumerate(smoothed):
        found[name] = found[name] - beta[i] * x
    return found


def _half(S: Array) -> tuple[Array, Array]:
    """S^(1/2), and whether S is finite."""
    xp = namespace(S)
    values, vectors, code = kernels.eigh(S[None, ...])
    root = xp.sqrt(xp.where(values > 0, values, xp.zeros_like(values)))
    return (vectors[0, ...] * root) @ vectors[0, ...].mT, code == int(Code.OK)


def _inner(W: Array, ok: Array) -> tuple[Array, Array]:
    """(I + W)^-1, and the code: W > -I exactly where M + R^T F_o R is positive definite."""
    xp = namespace(W)
    values, vectors, code = kernels.eigh(W[None, ...])
    below = 1.0 + values
    good = xp.all(below > 10 * eps(W.dtype, xp), axis=-1) & ok
    below = xp.where(good[:, None], below, xp.ones_like(below))
    code = xp.where(good | (code > int(Code.OK)), code, choose(good, Code.OK, Code.INDEFINITE))
    return (vectors[0, ...] / below[0, :]) @ vectors[0, ...].mT, code


def inverted(matrix: Array) -> tuple[Array, Array]:
    """Inverse of a coarse matrix and its code (1,); scaled to a unit diagonal first, dropped vectors left out.

    Where vectors depend on each other it is the inverse in their span: entries of 1 / eps would cost every digit.
    """
    xp = namespace(matrix)
    diagonal = xp.linalg.diagonal(matrix)
    empty = diagonal == 0
    # 1 for a dropped vector and for a negative entry of a matrix that is indefinite; NaN stays
    positive = xp.where(diagonal > 0, diagonal, xp.ones_like(diagonal))
    root = xp.where(diagonal > 0, xp.sqrt(positive), 1.0 + 0 * diagonal)
    eye = xp.eye(matrix.shape[0], dtype=matrix.dtype, device=device_of(matrix))
    scaled = matrix / root[:, None] / root[None, :] + xp.astype(empty, matrix.dtype) * eye
    scaled = ((scaled + scaled.mT) / 2)[None, ...]
    inverse, code = kernels.spd_inverse(scaled)
    inverse = select(code < int(Code.INDEFINITE), inverse, xp.zeros_like(inverse))
    large = xp.max(xp.linalg.diagonal(inverse), axis=-1) * equal.tolerance(matrix) > 1
    low = (large | (code > int(Code.OK))) & (code < int(Code.INDEFINITE))
    # a loop of at most one turn: made only where it is needed, also under a trace
    (inverse,) = loop(lambda _: xp.any(low), lambda x: (select(low, _in_span(scaled), x[0]),), (inverse,), 1)
    return inverse[0, ...] / root[:, None] / root[None, :], code


def _in_span(matrix: Array) -> Array:
    """The inverse of symmetric (1, m, m) on the eigenvectors whose eigenvalues are not rounding of the largest."""
    xp = namespace(matrix)
    values, vectors, _ = kernels.eigh(matrix)
    seen = values > equal.tolerance(matrix) * xp.max(values, axis=-1, keepdims=True)
    reciprocal = xp.where(seen, 1.0 / xp.where(seen, values, xp.ones_like(values)), xp.zeros_like(values))
    return xp.matmul(vectors * reciprocal[:, None, :], vectors.mT)


def applied(level: Level, change: Change, c: float) -> tuple[Tree, Array, Array]:
    """(c (z - z0), gain, ok (1,)): zero for all layers unless all of it is finite and its system could be solved.

    gain = E(z0 + d) - E(z0) for E(z) = ||z - F_d^-1 g||^2 in the norm of F_d on these records.
    """
    ok = change.code < int(Code.INDEFINITE)
    if change.beta is not None:
        return _in_coarse_space(level, change.beta, c, ok)
    return _outside_coarse_space(level, change.d or {}, c, ok)


def _in_coarse_space(level: Level, beta: Array, c: float, ok: Array) -> tuple[Tree, Array, Array]:
    """`applied` of R^T beta: its gain needs sums over the coarse vectors only."""
    xp = namespace(level.Y)
    ok = ok & xp.all(xp.isfinite(beta))
    beta = c * xp.where(ok, beta, xp.zeros_like(beta))
    w = level.Y @ beta
    gain = xp.sum(w * w) / level.n + xp.sum(beta * (level.ridge @ beta)) - 2 * xp.sum(beta * level.rhs)
    return level.prolong(beta), gain, ok


def _outside_coarse_space(level: Level, change: Tree, c: float, ok: Array) -> tuple[Tree, Array, Array]:
    """`applied` of a tree: its gain needs its image under J."""
    xp = namespace(level.Y)
    for x in change.values():
        ok = ok & xp.all(all_finite(x))
    d = {name: c * select(ok, x[None, ...], xp.zeros_like(x)[None, ...])[0, ...] for name, x in change.items()}
    w = level.image(d)
    g = level.g()
    gain = (xp.sum(w * w) + 2 * xp.sum(w * level.w0)) / level.n
    for name, x in d.items():
        gain = gain + xp.sum(x * (scalar(level.damping[name], x) * (x + 2 * level.z0[name]) - 2 * g[name]))
    return d, gain, ok
