"""Whose memory it is: what a method or a rule hands out lies in no array that it was given or keeps."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from kfaccore import tree
from kfaccore.xp.owned import memory
from rows import METHODS, arrays

rows = pytest.mark.parametrize("row", METHODS, ids=lambda r: r.name)
N = 2.5


def overlap(found, others) -> list[str]:
    """Paths of arrays in `others` that lie in the memory of some array of `found`."""
    taken = {memory(x) for x in tree.leaves(found)} - {None}
    return [path for path, x in tree.items(others) if memory(x) in taken]


def put(kind, *given):
    if kind == "numpy":
        return given
    torch = pytest.importorskip("torch")
    return tuple(torch.asarray(x) for x in given)


@rows
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_direction_is_nobodys_memory(row, kind, rng):
    a, g = arrays(rng)
    a, g, v = put(kind, a, g, rng.normal(size=(2, 3, 4)))
    record = kf.Record(a, g, N)
    hyper = kf.Hyper(0, 0.0, 0.1)
    fresh = row.method.init(kf.Block.of(record), g)
    for state in (fresh, kf.settle(row.method, record, damping=0.1)):
        for grad in (v, v[0]) if record.blocks == 1 else (v,):
            solved = row.method.solve(state, grad, hyper, record)
            given = {"grad": grad, "record": {"a": record.a, "g": record.g}, "before": state, "after": solved.state}
            assert overlap(solved.direction, given) == []
    if not row.no_matrix:
        assert overlap(row.method.matvec(state, v, hyper), {"v": v, "state": state}) == []


RULES = [
    kf.Fixed(),
    kf.Fixed(1.0, 0.9),
    kf.Fixed(1.0, 0.9, kf.KLClip()),
    kf.Fixed(1.0, 0.9, kf.NormConstraint(1e6)),
    kf.Fixed(1.0, 0.9, kf.Noise()),
    kf.SelfTuning(),
    kf.SelfTuning(noise=kf.Noise(average=0.0)),
    kf.Quadratic(),
    kf.GridSearch(),
    kf.GridSearch(momentum=0.0),
    kf.LineSearch(),
]
METHODS_OF_LAYERS = [
    {"methods": {"a": kf.KFAC(), "b": kf.KFAC(), "c": kf.Identity()}},
    {"methods": kf.Identity()},
    {"methods": kf.CGFAC(solver=kf.methods.rows.cgfac.CG(warm=0.9))},
    {"network": kf.TwoLevel()},
    {"network": kf.Tridiagonal(("a", "b", "c"))},
    {"network": kf.GlobalFNGD()},
]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("given", METHODS_OF_LAYERS, ids=lambda g: str(g)[:30])
@pytest.mark.parametrize("stacked", [True, False])
def test_updates_are_the_callers(given, rule, kind, stacked, rng):
    pre = kf.Preconditioner(**given, step=rule, stacked=stacked)
    state = pre.init({n: kf.Block(4, 4, rows=32, samples=32) for n in "abc"}, put(kind, np.zeros(1))[0])
    for _ in range(3):
        rows = {n: put(kind, rng.normal(size=(8, 4)), rng.normal(size=(8, 4))) for n in "abc"}
        records = {n: kf.Record(a, g, 8.0) for n, (a, g) in rows.items()}
        own = {n: kf.Record(a, g * 0.5, 8.0) for n, (a, g) in rows.items()} if pre.rule.wants_own else None
        grads = {n: put(kind, rng.normal(size=(4, 4)))[0] for n in "abc"}
        updates, after, _ = pre.step(state, records, grads, loss=1.0, own=own)
        assert overlap(updates, {"grads": grads, "rows": rows, "before": state, "after": after}) == []
        state = pre.judge(after, 1.0, lambda share: None, lambda: 0.9)[1]
        assert overlap(updates, state) == []
