"""Draws on a part of the batch: its statistics are those of the part by brute force, unbiased, and refused by rules
that judge their step."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402
from kfaccore_torch.draw import Batch  # noqa: E402
from kfaccore_torch.masks import Told  # noqa: E402

EXAMPLES = 9


class Mixed(nn.Module):
    """Images, tokens and gains, each row of one example."""

    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(2, 3, 3, stride=2)
        self.table = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        images, tokens = x
        seen = torch.tanh(self.image(images)).flatten(2).mT
        return self.head(self.norm(torch.cat([seen, torch.tanh(self.table(tokens))], 1)).mean(1))


def model_and_batch(seed=0):
    torch.manual_seed(seed)
    x = torch.randn(EXAMPLES, 2, 6, 6, dtype=torch.float64), torch.randint(0, 5, (EXAMPLES, 3))
    return Mixed().double(), x, torch.randint(0, 4, (EXAMPLES,))


def taken(seed, step=0, **settings):
    """(statistics, records) of a batch by layer, as one step takes them; the engine."""
    model, x, y = model_and_batch()
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), kf.KFAC(), seed=seed, namespace="numpy", **settings)
    ways = (pre.engine.measured, pre.engine.measured if settings else pre.engine.records)
    found = []
    for way in ways:  # once for whose row is whose
        with pre.engine.captured() as seen:
            f = model(x)
        found.append(way(seen, Batch(f, y, Told(None, {}, None)), step, float(EXAMPLES))[0])
    return found[1]


def by_hand(record, examples):
    """A and G of some examples of a record, row by row."""
    rows = record.rows()
    A = np.zeros((record.d_in, record.d_in))
    G = np.zeros((record.d_out, record.d_out))
    for b in examples:
        for s in range(record.shared):
            A += np.outer(rows[0, b, s], rows[0, b, s]) / (len(examples) * record.shared)
            G += np.outer(record.g[0, 0, b, s], record.g[0, 0, b, s]) * 3 / record.n
    return (np.diag(A)[None] if isinstance(record.a, kf.Ids) else A[None]), G[None]


def test_it_is_the_brute_force_of_one_part():
    parts = [range(start, start + 3) for start in (0, 3, 6)]
    seen = set()
    for seed in range(12):
        found = taken(seed, draws_on=1 / 3)
        whole = taken(seed)  # the same labels
        fits = []
        for part in parts:
            pairs = [(by_hand(whole[name], part), stats) for name, stats in found.items()]
            close = [
                np.allclose(A, s.A / s.rows, rtol=1e-10, atol=1e-12) and np.allclose(G, s.G / s.n, rtol=1e-10)
                for (A, G), s in pairs
            ]
            fits.append(all(close))
        assert sum(fits) == 1
        assert found.keys() == whole.keys() == {"image", "table", "norm.weight", "norm.bias", "head"}
        seen.add(fits.index(True))
        for name, record in whole.items():  # the mean over parts is the whole batch's
            each = [by_hand(record, part) for part in parts]
            of_all = by_hand(record, range(EXAMPLES))
            np.testing.assert_allclose(np.mean([A for A, _ in each], 0), of_all[0], rtol=1e-10, atol=1e-13)
            np.testing.assert_allclose(np.mean([G for _, G in each], 0), of_all[1] / 3, rtol=1e-10, err_msg=name)
    assert seen == {0, 1, 2}


def test_rows_that_mix_examples_all_count():
    """Behind a batch norm each row's gradient has a share of every example's: sums over all rows, over n / k."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    pre = kt.Preconditioner(model, nn.MSELoss(), kf.KFAC(), namespace="numpy", draws_on=0.5)
    for _ in range(2):
        with pre.engine.captured() as seen:
            f = model(x)
        found, _ = pre.engine.measured(seen, Batch(f, f.detach() * 0, Told(None, {}, None)), 0, 8.0)
    rows = np.concatenate([x.numpy(), np.ones((8, 1))], 1)
    np.testing.assert_allclose(found["0"].A[0] / found["0"].rows, rows.T @ rows / 8, rtol=1e-10)
    assert found["0"].n == found["3"].n == 4.0
    assert (found["0"].rows, found["3"].rows) == (8, 4)


def test_a_loop_trains_on_parts():
    """Micro-batches and steps as ever; one half after the other is one batch of its own."""
    model, x, y = model_and_batch()
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), kf.KFAC(), draws_on=0.5)
    for half in (slice(0, 4), slice(4, 9)):
        with pre.capture():
            f = model(tuple(part[half] for part in x))
        pre.loss(f, y[half]).backward()
    pre.step()
    assert pre.info.updated
    assert set(pre.info.counts()) >= {kf.Code.OK}
    assert pre.info.counts()[kf.Code.OK] == len(pre.engine.plan.layers)


@pytest.mark.parametrize("share", [0, -0.5, 0.4, 1.5])
def test_a_share_is_one_over_a_number(share):
    with pytest.raises(ValueError, match="need one of 1, 1/2, 1/3"):
        kt.Preconditioner(model_and_batch()[0], nn.CrossEntropyLoss(), draws_on=share)


def test_rules_that_judge_their_step_refuse_it():
    model, x, y = model_and_batch()
    loss = nn.CrossEntropyLoss()
    for rule in (kf.SelfTuning(), kf.LineSearch()):
        with pytest.raises(ValueError, match="judges its step"):
            kt.Optimizer(model, loss, kf.Preconditioner(kf.KFAC(), step=rule), draws_on=0.5)
    with pytest.raises(ValueError, match="every example's own gradient"):
        kt.Preconditioner(model, loss, kf.FNGD(), fisher=kf.empirical, draws_on=0.5)
    with pytest.raises(ValueError, match="same examples"):
        kt.Preconditioner(model, loss, kf.Preconditioner(kf.KFAC(), network=kf.TwoLevel()), draws_on=0.5)
    with pytest.raises(ValueError, match="records are of a whole batch"):
        kt.records(model, loss, (x,), y, draws_on=0.5)
    kt.Optimizer(model, loss, kf.Preconditioner(kf.KFAC(), step=kf.Fixed(0.1)), draws_on=0.5).step((x,), y)
