"""Maps of rows to examples that change between batches of the same shapes: each record is that of its own batch."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore_torch import observe
from kfaccore_torch.places import Groups

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("torch_double")


def fisher(model, layer, *inputs):
    """F of a linear layer by brute force: J^T H J of each example's logits, over the batch."""
    parameters = list(layer.parameters())
    f = model(*inputs)
    found = 0.0
    for row in f:
        rows = []
        for value in row:
            weight, bias = torch.autograd.grad(value, parameters, retain_graph=True)
            rows.append(torch.cat([weight, bias[:, None]], 1).flatten())
        J = torch.stack(rows)
        p = row.softmax(0).detach()
        found = found + J.T @ (torch.diag(p) - torch.outer(p, p)) @ J / len(f)
    return found


def dense(record):
    block = torch.as_tensor(kf.dense(record))
    return block.reshape(block.shape[-2:])


def membership(sizes):
    return torch.repeat_interleave(torch.eye(len(sizes)), torch.tensor(sizes), 1)


POOLS = {
    "split": lambda h, sizes: torch.stack([part.mean(0) for part in h.split(sizes)]),
    "pad_sequence": lambda h, sizes: nn.utils.rnn.pad_sequence(h.split(sizes), batch_first=True).sum(1),
    "written": lambda h, sizes: written(h, sizes).sum(1),
    "mask": lambda h, sizes: (membership(sizes)[:, :, None] * h).sum(1),
    "mask of repeated": lambda h, sizes: (h.expand(len(sizes), -1, -1) * membership(sizes)[:, :, None]).sum(1),
    "mask behind": lambda h, sizes: (h[:, None] * membership(sizes).T[:, :, None]).sum(0),
    "where": lambda h, sizes: torch.where(membership(sizes)[:, :, None] > 0, h, torch.zeros(())).sum(1),
    "matrix": lambda h, sizes: membership(sizes) @ h,
    "turned matrix": lambda h, sizes: (h.T @ membership(sizes).T).T,
    "added matrix": lambda h, sizes: torch.addmm(torch.ones(4), membership(sizes), h),
    "sparse": lambda h, sizes: torch.sparse.mm(membership(sizes).to_sparse(), h),
    "einsum": lambda h, sizes: torch.einsum("gn,nd->gd", membership(sizes), h),
    "scatter": lambda h, sizes: torch.zeros(len(sizes), 4).index_add(0, membership(sizes).argmax(0), h),
}


def written(h, sizes):
    found = torch.zeros(len(sizes), max(sizes), h.shape[1])
    start = 0
    for i, size in enumerate(sizes):
        found[i, :size] = h[start : start + size]
        start += size
    return found


class Pool(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.o = nn.Linear(4, 3)
        self.pool = pool

    def forward(self, x, sizes):
        return self.o(self.pool(torch.tanh(self.a(x)), sizes))


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("first", [[3, 3, 3], [2, 3, 4]], ids=["even", "uneven"])
def test_graphs_of_other_sizes_in_each_batch(pool, first):
    model = Pool(pool)
    y = torch.tensor([0, 2, 1])
    data = [((torch.randn(9, 3), sizes), y) for sizes in (first, first, [4, 3, 2], [2, 4, 3], [3, 3, 3])]
    for (inputs, _), records in zip(data, kt.Stream(model, CE, data, kf.type2), strict=True):
        want = fisher(model, model.a, *inputs)
        torch.testing.assert_close(dense(records["a"]), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("examples", [8, 40])
def test_one_node_more_in_one_graph_and_one_less_in_another(examples):
    """No two examples are told apart by one number."""
    model = Pool(POOLS["scatter"])
    rng = torch.Generator().manual_seed(1)
    for _ in range(12):
        sizes = [3] * examples
        more, less = torch.randperm(examples, generator=rng)[:2].tolist()
        sizes[more] += 1
        sizes[less] -= 1
        x, y = torch.randn(3 * examples, 3), torch.randint(0, 3, (examples,))
        record = kt.records(model, CE, (x, sizes), y, fisher=kf.type2)[0]["a"]
        torch.testing.assert_close(dense(record), fisher(model, model.a, x, sizes), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("room", [1 << 23, 60])
def test_maps_that_are_remembered_have_a_size(room, monkeypatch):
    """Ragged batches have shapes that never come again, each with a number a row."""
    monkeypatch.setattr(observe, "_MOST_ROWS", room)
    model = Pool(POOLS["scatter"])
    sizes = [[3, 2 + i % 12, 1] for i in range(24)]  # 6 to 17 rows each
    data = [((torch.randn(sum(these), 3), these), torch.tensor([0, 2, 1])) for these in sizes]
    stream = kt.Stream(model, CE, data, kf.type2)
    held = []
    for (inputs, _), records in zip(data, stream, strict=True):
        torch.testing.assert_close(dense(records["a"]), fisher(model, model.a, *inputs), rtol=1e-9, atol=1e-12)
        kept = stream.engine.observer.kept.values()
        held.append(sum(len(one.place.of) for _, owned in kept for one in owned if isinstance(one.place, Groups)))
    assert held[0] == 6
    assert max(held) == sum(range(6, 18)) if room > 60 else 40 < max(held) <= 60


def test_more_examples_than_numbers_take_one_pass_more():
    from kfaccore_torch.owner import factors

    for examples, dtype, passes in ((1, torch.float32, 1), (128, torch.float32, 1), (129, torch.float32, 2)):
        found = factors(examples, dtype)
        assert len(found) == passes
        assert len(torch.unique(torch.stack(found), dim=1).T) == examples
    assert len(factors(27, torch.float16)) == 3


def marked(pre, name):
    return next(line for line in str(pre.report()).splitlines() if f"{name}.weight" in line).endswith(
        "several examples"
    )


def stepped(pre, model, x, y):
    model.zero_grad()
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()
    pre.step()


def test_a_norm_that_begins_to_train():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    pre = kt.Preconditioner(model, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1)))
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    for mode, steps in ((False, 3), (True, 1)):
        model.train(mode)
        for _ in range(steps):
            stepped(pre, model, x, y)
        assert marked(pre, "0") == mode


def test_a_branch_behind_a_gain_that_begins_at_zero():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.f, self.norm, self.o = nn.Linear(3, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x):
            h = self.stem(x)
            return self.o(torch.tanh(h + self.norm(self.f(h).relu())))

    model = Branch()
    pre = kt.Preconditioner(model, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1)))
    x, y = torch.randn(16, 3), torch.randint(0, 3, (16,))
    for gain, at_last in ((0.0, False), (0.5, True)):
        nn.init.constant_(model.norm.weight, gain)
        stepped(pre, model, x, y)
        assert marked(pre, "stem") == at_last


CHANGES = {
    "weight": lambda loss: setattr(loss, "weight", torch.tensor([5.0, 0.1, 1.0])),
    "weight in place": lambda loss: loss.weight.copy_(torch.tensor([5.0, 0.1, 1.0])),
    "ignore_index": lambda loss: setattr(loss, "ignore_index", 0),
    "label_smoothing": lambda loss: setattr(loss, "label_smoothing", 0.6),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_loop_may_change_the_numbers_of_its_loss(change):
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    found = []
    for late in (False, True):
        torch.manual_seed(0)
        model, loss = nn.Linear(3, 3), nn.CrossEntropyLoss(torch.ones(3))
        core = kf.Preconditioner(kf.Exact(), kf.Clocks(1, 1), kf.Schedules(0.1, 0.0))
        if not late:
            change(loss)
        pre = kt.Preconditioner(model, loss, core, fisher=kf.empirical)
        if late:
            change(loss)
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        pre.step()
        found.append(model.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


def test_compiled_functions_and_forwards_run_eagerly_while_they_are_captured():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.o = nn.Embedding(7, 4), nn.Linear(4, 3)
            self.w = nn.Parameter(torch.randn(4, 4))
            self.block = torch.compile(lambda h: torch.tanh(h @ self.w), backend="eager")

        @torch.compile(backend="eager")
        def forward(self, x):
            return self.o(self.block(self.e(x)).mean(1))

    model = Words()
    ids, y = torch.randint(0, 7, (5, 4)), torch.tensor([0, 1, 2, 1, 0])
    model(ids)
    pre = kt.Preconditioner(model, CE)
    with pre.capture():
        f = model(ids)
    pre.loss(f, y).backward()
    pre.step()
    assert not pre.engine.plan.uncovered


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


USERS = {
    "autograd.Function": Double.apply,
    "vmap": torch.vmap(lambda row: 2 * row),
}


class Places(nn.Module):
    """Positions looked up once, added to tokens and given to `user` as well."""

    def __init__(self, user):
        super().__init__()
        self.tokens, self.places, self.o = nn.Embedding(7, 4), nn.Embedding(4, 4), nn.Linear(4, 3)
        self.user = user

    def forward(self, x):
        p = self.places(torch.arange(4))
        return self.o(torch.tanh(self.tokens(x) + p).mean(1) + self.user(p).mean(0))


@pytest.mark.parametrize("user", USERS.values(), ids=USERS)
def test_positions_that_also_go_where_no_call_is_seen(user):
    """As where the same is written plainly: the sum with the tokens is not all that they go into."""
    x, y = torch.randint(0, 7, (5, 4)), torch.tensor([0, 1, 2, 1, 0])
    found = []
    for way in (lambda p: 2 * p, user):
        torch.manual_seed(0)
        found.append(kt.records(Places(way), CE, x, y)[0]["places"])
    assert found[0].batch == 1  # all examples share the rows
    np.testing.assert_allclose(found[1].g, found[0].g, rtol=1e-12)
