"""What modules hold beside modules: buffers, attributes, and what is in their containers and objects. Of parameters,
which are bound; what is in them, `moved` knows.

A forward may bind them anew, or write to them. What was bound is bound again and what was written is written back, but
large tensors that nothing has written to since they were made: these are watched, and named where a forward does. So
are iterators of which there are no copies.
"""

from __future__ import annotations

import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from kfaccore_torch.contents import CONTAINERS, NAMED, Slots, changed, copied_as_is, filled, kept_as_is, slots, written
from kfaccore_torch.plan import unwrapped
from kfaccore_torch.streams import copied, place

_OWN = frozenset(vars(nn.Module())) - {"_buffers", "_parameters"}  # what torch itself keeps of a module
_DEPTH = 4  # containers and objects in each other, a module's buffers or attributes the first
_NEAR = 1 << 10  # as many things are looked at however deep they are
_MOST = 1 << 12  # things in a container: larger ones are kept, what is in theirs is not
_LARGE = 1 << 20  # numbers of a tensor
_OPAQUE = (
    torch.Tensor,
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
)
_FIXED = frozenset({int, float, complex, bool, str, bytes, type(None), nn.Parameter, torch.Size, types.FunctionType})
LOST = (
    "a second look at a batch, or a draw, wrote to {}, large tensors that are no buffers, and what was in them is "
    "gone: register them as buffers, which are put back"
)
READ = (
    "a second look at a batch, or a draw, read from {}, iterators that cannot be put back: they move more often than "
    "in a plain step, and looks see different numbers. Hold what they go through and a number instead"
)
LATE = (
    "this forward has written to {}, as no other before: the loss after this step was of what it left there. From now "
    "on copies are made, and both looks at a batch begin with the same"
)
Undo = Callable[[], Any]
_named: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def walked(root: Any) -> Iterator[tuple[str, Any]]:
    """With the path to each; the dicts of attributes of modules and objects are among them."""
    met: set[int] = set()
    alive: list[Slots] = []
    waiting: deque[tuple[str, Any, int]] = deque([("", root, 0)])
    while waiting:
        path, x, depth = waiting.popleft()
        if id(x) in met:
            continue
        met.add(id(x))
        if isinstance(x, Slots):
            alive.append(x)  # made here: its place is another's once it is gone
        elif isinstance(x, nn.Module):
            waiting.extend((_joined(path, name), child, 0) for name, child in x._modules.items() if child is not None)
            waiting.append((path, vars(x), 1))
            continue
        yield path, x
        if depth < _DEPTH or len(met) < _NEAR:
            waiting.extend((inside, child, depth + 1) for inside, child in _inside(path, x))
    for path, x in root.named_buffers() if isinstance(root, nn.Module) else ():
        if id(x) not in met:  # a scripted module has no dict of them
            yield path, x


def _inside(path: str, x: Any) -> list[tuple[str, Any]]:
    """What may move of what a container or an object has."""
    if isinstance(x, NAMED):
        own = _OWN if "_buffers" in x and "_parameters" in x else ()
        pairs = [(k, v) for k, v in x.items() if type(v) not in _FIXED and k not in own] if len(x) <= _MOST else ()
        return [(path if k == "_buffers" else _joined(path, str(k)), v) for k, v in pairs]
    if isinstance(x, list | tuple | set | deque):
        values = x if len(x) <= _MOST else ()
        return [(f"{path}[{i}]", v) for i, v in enumerate(values) if type(v) not in _FIXED]
    if isinstance(x, _OPAQUE) or type(x).__module__.startswith("kfaccore"):
        return []
    given = [(path, x.func), (path, x.args), (path, x.keywords)] if isinstance(x, partial) else []
    own_dict = getattr(x, "__dict__", None)
    held = [(path, own_dict)] if isinstance(own_dict, dict) else []
    return [*given, *held, *([(path, Slots(x))] if slots(type(x)) else [])]


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def as_found(model: nn.Module, things: Sequence[tuple[str, Any]], known: dict[str, bool]) -> list[Undo]:
    """What puts the `things` that modules hold, as `walked` gives them, back as they are now, for another look.

    known   path of a large tensor -> whether a forward has written to it, which is found here: those that none has
            written to are not copied. What shares memory with a parameter goes with that
    """
    own: set[int] | None = None  # memory of parameters, asked for once a tensor is met
    copies: list[tuple[Any, Any]] = []
    large: list[tuple[str, torch.Tensor, int, bool]] = []
    streams: dict[int, Iterator] = {}
    undo: list[Undo] = [partial(_looked, model, large, known)]
    for path, x in things:
        if isinstance(x, torch.Tensor):
            if isinstance(x, nn.Parameter) or not x.numel():
                continue
            own = {memory(p) for p in model.parameters()} if own is None else own
            if memory(x) in own:
                continue
            small = x.numel() <= _LARGE or x.is_inference()
            keep = small or known.get(path, True)
            if not small:
                large.append((path, x, x._version, keep))
            if keep:
                undo.append(partial(written, x, x.detach().clone()))
        elif isinstance(x, np.ndarray):
            undo.append(kept_as_is(x))
        elif isinstance(x, CONTAINERS):
            copies.append((x, copied_as_is(x)))
        elif isinstance(x, Iterator) and (stream := copied(x)) is not None:
            streams[id(x)] = stream
    for x, kept in copies:
        if streams and isinstance(x, NAMED | list | deque):
            pairs = kept.items() if isinstance(kept, dict) else enumerate(kept)
            for key, value in list(pairs):
                kept[key] = streams.get(id(value), value)
        undo.append(partial(filled, x, kept))
    return undo


def memory(x: torch.Tensor) -> int:
    """Where the numbers of a tensor begin; of one that has no memory by itself, a sparse one, its own place."""
    try:
        return x.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return id(x)


def _looked(model: nn.Module, large: Sequence[tuple[str, torch.Tensor, int, bool]], known: dict[str, bool]) -> None:
    """Before another look: which large tensors the first has written to."""
    changed = {path for path, x, version, _ in large if x._version != version}
    known.update((path, path in changed or known.get(path, False)) for path, *_ in large)
    late = [path for path, _, _, keep in large if path in changed and not keep]
    _told(model, late, LATE)


@contextmanager
def as_it_was(
    model: nn.Module,
    things: Sequence[tuple[str, Any]] | None = None,
    own: Sequence[tuple[str, Any]] = (),
    moved: Callable[[list[str]], Any] | None = None,
) -> Iterator[list[Undo]]:
    """Modules hold afterwards what they held before, however it is left; `things` as `walked` gives them, beside what
    is copied however large it is, their `own`. `moved`, if asked for, is told the paths of what had to be put back.
    What puts it back is handed out."""
    undo: list[tuple[str, partial]] = []
    watched: list[tuple[str, torch.Tensor, int]] = []
    streams: list[tuple[str, Iterator, Any]] = []
    buffers = {id(x) for x in (*unwrapped(model).buffers(), *(x for _, x in own))}
    for path, x in (*(walked(unwrapped(model)) if things is None else things), *own):
        if isinstance(x, nn.Parameter):
            continue
        if isinstance(x, torch.Tensor):
            version = 1 if x.is_inference() else x._version
            if id(x) in buffers or version > 0 or x.numel() <= _LARGE:
                undo.append((path, partial(written, x, x.detach().clone())))
            else:
                watched.append((path, x, version))
        elif isinstance(x, np.ndarray | CONTAINERS):
            undo.append((path, kept_as_is(x)))
        elif isinstance(x, Iterator):
            streams.append((path, x, place(x)))
    try:
        yield [put for _, put in undo]
    finally:
        with torch.no_grad():
            if moved is not None:
                moved([path for path, put in undo if changed(*put.args)])
            for _, put in undo:
                put()
        _told(model, [path for path, x, version in watched if x._version != version], LOST)
        _told(model, [path for path, x, before in streams if place(x) != before], READ)


def _told(model: nn.Module, paths: list[str], words: str) -> None:
    """A warning, once, for what could not be put back."""
    told = _named.setdefault(model, set())
    fresh = [path for path in paths if path not in told]
    told.update(fresh)
    if fresh:
        warnings.warn(words.format(fresh), stacklevel=2)
