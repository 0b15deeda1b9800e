"""What every step rule offers: from directions to updates, and whether updates that were applied may stay."""

from __future__ import annotations

from typing import ClassVar, Protocol, TypeVar

from kfaccore.method import Hyper, declares
from kfaccore.precondition.comm import Communicator
from kfaccore.record import Factored, Record
from kfaccore.step.model import Penalty
from kfaccore.xp.arrays import Array
from kfaccore.xp.numbers import Number

M = TypeVar("M")  # a rule's motion: a tree of arrays and numbers


class Rule(Protocol[M]):
    """Frozen numbers; `motion` is the rule's own state.

    needs_records   whether every step needs records of the batch, drawn from the model
    judges          whether `judge` must be asked after the updates were applied
    traced          whether all of it runs under jit, one judgement being final
    terms           whether records may be tuples, one a loss term
    """

    needs_records: ClassVar[bool]
    judges: ClassVar[bool]
    traced: ClassVar[bool]
    terms: ClassVar[bool]

    def init(self, zeros: dict[str, Array]) -> M:
        """Motion before the first step, from zeros shaped like every layer's direction."""
        ...

    def begin(self, motion: M, records: dict[str, Record]) -> M:
        """Before the layers are solved: what is learnt from the records."""
        ...

    def hyper(self, motion: M, hyper: Hyper) -> Hyper:
        """The scheduled numbers, or the rule's own in their place."""
        ...

    def restart(self, motion: M) -> bool | Array:
        """Whether inverses are refreshed off the clock."""
        ...

    def __call__(
        self,
        motion: M,
        directions: dict[str, Array],
        grads: dict[str, Array | Factored],
        records: dict[str, Record],
        l2: Penalty,
    ) -> tuple[dict[str, Array], M, dict[str, Number]]:
        """(updates to subtract, motion, info); info has at least `alpha`, the factor on the directions."""
        ...

    def judge(self, motion: M, share: float, before: float, after: float) -> tuple[Number, M]:
        """The share of the updates that should be in force, given the batch loss with `share` of them.

        The answer is final when it is `share` itself or 0; else apply it and ask again.
        """
        ...


class Spread(Protocol):
    """What a rule that needs records may offer: itself over several ranks."""

    def over(self, comm: Communicator) -> Rule:
        """The rule for ranks whose records add up to the batch."""
        ...


def spread(rule: Rule[M], comm: Communicator) -> Rule[M]:
    """The rule, over the ranks of `comm` where there are several and it needs their records."""
    return rule.over(comm) if comm.world > 1 and rule.needs_records and declares(rule, Spread) else rule
