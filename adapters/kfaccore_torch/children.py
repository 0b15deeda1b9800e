"""What Taylor rules made of a Sequential's children, and whether that is what the model and the residual compute."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Slopes = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor]]
_COMPARED: WeakKeyDictionary[nn.Module, dict[Hashable, Hashable]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Passed:
    """One child: its name, the rows that went in (of a Linear with the bias's column) and the slots that came out."""

    name: str
    module: nn.Module
    rows: Tensor
    z: Tensor


def uses(passed: Sequence[Passed]) -> dict[str, list[Passed]]:
    """Linear layers by name, with all uses of each; ValueError for two that share a part of their parameters."""
    found: dict[str, list[Passed]] = {}
    names: dict[frozenset[int], str] = {}
    for one in passed:
        if not isinstance(one.module, nn.Linear):
            continue
        params = frozenset(id(p) for p in one.module.parameters())
        name = names.setdefault(params, one.name)
        half = [other for had, other in names.items() if had & params and had != params]
        if half:
            raise ValueError(f"layers {half[0]!r} and {one.name!r} share some of their parameters: share all or none")
        found.setdefault(name, []).append(one)
    return found


def compare(
    model: nn.Module,
    x: Tensor,
    passed: Sequence[Passed],
    slopes: Slopes,
    residual: Callable[..., Tensor],
    leaf: Tensor,
    r: Tensor,
) -> None:
    """Once for a model as it is and a residual's code: ValueError where the rules tell something else than model(x), or
    where r (batch,) is no function of each point's own slots, `leaf` (batch, slots, outputs)."""
    code = residual.__code__ if isinstance(residual, FunctionType) else type(residual)
    known = _COMPARED.setdefault(model, {})
    now = tuple(_shown(name, module) for name, module in [("", model), *model._modules.items()])
    if known.get(code) == now:
        return
    with torch.no_grad():
        same = _close(model(x), passed[-1].z[:, 0])
    if not same:
        raise ValueError(_differing(model, x, passed))
    for one in passed:
        if not isinstance(one.module, nn.Linear):
            _elementwise(one, slopes)
    _own_points(passed, leaf, r)
    known[code] = now


def _shown(name: str, module: Any) -> Hashable:
    """What tells one forward of a module from another."""
    own = vars(module).get("forward")
    hooks = (*module._forward_pre_hooks, *module._forward_hooks)
    return name, id(module), type(module), type(module).forward, id(own), hooks, module.training


def _differing(model: nn.Module, x: Tensor, passed: Sequence[Passed]) -> str:
    """The first child whose output in model(x) is not what the rules say."""
    seen: list[tuple[nn.Module, Any]] = []
    children = {id(one.module): one.module for one in passed}.values()
    handles = [child.register_forward_hook(lambda m, _, y: seen.append((m, y))) for child in children]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    what = f"{type(model).__name__} computes something else than its children one after the other"
    for one, (module, y) in zip_longest(passed, seen, fillvalue=(None, None)):
        if not isinstance(one, Passed) or one.module is not module or not _close(y, one.z[:, 0]):
            child = f"{one.name!r} ({type(one.module).__name__})" if isinstance(one, Passed) else "one used again"
            what = f"the first child whose output in model(x) is not the rules' is {child}"
            break
    return (
        f"Taylor rules do not give model(x): {what}. They know Linear layers and registered activations, no hooks and "
        f"no forward of one's own: write such a part into the residual or into the points, or give the plain Sequential"
    )


def _elementwise(one: Passed, slopes: Slopes) -> None:
    """ValueError where an activation's registered derivatives are not its own, or it is not elementwise."""
    z = one.rows[:, 0].detach().requires_grad_()
    _, s1, s2 = slopes(one.module, z.detach())
    signs = torch.rand(z.shape, generator=torch.Generator().manual_seed(0)).sub(0.5).sign().to(z)
    (first,) = torch.autograd.grad((one.module(z) * signs).sum(), z, create_graph=True)
    second = torch.zeros_like(z)
    if first.requires_grad:
        (second,) = torch.autograd.grad((first * signs).sum(), z, materialize_grads=True)
    for what, found, rule in (("first", first, s1 * signs), ("second", second, s2)):
        if not _close(found.detach(), rule):
            raise ValueError(
                f"the {what} derivative of {one.name!r} ({type(one.module).__name__}) is not what @smooth was told: "
                f"it must be elementwise, and register value, first and second derivative as its forward has them"
            )


def _own_points(passed: Sequence[Passed], leaf: Tensor, r: Tensor) -> None:
    """ValueError where a residual sees other points' slots, the model's parameters, or no slots at all."""
    if not r.requires_grad:
        raise ValueError("the residual does not depend on the slots it was given: it detaches them, or is a constant")
    weights = 1 + torch.rand(len(r), generator=torch.Generator().manual_seed(0)).to(r)
    linear = [one for one in passed if isinstance(one.module, nn.Linear)]
    every = {f"{one.name}.{name}": p for one in linear for name, p in one.module.named_parameters()}
    named = {name: p for name, p in every.items() if p.requires_grad}
    ask = [leaf, *named.values()]
    whole = torch.autograd.grad(r.sum(), leaf, retain_graph=True, materialize_grads=True)[0]
    weighted, *params = torch.autograd.grad((r * weights).sum(), ask, retain_graph=True, allow_unused=True)
    through = [name for name, g in zip(named, params, strict=True) if g is not None]
    if through:
        raise ValueError(
            f"the residual uses parameters {through} itself: their part of its derivative would be missing from the "
            f"records; compute it from the slots alone"
        )
    weighted = torch.zeros_like(leaf) if weighted is None else weighted
    if not _close(weighted, whole * weights[:, None, None]):
        raise ValueError(
            "the residual of a point depends on other points (a mean over them, a pair of points): a record holds the "
            "derivative by each point's own slots; give one number a point, of that point's slots alone"
        )


def _close(found: Any, told: Tensor) -> bool:
    """Equal to the square root of the rounding, relative to the largest number."""
    if not isinstance(found, Tensor) or found.shape != told.shape:
        return False
    size = torch.nan_to_num(told, 0, 0, 0).abs().max().item()
    return torch.allclose(
        found.to(told.dtype), told, rtol=0, atol=torch.finfo(found.dtype).eps ** 0.5 * size, equal_nan=True
    )
