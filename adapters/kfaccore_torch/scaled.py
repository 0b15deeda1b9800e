"""Rows of calls under a draw, and under the draw scaled: which of them were scaled by what.

Calls of one layer are asked side by side, each judged by its own rows: many small ones cost what one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_ROUNDINGS = 32  # of the largest number: what sums that should cancel leave; of 16 bits, summed in 32, fewer
_FEW_ROUNDINGS = 4


@dataclass(frozen=True)
class Asked:
    """Rows (rows, d) of some calls under the draw v, and how large they are.

    lengths   how many rows each call has
    most      the size of the largest row of each row's call
    """

    first: torch.Tensor
    lengths: tuple[int, ...]
    size: torch.Tensor
    most: torch.Tensor
    alive: torch.Tensor

    @classmethod
    def of(cls, first: torch.Tensor, lengths: Sequence[int] = ()) -> Asked:
        """From the rows' gradients of the first draw; rows of rounding alone do not count."""
        size = first.abs().amax(1)
        lengths = tuple(lengths) or (len(size),)
        most = torch.cat([(x.max() if len(x) else x.sum()).expand(len(x)) for x in size.split(lengths)])
        return cls(first, lengths, size, most, size > rounding(first.dtype) * most)

    def every(self, holds: torch.Tensor) -> list[bool]:
        """Of each call, whether something holds for every row; (rows,)."""
        if bool(holds.all()):
            return [True] * len(self.lengths)
        return [bool(x.all()) for x in holds.cpu().split(self.lengths)]

    def scaled_by(self, second: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Whether each row is `factor` times what it was, (rows,). What is let pass goes with the factor: beside a
        factor of 2^-64 anything else would."""
        info = torch.finfo(self.first.dtype)
        slack = min(info.eps**0.5, 0.02)
        factor = factor.to(second)
        gap = (second - factor[:, None] * self.first).abs().amax(1)
        near = rounding(self.first.dtype)
        least = info.tiny if info.bits > 16 else near * info.tiny  # what is below the smallest number is cut off
        return gap <= factor * (slack * self.size + near * self.most) + least

    def multiplied(self, second: torch.Tensor, factor: float) -> torch.Tensor:
        """Whether each row is `factor` times what it was, a power of two, to what passes of one draw differ by."""
        eps = torch.finfo(self.first.dtype).eps
        gap = (second / factor - self.first).abs().amax(1)
        return gap <= min(eps**0.5, 0.02) * self.size + rounding(self.first.dtype) * self.most

    def powers(self, second: torch.Tensor, s: torch.Tensor) -> list[bool]:
        """Of each call, whether every row was scaled by the number of some example: by which, its largest number tells
        to a factor below two."""
        if not self.first.numel():
            return [True] * len(self.lengths)
        at = self.first.abs().argmax(1, keepdim=True)
        ratio = (second.gather(1, at) / self.first.gather(1, at))[:, 0].double()
        low, high = map(float, s.log2().aminmax())
        level = ratio.log2().nan_to_num(nan=low - 2).floor()  # of a change of sign there is none
        hit = ~self.alive
        for power in (level, level + 1):
            inside = (power >= low) & (power <= high)
            hit = hit | (inside & self.scaled_by(second, 2.0 ** power.clamp(low, high)))
        return self.every(hit)


class Rows:
    """Rows of many calls under the draw v, those of one layer behind each other."""

    def __init__(self, names: Sequence[str], rows: Sequence[torch.Tensor]) -> None:
        alike: dict[Any, list[int]] = {}
        for i, (name, x) in enumerate(zip(names, rows, strict=True)):
            alike.setdefault((name, x.shape[1:], x.dtype, x.device), []).append(i)
        self.groups = list(alike.values())
        lengths = [[len(rows[i]) for i in group] for group in self.groups]
        self.asked = [Asked.of(x, n) for x, n in zip(self.grouped(rows), lengths, strict=True)]
        self._place = {i: (k, place) for k, group in enumerate(self.groups) for place, i in enumerate(group)}

    def grouped(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Rows of each call, as those of groups."""
        return [torch.cat([rows[i] for i in group]) if len(group) > 1 else rows[group[0]] for group in self.groups]

    def each(self, found: Sequence[Sequence[Any]]) -> list[Any]:
        """What was found of the calls of each group, in the order of the calls."""
        return [found[k][place] for k, place in map(self._place.__getitem__, range(len(self._place)))]

    def alone(self, i: int, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of rows of groups, those of one call."""
        k, place = self._place[i]
        return rows[k].split(self.asked[k].lengths)[place]

    def first(self, i: int) -> torch.Tensor:
        """Those of one call."""
        return self.alone(i, [asked.first for asked in self.asked])

    def alive(self, i: int) -> torch.Tensor:
        """Which of them have a gradient."""
        return self.alone(i, [asked.alive for asked in self.asked])

    def whole(self) -> list[bool]:
        """Of each call, whether every row has a gradient."""
        return self.each([asked.every(asked.alive) for asked in self.asked])

    def dead(self) -> list[bool]:
        """Of each call, whether no row has one."""
        return self.each([asked.every(~asked.alive) for asked in self.asked])

    def multiplied(self, second: Sequence[torch.Tensor], factor: float) -> list[bool]:
        """Of each call, whether all rows are `factor` times what they were."""
        pairs = zip(self.asked, second, strict=True)
        return self.each([asked.every(asked.multiplied(x, factor)) for asked, x in pairs])

    def powers(self, second: Sequence[torch.Tensor], s: torch.Tensor) -> list[bool]:
        """Of each call, whether every row was scaled by the number of some example."""
        return self.each([asked.powers(x, s) for asked, x in zip(self.asked, second, strict=True)])


def rounding(dtype: torch.dtype) -> float:
    """How small beside the largest a gradient may be that is rounding alone, as that of a query which sees one key."""
    info = torch.finfo(dtype)
    return (_ROUNDINGS if info.bits > 16 else _FEW_ROUNDINGS) * info.eps
