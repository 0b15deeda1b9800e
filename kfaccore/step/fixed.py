"""A fixed rate with momentum after preconditioning: m <- momentum m + s x, update = lr m."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from kfaccore.method import Hyper
from kfaccore.record import Factored
from kfaccore.step.model import Penalty, Records
from kfaccore.step.rescale import Rescale, Unchanged
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class Fixed:
    """lr, momentum and a rule for the common factor s; the default hands the directions on unchanged."""

    lr: float = 1.0
    momentum: float = 0.0
    rescale: Rescale = field(default=Unchanged())

    needs_records: ClassVar[bool] = False
    judges: ClassVar[bool] = False
    traced: ClassVar[bool] = True
    terms: ClassVar[bool] = True

    def init(self, zeros: dict[str, Array]) -> dict[str, Array]:
        """State: one buffer a layer, none without momentum."""
        return zeros if self.momentum else {}

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

    def __call__(
        self,
        motion: dict[str, Array],
        directions: dict[str, Array],
        grads: Mapping[str, Array | Factored],
        records: Records | None = None,
        l2: Penalty = 0.0,
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, float | Array]]:
        """(updates to subtract, motion, info) for the layers in `directions`; others keep their buffer."""
        if not directions:
            return directions, motion, {"scale": 1.0, "alpha": self.lr}
        scale = self.rescale(directions, grads, self.lr)
        moved = {name: _scaled(d, scale) for name, d in directions.items()}
        if self.momentum:
            moved = {name: self.momentum * namespace(d).reshape(motion[name], d.shape) + d for name, d in moved.items()}
            motion = {**motion, **{name: namespace(m).reshape(m, motion[name].shape) for name, m in moved.items()}}
        told: dict[str, float | Array] = {"scale": scale, "alpha": self.lr * scale}
        return {name: _scaled(m, self.lr) for name, m in moved.items()}, motion, told


def _scaled(x: Array, factor: Array | float) -> Array:
    return x if isinstance(factor, float) and factor == 1.0 else x * factor


PLAIN = Fixed()  # what no step at all is: directions are handed on
