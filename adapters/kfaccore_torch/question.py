"""The question whose row is whose, as backward passes to the rows of some calls.

Its answers hold for a backward pass that is linear. One that is not, as a hook that clips the gradient of an activation
makes it, is told from rows that mix examples by scaling the whole draw: then all is asked with draws so small that the
pass is linear, and they are what is measured too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from kfaccore_torch.beside import Quiet
from kfaccore_torch.calls import Call
from kfaccore_torch.owner import (
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
from kfaccore_torch.scaled import Rows
from kfaccore_torch.settle import Layer
from kfaccore_torch.split import Split

_SMALL = 2.0**-32  # of a draw under which a backward pass that clips does not


class Tried(NamedTuple):
    """What shapes explain under a split: a map a call or None, and the rows of all calls, group by group, under
    examples scaled by `s`, pass by pass."""

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
        rows = self._rows(found[: len(self.calls)])
        self.asked = Rows([name for name, _ in self.calls], rows)
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
        if all(tried.found):
            return False
        return any(owned is None and not ok for owned, ok in zip(tried.found, self._powers(tried), strict=True))

    def _powers(self, tried: Tried) -> list[bool]:
        """Of each call, whether every row was scaled by the number of some example."""
        return self.asked.powers(tried.scaled[0], tried.s[0])

    def _explained(
        self, tried: Tried, candidates: Sequence[Split], old: Sequence[Owned | None]
    ) -> tuple[Split, list[Owned]]:
        """A split that was tried, of the candidates, and the map of each call."""
        rows = [call.rows for _, call in self.calls]
        split, found, _, s = tried
        for i, nothing in enumerate(self.asked.dead()):
            if nothing and found[i] is None:
                found[i] = waiting(rows[i], split)
        open_ = [i for i, owned in enumerate(found) if owned is None]
        if open_ and self.doubts:
            self.doubts = False
            if not self._linear(open_, split, float(s[0].max())):
                if self._lowered(open_, split):
                    return self._explained(self._tried(candidates, old), candidates, old)
                self.bent = open_
        powers = self._powers(tried) if open_ else []
        search_in = [i for i in open_ if powers[i]]
        passes = self._digits(split) if search_in else []
        for i, owned in search(rows, self.asked, passes, split, set(search_in)).items():
            found[i] = owned
        mixing = [i for i in open_ if found[i] is None]
        by = few(split.examples, self.heads[0].dtype)
        second = self._scaled(by, split) if mixing else []
        for i in mixing:
            found[i] = mixed(rows[i], self.asked.first(i), self.asked.alone(i, second), split, by)
        whole = self.asked.whole()
        for i, owned in enumerate(found):
            if not (owned.mixes or not owned.shaped):
                found[i] = replace(owned, undecided=None) if whole[i] else settled(owned, self.asked.alive(i))
        return split, [owned.on(self.heads[0].device) for owned in found]

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
        linear = self.asked.multiplied(after, times)
        return all(linear[i] for i in calls)

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
        """Rows of all calls, group by group, under the draw with each example scaled."""
        scaled = []
        for head, v in enumerate(self.v):
            factor = s[split.owner(len(v), head)].to(v)
            scaled.append(v * factor.reshape(-1, *(1,) * (v.ndim - 1)))
        return self.asked.grouped(self._rows(self._pull(scaled, ())))

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
                f"keeps in its backward; keep it by ctx.save_for_backward. A selective checkpoint, which can be passed "
                f"once, goes without context_fn"
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
