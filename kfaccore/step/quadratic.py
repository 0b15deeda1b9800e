"""update = alpha x + mu (previous update) that minimises the exact quadratic model of the batch: no rate, no search.

m(d) = -<grad, d> + d^T (F + damping I) d / 2 with F from the records of all layers and terms, never its Kronecker
approximation; damping is the factors'. Source: Martens & Grosse 2015 (1503.05671), section 7; Dangel, Mueller &
Zeinhofer 2024 (2405.15603), where it is KFAC*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce as fold
from operator import add
from typing import ClassVar

import numpy as np

from kfaccore import tree
from kfaccore.method import Hyper
from kfaccore.record import Factored, Record
from kfaccore.record.jacobian import products
from kfaccore.step.known import Known
from kfaccore.step.model import Penalty, Records, inner, weighed
from kfaccore.step.rule import ByModel
from kfaccore.step.taken import Taken, of_step, taken
from kfaccore.xp.arrays import Array, eps, namespace, to_host
from kfaccore.xp.codes import Code
from kfaccore.xp.ranges import AT_LEAST_0, COUNT, POSITIVE, REAL, ranged


@dataclass(frozen=True)
class Memory:
    """The previous update, the steps taken and those taken back, the code of the last one, and which layers it is of
    until it is judged."""

    previous: dict[str, Array]
    steps: int = 0
    rejected: int = 0
    code: int = int(Code.OK)
    layers: Taken = tree.static(default=None)  # noqa: RUF009 a field


@dataclass(frozen=True)
class Quadratic(ByModel):
    """damping of model and factors alike, and when a step is too long to keep.

    damping     tiny: nothing but it bounds the step of a model that is only local
    first       alpha of the first step; 0 is the model's own
    tolerance   a step is halved while it raises the loss of its own batch by more than this share; math.inf is the
                published form, without a forward, which now and then leaves for good
    points      tries: 1, 1/2, ..., then none
    """

    damping: float = 1e-10
    first: float = 0.0
    tolerance: float = 0.5
    points: int = 16

    judges: ClassVar[bool] = True
    traced: ClassVar[bool] = False
    terms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ranged(self, damping=POSITIVE, first=AT_LEAST_0, tolerance=REAL, points=COUNT)

    @property
    def wants_own(self) -> bool:
        """Its model is that of the whole problem."""
        return False

    def init(self, zeros: dict[str, Array]) -> Memory:
        return Memory(zeros)

    def restart(self, motion: Memory) -> bool:
        """Never off the clock."""
        return False

    def hyper(self, motion: Memory, hyper: Hyper) -> Hyper:
        """The rule's damping instead of the scheduled one."""
        return replace(hyper, damping=self.damping)

    def begin(self, motion: Memory, records: Records) -> Memory:
        """Nothing to learn before the directions are known."""
        return motion

    def judge(self, motion: Memory, share: float, before: float, after: float) -> tuple[float, Memory]:
        """`share` when the loss has not risen too far, half of it otherwise; 0 when nothing helps. What stays is the
        previous update of the next step."""
        if np.isfinite(after) and (after <= before or after - before <= self.tolerance * before):
            kept = motion.previous
            if share != 1:
                kept = of_step(lambda x: x * share, kept, motion.layers)
            return share, replace(motion, previous=kept, code=int(Code.OK), layers=None)
        if share > 2.0 ** (1 - self.points):
            return share / 2, motion
        still = of_step(lambda x: namespace(x).zeros_like(x), motion.previous, motion.layers)
        code = Code.UNCONVERGED if np.isfinite(before) else Code.NONFINITE
        return 0.0, replace(motion, previous=still, rejected=motion.rejected + 1, code=int(code), layers=None)

    def gradients(
        self, motion: Memory, grads: Mapping[str, Array | Factored]
    ) -> tuple[Mapping[str, Array | Factored], Memory]:
        """Those of the batch."""
        return grads, motion

    def __call__(
        self,
        motion: Memory,
        directions: dict[str, Array],
        grads: Mapping[str, Array | Factored],
        records: Records,
        l2: Penalty = 0.0,
        known: Known = Known(),  # noqa: B008 frozen
    ) -> tuple[dict[str, Array], Memory, dict[str, float | Array]]:
        """(updates to subtract, motion, info) with alpha, mu and the predicted change of the damped model, <= 0."""
        told: dict[str, float | Array] = {"code": Code(motion.code), "rejected": motion.rejected}
        if not directions:
            return directions, replace(motion, layers=()), {**told, "alpha": 0.0}
        previous = {name: motion.previous[name] for name in directions}
        x = {name: namespace(v).reshape(v, previous[name].shape) for name, v in directions.items()}
        pair = (x, previous)
        norms = np.array([[inner(p, q) for q in pair] for p in pair])
        if isinstance(l2, Mapping):
            own = [weighed(l2, p) for p in pair]
            Q = curvature(records, pair) + self.damping * norms
            Q = Q + np.array([[inner(p, q) for q in pair] for p in own])
        else:
            Q = curvature(records, pair) + (self.damping + l2) * norms
        down = np.array([slope(grads, p) for p in pair])
        step = minimiser(Q, down)
        if self.first and motion.steps == 0:
            step = np.array([self.first, 0.0])
        alpha, mu = (float(s) for s in step)
        updates = {name: alpha * x[name] + mu * previous[name] for name in directions}
        told |= {"alpha": alpha, "mu": mu, "predicted": float(-step @ down + 0.5 * step @ Q @ step)}
        layers = taken(directions, motion.previous)
        motion = replace(motion, previous={**motion.previous, **updates}, steps=motion.steps + 1, layers=layers)
        moved = {name: namespace(v).reshape(v, directions[name].shape) for name, v in updates.items()}
        return moved, motion, told


def curvature(records: Records, directions: Sequence[Mapping[str, Array]]) -> np.ndarray:
    """v_i^T F v_j for every pair of directions, over all layers and terms, float64 on the host.

    A layer with one row for all examples, such as an embedding of their positions, is a block of its own, as in
    `expansion`.
    """
    names = list(directions[0])
    given = [records[name] for name in names]
    terms = [(record,) if isinstance(record, Record) else record for record in given]
    total = np.zeros((len(directions),) * 2)
    for batch in zip(*terms, strict=True):  # one term of the loss: a record of every layer
        rows: dict[tuple[int, ...], list] = {}  # J v of the layers by its shape: only equal batches may be added
        for name, record in zip(names, batch, strict=True):
            Jv = products(record, *(v[name] for v in directions))
            rows.setdefault(tuple(Jv[0].shape), []).append(Jv)
        for layers in rows.values():
            Jv = [to_host(fold(add, column)).astype(np.float64).ravel() for column in zip(*layers, strict=True)]
            u = np.stack(Jv)
            total += u @ u.T / float(batch[0].n)
    return total


def slope(grads: Mapping[str, Array | Factored], direction: dict[str, Array]) -> float:
    """<gradient, direction> over all layers, in float64."""
    given = {name: grads[name] for name in direction}
    dense = {name: grad.dense() if isinstance(grad, Factored) else grad for name, grad in given.items()}
    return float(inner(dense, direction))


def minimiser(Q: np.ndarray, down: np.ndarray) -> np.ndarray:
    """argmin of -down . s + s . Q s / 2 over what rounding leaves of a positive semidefinite Q (2, 2); 0 if not finite.

    A zero row (no previous update) stays out; parallel vectors share the least-squares step.
    """
    diagonal = np.diag(Q)
    keep = diagonal > 0
    if not (np.isfinite(Q).all() and np.isfinite(down).all() and keep.any()):
        return np.zeros(len(down))
    scale = np.where(keep, 1.0 / np.sqrt(np.where(keep, diagonal, 1.0)), 0.0)  # to a unit diagonal
    values, vectors = np.linalg.eigh(Q * np.outer(scale, scale))
    usable = values > 16 * eps(np.float64, np) * values[-1]
    inverse = np.where(usable, 1.0 / np.where(usable, values, 1.0), 0.0)  # the others are rounding: left out
    return scale * (vectors @ (inverse * (vectors.T @ (scale * down))))
