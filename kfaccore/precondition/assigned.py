"""Which method has which layer: those that a network-level method covers together, every other one by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from kfaccore.method import Block, Hyper, LinearSides, Method, Resting, RowsAtSolve, Unmeasured, declares
from kfaccore.options import need
from kfaccore.precondition.groups import NetworkMethod
from kfaccore.xp.arrays import is_tracer
from kfaccore.xp.ranges import NO_BOUND, within

Grad = TypeVar("Grad")


@dataclass(frozen=True)
class Assigned:
    """`methods`, one for all layers or a mapping from layer to method, and the network-level method if there is one.

    Methods are given blocks whose sides wider than `widest` are diagonal, except those of `LinearSides`.
    """

    methods: Method | Mapping[str, Method] | None
    network: NetworkMethod | None
    widest: int

    def __post_init__(self) -> None:
        within("Preconditioner.widest", self.widest, NO_BOUND)
        if self.widest < 1:
            raise ValueError(
                f"Preconditioner got widest={self.widest}; need at least 1, the widest side with a full factor"
            )
        if self.methods is None and self.network is None:
            raise ValueError("a Preconditioner needs methods, such as KFAC(), or a network-level method as network")
        if self.network is not None:
            need("Preconditioner", "network", self.network, NetworkMethod, "a network-level method such as TwoLevel()")
        for method in self.every():
            if method is not self.network:
                need("Preconditioner", "methods", method, Method, "a method such as KFAC()")

    def together(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """Layers of the network-level method, as it is given them."""
        if self.network is None:
            return {}
        given = {name: self._narrowed(block, self.network) for name, block in blocks.items()}
        return {name: given[name] for name in self.network.covers(given)}

    def narrowed(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """All layers, as their methods are given them."""
        together = self.together(blocks)
        found = {}
        for name, block in blocks.items():
            found[name] = together[name] if name in together else self._narrowed(block, self.of(name))
        return found

    def _narrowed(self, block: Block, method: object) -> Block:
        wide_in = block.d_in > self.widest
        wide_out = block.d_out > self.widest
        if not (wide_in or wide_out) or declares(method, LinearSides):
            return block
        return replace(block, diagonal_in=block.diagonal_in or wide_in, diagonal_out=block.diagonal_out or wide_out)

    def of(self, name: str) -> Method:
        """The method of a layer that stands by itself; ValueError where it has none."""
        if self.methods is None:
            raise ValueError(f"{self.network} leaves out layer {name!r}: give `methods` for it, Identity() to leave it")
        if not isinstance(self.methods, Mapping):
            return self.methods
        if name not in self.methods:
            raise ValueError(f"methods has no entry for layer {name!r}; give it one, Identity() to leave it alone")
        return self.methods[name]

    def whose(self, name: str, alone: Mapping[str, object]) -> Method | NetworkMethod:
        """The method of any layer, given the states of those that stand by themselves."""
        return self.of(name) if name in alone or self.network is None else self.network

    def every(self) -> list[Method | NetworkMethod]:
        """All methods there are."""
        methods = self.methods.values() if isinstance(self.methods, Mapping) else [self.methods]
        return [method for method in (*methods, self.network) if method is not None]

    def resting(self, names: Iterable[str], alone: Mapping[str, object], hyper: Callable[[str], Hyper]) -> set[str]:
        """The layers of `names` whose method rests, given the numbers of the step to come."""
        rests = {name: method.rests(hyper(name)) for name, method in self._able(names, alone, Resting).items()}
        traced = sorted(name for name, flag in rests.items() if is_tracer(flag))
        if traced:
            raise ValueError(
                f"the methods of layers {traced} rest in some epochs, and a traced step cannot tell in which: run it "
                f"outside jit, or take a method that never rests"
            )
        return {name for name, flag in rests.items() if flag}

    def free(self, grads: Mapping[str, Grad], alone: Mapping[str, object]) -> dict[str, Grad]:
        """The gradients of layers that are not solved with the rows of the batch: theirs must be the batch's own."""
        held = self.solved_with_rows(grads, alone)
        return {name: grad for name, grad in grads.items() if name not in held}

    def solved_with_rows(self, names: Iterable[str], alone: Mapping[str, object]) -> set[str]:
        """The layers of `names` whose method solves with the rows of the batch, whatever the clocks say."""
        held = set(self._able(names, alone, RowsAtSolve))
        if self.network is not None and self.network.needs_records:
            held |= {name for name in names if self.whose(name, alone) is self.network}
        return held

    def unmeasured(self, names: Iterable[str], alone: Mapping[str, object]) -> set[str]:
        """The layers of `names` whose method needs no records at all."""
        return set(self._able(names, alone, Unmeasured))

    def _able(self, names: Iterable[str], alone: Mapping[str, object], capability: type) -> dict[str, Any]:
        """The layers of `names` whose method has a capability, with it; a method is asked once for all its layers."""
        distinct = {id(method): method for method in self.every()}
        able = {key for key, method in distinct.items() if declares(method, capability)}
        if not able:
            return {}
        whose = {name: self.whose(name, alone) for name in names}
        return {name: method for name, method in whose.items() if id(method) in able}
