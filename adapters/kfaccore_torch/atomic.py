"""A step that is judged is taken whole or not at all; of others that fail the averages are whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

import kfaccore as kf

if TYPE_CHECKING:
    from kfaccore_torch.step import Engine


def kept(core: kf.Preconditioner) -> kf.Preconditioner:
    """The core, whose steps leave the state before them as it is where they are judged."""
    return replace(core, donate=False) if core.rule.judges and core.donate else core


@contextmanager
def whole_or_none(engine: Engine) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Around a step that is judged, which may fail (memory runs out in the look back, somebody interrupts it): then the
    engine is as it was before, and so are the parameters in the list, (parameter, its values before)."""
    names = ("_state", "new", "called", "_info")
    before = {name: getattr(engine, name) for name in names}
    old: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        yield old
    except BaseException:
        if engine.core.rule.judges:
            for name, value in before.items():
                setattr(engine, name, value)
            with torch.no_grad():
                for p, values in old:
                    p.copy_(values)
            torch.clear_autocast_cache()
        raise


def left(
    core: kf.Preconditioner, state: Any, begun: list[Any], measured: Collection[str], error: BaseException
) -> tuple[Any, set[str]]:
    """The state after a step that failed, whose averages were moved in place, and the layers that begin anew; the error
    is told what became of the batch."""
    found, anew = core.left(state, begun, measured)
    told = "the step failed after its batch was taken into the averages: it counts there, once, also if taken again"
    error.add_note(f"the averages of layers {sorted(anew)} were being moved, and begin anew" if anew else told)
    return found, anew


def again(due: kf.Due, kept: tuple[Any, ...], batch: tuple[Any, ...]) -> kf.Due:
    """What is due, without the statistics of a batch that was `kept`."""
    same = bool(batch) and len(kept) == len(batch) and all(x is y for x, y in zip(kept, batch, strict=True))
    return replace(due, update=False) if same else due
