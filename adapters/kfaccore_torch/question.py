"""The question whose row is whose, as backward passes to the rows of some calls.

Its answers hold for a backward pass that is linear. One that is not, as a hook that clips the gradient of an activation
makes it, is told from rows that mix examples by scaling the whole draw: then all is asked with draws so small that the
pass is linear, and they are what is measured too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kfaccore_torch.beside import Quiet
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
    waiting,
)
from kfaccore_torch.passes import passing
from kfaccore_torch.rows import by_rows
from kfaccore_torch.settle import Layer
from kfaccore_torch.split import Split

_SMALL = 2.0**-32  # of a draw under which a backward pass that clips does not


class Tried(NamedTuple):
    """What shapes explain under a split: a map a call or None, and the rows of all calls under examples scaled by `s`,
    pass by pass."""

    split: Split
    found: list[Any]  # Owned or None
    scaled: list[list[torch.Tensor]]
    s: list[torch.Tensor]

    @property
    def explained(self) -> int:
        """How many calls."""
        return sum(owned is not None for owned in self.found)


class Question:
    """Backward passes to the rows of some calls.

    probe      the draw to begin with; None for random numbers
    quiet      what stays as it is
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
        quiet: Quiet,
        times: float = 1.0,
        doubts: bool = True,
    ) -> None:
        self.heads = list(heads)
        self.calls = calls
        self.layers = layers
        self.quiet = quiet
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
        coarser = [split for split in coarser if split.fits(self.heads)]
        tried = self._tried(candidates, old)
        if coarser and self._mixes(tried):
            for split in coarser:  # one that explains every call spares what is asked of rows that mix
                other = self._tried([split], old)
                if all(other.found):
                    return self._explained(other, [split], old)
        best = self._explained(tried, candidates, old)
        for split in coarser:
            least = _mixing(best)
            if not least or self.bent:
                break
            other = self._explained(self._tried([split], old), [split], old)
            best = other if _mixing(other) < least else best
        return best

    def _tried(self, candidates: Sequence[Split], old: Sequence[Owned | None]) -> Tried:
        """The first of the splits whose shapes explain most calls."""
        rows = [call.rows for _, call in self.calls]
        best: Tried | None = None
        for split in candidates:
            if not split.fits(self.heads):
                continue
            s = self._numbers(split.examples)
            scaled = [self._scaled(by, split) for by in s]
            tried = Tried(split, confirm(rows, self.asked, scaled, split, s, old), scaled, s)
            if best is None or tried.explained > best.explained:
                best = tried
            if all(tried.found):
                break
        assert best is not None
        return best

    def _mixes(self, tried: Tried) -> bool:
        """Whether rows of some call can be of no one example."""
        return any(owned is None and not self._powers(tried, i) for i, owned in enumerate(tried.found))

    def _powers(self, tried: Tried, i: int) -> bool:
        """Whether every row of a call was scaled by the number of some example."""
        return _is_some_power(self.asked[i], tried.scaled[0][i], tried.s[0])

    def _explained(
        self, tried: Tried, candidates: Sequence[Split], old: Sequence[Owned | None]
    ) -> tuple[Split, list[Owned]]:
        """A split that was tried, of the candidates, and the map of each call."""
        rows = [call.rows for _, call in self.calls]
        split, found, _, s = tried
        for i, asked in enumerate(self.asked):
            if found[i] is None and not bool(asked.alive.any()):
                found[i] = waiting(rows[i], split)
        open_ = [i for i, owned in enumerate(found) if owned is None]
        if open_ and self.doubts:
            self.doubts = False
            if not self._linear(open_, split, float(s[0].max())):
                if self._lowered(open_, split):
                    return self._explained(self._tried(candidates, old), candidates, old)
                self.bent = open_
        search_in = [i for i in open_ if self._powers(tried, i)]
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
            with passing(self.quiet):
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
    """Whether every row was scaled by the number of some example: by which, its largest number tells to a factor below
    two."""
    if not before.first.numel():
        return True
    at = before.first.abs().argmax(1, keepdim=True)
    ratio = (second.gather(1, at) / before.first.gather(1, at))[:, 0].double()
    low, high = map(float, s.log2().aminmax())
    level = ratio.log2().nan_to_num(nan=low - 2).floor()  # of a change of sign there is none
    hit = ~before.alive
    for power in (level, level + 1):
        inside = (power >= low) & (power <= high)
        hit = hit | (inside & before.scaled_by(second, 2.0 ** power.clamp(low, high)))
    return bool(hit.all())
