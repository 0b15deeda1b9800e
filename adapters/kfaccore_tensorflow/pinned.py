"""What a forward pass changes beside its outputs: statistics of normalisations, states of seeds and of recurrence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.auto_control_deps_utils import get_read_write_resource_inputs

Tensor = Any
Variable = Any


@dataclass(frozen=True)
class Pinned:
    """Variables that a pass changed, with their values before it and after.

    trained    those that are trained, and that each pass makes anew of what they are, as SpectralNormalization does
    """

    variables: Sequence[Variable]
    before: Sequence[Tensor]
    after: Sequence[Tensor]
    trained: Sequence[Variable] = ()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Another pass, in the graph that is being traced, which draws what the first one drew and leaves no trace."""
        stepped = [tf.identity(v) for v in self.trained]
        for v, value in zip(self.variables, self.before, strict=True):
            v.assign(value)
        yield
        for v, value in zip((*self.variables, *self.trained), (*self.after, *stepped), strict=True):
            v.assign(value)


class Watch:
    """Of a model, from the beginning of a pass on; its values are those of the moment it was made."""

    def __init__(self, model: Any) -> None:
        self.graph = tf.compat.v1.get_default_graph()
        self.start = len(self.graph.get_operations())
        self.variables = list(model.non_trainable_variables)
        self.values = [tf.identity(v) for v in self.variables]
        self.trained = list(model.trainable_variables)

    def pinned(self) -> Pinned:
        """What has changed since."""
        inside = {id(outside): tensor for outside, tensor in self.graph.captures}
        written = self._written()
        changed = [i for i, v in enumerate(self.variables) if id(inside.get(id(v.value.handle))) in written]
        variables = [self.variables[i] for i in changed]
        trained = [v for v in self.trained if id(inside.get(id(v.value.handle))) in written]
        return Pinned(variables, [self.values[i] for i in changed], [tf.identity(v) for v in variables], trained)

    def loose(self) -> list[str]:
        """Operations of the pass whose draws another pass does not repeat: those of TensorFlow that keep their own
        count, and those of a variable that is not the model's."""
        inside = {id(tensor): outside for outside, tensor in self.graph.captures}
        known = {id(v.value.handle) for v in (*self.variables, *self.trained)}
        bodies = [body.graph.get_operations() for body in self.graph._functions.values()]
        every = [*self.graph.get_operations()[self.start :], *(op for ops in bodies for op in ops)]
        found = {f"{op.name} ({op.type})" for op in every if "seed2" in op.node_def.attr}
        foreign = [key for key in self._written() if key in inside and id(inside[key]) not in known]
        if foreign and "AssignVariableOp" in {op.type for op in every}:
            found.add(
                "a variable that is none of the model's, as of keras.random without a SeedGenerator of the model's"
            )
        return sorted(found)

    def _written(self) -> set[int]:
        """Handles that may have been written."""
        written = set()
        for op in self.graph.get_operations()[self.start :]:
            written |= {id(x) for x in get_read_write_resource_inputs(op)[1]}  # as far as TensorFlow knows
        return written
