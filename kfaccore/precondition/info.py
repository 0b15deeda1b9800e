"""What one step of a preconditioner tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kfaccore.precondition.parts import Parts, Rows, Several, runs
from kfaccore.xp import Code
from kfaccore.xp.arrays import Array, is_tracer, namespace, to_host
from kfaccore.xp.tables import squares_of


@dataclass(frozen=True)
class Info:
    """What one call did: result codes (blocks,) and solver information a layer, and the step's own numbers.

    damping   in force, a layer
    squares   squared norm of each layer's update
    """

    updated: bool | Array
    refreshed: bool | Array
    codes: Mapping[str, Array]
    layers: dict[str, dict[str, Array]]
    step: dict[str, Any]
    damping: dict[str, float | Array] = field(default_factory=dict)
    squares: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        updated: bool | Array,
        refreshed: bool | Array,
        groups: Sequence[Parts],
        step: dict[str, Any],
        damping: dict[str, float | Array],
        updates: Mapping[str, Array],
    ) -> Info:
        """Of what came out of each group, and of the updates that the rule made of it."""
        codes = Several(tuple(updates), tuple(group.codes for group in groups))
        layers = {label: info for group in groups for label, info in group.infos.items()}
        return cls(updated, refreshed, codes, layers, step, damping, norms(updates, groups))

    def code_runs(self) -> list[tuple[tuple[str, ...], Array]]:
        """(layers, the codes of all their blocks) as the step left them: one array for the layers of a stack."""
        return list(runs(self.codes))

    def refused(self, names: Sequence[str]) -> Any:
        """Which of some layers have a block that ended NONFINITE, (layers,); read to the host where it can be."""
        known: list[str] = []
        flags: list[Any] = []
        for layers, code in self.code_runs():
            bad = code == int(Code.NONFINITE)
            bad = namespace(code).any(namespace(code).reshape(bad, (len(layers), -1)), axis=1)
            known += layers
            flags.append(bad if is_tracer(bad) else to_host(bad))
        at = {name: i for i, name in enumerate(known)}
        xp = namespace(flags[0])
        table = xp.concat([*flags, xp.zeros_like(flags[0][:1])])  # the last is of layers that took no part
        return table[np.array([at.get(name, len(known)) for name in names])]

    def counts(self) -> dict[Code, int]:
        """How many blocks ended with each code; reads the codes to the host."""
        codes = [to_host(code) for _, code in self.code_runs()]
        found, how_many = np.unique(np.concatenate(codes), return_counts=True) if codes else ((), ())
        return {Code(int(code)): int(count) for code, count in zip(found, how_many, strict=True)}

    def metrics(self) -> dict[str, float]:
        """Everything that is a number, flat, for any logger; reads it to the host.

        updated, refreshed   1 where statistics moved and inverses were made anew
        damping              in force; the mean where layers differ, then also damping/<layer>
        alpha, mu, ratio, predicted, rejected, scale, ...   what the rule of the step tells
        code/OK, code/...    blocks that ended with each code; all codes are there
        norm, norm/<layer>   of the update, of all layers and of each
        """
        found = {"updated": float(self.updated), "refreshed": float(self.refreshed)}
        dampings = {name: float(to_host(x)) for name, x in self.damping.items()}
        if dampings:
            found["damping"] = float(np.mean(list(dampings.values())))
        if len(set(dampings.values())) > 1:
            found |= {f"damping/{name}": x for name, x in dampings.items()}
        found |= {name: float(to_host(x)) for name, x in self.step.items() if np.ndim(to_host(x)) == 0}
        counts = self.counts()
        found |= {f"code/{code.name}": float(counts.get(code, 0)) for code in Code}
        squares = {name: float(to_host(x)) for name, x in self.squares.items()}
        found["norm"] = float(np.sqrt(sum(squares.values())))
        return found | {f"norm/{name}": float(np.sqrt(x)) for name, x in squares.items()}


def norms(updates: Mapping[str, Array], groups: Sequence[Parts]) -> Mapping[str, Array]:
    """The squared norm of each layer's update, in one operation for all of a stack whose directions the step's rule
    handed on; nothing is read on the host."""
    stacks: list[Rows] = []
    for group in groups:
        names = tuple(name for name in group.directions if name in updates)
        if group.whole is not None and all(updates[name] is group.directions[name] for name in names):
            stacks.append(Rows.of_blocks(names, group.whole))
        else:
            stacks += [Rows((name,), updates[name][None, ...]) for name in names]
    norms = squares_of([rows.table for rows in stacks])
    return Several(tuple(updates), tuple(Rows(rows.names, x) for rows, x in zip(stacks, norms, strict=True)))
