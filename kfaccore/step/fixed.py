"""A fixed rate with momentum after preconditioning: m <- momentum m + s x, update = lr m."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from kfaccore.method import Hyper
from kfaccore.record import Factored, Record
from kfaccore.rescale import Rescale, Unchanged
from kfaccore.xp.arrays import Array, namespace


@dataclass(frozen=True)
class Fixed:
    """lr, momentum and a rule for the common factor s; the default hands the directions on unchanged."""

    lr: float = 1.0
    momentum: float = 0.0
    rescale: Rescale = field(default=Unchanged())

    needs_records: ClassVar[bool] = False

    def init(self, zeros: dict[str, Array]) -> dict[str, Array]:
        """State: one buffer a layer, none without momentum."""
        return zeros if self.momentum else {}

    def restart(self, state: dict[str, Array]) -> bool:
        """Never off the clock."""
        return False

    def hyper(self, state: dict[str, Array], hyper: Hyper) -> Hyper:
        """As scheduled."""
        return hyper

    def begin(self, state: dict[str, Array], records: dict[str, Record]) -> dict[str, Array]:
        """Nothing to learn from records."""
        return state

    def judge(self, state: dict[str, Array], before: float, after: float) -> tuple[bool, dict[str, Array]]:
        """Every step stays."""
        return True, state

    def __call__(
        self,
        state: dict[str, Array],
        directions: dict[str, Array],
        grads: dict[str, Array | Factored],
        records: object = None,
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array | float]]:
        """(updates to subtract, state, info) for the layers in `directions`; others keep their buffer."""
        if not directions:
            return directions, state, {}
        scale = self.rescale(directions, grads, self.lr)
        moved = {name: _scaled(d, scale) for name, d in directions.items()}
        if self.momentum:
            moved = {name: self.momentum * namespace(d).reshape(state[name], d.shape) + d for name, d in moved.items()}
            state = {**state, **{name: namespace(m).reshape(m, state[name].shape) for name, m in moved.items()}}
        return {name: _scaled(m, self.lr) for name, m in moved.items()}, state, {"scale": scale}


def _scaled(x: Array, factor: Array | float) -> Array:
    return x if isinstance(factor, float) and factor == 1.0 else x * factor
