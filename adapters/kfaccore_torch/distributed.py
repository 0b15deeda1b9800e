"""Data parallel training over torch.distributed: sums of statistics, and inverses and directions from their owners."""

from __future__ import annotations

import importlib
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import kfaccore as kf
from kfaccore_torch.rollcall import RollCall

Array = Any
_UNSAID = kf.Preconditioner(
    kf.Identity()
).comm  # the instance that stands in where none was given; one given is another


@dataclass(frozen=True, eq=False)
class Distributed:
    """The ranks of a process group (default: all), gloo for tensors on the CPU and nccl on CUDA.

    fraction   share of the ranks that solve for each layer: 1 sends no directions, 0 sends all of them and lets each
               layer be refreshed and solved by a single rank

    What both shells take where several processes run and no `comm` is given. Make it on every rank, after
    `torch.distributed.init_process_group`. When a collective fails, the error names the
    ranks that failed or fell behind.
    """

    fraction: float = 1.0
    group: Any = None
    rank: int = field(init=False)
    world: int = field(init=False)
    _parts: dict[frozenset[int], Any] = field(init=False, repr=False)
    _turn: list[int] = field(init=False, repr=False)
    _roll: RollCall = field(init=False, repr=False)
    _calls: list[str] = field(init=False, repr=False)

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
        put(self, "_calls", [])
        ranks = tuple(map(self._global, range(self.world)))
        put(self, "_roll", RollCall(_store(), self._global(self.rank), ranks))

    def all_reduce(self, tree: Any) -> Any:
        """Leafwise sum over ranks."""
        return self._travel(tree, lambda buffer: dist.all_reduce(buffer, group=self.group))

    def reduce(self, tree: Any, ranks: tuple[int, ...]) -> Any:
        """Leafwise sum over ranks, on `ranks` alone."""
        if len(ranks) == self.world:
            return self.all_reduce(tree)
        owner = self._global(ranks[0])
        found = self._travel(tree, lambda buffer: dist.reduce(buffer, owner, group=self.group))
        return self.broadcast(found, ranks) if self.rank in ranks else tree

    def broadcast(self, tree: Any, ranks: tuple[int, ...]) -> Any:
        """The tree of ranks[0] on all of `ranks`."""
        if self.rank not in ranks or len(ranks) == 1:
            return tree
        part = self._parts[frozenset(ranks)]
        owner = self._global(ranks[0])
        return self._travel(tree, lambda buffer: dist.broadcast(buffer, owner, group=part))

    def gathered(self, thing: Any) -> list[Any]:
        """What each rank gives, a picklable thing, in the order of ranks."""
        found: list[Any] = [None] * self.world
        self._enter(lambda: dist.all_gather_object(found, thing, group=self.group))
        return found

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Around a call that every rank must make, which is named where some did not."""
        self._calls.append(what)
        try:
            yield
        finally:
            self._calls.pop()

    def failed(self, error: Exception) -> None:
        """Leave word for the other ranks that this one stops."""
        self._roll.failed(error)

    def same(self, text: str) -> None:
        """ValueError on all ranks if a description differs, with the ranks that are not as most are."""
        digests = torch.zeros(self.world, dtype=torch.int64)
        digests[self.rank] = zlib.crc32(text.encode())
        found = self.all_reduce([digests])[0].tolist()
        usual = max(found, key=found.count)
        odd = [rank for rank, digest in enumerate(found) if digest != usual]
        if not odd:
            return
        key = "kfaccore/plan/{}".format  # by digest: whoever has it has this text
        _store().set(key(found[self.rank]), text)
        shown = [_store().get(key(digest)).decode().splitlines() for digest in (usual, found[odd[0]])]
        here, there = next(lines for lines in zip_longest(*shown, fillvalue="nothing") if lines[0] != lines[1])
        raise ValueError(f"ranks {odd} disagree with the others: {there} there, {here} on rank {found.index(usual)}")

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _enter(self, collective: Callable[[], Any]) -> None:
        """Take part in a collective; RuntimeError naming the ranks that keep it from its end."""
        self._turn[0] += 1
        try:
            self._roll.enters(self._turn[0], "".join(self._calls[-1:]))
            collective()
        except RuntimeError as error:
            why = self._roll.blame(self._turn[0])
            raise RuntimeError(f"rank {self._roll.rank} stops, for {why}: {error}") from error

    def _travel(self, tree: Any, collective: Callable[[torch.Tensor], Any]) -> Any:
        """Leaves of one dtype in one buffer through a collective, and back."""
        leaves: list[Array] = []
        _collect(tree, leaves)
        tensors = [_tensor(x) for x in leaves]
        found: list[Any] = [None] * len(leaves)
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            buffer = torch.cat([tensors[i].reshape(-1) for i in places])
            self._enter(partial(collective, buffer))
            for i, part in zip(places, buffer.split([tensors[i].numel() for i in places]), strict=True):
                found[i] = _like(part.reshape(tensors[i].shape), leaves[i])
        return _rebuilt(tree, iter(found))


def over_ranks(core: kf.Preconditioner, model: torch.nn.Module) -> kf.Preconditioner:
    """A core over all ranks, or those that DistributedDataParallel was given, where torch.distributed runs with more
    than one and the core was given no `comm`.

    `comm=kfaccore.Serial()` says that each process trains a model of its own; ValueError where the model is under
    DistributedDataParallel, so is one model.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or type(core.comm) is not kf.Serial:
        return core
    if core.comm is not _UNSAID:
        text = f"comm=Serial() on one of {dist.get_world_size()} processes: statistics stay this process's own"
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            raise ValueError(f"{text}, but DistributedDataParallel trains one model: leave comm out")
        warnings.warn(f"{text}, which is right for a model of its own alone", stacklevel=4)
        return core
    numbers = core.methods, core.clocks, core.schedules, core.network, core.rule
    more = {"donate": core.donate, "widest": core.widest, "stacked": core.stacked}
    return kf.Preconditioner(*numbers, comm=_comm(_group(model)), **more)


def _comm(group: Any) -> kf.Serial | Distributed:
    """Of the ranks of a group; of one rank there is nothing to send."""
    alone = group is not None and dist.get_world_size(group) == 1
    return kf.Serial() if alone else Distributed(group=group)


def _group(model: torch.nn.Module) -> Any:
    """The process group that gradients are averaged over, None for all ranks. ValueError where that are several."""
    wrapped = [m for m in model.modules() if isinstance(m, torch.nn.parallel.DistributedDataParallel)]
    groups = list({id(m.process_group): m.process_group for m in wrapped}.values())
    if len(groups) > 1:
        ranks = [dist.get_process_group_ranks(group) for group in groups]
        raise ValueError(
            f"parts of the model are under DistributedDataParallel over other ranks, {ranks}: need one group, or a "
            f"Preconditioner a part"
        )
    return groups[0] if groups and groups[0] is not dist.group.WORLD else None


def check_whole(model: torch.nn.Module) -> None:
    """TypeError for models whose parameters are split over ranks: a factor needs all of its matrix."""
    sharded = _sharded()
    for name, module in model.named_modules():
        if isinstance(module, sharded):
            kind = "fully_shard (FSDP2)" if type(module).__name__.startswith("FSDP") else type(module).__name__
            raise TypeError(
                f"module {name or 'at the top'!r} is under {kind}, which splits its parameters over ranks: build the "
                f"Preconditioner on a model under DistributedDataParallel, or on one that is not sharded, with "
                f"Distributed(fraction=0), which refreshes and solves each layer on one rank"
            )
    for name, p in model.named_parameters():
        if isinstance(p, sharded):
            raise TypeError(f"parameter {name!r} is a DTensor, split over ranks: need a model whose tensors are whole")


def _sharded() -> tuple[type, ...]:
    """What holds parts of parameters; a model can be under it only where it has been imported."""
    fsdp, tensor = (sys.modules.get(f"torch.distributed.{room}") for room in ("fsdp", "tensor"))
    found = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    return found if tensor is None else (*found, tensor.DTensor)


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
