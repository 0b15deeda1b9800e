"""How many sizes of matrices a compiled program has: each is compiled by itself, so small ones join wider ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

MORE_WORK = 1.05  # that fewer sizes may cost, as a share of what there is
MORE_MEMORY = 1.25


def widths(sizes: Sequence[tuple[int, int]]) -> dict[int, int]:
    """{size: the size it is worked on at} of matrices (how many, size): as few as more work in all, in cubes of the
    sizes, by `MORE_WORK` and more memory by `MORE_MEMORY` buy, the cheapest first."""
    many: dict[int, int] = {}
    for blocks, size in sizes:
        many[size] = many.get(size, 0) + blocks
    found = {size: size for size in many}
    room = [MORE_WORK * _extent(many, found, 3), MORE_MEMORY * _extent(many, found, 2)]
    while len(set(found.values())) > 1:
        kept = sorted(set(found.values()))
        tries = [{s: high if w == low else w for s, w in found.items()} for low, high in pairwise(kept)]
        best = min(tries, key=lambda trial: _extent(many, trial, 3))
        if any(_extent(many, best, power) > most for power, most in zip((3, 2), room, strict=True)):
            return found
        found = best
    return found


def _extent(many: Mapping[int, int], widths: Mapping[int, int], power: int) -> int:
    return sum(blocks * widths[size] ** power for size, blocks in many.items())
