"""A Keras model on the JAX backend as a function of its variables, {path: array}, which `plan` follows."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

Arrays = dict[str, Any]


def keras_apply(model: Any, training: bool = True) -> tuple[Callable, Arrays]:
    """(apply, params): `apply(params, x)` is the model's prediction, params its trainable variables by path.

    training   as Keras's layers take it; a model that moves variables then (the averages of BatchNormalization, the
               seeds of Dropout) is refused with their paths: `keras_stateful` hands them through

    x is what the model takes: an array, or a list or dict of arrays. Variables that are not trained keep the values
    they have when `apply` is traced. Penalties (regularizers, add_loss) are no part of a prediction, and are refused.
    """
    stateful, params, _ = keras_stateful(model, training)

    def apply(params: Arrays, x: Any) -> Any:
        state = _values(model.non_trainable_variables)
        prediction, after = stateful(params, x, state)
        moved = [path for path, value in after.items() if value is not state[path]]
        if moved:
            raise ValueError(f"{model.name} moves {moved} in training; use keras_stateful(model), or training=False")
        return prediction

    return apply, params


def keras_stateful(model: Any, training: bool = True) -> tuple[Callable, Arrays, Arrays]:
    """(apply, params, state): `apply(params, x, state)` gives (prediction, state after).

    state is every variable that is not trained, by path; with `plan(apply, params, x, state, has_aux=True)` and
    `capture(plan, params, x, state)` the state after is `captured.aux`.
    """
    import keras

    if keras.backend.backend() != "jax":
        raise ValueError(f"Keras runs on {keras.backend.backend()!r}; set KERAS_BACKEND=jax before keras is imported")
    if not model.built:
        raise ValueError(f"{model.name} has no variables yet; give it an Input, or call it on a batch")
    trained = _paths(model.trainable_variables)
    rest = _paths(model.non_trainable_variables)
    options = {"training": training} if "training" in inspect.signature(model.call).parameters else {}

    def apply(params: Arrays, x: Any, state: Arrays) -> tuple[Any, Arrays]:
        values = [params[path] for path in trained], [state[path] for path in rest]
        prediction, after, losses = model.stateless_call(*values, x, return_losses=True, **options)
        if losses:
            raise ValueError(f"{model.name} adds {len(losses)} penalties; take them out, Schedules(l2=...) is one")
        return prediction, dict(zip(rest, after, strict=True))

    own = _values(model.trainable_variables), _values(model.non_trainable_variables)
    params, state = ({path: jnp.copy(x) for path, x in arrays.items()} for arrays in own)  # these may be donated
    return apply, params, state


def keras_assign(model: Any, values: Mapping[str, Any]) -> None:
    """Writes {path: array}, params or state, into the model's variables: before predict, evaluate or save."""
    variables = dict(zip(_paths(model.variables), model.variables, strict=True))
    unknown = sorted(set(values) - set(variables))
    if unknown:
        raise ValueError(f"{model.name} has no variables {unknown}; need paths of model.variables")
    for path, value in values.items():
        variables[path].assign(value)


def _paths(variables: list) -> list[str]:
    paths = [v.path for v in variables]
    twice = sorted(path for path, count in Counter(paths).items() if count > 1)
    if twice:
        raise ValueError(f"several variables have the path {twice}; give their layers names that differ")
    return paths


def _values(variables: list) -> Arrays:
    return {path: v.value for path, v in zip(_paths(variables), variables, strict=True)}
