"""Parameters that a forward itself writes to or binds anew: momentum encoders, counts, weights that begin as data say.

They are state of a forward as buffers are. Where the step has moved some of them too, no other forward may begin with
what was there before the first: it would write over the step. A write is seen before it happens, at the function of
torch that does it, so nothing is copied but what is written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kfaccore_torch.held import Undo, memory, walked
from kfaccore_torch.passes import flat
from kfaccore_torch.plan import Plan, unwrapped

Kept = tuple[nn.Parameter, torch.Tensor, torch.Tensor | None]  # its memory, and the numbers in it


class Moved(TorchFunctionMode):
    """What one forward writes to, for another one from the same model that is to leave it as the first did.

    plan   the model's before that forward; of parameters that it has not, the forward has bound them
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.model = unwrapped(model)
        self.plan = plan
        self._kept: dict[int, Kept] = {}
        self._where: dict[int, list[nn.Parameter]] | None = None  # by memory, of hidden modules too

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def note(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A call that is about to happen."""
        name = getattr(func, "__name__", "")
        if name == "__set__":
            if getattr(func, "__self__", None) is torch.Tensor.data and isinstance(args[0], nn.Parameter):
                self._kept.setdefault(id(args[0]), (args[0], args[0].data, None))
        elif (name.endswith("_") and not name.endswith("__") and name != "requires_grad_") or name == "__setitem__":
            self._written(args[:1])
        if kwargs.get("out") is not None:
            self._written((kwargs["out"],))
        if kwargs.get("max_norm") is not None:  # a table whose rows are made shorter where they are taken
            self._written(args[1:2])

    def _written(self, given: Iterable[Any]) -> None:
        """Keep what parameters have that share memory with tensors which are about to be written to."""
        for x in flat(given):
            if not isinstance(x, torch.Tensor) or x.grad_fn is not None:
                continue  # what has a history was computed
            if self._where is None:
                self._where = {}
                for p in _parameters(self.model):
                    self._where.setdefault(memory(p), []).append(p)
            for p in self._where.get(memory(x), ()):
                if id(p) not in self._kept:
                    self._kept[id(p)] = p, p.data, p.data.clone()

    def among(self, stepped: Iterable[nn.Parameter], plan: Plan) -> bool:
        """Whether it has written to some of these, or bound them; `plan` is the model's now."""
        if not self._kept and plan.made_of is self.plan.made_of:
            return False
        before = {id(p) for _, p, _ in self.plan.made_of}
        return any(id(p) in self._kept or id(p) not in before for p in stepped)

    def before(self) -> list[Undo]:
        """What puts back what was there before that forward."""
        return [partial(_put, *kept) for kept in self._kept.values()]

    def undo(self) -> None:
        """Put back what was there before that forward."""
        for put in self.before():
            put()

    def now(self) -> list[Undo]:
        """What puts back what is there now."""
        return [partial(_put, p, p.data, p.data.clone()) for p, _, _ in self._kept.values()]


def _put(p: nn.Parameter, x: torch.Tensor, numbers: torch.Tensor | None) -> None:
    """The memory it had, with what was in it; graphs that know the parameter do not count that as a change."""
    p.data = x
    if numbers is not None:
        p.data.copy_(numbers)


def _parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Also of modules in lists, and those in lists themselves, which `parameters()` does not show."""
    for _, x in walked(model):
        values = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple | set | deque) else ()
        yield from (value for value in values if isinstance(value, nn.Parameter))
