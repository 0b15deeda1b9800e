"""A step that sets its own rate, momentum and damping.

update = alpha x + mu (previous update), (alpha, mu) minimising the exact quadratic model of the batch plus damping;
damping follows the reduction ratio (Levenberg-Marquardt), and a step that raises the loss of its own batch is taken
back. Source: Martens & Grosse 2015 (1503.05671), sections 6.4-7.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from kfaccore import tree
from kfaccore.method import Hyper
from kfaccore.record import Record
from kfaccore.step.model import curvature, inner, slope
from kfaccore.xp.arrays import Array, namespace, to_host


@dataclass(frozen=True)
class Motion:
    """The previous update, the damping in force, the model's prediction for the last update, and counters."""

    previous: dict[str, Array]
    damping: float = 0.0
    predicted: float = 0.0
    steps: int = 0
    rejected: int = 0
    restart: bool = True


@dataclass(frozen=True)
class SelfTuning:
    """Numbers of the rule; none of them usually needs setting.

    first       first damping over the mean eigenvalue of the Fisher blocks
    drop        damping is multiplied by it when the model predicts well, divided when it predicts badly
    every       steps between looks at the reduction ratio
    grow        factor on damping after a step was taken back
    cap         largest alpha; both alpha and mu are scaled down to it
    tolerance   a step is taken back when it raises the loss of its own batch by more than this share: at low damping
                a small rise often pays later, an outburst never does
    """

    first: float = 0.1
    drop: float = 0.95**5
    every: int = 5
    grow: float = 4.0
    cap: float = 1.0
    tolerance: float = 0.5
    needs_records: ClassVar[bool] = True

    def init(self, zeros: dict[str, Array]) -> Motion:
        return Motion(zeros)

    def restart(self, motion: Motion) -> bool:
        """Whether inverses are refreshed off the clock: in the first steps and after one was taken back."""
        return motion.restart

    def hyper(self, motion: Motion, hyper: Hyper) -> Hyper:
        """The damping in force instead of the scheduled one."""
        return replace(hyper, damping=motion.damping)

    def begin(self, motion: Motion, records: dict[str, Record]) -> Motion:
        """The first damping, from tr(A) tr(G) of the first records."""
        if motion.damping > 0 or not records:
            return motion
        total = sum(_trace(record) for record in records.values())
        size = sum(record.blocks * record.d_out * record.d_in for record in records.values())
        return replace(motion, damping=max(self.first * total / size, 1e-8))

    def __call__(
        self, motion: Motion, directions: dict[str, Array], grads: dict[str, Any], records: dict[str, Record]
    ) -> tuple[dict[str, Array], Motion, dict[str, float]]:
        """(updates to subtract, motion, info) with alpha, mu, damping and the predicted change of the loss."""
        if not directions:
            return directions, motion, {}
        previous = {name: motion.previous[name] for name in directions}
        pair = [{n: _like(v, previous[n]) for n, v in directions.items()}, previous]
        F = curvature(records, pair)
        norms = np.array([[inner(p, q) for q in pair] for p in pair])
        down = np.array([slope(grads, p) for p in pair])
        alpha, mu = self._solve(F + motion.damping * norms, down)
        step = np.array([alpha, mu])
        predicted = float(-step @ down + 0.5 * step @ F @ step)
        updates = {n: alpha * pair[0][n] + mu * pair[1][n] for n in directions}
        motion = replace(motion, previous={**motion.previous, **updates}, predicted=predicted, steps=motion.steps + 1)
        told = {"alpha": alpha, "mu": mu, "damping": motion.damping, "predicted": predicted}
        shaped = {n: namespace(v).reshape(v, directions[n].shape) for n, v in updates.items()}
        return shaped, motion, told

    def judge(self, motion: Motion, before: float, after: float) -> tuple[bool, Motion]:
        """Whether the update may stay, given the batch loss before and after it, and the damping that follows."""
        if not (np.isfinite(after) and after <= (1.0 + self.tolerance) * before):
            still = tree.map(lambda x: x * 0, motion.previous)
            damping = min(motion.damping * self.grow, 1e8)
            return False, replace(motion, previous=still, damping=damping, rejected=motion.rejected + 1, restart=True)
        damping = motion.damping
        if motion.steps % self.every == 0:
            ratio = (after - before) / motion.predicted if motion.predicted < 0 else 0.0
            damping *= self.drop if ratio > 0.75 else 1 / self.drop if ratio < 0.25 else 1.0
        return True, replace(motion, damping=min(max(damping, 1e-8), 1e8), restart=motion.steps < 3)

    def _solve(self, Q: np.ndarray, down: np.ndarray) -> tuple[float, float]:
        """(alpha, mu) of the scaled 2x2 system; alpha alone without a previous update; (0, 0) if not finite."""
        keep = np.diag(Q) > 0
        if not (np.isfinite(Q).all() and np.isfinite(down).all() and keep[0]):
            return 0.0, 0.0
        scale = 1 / np.sqrt(np.diag(Q)[keep])
        R = Q[np.ix_(keep, keep)] * np.outer(scale, scale) + 1e-7 * np.eye(keep.sum())
        found = scale * np.linalg.solve(R, scale * down[keep])
        alpha, mu = float(found[0]), float(found[1]) if keep[1] else 0.0
        shrink = min(1.0, self.cap / abs(alpha)) if alpha else 1.0
        return alpha * shrink, mu * shrink


def _trace(record: Record) -> float:
    """tr(A) tr(G) of one record, summed over blocks."""
    xp = namespace(record.g)
    a, g = record.rows(), record.g
    rows = float(record.batch * record.shared)
    if record.mask is not None:
        rows = float(to_host(xp.sum(xp.astype(record.mask, g.dtype))))
    tr_a = to_host(xp.sum(a * a, axis=(1, 2, 3))) / rows
    tr_g = to_host(xp.sum(g * g, axis=(0, 2, 3, 4))) / float(record.n)
    return float(np.sum(tr_a.astype(np.float64) * tr_g))


def _like(v: Array, like: Array) -> Array:
    return namespace(v).reshape(v, like.shape)
