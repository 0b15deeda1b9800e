"""Which ranks refresh and apply which layers.

Ranks form world / k groups of k; a layer belongs to one group, whose ranks all hold its inverse and solve for it; one
rank of the group, the owner, computes the inverse. k = world: every rank solves for all layers and no direction
travels; k = 1: one rank does all of a layer's work and sends the direction.
Source: Pauloski et al. 2021 (2107.01739), with the greedy assignment, longest first, of Graham 1969.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kfaccore import tree
from kfaccore.method import Additive, Block, Method, RowsAtSolve, S, declares
from kfaccore.precondition.comm import Communicator, Serial, Tree
from kfaccore.precondition.trial import floating, refreshed_leaves
from kfaccore.record import Record
from kfaccore.solution import Solution
from kfaccore.step.own import most_examples
from kfaccore.xp.arrays import Array, device_of, from_host, namespace


def costs(blocks: Mapping[str, Block]) -> dict[str, float]:
    """Work of a layer's refresh up to a constant: cubes of its factors' sizes, a diagonal one for nothing."""
    found = {}
    for name, block in blocks.items():
        cube_in = 0 if block.diagonal_in else block.d_in**3
        cube_out = 0 if block.diagonal_out else block.d_out**3
        found[name] = float(block.blocks * (cube_in + cube_out))
    return found


def group_size(world: int, fraction: float) -> int:
    """Ranks in a group, for the share of ranks that solve for each layer; ValueError unless it divides the world."""
    size = max(1, round(fraction * world))
    if not 0 <= fraction <= 1 or world % size:
        raise ValueError(
            f"fraction {fraction} of {world} ranks makes groups of {size}; need a share in [0, 1] whose "
            f"groups divide the ranks, such as 0, {1 / world:.3g} or 1"
        )
    return size


def assign(work: Mapping[str, float], world: int, fraction: float = 1.0) -> dict[str, tuple[int, ...]]:
    """The ranks that solve for each layer, its owner first: greedy, longest first, on the least loaded group and rank.

    The result depends on its arguments alone, so every rank finds the same.
    """
    if world == 1:
        return dict.fromkeys(work, (0,))
    size = group_size(world, fraction)
    load = [0.0] * world
    groups = [tuple(range(start, start + size)) for start in range(0, world, size)]
    placed: dict[str, tuple[int, ...]] = {}
    for name in sorted(work, key=lambda name: (-work[name], name)):
        group = min(groups, key=lambda ranks: sum(load[r] for r in ranks))
        owner = min(group, key=lambda r: load[r])
        load[owner] += work[name]
        placed[name] = (owner, *(r for r in group if r != owner))
    return {name: placed[name] for name in work}


def check(methods: Mapping[str, Method], comm: Communicator) -> None:
    """ValueError for methods whose Stats do not add over ranks."""
    for name, method in methods.items():
        additive = type(method).combine is Additive.combine
        if comm.world > 1 and (not additive or declares(method, RowsAtSolve)):
            raise ValueError(
                f"{method} of layer {name!r} keeps rows of one process; need a method whose Stats are sums"
            )


def agree(
    comm: Communicator, names: Collection[str], every: tuple[str, ...], like: Array, records: Collection[str] = ()
) -> None:
    """ValueError on all ranks if some have a layer in this step, or a record of it, that others lack, who are named."""
    xp = namespace(like)
    own = [float(name in had) for had in (names, records) for name in every]
    rows = [own if rank == comm.rank else [0.0] * len(own) for rank in range(comm.world)]
    counts = comm.all_reduce(xp.asarray(rows, dtype=like.dtype, device=device_of(like)))
    has = [[float(counts[r, i]) > 0 for r in range(comm.world)] for i in range(len(own))]
    _same(
        dict(zip(every, has[: len(every)], strict=True)),
        "take part in this step on some ranks only; need the same on all",
    )
    _same(
        dict(zip(every, has[len(every) :], strict=True)),
        "have records on some ranks only, and statistics are summed over all; where no example of a rank went through "
        "a layer, give a record whose rows are all masked",
    )


def _same(has: Mapping[str, list[bool]], what: str) -> None:
    differing = {name: [r for r, had in enumerate(ranks) if not had] for name, ranks in has.items() if any(ranks)}
    lacking = {name: ranks for name, ranks in differing.items() if ranks}
    if lacking:
        raise ValueError(
            f"layers {list(lacking)} {what}: ranks {sorted({r for ranks in lacking.values() for r in ranks})} lack them"
        )


def common(
    comm: Communicator, own: dict[str, Record], every: tuple[str, ...], seen: Mapping[str, Record]
) -> dict[str, Record]:
    """The layers of `own` that are judged by example: those whose rows are the examples of the batch, on all ranks.

    What a rank saw may differ: where none of its examples reached a layer, it has no share of it, and agrees. A layer
    that another rank cannot judge is left to none, so that all model the same.
    """
    if not own or not seen:
        mine = {}
    else:
        most = most_examples(seen).batch
        mine = {n: r for n, r in own.items() if seen[n].batch == most or (comm.world > 1 and _unreached(seen[n]))}
    if comm.world == 1 or not seen:
        return mine
    counts = _having(comm, set(mine), every, next(iter(seen.values())).g)
    return {name: record for name, record in mine.items() if counts[name] == comm.world}


def _unreached(record: Record) -> bool:
    """Whether it stands for a layer that no example of a rank reached."""
    return record.mask is not None and not bool(namespace(record.mask).any(record.mask))


def _having(comm: Communicator, names: set[str], every: tuple[str, ...], like: Array) -> dict[str, float]:
    """How many ranks have each layer."""
    xp = namespace(like)
    flags = xp.asarray([float(name in names) for name in every], dtype=like.dtype, device=device_of(like))
    counts = comm.all_reduce(flags)
    return {name: float(counts[i]) for i, name in enumerate(every)}


def reduced(comm: Communicator, stats: Tree) -> Tree:
    """Stats summed over ranks; a communicator of one rank that does all the work may still have sums to make."""
    if isinstance(comm, Serial):
        return stats
    stats = _counted(stats)
    return _unpacked(comm.all_reduce(_packed(stats)), stats)


def _counted(stats: Any) -> Any:
    """Stats whose numbers are arrays (blocks,), as ranks may add: what is a number on one rank, as where all rows
    exist, is an array on another."""
    if isinstance(stats, Mapping):
        return {name: _counted(one) for name, one in stats.items()}
    like = next(x for x in tree.leaves(stats) if not isinstance(x, int | float) and x.ndim)
    ones = namespace(like).ones((like.shape[0],), dtype=like.dtype, device=device_of(like))
    return tree.map(lambda x: x * ones if isinstance(x, int | float) or not x.ndim else x, stats)


def exchanged(
    comm: Communicator,
    states: Mapping[str, S],
    methods: Mapping[str, Method],
    work: dict[str, tuple[int, ...]],
    blocks: Mapping[str, Block],
    whole: Collection[str] = (),
) -> Mapping[str, S]:
    """States after a refresh by their owners, on all ranks of `work`, or on all there are where the next `measure`
    needs them; only what `refresh` writes travels, of the layers `whole` all. `blocks` as the methods were given
    them."""
    if comm.world == 1:
        return states
    states = dict(states)
    seen = {name: refreshed_leaves(methods[name], floating(states[name]), blocks[name]) for name in states}
    everyone = range(comm.world)
    to = {n: (w[0], *(r for r in everyone if r != w[0])) if seen[n][1] else w for n, w in work.items() if n in states}
    for ranks in sorted(set(to.values())):
        if comm.rank not in ranks:
            continue
        names = [name for name in states if to[name] == ranks]
        send = {name: [name in whole or wanted for wanted in seen[name][0]] for name in names}
        packed = {name: _packed(states[name]) for name in names}
        parcel = {n: [x for x, wanted in zip(packed[n], send[n], strict=True) if wanted] for n in names}
        parcel = comm.broadcast(parcel, ranks)
        for name in names:
            arrived = iter(parcel[name])
            leaves = [next(arrived) if wanted else x for x, wanted in zip(packed[name], send[name], strict=True)]
            states[name] = _unpacked(leaves, states[name])
    return states


def _packed(found: Any) -> list[Array]:
    """The leaves, of symmetric ones (blocks, d, d) the upper triangle alone."""
    leaves = []
    for x, symmetric in zip(tree.leaves(found), tree.marks(found, "SYMMETRIC"), strict=True):
        if symmetric and x.ndim == 3:
            flat = namespace(x).reshape(x, (x.shape[0], -1))
            x = namespace(x).take(flat, _indices(x.shape[-1], x)[0], axis=1)
        leaves.append(x)
    return leaves


def _unpacked(leaves: list[Array], like: Any) -> Any:
    """The inverse of `_packed`."""
    found = []
    for x, old, symmetric in zip(leaves, tree.leaves(like), tree.marks(like, "SYMMETRIC"), strict=True):
        if symmetric and old.ndim == 3:
            x = namespace(x).reshape(namespace(x).take(x, _indices(old.shape[-1], x)[1], axis=1), old.shape)
        found.append(x)
    new = iter(found)
    return tree.map(lambda _: next(new), like)


def _indices(d: int, like: Array) -> tuple[Array, Array]:
    """Places of the upper triangle in a flat matrix, and for each place of the matrix its place in the triangle."""
    rows, columns = np.triu_indices(d)
    back = np.empty((d, d), np.int64)
    back[rows, columns] = back[columns, rows] = np.arange(len(rows))
    return from_host(rows * d + columns, like), from_host(back.reshape(-1), like)


def sent(comm: Communicator, solved: Solution, ranks: tuple[int, ...]) -> Solution:
    """What was solved, on every rank: direction and code travel from the owner where some ranks did not solve."""
    if len(ranks) == comm.world:
        return solved
    everyone = (ranks[0], *(r for r in range(comm.world) if r != ranks[0]))
    directions, codes = comm.broadcast([solved.direction, solved.code], everyone)
    return replace(solved, direction=directions, code=codes)
