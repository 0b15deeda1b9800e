"""What a forward pass changes beside its outputs: every variable that it writes, whoever owns it. Statistics of
normalisations, states of seeds and of recurrence, counters and metrics of one's own layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.auto_control_deps_utils import get_read_write_resource_inputs
from tensorflow.python.ops.handle_data_util import get_resource_handle_data

Tensor = Any
Variable = Any
LASTING = (  # operations on what is no variable, whose trace stays
    "IteratorGetNext",
    "LookupTableImportV2",
    "LookupTableInsertV2",
    "LookupTableRemoveV2",
    "QueueDequeueV2",
    "QueueEnqueueV2",
)


@dataclass(frozen=True)
class Pinned:
    """Handles of variables that a pass changed, with their values before it and after.

    trained    those that are trained, and that each pass makes anew of what they are, as SpectralNormalization does
    """

    handles: Sequence[Tensor]
    before: Sequence[Tensor]
    after: Sequence[Tensor]
    trained: Sequence[Variable] = ()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Another pass, in the graph that is being traced, which draws what the first one drew and leaves no trace."""
        stepped = [tf.identity(v) for v in self.trained]
        self._set(self.before)
        yield
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
        return Pinned(handles, [value for _, value in changed], after, trained)

    def loose(self) -> list[str]:
        """Operations of the pass whose draws another pass does not repeat: those of TensorFlow that keep their own
        count, and those on queues and tables."""
        bodies = [body.graph.get_operations() for body in self.graph._functions.values()]
        every = [*self.graph.get_operations()[self.start :], *(op for ops in bodies for op in ops)]
        return sorted({f"{op.name} ({op.type})" for op in every if "seed2" in op.node_def.attr or op.type in LASTING})

    def _written(self) -> set[int]:
        """Handles that may have been written."""
        written = set()
        for op in self.graph.get_operations()[self.start :]:
            written |= {id(x) for x in get_read_write_resource_inputs(op)[1]}  # as far as TensorFlow knows
        return written
