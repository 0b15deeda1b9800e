"""Which variables of a model kfaccore covers, found in a traced forward pass, and why it leaves the others alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kfaccore import Block
from kfaccore_tensorflow.layout import Matrix

Variable = Any


@dataclass(frozen=True)
class Part:
    """One matrix of the equation: variables by role, "weight" and maybe "bias", and where their elements stand in it.

    how        the operations that use it, for the report
    lookup     whether they are all look-ups of rows, so that A is diagonal
    whole      whether it is read as a row that all examples share: G is a diagonal
    """

    name: str
    variables: dict[str, Variable]
    matrices: dict[str, Matrix]
    how: tuple[str, ...]
    lookup: bool = False
    whole: bool = False

    @property
    def bias(self) -> bool:
        """Whether the last column is a bias."""
        return "bias" in self.matrices

    def block(self) -> Block:
        """d_out, d_in with the bias column, blocks."""
        blocks, d_out, d_in = self.matrices["weight"].sizes
        return Block(d_out, d_in + self.bias, blocks, diagonal_in=self.lookup, diagonal_out=self.whole)

    def matrix(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Arrays like the variables, by role -> the matrix (blocks, d_out, d_in)."""
        columns = [self.matrices[role].of(arrays[role]) for role in self.matrices]
        return np.concatenate(columns, axis=-1)

    def arrays(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `matrix`, in the variables' own shapes; zero where they have elements of other parts."""
        matrix = matrix if matrix.ndim == 3 else matrix[None]
        found = {}
        start = 0
        for role, place in self.matrices.items():
            width = place.sizes[-1]
            found[role] = np.zeros(tuple(self.variables[role].shape), matrix.dtype)
            place.into(found[role], matrix[..., start : start + width])
            start += width
        return found

    def places(self) -> tuple:
        """What must stay the same when a model is traced again."""
        return tuple((role, id(v), self.matrices[role].key) for role, v in self.variables.items())


@dataclass(frozen=True)
class Plan:
    """`parts` are covered; `refused` maps a layer to (variables, reason). print(plan) is the coverage report.

    unused     layers whose variables the forward pass does not use, and those variables
    """

    parts: tuple[Part, ...]
    refused: dict[str, tuple[tuple[Variable, ...], str]]
    unused: dict[str, tuple[Variable, ...]] = field(default_factory=dict)

    def blocks(self) -> dict[str, Block]:
        """Sizes of every part."""
        return {part.name: part.block() for part in self.parts}

    def strictly(self) -> Plan:
        """The plan itself; ValueError when a trainable variable is used and not covered."""
        if self.refused:
            listed = "; ".join(f"{name}: {reason}" for name, (_, reason) in self.refused.items())
            raise ValueError(
                f"not covered: {listed}. Pass strict=False to give their variables plain gradients, or "
                f"uncovered=kfaccore.Diagonal() for a diagonal"
            )
        return self

    def same(self, now: Plan) -> None:
        """ValueError where another trace uses variables of a part in another way, or cannot read them; one that does
        not use them at all leaves their curvature as it is."""
        parts = {part.name: part.places() for part in now.parts}
        reasons = {id(v): reason for variables, reason in now.refused.values() for v in variables}
        used = {id(v): "they are of other parts" for part in now.parts for v in part.variables.values()} | reasons
        for part in self.parts:
            if part.whole or parts.get(part.name) == part.places():
                continue
            why = next((used[id(v)] for v in part.variables.values() if id(v) in used), None)
            if why is None:
                continue
            why = "their elements stand elsewhere" if part.name in parts else why
            names = ", ".join(v.path for v in part.variables.values())
            raise ValueError(
                f"part {part.name!r} ({names}) is not used as it was when the plan was made, and its curvature would "
                f"stay that of other batches: {why}. Give batches of one shape but for the number of examples, such as "
                f"padded ones, freeze it, or make a new Optimizer for these batches"
            )

    def changed(self, variables: Iterable[Variable]) -> list[str]:
        """What of `variables`, those now trained, is not of the plan, and parts that are trained in part."""
        now = {id(v): v for v in variables}
        split = [p.name for p in self.parts if len({id(v) in now for v in p.variables.values()}) == 2]
        known = {id(v) for p in self.parts for v in p.variables.values()}
        known |= {id(v) for refused, _ in self.refused.values() for v in refused}
        known |= {id(v) for unused in self.unused.values() for v in unused}
        return [*split, *(v.path for key, v in now.items() if key not in known)]

    def check(self, variables: Iterable[Variable]) -> None:
        """ValueError where they have `changed`."""
        changed = self.changed(variables)
        if changed:
            raise ValueError(
                f"what is trained has changed since the plan was made, at {changed}: compile the model again, or "
                f"make a new Optimizer"
            )

    def __str__(self) -> str:
        rows = [(p.name, _shapes(p.variables.values()), ", ".join(p.how)) for p in self.parts]
        rows += [(name, _shapes(v), "PLAIN GRADIENT: " + reason) for name, (v, reason) in self.refused.items()]
        rows += [(name, _shapes(v), "UNUSED in the forward pass") for name, v in self.unused.items()]
        widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
        return "\n".join(f"{name:{widths[0]}}  {shape:{widths[1]}}  {what}" for name, shape, what in rows)


def _shapes(variables: Iterable[Variable]) -> str:
    return " ".join("x".join(str(size) for size in v.shape) for v in variables)
