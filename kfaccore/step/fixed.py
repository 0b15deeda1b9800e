"""A fixed rate with momentum after preconditioning: m <- momentum m + s x, update = lr m."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from kfaccore import tree
from kfaccore.method import Hyper, declares
from kfaccore.precondition.comm import Communicator, Serial
from kfaccore.record import Factored
from kfaccore.step.height import Heights
from kfaccore.step.known import Known
from kfaccore.step.model import Penalty, Records
from kfaccore.step.read import read_all
from kfaccore.step.rescale import ByLayer, Modelled, Rescale, Unchanged
from kfaccore.xp.arrays import Array, namespace, scalar
from kfaccore.xp.lists import times, weighted
from kfaccore.xp.numbers import Number
from kfaccore.xp.ranges import AT_LEAST_0, SHARE, ranged

_FIRST = "first loss"  # the unit of losses, beside the buffers
_HEIGHTS = "heights"


@dataclass(frozen=True)
class Fixed:
    """lr, momentum and a rule for the common factor s; the default hands the directions on unchanged.

    comm   ranks whose records add up to the batch, for a rule that models the loss; set by `over`
    """

    lr: float = 1.0
    momentum: float = 0.0
    rescale: Rescale = field(default=Unchanged())
    comm: Communicator = Serial()  # noqa: RUF009 frozen

    judges: ClassVar[bool] = False
    traced: ClassVar[bool] = True
    terms: ClassVar[bool] = False  # where records are needed, for a model

    def __post_init__(self) -> None:
        ranged(self, lr=AT_LEAST_0, momentum=SHARE)
        if isinstance(self.rescale, type):
            name = self.rescale.__name__
            raise TypeError(f"Fixed(rescale={name}) is the class itself; give it an instance: {name}()")

    @property
    def needs_records(self) -> bool:
        """Where the length is that of a model of the loss."""
        return declares(self.rescale, Modelled)

    @property
    def wants_own(self) -> bool:
        """As `needs_records`."""
        return self.needs_records

    def over(self, comm: Communicator) -> Fixed:
        """The rule for ranks whose records add up to the batch, all of which call it with the same directions."""
        return replace(self, comm=comm)

    def check(self, names: Iterable[str], lengths: Mapping[str, Number] | None) -> None:
        """ValueError where `rescale` could not do with these lengths."""
        if declares(self.rescale, ByLayer):
            self.rescale.check(names, lengths)

    def init(self, zeros: dict[str, Array]) -> dict[str, Any]:
        """State: one buffer a layer, none without momentum; what is known of the heights of the loss where a model has
        a use for it."""
        motion: dict[str, Any] = dict(zeros) if self.momentum else {}
        if self.needs_records and zeros:
            x = next(iter(zeros.values()))
            motion[_FIRST] = namespace(x).sum(x)  # 0, where the arrays are
            motion[_HEIGHTS] = tree.map(lambda _: namespace(x).sum(x), Heights())
        return motion

    def restart(self, motion: dict[str, Array]) -> bool:
        """Never off the clock."""
        return False

    def hyper(self, motion: dict[str, Array], hyper: Hyper) -> Hyper:
        """As scheduled."""
        return hyper

    def begin(self, motion: dict[str, Array], records: Records) -> dict[str, Array]:
        """Nothing to learn from records."""
        return motion

    def judge(
        self, motion: dict[str, Array], share: float, before: float, after: float
    ) -> tuple[float, dict[str, Array]]:
        """Every step stays."""
        return share, motion

    def gradients(
        self, motion: dict[str, Array], grads: Mapping[str, Array | Factored]
    ) -> tuple[Mapping[str, Array | Factored], dict[str, Array]]:
        """Those of the batch."""
        return grads, motion

    def __call__(
        self,
        motion: dict[str, Array],
        directions: dict[str, Array],
        grads: Mapping[str, Array | Factored],
        records: Records | None = None,
        l2: Penalty = 0.0,
        known: Known = Known(),  # noqa: B008 frozen
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, float | Array]]:
        """(updates to subtract, motion, info) for the layers in `directions`; others keep their buffer."""
        if not directions:
            return directions, motion, {"scale": 1.0, "alpha": self.lr}
        factors, motion, told = self._factors(motion, directions, grads, records, known)
        moved = _scaled(directions, [factors[name] for name in directions])
        if self.momentum:
            old = [namespace(d).reshape(motion[name], d.shape) for name, d in moved.items()]
            moved = dict(zip(moved, weighted(self.momentum, old, 1.0, list(moved.values())), strict=True))
            motion = {**motion, **{name: namespace(m).reshape(m, motion[name].shape) for name, m in moved.items()}}
        return (
            _scaled(moved, [self.lr] * len(moved)),
            motion,
            {**told, "alpha": self.lr * told["scale"]},
        )

    def _factors(
        self,
        motion: dict[str, Any],
        directions: dict[str, Array],
        grads: Mapping[str, Array | Factored],
        records: Records | None,
        known: Known,
    ) -> tuple[Mapping[str, Number], dict[str, Any], dict[str, Number]]:
        """A factor a layer, the motion, and what is told; `scale` is 1 where layers differ."""
        if declares(self.rescale, ByLayer):
            return self.rescale.by_layer(directions, known), motion, {"scale": 1.0}
        if not declares(self.rescale, Modelled):
            scale = self.rescale(directions, grads, self.lr)
            return dict.fromkeys(directions, scale), motion, {"scale": scale}
        seen: Any = records  # no terms: a rule that needs records of them says so
        before: Any = motion[_FIRST], motion[_HEIGHTS]
        first, heights = read_all(before)
        told, *after = self.rescale.modelled(directions, grads, seen, known, first, heights, self.comm)
        first, heights = tree.map(
            lambda x, like: namespace(like).zeros_like(like) + scalar(x, like), tuple(after), before
        )
        scales = {name: scalar(told["scale"], d) for name, d in directions.items()}
        return scales, {**motion, _FIRST: first, _HEIGHTS: heights}, told


def _scaled(xs: dict[str, Array], factors: Sequence[Number]) -> dict[str, Array]:
    """Each times its factor; as they are where all factors are the number 1."""
    if all(isinstance(c, float) and c == 1.0 for c in factors):
        return xs
    return dict(zip(xs, times(list(xs.values()), factors), strict=True))


PLAIN = Fixed()  # what no step at all is: directions are handed on
