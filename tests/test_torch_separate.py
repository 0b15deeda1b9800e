"""Ranks that train models of their own, though their curvature is summed as that of one, are named."""

from __future__ import annotations

import json

import pytest

from test_torch_distributed import launch

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

BODY = """
import json, warnings

def average(net):
    for p in net.parameters():
        dist.all_reduce(p.grad)
        p.grad /= world

found = {}
for way in ("apart", "averaged", "averaged after", "wrapped", "begun apart"):
    for fraction in (1, 0):
        net = model(rank if way == "begun apart" else 0)
        of = nn.parallel.DistributedDataParallel(net) if way == "wrapped" else net
        pre = kt.Preconditioner(of, nn.CrossEntropyLoss(), core(comm=comm(fraction)), fisher=kf.type2)
        sgd = torch.optim.SGD(net.parameters(), 0.3)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for step in range(7):
                x, y = batch(step)
                sgd.zero_grad()
                with pre.capture():
                    f = of(mine(x))
                pre.loss(f, mine(y)).backward()
                if way == "averaged":
                    average(net)
                pre.step()
                if way == "averaged after":
                    average(net)
                sgd.step()
        found[f"{way} {fraction}"] = [str(one.message) for one in told]
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(found, file)
"""


def test_ranks_that_train_apart_are_named_once(tmp_path):
    """A direction is linear in the gradient: averaged after the step it is right where every rank solves by itself."""
    launch(BODY, tmp_path, 2)
    for rank in (0, 1):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        named = {way for way, said in told.items() if said}
        assert named == {"apart 1", "apart 0", "averaged after 0", "begun apart 1", "begun apart 0"}
        for way in named:
            assert len(told[way]) == 1
            what = "gradients" if way in ("apart 0", "averaged after 0") else "parameters"
            assert told[way][0].startswith(f"{what} ['0.bias', '0.weight', '3.bias', '3.weight', '5.bias', '5.weight']")
            assert ("comm=kfaccore.Serial()" if what == "parameters" else "(fraction 0)") in told[way][0]
