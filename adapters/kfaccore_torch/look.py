"""What the first look at a batch leaves for a second one, at the loss after the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kfaccore_torch.moved import Moved
from kfaccore_torch.moves import stepped
from kfaccore_torch.replay import replayed
from kfaccore_torch.spans import Span

if TYPE_CHECKING:
    from kfaccore_torch.handed import Handed
    from kfaccore_torch.step import Engine


class Look:
    """Begun before the forward of a batch, `given` to model and loss; nothing where the rule does not look back.

    first   what puts all that it may move, but parameters, back as it is now
    moved   parameters that it writes to
    """

    def __init__(self, engine: Engine, handed: Handed, given: dict[str, Any]) -> None:
        self.engine = engine
        self.handed = handed
        self.given = given
        self.judges = engine.core.rule.judges
        self.first = handed.before(engine.model, engine.device, given) if self.judges else []
        self.moved = Moved(engine.model, engine.plan)
        self.span: Span | None = None

    def watch(self, span: Span) -> None:
        """The forward begins."""
        self.span = span
        span.watch = self.moved.note if self.judges else None

    @contextmanager
    def again(self, grads: Mapping[str, Any], rest: Sequence[Any]) -> Iterator[None]:
        """Around the other forward, after the step with these gradients. It begins with what the first began with; with
        what that left where it has written to parameters that the step moved then."""
        engine = self.engine
        moved = self.moved
        left = moved.among(stepped(engine, grads, rest), engine.plan)
        before = self.first if left else [*self.first, *moved.before()]
        after = [*self.handed.after(self.given), *moved.now()]
        graph = self.span is not None and self.span.graph
        with replayed(engine.model, before, engine.device, after, graph, left):
            yield
