"""From what operations were seen to do with parameters to layers: one matrix a part, or a reason why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn

from kfaccore.layers import Bias, Conv, Embedding, Gain, Linear
from kfaccore_torch.calls import Mark
from kfaccore_torch.kinds import Tied
from kfaccore_torch.views import Ref, View, overlapping


@dataclass(frozen=True)
class Layer:
    """One matrix of the equation: a layer kind, and the parts of parameters that have its roles."""

    name: str
    kind: Any
    parameters: dict[str, nn.Parameter]
    paths: dict[str, str]  # role -> name of the parameter in the model
    views: dict[str, View]  # role -> which of its elements; all of it where a role is left out

    def view(self, role: str) -> View:
        """The part of a parameter that a role has."""
        return self.views.get(role) or View.whole(tuple(self.parameters[role].shape))

    def partial(self, role: str) -> bool:
        """Whether other elements of the parameter are no part of this layer."""
        return prod(self.view(role).shape) < self.parameters[role].numel()

    def matrix(self, arrays: dict[str, Any]) -> Any:
        """Arrays like the parameters, by role -> the matrix; gains and lone biases of any shape are vectors."""
        found = {role: self.views[role].take(x) if role in self.views else x for role, x in arrays.items()}
        if isinstance(self.kind, Bias):
            found = {role: x.reshape(-1) for role, x in found.items()}
        return self.kind.matrix(found)

    def arrays(self, matrix: Any) -> dict[str, Any]:
        """The inverse of `matrix`, in the parameters' own shapes; zeros where they are no part of this layer."""
        named = self.kind.parameters(matrix)
        found = {}
        for role, p in self.parameters.items():
            shape = tuple(p.shape)
            found[role] = self.views[role].put(named[role], shape) if role in self.views else named[role].reshape(shape)
        return found

    def write(self, role: str, to: torch.Tensor, x: torch.Tensor) -> None:
        """x, like the parameter, into a tensor like it, where this layer's elements are."""
        if not self.partial(role):
            to.copy_(x)
            return
        kept = to.contiguous()
        part = self.view(role).within(kept)
        new = self.view(role).within(x.contiguous())
        assert part is not None
        assert new is not None
        part.copy_(new)
        if kept is not to:
            to.copy_(kept)

    def own(self, role: str, x: torch.Tensor) -> torch.Tensor:
        """x, like the parameter, with zeros where other layers' elements are."""
        return self.view(role).put(self.view(role).take(x), tuple(x.shape)) if self.partial(role) else x

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return sum(prod(self.view(role).shape) for role in self.parameters)


Parameters = Mapping[str, nn.Parameter]
Kinds = dict[Ref, set[Any]]


def settled(marks: Iterable[Mark], odd: Mapping[str, str], parameters: Parameters, owners: Mapping[str, str]) -> tuple:
    """(layers by name, reason by name of an uncovered parameter, role of every part: Ref -> layer's name).

    odd     parameters that went into an operation that is no layer, and why
    owners  name of a parameter -> name of the layer if it is the weight
    """
    marks = list(marks)
    uncovered = {name: why for name, why in odd.items() if name in parameters}
    _whole(_kinds(marks, {}), parameters, uncovered)  # a weight that cannot be a layer leaves its bias alone
    joint = _joint(marks, uncovered)
    whole = _whole(_kinds(marks, joint), parameters, uncovered)
    layers: dict[str, Layer] = {}
    places: dict[Ref, str] = {}
    for ref, kind in whole.items():
        bias = joint.get(ref)
        layer = _layer(ref, kind, bias, parameters, owners)
        if layer.name in layers or (layer.name in parameters and layer.name != ref.name):
            layer = replace(layer, name=f"{ref.name}*" if ref.name in layers else ref.name)
        layers[layer.name] = layer
        places[ref] = layer.name
    order = {name: i for i, name in enumerate(parameters)}
    first = lambda item: min((order[item[1].paths[r]], item[1].view(r).offset) for r in item[1].paths)  # noqa: E731
    return dict(sorted(layers.items(), key=first)), uncovered, places


def _kinds(marks: list[Mark], joint: Mapping[Ref | None, Ref]) -> Kinds:
    """What each part is used as; a bias that is a column of its weight's matrix is no part by itself."""
    kinds: Kinds = {}
    for mark in marks:
        if mark.weight is not None:
            kinds.setdefault(mark.weight, set()).add(mark.kind)
        if mark.bias is not None and joint.get(mark.weight) != mark.bias:
            kinds.setdefault(mark.bias, set()).add(Bias(prod(mark.bias.view.shape)))
    return kinds


def _joint(marks: list[Mark], odd: Mapping[str, str]) -> dict[Ref | None, Ref]:
    """The bias of a weight whose every use has it, and that nothing else uses."""
    biases: dict[Ref, set[Ref | None]] = {}
    weights: dict[Ref, set[Ref | None]] = {}
    for mark in marks:
        if mark.weight is not None and isinstance(mark.kind, Linear | Conv):
            biases.setdefault(mark.weight, set()).add(mark.bias)
        if mark.bias is not None:
            weights.setdefault(mark.bias, set()).add(mark.weight)
    alone = {mark.weight for mark in marks if mark.scaled or not isinstance(mark.kind, Linear | Conv)}
    found: dict[Ref | None, Ref] = {}
    for weight, given in biases.items():
        bias = next(iter(given))
        plain = len(given) == 1 and bias is not None and weights[bias] == {weight} and bias not in alone
        if plain and bias is not None and weight not in alone and not {bias.name, weight.name} & odd.keys():
            found[weight] = bias
    return found


def _whole(kinds: Kinds, parameters: Parameters, uncovered: dict[str, str]) -> dict[Ref, Any]:
    """The kind of each part; parameters of which that cannot be said are named in `uncovered`."""
    found: dict[Ref, Any] = {}
    refs: dict[str, list[Ref]] = {}
    for ref in kinds:
        refs.setdefault(ref.name, []).append(ref)
    for name, ours in refs.items():
        parts = {ref: unified(kinds[ref]) for ref in ours}
        why = next((kind for kind in parts.values() if isinstance(kind, str)), "")
        numel = parameters[name].numel()
        if not why and any(ref.view.repeats or ref.view.boxed(numel) is None for ref in parts):
            why = "its elements are used in an order that no matrix has"
        if not why and len(parts) > 1 and overlapping([ref.view for ref in parts], numel):
            used = " and as ".join(sorted({type(kind).__name__.lower() for kind in parts.values()}))
            why = f"elements are used as {used} in several arrangements: different Kronecker structures"
        if why:
            uncovered.setdefault(name, why)
        if name not in uncovered:
            found |= parts
    return found


def unified(kinds: set[Any]) -> Any:
    """One kind for all uses of a part, or the reason why there is none."""
    if len(kinds) == 1:
        return next(iter(kinds))
    if all(isinstance(kind, Bias) for kind in kinds) and len({kind.d for kind in kinds}) == 1:
        return next(kind for kind in kinds if isinstance(kind, Gain))
    tables = [kind for kind in kinds if isinstance(kind, Embedding)]
    heads = [kind for kind in kinds if isinstance(kind, Linear)]
    if len(kinds) == 2 and tables and heads and (tables[0].size, tables[0].d_out) == (heads[0].d_out, heads[0].d_in):
        return Tied(tables[0].size, tables[0].d_out)
    used = " and as ".join(sorted({type(kind).__name__.lower() for kind in kinds}))
    return f"used as {used}: two different Kronecker structures"


def _layer(ref: Ref, kind: Any, bias: Ref | None, parameters: Parameters, owners: Mapping[str, str]) -> Layer:
    roles = {"gain" if isinstance(kind, Gain) else "bias" if isinstance(kind, Bias) else "weight": ref}
    if isinstance(kind, Linear | Conv):
        kind = replace(kind, bias=bias is not None)
        roles |= {} if bias is None else {"bias": bias}
    own = not isinstance(kind, Bias) and ref.name in owners
    name = owners[ref.name] if own else ref.name
    if prod(ref.view.shape) < parameters[ref.name].numel():
        name = f"{ref.name}{span(ref, tuple(parameters[ref.name].shape))}"
    given = {role: parameters[r.name] for role, r in roles.items()}
    views = {role: r.view for role, r in roles.items() if r.view != View.whole(tuple(given[role].shape))}
    if isinstance(kind, Bias):  # of any shape: a vector of the same elements in the same order needs no view
        views = {role: v for role, v in views.items() if v != _flat(given[role])}
    return Layer(name, kind, given, {role: r.name for role, r in roles.items()}, views)


def _flat(p: nn.Parameter) -> View:
    return View.whole(tuple(p.shape)).reshaped((p.numel(),)) or View(())


def span(ref: Ref, shape: tuple[int, ...]) -> str:
    """[first:last] of a part along the parameter's first axis, or of its elements."""
    last = 1 + ref.view.offset + sum((n - 1) * stride for axis in ref.view.axes for n, stride in axis)
    row = prod(shape[1:])
    if ref.view.offset % row == 0 and last % row == 0:
        return f"[{ref.view.offset // row}:{last // row}]"
    return f"[elements {ref.view.offset}:{last}]"
