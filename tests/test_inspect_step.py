"""inspect's reading of a step: figures against brute force, where the gradient is seen to be the records' own."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import kfaccore as kf
from kfaccore.analysis import own
from kfaccore.cli import app


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A narrow terminal has not all columns."""
    monkeypatch.setenv("COLUMNS", "120")


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def one_layer(seed=0, draws=1, batch=6):
    """A record of few parameters with two positions, and the mean gradient of its examples."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(batch, 2, 3)) + 1.0
    g = rng.normal(size=(draws, batch, 2, 2)) + 1.0
    each = np.einsum("vbso,bsi->vboi", g, a)  # an example's own gradient is this times batch / n
    return kf.Record(a, g, 2.0 * batch), each.mean(0).mean(0) / 2.0, each * 0.5


def brute_noise(each, metric):
    """tr(Sigma M) / (G M G) of examples (batch, parameters), unbiased: covariance, and |mean|^2 - tr / batch."""
    sigma = np.cov(each.T)
    mean = each.mean(0)
    trace = np.trace(sigma @ metric)
    return trace / (mean @ metric @ mean - trace / len(each))


def saved(path, record, grad):
    kf.save_records(path, {"fc": record}, None if grad is None else {"fc": grad})
    return path


def test_the_reading_is_that_of_brute_force(tmp_path):
    record, grad, each = one_layer()
    found = json.loads(run("inspect", saved(tmp_path / "x", record, grad), "--json").stdout)
    of = found["reading"]["fc"]
    rows = each[0].reshape(6, -1)
    basis = kf.fit(kf.EKFAC(), [{"fc": record}]).layers["fc"]
    Q = np.kron(basis.Qg[0], basis.Qa[0])
    assert pytest.approx(np.eye(6), abs=1e-12) == Q @ Q.T
    F = Q @ np.diag(np.diag(Q.T @ kf.dense(record)[0] @ Q)) @ Q.T  # EK-FAC: F's own diagonal in the Kronecker basis
    values = np.linalg.eigvalsh(F)
    damping = values.mean() / 10
    L = F + damping * np.eye(6)
    flat = grad.reshape(-1)
    assert of["damping"] == pytest.approx(damping, rel=1e-10)
    assert of["newton"] == pytest.approx(flat @ np.linalg.solve(L, flat), rel=1e-9)
    assert of["gamma"] == pytest.approx((values / (values + damping)).sum(), rel=1e-10)
    assert of["condition"] == pytest.approx(np.linalg.cond(L), rel=1e-9)
    assert of["noise"]["plain"] == pytest.approx(brute_noise(rows, np.eye(6)), rel=1e-9)
    assert of["noise"]["natural"] == pytest.approx(brute_noise(rows, np.linalg.inv(L)), rel=1e-8)
    assert found["layers"][0]["noise"] == pytest.approx(of["noise"]["plain"], rel=1e-10)


def test_the_table_shows_half_of_newton_and_the_rest(tmp_path):
    record, grad, _ = one_layer()
    path = saved(tmp_path / "x", record, grad)
    of = json.loads(run("inspect", path, "--json").stdout)["reading"]["fc"]
    line = run("inspect", path).stdout.splitlines()[-1].split()
    noise = [f"{x:.3g}" for x in of["noise"].values()]
    figures = [f"{of['damping']:.1e}", f"{of['newton'] / 2:.3g}", f"{of['gamma']:.1f}", f"{of['condition']:.1e}"]
    assert line == ["fc", *figures, *noise]


@pytest.mark.parametrize(
    ("draws", "batch", "share", "why"),
    [
        (1, 6, None, own.NO_GRADIENT),
        (1, 6, 1.0 + 1e-6, own.DRAWN),
        (2, 6, 1.0, own.FEW),
        (1, 1, 1.0, own.FEW),
    ],
)
def test_records_that_are_not_seen_to_be_own_have_no_reading(tmp_path, draws, batch, share, why):
    record, grad, _ = one_layer(draws=draws, batch=batch)
    path = saved(tmp_path / "x", record, None if share is None else share * grad)
    found = json.loads(run("inspect", path, "--json").stdout)
    assert found["reading"] == {"fc": {"why": why}}
    assert found["layers"][0]["noise"] is None
    assert f"no reading of fc: {why}" in run("inspect", path).stdout


def test_a_gradient_of_float32_is_seen_to_float32(tmp_path):
    record, grad, _ = one_layer()
    path = saved(tmp_path / "x", record, ((1 + 1e-5) * grad).astype(np.float32))
    assert "newton" in json.loads(run("inspect", path, "--json").stdout)["reading"]["fc"]


def test_a_convolution_is_read_part_by_part(monkeypatch):
    """As of its unfolded rows, and never more of them than may be held at once."""
    rng = np.random.default_rng(0)
    image = kf.Patches(rng.normal(size=(7, 4, 4, 2)), kf.Window((2, 2)), bias=True)
    record = kf.Record(image, rng.normal(size=(7, 9, 3)), 7.0)
    grad = np.einsum("bso,bsi->oi", record.g[0, 0], record.rows()[0]) / 7.0
    monkeypatch.setattr(own.kernels, "at_once", lambda each: 2)
    sizes = []
    unfold = kf.Patches.rows
    monkeypatch.setattr(kf.Patches, "rows", lambda self, many: sizes.append(many) or unfold(self, many))
    assert own.not_own(record, grad) == ""
    assert own.not_own(record, 1.001 * grad) == own.DRAWN
    assert max(sizes) == 2


def test_noise_of_a_report_from_arrays():
    record, grad, each = one_layer()
    (row,) = kf.analysis.report({"fc": record}, {"fc": grad}).rows
    assert row.noise == pytest.approx(brute_noise(each[0].reshape(6, -1), np.eye(6)), rel=1e-10)
    assert np.isnan(kf.analysis.report({"fc": record}).rows[0].noise)


def test_a_gradient_lost_in_noise_says_so(tmp_path):
    record, _, _ = one_layer()
    g = record.g - record.g.mean(axis=2, keepdims=True)
    lost = kf.Record(np.ones((6, 2, 3)), g, record.n)  # equal inputs, and output gradients of mean zero
    own_grad = np.einsum("bso,bsi->oi", g[0, 0], np.ones((6, 2, 3))) / record.n
    line = run("inspect", saved(tmp_path / "x", lost, own_grad)).stdout.splitlines()[-1]
    assert "all noise" in line


def test_how_many_parameters_a_saved_run_decides(tmp_path):
    A = np.diag([1.0, 2.0, 4.0])[None]
    G = np.diag([1.0, 3.0])[None]
    tree = {"params": {"fc": np.ones((2, 3))}, "state": {"layers": {"fc": {"A": A, "G": G, "weight": np.ones(1)}}}}
    kf.save(tmp_path / "x", tree, damping={"fc": 0.5})
    values = np.linalg.eigvalsh(np.kron(G[0], A[0]))
    expected = (values / (values + 0.5)).sum()
    found = json.loads(run("inspect", tmp_path / "x", "--json").stdout)
    assert found["layers"][0]["gamma"] == pytest.approx(expected, rel=1e-12)
    shown = run("inspect", tmp_path / "x").stdout
    assert "decided" in shown
    assert f"{expected:.1f}" in shown
