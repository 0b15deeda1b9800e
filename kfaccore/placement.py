"""Which ranks refresh and apply which layers.

Ranks form world / k groups of k; a layer belongs to one group, whose ranks all hold its inverse and solve for it; one
rank of the group, the owner, computes the inverse. k = world: every rank solves for all layers and no direction
travels; k = 1: one rank does all of a layer's work and sends the direction.
Source: Pauloski et al. 2021 (2107.01739), with the greedy assignment, longest first, of Graham 1969.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import array_api_compat as aac

from kfaccore import tree
from kfaccore.comm import Communicator
from kfaccore.method import Additive, Block, Hyper, Solution
from kfaccore.xp.arrays import Array, namespace


def costs(blocks: Mapping[str, Block]) -> dict[str, float]:
    """Work of a layer's refresh up to a constant: cubes of its factors' sizes, a diagonal one for nothing."""
    return {
        name: float(block.blocks * (block.d_out**3 + (0 if block.diagonal_in else block.d_in**3)))
        for name, block in blocks.items()
    }


def group_size(world: int, fraction: float) -> int:
    """Ranks in a group, for the share of ranks that solve for each layer; ValueError unless it divides the world."""
    size = max(1, round(fraction * world))
    if not 0 <= fraction <= 1 or world % size:
        raise ValueError(
            f"grad_worker_fraction {fraction} of {world} ranks makes groups of {size}; need a share in [0, 1] whose "
            f"groups divide the ranks, such as 0, {1 / world:.3g} or 1"
        )
    return size


def assign(work: Mapping[str, float], world: int, fraction: float = 1.0) -> dict[str, tuple[int, ...]]:
    """The ranks that solve for each layer, its owner first: greedy, longest first, on the least loaded group and rank.

    The result depends on its arguments alone, so every rank finds the same.
    """
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


def check(methods: Mapping[str, Any], comm: Communicator) -> None:
    """ValueError for methods whose Stats do not add over ranks."""
    for name, method in methods.items():
        additive = getattr(type(method), "combine", None) is Additive.combine
        if comm.world > 1 and (not additive or getattr(method, "rows_at_solve", False)):
            raise ValueError(
                f"{method} of layer {name!r} keeps rows of one process; need a method whose Stats are sums"
            )


def agree(comm: Communicator, names: set[str], every: tuple[str, ...], like: Array) -> None:
    """ValueError on all ranks if some have a layer in this step that others lack."""
    xp = namespace(like)
    flags = xp.asarray([float(name in names) for name in every], dtype=like.dtype, device=aac.device(like))
    counts = comm.all_reduce(flags)
    differing = [name for i, name in enumerate(every) if 0 < float(counts[i]) < comm.world]
    if differing:
        raise ValueError(f"layers {differing} take part in this step on some ranks only; need the same on all")


def refreshed_leaves(method: Any, like: Array) -> tuple[bool, ...]:
    """Which leaves of a method's state `refresh` replaces, found on a state of two by two."""
    state = method.init(Block(2, 2, rows=2, samples=2), like)
    after = method.refresh(state, Hyper(0, 0.9, 0.1))
    return tuple(new is not old for old, new in zip(tree.leaves(state), tree.leaves(after), strict=True))


def exchanged(comm: Communicator, states: dict[str, Any], methods: Mapping[str, Any], work: dict[str, tuple]) -> dict:
    """States after a refresh by their owners, on all ranks that solve for them: only what `refresh` writes travels."""
    if comm.world == 1:
        return states
    states = dict(states)
    for ranks in sorted(set(work.values())):
        names = [name for name in states if work[name] == ranks]
        leaves = {name: tree.leaves(states[name]) for name in names}
        sent = {name: refreshed_leaves(methods[name], leaves[name][0]) for name in names}
        parcel = {name: [x for x, send in zip(leaves[name], sent[name], strict=True) if send] for name in names}
        parcel = comm.broadcast(parcel, ranks)
        for name in names:
            arrived = iter(parcel[name])
            new = iter([next(arrived) if s else x for x, s in zip(leaves[name], sent[name], strict=True)])
            states[name] = tree.map(lambda _, new=new: next(new), states[name])
    return states


def sent(comm: Communicator, solution: Solution, ranks: tuple[int, ...]) -> Solution:
    """A solution on every rank: direction and code travel from the owner where some ranks did not solve."""
    if len(ranks) == comm.world:
        return solution
    everyone = (ranks[0], *(r for r in range(comm.world) if r != ranks[0]))
    direction, code = comm.broadcast([solution.direction, solution.code], everyone)
    return replace(solution, direction=direction, code=code)
