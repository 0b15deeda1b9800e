"""How much memory does K-FAC take? The peak of an update beside SGD's own, without the state it keeps.

A ResNet-50-shaped and a GPT-2-shaped network under SGD with momentum, alone and behind a `Preconditioner` (KFAC, Fixed,
an update of statistics at every step). What torch's allocator held at most: on CUDA at the published sizes, on the CPU,
as its profiler tells, at small widths.
"""

from __future__ import annotations

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_name}_NUM_THREADS", "1")

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from operations import GPT2, resnet50
from report import Claim, arguments, at_most, finish
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore import tree

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MOST = 1.15  # of SGD's peak
OWN = 0.35  # of the state of one process


class Profiled:
    """Most bytes of torch's CPU allocator at once while it is entered, told after that, from what torch's profiler saw:
    a dispatch mode would see them too, and keep autograd from adding gradients in place."""

    MARK = "a new peak"

    def __enter__(self) -> Profiled:
        self._seen = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._seen.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._seen.__exit__(*error)

    def again(self) -> None:
        """Begin a new peak."""
        with record_function(self.MARK):
            pass

    @property
    def peak(self) -> int:
        assert self._seen.profiler is not None
        events: Any = self._seen.profiler.kineto_results.events()
        moves = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        start = max(event.start_ns() for event in events if event.name() == self.MARK)
        alive = list(accumulate(size for _, size in moves))
        return max(total for (time, _), total in zip(moves, alive, strict=True) if time >= start)


class Allocator:
    """As `Profiled`, of torch's allocator on CUDA."""

    def __enter__(self) -> Allocator:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def again(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


@dataclass(frozen=True)
class Case:
    """A network and a batch of it."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[torch.Tensor, torch.Tensor]]


def cases(quick: bool) -> list[Case]:
    """At the published sizes on CUDA; else small."""
    large = DEVICE.type == "cuda"
    width, rows, length = (768, 8, 512) if large else (64, 16, 256) if quick else (96, 32, 256)
    channels, images, side = (64, 64, 224) if large else (8, 16, 224) if quick else (16, 48, 224)

    def ids() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(0, 40, (rows, length)), torch.randint(0, 40, (rows * length,))

    def pictures() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(images, 3, side, side), torch.randint(0, 10, (images,))

    return [
        Case(f"GPT-2-shaped, width {width}, {rows} x {length}", lambda: GPT2(width), ids),
        Case(f"ResNet-50-shaped, width {channels}, {images} x {side} x {side}", lambda: resnet50(channels), pictures),
    ]


def peak(case: Case, refresh: int | None) -> tuple[int, int]:
    """(most bytes at once in the last of three steps, those of averages and inverses); `refresh` is how often, None
    is SGD alone."""
    torch.manual_seed(0)
    with Allocator() if DEVICE.type == "cuda" else Profiled() as memory:
        model = case.model().to(DEVICE)
        x, y = (part.to(DEVICE) for part in case.batch())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, 0.9)
        loss = nn.CrossEntropyLoss()
        core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, refresh or 1), donate=True)
        pre = kt.Preconditioner(model, loss, core, namespace="torch") if refresh else None
        for _ in range(3):
            memory.again()
            optimizer.zero_grad()
            step(model, loss, x, y, pre)
            optimizer.step()
        state = sum(one.state for one in pre.memory().values()) if pre else 0
    return memory.peak, state


def step(model: nn.Module, loss: nn.Module, x: torch.Tensor, y: torch.Tensor, pre: kt.Preconditioner | None) -> None:
    """Gradients, or directions."""
    if pre is None:
        loss(model(x), y).backward()
        return
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()
    del f
    pre.step()


@dataclass(frozen=True)
class Rank:
    """One of several ranks, as `init` asks of it: nothing is sent."""

    rank: int
    world: int = 4
    fraction: float = 0.25

    def all_reduce(self, tree: Any) -> Any:
        return tree

    def reduce(self, tree: Any, ranks: tuple[int, ...]) -> Any:
        return tree

    def broadcast(self, tree: Any, ranks: tuple[int, ...]) -> Any:
        return tree


def held(width: int) -> tuple[int, list[int]]:
    """Bytes of averages and inverses of a GPT-2-shaped network in one process, and on each of four ranks."""
    blocks = {name: layer.kind.block() for name, layer in kt.plan(GPT2(width)).layers.items()}
    found = []
    for comm in (kf.Serial(), *(Rank(rank) for rank in range(4))):
        state = kf.Preconditioner(kf.KFAC(), comm=comm).init(blocks, torch.zeros(1))
        kept = [x.untyped_storage() for x in tree.leaves(state.layers)]
        storages = {storage.data_ptr(): storage.nbytes() for storage in kept}
        found.append(sum(storages.values()))
    return found[0], found[1:]


def main() -> None:
    options = arguments(__doc__)
    rows: list[list[Any]] = []
    claims: list[Claim] = []
    for case in cases(options.quick):
        alone, _ = peak(case, None)
        rows.append([case.name, "SGD", alone / 2**20, 0, 1])
        for kind, refresh in (("update", 1000), ("update and refresh", 1)):
            most, state = peak(case, refresh)
            share = (most - state) / alone
            rows.append([case.name, kind, most / 2**20, state / 2**20, share])
            if refresh > 1:
                claims.append(at_most(f"{case.name}: peak of an update less the state, over SGD's", share, MOST))
    one, ranks = held(64 if options.quick else 256)
    for rank, size in enumerate(ranks):
        rows.append(["GPT-2-shaped", f"state of rank {rank} of 4, fraction 1/4", "-", size / 2**20, size / one])
    claims.append(
        at_most("GPT-2-shaped, 4 ranks, fraction 1/4: state of a rank over one process's", max(ranks) / one, OWN)
    )
    columns = ["network", "step", "peak, MiB", "averages and inverses, MiB", "peak without them over SGD's, or share"]
    where = "torch's allocator" if DEVICE.type == "cuda" else "storages alive, traced"
    finish(f"Memory of a K-FAC step ({where})", columns, rows, claims, options.json)


if __name__ == "__main__":
    main()
