"""One row a method, a layer kind, a framework: what the laws of the suite run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import kfaccore as kf
from kfaccore.layers import Bias, Conv, Embedding, Gain, Linear
from kfaccore.linalg.cg import Residual
from kfaccore.methods.rows import cgfac
from kfaccore.methods.rows.factors import always, never
from kfaccore.methods.singd.recursion import Rule, independent

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


def _split(shifts: Callable[[float, float, float], tuple[float, float]], reduced: bool = False) -> Callable:
    """(G + d_g I) kron (A + d_a I) with shifts from the mean eigenvalues."""

    def matrix(a: np.ndarray, g: np.ndarray, n: float, damping: float) -> np.ndarray:
        if reduced:
            a, g = a.mean(2, keepdims=True), g.sum(3, keepdims=True)
        found = []
        for block in range(len(a)):
            rows, gs = a[block].reshape(-1, a.shape[-1]), g[:, block].reshape(-1, g.shape[-1])
            A, G = rows.T @ rows / len(rows), gs.T @ gs / n
            d_a, d_g = shifts(np.trace(A) / len(A), np.trace(G) / len(G), damping)
            found.append(np.kron(G + d_g * np.eye(len(G)), A + d_a * np.eye(len(A))))
        return np.stack(found)

    return matrix


def _pi(mean_a: float, mean_g: float, damping: float) -> tuple[float, float]:
    ratio = np.sqrt(mean_a / mean_g)
    return ratio * np.sqrt(damping), np.sqrt(damping) / ratio


def _coupled(a: np.ndarray, g: np.ndarray, n: float, damping: float) -> np.ndarray:
    """Inverse of the Kronecker matrix Q kron P with P^-1 = (tr(QG)/d_out) A + damping (tr(Q)/d_out) I, and so for Q."""
    found = []
    for block in range(len(a)):
        rows, gs = a[block].reshape(-1, a.shape[-1]), g[:, block].reshape(-1, g.shape[-1])
        A, G = rows.T @ rows / len(rows), gs.T @ gs / n
        P = np.eye(len(A))
        for _ in range(300):
            Q = np.linalg.inv((np.trace(P @ A) * G + damping * np.trace(P) * np.eye(len(G))) / len(A))
            P = np.linalg.inv((np.trace(Q @ G) * A + damping * np.trace(Q) * np.eye(len(A))) / len(G))
        found.append(np.linalg.inv(np.kron(Q, P)))
    return np.stack(found)


def _equal_traces(mean_a: float, mean_g: float, damping: float) -> tuple[float, float]:
    """sqrt(damping) on factors of 4 and 3 rows once their traces are made equal."""
    return _pi(4 * mean_a, 3 * mean_g, damping)


@dataclass(frozen=True)
class Row:
    """name, method (whose `cycles` say how many settle it), the regime it is exact in, the damped matrix it then
    inverts, and its large-damping scale."""

    name: str
    method: Any
    regime: Callable
    matrix: Callable = damped
    scale: Callable[[float], float] = lambda damping: damping
    inverse_only: bool = False  # no F~, no averages of it: matvec refuses
    truncated: bool = False  # of averages only the largest modes are kept, which is not linear
    additive: bool = True  # F~ of averaged Stats is the average of the F~


_two, _narrow = kf.Rank(2, 2), kf.Symmetric(oversample=0)


def _cg(operator: Any = cgfac.Kron()) -> kf.CGFAC:  # noqa: B008 frozen
    """CG-FAC iterated to the end: truncated, it is neither linear nor symmetric."""
    return kf.CGFAC(operator, cgfac.CG(Residual(1e-15), 400), 96)


METHODS = [
    Row("kfac", kf.KFAC(), one_example, _split(_pi)),
    Row("kfac-reduce", kf.KFAC(sharing=kf.reduce), constant_gradients, _split(_pi, reduced=True)),
    Row("kfac-equal", kf.KFAC(split=kf.equal), one_example, _split(lambda a, g, d: (d**0.5, d**0.5))),
    Row("kfac-per-factor", kf.KFAC(split=kf.per_factor), one_example, _split(lambda a, g, d: (d, d)), lambda d: d * d),
    Row("kfac-eigh", kf.KFAC(inverse=kf.eigh), one_example, _split(_pi)),
    Row("kfac-exact-damping", kf.KFAC(inverse=kf.eigh, split=kf.exact), one_example),
    Row("ekfac", kf.EKFAC(), one_example, additive=False),
    Row("tkfac", kf.TKFAC(), one_example, _split(_equal_traces), additive=False),
    Row("tekfac", kf.TEKFAC(), one_example, additive=False),
    Row("kpsvd", kf.KPSVD(), one_example, _split(_pi), additive=False),  # 30 cycles of settle, as the next two
    Row("deflation", kf.Deflation(), one_example, _split(_pi), additive=False),
    Row("kfac-corrected", kf.KFACCorrected(), one_example, _split(_pi), additive=False),
    Row("lanczos", kf.Lanczos(), one_example, _split(_pi), additive=False),
    Row("diagonal", kf.Diagonal(), scalars),
    Row(
        "pinn-kfac",
        kf.PINNKFAC(terms=1),
        one_example,
        _split(lambda a, g, d: (d, d)),
        lambda d: d * d,
        additive=False,
    ),
    Row("identity", kf.Identity(), anything, lambda a, g, n, d: np.eye(12)[None].repeat(2, 0), lambda d: 1.0, False),
    Row("exact", kf.Exact(), anything),
    Row("singd", kf.SINGD(rule=Rule(momentum=0.0, rate=0.5), cycles=60), anything, _coupled, inverse_only=True),
    Row(
        "singd-ikfac",
        kf.IKFAC(coupling=independent, rule=Rule(momentum=0.0, rate=0.9), cycles=50),
        anything,
        _split(lambda a, g, d: (d, d)),
        lambda d: d * d,
        inverse_only=True,
    ),
    Row("randomized", kf.RandomizedKFAC(), one_example, _split(_pi), truncated=True),
    Row("randomized-2", kf.RandomizedKFAC(rank=_two, sketch=_narrow), one_example, _split(_pi), truncated=True),
    Row("brand-2", kf.BrandKFAC(rank=_two), one_example, _split(_pi), truncated=True),
    Row("brand-r-2", kf.BrandRKFAC(rank=_two, sketch=_narrow), one_example, _split(_pi), truncated=True),
    Row("brand-c-2", kf.BrandCKFAC(rank=_two), one_example, _split(_pi), truncated=True),
    Row("skfac", kf.SKFAC(), one_example, _split(_pi)),
    Row("skfac-stacked", kf.SKFAC(branch=always, rows=96, explicit=never), one_example, _split(_pi)),
    Row("cgfac", _cg(), one_example),
    Row("cgfac-factored", _cg(cgfac.KronFactored(branch=always)), one_example, _split(_pi)),
    Row("cgfac-empirical", _cg(cgfac.Empirical()), anything),
    Row("fngd", kf.FNGD(), anything, additive=False),
]


@dataclass(frozen=True)
class LayerRow:
    """name, layer, shapes of its input (batch first; labels below `ids` if that is set), output and parameters."""

    name: str
    layer: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: dict[str, tuple[int, ...]]
    ids: int = 0


_window = kf.Window((3, 2), stride=(2, 1), padding=1)
LAYERS = [
    LayerRow("linear", Linear(4, 3), (6, 4), (6, 3), {"weight": (3, 4), "bias": (3,)}),
    LayerRow("linear shared", Linear(4, 3, bias=False), (6, 2, 5, 4), (6, 2, 5, 3), {"weight": (3, 4)}),
    LayerRow("linear transposed", Linear(4, 3, transposed=True), (6, 4), (6, 3), {"weight": (4, 3), "bias": (3,)}),
    LayerRow(
        "conv channels last",
        Conv(_window, (4, 6)),
        (5, 7, 8, 4),
        (5, 4, 9, 6),
        {"weight": (3, 2, 4, 6), "bias": (6,)},
    ),
    LayerRow(
        "conv groups, channels first",
        Conv(_window, (4, 6), groups=2, channels_first=True),
        (5, 4, 7, 8),
        (5, 6, 4, 9),
        {"weight": (6, 2, 3, 2), "bias": (6,)},
    ),
    LayerRow(
        "conv 1d, circular",
        Conv(kf.Window((3,), padding=1), (4, 6), bias=False, padding_mode="circular"),
        (5, 7, 4),
        (5, 7, 6),
        {"weight": (3, 4, 6)},
    ),
    LayerRow(
        "conv 3d",
        Conv(kf.Window((2, 2, 2)), (2, 3)),
        (4, 3, 3, 3, 2),
        (4, 2, 2, 2, 3),
        {"weight": (2, 2, 2, 2, 3), "bias": (3,)},
    ),
    LayerRow("embedding", Embedding(7, 3), (6, 5), (6, 5, 3), {"weight": (7, 3)}, ids=7),
    LayerRow("embedding, one id", Embedding(7, 3), (6,), (6, 3), {"weight": (7, 3)}, ids=7),
    LayerRow("bias", Bias(3), (6, 5, 3), (6, 5, 3), {"bias": (3,)}),
    LayerRow("gain", Gain(3), (6, 5, 3), (6, 5, 3), {"gain": (3,)}),
]

FRAMEWORKS = ["numpy", "torch", "jax", "tensorflow"]  # adapters/kfaccore_<name>
