"""A step that is judged is taken whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

import kfaccore as kf
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
