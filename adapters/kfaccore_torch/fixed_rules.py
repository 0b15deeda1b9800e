"""Operations through which shapes alone say which numbers of an argument go into which of the output.

Each rule is given a node, the examples of the numbers of one output (`fixed`), its shape, which argument is asked for,
its shape, and which output that is; it gives the examples of the argument's numbers, or None where it cannot say. What
the data are is asked nowhere: a mask, a frozen weight and a gate are all taken to let everything pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from kfaccore_torch.fixed import meet, reshaped
from kfaccore_torch.fixed_parts import Found, Shape, ends, joined, selected, signed, sliced, split, stacked, unbound
from kfaccore_torch.provenance import axis_of

_ELEMENTWISE = (
    "Add Sub Rsub Mul Div Addcmul Addcdiv Lerp Where MaskedFill Maximum Minimum Pow Remainder Fmod Atan2 Logaddexp Neg "
    "Abs Sgn Sign Exp Exp2 Expm1 Log Log2 Log10 Log1P Sqrt Rsqrt Reciprocal Sin Cos Tan Asin Acos Atan Sinh Cosh Tanh "
    "Sigmoid LogSigmoid Erf Erfc Relu LeakyRelu Elu Celu Selu Gelu Silu Mish Softplus Hardtanh Hardsigmoid Hardswish "
    "Hardshrink Softshrink Threshold Clamp ClampMin ClampMax PreluKernel RreluWithNoise NativeDropout FusedDropout "
    "Triu Tril Round Floor Ceil Trunc Frac NanToNum Conj ConjPhysical Real Imag Angle Complex ToCopy Clone Alias Expand"
)
_RESHAPED = "View UnsafeView ReshapeAlias Unsqueeze Squeeze"
_REDUCED = "Sum Mean Nansum Prod Amax Amin Max Min Median Mode Logsumexp Norm LinalgVectorNorm Var Std VarMean StdMean"
_ALONG = "Softmax LogSoftmax SafeSoftmax Cumsum Cumprod Cummax Cummin Logcumsumexp Glu"
_SPATIAL = re.compile(r"(?:Max|Avg|AdaptiveAvg|AdaptiveMax)Pool|Upsample|ReflectionPad|ReplicationPad")


class Passed:
    """The rule of a node's name, for one walk through a graph."""

    def __init__(self) -> None:
        self._ends: dict[Any, list[int | None]] = {}  # of a node in parts, asked for once: it is met once a part

    def __call__(self, node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> Found:
        """The examples of an argument's numbers."""
        name = node.name().split("Backward")[0]
        if name in ("Split", "UnsafeSplit", "SplitWithSizes", "Cat"):
            joins = name == "Cat"
            found = self._ends.get(node)
            if found is None:
                found = self._ends[node] = ends(node, joins, axis_of(node, len(out)))
            return (joined if joins else split)(node, x, out, i, shape, number, found)
        rule = _RULES.get(name)
        if rule is not None:
            return rule(node, x, out, i, shape, number)
        if _SPATIAL.match(name):
            axes = re.search(r"([123])D", name)
            return None if axes is None or len(out) != len(shape) else meet(x, range(-int(axes[1]), 0))
        if name.startswith("ScaledDotProduct") and len(out) == 4 and i < 3 and number == 0:
            heads = (1,) if shape[1] != out[1] else ()
            return meet(x, (*heads, *((-1,) if i == 0 else (-2, -1))))
        return None


def _elementwise(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray | None:
    lead = len(out) - len(shape)
    if lead < 0:
        return None
    x = meet(x, [a for a, n in enumerate(out) if n > 1 and (a < lead or shape[a - lead] == 1)])
    return x.reshape(x.shape[lead:])


def _view(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray | None:
    return reshaped(x, out, shape)


def _transposed(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray:
    return x.swapaxes(signed(node._saved_dim0), signed(node._saved_dim1))


def _permuted(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray:
    return x.transpose(np.argsort([signed(d) % len(out) for d in node._saved_dims]))


def _repeat(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray | None:
    lead = len(out) - len(shape)
    apart = (*out[:lead], *(n for a, size in enumerate(shape) for n in (out[lead + a] // max(1, size), size)))
    found = reshaped(x, out, apart)
    if found is None:
        return None
    found = meet(found, (*range(lead), *range(lead, len(apart), 2)))
    return found.reshape(found.shape[lead + 1 :: 2])


def _reduced(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray | None:
    if len(out) == len(shape):
        return x
    dims = getattr(node, "_saved_dim", None)
    dims = (dims,) if isinstance(dims, int) else dims or range(len(shape))
    axes = [signed(d) % len(shape) for d in dims]
    return np.expand_dims(x, tuple(axes)) if len(axes) + len(out) == len(shape) else None


def _along(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray:
    return meet(x, (axis_of(node, len(out)),)) if out else x


def _flip(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray:
    return np.flip(x, tuple(signed(d) for d in node._saved_dims))


def _roll(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray | None:
    dims = [signed(d) for d in node._saved_dims]
    return np.roll(x, [-signed(n) for n in node._saved_shifts], dims) if dims else None


def _padded(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray | None:
    before = [signed(n) for n in node._saved_pad][::2]  # of the last axis first
    for axis, start in zip(range(len(out) - 1, -1, -1), before, strict=False):
        if x.shape[axis] > 1:
            if start < 0 or start + shape[axis] > out[axis]:
                return None
            x = x.take(range(start, start + shape[axis]), axis)
    return x


def _product(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray:
    """Rows of the left factor see all columns, columns of the right one all rows."""
    return meet(x, (-2,) if i else (-1,))


def _added_product(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray | None:
    return _product(node, x, out, i - 1, shape, number) if i else _elementwise(node, x, out, i, shape, number)


def _vector(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray:
    return meet(x, (0,)) if i else x[:, None]


def _strided(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray | None:
    """A mean over images in the strides that a pooling promises; of others nothing tells which number is which."""
    return x if out == shape and node.next_functions[0][0].name().startswith("Mean") else None


def _dot(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray:
    return x.reshape(1)


def _images(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray | None:
    """Of the first argument, images."""
    return meet(x, range(1, len(out))) if i == 0 and len(out) == len(shape) else None


def _shuffled(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray:
    return meet(x, (-3, -2, -1))


def _normed(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray | None:
    axes = len(node._saved_normalized_shape)
    return meet(x, range(-axes, 0)) if i == 0 and out == shape else None


def _batch_normed(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray | None:
    if i or out != shape:
        return None
    return meet(x, [a for a in range(len(out)) if a != 1]) if node._saved_training else x


def _paired(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray:
    return x[..., None]


def _single(node: Any, x: np.ndarray, out: Shape, i: int, shape: Shape, number: int) -> np.ndarray:
    return meet(x, (-1,))[..., 0]


_RULES: dict[str, Callable[..., Found]] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_RESHAPED.split(), _view),
    **dict.fromkeys(_REDUCED.split(), _reduced),
    **dict.fromkeys(_ALONG.split(), _along),
    **dict.fromkeys(("T", "Transpose"), _transposed),
    **dict.fromkeys(("Mm", "Bmm"), _product),
    **dict.fromkeys(("Addmm", "Baddbmm"), _added_product),
    **dict.fromkeys(("Convolution", "NativeGroupNorm", "GridSampler2D", "GridSampler3D"), _images),
    **dict.fromkeys(("NativeLayerNorm", "FusedRmsNorm"), _normed),
    **dict.fromkeys(("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"), _batch_normed),
    "T": lambda node, x, out, i, shape, number: x.T,
    **dict.fromkeys(("PixelShuffle", "PixelUnshuffle", "ChannelShuffle"), _shuffled),
    "Permute": _permuted,
    "Repeat": _repeat,
    "Flip": _flip,
    "Roll": _roll,
    "ConstantPadNd": _padded,
    "Slice": sliced,
    "Select": selected,
    "Unbind": unbound,
    "Stack": stacked,
    "Mv": _vector,
    "Dot": _dot,
    "AsStrided": _strided,
    "ViewAsComplex": _paired,
    "ViewAsReal": _single,
}
