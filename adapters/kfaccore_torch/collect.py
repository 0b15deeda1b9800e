"""What waits between a loss and the step: statistics, or copies of rows where the step needs rows.

A loss leaves nothing until it is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import kfaccore as kf
from kfaccore_torch.compiled import uncompiled

if TYPE_CHECKING:
    from kfaccore_torch.formed import Formed
    from kfaccore_torch.pending import Pending
    from kfaccore_torch.shots import Shot

Array = Any


def complaint(void: str, formed: int, captured: bool) -> ValueError:
    """Says why a step has no statistics: a batch is `void`, how many losses were `formed`, whether a forward was
    `captured`."""
    if void:
        return ValueError(f"this step has no statistics to update from: {void}; skip such a batch")
    if formed:
        return ValueError(
            "this step updates statistics but got no records: pre.loss was formed and never differentiated; call "
            "backward on what it returned, or on a sum it is part of"
        )
    if captured:
        return ValueError(
            "this step updates statistics but got no records: the forward was captured, but pre.loss was not "
            "called; form the loss by pre.loss(prediction, target)"
        )
    return ValueError(
        "this step updates statistics but got no records: run the forward inside `with pre.capture():` and form "
        "the loss by pre.loss"
    )


def weighted(x: Any, factor: float) -> Any:
    """A Record or Stats with its n times `factor`."""
    if factor == 1.0:
        return x
    return mapped(lambda name, leaf: leaf * factor if name == "n" else leaf, x)


def kept(stats: Any, record: kf.Record) -> Any:
    """Stats of a record, or the record itself, that share no memory with it."""
    arrays = [x for x in leaves(record) if not isinstance(x, int | float)]
    of_torch = {x.untyped_storage().data_ptr() for x in arrays if isinstance(x, torch.Tensor)}
    others = [x for x in arrays if not isinstance(x, torch.Tensor)]

    def shares(x: Any) -> bool:
        if isinstance(x, torch.Tensor):
            return x.untyped_storage().data_ptr() in of_torch
        return any(_overlap(x, y) for y in others)

    if not any(shares(leaf) for leaf in leaves(stats)):
        return stats
    return mapped(lambda name, leaf: _copied(leaf) if shares(leaf) else leaf, stats)


def leaves(x: Any) -> Iterator[Any]:
    """Those that `mapped` visits, in its order."""
    names = _varying(type(x))
    if names is not None:
        for name in names:
            yield from leaves(getattr(x, name))
    elif isinstance(x, dict | tuple | list):
        for child in x.values() if isinstance(x, dict) else x:
            yield from leaves(child)
    else:
        yield x


def mapped(function: Callable[[str, Any], Any], x: Any, name: str = "") -> Any:
    """function(field's name, leaf) of every leaf of dataclasses, dicts, tuples and lists."""
    names = _varying(type(x))
    if names is not None:
        return replace(x, **{field: mapped(function, getattr(x, field), field) for field in names})
    if isinstance(x, dict):
        return {key: mapped(function, child, key) for key, child in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(mapped(function, child, name) for child in x)
    return function(name, x)


@cache
def _varying(kind: type) -> tuple[str, ...] | None:
    """The fields of a dataclass that are no structure; None for other types."""
    return tuple(f.name for f in fields(kind) if not f.metadata.get("static")) if is_dataclass(kind) else None


def _copied(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.clone()
    return x.copy() if hasattr(x, "copy") and hasattr(x, "dtype") else x


def _overlap(x: Any, y: Any) -> bool:
    """Whether two arrays, not both of torch, may lie in the same memory."""
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return np.may_share_memory(x, y)
    return hasattr(x, "dtype") and type(x) is type(y) and not isinstance(x, np.generic)


def counted(
    value: torch.Tensor,
    pending: Pending,
    shot: Shot,
    let_go: Callable[[], None],
    formed: Formed | None = None,
) -> torch.Tensor:
    """The loss; once it is differentiated, what was `formed` with it counts among what is pending for the step, and the
    forward is let go of."""
    if not value.requires_grad:
        return value
    if formed is not None:
        shot.losses.append(formed)
    pending.hear(value, partial(_count, pending, shot, let_go, formed))
    return value


@uncompiled
def _count(pending: Pending, shot: Shot, let_go: Callable[[], None], formed: Formed | None, grad: torch.Tensor) -> None:
    """A loss is differentiated: what it left counts, once."""
    if formed is not None and not formed.note(grad, pending.follow):
        return
    let_go()
    if not any(other is shot for other in pending.shots):
        pending.shots.append(shot)
