"""The posterior against laplace-torch and kronfluence: values that `tests/data/peers.py` made with those packages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.posterior import apart, apart_mean, bridge, probit, slope

DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(DATA))

from peers import DAMPING, problem  # noqa: E402

PEERS = json.loads((DATA / "peers.json").read_text(encoding="utf-8"))
GIVEN = problem()
LOSS = kf.SoftmaxCrossEntropy()
N = len(GIVEN["y"])
LAYERS = ("0", "2")
MEAN = {name: GIVEN[name][None] for name in LAYERS}


def forward(x):
    """(inputs of both layers with ones (batch, shared, d), what ReLU passes, logits) of x (batch, [shared,] d)."""
    x = x if x.ndim == 3 else x[:, None]
    first = np.concatenate([x, np.ones((*x.shape[:2], 1))], -1)
    z = first @ GIVEN["0"].T
    second = np.concatenate([np.maximum(z, 0), np.ones((*x.shape[:2], 1))], -1)
    return first, second, z > 0, (second @ GIVEN["2"].T).mean(1)


def records(x, draws):
    """{layer: Record} whose g is pulled back from `draws` (draws, batch, C), gradients in the logits."""
    first, second, passed, _ = forward(x)
    g = np.repeat(draws[:, :, None], first.shape[1], 2) / first.shape[1]
    below = g @ GIVEN["2"][:, :-1] * passed
    return {
        "0": kf.Record(first[None], below[:, None], float(len(x))),
        "2": kf.Record(second[None], g[:, None], float(len(x))),
    }


def own(x, y):
    return records(x, kf.empirical(LOSS, forward(x)[-1], y))


def prior(precisions):
    return dict(zip(("0", "0.bias", "2", "2.bias"), precisions, strict=True))


CASES = {
    "kron, type2": (kf.KFAC(), "type2", LAYERS),
    "kron, empirical": (kf.KFAC(), "empirical", LAYERS),
    "diagonal, type2": (kf.Diagonal(), "type2", LAYERS),
    "last layer, kron, type2": (kf.KFAC(), "type2", ("2",)),
    "last layer, full, type2": (kf.Exact(), "type2", ("2",)),
}


def laplace(case):
    """(posterior at precision 2, what laplace-torch makes a layer of, the loss); biases are layers of their own there,
    but for the full matrix."""
    method, fisher, layers = CASES[case]
    f = forward(GIVEN["x"])[-1]
    draws = kf.type2(LOSS, f) if fisher == "type2" else kf.empirical(LOSS, f, GIVEN["y"])

    def split(of):
        kept = {name: of[name] for name in layers}
        return kept if "full" in case else apart(kept, layers)

    mean = {name: MEAN[name] for name in layers}
    mean = mean if "full" in case else apart_mean(mean, layers)
    P = kf.Posterior(mean, kf.fit(method, [split(records(GIVEN["x"], draws))]), 2.0, N)
    log_p = f - np.log(np.exp(f).sum(1, keepdims=True))
    return P, split, float(-log_p[np.arange(N), GIVEN["y"]].sum())


@pytest.mark.parametrize("case", CASES)
def test_laplace_torch(case):
    want = PEERS["laplace-torch"][case]
    P, split, loss = laplace(case)
    assert float(kf.evidence(P, loss)) == pytest.approx(want["one"], rel=1e-10)
    if "several" in want:
        several = kf.Posterior(P.mean, P.curvature, prior((1.0, 2.0, 3.0, 4.0)), N)
        assert float(kf.evidence(several, loss)) == pytest.approx(want["several"], rel=1e-10)
        slopes = slope(several)
        np.testing.assert_allclose([slopes[name] for name in prior(range(4))], want["slopes"], rtol=1e-10)
    f = forward(GIVEN["queries"])[-1]
    units = np.broadcast_to(np.eye(3)[:, None], (3, len(f), 3))
    V = P.covariance(split(records(GIVEN["queries"], units)))
    np.testing.assert_allclose(f, want["f"], rtol=1e-12)
    np.testing.assert_allclose(V, want["covariance"], rtol=1e-10)
    np.testing.assert_allclose(probit(f, V), want["probit"], rtol=1e-10)
    np.testing.assert_allclose(bridge(f, V), want["bridge"], rtol=1e-10)


METHODS = {"ekfac": kf.EKFAC(), "kfac": kf.KFAC(), "diagonal": kf.Diagonal(), "identity": kf.Identity()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sequences", [False, True])
def test_kronfluence(name, sequences):
    """Its damping of the identity is none; its K-FAC averages G over the positions too, where F sums over them."""
    x, asked = (GIVEN[key] for key in (("sequences", "sequences asked") if sequences else ("x", "queries")))
    want = PEERS["kronfluence, sequences" if sequences else "kronfluence"][name]
    train, queries = own(x, GIVEN["y"]), own(asked, GIVEN["asked"])
    curvature = kf.fit(METHODS[name], [train])
    if name == "identity":
        curvature = kf.Curvature({k: kf.Basis(0 * b.values, b.Qg, b.Qa) for k, b in curvature.layers.items()})
    scale = 1 / x.shape[1] if sequences and name == "kfac" else 1.0
    P = kf.Posterior(MEAN, curvature, 1.0 if name == "identity" else DAMPING, scale)
    np.testing.assert_allclose(kf.scores(P, queries, [train]), want["scores"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(P.covariance(train, diagonal=True)[:, 0], want["self"], rtol=1e-9)
    if "heuristic" in want:
        tenth = {k: 0.1 * scale * float(b.values.mean()) for k, b in curvature.layers.items()}
        P = kf.Posterior(MEAN, curvature, tenth, scale)
        np.testing.assert_allclose(kf.scores(P, queries, [train]), want["heuristic"], rtol=1e-9, atol=1e-12)
    if sequences:
        each = kf.scores(P, queries, [train], positions=True)
        np.testing.assert_allclose(each.sum(-1), kf.scores(P, queries, [train]), rtol=1e-10)
