"""What a forward pass leaves: for every call of a known weight its input and the gradient edge of its output.

Calls are seen where they happen, at `torch.nn.functional`, and known by the identity of the parameter: modules called
twice, tied weights, subclasses and functional code need no hooks. The edge, not the output, is kept: an in-place
activation afterwards leaves it right, and nothing is copied. Nothing outside the entered object changes, so threads do
not see each other.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from kfaccore import Window
from kfaccore.layers import Conv, Embedding, Gain, Linear
from kfaccore_torch.attention import attention
from kfaccore_torch.calls import Call, Mark, Remade, Use
from kfaccore_torch.compiled import uncompiled
from kfaccore_torch.inside import SPENT
from kfaccore_torch.joined import joined, uses
from kfaccore_torch.passes import Made, flat
from kfaccore_torch.plan import Plan
from kfaccore_torch.precision import product_of
from kfaccore_torch.provenance import followed
from kfaccore_torch.recurrent import RECURRENT, unfused
from kfaccore_torch.spans import Span, recording
from kfaccore_torch.unusual import unusual
from kfaccore_torch.views import Ref

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.conv1d: _CONV,
    F.conv2d: _CONV,
    F.conv3d: _CONV,
    F.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
}
_ROLES = {F.linear: Linear, F.conv1d: Conv, F.conv2d: Conv, F.conv3d: Conv, F.embedding: Embedding}
_ADDITIONS = (torch.add, torch.Tensor.add, torch.Tensor.add_)


class Capture(TorchFunctionMode):
    """Sees all calls made while it is entered: `uses`, and `calls` by layer of the plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.known = plan.known
        self.uses: list[Use] = []
        self.odd: dict[str, str] = {}  # parameters in calls that are no layer's
        self.inputs: dict[Any, list[Any]] = {}  # node of a call's output -> (node, output) of its inputs
        self.empty: set[str] = set()  # parameters called on no rows
        self.products: dict[str, str] = {}  # parameter -> how its product is made, on CUDA
        self.span = Span()
        self.spent = False  # whether a loss of this forward was differentiated
        self.made = Made()
        self._embedded: dict[int, tuple[weakref.ref, int, Use]] = {}  # outputs, the use and its place

    def let_go(self) -> None:
        """Forget all calls, whose inputs would outlive the backward that is about to free them."""
        self.uses = []
        self.inputs = {}
        self._embedded = {}
        self.made = Made()
        self.spent = True

    def check_unspent(self) -> None:
        """ValueError once a loss of this forward was differentiated."""
        if self.spent:
            raise ValueError(SPENT)

    @property
    def calls(self) -> dict[str, list[Call]]:
        """Calls by layer, in order."""
        return self.plan.assigned(self.uses)

    @uncompiled
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:  # the products inside are seen like any other
                return attention(*args, **kwargs)
        if func in RECURRENT and self._has_own(args):
            with self:
                return unfused(func, *args, **kwargs)
        self.span.note(func, args, kwargs)
        names = _ARGUMENTS.get(func)
        output = func(*args, **kwargs)
        self.made.note((*args, *output) if isinstance(output, tuple | list) else (*args, output))
        if names is not None:
            self._note(func, dict(zip(names, args, strict=False)) | kwargs, output)
        if self._embedded:
            self._widen(func, (*args, *kwargs.values()), output)
        return output

    def _has_own(self, args: Any) -> bool:
        """Whether parameters of the model are among tensors and lists of them."""
        return any(isinstance(x, torch.Tensor) and followed(x, self.known) is not None for x in flat(args))

    def _note(self, func: Any, given: dict[str, Any], output: torch.Tensor) -> None:
        """Remember the call for its weight and bias."""
        if not recording(output):
            return
        weight, bias = (followed(given.get(name), self.known) for name in ("weight", "bias"))
        axes = {"weight": 2, "bias": 1}
        linear = {name: given.get(name) if func is F.linear else None for name in axes}
        parts = {name: joined(linear[name], axes[name], self.known) for name in axes}
        pieces = [piece for found, _ in parts.values() for piece in found]
        if (weight is None and bias is None and not pieces) or not _plain(func, weight):
            return
        edge = _edge(output)
        whole = {"weight": weight is not None or parts["weight"][0], "bias": bias is not None or parts["bias"][0]}
        graphs = [given["input"], *(given.get(name) for name, seen in whole.items() if not seen)]
        before = [tuple(get_gradient_edge(x)[:2]) for x in graphs if x is not None and x.requires_grad]
        before += [other for _, others in parts.values() for other in others]
        self.inputs.setdefault(edge.node, []).extend(before)
        refs = [ref for ref in (weight, bias, *(piece.ref for piece in pieces)) if ref is not None]
        if output.numel() == 0:
            self.empty.update(ref.name for ref in refs)
            return
        odd = unusual(given["input"]) or unusual(output)
        if odd:
            self.odd.update({ref.name: f"it goes into {func.__name__} with {odd}" for ref in refs})
            return
        if func is F.embedding and (given.get("max_norm") or given.get("scale_grad_by_freq") or given.get("sparse")):
            why = "embeddings with max_norm, scale_grad_by_freq or sparse gradients are not the plain product"
            self.odd.update({ref.name: why for ref in refs})
            return
        product = product_of(func, output)
        if product is not None:
            self.products.update((ref.name, product) for ref in refs)
        call = _call(func, _ROLES.get(func, Gain), given, output, edge)
        self.uses += uses(parts["weight"][0], parts["bias"][0], call)
        if weight is None and bias is None:
            return
        use = Use(Mark(_kind(func, weight, given), weight, bias), call)
        self.uses.append(use)
        if func is F.embedding:
            self._embedded[id(output)] = weakref.ref(output), len(self.uses) - 1, use

    def _widen(self, func: Any, args: tuple, output: Any) -> None:
        """What all examples share, an embedding of positions, has one row each where it is added to them: the edge of
        that sum is kept instead, unless the shared output goes anywhere else too."""
        if isinstance(output, torch.Size) or not isinstance(output, torch.Tensor | tuple | list | None):
            return  # a size, a dtype, a flag
        written = str(getattr(func, "__name__", "")).endswith("_")
        for x in flat(args):
            found = self._embedded.get(id(x))
            if found is None or found[0]() is not x or (output is x and not written):
                continue
            if isinstance(output, torch.Tensor) and not output.requires_grad:
                continue
            _, place, use = found
            shape = use.call.shape
            if output is use.call.x:
                continue
            while shape[0] == 1 and len(shape) > 1:
                shape = shape[1:]
            added = func in _ADDITIONS and len(args) == 2 and self.uses[place] is use and output is not x
            if added and output.numel() > x.numel() and output.shape[-len(shape) :] == shape:
                index = use.call.x.reshape(shape[:-1]).expand(output.shape[:-1])
                wide = {"x": index, "edge": get_gradient_edge(output), "shape": tuple(output.shape)}
                call = replace(use.call, **wide, rows=tuple(output.shape[:-1]), narrow=use.call)
                self.uses[place] = replace(use, call=call)
            else:
                self.uses[place] = use
                del self._embedded[id(x)]


def _plain(func: Any, weight: Ref | None) -> bool:
    """Whether a weight has the axes that a call's kind is of; others are seen in what autograd keeps."""
    axes = {F.linear: 2, F.embedding: 2, F.conv1d: 3, F.conv2d: 4, F.conv3d: 5}.get(func)
    return weight is None or axes is None or len(weight.view.axes) == axes


def _kind(func: Any, weight: Ref | None, given: dict[str, Any]) -> Any:
    """The layer kind of a call's weight, without a bias."""
    if weight is None:
        return None
    shape = weight.view.shape
    if func is F.linear:
        return Linear(shape[1], shape[0], bias=False)
    if func is F.embedding:
        return Embedding(shape[0], shape[1])
    if func in (F.conv1d, F.conv2d, F.conv3d):
        groups = given.get("groups", 1)
        return Conv(Window(shape[2:]), (shape[1] * groups, shape[0]), groups, bias=False, channels_first=True)
    size = 1
    for axis in shape:
        size *= axis
    return Gain(size)


def _call(func: Any, role: Any, given: dict[str, Any], output: torch.Tensor, edge: GradientEdge) -> Call:
    """What is kept of one call."""
    x = given["input"].detach()
    shape = tuple(output.shape)
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


def _edge(output: torch.Tensor) -> GradientEdge:
    """The gradient edge of an output, or of the tensor that it is all of: an operation in place on a view takes the
    view's own edge off the path, the base's stays."""
    base = output._base if output._is_view() else None
    whole = base is not None and base.requires_grad and base.numel() == output.numel()
    if base is not None and whole and base.is_contiguous() and output.is_contiguous():
        return get_gradient_edge(base)
    return get_gradient_edge(output)


def _normalised(func: Any, given: dict[str, Any], x: torch.Tensor) -> Remade:
    """Computes the normalised input again, when it is needed."""
    eps = {"eps": given["eps"]} if "eps" in given else {}
    if func is F.layer_norm or func is F.rms_norm:
        return Remade(lambda: func(x, given["normalized_shape"], **eps))
    if func is F.group_norm:
        return Remade(lambda: F.group_norm(x.contiguous(), given["num_groups"], **eps))
    if given.get("training"):
        # `F.batch_norm` would ask for memory to keep what a backward needs
        eps = given.get("eps", 1e-5)
        return Remade(lambda: torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)[0])
    # copies: running statistics move on with the next batch
    mean = given["running_mean"].clone()
    var = given["running_var"].clone()
    return Remade(lambda: F.batch_norm(x, mean, var, **eps))
