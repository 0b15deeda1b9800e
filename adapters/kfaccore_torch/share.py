"""Draws on a part of a batch: which examples, the draw that is zero elsewhere, and their rows of a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

import kfaccore as kf
from kfaccore_torch.split import Split


@dataclass(frozen=True)
class Part:
    """The consecutive examples `span` of those that `split` has: one of `parts` parts, each as likely.

    Every example is in exactly one part, so that sums over a part, times `parts`, are those over the batch in
    expectation: a record of it has n / parts.
    """

    split: Split
    parts: int
    span: slice

    @classmethod
    def drawn(cls, split: Split, parts: int, rng: np.random.Generator) -> Part:
        """One of as many `parts`, or of as many as there are examples; their sizes differ by one at most."""
        parts = min(split.examples, parts)
        chosen = int(rng.integers(parts))
        return cls(split, parts, slice(chosen * split.examples // parts, (chosen + 1) * split.examples // parts))

    def alone(self, draws: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Draws (draws, *prediction's shape) of each head, zero at the rows of all other examples."""
        found = []
        for head, v in enumerate(draws):
            owner = self.split.owner(v.shape[1], head)
            inside = ((owner >= self.span.start) & (owner < self.span.stop)).to(v)
            found.append(v * inside.reshape(1, -1, *(1,) * (v.ndim - 2)))
        return found

    def of(self, record: kf.Record) -> kf.Record:
        """The part's examples of a record that has a row of them all; no copy."""
        span = self.span
        a = record.a
        if isinstance(a, kf.Ids):
            a = replace(a, index=a.index[span, ...])
        elif isinstance(a, kf.Patches):
            a = replace(a, image=a.image[:, span, ...])
        else:
            a = a[:, span, ...]
        mask = None if record.mask is None else record.mask[span, ...]
        ids = None if record.ids is None else record.ids[span]
        return kf.Record(a, record.g[:, :, span, ...], record.n, mask, ids)


def parts(share: float) -> int:
    """In how many parts a batch is cut for a `share` of it; ValueError unless the share is one over that."""
    found = round(1 / share) if 0 < share <= 1 else 0
    if not found or abs(share * found - 1) > 1e-6:
        raise ValueError(f"draws_on is {share}; need one of 1, 1/2, 1/3, ...: the share of a batch that is drawn on")
    return found


def check_whole(core: kf.Preconditioner) -> None:
    """ValueError for what needs the rows of the whole batch."""
    why = ""
    if core.rule.judges or core.rule.needs_records:
        why = f"{core.rule} judges its step by the batch that the step is made from"
    elif core.network is not None:
        why = f"{core.network} sees all layers on the same examples"
    elif kf.own_gradients(core):
        why = f"{core.methods} is made of every example's own gradient"
    if why:
        raise ValueError(f"draws_on takes statistics on a part of the batch, and {why}: leave draws_on at 1")
