"""The report of records: figures against dense float64 matrices, what it is made from, how it is shown."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.analysis import sides
from rows import arrays


def records(rng):
    image = kf.Patches(rng.normal(size=(7, 4, 4, 2)), kf.Window((2, 2)), bias=True)
    return {
        "fc": kf.Record(*arrays(rng), 5.0),
        "conv": kf.Record(image, rng.normal(size=(2, 7, 9, 3)), 7.0),
        "plain": kf.Record(rng.normal(size=(9, 4)), rng.normal(size=(2, 9, 3)), 9.0),
        "table": kf.Record(kf.Ids(rng.integers(0, 6, (7, 2)), 6), rng.normal(size=(2, 7, 2, 2)), 7.0),
    }


def rearranged(F, d_out, d_in):
    """R[(o, o'), (i, i')] of F[(o, i), (o', i')]."""
    return F.reshape(d_out, d_in, d_out, d_in).transpose(0, 2, 1, 3).reshape(d_out**2, d_in**2)


@pytest.mark.parametrize("layer", ["fc", "conv", "plain", "table"])
def test_rows_are_the_dense_ones(rng, layer):
    record = records(rng)[layer]
    (row,) = kf.analysis.report({layer: record}).rows
    F = kf.dense(record)
    values = np.linalg.eigvalsh(F)
    positive = [v[v > 1e-12 * v[-1]] for v in values]
    assert row.condition == pytest.approx(max(v[-1] / v[0] for v in positive), rel=1e-6)
    assert row.trace == pytest.approx(np.trace(F, axis1=1, axis2=2).sum(), rel=1e-12)
    a = record.rows().reshape(record.blocks, -1, record.d_in)
    A = np.linalg.eigvalsh(a.mT @ a / a.shape[1])
    worst = A[np.argmin(A[:, 0] / A[:, -1])]
    assert 1 / row.condition_a == pytest.approx(worst[0] / worst[-1], rel=1e-8)
    worst = worst[worst > 0]
    share = worst / worst.sum()
    assert row.rank_a == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-10)
    if layer == "table":
        assert np.isnan(row.kronecker)
    else:
        largest = [np.linalg.svd(rearranged(f, record.d_out, record.d_in))[1][0] for f in F]
        want = sum(s**2 for s in largest) / np.linalg.norm(F) ** 2
        assert row.kronecker == pytest.approx(want, rel=1e-9)
    assert np.isnan(row.noise)


@pytest.mark.parametrize("shared", [(), (3,)])
@pytest.mark.parametrize("draws", [(), (2,)])
def test_a_pair_is_of_a_mean_over_its_examples(rng, shared, draws):
    a, g = rng.normal(size=(5, *shared, 4)), rng.normal(size=(*draws, 5, *shared, 2))
    found = kf.analysis.report({"x": (a, g)}).to_dict()
    assert found == kf.analysis.report({"x": kf.Record(a, g, 5.0)}).to_dict()


def test_a_kronecker_block_is_one(rng):
    """Every pair of an input and an output gradient once: F is G (x) A."""
    a, g = rng.normal(size=(4, 3)), rng.normal(size=(5, 2))
    record = kf.Record(np.repeat(a, 5, axis=0), np.tile(g, (4, 1)), 20.0)
    (row,) = kf.analysis.report({"x": record}).rows
    assert row.kronecker == pytest.approx(1.0, rel=1e-12)


def test_dead_units_and_features_twice(rng):
    a = rng.normal(size=(8, 6))
    a[:, 1] = 0
    a[:, 4] = -3 * a[:, 0]
    a[:, 5] = 2 * a[:, 0]
    g = rng.normal(size=(8, 3))
    g[:, 2] = 0
    (row,) = kf.analysis.report({"x": (a, g)}).rows
    assert (row.dead_inputs, row.dead_outputs, row.duplicated) == (1, 1, 2)
    assert row.condition_a == np.inf


@pytest.mark.parametrize("layer", ["fc", "conv", "plain"])
def test_of_a_side_too_wide_only_the_diagonal_is_made(rng, monkeypatch, layer):
    record = records(rng)[layer]
    monkeypatch.setattr(sides, "WIDEST", 1)
    for side, rows in (
        (sides.side_of_inputs(record), record.rows()[None]),
        (sides.side_of_gradients(record), record.g),
    ):
        weight = record.n if rows is record.g else record.batch * record.shared
        np.testing.assert_allclose(side.diagonal, (rows**2).sum((0, 2, 3)) / weight, rtol=1e-12)
        assert side.matrix is None
    (row,) = kf.analysis.report({layer: record}).rows
    assert np.isnan([row.condition_a, row.rank_g, row.duplicated]).all()
    assert row.condition > 1


def test_a_wide_layer_takes_no_square_of_its_width(rng):
    record = kf.Record(rng.normal(size=(3, 6000)), rng.normal(size=(3, 4000)), 3.0)
    tracemalloc.start()
    (row,) = kf.analysis.report({"x": record}).rows
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6000**2  # an eighth of A
    assert (row.dead_inputs, row.dead_outputs) == (0, 0)
    assert 0 < row.kronecker < 1


def test_every_source_gives_one_report(xp, tmp_path):
    rng = np.random.default_rng(0)
    a, g = rng.normal(size=(6, 4)), rng.normal(size=(6, 3))
    want = kf.analysis.report({"x": kf.Record(a, g, 6.0)}).to_dict()
    kf.save_records(tmp_path / "x.safetensors", {"x": kf.Record(xp.put(a), xp.put(g), 6.0)})
    np.savez(tmp_path / "x.npz", **{"x.a": a, "x.g": g})
    assert kf.analysis.report({"x": kf.Record(xp.put(a), xp.put(g), 6.0)}).to_dict() == want
    assert kf.analysis.report({"x": (xp.put(a), xp.put(g))}).to_dict() == want
    assert kf.analysis.report(tmp_path / "x.npz").to_dict() == want
    assert kf.analysis.report(str(tmp_path / "x.safetensors")).to_dict() == want


def test_it_can_be_shown(rng):
    given = {**records(rng), "<zero>": kf.Record(np.ones((3, 2)), np.zeros((3, 2)), 3.0)}
    found = kf.analysis.report(given)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["layers"][-1]["kronecker"] is None
    page = found._repr_html_()
    assert page.count("<tr>") == 6
    assert "&lt;zero&gt;" in page
    assert str(found).count("\n") == 5
    assert len(found.plot().axes) == 3


def test_bad_records_are_named():
    with pytest.raises(ValueError, match=r"'x'.* not finite"):
        kf.analysis.report({"x": (np.full((2, 2), np.inf), np.ones((2, 2)))})
    with pytest.raises(ValueError, match=r"'x'.* whose squares are not"):
        kf.analysis.report({"x": (np.full((2, 2), 1e200), np.ones((2, 2)))})
    with pytest.raises(ValueError, match=r"'x': the trace of F is no number"):
        kf.analysis.report({"x": (np.full((2, 2), 1e100), np.full((2, 2), 1e100))})
    with pytest.raises(ValueError, match="'x' has no draws"):
        kf.analysis.report({"x": kf.Record(np.ones((3, 2)), np.ones((0, 3, 2)), 3.0)})
