"""Which parameters of a model kfaccore covers, by which layer kind, and why it leaves the others alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Any

from torch import nn

from kfaccore import Window
from kfaccore.layers import Bias, Conv, Embedding, Gain, Linear
from kfaccore_torch.distributed import check_whole

NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
REASONS = (
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "transposed convolutions have no layer kind"),
    ((nn.RNNBase,), "a fused recurrent kernel never shows the inputs of its steps"),
    ((nn.RNNCellBase,), "recurrent cells have no layer kind: write them with nn.Linear"),
    ((nn.MultiheadAttention,), "of nn.MultiheadAttention only the packed in-projection of self-attention is covered"),
)


@dataclass(frozen=True)
class Layer:
    """One matrix of the equation: a kind of `kfaccore.layers` and the parameters of its roles."""

    name: str
    kind: Any
    parameters: dict[str, nn.Parameter]
    paths: dict[str, str]  # role -> name of the parameter in the model

    def matrix(self, arrays: dict[str, Any]) -> Any:
        """Arrays like the parameters, by role -> the matrix; gains and lone biases of any shape are vectors."""
        if isinstance(self.kind, Bias):
            arrays = {role: x.reshape(-1) for role, x in arrays.items()}
        return self.kind.matrix(arrays)

    def arrays(self, matrix: Any) -> dict[str, Any]:
        """The inverse of `matrix`, in the parameters' own shapes."""
        named = self.kind.parameters(matrix)
        return {role: named[role].reshape(tuple(p.shape)) for role, p in self.parameters.items()}


@dataclass(frozen=True)
class Plan:
    """`layers` are covered; `uncovered` maps a parameter's name to the reason it is not."""

    layers: dict[str, Layer]
    uncovered: dict[str, str]
    rest: dict[str, nn.Parameter] = field(repr=False)  # uncovered parameters by name
    made_of: tuple[tuple[str, nn.Parameter, bool], ...] = field(repr=False, default=())  # and whether each was trained

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """Covered parameters, then the others."""
        covered = (p for layer in self.layers.values() for p in layer.parameters.values())
        return (*covered, *self.rest.values())

    def holds(self, model: nn.Module) -> bool:
        """Whether the model still has the parameters that the plan was made of, trained or frozen as then."""
        now = unwrapped(model).named_parameters(remove_duplicate=False)
        pairs = zip_longest(self.made_of, now, fillvalue=None)
        return all(
            a is not None and b is not None and a[0] == b[0] and a[1] is b[1] and a[2] == b[1].requires_grad
            for a, b in pairs
        )


@dataclass
class _Use:
    """Where one weight appears: modules by path, and the kinds they give it."""

    weight: nn.Parameter
    path: str
    kinds: list[Any] = field(default_factory=list)
    biases: list[nn.Parameter | None] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module under torch.compile and DistributedDataParallel; TypeError for wrappers that hide parameters."""
    while True:
        kind = type(model).__name__
        if isinstance(model, nn.DataParallel):
            raise TypeError(f"{kind} splits a batch out of sight: use DistributedDataParallel")
        if kind == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def plan(model: nn.Module, skip: tuple[str, ...] = ()) -> Plan:
    """The plan of a model; `skip` are patterns of parameter names (`head.*`) to leave uncovered.

    Raises ValueError for lazy modules that have not seen a batch, and for a pattern that matches nothing.
    """
    model = unwrapped(model)
    check_whole(model)
    names = {id(p): name for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no shape yet: run one batch through the model first")
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names.values()):
            raise ValueError(f"skip pattern {pattern!r} matches no parameter; there are {sorted(names.values())[:8]}")
    uncovered = {n: f"skipped by {p!r}" for n in names.values() for p in skip if fnmatchcase(n, p)}
    uses, lone = _uses(model, names, uncovered)
    layers: dict[str, Layer] = {}
    for use in uses.values():
        _settle(use, layers, lone, names, uncovered)
    for bias, path in lone.values():
        layers[path] = Layer(path, Bias(bias.numel()), {"bias": bias}, {"bias": path})
    covered = {path for layer in layers.values() for path in layer.paths.values()}
    for name in set(names.values()) - covered - set(uncovered):
        uncovered[name] = "the layer it belongs to has no such role"
    order = {name: i for i, name in enumerate(names.values())}
    layers = dict(sorted(layers.items(), key=lambda item: min(order[path] for path in item[1].paths.values())))
    rest = {name: p for name, p in model.named_parameters() if name in uncovered and p.requires_grad}
    made_of = tuple((n, p, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False))
    return Plan(layers, {name: uncovered[name] for name in rest}, rest, made_of)


def _uses(model: nn.Module, names: dict[int, str], uncovered: dict[str, str]) -> tuple[dict, dict]:
    """Every weight with the modules that use it, and the biases that stand alone."""
    uses: dict[int, _Use] = {}
    lone: dict[int, tuple[nn.Parameter, str]] = {}
    for path, module in model.named_modules():
        own = {role: p for role, p in module._parameters.items() if p is not None and p.requires_grad}
        own = {role: p for role, p in own.items() if names[id(p)] not in uncovered}
        for weight, bias, kind in _kinds(module, own):
            if isinstance(kind, str):
                uncovered.update({names[id(p)]: kind for p in own.values()})
            elif weight is None:
                lone[id(bias)] = (bias, names[id(bias)])
            else:
                use = uses.setdefault(id(weight), _Use(weight, names[id(weight)]))
                use.kinds.append(kind)
                use.biases.append(bias)
                use.modules.append(path or type(module).__name__.lower())
    return uses, lone


def _settle(use: _Use, layers: dict, lone: dict, names: dict[int, str], uncovered: dict[str, str]) -> None:
    """The layer of a weight; tied weights share one if their roles agree, and then biases that differ stand alone."""
    kinds = {type(kind) for kind in use.kinds}
    biases = {id(bias) for bias in use.biases}
    if len(kinds) > 1:
        roles = " and as ".join(sorted(kind.__name__.lower() for kind in kinds))
        uncovered[use.path] = f"the weight serves as {roles}: two different Kronecker structures"
    together = len(biases) == 1 and len(kinds) == 1
    if not together:
        lone.update({id(b): (b, names[id(b)]) for b in use.biases if b is not None})
    if len(kinds) > 1:
        return
    kind, bias = use.kinds[0], use.biases[0] if together else None
    if isinstance(kind, Gain):
        name, parameters = use.path, {"gain": use.weight}
    else:
        name, parameters = use.modules[0], {"weight": use.weight, **({} if bias is None else {"bias": bias})}
        if not isinstance(kind, Embedding):
            kind = type(kind)(**{**vars(kind), "bias": bias is not None})
    if name in layers or name in names.values():
        name = use.path if use.path not in layers else f"{use.path}*"
    layers[name] = Layer(name, kind, parameters, {role: names[id(p)] for role, p in parameters.items()})


def _kinds(module: nn.Module, own: dict[str, nn.Parameter]) -> Iterator[tuple[Any, Any, Any]]:
    """(weight, bias, kind) of each matrix of a module; (None, bias, None) for a lone bias; a text instead of a kind
    is the reason for leaving all of the module's own parameters alone."""
    if not own:
        return
    weight, bias = own.get("weight"), own.get("bias")
    reason = _refusal(module)
    if reason:
        yield None, None, reason
    elif isinstance(module, nn.MultiheadAttention):
        weight = own.get("in_proj_weight")
        if weight is not None:
            yield weight, own.get("in_proj_bias"), Linear(weight.shape[1], weight.shape[0])
    elif isinstance(module, NORMS):
        if weight is not None:
            yield weight, None, Gain(weight.numel())
        if bias is not None:
            yield None, bias, None
    elif weight is None:
        if bias is not None:
            yield None, bias, None
    elif isinstance(module, nn.Linear):
        yield weight, bias, Linear(weight.shape[1], weight.shape[0])
    elif isinstance(module, nn.Embedding):
        yield weight, None, Embedding(weight.shape[0], weight.shape[1])
    elif isinstance(module, CONVS):
        window = Window(tuple(weight.shape[2:]))
        channels = module.in_channels, module.out_channels
        yield weight, bias, Conv(window, channels, module.groups, channels_first=True)


def _refusal(module: nn.Module) -> str:
    """Why a module's own parameters are not covered, or an empty string."""
    if isinstance(module, nn.MultiheadAttention):
        packed = module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
        return "" if packed else REASONS[-1][1]
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq or module.sparse):
        return "embeddings with max_norm, scale_grad_by_freq or sparse gradients are not the plain product"
    for kinds, reason in REASONS:
        if isinstance(module, kinds):
            return reason
    if isinstance(module, (nn.Linear, nn.Embedding, *CONVS, *NORMS)):
        return ""
    return f"{type(module).__name__} is not a layer kfaccore knows"
