"""Data parallel training over torch.distributed: sums of statistics, and inverses and directions from their owners."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

Array = Any


@dataclass(frozen=True, eq=False)
class Distributed:
    """The ranks of a process group (default: all), gloo for tensors on the CPU and nccl on CUDA.

    fraction   share of the ranks that solve for each layer: 1 sends no directions, 0 sends all of them and lets each
               layer be refreshed and solved by a single rank

    Make it on every rank, after `torch.distributed.init_process_group`. When a collective fails, the error names the
    ranks that failed or fell behind.
    """

    fraction: float = 1.0
    group: Any = None
    rank: int = field(init=False)
    world: int = field(init=False)
    _parts: dict[frozenset[int], Any] = field(init=False, repr=False)
    _turn: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not dist.is_initialized():
            raise ValueError("no process group yet: call torch.distributed.init_process_group first")
        put = object.__setattr__
        put(self, "rank", dist.get_rank(self.group))
        put(self, "world", dist.get_world_size(self.group))
        size = max(1, round(self.fraction * self.world))
        parts: dict[frozenset[int], Any] = {frozenset(range(self.world)): self.group}
        if 1 < size < self.world and self.world % size == 0:
            for start in range(0, self.world, size):
                ranks = list(range(start, start + size))
                parts[frozenset(ranks)] = dist.new_group([self._global(r) for r in ranks])
        put(self, "_parts", parts)
        put(self, "_turn", [0])

    def all_reduce(self, tree: Any) -> Any:
        """Leafwise sum over ranks."""
        return self._travel(tree, lambda buffer: dist.all_reduce(buffer, group=self.group))

    def broadcast(self, tree: Any, ranks: tuple[int, ...]) -> Any:
        """The tree of ranks[0] on all of `ranks`."""
        if self.rank not in ranks or len(ranks) == 1:
            return tree
        part, owner = self._parts[frozenset(ranks)], self._global(ranks[0])
        return self._travel(tree, lambda buffer: dist.broadcast(buffer, owner, group=part))

    def failed(self, error: Exception) -> None:
        """Leave word for the other ranks that this one stops."""
        with suppress(RuntimeError):  # the store's host may be gone: then nobody is left to read it
            _store().set(f"kfaccore/failed/{self.rank}", f"{error}"[:500])

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _travel(self, tree: Any, collective: Callable[[torch.Tensor], Any]) -> Any:
        """Leaves of one dtype in one buffer through a collective, and back."""
        leaves: list[Array] = []
        _collect(tree, leaves)
        tensors = [_tensor(x) for x in leaves]
        found: list[Any] = [None] * len(leaves)
        self._turn[0] += 1
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            buffer = torch.cat([tensors[i].reshape(-1) for i in places])
            try:
                _store().set(f"kfaccore/turn/{self.rank}", str(self._turn[0]))
                collective(buffer)
            except RuntimeError as error:
                raise RuntimeError(f"rank {self.rank} stops, for {self._blame()}: {error}") from error
            for i, part in zip(places, buffer.split([tensors[i].numel() for i in places]), strict=True):
                found[i] = _like(part.reshape(tensors[i].shape), leaves[i])
        return _rebuilt(tree, iter(found))

    def _blame(self) -> str:
        """Which ranks left word, fell behind or give no sign of life."""
        words, behind, mine = [], [], self._turn[0]
        try:
            for rank in (r for r in range(self.world) if r != self.rank):
                failed, turn = f"kfaccore/failed/{rank}", f"kfaccore/turn/{rank}"
                if _store().check([failed]):
                    words.append(f"rank {rank} failed with: {_store().get(failed).decode()}")
                elif not _store().check([turn]) or int(_store().get(turn)) < mine:
                    behind.append(rank)
        except RuntimeError:
            return "rank 0, which hosts the store, is gone"
        if behind:
            words.append(f"ranks {behind} died or hang before collective {mine}")
        return "; ".join(words) or "a rank died inside the collective"


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _collect(tree: Any, leaves: list[Array]) -> None:
    """Leaves of nested dicts and lists, in order."""
    if isinstance(tree, dict | list | tuple):
        for child in tree.values() if isinstance(tree, dict) else tree:
            _collect(child, leaves)
    else:
        leaves.append(tree)


def _rebuilt(tree: Any, leaves: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _rebuilt(child, leaves) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [_rebuilt(child, leaves) for child in tree]
    return next(leaves)


def _tensor(x: Array) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x
    return torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray | np.generic) else torch.from_dlpack(x)


def _like(x: torch.Tensor, like: Array) -> Array:
    if isinstance(like, torch.Tensor):
        return x.clone()
    if isinstance(like, np.ndarray | np.generic):
        return x.numpy().copy()
    return importlib.import_module("cupy").from_dlpack(x).copy()
