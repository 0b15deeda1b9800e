"""What a forward pass changes beside its outputs: every variable that it writes, whoever owns it. Statistics of
normalisations, states of seeds and of recurrence, counters and metrics of one's own layers; and the generators of
Python and NumPy, from which layers draw numbers while they are traced."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.auto_control_deps_utils import get_read_write_resource_inputs
from tensorflow.python.ops.handle_data_util import get_resource_handle_data

from kfaccore_tensorflow.bridge import ASKED

Tensor = Any
Variable = Any
Operation = Any
LASTING = (  # operations on what is no variable, whose trace stays
    "IteratorGetNext",
    "LookupTableImportV2",
    "LookupTableInsertV2",
    "LookupTableRemoveV2",
    "QueueDequeueV2",
    "QueueEnqueueV2",
)
REPEATED = (  # those that TensorFlow runs in order, as it does those with a state, and that give the same again
    "Case",
    "CheckNumerics",
    "CheckNumericsV2",
    "DebugIdentityV2",
    "DebugIdentityV3",
    "DebugNumericSummaryV2",
    "DeviceIndex",
    "GuaranteeConst",
    "If",
    "Print",
    "RemoteCall",
    "StatefulPartitionedCall",
    "StatelessRandomGetAlg",
    "While",
    "XlaCallModule",
)
HANDLES = (tf.resource, tf.variant)


@dataclass(frozen=True)
class Pinned:
    """Handles of variables that a pass changed, with their values before it and after.

    trained    those that are trained, and that each pass makes anew of what they are, as SpectralNormalization does
    drawn      the generators before the pass was traced
    numbers    hashes of constants that were traced
    """

    handles: Sequence[Tensor]
    before: Sequence[Tensor]
    after: Sequence[Tensor]
    trained: Sequence[Variable] = ()
    drawn: Any = None
    numbers: frozenset[int] = frozenset()

    @contextmanager
    def again(self) -> Iterator[list[str]]:
        """Another pass, in the graph that is being traced, which draws what the first one drew and leaves no trace.

        Afterwards the list names numbers that it was traced with and the first one was not.
        """
        stepped = [tf.identity(v) for v in self.trained]
        self._set(self.before)
        drawn = _generators()
        _generate(self.drawn)
        graph: Any = tf.compat.v1.get_default_graph()
        start = len(graph.get_operations())
        other: list[str] = []
        try:
            yield other
        finally:
            _generate(drawn)
        other += sorted(name for value, name in _constants(graph, start).items() if value not in self.numbers)
        self._set(self.after)
        for v, value in zip(self.trained, stepped, strict=True):
            v.assign(value)

    def _set(self, values: Sequence[Tensor]) -> None:
        for handle, value in zip(self.handles, values, strict=True):
            tf.raw_ops.AssignVariableOp(resource=handle, value=value)


class Watch:
    """Of a model, from the beginning of a pass on until `pinned`; its values are those of the moment it was made."""

    def __init__(self, model: Any) -> None:
        self.graph: Any = tf.compat.v1.get_default_graph()
        self.start = len(self.graph.get_operations())
        self.trained = list(model.trainable_variables)
        self.drawn = _generators()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # id of a handle in the graph -> the one outside, the value
        self._own = {id(v.value.handle) for v in self.trained}
        for outside, inside in list(self.graph.captures):
            self._note(outside, inside)
        capture = self.graph.capture

        def captured(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            found = capture(tensor, *args, **kwargs)
            if found is not tensor:
                self._note(tensor, found)
            return found

        # a variable is read when the graph first meets it, which is before any operation on it
        self.graph.capture = captured

    def _note(self, outside: Tensor, inside: Tensor) -> None:
        if inside.dtype != tf.resource or id(inside) in self.before or id(outside) in self._own:
            return
        told = get_resource_handle_data(inside)
        if told.is_set and len(told.shape_and_type) == 1:
            value = tf.raw_ops.ReadVariableOp(resource=inside, dtype=tf.as_dtype(told.shape_and_type[0].dtype))
            self.before[id(inside)] = outside, value

    def pinned(self) -> Pinned:
        """What has changed since; no more is noted."""
        del self.graph.capture  # the class's own again
        inside = {id(outside): tensor for outside, tensor in self.graph.captures}
        written = self._written()
        changed = [pair for key, pair in self.before.items() if key in written]
        handles = [outside for outside, _ in changed]
        after = [tf.raw_ops.ReadVariableOp(resource=h, dtype=value.dtype) for h, value in changed]
        trained = [v for v in self.trained if id(inside.get(id(v.value.handle))) in written]
        numbers = frozenset(_constants(self.graph, self.start))
        return Pinned(handles, [value for _, value in changed], after, trained, self.drawn, numbers)

    def loose(self) -> list[str]:
        """Operations of the pass whose draws another pass does not repeat, or of which that cannot be seen."""
        bodies = [body.graph.get_operations() for body in self.graph._functions.values()]
        every = [*self.graph.get_operations()[self.start :], *(op for ops in bodies for op in ops)]
        return sorted({f"{op.name} ({op.type})" for op in every if _loose(op)})

    def _written(self) -> set[int]:
        """Handles that may have been written."""
        written = set()
        for op in self.graph.get_operations()[self.start :]:
            written |= {id(x) for x in get_read_write_resource_inputs(op)[1]}  # as far as TensorFlow knows
        return written


def _loose(op: Operation) -> bool:
    """Draws of TensorFlow that keep their own count, queues and tables, and whatever else has a state that is in no
    variable: functions of Python and NumPy, clocks, operations of others."""
    if "seed2" in op.node_def.attr or op.type in LASTING:
        return True
    held = any(x.dtype in HANDLES for x in (*op.inputs, *op.outputs))
    silent = held or not op.outputs or op.type in REPEATED
    return op.op_def.is_stateful and not silent and not op.name.rpartition("/")[2].startswith(ASKED)


def _constants(graph: Any, start: int) -> dict[int, str]:
    """Hashes of real numbers that were traced since, and where. Integers are sizes and places, others where a loop is
    not unrolled."""
    new = [op for op in graph.get_operations()[start:] if op.type == "Const" and op.outputs[0].dtype.is_floating]
    return {hash(op.get_attr("value").SerializeToString()): op.name for op in new}


def _generators() -> tuple[Any, Any]:
    """States of those of Python and NumPy that all share."""
    return random.getstate(), np.random.get_state(legacy=False)


def _generate(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
