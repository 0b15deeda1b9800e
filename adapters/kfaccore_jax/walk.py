"""What one evaluation of a model finds: its calls, their inputs and outputs, and where leaves went."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field, replace
from typing import Any

from kfaccore_jax.calls import Call
from kfaccore_jax.lifted import Lifts
from kfaccore_jax.mesh import Shape
from kfaccore_jax.tags import Joined, Param, Tag

OTHER = "apply runs other layers than when it was planned; make a plan for these arguments"


def place_of(key: str) -> str:
    """The place in the model's jaxpr of the equation that a call is, or its operand is."""
    return key.partition("@")[0].partition("/")[0]


def marked(found: Container[str], key: str) -> str:
    """The place among those found that a call stands at, "" for none: an equation, of a call on an operand all
    operands of one ("place@") or this one."""
    place = place_of(key)
    _, at, number = key.partition("@")
    return next((spot for spot in (f"{place}{at}", f"{place}{at}{number}") if spot in found), "")


@dataclass
class Walk:
    """What one evaluation found, keyed by the place of the equation: calls, inputs kept, output shapes, and where
    leaves went that no rule knows. `probes` are added to the outputs of calls. `known` are the calls of the plan, None
    while it is made: an array of one example cannot tell by its shape that a leaf was repeated over the batch. `late`
    are calls at products and sums that a leaf had gone through before they were asked for: planned again with them as
    `asked`, the model is as it will be captured. `lifts` are calls on shared rows that get a row an example, `each`
    what these gave, and `sunk` those of them that could not be followed to the examples."""

    probes: dict[str, Any] | None = None
    known: frozenset[str] | None = None
    asked: frozenset[str] = frozenset()
    prefix: str = ""
    depth: int = 0
    calls: dict[str, Call] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Shape] = field(default_factory=dict)
    leaks: dict[int, list[str]] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    lifts: Lifts | None = None
    each: dict[str, Any] = field(default_factory=dict)
    sunk: set[str] = field(default_factory=set)

    def inside(self, place: int, fresh: bool) -> Walk:
        """For the jaxpr within equation `place`; a fresh one keeps its own data, to be handed out of a trace."""
        return self._under(f"{self.prefix}{place}.", fresh)

    def beside(self, place: int) -> Walk:
        """For equations done in place of `place`, which the model's jaxpr has not: `place_of` them is that one."""
        return self._under(f"{self.prefix}{place}/", False)

    def _under(self, prefix: str, fresh: bool) -> Walk:
        if fresh:
            return Walk(None, self.known, self.asked, prefix, self.depth, lifts=self.lifts)
        return replace(self, prefix=prefix)

    def probes_of(self, place: int) -> dict[str, Any]:
        """The probes of calls inside one equation."""
        prefix = f"{self.prefix}{place}."
        return {key: probe for key, probe in (self.probes or {}).items() if key.startswith(prefix)}

    def absorb(self, inner: Walk, data: dict[str, Any]) -> None:
        """Take over what a fresh inner walk found."""
        self.calls.update(inner.calls)
        self.outputs.update(inner.outputs)
        self.late |= inner.late
        self.sunk |= inner.sunk
        self.data.update(data)
        for leaf, places in inner.leaks.items():
            self.leaks.setdefault(leaf, []).extend(places)

    def leak(self, tags: list[Tag], place: str) -> None:
        """Note that leaves went into an operation that no rule follows."""
        leaves = [tag.leaf for tag in tags if isinstance(tag, Param)]
        leaves += [one.leaf for tag in tags if isinstance(tag, Joined) for one in tag.tags]
        several = len(leaves) > 1 and place in ("mul", "add", "sub", "div", "concatenate", "dot_general", "max", "min")
        self.late |= {tag.place for tag in tags if isinstance(tag, Param) and tag.place and tag.by is None}
        for leaf in dict.fromkeys(leaves):
            named = place.removesuffix("_jaxpr")  # jax 0.6: custom_vjp_call_jaxpr
            self.leaks.setdefault(leaf, []).append(f"{named} of two leaves" if several else named)

    def capture(self, key: str, call: Call, x: Any, y: Any) -> Any:
        """The output of a call with its probe added."""
        lifts = self.lifts if self.lifts is not None and key in self.lifts.keys else None
        probed = y
        if lifts is not None:
            call, x, probed = lifts.raised(call, x, y)
        self.calls[key] = call
        self.outputs[key] = Shape.of(probed)
        if x is not None:
            self.data[key] = x
        if self.probes is not None:
            if key not in self.probes:
                raise ValueError(OTHER)
            probed = probed + self.probes[key]
        if lifts is None:
            return probed
        self.each[key] = probed
        return y
