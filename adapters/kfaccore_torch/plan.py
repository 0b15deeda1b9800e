"""Which parameters of a model kfaccore covers, by which layer kind, and why it leaves the others alone.

The operation that a parameter goes through decides, not the module it is in. Until a forward was seen, modules of known
types stand for what they are known to do; what a forward shows takes their place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.calls import Call, Mark, Use
from kfaccore_torch.distributed import check_whole
from kfaccore_torch.hints import hints
from kfaccore_torch.settle import Layer, settled
from kfaccore_torch.tied import ties
from kfaccore_torch.unusual import unusual
from kfaccore_torch.views import Ref

if TYPE_CHECKING:
    from kfaccore_torch.report import Coverage

__all__ = ["Layer", "Plan", "again", "modules", "remade", "unwrapped"]
UNSEEN = "no forward has shown yet what it is used for"
UNUSED = "it did not take part in the prediction"


@dataclass(frozen=True)
class Plan:
    """`layers` are covered; `uncovered` maps a parameter's name to the reason it is not.

    marks   what parameters were seen to be used for, also those that are frozen since
    odd     parameters that were seen to go into what is no layer, and why
    shown   sets of parameters that were trained together when a forward was seen: of what lies within one of them, all
            uses are known
    places  part of a parameter -> the layer that it makes
    """

    layers: dict[str, Layer]
    uncovered: dict[str, str]
    rest: dict[str, nn.Parameter] = field(repr=False)  # uncovered parameters by name
    made_of: tuple[tuple[str, nn.Parameter, bool], ...] = field(repr=False, default=())  # and whether each was trained
    shapes: tuple[torch.Size, ...] = field(repr=False, default=())  # of those
    model: nn.Module | None = field(repr=False, default=None)
    skip: tuple[str, ...] = field(repr=False, default=())
    marks: tuple[Mark, ...] = field(repr=False, default=())
    odd: dict[str, str] = field(repr=False, default_factory=dict)
    places: dict[Ref, str] = field(repr=False, default_factory=dict)
    seen: bool = False
    shown: tuple[frozenset[str], ...] = field(repr=False, default=())

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """Covered parameters, then the others."""
        covered = {id(p): p for layer in self.layers.values() for p in layer.parameters.values()}
        return (*covered.values(), *self.rest.values())

    @property
    def known(self) -> dict[int, str]:
        """Names of the parameters that are trained, of real numbers and not skipped, by id."""
        names = {id(p): name for name, p, trained in reversed(self.made_of) if trained and not unusual(p)}
        return {key: name for key, name in names.items() if not _skipped(name, self.skip)}

    def report(self, core: kf.Preconditioner | None = None) -> Coverage:
        """Parameter by parameter: rule, factor sizes, bytes, and how the block is approximated under a preconditioner,
        by default KFAC(). Nothing of the state's size is allocated."""
        from kfaccore_torch.report import coverage

        return coverage(self, self.blocks, core or kf.Preconditioner(kf.KFAC()))

    def memory(self, core: kf.Preconditioner | None = None) -> dict[str, kf.Footprint]:
        """{layer: bytes of averages and inverses, and the peak of an update}, before anything of the size exists."""
        core = core or kf.Preconditioner(kf.KFAC())
        return core.footprint(self.blocks)

    @property
    def blocks(self) -> dict[str, kf.Block]:
        """Sizes of the layers."""
        return {name: layer.kind.block() for name, layer in self.layers.items()}

    def __str__(self) -> str:
        return str(self.report())

    def holds(self, model: nn.Module) -> bool:
        """Whether the model still has the parameters that the plan was made of, of the shapes and trained or frozen as
        then."""
        now = unwrapped(model).named_parameters(remove_duplicate=False)
        return all(
            a is not None
            and b is not None
            and a[0] == b[0]
            and a[1] is b[1]
            and a[2] == b[1].requires_grad
            and b[1].shape == shape
            for a, shape, b in zip_longest(self.made_of, self.shapes, now, fillvalue=None)
        )

    def with_seen(self, marks: Iterable[Mark], odd: Mapping[str, str]) -> Plan:
        """The plan with what one forward showed; itself where that is nothing new."""
        names = set(self.known.values())
        old = {*self.marks, *(_with(mark, names) for mark in self.marks)}
        fresh = [mark for mark in dict.fromkeys(marks) if mark not in old]
        if self.seen and not fresh and odd.keys() <= self.odd.keys():
            return self
        return remade(self, (*self.marks, *fresh), {**odd, **self.odd}, True)

    def assigned(self, uses: Iterable[Use]) -> dict[str, list[Call]]:
        """Calls by layer, in order."""
        found: dict[str, list[Call]] = {}
        for use in uses:
            weight = self.places.get(use.mark.weight) if use.mark.weight is not None else None
            joint = weight is not None and self._has(weight, use.mark.bias)
            bias = self.places.get(use.mark.bias) if use.mark.bias is not None and not joint else None
            for name, ref in ((weight, use.mark.weight), (bias, use.mark.bias)):
                if name is not None and ref is not None:
                    call = use.call if ref.factor is None else replace(use.call, factor=ref.factor)
                    found.setdefault(name, []).append(call)
        return found

    def _has(self, name: str, bias: Ref | None) -> bool:
        layer = self.layers[name]
        return bias is not None and layer.paths.get("bias") == bias.name and "weight" in layer.paths


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


def modules(model: nn.Module, skip: tuple[str, ...] = ()) -> Plan:
    """The plan that types of modules suggest; `skip` are patterns of parameter names (`head.*`) to leave uncovered.

    Raises ValueError for lazy modules that have not seen a batch, and for a pattern that matches nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of the class {type(model).__name__}; need a torch.nn.Module, not its parameters")
    model = unwrapped(model)
    check_whole(model)
    names = [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no shape yet: run one batch through the model first")
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"skip pattern {pattern!r} matches no parameter; there are {sorted(names)[:8]}")
    made_of = tuple((n, p, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False))
    shapes = tuple(p.shape for _, p, _ in made_of)
    return remade(Plan({}, {}, {}, made_of, shapes, model, tuple(skip)), (), {}, False)


def again(old: Plan, model: nn.Module) -> Plan:
    """The plan of a model whose parameters changed: what was seen before still holds where parameters were frozen, or
    thawed that were trained when it was seen."""
    new = modules(model, old.skip)
    before = {name: shape for (name, _, _), shape in zip(old.made_of, old.shapes, strict=True)}
    now_of = ties(new.made_of)
    were = ties(old.made_of)
    now = _trained(new)
    for name, p, trained in new.made_of:
        if trained and (before.get(name) != p.shape or now_of[name] != were[name]):
            return new  # with parameters that joined in or grew, an operation may have more of them
    known = any(now <= names for names in old.shown)
    if known or now <= _trained(old):
        return remade(replace(new, shown=old.shown), old.marks, old.odd, old.seen or known)
    marks = tuple(mark for mark in old.marks if not mark.names & now)
    odd = {name: why for name, why in old.odd.items() if name not in now}
    return remade(replace(new, shown=tuple(names for names in old.shown if not names & now)), marks, odd, False)


def as_trained(plan: Plan, names: Collection[str]) -> Plan:
    """The plan of the same model with these parameters trained and the others frozen."""
    return replace(plan, made_of=tuple((name, p, name in names) for name, p, _ in plan.made_of))


def _trained(plan: Plan) -> frozenset[str]:
    return frozenset(name for name, _, trained in plan.made_of if trained)


def _with(mark: Mark, names: set[str]) -> Mark:
    """A mark with those of its parameters that have these names."""
    weight = mark.weight if mark.weight is not None and mark.weight.name in names else None
    bias = mark.bias if mark.bias is not None and mark.bias.name in names else None
    return replace(mark, kind=None if weight is None else mark.kind, weight=weight, bias=bias)


def remade(plan: Plan, marks: tuple[Mark, ...], odd: Mapping[str, str], seen: bool) -> Plan:
    """The plan of the same model by what was seen of it, and what modules suggest of parameters that were not."""
    assert plan.model is not None
    known = plan.known
    names = set(known.values())
    here = tuple(mark for mark in dict.fromkeys(_with(mark, names) for mark in marks) if mark.names)
    shown = {name for mark in here for name in mark.names} | odd.keys()
    suggested = []
    for mark in hints(plan.model, known):
        if mark.bias is not None and mark.bias.name in shown:
            mark = replace(mark, bias=None)
        if (mark.weight or mark.bias) is not None and (mark.weight is None or mark.weight.name not in shown):
            suggested.append(mark)
    trained = {id(p) for _, p, flag in plan.made_of if flag}  # of several names, one is enough
    parameters = {name: p for name, p in plan.model.named_parameters() if id(p) in trained}
    covered = {name: p for name, p in parameters.items() if id(p) in known}
    layers, uncovered, places = settled([*here, *suggested], odd, covered, _owners(plan.model))
    paths = {path for layer in layers.values() for path in layer.paths.values()}
    for name in parameters.keys() - paths - uncovered.keys():
        pattern = _skipped(name, plan.skip)
        what = unusual(parameters[name])
        why = f"skipped by {pattern!r}" if pattern else f"it is {what}, and a layer is of real numbers" if what else ""
        uncovered[name] = why or (UNUSED if seen else UNSEEN)
    rest = {name: p for name, p in parameters.items() if name in uncovered and name not in paths}
    uncovered = {name: uncovered[name] for name in rest}
    now = _trained(plan)
    sets = (*(others for others in plan.shown if not others <= now), now) if seen else plan.shown
    found = {"layers": layers, "uncovered": uncovered, "rest": rest, "places": places}
    return replace(plan, **found, marks=tuple(marks), odd=dict(odd), seen=seen, shown=sets)


@lru_cache(maxsize=1 << 14)
def _skipped(name: str, skip: tuple[str, ...]) -> str:
    """The first pattern that a name matches; asked at every forward."""
    return next((pattern for pattern in skip if fnmatchcase(name, pattern)), "")


def _owners(model: nn.Module) -> dict[str, str]:
    """Name of a weight -> that of its module, as the layer is called."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        for role in ("weight", "in_proj_weight"):
            p = dict(module.named_parameters(recurse=False)).get(role)
            if p is not None and id(p) in names:
                found.setdefault(names[id(p)], path or type(module).__name__.lower())
    return found
