"""Compiled models run eagerly while they are captured, and so do steps inside a function that is compiled."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

_LOCK = threading.Lock()
_P = ParamSpec("_P")
_T = TypeVar("_T")
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


def uncompiled(fn: Callable[_P, _T]) -> Callable[_P, _T]:
    """A function that torch.compile leaves alone, with all that it calls; torch's compiler is not imported for it."""
    found: list[Callable[_P, _T]] = []

    @wraps(fn)
    def run(*args: _P.args, **how: _P.kwargs) -> _T:
        if "torch._dynamo" not in sys.modules:
            return fn(*args, **how)
        if not found:
            found.append(torch.compiler.disable(fn))
        return found[0](*args, **how)

    # code of its own: the compiler counts how often it met one, and warns
    inner: Any = run
    inner.__code__ = inner.__code__.replace(co_name=fn.__name__)
    return run


class _Entered(ContextDecorator, AbstractContextManager):
    """A generator's context; what torch.compile follows into a generator it cannot leave alone."""

    def __init__(self, made: Callable[[], AbstractContextManager[None]]) -> None:
        self.made = made
        self.inner: list[AbstractContextManager[None]] = []

    @uncompiled
    def __enter__(self) -> None:
        inner = self.made()
        inner.__enter__()
        self.inner.append(inner)

    @uncompiled
    def __exit__(self, *error: Any) -> bool | None:
        return self.inner.pop().__exit__(*error)


def uncompiled_context(fn: Callable[_P, Iterator[None]]) -> Callable[_P, AbstractContextManager[None]]:
    """As `contextlib.contextmanager`, with both ends `uncompiled`."""
    made = contextmanager(fn)

    @wraps(fn)
    def entered(*args: _P.args, **how: _P.kwargs) -> AbstractContextManager[None]:
        return _Entered(lambda: made(*args, **how))

    return entered
