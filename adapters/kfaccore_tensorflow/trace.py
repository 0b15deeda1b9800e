"""A model's plan without a step: its forward pass is traced on the shapes it was built for, or on a batch's."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from kfaccore_tensorflow.capture import tap
from kfaccore_tensorflow.given import spec, tensor
from kfaccore_tensorflow.observe import observe
from kfaccore_tensorflow.plan import Plan


def coverage(model: Any, strict: bool = False, x: Any = None) -> Plan:
    """The plan of a built model; print it. With `strict`, ValueError when a trainable variable is not covered.

    x    a batch, for a model that does not know the shapes of its inputs: those of a subclassed model with several
    """
    if not model.built:
        raise ValueError(f"model {model.name!r} has no variables yet: build it, or call it on a batch, first")
    given = specs(model) if x is None else [tf.nest.map_structure(lambda leaf: spec(tensor(leaf)), x)]
    if not given:
        raise ValueError(f"model {model.name!r} does not tell its inputs: give a batch, coverage(model, x=batch)")
    failed: list[Exception] = []
    for one in given:
        try:
            plan = traced(model, one)
        except Exception as error:  # a model says in its own way what it cannot be called on
            failed.append(error)
            continue
        return plan.strictly() if strict else plan
    failed[0].add_note(f"model {model.name!r} was traced on {given[0]}: give a batch, coverage(model, x=batch)")
    raise failed[0]


def known(model: Any) -> Plan | None:
    """The plan where the model tells what it is called on; None where only a batch will show it: its lengths too, since
    what is written for any length may be written otherwise for one."""
    if not model.built:
        raise ValueError(f"model {model.name!r} has no variables yet: build it, or call it on a batch, first")
    for one in specs(model):
        if _open(one):
            continue
        try:
            return traced(model, one)
        except Exception:
            continue  # the first step traces the model on its batch, and says what is wrong
    return None


def specs(model: Any) -> list[Any]:
    """What it may be called on, likeliest first: its own inputs, or the shapes it was built with as numbers or ids."""
    inputs = getattr(model, "_inputs_struct", None)
    if inputs is None and getattr(model, "_functional", None) is not None:  # Sequential
        inputs = model._functional._inputs_struct
    if inputs is not None:
        return [tf.nest.map_structure(spec, inputs)]
    shapes = list((model._build_shapes_dict or {}).values())
    if len(shapes) != 1 or not all(isinstance(size, int | None) for size in shapes[0]):
        return []
    kinds = [keras.config.floatx(), "int32"]
    return [tf.TensorSpec((None, *shapes[0][1:]), kind) for kind in kinds]


def _open(inputs: Any) -> bool:
    """Whether an axis other than that of the examples is of any length."""
    return any(one.shape.rank is None or None in one.shape[1:] for one in tf.nest.flatten(inputs) if one is not None)


def traced(model: Any, inputs: Any) -> Plan:
    """The plan of one call, on tensors of such specs."""
    found: list[Plan] = []

    def forward(x: Any) -> Any:
        with tap(model) as scopes:
            f = model(x, training=True)
        heads = [t for t in tf.nest.flatten(f) if tf.is_tensor(t)]
        found.append(observe(model, heads, scopes, x).plan)
        return f

    tf.function(forward, autograph=False).get_concrete_function(inputs)
    return found[0]
