"""Compiled models run eagerly while they are captured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_LOCK = threading.Lock()
_INSIDE: list = []  # the stance in force and how often it was asked for: torch has one for all threads


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Compiled parts of `model` run as they were written; nothing at all is touched where there are none."""
    if not any(_is_compiled(module) for module in model.modules()):
        yield
        return
    with _LOCK:
        if not _INSIDE:
            _INSIDE.append(torch.compiler.set_stance("force_eager"))
            _INSIDE[0].__enter__()
        _INSIDE.append(None)
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE.pop()
            if len(_INSIDE) == 1:
                _INSIDE.pop().__exit__(None, None, None)


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
