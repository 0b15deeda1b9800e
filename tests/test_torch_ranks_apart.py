"""What one rank saw is not what another did: layers that only some call, shares without labels, shares without rows."""

from __future__ import annotations

from textwrap import dedent

import pytest

from test_torch_distributed import two_ranks_are_one_process

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

EXPERTS = """
class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.t, self.o = nn.Linear(12, 6), nn.Linear(6, 3)
        self.e = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x, of):
        h = torch.tanh(self.t(x.flatten(1)))
        z = torch.zeros_like(h)
        for i, expert in enumerate(self.e):
            rows = (of == i).nonzero()[:, 0]
            if len(rows):  # one without tokens is not called
                z = z.index_add(0, rows, expert(h[rows]))
        return self.o(torch.tanh(z))

def given(step, first):
    x, y = batch(step, 12)
    of = (torch.arange(12) >= first).long()
    return mine(x), mine(of), mine(y)

def told(optimizer):
    return [torch.tensor(float(x)) for x in optimizer.info.step.values()]
"""


def test_a_layer_that_only_some_ranks_call_is_judged_as_in_one_process(tmp_path):
    """Each rank has an expert of its own, then one rank has both: own shares are left out all the same."""
    body = """
    found = []
    for rule in (kf.SelfTuning(), kf.Fixed(rescale=kf.Noise())):
        for first in (6, 9):
            net = Experts()
            damping = kf.Schedules() if rule.judges else kf.Schedules(1e-2)
            rules = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), damping, step=rule, comm=comm())
            optimizer = kt.Optimizer(net, nn.CrossEntropyLoss(), rules, fisher=kf.type2)
            for step in range(4):
                x, of, y = given(step, first)
                optimizer.step((x, of), y)
                found += told(optimizer)
            found += [*net.parameters()]
            assert optimizer.info.step["with_own"] == 0
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    """
    two_ranks_are_one_process(EXPERTS + dedent(body), tmp_path)


def test_and_so_it_is_under_ddp(tmp_path):
    body = """
    net = Experts()
    wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True) if world > 1 else net
    rules = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2), step=kf.Fixed(rescale=kf.Noise()),
                              comm=comm())
    pre = kt.Preconditioner(wrapped, nn.CrossEntropyLoss(), rules, fisher=kf.type2)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    found = []
    for step in range(4):
        x, of, y = given(step, 9 if step % 2 else 6)
        sgd.zero_grad()
        with pre.capture():
            f = wrapped(x, of)
        pre.loss(f, y).backward()
        pre.step()
        sgd.step()
        found += told(pre)
    if rank == 0:
        torch.save([*found, *net.parameters()], f"{folder}/found.pt")
    """
    two_ranks_are_one_process(EXPERTS + dedent(body), tmp_path)


def test_a_share_without_labels_or_rows_counts_as_in_one_process(tmp_path):
    """Its inputs count in A, its examples among the examples; a sum stays one sum over ranks."""
    body = """
    found = []
    for rule in (kf.SelfTuning(), kf.Fixed(0.1, 0.9)):
        for reduction in ("mean", "sum"):
            net = model()
            damping = kf.Schedules() if rule.judges else kf.Schedules(1e-2)
            rules = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), damping, step=rule, comm=comm(), stacked=False)
            optimizer = kt.Optimizer(net, nn.CrossEntropyLoss(reduction=reduction), rules, fisher=kf.type2)
            for step in range(5):
                x, y = batch(step, 12)
                x, y = x.clone(), y.clone()
                if step in (1, 2):
                    y[slice(6) if step == 1 else slice(6, 12)] = -100
                ours = (slice(6), slice(6, 12))[rank] if world > 1 else slice(12)
                if step == 3:  # no rows at all on the first rank
                    ours = (slice(0), slice(12))[rank] if world > 1 else slice(12)
                optimizer.step(x[ours], y[ours])
                found += [torch.tensor(float(v)) for v in optimizer.info.step.values()]
            found += [p.detach() for p in net.parameters()]
    try:
        optimizer.step(x[:3], torch.full((3,), -100))
    except ValueError as error:
        assert "no step was taken" in str(error), error
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    """
    two_ranks_are_one_process(dedent(body), tmp_path)


def test_a_rank_whose_loss_was_not_differentiated_waits_with_the_others(tmp_path):
    """A mean over nothing is no number: a loop gives DistributedDataParallel zeros instead."""
    body = """
    net = model()
    wrapped = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    plain = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1), comm=comm())
    pre = kt.Preconditioner(wrapped, nn.CrossEntropyLoss(), plain, fisher=kf.type2)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(3):
        x, y = batch(step, 6)
        few = world > 1 and step == 1
        x, y = (x[:0], y[:0]) if few and rank == 0 else (x, y) if few or world == 1 else (mine(x), mine(y))
        sgd.zero_grad()
        with pre.capture():
            f = wrapped(x)
        loss = pre.loss(f, y)
        (f.sum() * 0.0 if not len(y) else loss * world if few else loss).backward()
        pre.step()
        sgd.step()
    if rank == 0:
        torch.save([*net.parameters()], f"{folder}/found.pt")
    """
    two_ranks_are_one_process(dedent(body), tmp_path)


def test_a_rank_without_any_data_contributes_nothing(tmp_path):
    """It takes zeros of a forward for its loss, captured or not; it is told so once, and the others are not."""
    body = """
    import warnings
    net = model()
    wrapped = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    rules = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 2), kf.Schedules(0.1), step=kf.Fixed(rescale=kf.Noise()),
                              comm=comm())
    pre = kt.Preconditioner(wrapped, nn.CrossEntropyLoss(), rules, fisher=kf.type2)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    found = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(4):
            x, y = batch(step, 12)
            idle = world > 1 and step != 1
            sgd.zero_grad()
            if idle and rank == 1:
                (wrapped(x).sum() * 0.0).backward()
            else:
                x, y = (x, y) if idle or world == 1 else (mine(x), mine(y))
                with pre.capture():
                    f = wrapped(x)
                (pre.loss(f, y) * (world if idle else 1)).backward()
            pre.step()
            sgd.step()
            found += [torch.tensor(float(v)) for v in pre.info.step.values()]
    texts = [str(w.message) for w in told if "gave no statistics" in str(w.message)]
    assert len(texts) == rank, texts
    if rank == 0:
        torch.save([*found, *net.parameters()], f"{folder}/found.pt")
    """
    two_ranks_are_one_process(dedent(body), tmp_path)


def test_where_nothing_counts_on_any_rank_all_say_so(tmp_path):
    body = """
    net = model()
    wrapped = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    for way, words in (("no loss", "got no records"), ("ignored", "all labels of the batch are ignored")):
        pre = kt.Preconditioner(wrapped, nn.CrossEntropyLoss(), core(comm=comm()), fisher=kf.type2)
        x, y = batch(0, 6)
        with pre.capture():
            f = wrapped(x)
        (f.sum() * 0.0 if way == "no loss" else pre.loss(f, torch.full_like(y, -100)).nan_to_num()).backward()
        try:
            pre.step()
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(way)
    if rank == 0:
        torch.save([], f"{folder}/found.pt")
    """
    two_ranks_are_one_process(dedent(body), tmp_path)


def test_a_core_over_ranks_keeps_what_it_was_given(tmp_path):
    body = """
    for stacked in (True, False):
        given = kf.Preconditioner(kf.KFAC(), kf.Clocks(2, 3), donate=True, widest=99, stacked=stacked)
        pre = kt.Preconditioner(model(), nn.CrossEntropyLoss(), given)
        core = pre.engine.core
        assert (core.comm.world, core.stacked, core.widest, core.donate) == (world, stacked, 99, True)
    if rank == 0:
        torch.save([], f"{folder}/found.pt")
    """
    two_ranks_are_one_process(dedent(body), tmp_path)


def test_curvature_goes_over_the_ranks_that_gradients_do(tmp_path):
    """Each rank trains a model of its own under DistributedDataParallel over a group of one."""
    body = """
    rank_alone = torch.distributed.new_group([0]) if world > 1 else None
    other_alone = torch.distributed.new_group([1]) if world > 1 else None
    net = model()
    own = rank_alone if rank == 0 else other_alone
    wrapped = nn.parallel.DistributedDataParallel(net, process_group=own) if world > 1 else net
    given = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1))
    pre = kt.Preconditioner(wrapped, nn.CrossEntropyLoss(), given, fisher=kf.type2)
    assert pre.engine.core.comm.world == 1
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(3):
        x, y = batch(step, 12)
        optimizer.zero_grad()
        with pre.capture():
            f = wrapped(x * (1 + rank))
        pre.loss(f, y).backward()
        pre.step()
        optimizer.step()
    if rank == 0:
        torch.save([*net.parameters()], f"{folder}/found.pt")
    """
    two_ranks_are_one_process(dedent(body), tmp_path)
