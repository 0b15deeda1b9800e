"""Capture: the calls of known layers are seen from inside, before the activation, while a tape runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kfaccore_tensorflow.plan import Plan

Calls = dict[int, list[tuple[Any, Any]]]


@contextmanager
def tap(plan: Plan) -> Iterator[Calls]:
    """{id of a layer: [(input, output before the activation), ...]} of the calls made inside; leaves no trace.

    Under tf.function it must be entered while tracing: a graph made before sees nothing.
    """
    calls: Calls = {id(layer): [] for part in plan.parts for layer in part.layers}
    layers = {id(layer): layer for part in plan.parts for layer in part.layers}
    try:
        for key, layer in layers.items():
            vars(layer)["call"] = _seen(layer, layer.call, calls[key])  # past Keras's tracking of attributes
        yield calls
    finally:
        for layer in layers.values():
            vars(layer).pop("call", None)


def _seen(layer: Any, call: Callable, found: list) -> Callable:
    def wrapper(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        activation = getattr(layer, "activation", None)
        try:
            if activation is not None:
                vars(layer)["activation"] = None
            output = call(inputs, *args, **kwargs)
        finally:
            if activation is not None:
                vars(layer)["activation"] = activation
        found.append((inputs, output))
        return output if activation is None else activation(output)

    return wrapper
