"""What a forward pass leaves: for every call of a known weight its input and the gradient edge of its output.

Calls are seen where they happen, at `torch.nn.functional`, and known by the identity of the parameter: modules called
twice, tied weights, subclasses and functional code need no hooks. The edge, not the output, is kept: an in-place
activation afterwards leaves it right, and nothing is copied. Nothing outside the entered object changes, so threads do
not see each other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from kfaccore.layers import Conv, Embedding, Gain, Linear
from kfaccore_torch.attention import attention
from kfaccore_torch.graph import origin
from kfaccore_torch.plan import Layer, Plan

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


@dataclass(frozen=True)
class Call:
    """One call of one weight.

    x          the input, detached
    edge       of the output
    shape      of the output
    rows       sizes of the axes of the output that are not features
    version    how often the input's memory had been written
    options    arguments by name, other than tensors
    before     nodes of the input, where it has a graph
    narrow     the same call before its output was widened by an addition
    """

    x: torch.Tensor
    edge: GradientEdge
    shape: tuple[int, ...]
    rows: tuple[int, ...]
    version: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    normalised: Callable[[], torch.Tensor] | None = None
    channel: int = -1
    before: tuple[Any, ...] = ()
    narrow: Call | None = None

    @property
    def node(self) -> Any:
        """Where its gradient passes."""
        return self.edge.node

    def features_last(self, g: torch.Tensor, d: int) -> torch.Tensor:
        """A gradient of the output (..., *shape) as (..., *rows, d)."""
        if self.channel == -1:
            return g.reshape(*g.shape[: g.ndim - len(self.shape)], *self.rows, d)
        tail = 1
        for size in self.shape[self.channel :]:
            tail *= size
        if tail == d:  # a norm over several axes
            return g.reshape(*g.shape[: g.ndim - len(self.shape)], *self.rows, d)
        moved = g.movedim(self.channel, -1)
        return moved.reshape(*g.shape[: g.ndim - len(self.shape)], *self.rows, d)


class Capture(TorchFunctionMode):
    """Sees all calls made while it is entered; `calls` by layer name."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.calls: dict[str, list[Call]] = {}
        self.inputs: dict[Any, list[Any]] = {}  # node of a call's output -> nodes of its input
        self.empty: set[str] = set()  # layers called on no rows
        self.known: dict[int, tuple[str, Layer]] = {}
        for layer in plan.layers.values():
            for role, p in layer.parameters.items():
                self.known[id(p)] = (role, layer)
        self._embedded: dict[int, tuple[weakref.ref, str, int, Call]] = {}  # outputs, the layer and place of their call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:  # the products inside are seen like any other
                return attention(*args, **kwargs)
        names = _ARGUMENTS.get(func)
        output = func(*args, **kwargs)
        if names is not None:
            self._note(func, dict(zip(names, args, strict=False)) | kwargs, output)
        if self._embedded:
            self._widen(func, (*args, *kwargs.values()), output)
        return output

    def _note(self, func: Any, given: dict[str, Any], output: torch.Tensor) -> None:
        """Remember the call for the layers of its weight and bias."""
        weight, bias = (self.known.get(id(origin(given.get(name))), (None, None))[1] for name in ("weight", "bias"))
        if (weight is None and bias is None) or not _recording(output):
            return
        role = _ROLES.get(func, Gain)
        _check_roles(role, func, weight, given)
        edge = _edge(output)
        before = [get_gradient_edge(x).node for x in (given["input"],) if x.requires_grad]
        self.inputs.setdefault(edge.node, []).extend(before)
        layers = {id(found): found for found in (weight, bias) if found is not None}.values()
        if output.numel() == 0:
            self.empty.update(layer.name for layer in layers)
            return
        call = _call(func, role, given, output, edge)
        for layer in layers:
            calls = self.calls.setdefault(layer.name, [])
            calls.append(call)
            if role is Embedding:
                self._embedded[id(output)] = weakref.ref(output), layer.name, len(calls) - 1, call

    def _widen(self, func: Any, args: tuple, output: Any) -> None:
        """What all examples share, an embedding of positions, has one row each where it is added to them: the edge of
        that sum is kept instead, unless the shared output goes anywhere else too."""
        if isinstance(output, torch.Size) or not isinstance(output, torch.Tensor | tuple | list | None):
            return  # a size, a dtype, a flag
        written = str(getattr(func, "__name__", "")).endswith("_")
        for x in _flat(args):
            found = self._embedded.get(id(x))
            if found is None or found[0]() is not x or (output is x and not written):
                continue
            if isinstance(output, torch.Tensor) and not output.requires_grad:
                continue
            _, name, place, call = found
            calls, shape = self.calls[name], call.shape
            if output is calls[place].x:
                continue
            while shape[0] == 1 and len(shape) > 1:
                shape = shape[1:]
            added = func in _ADDITIONS and len(args) == 2 and calls[place] is call and output is not x
            if added and output.numel() > x.numel() and output.shape[-len(shape) :] == shape:
                index = call.x.reshape(shape[:-1]).expand(output.shape[:-1])
                wide = {"x": index, "edge": get_gradient_edge(output), "shape": tuple(output.shape)}
                calls[place] = replace(call, **wide, rows=tuple(output.shape[:-1]), narrow=call)
            else:
                calls[place] = call
                del self._embedded[id(x)]


def _call(func: Any, role: Any, given: dict[str, Any], output: torch.Tensor, edge: GradientEdge) -> Call:
    """What is kept of one call."""
    x, shape = given["input"].detach(), tuple(output.shape)
    options = {k: v for k, v in given.items() if not isinstance(v, torch.Tensor)}
    version = 0 if x.is_inference() else given["input"]._version
    call = Call(x, edge, shape, shape[:-1] or (1,), version, options)
    if role is Conv:
        axes = given["weight"].ndim - 2
        spatial = shape[len(shape) - axes :]
        return replace(call, channel=-1 - axes, rows=(*(shape[: len(shape) - axes - 1] or (1,)), *spatial))
    if role is not Gain:
        return call
    if func in (F.group_norm, F.batch_norm):
        rows = (shape[0], *shape[2:])
        return replace(call, normalised=_normalised(func, given, x), channel=1 - len(shape), rows=rows)
    channel = -len(given["normalized_shape"])
    return replace(call, normalised=_normalised(func, given, x), channel=channel, rows=shape[:channel] or (1,))


def _check_roles(role: Any, func: Any, weight: Layer | None, given: dict[str, Any]) -> None:
    """ValueError for a weight that serves as another kind than its layer's, or with another bias."""
    if weight is None:
        return
    path = weight.paths.get("weight", next(iter(weight.paths.values())))
    if not isinstance(weight.kind, role):
        raise ValueError(
            f"weight {weight.name!r} is known as {type(weight.kind).__name__} and was used by "
            f"{getattr(func, '__name__', func)}: two different Kronecker structures; pass skip=({path!r},)"
        )
    if "bias" in weight.paths and role is not Gain and origin(given.get("bias")) is not weight.parameters["bias"]:
        name = weight.paths["bias"]
        raise ValueError(
            f"layer {weight.name!r} was called without its own bias {name!r}, or with a changed copy of it: pass "
            f"skip=({name!r},), and its weight is covered alone"
        )


def _edge(output: torch.Tensor) -> GradientEdge:
    """The gradient edge of an output, or of the tensor that it is all of: an operation in place on a view takes the
    view's own edge off the path, the base's stays."""
    base = output._base if output._is_view() else None
    whole = base is not None and base.requires_grad and base.numel() == output.numel()
    if base is not None and whole and base.is_contiguous() and output.is_contiguous():
        return get_gradient_edge(base)
    return get_gradient_edge(output)


def _normalised(func: Any, given: dict[str, Any], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Computes the normalised input again, when it is needed."""
    eps = {"eps": given["eps"]} if "eps" in given else {}
    if func is F.layer_norm or func is F.rms_norm:
        return lambda: func(x, given["normalized_shape"], **eps)
    if func is F.group_norm:
        return lambda: F.group_norm(x.contiguous(), given["num_groups"], **eps)
    if given.get("training"):
        return lambda: F.batch_norm(x, None, None, training=True, **eps)
    # copies: running statistics move on with the next batch
    mean, var = given["running_mean"].clone(), given["running_var"].clone()
    return lambda: F.batch_norm(x, mean, var, **eps)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Arguments, those inside lists and tuples too."""
    for x in values:
        if isinstance(x, list | tuple):
            yield from _flat(x)
        else:
            yield x


def _recording(output: torch.Tensor) -> bool:
    """Whether a graph is being built, and not a second time by a checkpoint's recomputation."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1 and output.requires_grad
