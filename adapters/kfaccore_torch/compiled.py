"""Compiled models run eagerly while they are captured."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.Lock()
_INSIDE: list = []  # the stance in force and how often it was asked for: torch has one for all threads


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled modules, methods and functions run as they were written; nothing at all is touched where torch's
    compiler was never imported."""
    if "torch._dynamo" not in sys.modules:
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
