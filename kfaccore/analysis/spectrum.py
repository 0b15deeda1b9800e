"""What the eigenvalues of a factor say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kfaccore.xp.arrays import Array, to_host


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of one block of a factor, ascending and clipped at 0, as float64 on the host."""

    values: np.ndarray

    @property
    def trace(self) -> float:
        return float(self.values.sum())

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue; inf for a singular factor."""
        low = self.values[0]
        return float(self.values[-1] / low) if low > 0 else float("inf")

    @property
    def effective_rank(self) -> float:
        """exp(entropy of the eigenvalues' shares of the trace): 1 for one direction, d for a flat spectrum.

        Source: Roy & Vetterli 2007.
        """
        share = self.values[self.values > 0] / max(self.trace, np.finfo(float).tiny)
        return float(np.exp(-np.sum(share * np.log(share)))) if share.size else 0.0


def spectrum(factor: Array) -> list[Spectrum]:
    """One Spectrum a block of a factor (blocks, d, d), or diagonal (blocks, d)."""
    host = to_host(factor).astype(float)
    if not np.isfinite(host).all():
        raise ValueError("the factor holds values that are not finite")
    values = np.sort(host, axis=-1) if host.ndim == 2 else np.linalg.eigvalsh((host + host.mT) / 2)
    return [Spectrum(np.maximum(v, 0.0)) for v in values]
