"""What autograd kept of a prediction: which calls lie behind it, and which operations parameters went into.

The walk starts at the prediction and jumps from the output of a captured call to its input. A parameter that is met on
the way went into the prediction by an operation that no call is known of: that operation is found, and `explain` says
what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from operator import attrgetter
from typing import Any

import torch

from kfaccore_torch.data import weighs
from kfaccore_torch.provenance import output_shape, passes, shift, through
from kfaccore_torch.unusual import unusual_output
from kfaccore_torch.views import Ref

MOVES = re.compile(
    "Index|Gather|Scatter|Sort|Topk|Kthvalue|Select.*Masked|MaskedSelect|Take|^Put|Unique|Segment|Embedding|CopySlices"
)
_AS_THEY_ARE = (int, bool, str, tuple, type(None))
_FACTORS = ("Mm", "Bmm", "Addmm", "Baddbmm", "Mv", "Convolution")


@dataclass(frozen=True)
class Behind:
    """What lies behind a prediction.

    moved     nodes with an operation between them and the prediction that moves rows as data say, or weighs sums of
              them with data
    met       nodes of known parameters that were met past all calls
    below     node -> nodes that go into it
    above     node -> nodes it goes into; empty where nothing was met
    called    nodes of captured outputs
    key       equal for graphs whose rows go the same way, moving operations aside; which call is which node of it,
              `nodes` says
    """

    nodes: dict[Any, int]
    moved: frozenset
    met: tuple[Any, ...]
    below: dict[Any, list[Any]]
    above: dict[Any, list[Any]]
    called: frozenset
    key: int

    def users(self, node: Any) -> set[Any]:
        """Nodes it goes into."""
        return {user for user, children in self.below.items() if node in children}


def behind(predictions: Sequence[torch.Tensor], inputs: dict[Any, list[Any]], known: dict[int, str]) -> Behind:
    """The walk from `predictions`.

    inputs   node of a captured call's output -> (node, output) of its inputs
    known    parameters that are trained, by id
    """
    roots = [f.grad_fn for f in predictions]
    nodes: dict[Any, int] = {}
    below: dict[Any, list[Any]] = {}
    met: list[Any] = []
    marks: list[Any] = [tuple(f.output_nr for f in predictions)]
    waiting = list(reversed(roots))
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node in nodes:
            marks.append(nodes[node])
            continue
        nodes[node] = len(nodes)
        name = node.name()
        marks.append(_mark(node, name))
        if name.endswith("AccumulateGrad") and id(node.variable) in known:
            met.append(node)
        edges: Any = inputs.get(node, node.next_functions)
        children = [child for child, _ in edges]
        marks.append(tuple(number for _, number in edges))
        below[node] = children
        waiting.extend(reversed(children))
    moved = _under(roots, below, lambda node: _moves(node) or weighs(node))
    above = _turned(below) if met else {}
    return Behind(nodes, moved, tuple(met), below, above, frozenset(inputs), hash(tuple(marks)))


def operations(
    graph: Behind, known: dict[int, str], explains: Callable[[str], bool]
) -> tuple[dict[Any, dict[int, Ref]], dict[str, str]]:
    """Operations that parameters went into, each with the parts of parameters by argument; and names of parameters
    with why what they went into cannot be one. `explains` says of an operation's name whether it may be a layer's."""
    found: dict[Any, dict[int, Ref]] = {}
    odd: dict[str, str] = {}
    passed: set[Any] = set()  # expansions that a product takes in
    for leaf in graph.met:
        name = known[id(leaf.variable)]
        waiting = [(leaf, None)]
        while waiting:
            node, same = waiting.pop()
            users = graph.above.get(node, [])
            if not users:
                odd[name] = "it is the prediction itself"
            for user in dict.fromkeys(users):
                strange = unusual_output(user)
                if strange:
                    odd[name] = f"it goes into {user.name()} with {strange}"
                elif user in graph.called:
                    odd[name] = "it goes into the input of a layer's call"
                elif passes(user) or (shift(user) is not None and _taken(user, graph, known, name)):
                    waiting.append((user, user if user.name().startswith("ExpandBackward") else same))
                elif same is not None and not explains(user.name()):
                    found[same] = _refs(same, known)  # an expansion to one example, which a larger batch would show
                else:
                    found[user] = _refs(user, known)
                    if name not in {ref.name for ref in found[user].values()}:
                        odd[name] = f"it goes into {user.name()} in an order of its own"
    for node in list(found):
        if node.name().startswith("ExpandBackward"):
            _through_products(node, graph, known, found, passed)
    return {node: refs for node, refs in found.items() if node not in passed and refs}, odd


def _through_products(node: Any, graph: Behind, known: dict[int, str], found: dict, passed: set) -> None:
    """A parameter repeated along a stack of products is the parameter of the products, if nothing else takes it."""
    waiting = [node]
    products = []
    while waiting:
        users = graph.above.get(waiting.pop(), [])
        for user in dict.fromkeys(users):
            if user in graph.called:
                return
            if passes(user):
                waiting.append(user)
            else:
                products.append(user)
    refs = {user: _refs(user, known) for user in products}
    if products and all(user.name().startswith(("Bmm", "Baddbmm")) and refs[user] for user in products):
        found.update(refs)
        passed.add(node)


def _taken(node: Any, graph: Behind, known: dict[int, str], name: str) -> bool:
    """Whether all that a parameter and a constant added to it go into takes the parameter, as `1 + gain` is taken by
    the rows it multiplies. Else the sum is the operation: what is added may be the data themselves."""
    waiting = [node]
    while waiting:
        users = graph.above.get(waiting.pop(), [])
        if not users:
            return False
        for user in dict.fromkeys(users):
            if user in graph.called:
                return False
            if passes(user) or shift(user) is not None:
                waiting.append(user)
            elif name not in {ref.name for ref in _refs(user, known).values()}:
                return False
    return True


def _refs(node: Any, known: dict[int, str]) -> dict[int, Ref]:
    """Parts of parameters among the arguments of an operation; with a constant added where the operation repeats it,
    or is a product with nothing else of the model's."""
    repeats = node.name().startswith(("Bmm", "Baddbmm"))
    product = node.name().startswith(_FACTORS)
    refs: dict[int, Ref] = {}
    for shifts in (False, True):
        if shifts and product and refs:
            break
        for i, (child, number) in enumerate(node.next_functions):
            if child is None or i in refs or (shifts and not product and not _repeats(node, child, number)):
                continue
            ref = through(child, number, known, repeats, shifts)
            if ref is not None:
                refs[i] = ref
    return dict(sorted(refs.items()))


def _repeats(node: Any, child: Any, number: int) -> bool:
    """Whether an argument is smaller than what comes out."""
    if child.name().endswith("AccumulateGrad"):
        return False
    return prod(output_shape(child, number)) < prod(output_shape(node))


def _turned(below: dict[Any, list[Any]]) -> dict[Any, list[Any]]:
    above: dict[Any, list[Any]] = {}
    for node, children in below.items():
        for child in children:
            if child is not None:
                above.setdefault(child, []).append(node)
    return above


def _mark(node: Any, name: str) -> Any:
    """What tells one operation's way of moving rows from another's: all that it keeps but tensors, as sizes of a split
    or whether a norm trains; of numbers that are no integers whether they are zero."""
    read = _kept(type(node))
    return name if read is None else (name, *[v if type(v) in _AS_THEY_ARE else _told(v) for v in read(node)])


@cache
def _kept(kind: type) -> Callable[[Any], tuple[Any, ...]] | None:
    """Reads what a kind of node keeps but tensors, which only to read may run a hook; None where that is nothing."""
    names = dir(kind)
    tensors = {name.removeprefix("_raw") for name in names if name.startswith("_raw_saved_")}
    kept = [name for name in names if name.startswith("_saved_") and name not in tensors]
    if not kept:
        return None
    read = attrgetter(*kept)
    return read if len(kept) > 1 else lambda node: (read(node),)


def _told(value: Any) -> Any:
    return value != 0 if isinstance(value, float | complex) else str(value)


def _moves(node: Any) -> bool:
    """Whether it may send rows where data say: an index, a sort, or a function written by hand."""
    return bool(MOVES.search(node.name())) or isinstance(node, torch.autograd.function.BackwardCFunction)


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
