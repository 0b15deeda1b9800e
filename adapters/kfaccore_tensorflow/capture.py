"""Capture: while a graph is traced, which layer's call each operation belongs to, and the Keras masks there.

Layers are called as they are; only recurrent ones are unrolled, so that their steps are operations of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any

import keras
import tensorflow as tf

from kfaccore_tensorflow.attention import Attended, Told

Layer = Any
Tensor = Any


@dataclass(frozen=True)
class Scope:
    """One call of a layer: operations number start to end, the mask (batch, *positions) of its input, or None, that
    input, and what it attends where it is an attention layer."""

    layer: Layer
    start: int
    end: int
    mask: Tensor | None
    input: Any = None
    attended: Attended | None = None


@dataclass
class Scopes:
    """All calls of one forward pass, inner ones before those around them; the masks that attention was told, and those
    that other operations lay on tensors, by id."""

    calls: list[Scope] = field(default_factory=list)
    told: Told = field(default_factory=Told)
    laid: dict[int, list[Tensor]] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)  # name of an operation -> its number

    @cached_property
    def crossings(self) -> list[Scope]:
        """The calls of attention layers that look at others than their query; to be asked once all are noted."""
        return [scope for scope in self.calls if scope.attended is not None and scope.attended.keys]

    def around(self, op: Any) -> list[Scope]:
        """The calls that an operation belongs to, the innermost first."""
        place = self.places[op.name]
        return [scope for scope in self.calls if scope.start <= place < scope.end]


@contextmanager
def tap(model: Any) -> Iterator[Scopes]:
    """Notes the calls made inside, in a graph that is being traced; leaves no trace on the layers."""
    if tf.executing_eagerly():
        raise ValueError(
            "the forward pass is read while a graph of it is traced, and functions run eagerly: turn "
            "tf.config.run_functions_eagerly off"
        )
    graph = tf.compat.v1.get_default_graph()
    scopes = Scopes()
    layers = {id(layer): layer for layer in every(model)}
    replaced = {key: vars(layer).get("call") for key, layer in layers.items()}
    try:
        for layer in layers.values():
            vars(layer)["call"] = _seen(layer, _inline(layer.call), scopes, graph)  # past Keras's tracking
        yield scopes
    finally:
        for key, layer in layers.items():
            if replaced[key] is None:
                vars(layer).pop("call", None)
            else:
                vars(layer)["call"] = replaced[key]
        scopes.places = {op.name: i for i, op in enumerate(graph.get_operations())}


def every(layer: Layer) -> Iterator[Layer]:
    """A layer and all layers in it, once each."""
    seen = {id(layer)}
    waiting = [layer]
    while waiting:
        here = waiting.pop()
        yield here
        new = [inner for inner in here._layers if id(inner) not in seen]
        seen |= {id(inner) for inner in new}
        waiting += new


def _inline(call: Callable) -> Callable:
    """What a `tf.function` wraps: its operations then belong to the graph around it. Where it asks tensors in an `if`
    or a loop of Python it is converted, as the `tf.function` would do."""
    inner = getattr(call, "python_function", None)
    if inner is None:
        return call
    try:
        converted = tf.autograph.to_graph(inner)
    except Exception:  # of code whose source is not to be had; a model says itself what it cannot do then
        return inner
    return wraps(inner)(converted)


def _seen(layer: Layer, call: Callable, scopes: Scopes, graph: Any) -> Callable:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        here = tf.compat.v1.get_default_graph() is graph
        first: Any = args[0] if args else next(iter(kwargs.values()), None)
        start = graph.version
        attended = scopes.told.look(layer, call, args, kwargs) if here else None
        if isinstance(layer, keras.layers.RNN) and tf.is_tensor(first) and first.shape[1] is not None:
            mask = _mask(layer, first, kwargs, graph)
            found = _unrolled(layer, mask, lambda: call(*args, **kwargs))
        else:
            found = call(*args, **kwargs)
        if here:
            end = graph.version
            mask = _mask(layer, first, kwargs, graph)
            first = first if attended is None else attended.query
            scopes.calls.append(Scope(layer, start, end, mask, first, attended))
        return found

    return wrapper


def _unrolled(layer: Layer, mask: Tensor | None, call: Callable[[], Any]) -> Any:
    """What `call` gives with its steps one after the other.

    Keras's unrolled steps, run backwards, zero masked outputs by the mask as it stands and not by the reversed one, as
    its loop does: the loop is what the model is elsewhere, so that is done here.
    """
    if layer.unroll:  # so the model is everywhere
        return call()
    zeroed = layer.zero_output_for_mask
    there = mask if zeroed and layer.go_backwards and layer.return_sequences else None
    layer.unroll = True
    try:
        layer.zero_output_for_mask = zeroed and there is None
        found = call()
    finally:
        layer.unroll = False
        layer.zero_output_for_mask = zeroed
    if there is None:
        return found
    outputs, *states = tf.nest.flatten(found)
    there = tf.reverse(tf.cast(there, tf.bool), [1])
    for _ in range(outputs.shape.rank - 2):
        there = there[..., None]
    outputs = tf.where(there, outputs, tf.zeros_like(outputs))
    return [outputs, *states] if states else outputs


def _mask(layer: Layer, first: Any, kwargs: dict[str, Any], graph: Any) -> Tensor | None:
    """The mask of a call: of its input, or one that the layer makes itself, as an embedding does."""
    mask: Any = kwargs.get("mask")
    mask = getattr(first, "_keras_mask", None) if mask is None else mask
    if mask is None and tf.is_tensor(first) and type(layer).compute_mask is not keras.layers.Layer.compute_mask:
        mask = layer.compute_mask(first, None)
    if mask is None or not tf.is_tensor(mask):
        return None
    return mask if (mask.shape.rank or 0) >= 2 and getattr(mask, "graph", graph) is graph else None
