"""One row a method, a layer kind, a framework: what the laws of the suite run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import forwards
import kfaccore as kf
from formulas import (
    anything,
    arrays,
    constant_gradients,
    coupled,
    damped,
    diagonal,
    equal,
    expanded,
    eye,
    joint,
    one_example,
    partial_traces,
    per_factor,
    pi,
    reduced,
    scalars,
    split,
)
from kfaccore.layers import Bias, Conv, Embedding, Gain, Linear
from kfaccore.linalg.cg import Residual
from kfaccore.methods.rows import cgfac
from kfaccore.methods.rows.factors import always, never
from kfaccore.methods.singd.recursion import Rule, independent

__all__ = ["FRAMEWORKS", "LAYERS", "METHODS", "arrays"]

_split_by_pi = split(pi)


@dataclass(frozen=True)
class Row:
    """A method and what its laws need to know of it; every exception to a law is a field here.

    name, method   `method.cycles` say how many cycles settle it
    regime         inputs for which it is exact: there `matrix` at damping 0 is F
    matrix         the damped matrix that it inverts there
    everywhere     whether it inverts `matrix` for any inputs
    scale          what the direction is the gradient over, at large damping
    factors        (a, g, n) -> (A, G) where F~ = G (x) A and averages are taken of A and G apart; None: of F~ itself
    no_average     why F~ of averaged Stats is neither
    no_matrix      what `matvec` says where only inverses, or coefficients, are kept
    no_draws       what a record of zero draws is refused with; "" says that it means G = I
    no_ids         what an embedding is refused with; "" says that `Ids` are one-hot rows
    aligned        Stats keep positions on an axis of their own, or no rows at all: parts of unequal lengths do not add
    sketched       modes fewer than the sketch finds exactly, from random matrices that differ between blocks
    unmeasured     no record matters: F~ = I, and a solve hands the gradient on, OK from the start
    """

    name: str
    method: Any
    regime: Callable
    matrix: Callable = damped
    everywhere: bool = False
    scale: Callable[[float], float] = lambda damping: damping
    factors: Callable | None = None
    no_average: str = ""
    no_matrix: str = ""
    no_draws: str = ""
    no_ids: str = ""
    aligned: bool = False
    sketched: bool = False
    unmeasured: bool = False


def _kfac(name: str, method: Any, matrix: Callable = _split_by_pi, **fields: Any) -> Row:
    """K-FAC by any road: its factors, its formula for any inputs."""
    return Row(name, method, one_example, matrix, **{"everywhere": True, "factors": expanded, **fields})


def _low_rank(name: str, method: Any, sketched: bool = False) -> Row:
    kept = "of averages only the largest modes are kept"
    return Row(name, method, one_example, _split_by_pi, no_average=kept, sketched=sketched)


def _of_gradients(name: str, method: Any, matrix: Callable, no_average: str, **fields: Any) -> Row:
    """Exact where K-FAC is, from per-example gradients, which zero draws do not have."""
    return Row(name, method, one_example, matrix, no_average=no_average, no_draws="zero draws", **fields)


def _square(damping: float) -> float:
    """Damping added to both factors."""
    return damping * damping


_two = kf.Rank(2, 2)
_narrow = kf.Symmetric(oversample=0)
_in_old_basis = "moments live in the basis of the last refresh"
_interpolated = "a product interpolates at the matrices of the last sweep"


def _cg(operator: Any = cgfac.Kron()) -> kf.CGFAC:  # noqa: B008 frozen
    """CG-FAC iterated to the end: truncated, it is neither linear nor symmetric."""
    return kf.CGFAC(operator, cgfac.CG(Residual(1e-15), 400), 96)


METHODS = [
    _kfac("kfac", kf.KFAC()),
    Row(
        "kfac-reduce",
        kf.KFAC(sharing=kf.reduce),
        constant_gradients,
        split(pi, reduced),
        everywhere=True,
        factors=reduced,
        no_ids="reduce got an embedding",
    ),
    _kfac("kfac-equal", kf.KFAC(split=kf.equal), split(equal)),
    _kfac("kfac-per-factor", kf.KFAC(split=kf.per_factor), split(per_factor), scale=_square),
    _kfac("kfac-eigh", kf.KFAC(inverse=kf.eigh)),
    _kfac("kfac-exact-damping", kf.KFAC(inverse=kf.eigh, split=kf.exact), joint),
    _of_gradients("ekfac", kf.EKFAC(), damped, _in_old_basis),
    _of_gradients(
        "tkfac",
        kf.TKFAC(),
        split(equal, partial_traces),
        "divided by the root of its own trace",
        everywhere=True,
    ),
    _of_gradients("tekfac", kf.TEKFAC(), damped, _in_old_basis),
    _of_gradients("kpsvd", kf.KPSVD(), _split_by_pi, _interpolated, no_ids="KPSVD got an embedding"),
    _of_gradients("deflation", kf.Deflation(), _split_by_pi, _interpolated, no_ids="Deflation got an embedding"),
    _of_gradients(
        "kfac-corrected",
        kf.KFACCorrected(),
        _split_by_pi,
        _interpolated,
        no_ids="KFACCorrected got an embedding",
    ),
    _of_gradients(
        "lanczos",
        kf.Lanczos(),
        _split_by_pi,
        "each factor is averaged with its sign",
        no_ids="Lanczos got an embedding",
        aligned=True,
    ),
    Row("diagonal", kf.Diagonal(), scalars, diagonal, everywhere=True, no_draws="zero draws"),
    _kfac(
        "pinn-kfac",
        kf.PINNKFAC(terms=1),
        split(per_factor),
        scale=_square,
        no_ids="PINNKFAC got an embedding",
    ),
    Row(
        "identity",
        kf.Identity(),
        anything,
        eye,
        everywhere=True,
        scale=lambda damping: 1.0,
        unmeasured=True,
    ),
    Row("exact", kf.Exact(), anything, everywhere=True, no_draws="zero draws"),
    Row(
        "singd",
        kf.SINGD(rule=Rule(momentum=0.0, rate=0.5), cycles=60),
        anything,
        coupled,
        no_matrix="inverses only",
    ),
    Row(
        "singd-ikfac",
        kf.IKFAC(coupling=independent, rule=Rule(momentum=0.0, rate=0.9), cycles=50),
        anything,
        split(per_factor),
        scale=_square,
        no_matrix="inverses only",
    ),
    _kfac("randomized", kf.RandomizedKFAC()),
    _low_rank("randomized-2", kf.RandomizedKFAC(rank=_two, sketch=_narrow), sketched=True),
    _low_rank("brand-2", kf.BrandKFAC(rank=_two)),
    _low_rank("brand-r-2", kf.BrandRKFAC(rank=_two, sketch=_narrow)),
    _low_rank("brand-c-2", kf.BrandCKFAC(rank=_two)),
    _kfac("skfac", kf.SKFAC()),
    _kfac("skfac-stacked", kf.SKFAC(branch=always, rows=96, explicit=never), no_draws="zero draws"),
    _kfac("cgfac", _cg(), joint),
    _kfac("cgfac-factored", _cg(cgfac.KronFactored(branch=always)), no_draws="zero draws"),
    Row(
        "cgfac-empirical",
        _cg(cgfac.Empirical()),
        anything,
        everywhere=True,
        no_draws="zero draws",
        no_ids="got an embedding",
    ),
    # Not `everywhere`: (v - U y) / damping cancels, so the tight bound of that law holds at moderate sizes alone.
    Row("fngd", kf.FNGD(), anything, no_matrix="not curvature", no_draws="zero draws", aligned=True),
]


@dataclass(frozen=True)
class LayerRow:
    """A layer kind, shapes of its input (batch first; labels below `ids` if that is set), output and parameters.

    forward     plain NumPy function of inputs and named parameters: what they add to the output
    gradients   (layer, gy, x) -> g of draws gy: the layer's own unless these need the input as well
    """

    name: str
    layer: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: dict[str, tuple[int, ...]]
    forward: Callable[..., np.ndarray]
    ids: int = 0
    gradients: Callable = lambda layer, gy, x: layer.gradients(gy, draws=True)


_window = kf.Window((3, 2), stride=(2, 1), padding=1)
_strides = (2, 1)
_padding = ((1, 1), (1, 1))
LAYERS = [
    LayerRow("linear", Linear(4, 3), (6, 4), (6, 3), {"weight": (3, 4), "bias": (3,)}, forwards.linear),
    LayerRow(
        "linear shared", Linear(4, 3, bias=False), (6, 2, 5, 4), (6, 2, 5, 3), {"weight": (3, 4)}, forwards.linear
    ),
    LayerRow(
        "linear transposed",
        Linear(4, 3, transposed=True),
        (6, 4),
        (6, 3),
        {"weight": (4, 3), "bias": (3,)},
        forwards.kernel,
    ),
    LayerRow(
        "conv channels last",
        Conv(_window, (4, 6)),
        (5, 7, 8, 4),
        (5, 4, 9, 6),
        {"weight": (3, 2, 4, 6), "bias": (6,)},
        forwards.Convolution(_padding, _strides),
    ),
    LayerRow(
        "conv groups, channels first",
        Conv(_window, (4, 6), groups=2, channels_first=True),
        (5, 4, 7, 8),
        (5, 6, 4, 9),
        {"weight": (6, 2, 3, 2), "bias": (6,)},
        forwards.ChannelsFirst(forwards.Convolution(_padding, _strides, groups=2)),
    ),
    LayerRow(
        "conv 1d, circular",
        Conv(kf.Window((3,), padding=1), (4, 6), bias=False, padding_mode="circular"),
        (5, 7, 4),
        (5, 7, 6),
        {"weight": (3, 4, 6)},
        forwards.Convolution(((1, 1),), mode="wrap"),
    ),
    LayerRow(
        "conv 3d",
        Conv(kf.Window((2, 2, 2)), (2, 3)),
        (4, 3, 3, 3, 2),
        (4, 2, 2, 2, 3),
        {"weight": (2, 2, 2, 2, 3), "bias": (3,)},
        forwards.Convolution(((0, 0),) * 3),
    ),
    LayerRow("embedding", Embedding(7, 3), (6, 5), (6, 5, 3), {"weight": (7, 3)}, forwards.lookup, ids=7),
    LayerRow("embedding, one id", Embedding(7, 3), (6,), (6, 3), {"weight": (7, 3)}, forwards.lookup, ids=7),
    LayerRow("bias", Bias(3), (6, 5, 3), (6, 5, 3), {"bias": (3,)}, forwards.lone_bias),
    LayerRow(
        "gain",
        Gain(3),
        (6, 5, 3),
        (6, 5, 3),
        {"gain": (3,)},
        forwards.gain,
        gradients=lambda layer, gy, x: layer.scaled(gy, x, draws=True),
    ),
]

FRAMEWORKS = ["numpy", "torch", "jax", "tensorflow"]  # adapters/kfaccore_<name>
