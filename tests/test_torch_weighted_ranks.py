"""Losses with weights on ranks of uneven sizes: F is the mean over ranks, as one process has it and the gradient is."""

from __future__ import annotations

from textwrap import dedent

import pytest

from test_torch_distributed import two_ranks_are_one_process

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

LOOP = """
SIZES = [9, 2, 3, 8]

def parts(step):
    x, y = batch(step, sum(SIZES))
    return list(zip((x * torch.linspace(0.5, 2, len(x))[:, None, None]).split(SIZES), y.split(SIZES)))

def formed(pre, net, part, weight, void=False):
    x, y = part
    with pre.capture():
        f = net(x)
    return pre.loss(f, torch.full_like(y, -100) if void else y, weight=weight).nan_to_num()

def passes(pre, net, wrapped, losses):
    for i, loss in enumerate(losses):  # each forms a loss and is differentiated, the last with all ranks
        if world > 1 and i < len(losses) - 1:
            with wrapped.no_sync():
                loss().backward()
        else:
            loss().backward()

def quarters(pre, net, wrapped, given):
    ours = given if world == 1 else given[2 * rank :][:2]
    passes(pre, net, wrapped, [lambda p=p: formed(pre, wrapped, p, world / 4) for p in ours])

def other_numbers(pre, net, wrapped, given):
    if world == 1:
        passes(pre, net, wrapped, [lambda p=p, w=w: formed(pre, wrapped, p, w)
                                   for p, w in zip(given, (0.25, 0.25, 0.5))])
    else:
        ours = [(given[0], 0.5), (given[1], 0.5)] if rank == 0 else [(given[2], 1.0)]
        passes(pre, net, wrapped, [lambda p=p, w=w: formed(pre, wrapped, p, w) for p, w in ours])

def one_without_labels(pre, net, wrapped, given):
    ours = list(enumerate(given)) if world == 1 else list(enumerate(given))[2 * rank :][:2]
    passes(pre, net, wrapped, [lambda p=p, i=i: formed(pre, wrapped, p, world / 4, i > 1) for i, p in ours])

def mixed_then_divided(pre, net, wrapped, given):
    pairs = [given[:2], given[2:]] if world == 1 else [given[2 * rank :][:2]]
    def both(pair):
        return sum(formed(pre, wrapped, p, w) for p, w in zip(pair, (0.7, 0.4))) / len(pairs)
    passes(pre, net, wrapped, [lambda pair=pair: both(pair) for pair in pairs])

def one_each(pre, net, wrapped, given):
    ours = given[:2] if world == 1 else [given[rank]]
    passes(pre, net, wrapped, [lambda p=p: formed(pre, wrapped, p, 0.3 * world) for p in ours])

def trained(method, way, rule=None):
    net = model()
    wrapped = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    rules = kf.Preconditioner(method, kf.Clocks(1, 2), kf.Schedules(0.1, 0.5), step=rule or kf.Fixed(), comm=comm())
    pre = kt.Preconditioner(wrapped, nn.CrossEntropyLoss(), rules, fisher=kf.type2)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    told = []
    for step in range(3):
        sgd.zero_grad()
        way(pre, net, wrapped, parts(step))
        pre.step()
        sgd.step()
        told += [torch.tensor(float(x)) for x in pre.info.step.values()]
    return [*told, *(p.detach() for p in net.parameters())]

WAYS = [quarters, other_numbers, one_without_labels, mixed_then_divided, one_each]
"""


def test_uneven_ranks_are_one_process(tmp_path):
    """Sums of draws grow with the n they are brought to, sums of inputs do not, whatever a method keeps."""
    body = """
    methods = [kf.EKFAC(), kf.KPSVD(), kf.Deflation(), kf.KFACCorrected(), kf.TKFAC(), kf.TEKFAC(), kf.SINGD(),
               kf.Diagonal(), kf.Exact(), kf.KFAC(sharing=kf.reduce)]
    found = [x for way in WAYS for x in trained(kf.KFAC(), way)]
    found += [x for method in methods for x in trained(method, quarters)]
    found += trained(kf.KFAC(), quarters, kf.Fixed(rescale=kf.Noise()))
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    """
    two_ranks_are_one_process(LOOP + dedent(body), tmp_path)
