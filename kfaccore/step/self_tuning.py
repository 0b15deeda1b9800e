"""A step that sets its own rate, momentum and damping.

update = alpha x + mu (previous update), (alpha, mu) minimising the exact quadratic model of the batch plus damping;
damping follows the reduction ratio (Levenberg-Marquardt), and a step that raises the loss of its own batch is taken
back. Source: Martens & Grosse 2015 (1503.05671), sections 6.4-7. Cost: two J v and one forward a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from kfaccore import tree
from kfaccore.method import Hyper
from kfaccore.record import Record
from kfaccore.step.model import Expansion, expansion, inner, trace
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.codes import Code

_LEAST, _MOST = 1e-8, 1e8  # of damping


@dataclass(frozen=True)
class Motion:
    """The previous update, the damping in force, what was predicted and found, and counters.

    ratio   change of the loss over the predicted one at the last look; code of the last step
    """

    previous: dict[str, Array]
    damping: float = 0.0
    predicted: float = 0.0
    ratio: float = 1.0
    steps: int = 0
    rejected: int = 0
    restart: bool = True
    code: int = int(Code.OK)


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
    floor       where |alpha| falls below it, damping grows by 1/0.8: for damping so low that the direction is noise,
                which the reduction ratio cannot see; 0 is off, 0.02 costs a tenth of the steps from a good start
    model       (records, gradients, directions) -> Expansion
    """

    first: float = 0.1
    drop: float = 0.95**5
    every: int = 5
    grow: float = 4.0
    cap: float = 1.0
    tolerance: float = 0.25
    floor: float = 0.0
    model: Callable[..., Expansion] = expansion

    needs_records: ClassVar[bool] = True
    judges: ClassVar[bool] = True

    def init(self, zeros: dict[str, Array]) -> Motion:
        return Motion(zeros)

    def restart(self, motion: Motion) -> bool:
        """In the first steps, and after one was taken back."""
        return motion.restart

    def hyper(self, motion: Motion, hyper: Hyper) -> Hyper:
        """The damping in force instead of the scheduled one."""
        return replace(hyper, damping=motion.damping)

    def begin(self, motion: Motion, records: dict[str, Record]) -> Motion:
        """The first damping, from tr(A) tr(G) of the first records."""
        if motion.damping > 0 or not records:
            return motion
        total = sum(trace(record) for record in records.values())
        size = sum(record.blocks * record.d_out * record.d_in for record in records.values())
        damping = self.first * total / size
        return replace(motion, damping=min(max(damping, _LEAST), _MOST)) if np.isfinite(damping) else motion

    def __call__(
        self,
        motion: Motion,
        directions: dict[str, Array],
        grads: dict[str, Any],
        records: dict[str, Record],
        l2: float = 0.0,
    ) -> tuple[dict[str, Array], Motion, dict[str, Any]]:
        """(updates to subtract, motion, info): alpha, mu, damping, predicted change, last ratio, rejections, code.

        l2   the penalty l2/2 |theta|^2 is part of the loss and of `grads`, so its curvature joins the model.
        Raises ValueError when the first records hold true labels: that Fisher is not the curvature of the loss.
        """
        if not directions:
            return directions, motion, {"alpha": 0.0, "code": Code.OK}
        previous = {name: motion.previous[name] for name in directions}
        pair = ({n: _like(v, previous[n]) for n, v in directions.items()}, previous)
        found = self.model(records, grads, pair)
        if found.empirical and motion.steps == 0:
            raise ValueError(
                "the records' draws add up to the gradient itself, so they come from the true labels (an empirical "
                "Fisher), which does not model the loss: draw labels with monte_carlo or type2, or use LineSearch()"
            )
        cross = inner(*pair)
        norms = np.array([[inner(pair[0], pair[0]), cross], [cross, inner(previous, previous)]])
        F = found.F + l2 * norms
        alpha, mu, code = self._solve(F + motion.damping * norms, found.down)
        step = np.array([alpha, mu])
        predicted = float(-step @ found.down + 0.5 * step @ F @ step) if code != Code.NONFINITE else 0.0
        updates = {n: _combined(alpha, pair[0][n], mu, previous[n]) for n in directions}
        told = {"alpha": alpha, "mu": mu, "damping": motion.damping, "predicted": predicted, "ratio": motion.ratio}
        told |= {"rejected": motion.rejected, "code": code}
        damping = motion.damping / 0.8 if 0 < abs(alpha) < self.floor else motion.damping
        motion = replace(
            motion,
            previous={**motion.previous, **updates},
            damping=damping,
            predicted=predicted,
            steps=motion.steps + 1,
            code=int(code),
        )
        return {n: namespace(v).reshape(v, directions[n].shape) for n, v in updates.items()}, motion, told

    def judge(self, motion: Motion, share: float, before: float, after: float) -> tuple[float, Motion]:
        """All of the update or none of it, given the batch loss before and after it, and the damping that follows."""
        if not (np.isfinite(after) and after <= (1.0 + self.tolerance) * before):
            still = tree.map(lambda x: x * 0, motion.previous)
            damping = min(motion.damping * self.grow, _MOST)
            code = motion.code if np.isfinite(after) else int(Code.NONFINITE)
            motion = replace(motion, previous=still, damping=damping, rejected=motion.rejected + 1, restart=True)
            return 0.0, replace(motion, code=code)
        damping, ratio = motion.damping, motion.ratio
        if motion.steps % self.every == 0:
            ratio = (after - before) / motion.predicted if motion.predicted < 0 else 0.0
            damping *= self.drop if ratio > 0.75 else 1 / self.drop if ratio < 0.25 else 1.0
        damping = min(max(damping, _LEAST), _MOST)
        return share, replace(motion, damping=damping, ratio=ratio, restart=motion.steps < 3)

    def _solve(self, Q: np.ndarray, down: np.ndarray) -> tuple[float, float, Code]:
        """(alpha, mu) of the 2x2 system, and how: OK; JITTERED, alpha alone, when the two directions are parallel to
        rounding; NONFINITE, no step. Zero directions get zero factors."""
        if not (np.isfinite(Q).all() and np.isfinite(down).all()):
            return 0.0, 0.0, Code.NONFINITE
        if Q[0, 0] <= 0:
            return 0.0, 0.0, Code.OK
        alpha, mu, code = float(down[0] / Q[0, 0]), 0.0, Code.OK
        if Q[1, 1] > 0:
            scale = 1 / np.sqrt(np.diag(Q))
            R = Q * np.outer(scale, scale)
            if 1 - R[0, 1] ** 2 < 1e-6:
                code = Code.JITTERED
            else:
                alpha, mu = (float(x) for x in scale * np.linalg.solve(R, scale * down))
        shrink = min(1.0, self.cap / abs(alpha)) if alpha else 1.0
        return alpha * shrink, mu * shrink, code


def _combined(alpha: float, x: Array, mu: float, y: Array) -> Array:
    return alpha * x + mu * y if mu else alpha * x


def _like(v: Array, like: Array) -> Array:
    return namespace(v).reshape(v, like.shape)
