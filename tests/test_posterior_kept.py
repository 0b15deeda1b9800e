"""A posterior is of the parameters of its day: training goes on in place, and it stays."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore import tree


def test_tasks_trained_one_after_the_other_in_place(rng):
    net = kn.Sequential((4,), (kn.Dense(3),))
    params = net.init(rng, np.float64)
    loss = kf.SoftmaxCrossEntropy()
    past, means = [], []
    for _ in range(2):
        x = rng.normal(size=(64, 4))
        y = (x @ rng.normal(size=(4, 3))).argmax(1)
        for _ in kn.fit(net, params, (x, y), loss, kn.SGD(0.5), batch=64, steps=5):
            pass
        means.append({name: p.copy() for name, p in params.items()})
        past.append(kf.Posterior(params, kf.fit(kf.KFAC(), kn.Stream(net, params, loss, [(x, y)])), 1.0, 64.0))
    away = means[1]["dense0"] - means[0]["dense0"]
    wanted = 0.5 * float((away * past[0].matvec({"dense0": away})["dense0"]).sum())
    assert wanted > 0.01
    assert float(past[0].energy(params)) == pytest.approx(wanted, rel=1e-12)
    copies = [kf.Posterior(mean, P.curvature, P.precision, P.scale) for mean, P in zip(means, past, strict=True)]
    merged, wanted = (kf.merge(posteriors)[0]["dense0"] for posteriors in (past, copies))
    assert np.array_equal(merged, wanted)
    assert np.abs(merged - means[1]["dense0"]).max() > 1e-3


@pytest.mark.parametrize("parameter", [True, False])
def test_a_penalty_pulls_back_to_where_the_parameter_was(parameter, rng):
    torch = pytest.importorskip("torch")
    a, g = (torch.asarray(rng.normal(size=(8, d))) for d in (4, 3))
    w = torch.asarray(rng.normal(size=(3, 4))).requires_grad_()
    w = torch.nn.Parameter(w.detach()) if parameter else w
    before = w.detach().clone()
    P = kf.Posterior({"a": w}, kf.fit(kf.KFAC(), [{"a": kf.Record(a, g, 8.0)}]), 0.5)
    with torch.no_grad():
        w += 1.0
    P.energy({"a": w}).backward()
    pull = P.matvec({"a": (w - before).detach()[None]})["a"][0]
    np.testing.assert_allclose(w.grad.numpy(), pull.numpy(), rtol=1e-12)


def test_precisions_by_layer_are_those_of_then(rng):
    a, g = (rng.normal(size=(8, d)) for d in (4, 3))
    precision = {"a": 0.5}
    P = kf.Posterior({"a": np.zeros((3, 4))}, kf.fit(kf.KFAC(), [{"a": kf.Record(a, g, 8.0)}]), precision)
    precision["a"] = 2.0
    assert P.prior("a") == 0.5


def test_a_posterior_is_still_a_tree(rng):
    a, g = (rng.normal(size=(8, d)) for d in (4, 3))
    P = kf.Posterior({"a": np.ones((3, 4))}, kf.fit(kf.KFAC(), [{"a": kf.Record(a, g, 8.0)}]), 0.5)
    assert float(tree.map(lambda x: 2 * x, P).mean["a"][0, 0]) == 2.0
