"""Biases that are added to the output of a product or convolution: a last column of its matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from kfaccore_tensorflow.follow import Followed
from kfaccore_tensorflow.kinds import Convolution, Elementwise, Product
from kfaccore_tensorflow.layout import Matrix
from kfaccore_tensorflow.uses import AS_IT_IS, Tensor, Use

VIEWS = ("Reshape", "Squeeze", "ExpandDims")
SAME = ("Identity", "Cast")


@dataclass
class Biases:
    """Weights' ids with the bias variable and its matrix, and the ids of those biases."""

    of: dict[int, tuple[Any, Matrix]] = field(default_factory=dict)
    joined: set[int] = field(default_factory=set)


def joined_biases(everything: Sequence[Followed], sole: Callable[[Tensor], bool]) -> Biases:
    """A bias joins a weight when each is used with the other and with nothing else.

    sole   whether the prediction is made of a tensor through one operation alone: gradients of a product's output are
           those of its bias only where the product goes nowhere but into the sum
    """
    outputs = {id(use.out): (one, use) for one in everything for use in one.uses}
    found = Biases()
    for bias in everything:
        pairs = [(use, *_under(use, outputs, sole)) for use in bias.uses]
        weights = {id(one.variable): one for _, one, _ in pairs if one is not None}
        if len(weights) != 1 or any(one is None for _, one, _ in pairs):
            continue
        weight = next(iter(weights.values()))
        under = {id(product) for _, _, product in pairs}
        matrices = [_aligned(use, product) for use, _, product in pairs if product is not None]
        whole = len({m.key for m in matrices if m is not None}) == 1 and None not in matrices
        one_matrix = len({use.matrix.key for use in weight.uses}) == 1
        if whole and one_matrix and under == {id(use) for use in weight.uses} and id(weight.variable) not in found.of:
            assert matrices[0] is not None
            found.of[id(weight.variable)] = (bias.variable, matrices[0])
            found.joined.add(id(bias.variable))
    return found


def _under(
    use: Use, outputs: dict[int, tuple[Followed, Use]], sole: Callable[[Tensor], bool]
) -> tuple[Followed | None, Use | None]:
    """The product whose output this use adds to, if that is all it does and all the product is for."""
    kind = use.kind
    plain = isinstance(kind, Elementwise) and use.x is None and kind.sign > 0 and use.hot.changed == AS_IT_IS
    op = use.out.op
    if not plain or op.type not in ("BiasAdd", "Add", "AddV2"):
        return None, None
    here = next(x for x in op.inputs if x is not use.hot.tensor)
    one, product = outputs.get(id(_back(here, VIEWS + SAME)), (None, None))
    if (
        product is None
        or not _only(here, product.out, sole)
        or not isinstance(product.kind, Product | Convolution)
        or product.hot.changed != AS_IT_IS
    ):
        return None, None
    return one, product


def _back(here: Tensor, through: Sequence[str]) -> Tensor:
    """Through views, to where something was computed."""
    while here.op.type in through:
        here = here.op.inputs[0]
    return here


def _only(here: Tensor, start: Tensor, sole: Callable[[Tensor], bool]) -> bool:
    """Whether `start` and every view of it up to `here` goes nowhere else."""
    while here is not start and sole(here):
        here = here.op.inputs[0]
    return here is start and sole(here)


def _aligned(use: Use, product: Use) -> Matrix | None:
    """The bias as a column (blocks, d_out, 1) of the product's matrix; None where it does not span just that."""
    blocks, d_out, _ = product.matrix.sizes
    kind = use.kind
    assert isinstance(kind, Elementwise)
    if use.hot.layout.size != blocks * d_out:
        return None
    lone = tuple(axis for axis in use.hot.layout.axes if axis[0] > 1)
    here = next(x for x in use.out.op.inputs if x is not use.hot.tensor)
    places = [_place(here, axis, size, use, product) for axis, (size, _) in zip(kind.features, lone, strict=True)]
    if isinstance(product.kind, Convolution):
        channel = 1 if product.kind.channels_first else product.out.shape.rank - 1
        layout = use.hot.layout.reshaped((blocks, d_out)) if places in ([channel], []) else None
        return None if layout is None else Matrix.split(layout, (0,), (1,))
    if not isinstance(product.kind, Product):
        return None
    terms = product.kind.terms
    by_letter = {None if axis is None else terms.out[axis]: one for axis, one in zip(places, lone, strict=True)}
    if set(by_letter) - set(terms.blocks + terms.outs):
        return None
    groups = [tuple(by_letter.get(c, (1, 0)) for c in letters) for letters in (terms.blocks, terms.outs)]
    return Matrix(use.hot.layout.offset, *groups)


def _place(here: Tensor, axis: int, size: int, use: Use, product: Use) -> int | None:
    """Which axis of the product's output one of `size` in the sum is, seen through views; None where that is not known.

    Elements keep their order in views: an axis is the same where as many of them stand behind it.
    """
    out = product.out
    if here.shape.rank != use.out.shape.rank or here.shape[axis] != size:  # repeated along the bias
        return None
    if _back(here, SAME) is out:
        return axis
    behind = _behind(here, axis)
    same = [i for i, many in enumerate(out.shape) if many == size and _behind(out, i) == behind]
    # where axes of size 1 alone come and go, those of unknown size are the same
    told = not behind[1] or _back(here, (*SAME, "Squeeze", "ExpandDims")) is out
    return same[0] if len(same) == 1 and told else None


def _behind(x: Tensor, axis: int) -> tuple[int, int]:
    """Elements behind an axis, along axes of known size, and how many others there are."""
    sizes = x.shape[axis + 1 :]
    return prod(size for size in sizes if size is not None), sum(size is None for size in sizes)
