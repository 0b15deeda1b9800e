"""A parameter that was a layer's and fits none any more: said once, and a layer's again when forwards allow it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kfaccore_torch.calls import Mark
from kfaccore_torch.covered import Changed
from kfaccore_torch.plan import Plan, remade


@dataclass
class Lost:
    """Parameters that a forward used in a way that goes with no layer beside the ways before.

    Their old ways are forgotten once steps in a row have shown only ways that go together: one step the first time, and
    each time that a parameter is lost again twice as many, so that ways which alternate do not cost a layer its state
    over and over.

    waits   name -> how many such steps it takes
    quiet   name -> how many there were, of those that are lost now
    """

    waits: dict[str, int] = field(default_factory=dict)
    quiet: dict[str, int] = field(default_factory=dict)
    _beside: dict[str, set[str]] = field(default_factory=dict)  # what they shared marks with, as a bias with its weight
    _marks: dict[Mark, None] = field(default_factory=dict)  # of the steps in a row
    _odd: set[str] = field(default_factory=set)  # of the newest step
    _step: int | None = None  # the newest that showed anything
    _since: int | None = None  # the one that lost a parameter, which shows what it was lost to
    _changed: Changed = field(default_factory=Changed)

    def follow(self, old: Plan, new: Plan, step: int) -> None:
        """One plan takes the place of another at a step: a warning for what it no longer covers."""
        seen = _named(new.marks) | new.odd.keys()
        covered = {path for layer in old.layers.values() for path in layer.paths.values()}
        gone = sorted(_named(old.marks) & seen & covered & (new.uncovered.keys() - old.uncovered.keys()))
        fresh = [name for name in gone if name not in self.waits]
        if fresh:
            reasons = "; ".join(f"{name!r}: {new.uncovered[name]}" for name in fresh)
            warnings.warn(
                f"these parameters were preconditioned and are not any more, since a forward used them in another way: "
                f"{reasons}. They are as others that are not covered until newer forwards use them in one way again",
                stacklevel=2,
            )
        for name in gone:
            self.waits[name] = 2 * self.waits.get(name, 0) or 1
            self.quiet[name] = 0
            self._beside[name] = {other for mark in old.marks if name in mark.names for other in mark.names}
        self.quiet = {name: count for name, count in self.quiet.items() if name in new.uncovered}
        if gone:
            self._since = step
            self._step = None
        self._changed.follow(old, new, self.waits.keys())

    def note(self, step: int, marks: Iterable[Mark], odd: Mapping[str, str]) -> None:
        """What one forward of a step has shown."""
        if not self.quiet or step == self._since:
            return
        self._step = step
        watched = self._with_others(self.quiet.keys())
        self._marks.update(dict.fromkeys(mark for mark in marks if mark.names & watched))
        self._odd |= odd.keys() & watched

    def regained(self, plan: Plan, step: int) -> Plan | None:
        """The plan that covers again what forwards since have used in one way; None where that is nothing yet, and
        inside a step whose forwards have shown something."""
        if self._step is None or step == self._step:
            return None
        self._step = None
        told = _named(self._marks) | self._odd
        trial = self._forgetting(plan, self.quiet.keys() & told - self._odd)
        agree = told - trial.uncovered.keys()
        for name in told & self.quiet.keys():
            self.quiet[name] = self.quiet[name] + 1 if name in agree else 0
        ready = {name for name in agree & self.quiet.keys() if self.quiet[name] >= self.waits[name]}
        found = self._forgetting(plan, ready) if ready else None
        if found is not None or told - agree:
            self._marks = {}
        self._odd = set()
        return found

    def _with_others(self, names: Iterable[str]) -> set[str]:
        return {other for name in names for other in self._beside[name]}

    def _forgetting(self, plan: Plan, names: set[str]) -> Plan:
        """The plan with the newest marks of these parameters alone, and of others that they shared marks with."""
        names = names | (self._with_others(names) & _named(self._marks) - self._odd)
        kept = [mark for mark in plan.marks if not mark.names & names]
        fresh = [mark for mark in self._marks if mark.names & names]
        odd = {name: why for name, why in plan.odd.items() if name not in names}
        return remade(plan, tuple(dict.fromkeys([*kept, *fresh])), odd, plan.seen)


def _named(marks: Iterable[Mark]) -> set[str]:
    """Names of the parameters that marks are of."""
    return {name for mark in marks for name in mark.names}
