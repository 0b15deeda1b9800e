"""The coverage report: parameter, rule, factor sizes, bytes, and how its block is approximated."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import kfaccore as kf
from kfaccore_torch.plan import Plan

QUALITY = {kf.Exact: "exact", kf.Diagonal: "diagonal", kf.Identity: "identity"}


@dataclass(frozen=True)
class Row:
    """One layer, or one uncovered parameter."""

    parameters: tuple[str, ...]
    rule: str
    factors: str
    bytes: int
    quality: str
    count: int


@dataclass(frozen=True)
class Coverage:
    """Rows in the order of the model's parameters; print it."""

    rows: tuple[Row, ...]

    @property
    def share(self) -> float:
        """Covered share of the trainable numbers."""
        total = sum(row.count for row in self.rows)
        return sum(row.count for row in self.rows if row.rule != "-") / total

    def __str__(self) -> str:
        cells = [("parameters", "rule", "factors", "bytes", "block")]
        cells += [(" ".join(r.parameters), r.rule, r.factors, f"{r.bytes:,}", r.quality) for r in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        lines = ["  ".join(f"{c:{w}}" for c, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in cells]
        return "\n".join([*lines, f"covered: {self.share:.1%} of the trainable numbers"])


def coverage(
    plan: Plan, blocks: dict[str, kf.Block], core: kf.Preconditioner, mixing: Collection[str] = ()
) -> Coverage:
    """The report of a plan under a core preconditioner's methods; `mixing` are layers seen to have rows that move
    several examples."""
    memory = core.memory(blocks)
    rows = []
    for name, layer in plan.layers.items():
        block = blocks[name]
        method = core.methods[name] if isinstance(core.methods, Mapping) else core.methods
        a = f"A {block.d_in}{' diagonal' if block.diagonal_in else ''}"
        groups = f" x {block.blocks} groups" if block.blocks > 1 else ""
        quality = QUALITY.get(type(method), f"approximate ({type(method).__name__})")
        quality += "; rows of several examples" if name in mixing else ""
        count = sum(p.numel() for p in layer.parameters.values())
        rule = type(layer.kind).__name__.lower()
        factors = f"G {block.d_out}, {a}{groups}"
        rows.append(Row(tuple(layer.paths.values()), rule, factors, memory[name], quality, count))
    for name, reason in plan.uncovered.items():
        rows.append(Row((name,), "-", "-", 0, f"plain gradient: {reason}", plan.rest[name].numel()))
    return Coverage(tuple(rows))
