"""What a step has written into `.grad` is a direction: where a backward pass adds to it, or a step takes it, it is
taken for a gradient, which is named, whichever Preconditioner of the parameter has written it. A loop that zeroes its
gradients pays nothing, and a device is not waited for."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING
from weakref import ReferenceType, ref

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import TensorWeakRef

from kfaccore_torch.compiled import uncompiled
from kfaccore_torch.gone import Left, gradients
from kfaccore_torch.thrown import Sample, sampled
from kfaccore_torch.unread import known_at_once
from kfaccore_torch.unusual import dense

if TYPE_CHECKING:
    from kfaccore_torch.settle import Layer

_ZERO = (
    "Zero the gradients after each step(), and call it only where the optimizer steps (under accelerate: `if "
    "accelerator.sync_gradients: pre.step()`); give parts of a model whose optimizers step at different times a "
    "Preconditioner each"
)
_SHARED = (
    "A parameter has one Preconditioner: make one over all that share it, with a kfaccore.Joint for the losses of "
    "several heads, or leave the shared layers to one of them by `skip` in the others"
)


@dataclass(eq=False)
class Written:
    """Directions of the last step that are still there, with their versions; nobody is kept from letting go of them.

    said  whether a warning was given
    """

    said: bool = False
    _left: list[tuple[torch.Tensor, TensorWeakRef, int]] = field(default_factory=list)
    _sample: Sample = field(default_factory=dict)  # of the first: what goes past autograd leaves no version
    _sums: list[tuple[torch.Tensor, TensorWeakRef]] = field(default_factory=list)  # those that passes have added to
    _foreign: bool = False  # passes of another Preconditioner's loss
    _doubted: bool = False  # whether a device has shown a reason to take one
    _looks: int = 0
    _listed: bool = False

    def note(self, layers: Iterable[Layer]) -> None:
        """A step has written the gradients of these."""
        if not self._listed:
            self._listed = True
            _WRITERS[:] = [*(one for one in list(_WRITERS) if one() is not None), ref(self)]
        now = gradients(list({id(p): p for layer in layers for p in layer.parameters.values()}.values()))
        self._left = [(p, TensorWeakRef(grad), version) for p, grad, version in now]
        self._sums = []
        first = now[:1]
        here = bool(first) and (self._doubted or known_at_once(first[0][1]))
        self._sample = sampled(first) if here else {}

    def follow(self, value: torch.Tensor, layers: Mapping[str, Layer]) -> None:
        """Look, when a loss is differentiated, whether the pass adds to what the last step wrote."""
        for one in (self, *self._others()) if value.requires_grad else ():
            if one._left and not one.said:
                value.register_hook(partial(self._added, one, layers))

    def check(self, layers: Mapping[str, Layer], given: Iterable[str]) -> None:
        """Before a step on the gradients of the layers `given`. ValueError where all of them are what the last one
        wrote, as where it is called twice, or what others did; a warning, once, where some are."""
        now = {id(p) for name in given for p in layers[name].parameters.values()}
        for one in (self, *self._others()):
            one._tell_sums(layers, now)
        own = self._taken(now, self.said, False)
        found = [(one, taken) for one in self._others() if (taken := one._taken(now, self.said, one._clipped()))]
        foreign = {x for _, taken in found for x in taken}
        names = _names(layers, own | foreign)
        if now and now <= own | foreign and not any(one._clipped() for one, _ in found):
            whose = "it wrote itself" if now <= own else "another Preconditioner wrote"
            raise ValueError(
                f"step() was called on the directions that {whose}, in {names}: no backward pass has added to them, "
                f"and nothing else was given. {_SHARED if foreign else 'Call it once for each step of the optimizer'}"
            )
        if foreign:
            self._warn(names, "another Preconditioner takes them for gradients", _SHARED)
        elif own:
            self._warn(names, "step() takes them for gradients again")

    def _taken(self, now: set[int], said: bool, clipped: bool) -> set[int]:
        """Of parameters, by id, those whose gradients are what the last step wrote, or have that `clipped`; where it
        was said of some already, all or none."""
        if not self._left:
            return set()
        left = self._there() if clipped else self._still()
        own = {id(p) for p, _, _ in left} & now
        if not own or (said and not now <= own) or not _nonzero(grad for _, grad, _ in left):
            return set()
        known = [torch.equal(sampled([one])[one[0]], self._sample[one[0]]) for one in left if one[0] in self._sample]
        if not known and not known_at_once(left[0][1]):
            self._doubted = True  # a replayed graph writes to the same tensors, and leaves no version
            return set()
        return own if clipped or all(known) else set()

    def _others(self) -> list[Written]:
        """Others whose directions may be there."""
        alive = [one() for one in list(_WRITERS)]  # a copy: other threads may train other models
        return [one for one in alive if one is not None and one is not self and one._left]

    @uncompiled
    def _added(self, one: Written, layers: Mapping[str, Layer], _: torch.Tensor) -> None:
        """By the pass that is running, to what `one` has written."""
        one._adds({id(p) for layer in layers.values() for p in layer.parameters.values()}, one is not self)

    def _adds(self, known: set[int], foreign: bool) -> None:
        """By the pass that is running, which is of a loss of a `foreign` Preconditioner or of this one's. A step says
        so: gradients that are zeroed before it, as those of an attack, are in none."""
        self._sums = [(p, old) for p, old in self._sums if p.grad is old() and _nonzero([p.grad])]
        left = self._still() if self.said or not self._clipped() else self._there()
        try:
            into = [one for one in left if id(one[0]) in known and one[0].requires_grad and _reached(one[0])]
        except RuntimeError:  # `torch.autograd.grad`, which adds to nothing
            return
        if not into or self.said:
            return
        self._looks += 1
        if self._looks & (self._looks - 1):  # `p.grad.data.zero_()` leaves no version: looked at ever more rarely
            return
        if _nonzero(grad for _, grad, _ in into):
            self._sums = [(p, TensorWeakRef(grad)) for p, grad, _ in into]
            self._foreign = foreign

    def _tell_sums(self, layers: Mapping[str, Layer], now: set[int]) -> None:
        """A warning, once, where a step is of gradients that were added to directions."""
        added = {id(p) for p, old in self._sums if p.grad is not None and p.grad is old()} & now
        if added:
            do = _SHARED if self._foreign else _ZERO
            self._warn(_names(layers, added), "a backward pass added gradients to them", do)

    def _there(self) -> Left:
        """Those that are still where the step has put them."""
        self._left = [(p, old, version) for p, old, version in self._left if p.grad is not None and p.grad is old()]
        return [(p, p.grad, version) for p, _, version in self._left if p.grad is not None]

    def _still(self) -> Left:
        """Those that nothing is known to have written to since."""
        return [one for one in self._there() if one[1]._version == one[2]]

    def _clipped(self) -> bool:
        """Whether the one that was sampled was multiplied since: its version tells that it was written to, not how."""
        for one in self._there():
            old = self._sample.get(one[0])
            if old is not None and one[1]._version != one[2]:
                now = sampled([one])[one[0]].double()
                product = torch.dot(now, old.double())
                length = now.norm() * old.double().norm()
                return len(now) > 3 and bool(product) and torch.allclose(length, product.abs(), rtol=1e-6)
        return False

    def _warn(self, names: list[str], what: str, do: str = _ZERO) -> None:
        if self.said:
            return
        self.said = True
        warnings.warn(
            f".grad of {names} holds directions that step() wrote, and {what}: sums with directions are no gradients, "
            f"and are preconditioned as if they were. {do}",
            stacklevel=4,
        )

    def __getstate__(self) -> dict[str, object]:
        """Without tensors, which no copy shares."""
        return {**self.__dict__, "_left": [], "_sums": [], "_sample": {}, "_listed": False}


_WRITERS: list[ReferenceType[Written]] = []  # those that have written; each lives as long as its Preconditioner


def _reached(p: torch.Tensor) -> bool:
    """Whether the pass that is running adds to the gradient of a parameter."""
    return torch._C._will_engine_execute_node(get_gradient_edge(p).node)  # type: ignore[arg-type]


def _nonzero(grads: Iterable[torch.Tensor | None]) -> bool:
    return any(grad is not None and bool(dense(grad).any()) for grad in grads)


def _names(layers: Mapping[str, Layer], own: set[int]) -> list[str]:
    paths = ((path, layer.parameters[role]) for layer in layers.values() for role, path in layer.paths.items())
    return sorted({path for path, p in paths if id(p) in own})
