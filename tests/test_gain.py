"""Gain, the figure that ranks methods: against dense float64 matrices, its invariances, what is estimated."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.analysis import compare, fits, measure, ranked
from kfaccore.analysis.costs import fitted
from kfaccore.analysis.distance import probed
from kfaccore.analysis.exact import ExactBlock
from kfaccore.analysis.figures import Figures
from kfaccore.methods import CATALOGUE
from rows import arrays

METHODS = {name: kind() for name, kind in CATALOGUE.items() if name != "pinn-kfac"}
FEW = {name: METHODS[name] for name in ("kfac", "ekfac", "diagonal", "identity")}


def records(rng):
    """Blocks with shared positions, a masked layer, convolutions with several kernel positions, an embedding."""
    image = kf.Patches(rng.normal(size=(7, 5, 4, 2)), kf.Window((3, 2), (2, 1), (1, 0)), bias=True)
    grouped = kf.Patches(rng.normal(size=(2, 7, 4, 4, 2)), kf.Window((2, 2)))
    mask = rng.uniform(size=(7, 4)) > 0.3
    return {
        "fc": kf.Record(*arrays(rng), 5.0),
        "masked": kf.Record(rng.normal(size=(7, 4, 3)), rng.normal(size=(2, 7, 4, 2)), 7.0, mask),
        "plain": kf.Record(rng.normal(size=(9, 4)), rng.normal(size=(2, 9, 3)), 9.0),
        "conv": kf.Record(image, rng.normal(size=(2, 7, 9, 3)), 7.0),
        "grouped": kf.Record(grouped, rng.normal(size=(1, 2, 7, 9, 3)), 7.0),
        "table": kf.Record(kf.Ids(rng.integers(0, 6, (7, 3)), 6), rng.normal(size=(2, 7, 3, 2)), 7.0),
    }


def brute(record, method, grad, damping):
    """(gain, length) from F multiplied out, one per-example gradient at a time."""
    F = np.zeros((record.blocks, record.d_out * record.d_in, record.d_out * record.d_in))
    for J in record.examples().reshape(-1, record.blocks, F.shape[-1]) if record.blocks == 1 else ():
        F += np.einsum("bi,bj->bij", J, J) / record.n
    if record.blocks > 1:
        for draw in record.examples():
            for example in range(record.batch):
                J = draw[:, example].reshape(record.blocks, -1)
                F += np.einsum("bi,bj->bij", J, J) / record.n
    B = F + damping * np.eye(F.shape[-1])
    g = grad.reshape(record.blocks, -1)
    state = kf.settle(method, record, damping=damping)
    y = method.solve(state, grad, kf.Hyper(0, 0.0, damping), record).direction.reshape(g.shape)
    curved = np.einsum("bi,bij,bj->", y, B, y)
    best = np.vdot(g, np.linalg.solve(B, g[..., None])[..., 0])
    return np.vdot(g, y) ** 2 / (curved * best), np.vdot(g, y) / curved


@pytest.mark.parametrize("layer", ["fc", "masked", "plain", "conv", "grouped", "table"])
def test_gain_is_the_dense_one(rng, layer):
    record = records(rng)[layer]
    grad = rng.normal(size=(record.blocks, record.d_out, record.d_in))
    found = [f for f in compare({layer: record}, METHODS, {layer: grad}, 0.2, repeats=1) if np.isfinite(f.gain)]
    assert len(found) > 14
    for f in found:
        gain, length = brute(record, METHODS[f.method], grad, 0.2)
        assert f.gain == pytest.approx(gain, rel=1e-8), f.method
        assert f.length == pytest.approx(length, rel=1e-8), f.method
        assert f.gain_error == 0.0
        assert f.gain <= 1 + 1e-9


@pytest.mark.parametrize("layer", ["fc", "masked", "conv", "grouped"])
def test_products_of_j_are_the_same_whether_it_is_held_or_not(rng, layer):
    record = records(rng)[layer]
    held, streamed = (ExactBlock(record, held=numbers) for numbers in (1 << 22, 0))
    v = rng.normal(size=held.shape)
    assert all(part.held for part in held.parts)
    assert not any(part.held for part in streamed.parts)
    J = record.examples().reshape(record.draws, record.blocks, record.batch, -1)
    for block in range(record.blocks):
        rows = J[:, block].reshape(-1, J.shape[-1])
        for exact in (held, streamed):
            np.testing.assert_allclose(
                exact.grams[block], rows @ rows.T, rtol=0, atol=1e-12 * np.abs(rows @ rows.T).max()
            )
            want = rows.T @ (rows @ v[block].ravel()) / record.n
            np.testing.assert_allclose(exact.matvec(v)[block].ravel(), want, rtol=0, atol=1e-12 * np.abs(want).max())
    assert held.curvature(v) == pytest.approx(streamed.curvature(v), rel=1e-12)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "tekfac", "kpsvd", "deflation", "brand-r"])
def test_what_is_fitted_and_timed_at_once_is_judged_as_what_is_fitted_twice(rng, monkeypatch, name):
    """Slow methods are timed while they are fitted: what lives in the basis of the refresh is measured after it."""
    record = {"x": records(rng)["plain"]}
    (apart,) = compare(record, {name: METHODS[name]}, damping=0.2, repeats=1)
    monkeypatch.setattr(measure, "SLOW", -1.0)
    monkeypatch.setattr(measure, "SMALL", 0)
    (once,) = compare(record, {name: METHODS[name]}, damping=0.2, repeats=1)
    assert once.gain == pytest.approx(apart.gain, rel=1e-10)
    assert once.inverse_error == pytest.approx(apart.inverse_error, rel=1e-10)
    assert once.error == pytest.approx(apart.error, rel=1e-10)
    assert once.bytes == apart.bytes
    assert all(seconds > 0 for seconds in once.seconds.values())


def test_coefficients_of_examples_are_not_solved_for_where_they_take_too_much(rng):
    """FNGD holds J J^T: 3,000 rows take 216 MB with what factorises it."""
    record = {"x": kf.Record(rng.normal(size=(3000, 3)), rng.normal(size=(3000, 2)), 3000.0)}
    (found,) = compare(record, {"fngd": METHODS["fngd"]}, damping=0.2, repeats=1, peak=1 << 27)
    assert found.note.startswith("not measured: it needs about 0.1 GiB (--peak)")
    assert np.isnan(found.gain)


class Longer(kf.KFAC):
    """K-FAC at a thousandth of its length, uphill."""

    def solve(self, state, grad, hyper, record=None):
        found = super().solve(state, grad, hyper, record)
        return dataclasses.replace(found, direction=found.direction * -1e-3)


def test_the_length_of_a_direction_does_not_matter(rng):
    plain, scaled = compare({"x": records(rng)["fc"]}, {"kfac": kf.KFAC(), "longer": Longer()}, repeats=1)
    assert scaled.gain == pytest.approx(plain.gain, rel=1e-12)
    assert scaled.length == pytest.approx(-1e3 * plain.length, rel=1e-12)
    assert scaled.inverse_error != pytest.approx(plain.inverse_error, rel=0.1)


@pytest.mark.parametrize("scale", [1e-9, 1e3, 1e-150, 1e150])
def test_scaling_f_and_the_gradient_together_changes_no_gain(rng, scale):
    record = records(rng)["plain"]
    other = dataclasses.replace(record, g=record.g * scale)
    grad = rng.normal(size=(1, 3, 4))
    want = compare({"x": record}, FEW, {"x": grad}, repeats=1)
    got = compare({"x": other}, FEW, {"x": grad * scale}, repeats=1)
    for left, right in zip(want, got, strict=True):
        assert right.gain == pytest.approx(left.gain, rel=1e-9), left.method
        assert right.cosine == pytest.approx(left.cosine, rel=1e-9)
        assert right.error == pytest.approx(left.error, rel=1e-9) or left.method == "identity"
        assert right.damping == pytest.approx(left.damping * scale**2, rel=1e-9)


def test_what_overflows_is_judged_all_the_same(rng):
    record = records(rng)["plain"]
    huge = dataclasses.replace(record, a=record.a * 1e300, g=record.g * 1e-300)
    want = compare({"x": record}, FEW, repeats=1)
    for left, right in zip(want, compare({"x": huge}, FEW, repeats=1), strict=True):
        if left.method != "identity":  # whose block does not scale
            assert right.gain == pytest.approx(left.gain, rel=1e-9)
            assert right.error == pytest.approx(left.error, rel=1e-9)


def test_a_gradient_of_zero_has_nothing_to_gain(rng):
    record = kf.Record(rng.normal(size=(5, 3)), np.zeros((5, 2)), 5.0)
    for f in compare({"x": record}, METHODS, repeats=1):
        assert np.isnan(f.gain)
        assert "nothing to gain" in f.note
        assert f.damping > 0
    with pytest.raises(ValueError, match="its g holds values that are not finite"):
        compare({"x": kf.Record(np.ones((2, 2)), np.full((2, 2), np.nan), 2.0)}, FEW)


def test_above_the_limit_of_rows_the_gain_lies_within_its_error(rng):
    given = {"fc": kf.Record(rng.normal(size=(60, 5)), rng.normal(size=(60, 4)) ** 3, 60.0)}
    known, guessed = (compare(given, FEW, damping=1e-6, repeats=1, rows=rows) for rows in (60, 59))
    for exact, iterated in zip(known, guessed, strict=True):
        assert abs(exact.gain - iterated.gain) <= max(2 * iterated.gain_error, 1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_a_state_is_the_settled_one(rng, name):
    record = records(rng)["plain"]
    want = kf.settle(METHODS[name], record, damping=0.1)
    got = fitted(METHODS[name], record, 0.1).state
    for left, right in zip(kf.tree.leaves(got), kf.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-13, atol=1e-300)


class Counted(kf.KPSVD):
    """KPSVD that says when it measures."""

    seen: ClassVar[list[int]] = []

    def measure(self, state, record, hyper):
        self.seen.append(1)
        return super().measure(state, record, hyper)


def test_sweeps_end_where_they_stand_still(rng):
    """F of one input is a Kronecker product: the second sweep says so, the state is that of all thirty to rounding."""
    record = kf.Record(np.ones((7, 1)), rng.normal(size=(7, 4)), 7.0)
    Counted.seen.clear()
    got = fitted(Counted(), record, 0.1)
    assert len(Counted.seen) == got.cycles <= 3
    want = kf.settle(kf.KPSVD(), record, damping=0.1)
    for left, right in zip(kf.tree.leaves(got.state), kf.tree.leaves(want), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-14, atol=1e-300)


def test_sweeps_that_move_are_all_made():
    """Singular values 1 and .81 of the rearranged block: thirty sweeps do not end."""
    record = kf.Record(np.eye(2), np.diag([1.0, 0.9]), 1.0)
    Counted.seen.clear()
    assert fitted(Counted(), record, 0.1).cycles == len(Counted.seen) - 1 == kf.KPSVD.cycles


def test_probes_are_unbiased(rng):
    """The means of 200 independent estimates of both squared norms, within two standard errors."""
    F = rng.normal(size=(6, 6))
    near = rng.normal(size=(6, 6))
    signs = rng.choice((-1.0, 1.0), size=(200, 64, 6))
    above, below = [], []
    for z in signs:
        images, applied = z @ F.T, z @ near.T
        over, under = ((images - applied) ** 2).sum(1), (images**2).sum(1)
        error, spread = probed(over, under)
        above.append(over.mean())
        below.append(under.mean())
        assert error == pytest.approx((above[-1] / below[-1]) ** 0.5, rel=1e-12)
        assert spread > 0
    for estimates, true in ((above, np.sum((F - near) ** 2)), (below, np.sum(F**2))):
        assert abs(np.mean(estimates) - true) <= 2 * np.std(estimates, ddof=1) / 200**0.5


def test_the_standard_error_is_that_of_the_estimate(rng):
    """Two thirds of the estimates lie within one, 95 in 100 within two."""
    F = rng.normal(size=(6, 6))
    near = F + 0.5 * rng.normal(size=(6, 6))
    true = np.linalg.norm(F - near) / np.linalg.norm(F)
    off = []
    for z in rng.choice((-1.0, 1.0), size=(400, 64, 6)):
        error, spread = probed(((z @ (F - near).T) ** 2).sum(1), ((z @ F.T) ** 2).sum(1))
        off.append(abs(error - true) / spread)
    assert 0.6 < np.mean(np.array(off) < 1) < 0.76
    assert 0.92 < np.mean(np.array(off) < 2) < 0.98


def test_best_gain_first_and_a_layer_that_nothing_fits():
    rows = [Figures("x", "a", gain=0.1), Figures("x", "b"), Figures("x", "c", gain=0.29)]
    assert [f.method for f in ranked(rows)] == ["c", "a", "b"]
    assert not fits(rows)
    assert fits([*rows, Figures("x", "d", gain=0.3)])
    assert fits([Figures("x", "b")])
    told = Figures("x", "e", gain=1.0, own=True)
    assert not fits([*rows, told])
    assert ranked([told, *rows])[0].method == "c"
    assert [f.own for f in compare({"x": kf.Record(np.eye(3), np.eye(3), 3.0)}, {"f": kf.FNGD(), "k": kf.KFAC()})] == [
        True,
        False,
    ]
