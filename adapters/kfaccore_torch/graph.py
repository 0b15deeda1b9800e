"""What autograd kept of a prediction: which calls lie behind it, and which parameters reach it past them.

The walk starts at the prediction and jumps from the output of a captured call to its input. A covered parameter that
is met on the way went into the prediction by a road that no call explains: through another argument, a copy of the
weight, a call outside the capture, or a derivative of the network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

MOVES = re.compile(
    "Index|Gather|Scatter|Sort|Topk|Kthvalue|Select.*Masked|MaskedSelect|Take|^Put|Unique|Segment|Embedding"
)
PRODUCTS = re.compile("^(Mm|Bmm|Addmm|Baddbmm|Sparse|Spmm)")
_SAVED = {
    "SelectBackward0": ("_saved_dim", "_saved_index"),
    "SliceBackward0": ("_saved_dim", "_saved_start", "_saved_end", "_saved_step"),
    "PermuteBackward0": ("_saved_dims",),
    "TransposeBackward0": ("_saved_dim0", "_saved_dim1"),
    "FlipBackward0": ("_saved_dims",),
    "RollBackward0": ("_saved_shifts", "_saved_dims"),
}


@dataclass(frozen=True)
class Behind:
    """What lies behind a prediction.

    moved     nodes with an operation between them and the prediction that moves rows as data say
    mixed     the same for a product with a matrix of data
    stray     covered parameters met past all calls, by id -> name of the operation they went into
    key       equal for graphs whose rows go the same way, moving operations aside
    """

    nodes: dict[Any, int]
    moved: frozenset
    mixed: frozenset
    stray: dict[int, str]
    key: int


def behind(predictions: Iterable[torch.Tensor], inputs: dict[Any, list[Any]], known: dict[int, Any]) -> Behind:
    """The walk from `predictions`.

    inputs   node of a captured call's output -> nodes of its inputs
    known    covered parameters by id
    """
    roots = [f.grad_fn for f in predictions]
    nodes: dict[Any, int] = {}
    below: dict[Any, list[Any]] = {}
    stray: dict[int, str] = {}
    marks: list[Any] = []
    waiting = [(root, None) for root in reversed(roots)]
    while waiting:
        node, above = waiting.pop()
        if node is None:
            continue
        if node in nodes:
            marks.append(nodes[node])
            continue
        nodes[node] = len(nodes)
        name = node.name()
        marks.append(_mark(node, name))
        variable = getattr(node, "variable", None) if name.endswith("AccumulateGrad") else None
        if variable is not None and id(variable) in known:
            stray[id(variable)] = _user(above, nodes, below)
        children = inputs.get(node)
        if children is None:
            children = [child for child, _ in node.next_functions]
            marks.append(tuple(number for _, number in node.next_functions))
        below[node] = children
        waiting.extend((child, node) for child in reversed(children))
    moved = _under(roots, below, lambda node: _moves(node))
    mixed = _under(roots, below, lambda node: _multiplies(node))
    return Behind(nodes, moved, mixed, stray, hash(tuple(marks)))


def origin(x: torch.Tensor | None) -> torch.Tensor | None:
    """The parameter that a tensor is a cast or an unchanged copy of, or the tensor itself."""
    node = None if x is None else x.grad_fn
    while node is not None and node.name() in ("ToCopyBackward0", "CloneBackward0", "AliasBackward0"):
        node = node.next_functions[0][0]
    return x if node is None else getattr(node, "variable", x)


def _mark(node: Any, name: str) -> Any:
    """What tells one operation's way of moving rows from another's."""
    saved = _SAVED.get(name)
    return name if saved is None else (name, *(str(getattr(node, attribute)) for attribute in saved))


def _moves(node: Any) -> bool:
    """Whether it may send rows where data say: an index, a sort, or a function written by hand."""
    return bool(MOVES.search(node.name())) or isinstance(node, torch.autograd.function.BackwardCFunction)


def _multiplies(node: Any) -> bool:
    """Whether it is a product of which one factor is data."""
    return bool(PRODUCTS.search(node.name())) and any(child is None for child, _ in node.next_functions)


def _under(roots: list[Any], below: dict[Any, list[Any]], test: Any) -> frozenset:
    """All nodes with one that passes the test above them."""
    found: set[Any] = set()
    waiting = [child for node in below if test(node) for child in below[node]]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        waiting.extend(below.get(node, ()))
    return frozenset(found)


def _user(above: Any, nodes: dict[Any, int], below: dict[Any, list[Any]]) -> str:
    """The first operation above a parameter that does more than turn or cast it."""
    plain = re.compile("^(T|Transpose|Permute|View|ReshapeAlias|ToCopy|Expand|Unsqueeze|Squeeze|Alias)Backward")
    while above is not None and plain.search(above.name()):
        found = next((node for node, children in below.items() if any(child is above for child in children)), None)
        if found is None:
            break
        above = found
    return "the prediction" if above is None else above.name()
