"""Factors for all layers made from sums over them: layers that are not finite, overflow, clipped gradients."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.step.known import Known

KAPPA, LR = 1e-3, 0.1


def problem(rng, dtype=np.float64, d_out=3):
    """(records, own gradients, gradients, blocks) of two layers of eight examples."""
    shapes = {"a": 4, "b": 5}
    rows = {n: (rng.normal(size=(8, d)) + 1).astype(dtype) for n, d in shapes.items()}
    records = {n: kf.Record(a, rng.normal(size=(8, d_out)).astype(dtype), 8.0) for n, a in rows.items()}
    own = {n: kf.Record(a, (rng.normal(size=(8, d_out)) + 4).astype(dtype), 8.0) for n, a in rows.items()}
    grads = {n: x.examples()[0, 0].sum(0) / 8 for n, x in own.items()}
    return records, own, grads, {n: kf.Block(d_out, d) for n, d in shapes.items()}


def stepped(rule, records, grads, blocks, **told):
    pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(0.1), step=rule)
    return pre.step(pre.init(blocks, np.zeros(1)), records, grads, **told)


@pytest.mark.parametrize("rescale", [kf.KLClip(KAPPA), kf.NormConstraint(0.01)], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("factored", [False, True])
def test_a_layer_that_is_not_finite_leaves_the_bound_to_the_others(rng, rescale, bad, factored):
    records, own, grads, blocks = problem(rng)
    rule = kf.Fixed(LR, 0.0, rescale)
    if factored:
        grads = {n: kf.Factored(x.a, x.g[0], x.n) for n, x in own.items()}
        wrong = kf.Factored(grads["a"].a, np.where(np.arange(8)[:, None, None] == 2, bad, grads["a"].g), 8.0)
    else:
        wrong = np.where(np.arange(12).reshape(3, 4) == 5, bad, grads["a"])
    pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(0.1), step=rule)
    state = pre.init(blocks, np.zeros(1))
    want, _, _ = pre.step(state, {"b": records["b"]}, {"b": grads["b"]})
    got, _, info = pre.step(state, records, {**grads, "a": wrong})
    np.testing.assert_allclose(got["b"], want["b"], rtol=1e-12)
    assert not got["a"].any()
    assert info.step["scale"] < 1


@pytest.mark.parametrize("size", [1e-20, 1e20, 1e30])
def test_bounds_hold_where_products_overflow(xp, rng, size):
    """In float32, against float64: the sum of <d, g> is what KLClip bounds, the norm what NormConstraint does."""
    d = {n: (size * rng.normal(size=(3, 4))).astype(np.float32) for n in "ab"}
    g = {n: (size * rng.normal(size=(3, 4))).astype(np.float32) for n in "ab"}
    wide = lambda of: {n: x.astype(np.float64) for n, x in of.items()}  # noqa: E731
    total = abs(sum((x * wide(g)[n]).sum() for n, x in wide(d).items()))
    norm = sum((x**2).sum() for x in wide(d).values()) ** 0.5
    mine = [{n: xp.put(x) for n, x in of.items()} for of in (d, g)]
    factor = float(xp.get(kf.KLClip(KAPPA)(*mine, LR)))
    assert factor == pytest.approx(min(1.0, (KAPPA / total) ** 0.5 / LR), rel=2e-6)
    assert float(xp.get(kf.NormConstraint(0.5)(*mine, LR))) == pytest.approx(min(1.0, 0.5 / LR / norm), rel=2e-6)
    found = kf.Graft().by_layer(mine[0], Known(lengths={"a": 2.0, "b": 0.0}))
    length = float(xp.get(found["a"])) * np.linalg.norm(wide(d)["a"])
    assert length == pytest.approx(2.0, rel=2e-6)
    assert float(xp.get(found["b"])) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_factor_that_is_not_known_is_no_step(xp, bad):
    d = {"a": xp.put(np.array([[1.0, bad]])), "b": xp.put(np.array([[2.0]]))}
    one = {"a": xp.put(np.array([[1.0, 1.0]])), "b": xp.put(np.array([[1.0]]))}
    with np.errstate(invalid="ignore"):
        assert float(xp.get(kf.KLClip()(d, one, LR))) == 0
        assert float(xp.get(kf.KLClip()(one, d, LR))) == 0
        assert float(xp.get(kf.NormConstraint()(d, one, LR))) == 0
        assert float(xp.get(kf.Graft().by_layer(d, Known(lengths={"a": 1.0, "b": 1.0}))["a"])) == 0
        lengths = {"a": xp.put(np.array(bad)), "b": 1.0}
        assert float(xp.get(kf.Graft().by_layer(one, Known(lengths=lengths))["a"])) == 0


def test_zero_directions_are_left_alone(xp):
    zero = {"a": xp.put(np.zeros((2, 3)))}
    assert float(xp.get(kf.KLClip()(zero, zero, LR))) == 1
    assert float(xp.get(kf.NormConstraint()(zero, zero, LR))) == 1


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("d_out", [1, 3, 7])
@pytest.mark.parametrize(
    "rule", [kf.Fixed(rescale=kf.Noise(reach=np.inf)), kf.SelfTuning()], ids=lambda r: type(r).__name__
)
def test_clipped_gradients_give_a_clipped_step(rng, rule, d_out, factored):
    """The own shares are of the loss's own gradients: of c times them the step is c times theirs."""
    records, own, grads, blocks = problem(rng, d_out=d_out)
    want, _, info = stepped(rule, records, grads, blocks, own=own)
    assert info.step["given"] == pytest.approx(1.0, rel=1e-12)
    assert any(x.any() for x in want.values())
    for c in (0.03, 0.5, 4.0):
        scaled = {n: c * g for n, g in grads.items()}
        if factored:
            scaled = {n: kf.Factored(x.a, c * x.g[0], x.n) for n, x in own.items()}
        got, _, info = stepped(rule, records, scaled, blocks, own=own)
        assert info.step["given"] == pytest.approx(c, rel=1e-12)
        for n, x in want.items():
            np.testing.assert_allclose(got[n].reshape(x.shape), c * x, rtol=1e-9, atol=1e-14)


def test_gradients_of_more_than_the_loss_keep_their_shares(rng):
    """What a penalty adds is no factor: the shares of the examples are in the direction as they are."""
    records, own, grads, blocks = problem(rng)
    more = {n: g + rng.normal(size=g.shape) for n, g in grads.items()}
    _, _, info = stepped(kf.Fixed(rescale=kf.Noise()), records, more, blocks, own=own)
    assert info.step["given"] == 1.0


@pytest.mark.parametrize("d_out", [1, 7])
def test_own_records_may_count_in_another_n(rng, d_out):
    """g / n of an own record is what counts, as where a shell gives the slopes of a mean loss with n = 1."""
    records, own, grads, blocks = problem(rng, d_out=d_out)
    rule = kf.SelfTuning()
    want, _, _ = stepped(rule, records, grads, blocks, own=own)
    same = {n: kf.Record(x.a, x.g / x.n, 1.0) for n, x in own.items()}
    got, _, info = stepped(rule, records, grads, blocks, own=same)
    assert info.step["given"] == pytest.approx(1.0, rel=1e-12)
    for n, x in want.items():
        np.testing.assert_allclose(got[n], x, rtol=1e-10, atol=1e-14)
