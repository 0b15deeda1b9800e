"""What one step of a preconditioner tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kfaccore.xp import Code
from kfaccore.xp.arrays import Array, to_host


@dataclass(frozen=True)
class Info:
    """What one call did: result codes (blocks,) and solver information a layer, and the step's own numbers."""

    updated: bool
    refreshed: bool
    codes: dict[str, Array]
    layers: dict[str, dict[str, Array]]
    step: dict[str, Any]

    def counts(self) -> dict[Code, int]:
        """How many blocks ended with each code; reads the codes to the host."""
        codes = [to_host(code) for code in self.codes.values()]
        found, how_many = np.unique(np.concatenate(codes), return_counts=True) if codes else ((), ())
        return {Code(int(code)): int(count) for code, count in zip(found, how_many, strict=True)}
