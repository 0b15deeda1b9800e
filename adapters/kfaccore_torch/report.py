"""The coverage report: parameter, rule, factor sizes, bytes, and how its block is approximated."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import kfaccore as kf
from kfaccore_torch.kinds import Rest, Tied
from kfaccore_torch.plan import Plan
from kfaccore_torch.rest import WORDS
from kfaccore_torch.settle import Layer

QUALITY = {kf.Exact: "exact", kf.Diagonal: "diagonal", kf.Identity: "identity"}
PARTLY = "plain gradient: the part of it that no forward has used"


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
        """Covered share of the trainable numbers; a diagonal of what has no record is not covered."""
        total = sum(row.count for row in self.rows)
        return sum(row.count for row in self.rows if row.rule != "-") / total

    @property
    def bytes(self) -> int:
        """Of all states."""
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        cells = [("parameters", "rule", "factors", "bytes", "block")]
        cells += [(" ".join(r.parameters), r.rule, r.factors, f"{r.bytes:,}", r.quality) for r in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        lines = ["  ".join(f"{c:{w}}" for c, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in cells]
        return "\n".join([*lines, f"covered: {self.share:.1%} of the trainable numbers, {self.bytes:,} bytes of state"])


def coverage(
    plan: Plan, blocks: dict[str, kf.Block], core: kf.Preconditioner, mixing: Collection[str] = ()
) -> Coverage:
    """The report of a plan under a core preconditioner's methods; `mixing` are layers seen to have rows that move
    several examples."""
    memory = core.memory(blocks)
    given = core.assigned.narrowed(blocks)
    rows = [_row(layer, given[name], memory.get(name, 0), core, mixing, plan) for name, layer in plan.layers.items()]
    together = memory.get("network", 0)
    if together:  # of all layers of a network-level method
        first = next(i for i, name in enumerate(plan.layers) if name not in memory)
        rows[first] = replace(rows[first], bytes=together)
    rows += _left(plan)
    for name, reason in plan.uncovered.items():
        if name in plan.rest:
            rows.append(Row((name,), "-", "-", 0, f"plain gradient: {reason}", plan.rest[name].numel()))
    return Coverage(tuple(rows))


def _row(layer: Layer, block: kf.Block, size: int, core: kf.Preconditioner, mixing: Collection[str], plan: Plan) -> Row:
    names = tuple(dict.fromkeys(layer.paths.values()))
    if isinstance(layer.kind, Rest):
        quality = f"{WORDS}: {plan.uncovered[names[0]]}"
        return Row(names, "-", "-", size, quality, layer.count)
    method = core.methods[layer.name] if isinstance(core.methods, Mapping) else core.network or core.methods
    groups = f" x {block.blocks} groups" if block.blocks > 1 else ""
    factors = f"G {_side(block.d_out, block.diagonal_out)}, A {_side(block.d_in, block.diagonal_in)}{groups}"
    quality = QUALITY.get(type(method), f"approximate ({type(method).__name__})")
    quality += "; both sums of a tied table in one block" if isinstance(layer.kind, Tied) else ""
    quality += "; rows of several examples" if layer.name in mixing else ""
    return Row(names, type(layer.kind).__name__.lower(), factors, size, quality, layer.count)


def _side(size: int, diagonal: bool) -> str:
    return f"{size}{' diagonal' if diagonal else ''}"


def _left(plan: Plan) -> Iterator[Row]:
    """What no layer has of parameters that others have a part of."""
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for layer in plan.layers.values():
        for role, name in layer.paths.items():
            part = layer.view(role).shape
            number = 1
            for n in part:
                number *= n
            counts[name] = counts.get(name, 0) + number
            sizes[name] = layer.parameters[role].numel()
    for name, count in counts.items():
        if count < sizes[name]:
            yield Row((name,), "-", "-", 0, PARTLY, sizes[name] - count)
