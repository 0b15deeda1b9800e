"""Whether an operation weighs sums of rows with data, so that data say whose row is whose.

A product with a matrix of data on the side of the rows, as a graph's nodes are pooled, or rows repeated beside data
that multiply or mask them, as by a mask of membership. What multiplies features, a frozen weight or a gate, does not.
Tensors that autograd saved are not read: to read one may run a checkpoint again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kfaccore_torch.provenance import output_shape

_SPARSE = ("Sparse", "Spmm")
_SUMMED = ("Addmm", "Baddbmm")  # their first argument is what is added
_PRODUCTS = ("Mm", "Bmm", *_SUMMED)
_TURNS = ("TBackward", "Transpose", "Permute")
_REPEATS = ("Expand", "Repeat")
_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Clone", "Alias", "ToCopy", *_TURNS, *_REPEATS)
_ELEMENTS = ("Mul", "Div", "Where", "MaskedFill")


def weighs(node: Any) -> bool:
    """Whether it does."""
    name = node.name()
    if name.startswith(_SPARSE):
        return True
    if name.startswith(_PRODUCTS):
        return _combines(node, name)
    return name.startswith(_ELEMENTS) and _beside_data(node, name) and _repeated(node)


def _combines(node: Any, name: str) -> bool:
    """Whether data are the left factor, or the right one of rows that were turned."""
    given = node.next_functions[1:] if name.startswith(_SUMMED) else node.next_functions
    left, right = (child for child, _ in given)
    if left is None:
        return right is not None
    return right is None and any(link.name().startswith(_TURNS) for link in _views(left))


def _beside_data(node: Any, name: str) -> bool:
    """Whether some argument has no gradient; conditions and masks never have."""
    return name.startswith(("Where", "MaskedFill")) or any(child is None for child, _ in node.next_functions)


def _repeated(node: Any) -> bool:
    """Whether rows were repeated along an axis, by this operation or by views before it; a parameter, as a mask token,
    is no row."""
    shape = output_shape(node)
    for child, number in node.next_functions:
        if child is None or _parameter(child):
            continue
        own = output_shape(child, number)
        whole = (*(1,) * (len(shape) - len(own)), *own)
        if any(n == 1 and m > 1 for n, m in zip(whole, shape, strict=True)):
            return True
        if any(link.name().startswith(_REPEATS) for link in _views(child)):
            return True
    return False


def _parameter(node: Any) -> bool:
    """Whether a node gives numbers of a parameter in another shape."""
    last = node
    for link in _views(node):
        last = link.next_functions[0][0]
    return last is not None and last.name().endswith("AccumulateGrad")


def _views(node: Any) -> Iterator[Any]:
    """A node and those under it, as long as they only show numbers in another shape."""
    while node is not None and node.name().startswith(_VIEWS):
        yield node
        node = node.next_functions[0][0]
