"""What modules are known to do with their parameters, until a forward shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from kfaccore import Window
from kfaccore.layers import Conv, Embedding, Gain, Linear
from kfaccore_torch.calls import Mark
from kfaccore_torch.views import Ref, View

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def hints(model: nn.Module, names: Mapping[int, str]) -> Iterator[Mark]:
    """A mark for every weight of a module of a known type, with its bias; `names` are of trained parameters by id."""
    for module in model.modules():
        own = {role: p for role, p in module._parameters.items() if p is not None and id(p) in names}
        refs = {role: Ref(names[id(p)], View.whole(p.shape)) for role, p in own.items()}
        yield from _of(module, own, refs)


def _of(module: nn.Module, own: dict[str, nn.Parameter], refs: dict[str, Ref]) -> Iterator[Mark]:
    weight = own.get("weight")
    bias = refs.get("bias")
    if isinstance(module, nn.MultiheadAttention):
        packed = own.get("in_proj_weight")
        if packed is not None:
            kind = Linear(packed.shape[1], packed.shape[0], bias=False)
            yield Mark(kind, refs["in_proj_weight"], refs.get("in_proj_bias"))
    elif weight is None:
        if bias is not None and isinstance(module, (nn.Linear, *CONVS, *NORMS)):
            yield Mark(None, None, bias)
    elif isinstance(module, NORMS):
        yield Mark(Gain(weight.numel()), refs["weight"], bias)
    elif isinstance(module, nn.Linear):
        yield Mark(Linear(weight.shape[1], weight.shape[0], bias=False), refs["weight"], bias)
    elif isinstance(module, nn.Embedding):
        if module.max_norm is None and not module.scale_grad_by_freq and not module.sparse:
            yield Mark(Embedding(weight.shape[0], weight.shape[1]), refs["weight"])
    elif isinstance(module, CONVS):
        channels = module.in_channels, module.out_channels
        kind = Conv(Window(tuple(weight.shape[2:])), channels, module.groups, bias=False, channels_first=True)
        yield Mark(kind, refs["weight"], bias)
