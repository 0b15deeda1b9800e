"""Biases that are added to the output of a product or convolution: a last column of its matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from kfaccore_tensorflow.follow import Followed
from kfaccore_tensorflow.kinds import Convolution, Elementwise, Product
from kfaccore_tensorflow.layout import Axis, Layout, Matrix
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
    bias = use.hot.layout
    if bias.size != blocks * d_out:
        return None
    if isinstance(product.kind, Convolution):
        channel = 1 if product.kind.channels_first else product.out.shape.rank - 1
        spanned = _spanned(use, product, {channel: d_out * blocks})
        if spanned is None:
            return None
        try:
            return Matrix(bias.offset, *Layout(0, spanned[channel]).grouped((blocks, d_out)))
        except ValueError:
            return None
    assert isinstance(product.kind, Product)
    terms = product.kind.terms
    sizes = {c: product.hot.layout.shape[terms.weight.index(c)] for c in terms.blocks + terms.outs}
    spanned = _spanned(use, product, {terms.out.index(c): size for c, size in sizes.items()})
    if spanned is None:
        return None
    groups = [[axis for c in letters for axis in spanned[terms.out.index(c)]] for letters in (terms.blocks, terms.outs)]
    return Matrix(bias.offset, *map(tuple, groups))


def _spanned(use: Use, product: Use, features: dict[int, int]) -> dict[int, tuple[Axis, ...]] | None:
    """The bias's axes along each of the product's `features`, places and sizes, seen through views; None where it runs
    along other axes.

    Elements keep their order in views: along those that it does not run along, a bias has stride 0.
    """
    kind = use.kind
    out = product.out
    assert isinstance(kind, Elementwise)
    here = next(x for x in use.out.op.inputs if x is not use.hot.tensor)
    lone = [axis for axis in use.hot.layout.axes if axis[0] > 1]
    if here.shape.rank != use.out.shape.rank or any(
        here.shape[place] != size for place, (size, _) in zip(kind.features, lone, strict=True)
    ):  # repeated along the bias
        return None
    wide = [place for place, size in features.items() if size > 1]
    runs = dict(zip(kind.features, lone, strict=True))
    # what stands before the first of them is rows, of whatever sizes
    first = min(runs, default=here.shape.rank)
    start = min(wide, default=out.shape.rank)
    if None in [*here.shape[first:], *out.shape[start:]] and _back(here, (*SAME, "Squeeze", "ExpandDims")) is not out:
        return None
    # where axes of size 1 alone come and go, those of unknown size are the same, in the same order
    axes = [runs.get(place, (here.shape[place] or 1, 0)) for place in range(first, here.shape.rank)]
    sizes = [out.shape[place] or 1 for place in range(start, out.shape.rank)]
    if prod(size for size, _ in axes) != prod(sizes):
        return None
    try:
        groups = dict(enumerate(Layout(0, tuple(axes)).grouped(sizes), start))
    except ValueError:
        return None
    along = {place for place, group in groups.items() if any(stride for _, stride in group)}
    whole = all(stride for place in wide for _, stride in groups[place])
    return {place: groups.get(place, ()) for place in features} if along == set(wide) and whole else None
