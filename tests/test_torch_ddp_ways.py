"""DistributedDataParallel with what it has of settings: a static graph, and layers that some ranks do not use."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from test_torch_distributed import launch, two_ranks_are_one_process  # noqa: E402

STATIC = """
from torch.utils.checkpoint import checkpoint
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(12, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.a(x.flatten(1)).tanh()
        h = checkpoint(lambda h: self.b(h).tanh(), h, use_reentrant=False) if self.again else h
        return self.c(h)

found = []
for again in (False, True):
    net = Net()
    net.again = again
    wrapped = nn.parallel.DistributedDataParallel(net, static_graph=True) if world > 1 else net
    pre = kt.Preconditioner(wrapped, nn.CrossEntropyLoss(), core(comm=comm()), fisher=kf.type2)
    sgd = torch.optim.SGD(net.parameters(), 0.3)
    for step in range(4):
        x, y = batch(step, 12)
        sgd.zero_grad()
        with pre.capture():
            f = wrapped(mine(x, False))
        pre.loss(f.flip(1).flip(1), mine(y, False)).backward()
        pre.step()
        sgd.step()
    found += [p.detach() for p in net.parameters()]
ours = torch.cat([p.flatten() for p in found])
first = ours.clone()
if world > 1:
    dist.broadcast(first, 0)
assert torch.equal(ours, first), "the ranks have parted"
if rank == 0:
    torch.save(found, f"{folder}/found.pt")
"""

HEADS = """
class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.trunk, self.h = nn.Linear(12, 5), nn.ModuleList(nn.Linear(5, 3) for _ in "ab")

    def forward(self, x, to):
        h = self.trunk(x.flatten(1)).tanh()
        return torch.cat([self.h[i](rows) for i, rows in zip(to, h.chunk(len(to)))])

found = []
for first, second in ((0, 1), (1, 1), (1, 0)):
    net = Heads()
    wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True) if world > 1 else net
    pre = kt.Preconditioner(wrapped, nn.CrossEntropyLoss(), core(comm=comm()), fisher=kf.type2)
    sgd = torch.optim.SGD(net.parameters(), 0.3)
    for step in range(2):
        x, y = batch(step, 12)
        sgd.zero_grad()
        to = (first, second) if step == 0 else (second, first)
        with pre.capture():
            f = wrapped(mine(x), to if world == 1 else (to[rank],))
        pre.loss(f, mine(y)).backward()
        pre.step()
        sgd.step()
    found += [p.detach() for p in net.parameters()]
if rank == 0:
    torch.save(found, f"{folder}/found.pt")
"""


@pytest.mark.parametrize("body", [STATIC, HEADS], ids=["static_graph", "heads"])
def test_two_ranks_are_one_process(body, tmp_path):
    two_ranks_are_one_process(body, tmp_path)


JOIN = """
def trained(together):
    torch.manual_seed(0)
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(12, 3))
    pre = kt.Preconditioner(wrapped, nn.CrossEntropyLoss(), core(comm=comm()), fisher=kf.type2)
    with wrapped.join(throw_on_early_termination=together):
        for step in range(2 + rank):
            x, y = batch(step, 12)
            wrapped.zero_grad()
            with pre.capture():
                f = wrapped(mine(x).flatten(1))
            pre.loss(f, mine(y)).backward()
            pre.step()

for together, error, words in [(False, ValueError, "join(throw_on_early_termination=True)"),
                               (True, RuntimeError, "exhausted")]:
    try:
        trained(together)
    except error as raised:
        assert words in str(raised)
    else:
        raise AssertionError("nothing was raised")
"""


def test_ranks_that_leave_off_before_others_are_refused(tmp_path):
    """Before one has: what it would be sent goes to another question, and the process ends."""
    launch(JOIN, tmp_path, 2)
