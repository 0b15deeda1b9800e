"""What every step rule offers: from directions to updates, and whether updates that were applied may stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Protocol, TypeVar

from kfaccore.method import Hyper, declares
from kfaccore.precondition.comm import Communicator
from kfaccore.record import Factored, Record
from kfaccore.step.known import Known
from kfaccore.step.model import Penalty
from kfaccore.xp.arrays import Array
from kfaccore.xp.numbers import Number

M = TypeVar("M")  # a rule's motion: a tree of arrays and numbers


class Rule(Protocol[M]):
    """Frozen numbers; `motion` is the rule's own state.

    needs_records   whether every step needs records of the batch, drawn from the model
    wants_own       whether the loss's own gradients by example are of use, `own` of a step
    judges          whether `judge` must be asked after the updates were applied
    traced          whether all of it runs under jit, one judgement being final
    terms           whether records that it needs may be tuples, one a loss term
    """

    @property
    def needs_records(self) -> bool: ...

    @property
    def wants_own(self) -> bool: ...

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

    def gradients(self, motion: M, grads: Mapping[str, Array | Factored]) -> tuple[Mapping[str, Array | Factored], M]:
        """What the layers are solved for, such as a mean over steps; methods that solve with the rows of the batch are
        given the batch's own gradient instead."""
        ...

    def __call__(
        self,
        motion: M,
        directions: dict[str, Array],
        grads: dict[str, Array | Factored],
        records: dict[str, Record],
        l2: Penalty,
        known: Known,
    ) -> tuple[dict[str, Array], M, dict[str, Number]]:
        """(updates to subtract, motion, info); info has at least `alpha`, the factor on the directions. `known` has the
        loss before the step and more, as far as the caller told it."""
        ...

    def judge(self, motion: M, share: float, before: float, after: float) -> tuple[Number, M]:
        """The share of the updates that should be in force, given the batch loss with `share` of them.

        The answer is final when it is `share` itself or 0; else apply it and ask again.
        """
        ...


class ByLoss:
    """Base of rules that look at losses and directions alone."""

    @property
    def needs_records(self) -> bool:
        """No: the loss alone decides."""
        return False

    @property
    def wants_own(self) -> bool:
        """No: nothing is left out."""
        return False


class ByModel:
    """Base of rules that model the loss of every batch from its records."""

    @property
    def needs_records(self) -> bool:
        """Yes: the model is of the step's own records."""
        return True


class Spread(Protocol):
    """What a rule that needs records may offer: itself over several ranks."""

    def over(self, comm: Communicator) -> Rule:
        """The rule for ranks whose records add up to the batch."""
        ...


class Checks(Protocol):
    """What a rule may offer: a look at what a step is told beside records and gradients, before anything moves."""

    def check(self, names: Iterable[str], lengths: Mapping[str, Number] | None) -> None:
        """ValueError where a step of these layers could not be taken."""
        ...


def judged(
    rule: Rule[M], motion: M, before: float, place: Callable[[float], object], loss: Callable[[], float]
) -> tuple[float, M]:
    """The share of updates that stays, which is then in force, and the motion that follows; `Preconditioner.judge`."""
    share = 0.0
    wanted = 1.0
    while rule.judges and wanted not in (0, share):
        share = wanted
        answer, motion = rule.judge(motion, share, before, loss())
        wanted = float(answer)
        if wanted != share:
            place(wanted)
    return wanted, motion


def spread(rule: Rule[M], comm: Communicator) -> Rule[M]:
    """The rule, over the ranks of `comm` where there are several and it needs their records."""
    return rule.over(comm) if comm.world > 1 and rule.needs_records and declares(rule, Spread) else rule
