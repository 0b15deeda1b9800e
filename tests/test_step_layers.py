"""Which layers a step is of, and of which examples: frozen layers when it is judged, rows that all examples share."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from kfaccore import tree
from kfaccore.step.quadratic import curvature

BLOCKS = {name: kf.Block(3, 4) for name in "ab"}


def batch(rng, names="ab"):
    records = {n: kf.Record(rng.normal(size=(8, 4)), rng.normal(size=(8, 3)), 8.0) for n in names}
    return records, {n: x.examples()[0, 0].mean(0) for n, x in records.items()}


def buffers(motion):
    return motion.buffers if isinstance(motion, kf.step.grid.Trail) else motion.previous


@pytest.mark.parametrize("losses", [[9.0] * 40, [9.0, 9.0, 9.0] + [0.5] * 40], ids=["taken back", "shortened"])
@pytest.mark.parametrize(
    "rule",
    [kf.GridSearch(scaled=True), kf.GridSearch(), kf.Quadratic(), kf.SelfTuning()],
    ids=["grid, scaled", "grid", "quadratic", "self-tuning"],
)
def test_a_frozen_layer_keeps_its_motion_when_the_step_is_judged(rng, rule, losses):
    pre = kf.Preconditioner(kf.KFAC(), step=rule, schedules=kf.Schedules(0.1))
    state = pre.init(BLOCKS, np.zeros(1))
    for _ in range(2):
        _, state, _ = pre.step(state, *batch(rng), loss=1.0)
        _, state = pre.judge(state, 1.0, lambda share: None, lambda: 0.9)
    known = {n: x.copy() for n, x in buffers(state.motion).items()}
    records, grads = batch(rng, "a")
    _, state, _ = pre.step(state, records, grads, loss=1.0)
    given = iter(losses)
    share, state = pre.judge(state, 1.0, lambda share: None, lambda: next(given))
    assert share < 1
    np.testing.assert_array_equal(buffers(state.motion)["b"], known["b"])
    assert not np.array_equal(buffers(state.motion)["a"], known["a"])
    assert state.motion.layers is None  # as files and compiled programs know it
    assert known["b"].any()


@pytest.mark.parametrize("rule", [kf.GridSearch(), kf.Quadratic(), kf.SelfTuning()], ids=lambda r: type(r).__name__)
def test_a_step_of_all_layers_leaves_the_structure_of_its_state(rng, rule):
    pre = kf.Preconditioner(kf.KFAC(), step=rule, schedules=kf.Schedules(0.1))
    before = pre.init(BLOCKS, np.zeros(1))
    _, after, _ = pre.step(before, *batch(rng), loss=1.0)
    assert after.motion.layers is before.motion.layers is None
    assert tree.leaves(pre.judge(after, 1.0, lambda share: None, lambda: 0.9)[1])


def test_a_row_of_all_examples_is_a_block_of_its_own_in_the_model(rng):
    """As a record of batch 1 is: v^T F v is the sum of the layers' own."""
    records = {
        "fc": kf.Record(rng.normal(size=(6, 4)), rng.normal(size=(2, 6, 3)), 6.0),
        "pos": kf.Record(rng.normal(size=(1, 5)), rng.normal(size=(2, 1, 3)), 6.0),
    }
    v = [{n: rng.normal(size=(1, 3, x.d_in)) for n, x in records.items()} for _ in range(2)]
    F = {n: kf.dense(x)[0] for n, x in records.items()}
    want = [[sum(x[n].ravel() @ F[n] @ y[n].ravel() for n in F) for x in v] for y in v]
    np.testing.assert_allclose(curvature(records, v), want, rtol=1e-12)
    grads = {n: rng.normal(size=(3, x.d_in)) for n, x in records.items()}
    pre = kf.Preconditioner(kf.Exact(), step=kf.Quadratic(damping=1e-2))
    _, _, info = pre.step(pre.init({n: kf.Block(3, x.d_in) for n, x in records.items()}, np.zeros(1)), records, grads)
    assert info.step["alpha"] == pytest.approx(1.0, rel=1e-10)


def test_gauss_newton_names_a_layer_without_a_row_for_each_residual(rng):
    records = {
        "fc": kf.Record(rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), 6.0),
        "pos": kf.Record(rng.normal(size=(1, 5)), rng.normal(size=(1, 3)), 6.0),
    }
    rule = kf.GaussNewton()
    with pytest.raises(ValueError, match=r"residuals of \[6\] examples.*\{'pos': \[1\]\}.*freeze it"):
        rule.step(rule.init(), records, [rng.normal(size=6)])
    with pytest.raises(ValueError, match=r"residuals of \[5\] examples"):
        rule.step(rule.init(), {"fc": records["fc"]}, [rng.normal(size=5)])
