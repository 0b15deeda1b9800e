"""A traced forward pass as a plan and its calls: uses of variables grouped into matrices, biases joined to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from kfaccore_tensorflow.biases import joined_biases
from kfaccore_tensorflow.capture import Scope, Scopes, every
from kfaccore_tensorflow.follow import Followed, followed, made_of
from kfaccore_tensorflow.halves import looked_up, table
from kfaccore_tensorflow.laid import laid
from kfaccore_tensorflow.layout import Matrix
from kfaccore_tensorflow.plan import Part, Plan
from kfaccore_tensorflow.reach import reaching, sole
from kfaccore_tensorflow.uses import Tensor, Use

Variable = Any
TIED = "its elements are used in matrices of different shapes"
LARGEST = 1 << 26  # elements of a variable whose pieces are compared one by one


@dataclass(frozen=True)
class Call:
    """One use of a part. turned: its matrix is the part's transposed; scopes: the layer calls around it; of_inputs:
    whether what the model was called on goes into its output, so that its rows are of the examples."""

    use: Use
    turned: bool
    scopes: tuple[Scope, ...]
    of_inputs: bool


@dataclass(frozen=True)
class Observed:
    """The plan, the calls of each part in the order of the graph, those of all layers, and the model's inputs."""

    plan: Plan
    calls: dict[str, list[Call]]
    scopes: Scopes
    inputs: tuple[Tensor, ...]


def observe(model: Any, outputs: Sequence[Tensor], scopes: Scopes, x: Any) -> Observed:
    """What the forward pass that made `outputs` of `x`, in the graph being traced, did with the model's trainable
    variables."""
    graph = tf.compat.v1.get_default_graph()
    inputs = tuple(t for t in tf.nest.flatten(x) if tf.is_tensor(t))
    leaves = [t for t in tf.nest.flatten(x, expand_composites=True) if tf.is_tensor(t)]
    made = made_of(leaves)
    names = named(model)
    trained = list(model.trainable_variables)
    parts: list[Part] = []
    calls: dict[str, list[Call]] = {}
    refused: dict[str, tuple[tuple[Variable, ...], str]] = {}
    unused: dict[str, tuple[Variable, ...]] = {}
    reach = reaching(outputs)
    ours = {id(v.value.handle) for v in trained}
    hot = made_of(inside for outside, inside in graph.captures if id(outside) in ours)
    scopes.laid = laid(graph, reach, made | {t.op.name for t in leaves}, hot)
    everything = followed(graph, reach, trained)
    remade = {id(v) for layer in every(model) if getattr(layer, "_remat_mode", None) for v in layer.trainable_variables}
    for one in everything:
        if id(one.variable) in remade and one.uses:
            one.reasons.append("its layer recomputes its outputs in the backward pass")
    grouped = {id(one.variable): _grouped(one) for one in everything}
    biases = joined_biases([one for one in everything if not one.reasons], lambda x: sole(x, outputs, reach))
    for one in everything:
        layer, name = names[id(one.variable)]
        groups = grouped[id(one.variable)]
        if one.reasons:
            so_far = refused.get(layer, ((), ""))
            reasons = dict.fromkeys([*filter(None, so_far[1].split("; ")), *one.reasons])
            refused[layer] = ((*so_far[0], one.variable), "; ".join(reasons))
        elif not one.uses:
            unused[layer] = (*unused.get(layer, ()), one.variable)
        elif id(one.variable) not in biases.joined:
            for i, (matrix, uses) in enumerate(groups):
                label = name if len(groups) == 1 else f"{name}[{i}]"
                while label in calls:  # layers of one name
                    label += "*"
                bias = biases.of.get(id(one.variable)) if len(groups) == 1 else None
                parts.append(_part(label, one.variable, matrix, uses, bias))
                ordered = sorted(uses, key=lambda pair: scopes.places.get(pair[0].out.op.name, 0))
                calls[label] = [
                    Call(use, turned, tuple(scopes.around(use.out.op)), use.out.op.name in made)
                    for use, turned in ordered
                ]
    return Observed(Plan(tuple(parts), refused, unused), calls, scopes, inputs)


def named(model: Any) -> dict[int, tuple[str, str]]:
    """{id of a variable: (its layer's path, its part's name)}: a matrix is named by its layer, others by themselves."""
    found: dict[int, tuple[str, str]] = {}
    waiting = [("", model)]
    seen = {id(model)}
    while waiting:
        path, layer = waiting.pop()
        inner = {id(v) for other in layer._layers for v in other.trainable_variables}
        for v in layer.trainable_variables:
            if id(v) in inner or id(v) in found:
                continue
            main = path and v.name in ("kernel", "embeddings")
            found[id(v)] = (path or v.name, path if main else f"{path}.{v.name}" if path else v.name)
        new = [other for other in layer._layers if id(other) not in seen]
        seen |= {id(other) for other in new}
        waiting += [(f"{path}.{other.name}" if path else other.name, other) for other in reversed(new)]
    return found


def _grouped(one: Followed) -> list[tuple[Matrix, list[tuple[Use, bool]]]]:
    """Uses by the matrix that they make of the variable, a matrix and its transpose being one; a reason is added where
    several share elements."""
    groups: dict[tuple, tuple[Matrix, list[tuple[Use, bool]]]] = {}
    for use in sorted(one.uses, key=lambda use: table(use.kind) is None):
        key = use.matrix.key
        turned = use.matrix.turned().key
        if turned in groups and key not in groups:
            groups[turned][1].append((use, True))
        else:
            groups.setdefault(key, (use.matrix, []))[1].append((use, False))
    if len(groups) > 1 and _overlap([matrix for matrix, _ in groups.values()], one.variable):
        one.reasons.append(TIED)
    return sorted(groups.values(), key=lambda group: group[0].offset)  # not by chance of the graph's order


def _overlap(matrices: Sequence[Matrix], variable: Variable) -> bool:
    size = int(np.prod(variable.shape))
    if size > LARGEST or sum(int(np.prod(m.sizes)) for m in matrices) > size:
        return True
    taken = np.zeros(size, np.int8)
    for matrix in matrices:
        layout = matrix.layout()
        layout.put(taken, layout.take(taken) + 1)
    return bool(taken.max() > 1)


def _part(name: str, variable: Variable, matrix: Matrix, uses: list[tuple[Use, bool]], bias: Any) -> Part:
    counted = Counter(use.out.op.type for use, _ in uses)
    how = tuple(op if many == 1 else f"{op} x {many}" for op, many in counted.items())
    lookup = all(looked_up(use.kind) and not turned for use, turned in uses)
    variables = {"weight": variable}
    matrices = {"weight": matrix}
    if bias is not None:
        variables["bias"], matrices["bias"] = bias
    return Part(name, variables, matrices, how, lookup)
