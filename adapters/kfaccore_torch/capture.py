"""What a forward pass leaves: for every call of a known weight its input and the gradient edge of its output.

Calls are seen where they happen, at `torch.nn.functional`, and known by the identity of the parameter: modules called
twice, tied weights, subclasses and functional code need no hooks. The edge, not the output, is kept: an in-place
activation afterwards leaves it right, and nothing is copied. A known parameter that goes into any other function would
be covered by half, so it is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from kfaccore.layers import Conv, Embedding, Gain, Linear
from kfaccore_torch.table import Layer, Plan

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.conv1d: _CONV,
    F.conv2d: _CONV,
    F.conv3d: _CONV,
    F.embedding: ("input", "weight", "padding_idx"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
}
_ROLES = {F.linear: Linear, F.conv1d: Conv, F.conv2d: Conv, F.conv3d: Conv, F.embedding: Embedding}
_ADDITIONS = (torch.add, torch.Tensor.add, torch.Tensor.add_)
_VALUES = {"T", "mT", "H", "mH", "data", "real", "imag"}  # properties that hand the values on
_HARMLESS = {"size", "dim", "numel", "stride", "is_contiguous", "storage_offset", "data_ptr", "is_floating_point"}
_HARMLESS |= {
    "is_complex",
    "element_size",
    "nelement",
    "__len__",
    "__hash__",
    "__repr__",
    "register_hook",
    "get_device",
}


@dataclass(frozen=True)
class Call:
    """One call of one weight.

    x          the input, detached; of a norm's gain nothing is kept but `normalised`
    edge       of the output
    shape      of the output
    options    arguments by name, other than tensors
    positions  of rows that run over positions before examples (inside attention), else 0
    """

    x: torch.Tensor
    edge: GradientEdge
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    normalised: Callable[[], torch.Tensor] | None = None
    channel: int = -1
    positions: int = 0


class Capture(TorchFunctionMode):
    """Sees all calls made while it is entered; `calls` by layer name."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.calls: dict[str, list[Call]] = {}
        self._known: dict[int, tuple[str, Layer]] = {}
        for layer in plan.layers.values():
            for role, p in layer.parameters.items():
                self._known[id(p)] = (role, layer)
        self._positions = 0
        self._embedded: dict[int, tuple[weakref.ref, str, int, Call]] = {}  # outputs, the layer and place of their call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self._inside_attention(args[0].shape[0]):
                return func(*args, **kwargs)
        if func is torch.autograd.grad and kwargs.get("create_graph"):
            raise ValueError(
                "the forward differentiates itself (create_graph=True) and that share of its curvature would "
                "be missed; a loss with derivatives of the network needs Taylor records, see kfaccore_torch.taylor"
            )
        names = _ARGUMENTS.get(func)
        output = func(*args, **kwargs)
        if names is not None:
            self._note(func, dict(zip(names, args, strict=False)) | kwargs, output)
        elif not _harmless(func):
            self._refuse(func, args, kwargs)
        if self._embedded and not _harmless(func):
            self._widen(func, (*args, *kwargs.values()), output)
        return output

    def _note(self, func: Any, given: dict[str, Any], output: torch.Tensor) -> None:
        """Remember the call for the layers of its weight and bias."""
        weight, bias = (self._known.get(id(given.get(name)), (None, None))[1] for name in ("weight", "bias"))
        if (weight is None and bias is None) or not _recording(output):
            return
        role = _ROLES.get(func, Gain)
        if weight is not None and not isinstance(weight.kind, role):
            kind = type(weight.kind).__name__
            raise ValueError(
                f"weight {weight.name!r} is known as {kind} and was used by {_name(func)}: two different Kronecker "
                f"structures; pass skip=({next(iter(weight.paths.values()))!r},)"
            )
        x, edge = given["input"].detach(), get_gradient_edge(output)
        options = {k: v for k, v in given.items() if not isinstance(v, torch.Tensor)}
        call = Call(x, edge, tuple(output.shape), options, positions=self._positions)
        if role is Gain:
            channel = 1 if func in (F.group_norm, F.batch_norm) else -len(given["normalized_shape"])
            call = replace(call, normalised=_normalised(func, given, x), channel=channel)
        elif role is Conv:
            call = replace(call, channel=1 - given["weight"].ndim)
        for layer in {id(found): found for found in (weight, bias) if found is not None}.values():
            calls = self.calls.setdefault(layer.name, [])
            calls.append(call)
            if role is Embedding:
                self._embedded[id(output)] = weakref.ref(output), layer.name, len(calls) - 1, call

    def _widen(self, func: Any, args: tuple, output: Any) -> None:
        """What all examples share, an embedding of positions, has one row each where it is added to them: the edge of
        that sum is kept instead, unless the shared output goes anywhere else too."""
        for x in _flat(args):
            found = self._embedded.get(id(x))
            if found is None or found[0]() is not x:
                continue
            _, name, place, call = found
            calls, shape = self.calls[name], call.shape
            while shape[0] == 1 and len(shape) > 1:
                shape = shape[1:]
            added = func in _ADDITIONS and len(args) == 2 and calls[place] is call
            if added and output.numel() > x.numel() and output.shape[-len(shape) :] == shape:
                index = call.x.reshape(shape[:-1]).expand(output.shape[:-1])
                wide = replace(call, x=index, edge=get_gradient_edge(output), shape=tuple(output.shape))
                calls[place] = wide
            else:
                calls[place] = call
                del self._embedded[id(x)]

    def _refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        """ValueError if a known parameter is among the arguments of a function that hands its values on."""
        for x in _flat((*args, *kwargs.values())):
            if isinstance(x, torch.nn.Parameter) and id(x) in self._known and _grad_mode():
                role, layer = self._known[id(x)]
                raise ValueError(
                    f"parameter {layer.paths[role]!r} went into {_name(func)} as well as through its layer, so its "
                    f"curvature would be covered by half; pass skip=({layer.paths[role]!r},)"
                )

    @contextmanager
    def _inside_attention(self, positions: int) -> Iterator[None]:
        """`F.multi_head_attention_forward` looks `linear` up in its module: its two products are seen there."""

        def linear(*args: Any, **kwargs: Any) -> torch.Tensor:
            output = original(*args, **kwargs)
            given = dict(zip(_ARGUMENTS[F_LINEAR], args, strict=False)) | kwargs
            if given["weight"]._is_view() and id(given["weight"]._base) in self._known:
                raise ValueError(
                    f"{self._known[id(given['weight']._base)][1].name!r} is attention between two sequences: its "
                    f"packed projection has several inputs; skip it"
                )
            self._note(F_LINEAR, given, output)
            return output

        original, self._positions = F.linear, positions
        F.linear = linear  # type: ignore[assignment]
        try:
            yield
        finally:
            F.linear, self._positions = original, 0


F_LINEAR = F.linear


def _normalised(func: Any, given: dict[str, Any], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Computes the normalised input again, when it is needed."""
    eps = {"eps": given["eps"]} if "eps" in given else {}
    if func is F.layer_norm or func is F.rms_norm:
        return lambda: func(x, given["normalized_shape"], **eps)
    if func is F.group_norm:
        return lambda: F.group_norm(x, given["num_groups"], **eps)
    if given.get("training"):
        return lambda: F.batch_norm(x, None, None, training=True, **eps)
    return lambda: F.batch_norm(x, given["running_mean"], given["running_var"], **eps)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Arguments, those inside lists and tuples too."""
    for x in values:
        if isinstance(x, list | tuple):
            yield from _flat(x)
        else:
            yield x


def _grad_mode() -> bool:
    """Whether a graph is being built, and not a second time by a checkpoint's recomputation."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1


def _recording(output: torch.Tensor) -> bool:
    return _grad_mode() and output.requires_grad


def _harmless(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") not in _VALUES
    return name in _HARMLESS


def _name(func: Any) -> str:
    name = getattr(func, "__name__", repr(func))
    return f"Tensor.{func.__self__.__name__}" if name == "__get__" else name
