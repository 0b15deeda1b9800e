"""update = alpha x + mu (previous update) that minimises the exact quadratic model of the batch: no rate, no search.

m(d) = -<grad, d> + d^T (F + damping I) d / 2 with F from the records of all layers and terms, never its Kronecker
approximation; damping is the factors'. Source: Martens & Grosse 2015 (1503.05671), section 7; Dangel, Mueller &
Zeinhofer 2024 (2405.15603), where it is KFAC*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from kfaccore.method import Hyper
from kfaccore.step.model import curvature, inner, slope
from kfaccore.xp.arrays import Array, eps, namespace


@dataclass(frozen=True)
class Memory:
    """The previous update and the steps taken."""

    previous: dict[str, Array]
    steps: int = 0


@dataclass(frozen=True)
class Quadratic:
    """damping of model and factors alike; alpha of the first step (0: the model's own)."""

    damping: float = 1e-10
    first: float = 0.0
    needs_records: ClassVar[bool] = True

    def init(self, zeros: dict[str, Array]) -> Memory:
        return Memory(zeros)

    def restart(self, memory: Memory) -> bool:
        """Never off the clock."""
        return False

    def hyper(self, memory: Memory, hyper: Hyper) -> Hyper:
        """The rule's damping instead of the scheduled one."""
        return replace(hyper, damping=self.damping)

    def begin(self, memory: Memory, records: Any) -> Memory:
        """Nothing to learn before the directions are known."""
        return memory

    def judge(self, memory: Memory, before: float, after: float) -> tuple[bool, Memory]:
        """Every finite step stays; a non-finite one is taken back and forgotten."""
        if np.isfinite(after):
            return True, memory
        return False, replace(memory, previous={n: v * 0 for n, v in memory.previous.items()})

    def __call__(
        self, memory: Memory, directions: dict[str, Array], grads: dict[str, Any], records: dict[str, Any]
    ) -> tuple[dict[str, Array], Memory, dict[str, float]]:
        """(updates to subtract, memory, info) with alpha, mu and the predicted change of the damped model, <= 0."""
        if not directions:
            return directions, memory, {}
        previous = {n: memory.previous[n] for n in directions}
        pair = [{n: namespace(v).reshape(v, previous[n].shape) for n, v in directions.items()}, previous]
        Q = curvature(records, pair) + self.damping * np.array([[inner(p, q) for q in pair] for p in pair])
        down = np.array([slope(grads, p) for p in pair])
        step = minimiser(Q, down)
        if self.first and memory.steps == 0:
            step = np.array([self.first, 0.0])
        alpha, mu = (float(s) for s in step)
        updates = {n: alpha * pair[0][n] + mu * pair[1][n] for n in directions}
        told = {"alpha": alpha, "mu": mu, "predicted": float(-step @ down + 0.5 * step @ Q @ step)}
        memory = Memory({**memory.previous, **updates}, memory.steps + 1)
        return {n: namespace(v).reshape(v, directions[n].shape) for n, v in updates.items()}, memory, told


def minimiser(Q: np.ndarray, down: np.ndarray) -> np.ndarray:
    """argmin of -down . s + s . Q s / 2 over what rounding leaves of a positive semidefinite Q (2, 2); 0 if not finite.

    A zero row (no previous update) stays out; parallel vectors share the least-squares step.
    """
    keep = np.diag(Q) > 0
    if not (np.isfinite(Q).all() and np.isfinite(down).all() and keep.any()):
        return np.zeros(len(down))
    scale = np.where(keep, 1.0 / np.sqrt(np.where(keep, np.diag(Q), 1.0)), 0.0)
    values, vectors = np.linalg.eigh(Q * np.outer(scale, scale))
    usable = values > 16 * eps(np.float64, np) * values[-1]
    found = vectors @ (np.where(usable, 1.0 / np.where(usable, values, 1.0), 0.0) * (vectors.T @ (scale * down)))
    return scale * found
