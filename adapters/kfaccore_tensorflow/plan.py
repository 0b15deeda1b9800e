"""Which variables of a model kfaccore covers, layer by layer, and why it leaves the others alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from kfaccore import Block, Window
from kfaccore.layers import Embedding, Linear
from kfaccore_tensorflow.einsum import Einsum, spelled
from kfaccore_tensorflow.kinds import Convolution, Plain, Scale, Shift

Layer = Any
Variable = Any
LOOPS = (keras.layers.RNN, keras.layers.Bidirectional, keras.layers.TimeDistributed)


@dataclass(frozen=True)
class Part:
    """One matrix of the equation: its kind, its variables by role, and the layers whose calls feed it."""

    name: str
    kind: Any
    variables: dict[str, Variable]
    layers: tuple[Layer, ...]

    def times(self, calls: dict[int, list]) -> int:
        """How many of the calls seen feed it."""
        return sum(len(calls[id(layer)]) for layer in self.layers)

    def matrix(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Arrays like the variables, by role -> the matrix."""
        return self.kind.matrix(arrays)

    def arrays(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `matrix`, in the variables' own shapes."""
        named = self.kind.parameters(matrix)
        return {role: named[role].reshape(tuple(v.shape)) for role, v in self.variables.items()}


@dataclass(frozen=True)
class Plan:
    """`parts` are covered; `refused` maps a layer to (variables, reason). print(plan) is the coverage report."""

    parts: tuple[Part, ...]
    refused: dict[str, tuple[tuple[Variable, ...], str]]

    def blocks(self) -> dict[str, Block]:
        """Sizes of every part."""
        return {part.name: part.kind.block() for part in self.parts}

    def check(self, variables: Iterable[Variable]) -> None:
        """ValueError unless `variables`, those now trained, are variables of the plan, a part's all or none."""
        now = {id(v): v for v in variables}
        split = [p.name for p in self.parts if len({id(v) in now for v in p.variables.values()}) == 2]
        known = {id(v) for p in self.parts for v in p.variables.values()}
        known |= {id(v) for refused, _ in self.refused.values() for v in refused}
        changed = [*split, *(v.path for key, v in now.items() if key not in known)]
        if changed:
            raise ValueError(f"what is trained has changed since the plan was made, at {changed}: make a new one")

    def __str__(self) -> str:
        rows = [(p.name, _shapes(p.variables.values()), type(p.layers[0]).__name__) for p in self.parts]
        rows += [(name, _shapes(v), "PLAIN GRADIENT: " + reason) for name, (v, reason) in self.refused.items()]
        widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
        return "\n".join(f"{name:{widths[0]}}  {shape:{widths[1]}}  {what}" for name, shape, what in rows)


def coverage(model: Any, strict: bool = False) -> Plan:
    """The plan of a built model; print it. With `strict`, ValueError when a trainable variable is not covered."""
    trained = {id(v) for v in model.trainable_variables}
    if not model.built:
        raise ValueError(f"model {model.name!r} has no variables yet: build it, or call it on a batch, first")
    parts: list[Part] = []
    refused: dict[str, tuple[tuple[Variable, ...], str]] = {}
    for name, layer, looped in _walk(model, "", {id(model)}):
        own = tuple(v for v in _own(layer) if id(v) in trained)
        if not own:
            continue
        reason = f"it runs inside {looped}, whose steps leave no outputs to read" if looped else _refusal(layer)
        try:
            parts += [] if reason else TABLE[type(layer)](name, layer, trained)
        except ValueError as error:
            reason = str(error)
        if reason:
            refused[name] = (own, reason)
    parts, refused = _tied(parts, refused)
    if strict and refused:
        listed = "; ".join(f"{name}: {reason}" for name, (_, reason) in refused.items())
        raise ValueError(f"not covered: {listed}. Pass strict=False to give their variables plain gradients")
    return Plan(tuple(parts), refused)


def _walk(layer: Layer, path: str, seen: set[int], looped: str = "") -> Iterator[tuple[str, Layer, str]]:
    """(path, layer, name of the loop around it) of every layer once, depth first."""
    if path or not hasattr(layer, "layers"):
        yield path or layer.name, layer, looped
    looped = looped or (type(layer).__name__ if isinstance(layer, LOOPS) else "")
    for inner in layer._layers:
        if id(inner) not in seen:
            seen.add(id(inner))
            yield from _walk(inner, f"{path}.{inner.name}" if path else inner.name, seen, looped)


def _own(layer: Layer) -> list[Variable]:
    """Trainable variables of a layer itself."""
    inner = {id(v) for other in layer._layers for v in other.trainable_variables}
    return [v for v in layer.trainable_variables if id(v) not in inner]


def _refusal(layer: Layer) -> str | None:
    """Why a layer cannot be read, if so."""
    kind = type(layer)
    if kind not in TABLE:
        parent = next((known.__name__ for known in TABLE if isinstance(layer, known)), None)
        if parent:
            return f"{kind.__name__} is a subclass of {parent}, whose call may compute something else"
        return f"{kind.__name__} has no row in the table"
    if getattr(layer, "lora_enabled", False):
        return f"{kind.__name__} has LoRA enabled: its matrix is a frozen kernel plus a product"
    if getattr(layer, "quantization_mode", None) is not None:
        return f"{kind.__name__} is quantised to {layer.quantization_mode}"
    if getattr(layer, "_remat_mode", None) is not None:
        return f"{kind.__name__} recomputes its outputs in the backward pass"
    return f"the call of this {kind.__name__} was replaced" if "call" in vars(layer) else None


def _tied(parts: list[Part], refused: dict) -> tuple[list[Part], dict]:
    """Layers that share all their variables become one part; those that share only some are refused."""
    groups: dict[tuple, Part] = {}
    for part in parts:
        key = (part.kind, tuple((role, id(v)) for role, v in part.variables.items()))
        groups[key] = replace(groups[key], layers=groups[key].layers + part.layers) if key in groups else part
    uses: dict[int, int] = {}
    for part in groups.values():
        for v in part.variables.values():
            uses[id(v)] = uses.get(id(v), 0) + 1
    kept = []
    refused = dict(refused)
    for part in groups.values():
        variables = tuple(part.variables.values())
        if any(uses[id(v)] > 1 for v in variables):
            refused[part.name] = (
                variables,
                "it shares some variables with another layer, but not all in the same roles",
            )
        else:
            kept.append(part)
    return kept, refused


def _shapes(variables: Iterable[Variable]) -> str:
    return " ".join("x".join(str(size) for size in v.shape) for v in variables)


def _roles(layer: Layer, trained: set[int], weight: str = "kernel") -> dict[str, Variable]:
    """{"weight", "bias"} as far as they are trained."""
    bias = getattr(layer, "bias", None)
    roles = {"weight": getattr(layer, weight)}
    if bias is not None and id(bias) in trained:
        roles["bias"] = bias
    if id(roles["weight"]) not in trained:
        raise ValueError(f"the {weight} is frozen and another variable is not")
    return roles


def _dense(name: str, layer: Layer, trained: set[int]) -> list[Part]:
    roles = _roles(layer, trained)
    d_in, d_out = (int(size) for size in layer.kernel.shape)
    kind = Linear(d_in, d_out, "bias" in roles, transposed=True)
    return [Part(name, Plain(kind), roles, (layer,))]


def _einsum(name: str, layer: Layer, trained: set[int]) -> list[Part]:
    roles = _roles(layer, trained)
    terms = spelled(layer.equation, layer.input_spec.ndim)
    output = terms[2]
    axes = layer.bias_axes or ""
    full = "bias" in roles and set(axes) == set(output) & set(terms[1])
    kind = Einsum(terms, tuple(int(size) for size in layer.kernel.shape), full)
    if full or "bias" not in roles:
        return [Part(name, kind, roles, (layer,))]
    if output.index(terms[0][0]) != 0 or terms[0][0] in axes:
        raise ValueError(f"the equation {layer.equation!r} has a bias along the batch or a batch that moves")
    lone = Shift(tuple(output.index(c) for c in output if c in axes), int(np.prod(roles["bias"].shape)))
    return [
        Part(name, kind, {"weight": roles["weight"]}, (layer,)),
        Part(f"{name}.bias", lone, {"weight": roles["bias"]}, (layer,)),
    ]


def _conv(name: str, layer: Layer, trained: set[int]) -> list[Part]:
    roles = _roles(layer, trained)
    *kernel, c_in, c_out = (int(size) for size in layer.kernel.shape)
    depthwise = hasattr(layer, "depth_multiplier")
    groups = c_in if depthwise else layer.groups
    channels = (c_in, c_in * c_out) if depthwise else (c_in * groups, c_out)
    window = Window(tuple(kernel), layer.strides, 0, layer.dilation_rate)
    first = layer.data_format == "channels_first"
    return [Part(name, Convolution(window, layer.padding, channels, groups, "bias" in roles, first), roles, (layer,))]


def _embedding(name: str, layer: Layer, trained: set[int]) -> list[Part]:
    kind = Embedding(*(int(size) for size in layer.embeddings.shape))
    return [Part(name, Plain(kind), _roles(layer, trained, "embeddings"), (layer,))]


def _norm(name: str, layer: Layer, trained: set[int]) -> list[Part]:
    if layer.rms_scaling:
        raise ValueError("LayerNormalization with rms_scaling normalises by something else")
    if any(axis >= 0 for axis in layer.axis):
        raise ValueError(f"LayerNormalization over axes {layer.axis}; need negative ones, counted from the last")
    parts = []
    for role, variable in (("gamma", layer.gamma), ("beta", layer.beta)):
        if variable is not None and id(variable) in trained:
            axes = tuple(layer.axis)
            d = int(np.prod(variable.shape))
            kind = Scale(axes, d, float(layer.epsilon)) if role == "gamma" else Shift(axes, d)
            parts.append(Part(f"{name}.{role}", kind, {"weight": variable}, (layer,)))
    return parts


_k = keras.layers
TABLE: dict[type, Callable[[str, Layer, set[int]], list[Part]]] = {
    _k.Dense: _dense,
    _k.EinsumDense: _einsum,
    _k.Embedding: _embedding,
    _k.LayerNormalization: _norm,
    **dict.fromkeys((_k.Conv1D, _k.Conv2D, _k.Conv3D, _k.DepthwiseConv1D, _k.DepthwiseConv2D), _conv),
}
