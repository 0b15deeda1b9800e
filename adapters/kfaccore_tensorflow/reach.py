"""Where gradients flow in a traced graph: what moves a prediction without one, as behind `tf.stop_gradient`, is no use.

TensorFlow's own register of gradients is asked, so that no list of operations is kept here.
"""

from __future__ import annotations

from collections.abc import Iterable

import tensorflow as tf
from tensorflow.python.framework.ops import get_gradient_function

from kfaccore_tensorflow.uses import Operation, Tensor

FUNCTION_OF_THE_USER = ("EagerPyFunc",)  # whose gradient is code that is not run here


def reaching(outputs: Iterable[Tensor]) -> set[str]:
    """Names of the operations through which gradients of `outputs` come to what they were made of."""
    waiting = [x.op for x in outputs]
    seen: set[str] = set()
    known: dict[tuple, bool] = {}
    while waiting:
        op = waiting.pop()
        if op.name in seen or not _flows(op, known):
            continue
        seen.add(op.name)
        waiting += [x.op for x in op.inputs if _carries(x)]
    return seen


def sole(tensor: Tensor, outputs: Iterable[Tensor], reach: set[str]) -> bool:
    """Whether gradients of `outputs` come to it through one operation alone."""
    through = {op.name for op in tensor.consumers() if op.name in reach}
    return len(through) == 1 and not any(tensor is x for x in outputs)


def _carries(x: Tensor) -> bool:
    return x.dtype.is_floating or x.dtype.is_complex or x.dtype in (tf.resource, tf.variant)


def _flows(op: Operation, known: dict[tuple, bool]) -> bool:
    """Whether a gradient comes out of an operation; what is found is kept in `known`, by its type and dtypes."""
    if not op.inputs or not any(_carries(x) for x in op.outputs):
        return any(_carries(x) for x in op.outputs)
    try:
        gradient = get_gradient_function(op)
    except LookupError:  # TensorFlow says so itself once the gradient is asked for
        return True
    if gradient is None:
        return False
    simple = len(op.inputs) <= 2 and all(_carries(x) and x.dtype not in (tf.resource, tf.variant) for x in op.inputs)
    own = op.type in FUNCTION_OF_THE_USER or "_gradient_op_type" in op.node_def.attr
    if not simple or own or op.graph is not tf.compat.v1.get_default_graph():
        return True
    key = (op.type, *(x.dtype for x in op.inputs))
    if key not in known:  # of `tf.round` a gradient is registered that is none
        try:
            found = gradient(op, *[tf.zeros_like(y) for y in op.outputs])
        except (LookupError, ValueError, TypeError, NotImplementedError):
            found = [True]
        known[key] = any(g is not None for g in tf.nest.flatten(found))
    return known[key]
