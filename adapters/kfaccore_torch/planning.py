"""The plan of an engine, the state that goes with it, and how both follow what forwards show."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.capture import Capture
from kfaccore_torch.distributed import Distributed
from kfaccore_torch.follow import carried, left_out, moved
from kfaccore_torch.footing import Footing
from kfaccore_torch.inside import check_plain
from kfaccore_torch.kinds import Tied
from kfaccore_torch.layout import pools
from kfaccore_torch.lost import Lost
from kfaccore_torch.observe import Observer
from kfaccore_torch.plan import Plan, again, remade, unwrapped
from kfaccore_torch.report import Coverage, coverage
from kfaccore_torch.rest import called, filled, with_method
from kfaccore_torch.separate import check_together
from kfaccore_torch.settle import Layer
from kfaccore_torch.sight import Sight, sighted
from kfaccore_torch.table import read, written


class Planning(Footing):
    """Plan, core and state of a model, of which each goes with the others.

    given   the core as the caller made it; `core` has the methods of what the plan adds
    partly  whether some ranks may lack statistics of layers that others have, in this step
    counting, parted   whether a rank has losses in it that count, and such as are parts of a sum by weights
    away    layers that are frozen, or wait for a forward to show them, of which the state keeps what it has
    """

    model: nn.Module
    given: kf.Preconditioner
    called: set[str]
    mixing: set[str]
    partly: bool = False
    counting: bool = True
    parted: bool = False
    plan: Plan
    away: dict[str, Layer]
    lost: Lost
    _blocks: tuple[Plan, dict[str, kf.Block]] | None

    def _planned(self, found: Plan, known: Mapping[str, Layer] = MappingProxyType({})) -> Plan:
        """A plan as the settings want it, and the core that goes with it and with what stays of the layers `known`;
        ValueError where they do not allow it."""
        lost = {name: why for name, why in found.uncovered.items() if found.seen or why.startswith("skipped")}
        if self.settings.strict and lost:
            reasons = "\n".join(f"  {name}: {reason}" for name, reason in lost.items())
            raise ValueError(f"strict: {len(lost)} parameters are not covered\n{reasons}")
        if found.seen and not found.layers and self.settings.uncovered is None:
            name = type(unwrapped(self.model)).__name__
            why = "; ".join(f"{parameter}: {reason}" for parameter, reason in list(found.uncovered.items())[:3])
            raise ValueError(f"no parameter of {name} is covered ({why}); see kfaccore_torch.plan")
        if self.settings.uncovered is not None and kf.own_gradients(self.given) and found.seen and found.rest:
            method = self.given.network or self.given.methods
            raise ValueError(
                f"{method} is made of each example's own gradient, and parameters {sorted(found.rest)[:5]} have no "
                f"record of examples: pass rest=torch.optim.Adam for them"
            )
        found = self.filled(found)
        away = {} if self.given.network is not None else left_out(known, found)
        core = self.core_of({**away, **found.layers})
        _unpooled(core, found)
        self.core = core
        self.away = away
        return found

    def filled(self, plan: Plan) -> Plan:
        """A plan with layers for what is not covered, where the settings have a method for it."""
        return plan if self.settings.uncovered is None else filled(plan)

    def core_of(self, layers: Mapping[str, Layer]) -> kf.Preconditioner:
        """The core that goes with these layers."""
        return with_method(self.given, layers, self.settings.uncovered)

    def memory(self) -> dict[str, kf.Footprint]:
        """{layer: bytes of averages and inverses, and the peak of an update}, as the plan is now; nothing is made."""
        return self.core.footprint(self.held(), np.zeros(1, str(self.like.dtype).removeprefix("torch.")))

    def replan(self) -> bool:
        """Follow the model: parameters frozen, thawed, replaced, moved or of another shape since the plan was made, and
        those that newer forwards have used as a layer again. True if anything changed; layers of the same name and
        sizes keep their state, and new ones are measured and refreshed at once. ValueError inside a transform of
        torch.func."""
        check_plain()
        if not self.plan.holds(self.model):
            before = self.plan
            self.adopt(again(before, self.model))
            known, _ = moved(before.layers, self.plan)
            covered = {path for layer in known.values() for path in layer.paths.values()}
            unshown = covered & (self.plan.uncovered.keys() - before.uncovered.keys())
            self.new = self.new or bool(unshown)  # a forward must show them anew
            self.settle()
            return True
        if self.settle():
            return True
        if not self.lost.quiet or self.core.comm.world > 1:  # ranks need not have seen the same
            return False
        found = self.lost.regained(self.plan, self.state.step)
        if found is not None:
            self.adopt(found)
        return found is not None

    def follow(self, seen: Capture) -> None:
        """A forward ends here: follow what it has frozen, thawed or bound. Calls of parameters that it has bound others
        in the place of are no layer's any more; what was bound or thawed meanwhile is seen in the graph."""
        seen.span.close()
        if not seen.span.changed or not self.replan():
            return
        before = {name: p for name, p, _ in seen.plan.made_of}
        gone = {name for name, p, _ in self.plan.made_of if before.get(name) is not p}
        seen.uses = [use for use in seen.uses if gone.isdisjoint(use.mark.names)]
        seen.plan = self.plan
        seen.known = self.plan.known

    def sight(self, seen: Capture, heads: list[torch.Tensor]) -> Sight:
        """What lies behind a prediction; the plan follows what it shows."""
        with self.beside.looking(seen.span):
            found = sighted(seen, heads)
        if found.plan is not self.plan:
            self.adopt(found.plan)
            seen.plan = self.plan
            self.called |= {name for name, _ in found.calls}
        self.lost.note(self.state.step, found.marks, found.odd)
        more = called(self.plan) if self.settings.uncovered is not None else []
        quiet = self.beside.quiet(found.graph, seen.span, found.quiet.retaining)
        return replace(found, plan=self.plan, calls=(*found.calls, *more), quiet=quiet)

    def agree(self, measured: Iterable[str], counting: bool = True, parted: bool = False) -> None:
        """One plan on all ranks: what any of them has seen, experts that only some of them used, all of them know; and
        whether any has layers that are not among those `measured` for this step, or losses that count, or `parted`."""
        comm = self.core.comm
        if comm.world == 1 or not isinstance(comm, Distributed):
            return
        check_together(self.model)
        number = zlib.crc32(json.dumps(written(self.plan)).encode()) % 2**20
        missed = not self.plan.layers.keys() <= set(measured)
        told = comm.all_reduce([np.array([number, number**2, missed, counting, parted], np.float64)])[0]
        total, squares, *having = told.tolist()
        self.partly, self.counting, self.parted = (ranks > 0 for ranks in having)
        if squares * comm.world == total**2:  # no variance: equal everywhere
            return
        self.partly = True
        tables = comm.gathered(written(self.plan))
        marks = dict.fromkeys(mark for table in tables for mark in read(table, self.plan).marks)
        odd = {name: why for table in reversed(tables) for name, why in table["odd"].items()}
        self.adopt(remade(self.plan, tuple(marks), odd, any(table["seen"] for table in tables)))

    def adopt(self, found: Plan) -> None:
        """Take another plan of the same model; layers of the same parameters keep their state whatever they are called
        now, others of the same name and sizes that of the name."""
        old = self._state
        had = self.held() if old is None else dict(old.blocks)
        before = self.plan
        core = self.core
        known, names = moved({**self.away, **before.layers}, found)
        self.plan = self._planned(found, known)
        self.lost.follow(before, self.plan, 0 if old is None else old.step)
        if _ways(before) != _ways(self.plan):
            self.observer = Observer(empty=self.observer.empty)
        now = self.held()
        kept = {name: was for name, was in names.items() if name in now and had.get(was) == now[name]}
        kept = {name: was for name, was in kept.items() if name == was or self._alike(core, was, name)}
        if old is not None and (kept.keys() != now.keys() or {*kept.values()} != had.keys() or _renamed(kept)):
            self._state = carried(old, self.first_state(self.core, now), kept)
        self.mixing = {name for name, was in names.items() if was in self.mixing}
        back = [name for name, was in kept.items() if name in self.plan.layers and was not in before.layers]
        waited = old is not None and self._state.missed.among(sorted(back)) is not None
        self.new = self.new or waited or bool(self.plan.layers.keys() - kept.keys())

    def _alike(self, before: kf.Preconditioner, was: str, name: str) -> bool:
        """Whether the state of a layer is one of the method that it has under its new name."""
        return self.core.network is not None or before.assigned.of(was) == self.core.assigned.of(name)

    def held(self) -> dict[str, kf.Block]:
        """Sizes of the layers that the state is of: those of the plan, and those away."""
        return {**self.sized(self.away), **self.blocks()}

    def blocks(self) -> dict[str, kf.Block]:
        """Sizes of the layers, with the capacities of the settings; of one plan they are made once."""
        if self._blocks is None or self._blocks[0] is not self.plan:
            self._blocks = self.plan, self.sized(self.plan.layers)
        return self._blocks[1]

    def sized(self, layers: Mapping[str, Layer]) -> dict[str, kf.Block]:
        """Sizes of layers, with the capacities of the settings."""
        capacity = {"samples": self.settings.samples, "rows": self.settings.rows}
        return {name: replace(layer.kind.block(), **capacity) for name, layer in layers.items()}

    def report(self) -> Coverage:
        """Parameter by parameter: rule, factor sizes, bytes, and how the block is approximated."""
        mixing = {name for name in self.mixing if name in self.plan.layers}
        return coverage(self.plan, self.blocks(), self.core, mixing)


def _renamed(names: Mapping[str, str]) -> bool:
    return any(name != was for name, was in names.items())


def _ways(plan: Plan) -> dict[str, Any]:
    """What the layers of a plan are, whatever parameters they have."""
    return {name: (layer.kind, layer.paths, layer.views) for name, layer in plan.layers.items()}


def _unpooled(core: kf.Preconditioner, plan: Plan) -> None:
    """ValueError where a layer's record holds rows of two kinds and its method takes an example's rows for one."""
    for name, layer in plan.layers.items():
        if isinstance(layer.kind, Tied) and core.network is None and pools(core.assigned.of(name)):
            parameters = ", ".join(layer.paths.values())
            raise ValueError(
                f"{parameters} is table and output layer: its record holds rows of both, and sharing=kfaccore.reduce "
                f"would mix them; pass methods {{'{name}': kfaccore.KFAC(), ...}} with another sharing for this layer"
            )
