"""A share of the normaliser reaches all that a method measures: micro-batches of a sum, several losses, ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
from rows import METHODS, arrays

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402
from kfaccore_torch.collect import leaves, weighted  # noqa: E402

rows = pytest.mark.parametrize("row", METHODS, ids=lambda r: r.name)


@rows
def test_stats_times_a_share_are_those_of_a_record_of_that_share(row, rng):
    record = kf.Record(*arrays(rng), 2.5)
    hyper = kf.Hyper(0, 0.9, 0.1)
    state = kf.settle(row.method, record)
    part = row.method.measure(state, replace(record, n=1.0), hyper)
    whole = weighted(row.method.measure(state, record, hyper), 0.4)
    for x, y in zip(leaves(part), leaves(whole), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-12)
    for x, y in zip(*(leaves(row.method.update(state, s, hyper)) for s in (part, whole)), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [kf.TKFAC(), kf.TEKFAC(), kf.KFAC()], ids=["tkfac", "tekfac", "kfac"])
@pytest.mark.usefixtures("torch_double")
def test_a_sum_in_parts_is_the_sum(method):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 3
    found = []
    for parts in ([slice(0, 8)], [slice(0, 3), slice(3, 8)]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
        core = kf.Preconditioner(method, kf.Clocks(1, 1), kf.Schedules(0.1, 0.9))
        pre = kt.Preconditioner(model, nn.CrossEntropyLoss(reduction="sum"), core, fisher=kf.type2)
        for part in parts:
            with pre.capture():
                f = model(x[part])
            pre.loss(f, y[part]).backward()
        pre.step()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-11)
