"""States of one example, as of a stateful recurrent layer on a batch of one: their first axis counts examples.

A row of them has as many elements as a bias, so that a sum of the two looks like a bias that is changed on its way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tensorflow.python.ops.handle_data_util import get_resource_handle_data

from kfaccore_tensorflow.uses import Tensor

WRITES = ("AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp")
SUMS = ("Sum", "Mean", "Max", "Min", "Prod", "All", "Any")  # what they leave of the axis is no example


def of_states(graph: Any, trained: Iterable[Any]) -> set[int]:
    """Ids of tensors (1, ...) that are made of a variable (1, ...) that is not trained and that the pass writes."""
    ours = {id(v.value.handle) for v in trained}
    written = {id(op.inputs[0]) for op in graph.get_operations() if op.type in WRITES}
    heads = [x for outside, x in graph.captures if id(x) in written and id(outside) not in ours and _of_one(x)]
    waiting = [y for x in heads for op in x.consumers() if op.type == "ReadVariableOp" for y in op.outputs]
    found: set[int] = set()
    while waiting:
        x = waiting.pop()
        if id(x) in found or x.shape.rank in (None, 0, 1) or x.shape[0] != 1:
            continue
        found.add(id(x))
        waiting += [y for op in x.consumers() if op.type not in SUMS for y in op.outputs]
    return found


def _of_one(handle: Tensor) -> bool:
    told = get_resource_handle_data(handle)
    if not told.is_set or len(told.shape_and_type) != 1:
        return False
    shape = told.shape_and_type[0].shape
    return not shape.unknown_rank and len(shape.dim) > 1 and shape.dim[0].size == 1
