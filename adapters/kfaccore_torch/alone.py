"""Whether an operation that repeats nothing of a parameter met an example, as it does in a batch of one, or none yet.

How many rows a prediction has does not tell: they may be positions of one sequence. What earlier forwards repeated is
met by examples, and an axis of one is an axis of examples where every call has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kfaccore.layers import Embedding
from kfaccore_torch.calls import Mark
from kfaccore_torch.views import Ref


@dataclass(frozen=True)
class Examples:
    """What a forward tells of its examples before their rows are asked for.

    single   whether it may be one example; None where only the operation can tell
    marks    what earlier forwards used parameters for
    """

    single: bool | None
    marks: Sequence[Mark]

    @classmethod
    def of(cls, size: int, rows: Sequence[tuple[int, ...]], marks: Sequence[Mark]) -> Examples:
        """A prediction of `size` rows, calls with axes of `rows`, and what was seen before."""
        wide = [shape for shape in rows if len(shape) > 1]
        single = size == 1 or any(all(shape[axis] == 1 for shape in wide) for axis in (0, 1))
        return cls(None if size > 1 and not wide else single, marks)

    def meets(self, part: Ref, own: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Whether a part that was given with axes `own` meets examples where as many numbers come out with `shape`."""
        single = len(shape) > len(own) if self.single is None else self.single
        return single or any(mark.weight == part for mark in self.marks)

    def table(self, part: Ref) -> bool:
        """Whether a part is known as a table of rows."""
        return any(mark.weight == part and isinstance(mark.kind, Embedding) for mark in self.marks)
