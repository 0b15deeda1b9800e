"""Which nodes of a graph a forward made itself: neither what came after it, nor a derivative that it took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_kept_by = torch._C._autograd._top_saved_tensors_default_hooks  # the hooks in force
_number = torch.autograd._get_sequence_nr  # of the node that this thread makes next
_OF_GRAPHS = frozenset(  # what differs, or raises, where no graph is built
    (
        torch.autograd.grad,
        torch.autograd.backward,
        torch.Tensor.backward,
        torch.Tensor.register_hook,
        torch.Tensor.retain_grad,
        torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        torch.Tensor.grad_fn.__get__,  # type: ignore[attr-defined]
    )
)
_OF_FLAGS = frozenset(
    (
        torch.Tensor.requires_grad_,
        torch.Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
        torch.Tensor.grad_fn.__get__,  # type: ignore[attr-defined]  # which a module reads of what it is given
    )
)


_LISTENS = frozenset((torch.Tensor.register_hook, torch.Tensor.grad_fn.__get__))  # type: ignore[attr-defined]


class Span:
    """From now on until it is closed.

    derived   whether the forward took a derivative with a graph of its own, which is products with the same weights
    kept      whether hooks keep tensors for the backward pass, which a checkpoint makes a second time
    listened  whether the forward may have put hooks in the way of the backward pass
    graph     whether the forward asks for its graph, so that it is another without one
    changed   whether the forward may have frozen, thawed or bound parameters
    watch     told of every function, its arguments, before it is called, where somebody asks
    """

    def __init__(self) -> None:
        self.first = _number()
        self.last: int | None = None
        self.derived = False
        self.graph = False
        self.kept = False
        self.listened = False
        self.changed = False
        self.watch: Callable[[Any, Any, dict[str, Any]], None] | None = None

    def note(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A function is called inside."""
        self.kept = self.kept or _kept_by(False) is not None
        if self.watch is not None:
            self.watch(func, args, kwargs)
        if func in _OF_FLAGS:
            self.changed = self.changed or isinstance(args[0], torch.nn.Parameter)
        if func in _OF_GRAPHS:
            self.graph = True
            self.listened = self.listened or func in _LISTENS
            self.derived = self.derived or bool(func is torch.autograd.grad and kwargs.get("create_graph"))

    def close(self) -> None:
        """What is made from here on is not the forward's."""
        self.last = _number()

    def made(self, node: Any) -> bool:
        """Whether the forward made a node, and no derivative."""
        number = node._sequence_nr()
        return not self.derived and self.first <= number and (self.last is None or number < self.last)


def recording(output: torch.Tensor) -> bool:
    """Whether a graph is being built, and not a second time by a checkpoint's recomputation."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1 and output.requires_grad
