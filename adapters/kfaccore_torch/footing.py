"""Where the core works, and in what: device, namespace and dtype, as the parameters have them, and the state there.

A shell may be made before its model is put where it trains, on the meta device even, and a model may be moved later: a
state is made when it is first asked for, and goes with the parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import kfaccore as kf
from kfaccore_torch.bridge import HALF, chosen, ordered, to_core
from kfaccore_torch.resume import Resumes

if TYPE_CHECKING:
    from kfaccore_torch.beside import Beside
    from kfaccore_torch.settings import Settings


class Footing(Resumes):
    """Of an engine, what its core is given to work with.

    like   an array of the state's dtype and device
    """

    settings: Settings
    like: torch.Tensor
    beside: Beside
    _state: Any

    def stand(self) -> None:
        """Take device, namespace and dtype of the parameters that are trained, which are on one device."""
        first = self.plan.trained[0]
        self.device = first.device
        # what lies on no device yet has no namespace
        self.namespace = (self.settings.namespace or "torch") if first.is_meta else self._namespace()
        self.like = torch.zeros(1, dtype=_single(first.dtype), device=self.device)

    def settle(self) -> bool:
        """Follow the parameters to another device or dtype, with the state; whether they have gone to one. ValueError
        where they hold no values any more."""
        trained = self.plan.trained
        if not trained or any(p.device == self.device and _single(p.dtype) == self.like.dtype for p in trained):
            return False
        old = self._state
        arrays: dict[str, np.ndarray] = {}
        if old is not None:
            self._check_values(trained[0].device)
            with ordered(self.namespace, self.device), self._together("another device or dtype"):
                arrays = kf.flatten(self.core.gather(old))
        self.stand()
        self.beside.device = self.device
        if old is not None:
            like = self.first_state(self.core, dict(old.blocks))
            wanted = {path: x.dtype for path, x in kf.flatten(like).items()}
            moved = {path: np.asarray(x, wanted.get(path)) for path, x in arrays.items()}
            self._state = kf.unflatten(moved, like)
        return True

    @property
    def state(self) -> Any:
        """The core's state, made when it is first asked for."""
        if self._state is None:
            self.settle()
            self._state = self.first_state(self.core, self.held())
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state = state

    def first_state(self, core: kf.Preconditioner, blocks: dict[str, kf.Block]) -> Any:
        """A state of layers that have seen nothing."""
        self._check_values(self.device)
        with ordered(self.namespace, self.device):
            return core.init(blocks, like=_owned(to_core(self.like, self.namespace)))

    def _namespace(self) -> str:
        return chosen(self.settings.namespace, self.device)

    def _check_values(self, device: torch.device) -> None:
        """ValueError for parameters without values."""
        if device.type == "meta":
            raise ValueError(
                f"the parameters of {type(self.model).__name__} are on the meta device, so hold no values: put the "
                f"model where it trains first, model.to_empty(device=...) and its weights"
            )


def _single(dtype: torch.dtype) -> torch.dtype:
    """What statistics of parameters are in."""
    return torch.float32 if dtype in HALF else dtype


def _owned(x: Any) -> Any:
    """`like` of a state, whose NumPy view must be writable."""
    return np.array(x) if isinstance(x, np.ndarray) else x
