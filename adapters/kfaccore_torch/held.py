"""What modules hold beside parameters and modules: buffers, attributes, and what is in their containers and objects.

A forward may bind them anew, or write to them. What was bound is bound again and what was written is written back, but
large tensors that nothing has written to since they were made: these are watched, and named where a forward does.
"""

from __future__ import annotations

import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from kfaccore_torch.plan import unwrapped

_OWN = frozenset(vars(nn.Module())) - {"_buffers"}  # what torch itself keeps of a module
_DEPTH = 4  # containers and objects in each other, a module's buffers or attributes the first
_MOST = 1 << 12  # things in a container: larger ones are kept, what is in theirs is not
_LARGE = 1 << 20  # numbers of a tensor
_OPAQUE = (
    torch.Tensor,
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    partial,
)
_FIXED = frozenset({int, float, complex, bool, str, bytes, type(None), nn.Parameter, torch.Size, types.FunctionType})
CONTAINERS = (dict, list, set, deque)
_named: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def held(model: nn.Module) -> Iterator[Any]:
    """Containers, objects, tensors and numbers that modules hold, each once."""
    for _, x in walked(unwrapped(model)):
        yield x


def walked(root: Any) -> Iterator[tuple[str, Any]]:
    """With the path to each; the dicts of attributes of modules and objects are among them."""
    met: set[int] = set()
    waiting: deque[tuple[str, Any, int]] = deque([("", root, 0)])
    while waiting:
        path, x, depth = waiting.popleft()
        if id(x) in met:
            continue
        met.add(id(x))
        if isinstance(x, nn.Module):
            waiting.extend((_joined(path, name), child, 0) for name, child in x._modules.items() if child is not None)
            waiting.append((path, vars(x), 1))
            continue
        yield path, x
        if depth < _DEPTH:
            waiting.extend((inside, child, depth + 1) for inside, child in _inside(path, x))
    for path, x in root.named_buffers() if isinstance(root, nn.Module) else ():
        if id(x) not in met:  # a scripted module has no dict of them
            yield path, x


def _inside(path: str, x: Any) -> Iterator[tuple[str, Any]]:
    """What may move of what a container or an object has."""
    if isinstance(x, dict):
        own = _OWN if "_buffers" in x and "_parameters" in x else ()
        pairs = x.items() if len(x) <= _MOST else ()
        found = ((path if k == "_buffers" else _joined(path, str(k)), v) for k, v in pairs if k not in own)
    elif isinstance(x, list | tuple | set | deque):
        found = ((f"{path}[{i}]", v) for i, v in enumerate(x if len(x) <= _MOST else ()))
    else:
        own_dict = None if isinstance(x, _OPAQUE) else getattr(x, "__dict__", None)
        found = iter([(path, own_dict)] if isinstance(own_dict, dict) else [])
    return (pair for pair in found if type(pair[1]) not in _FIXED)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Modules hold afterwards what they held before, however it is left."""
    undo: list[Callable[[], Any]] = []
    watched: list[tuple[str, torch.Tensor, int]] = []
    buffers = {id(b) for b in unwrapped(model).buffers()}
    for path, x in walked(unwrapped(model)):
        if isinstance(x, torch.Tensor):
            version = 1 if x.is_inference() else x._version
            if id(x) in buffers or version > 0 or x.numel() <= _LARGE:
                undo.append(partial(written, x, x.detach().clone()))
            else:
                watched.append((path, x, version))
        elif isinstance(x, np.ndarray):
            undo.append(partial(np.copyto, x, x.copy()))
        elif isinstance(x, CONTAINERS):
            undo.append(partial(filled, x, x.copy()))
    try:
        yield
    finally:
        with torch.no_grad():
            for put in undo:
                put()
        _told(model, [path for path, x, version in watched if x._version != version])


def written(x: torch.Tensor, kept: torch.Tensor) -> None:
    """Its numbers as they were; graphs that know the tensor do not count that as a change."""
    with torch.inference_mode(x.is_inference()):
        if x.shape != kept.shape:
            x.data = kept
        else:
            x.data.copy_(kept)


def filled(x: Any, kept: Any) -> None:
    """A container with what it had; the dict of a module's attributes, of which torch keeps some, too."""
    if isinstance(x, list):
        x[:] = kept
    elif isinstance(x, dict):
        if len(x) != len(kept) or any(x.get(key, x) is not value for key, value in kept.items()):
            for key in x.keys() - kept.keys():
                del x[key]
            for key, value in kept.items():
                x[key] = value  # `update` of a Counter adds
    else:
        x.clear()
        x.update(kept) if isinstance(x, set) else x.extend(kept)


def _told(model: nn.Module, paths: list[str]) -> None:
    """A warning, once, for what was written to and not kept."""
    told = _named.setdefault(model, set())
    fresh = [path for path in paths if path not in told]
    told.update(fresh)
    if fresh:
        warnings.warn(
            f"a second look at a batch wrote to {fresh}, large tensors that are no buffers, and what was in them is "
            f"gone: register them as buffers, which are put back",
            stacklevel=2,
        )
