"""The question whose row is whose, as backward passes to the rows of some calls.

Its answers hold for a backward pass that is linear. One that is not, as a hook that clips the gradient of an activation
makes it, is told from rows that mix examples by scaling the whole draw: then all is asked with draws so small that the
pass is linear, and they are what is measured too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kfaccore_torch.calls import Call
from kfaccore_torch.owner import (
    Asked,
    Owned,
    confirm,
    factors,
    few,
    mixed,
    search,
    settled,
)
from kfaccore_torch.passes import passing
from kfaccore_torch.rows import by_rows
from kfaccore_torch.settle import Layer
from kfaccore_torch.split import Split

_SMALL = 2.0**-32  # of a draw under which a backward pass that clips does not


class Question:
    """Backward passes to the rows of some calls.

    probe      the draw to begin with; None for random numbers
    retaining  tensors whose `.grad` stays as it is
    times      what draws are to be multiplied by, so that a backward pass which clips them is linear; 1 where all are
    doubts     whether calls that nothing explains may be asked for that
    passed     whether a pass went through
    bent       calls of a backward pass that is linear for no draw
    """

    def __init__(
        self,
        heads: Sequence[torch.Tensor],
        calls: Sequence[tuple[str, Call]],
        layers: dict[str, Layer],
        probe: Any,
        retaining: Sequence[torch.Tensor],
        times: float = 1.0,
        doubts: bool = True,
    ) -> None:
        self.heads = list(heads)
        self.calls = calls
        self.layers = layers
        self.retaining = retaining
        self.times = times
        self.doubts = doubts
        self.bent: list[int] = []
        self.passed = False
        self._most = 2.0 ** max(f.numel() for f in heads).bit_length()  # of a draw beside the gradient of a mean loss
        self._reach = 1.0 if probe is None else self._most
        rng = torch.Generator().manual_seed(0)
        random = (torch.randn(f.shape, generator=rng, dtype=torch.float32) for f in heads)
        self.v = [v.to(f) for v, f in zip(probe or random, heads, strict=True)]
        if times != 1:
            self.v = [v * _SMALL for v in self.v]

    def pull_first(self, parameters: Sequence[torch.nn.Parameter]) -> tuple:
        """Pull the draw itself; gradients of `parameters` under it come back."""
        found = self._pull(self.v, parameters)
        self.asked = [Asked.of(rows) for rows in self._rows(found[: len(self.calls)])]
        return tuple(found[len(self.calls) :])

    def answer(
        self, candidates: Sequence[Split], old: Sequence[Owned | None], coarser: Sequence[Split] = ()
    ) -> tuple[Split, list[Owned]]:
        """The split that explains most calls, and the map of each call; `coarser` ones are tried where rows mix."""
        best = self._explained(candidates, old)
        for split in (one for one in coarser if one.fits(self.heads)):
            least = _mixing(best)
            if not least or self.bent:
                break
            other = self._explained([split], old)
            best = other if _mixing(other) < least else best
        return best

    def _explained(self, candidates: Sequence[Split], old: Sequence[Owned | None]) -> tuple[Split, list[Owned]]:
        """The first of the splits whose shapes explain most calls, and the map of each call."""
        rows = [call.rows for _, call in self.calls]
        best: tuple[int, Split, list, list, list[torch.Tensor]] | None = None
        for split in candidates:
            if not split.fits(self.heads):
                continue
            s = self._numbers(split.examples)
            scaled = [self._scaled(by, split) for by in s]
            found = confirm(rows, self.asked, scaled, split, s, old)
            count = sum(owned is not None for owned in found)
            if best is None or count > best[0]:
                best = count, split, found, scaled, s
            if count == len(found):
                break
        assert best is not None
        _, split, found, scaled, s = best
        open_ = [i for i, owned in enumerate(found) if owned is None]
        if open_ and self.doubts:
            self.doubts = False
            if not self._linear(open_, split, float(s[0].max())):
                if self._lowered(open_, split):
                    return self._explained(candidates, old)
                self.bent = open_
        search_in = [i for i in open_ if _is_some_power(self.asked[i], scaled[0][i], s[0])]
        passes = self._digits(split) if search_in else []
        for i in search_in:
            found[i] = search(rows[i], self.asked[i], [p[i] for p in passes], split)
        mixing = [i for i in open_ if found[i] is None]
        by = few(split.examples, self.heads[0].dtype)
        second = self._scaled(by, split) if mixing else []
        for i in mixing:
            found[i] = mixed(rows[i], self.asked[i], second[i], split, by)
        return split, [
            owned if owned.mixes or not owned.shaped else settled(owned, asked.alive)
            for owned, asked in zip(found, self.asked, strict=True)
        ]

    def _numbers(self, examples: int) -> list[torch.Tensor]:
        """A power of two an example for each pass, up to beyond a draw; near each other where draws must stay small."""
        dtype = self.heads[0].dtype
        if self.times != 1:
            return factors(examples, dtype, few=True)
        found = factors(examples, dtype)
        if dtype == torch.float16:  # without room for more
            return found
        lift = max(2.0, self._reach / float(found[0].max()))
        return [s * lift for s in found]

    def _linear(self, calls: Sequence[int], split: Split, times: float) -> bool:
        """Whether the whole draw times a power of two moves the rows of some calls by as much."""
        after = self._scaled(torch.full((split.examples,), times, dtype=torch.float64), split)
        return all(self.asked[i].multiplied(after[i], times) for i in calls)

    def _lowered(self, calls: Sequence[int], split: Split) -> bool:
        """Go on with draws so small that the pass is linear; False, and no change, where it is for none."""
        before = self.v, self.asked
        if self.heads[0].dtype != torch.float16:
            self.v = [v * _SMALL for v in self.v]
            self.pull_first(())
            if self._linear(calls, split, 32.0):
                self.times = _SMALL / self._most
                return True
        self.v, self.asked = before
        return False

    def _digits(self, split: Split) -> list[list[torch.Tensor]]:
        """One pass a binary digit of the examples' numbers: those that have it count twice."""
        number = torch.arange(split.examples)
        digits = max(1, (split.examples - 1).bit_length())
        return [self._scaled(1.0 + ((number >> digit) & 1), split) for digit in range(digits)]

    def _scaled(self, s: torch.Tensor, split: Split) -> list[torch.Tensor]:
        """Rows of all calls under the draw with each example scaled."""
        scaled = []
        for head, v in enumerate(self.v):
            factor = s[split.owner(len(v), head)].to(v)
            scaled.append(v * factor.reshape(-1, *(1,) * (v.ndim - 1)))
        return self._rows(self._pull(scaled, ()))

    def _pull(self, v: Sequence[torch.Tensor], parameters: Sequence[torch.nn.Parameter]) -> Sequence[Any]:
        wanted = [call.edge for _, call in self.calls] + list(parameters)
        try:
            with passing(self.retaining):
                found = torch.autograd.grad(self.heads, wanted, v, retain_graph=True, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not self.passed:
                raise
            raise RuntimeError(
                f"a second backward pass through this graph failed ({type(error).__name__}: {error}), where the first "
                f"did not: draws pass it before the loss does, so that an autograd.Function must not let go of what it "
                f"keeps in its backward; keep it by ctx.save_for_backward"
            ) from error
        self.passed = True
        return found

    def _rows(self, found: Sequence[Any]) -> list[torch.Tensor]:
        pairs = zip(self.calls, found, strict=True)
        return [
            by_rows(self.layers[name], call, torch.zeros(call.shape) if g is None else g) for (name, call), g in pairs
        ]


def _mixing(found: tuple[Split, list[Owned]]) -> int:
    """Calls with rows that mix examples."""
    return sum(owned.mixes for owned in found[1])


def _is_some_power(before: Asked, second: torch.Tensor, s: torch.Tensor) -> bool:
    """Whether every row was scaled by the number of some example."""
    hit = ~before.alive
    for level in s.unique():
        hit = hit | before.scaled_by(second, level.expand(len(hit)))
    return bool(hit.all())
