"""Data parallel training: every world size and fraction equals the single process; failures are named."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.precondition import placement
from ranks import ranks

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

SETUP = """
import os, sys, datetime
import torch, torch.nn as nn, torch.distributed as dist
import kfaccore as kf, kfaccore_torch as kt
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=20))

def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 7), nn.Tanh(),
                         nn.Linear(7, 3))

def batch(step, size=41):
    rng = torch.Generator().manual_seed(step)
    return torch.randn(size, 2, 6, generator=rng), torch.randint(0, 3, (size,), generator=rng)

def mine(x, uneven=True):
    size = len(x) if uneven else len(x) // world * world
    return x[:size][rank::world] if not uneven else x.tensor_split(world)[rank]

def core(method=None, comm=None, **options):
    return kf.Preconditioner(method or kf.KFAC(), kf.Clocks(2, 3), kf.Schedules(0.1, 0.9), comm=comm or kf.Serial(),
                             **options)

def comm(fraction=1.0):
    return kt.Distributed(fraction) if world > 1 else kf.Serial()
"""


# A gloo thread that still frees its last work (which holds Python objects) while Python ends aborts the process.
LEAVE = """
sys.stderr.flush()
os._exit(0)
"""


def launch(body: str, folder: Path, world: int, check: bool = True) -> list[subprocess.CompletedProcess]:
    """`body` after SETUP on `world` ranks; their results in order."""
    found = [
        subprocess.CompletedProcess((), code, "", errors)
        for code, errors in ranks(SETUP + textwrap.dedent(body) + LEAVE, folder, world)
    ]
    for result in found if check else ():
        assert result.returncode == 0, result.stderr
    return found


def two_ranks_are_one_process(body: str, folder: Path) -> None:
    """What `body` leaves in found.pt is the same on one rank and on two."""
    found = []
    for world in (1, 2):
        place = folder / str(world)
        place.mkdir()
        launch(body, place, world)
        found.append(torch.load(place / "found.pt", weights_only=False))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


CASES = """
fixed = kf.Fixed(0.3, 0.9)
CASES = {"kfac": (kf.KFAC(), fixed), "ekfac": (kf.EKFAC(), fixed),
         "tuned": (kf.KFAC(), kf.SelfTuning(tolerance=-0.01)),  # takes a step back now and then
         "searched": (kf.KFAC(), kf.LineSearch(cap=16.0)), "plain": (kf.Identity(), fixed)}
"""

OPTIMIZER = """
for fraction in FRACTIONS:
    for name, (method, rule) in CASES.items():
        net = model()
        optimizer = kt.Optimizer(net, nn.CrossEntropyLoss(), core(method, comm(fraction), step=rule), fisher=kf.type2)
        losses = []
        for step in range(5):
            x, y = batch(step, 41 - step % 2)  # shares of the ranks uneven, then even
            losses.append(optimizer.step(mine(x), mine(y)))
            ours = torch.cat([p.detach().flatten() for p in net.parameters()])
            if world > 1:
                first = ours.clone()
                dist.broadcast(first, 0)
                assert torch.equal(ours, first), f"{name}: the ranks have parted in step {step}"
        state = optimizer.state_dict()
        if rank == 0:
            torch.save([list(net.parameters()), losses, state], f"{folder}/{name}-{fraction}.pt")
"""


@pytest.mark.parametrize(("world", "fractions"), [(2, (0, 1)), (4, (0, 0.5, 1))])
def test_every_world_size_and_fraction_equals_one_process(world, fractions, tmp_path):
    (tmp_path / "one").mkdir()
    launch(f"FRACTIONS = (1,)\n{CASES}{OPTIMIZER}", tmp_path / "one", 1)
    launch(f"FRACTIONS = {fractions}\n{CASES}{OPTIMIZER}", tmp_path, world)
    for name in ("kfac", "ekfac", "tuned", "searched", "plain"):
        wanted, losses, state = torch.load(tmp_path / "one" / f"{name}-1.pt", weights_only=False)
        for fraction in fractions:
            found, values, other = torch.load(tmp_path / f"{name}-{fraction}.pt", weights_only=False)
            np.testing.assert_allclose(values, losses, rtol=1e-10)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
            assert name != "tuned" or 0 < float(other["state"]["motion/rejected"]) < 5
            for path, x in state["state"].items():
                if not any(word in path for word in ("Q", "/S")):  # eigenvectors have no sign
                    torch.testing.assert_close(other["state"][path], x, rtol=1e-8, atol=1e-10)


def test_under_ddp(tmp_path):
    """Hooks of DistributedDataParallel average the gradient, ours sum statistics and the model of a length by noise;
    the draws wake none."""
    body = """
    found = []
    for rule, rate in ((kf.Fixed(), 0.3), (kf.Fixed(rescale=kf.Noise()), 1.0)):
        net = model()
        wrapped = nn.parallel.DistributedDataParallel(net) if world > 1 else net
        pre = kt.Preconditioner(wrapped, nn.CrossEntropyLoss(), core(comm=comm(), step=rule), fisher=kf.type2)
        optimizer = torch.optim.SGD(net.parameters(), rate, 0.9)
        for step in range(5):
            x, y = batch(step, 12)
            optimizer.zero_grad()
            with pre.capture():
                f = wrapped(mine(x, False))
            pre.loss(f, mine(y, False)).backward()
            pre.step()
            optimizer.step()
        found += [*net.parameters()] + [torch.tensor(float(x)) for x in pre.info.step.values()]
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    """
    two_ranks_are_one_process(body, tmp_path)


LOOPS = """
total = nn.CrossEntropyLoss(reduction="sum")
damped = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(5.0, 0.9), comm=comm(), step=kf.Fixed(0.3))
net = model()
optimizer = kt.Optimizer(net, total, damped, fisher=kf.type2)
values = [optimizer.step(mine(x), mine(y)) for x, y in map(batch, range(4))]  # ragged shards
found = {"optimizer": [p.detach() for p in net.parameters()], "values": values}

from contextlib import nullcontext
for name, loss, scale in (("sum", total, world), ("mean", nn.CrossEntropyLoss(), 0.5)):
    net = model()
    wrapped = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    damping = 5.0 if name == "sum" else 0.1
    pre = kt.Preconditioner(wrapped, loss, kf.Preconditioner(kf.EKFAC(), kf.Clocks(1, 1), kf.Schedules(damping, 0.9),
                            comm=comm()), fisher=kf.type2)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(3):
        x, y = batch(step, 12)
        sgd.zero_grad()
        parts = list(zip(mine(x, False).chunk(2), mine(y, False).chunk(2)))
        for i, (a, b) in enumerate(parts):
            with wrapped.no_sync() if world > 1 and i == 0 else nullcontext():
                with pre.capture():
                    f = wrapped(a)
                (pre.loss(f, b) * scale).backward()
        pre.step()
        sgd.step()
    found[name] = [p.detach() for p in net.parameters()]

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.e = nn.ModuleList([nn.Linear(12, 3), nn.Linear(12, 3)])

    def forward(self, x):
        x = x.flatten(1)
        z = torch.zeros(len(x), 3)
        for i, expert in enumerate(self.e):
            rows = (self.of == i).nonzero()[:, 0]
            z = z.index_add(0, rows, expert(x[rows]))
        return z

class Fused(nn.Module):  # experts in one parameter: what each rank sees of it is another part
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(2, 3, 12))

    def forward(self, x):
        x = x.flatten(1)
        z = torch.zeros(len(x), 3)
        for i in range(2):
            rows = (self.of == i).nonzero()[:, 0]
            z = z.index_add(0, rows, nn.functional.linear(x[rows], self.w[i])) if len(rows) else z
        return z

for kind in (Experts, Fused):
    net = kind()
    damped = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1, 0.9), comm=comm(), step=kf.Fixed(0.3))
    optimizer = kt.Optimizer(net, nn.CrossEntropyLoss(), damped, fisher=kf.type2)
    for step, to in enumerate(([0] * 6 + [1] * 6, [1] * 6 + [0, 1] * 3)):  # on one rank an expert sees no token
        x, y = batch(step, 12)
        net.of = mine(torch.tensor(to))
        optimizer.step(mine(x), mine(y))
    found[kind.__name__] = [p.detach() for p in net.parameters()]

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.aside, self.scale = nn.Linear(12, 3), nn.Linear(12, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        f = self.first(x.flatten(1))
        z = torch.zeros(len(x), 3)
        if self.of.any():  # an expert without tokens is not called at all
            rows = self.of.nonzero()[:, 0]
            z = z.index_add(0, rows, self.aside(x.flatten(1)[rows]) * self.scale)
        return f + z

clock = kf.Clocks(1, 1)
net = Branching()
plain = kf.Preconditioner(kf.KFAC(), clock, kf.Schedules(0.1, 0.9), step=kf.Fixed(0.3))
ours = kt.Optimizer(net, nn.CrossEntropyLoss(), plain, rest=lambda p: torch.optim.SGD(p, 0.1), fisher=kf.type2)
for step, of in enumerate(([0, 1] * 6, [1, 0] * 6, [0, 0, 1, 1] * 3)):
    x, y = batch(step, 12)
    net.of = mine(torch.tensor(of))
    ours.step(mine(x), mine(y))
found["unused"] = [p.detach() for p in net.parameters()]

net = Branching()
wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True) if world > 1 else net
pre = kt.Preconditioner(wrapped, nn.CrossEntropyLoss(), kf.Preconditioner(kf.KFAC(), clock, kf.Schedules(0.1, 0.9)),
                        fisher=kf.type2)
assert pre.engine.core.comm.world == world
sgd = torch.optim.SGD(net.parameters(), 0.1)
for step, of in enumerate(([0, 1] * 6, [1, 0] * 6)):
    x, y = batch(step, 12)
    net.of = mine(torch.tensor(of))
    sgd.zero_grad()
    with pre.capture():
        f = wrapped(mine(x))
    pre.loss(f, mine(y)).backward()
    pre.step()
    sgd.step()
found["unused, told nothing of ranks"] = [p.detach() for p in net.parameters()]
if rank == 0:
    torch.save(found, f"{folder}/found.pt")
"""


def test_sums_micro_batches_and_experts_equal_one_process(tmp_path):
    found = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        launch(LOOPS, folder, world)
        found.append(torch.load(folder / "found.pt", weights_only=False))
    for name, wanted in found[0].items():
        for a, b in zip(found[1][name], wanted, strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-9, atol=1e-11, err_msg=name)


def test_two_ranks_resume_on_one(tmp_path):
    body = """
    import os
    net = model()
    optimizer = kt.Optimizer(net, nn.CrossEntropyLoss(), core(comm=comm(0), step=kf.Fixed(0.3)), fisher=kf.type2)
    saved = f"{folder}/../saved.pt"
    start, end = (4, 8) if os.path.exists(saved) else (0, 4) if world > 1 else (0, 8)
    if start:
        weights, state = torch.load(saved)
        net.load_state_dict(weights)
        optimizer.load_state_dict(state)
    for step in range(start, end):
        x, y = batch(step)
        optimizer.step(mine(x), mine(y))
    state = optimizer.state_dict()
    if rank == 0:
        torch.save([net.state_dict(), state], saved if world > 1 else f"{folder}/found.pt")
    """
    for number, world in ((0, 1), (1, 2), (2, 1)):
        (tmp_path / str(number)).mkdir()
        launch(body, tmp_path / str(number), world)
    whole, continued = (torch.load(tmp_path / n / "found.pt")[0] for n in ("0", "2"))
    for name, x in whole.items():
        torch.testing.assert_close(continued[name], x, rtol=1e-10, atol=1e-12)


FAILING = """
net = model()
optimizer = kt.Optimizer(net, nn.CrossEntropyLoss(), core(comm=comm(), step=kf.Fixed(0.3)), fisher=kf.type2)
for step in range(4):
    x, y = batch(step)
    if rank == 1 and step == 2:
        {what}
    optimizer.step(mine(x), mine(y))
"""


def test_a_killed_rank_is_named(tmp_path):
    first, second = launch(FAILING.format(what="os._exit(9)"), tmp_path, 2, check=False)
    assert second.returncode == 9
    assert first.returncode == 1
    assert "rank 0 stops, for ranks [1] died or hang before collective" in first.stderr


def test_a_rank_that_raises_is_quoted(tmp_path):
    what = "optimizer.engine.step({'what': []}, {'what': None})"
    first, second = launch(FAILING.format(what=what), tmp_path, 2, check=False)
    assert "init never saw" in second.stderr
    assert first.returncode == 1
    assert "rank 1 failed with" in first.stderr
    assert "init never saw" in first.stderr


def test_ranks_that_disagree_all_stop(tmp_path):
    body = """
    net = model()
    pre = kt.Preconditioner(net, nn.CrossEntropyLoss(), core(comm=comm()), fisher=kf.type2)
    x, y = batch(0)
    with pre.capture():
        f = net(x)
    pre.loss(f, y).backward()
    if rank == 1:
        net[3].weight.grad = None
    pre.step()
    """
    for result in launch(body, tmp_path, 2, check=False):
        assert result.returncode != 0  # 1, or what gloo's threads make of the exit
        assert "layers ['3'] take part in this step on some ranks only" in result.stderr
        assert "ranks [1] lack them" in result.stderr


def test_what_ranks_cannot_do_and_who_is_not_like_the_others(tmp_path):
    body = """
    import pytest
    with pytest.raises(ValueError, match="needs the records of all ranks"):
        core(comm=comm(), step=kf.Quadratic())
    with pytest.raises(TypeError, match="without the wrapper"):
        kt.Optimizer(nn.parallel.DistributedDataParallel(model()), nn.CrossEntropyLoss(),
                     core(comm=comm(), step=kf.Fixed(0.1)))

    loss = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"ranks \\[1\\] disagree with the others: parameter '0.weight'"):
        kt.Optimizer(model(rank), loss)
    with pytest.raises(ValueError, match=r"ranks \\[1\\] disagree.*layer '3' of 1 x 7 x 17.*layer '3' of 1 x 8 x 17"):
        net = model()
        net[3], net[5] = nn.Linear(16, 8 - rank), nn.Linear(8 - rank, 3)
        kt.Preconditioner(net, loss)
    with pytest.raises(ValueError, match=r"ranks \\[1\\] disagree.*'seed': 1"):
        kt.Preconditioner(model(), loss, seed=rank)
    with pytest.warns(UserWarning, match="this process's own"):
        assert kt.Preconditioner(model(rank), loss, core(comm=kf.Serial())).engine.core.comm.world == 1
    with pytest.raises(ValueError, match="trains one model"):
        kt.Preconditioner(nn.parallel.DistributedDataParallel(model()), loss, core(comm=kf.Serial()))
    assert kt.Optimizer(model(), loss).engine.core.rule.comm.world == 2

    from torch.distributed.fsdp import fully_shard
    sharded = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    from torch.distributed.device_mesh import init_device_mesh
    fully_shard(sharded[0], mesh=init_device_mesh("cpu", (2,)))
    for shell in (kt.Preconditioner, kt.Optimizer):
        with pytest.raises(TypeError, match="module '0' is under fully_shard.*DistributedDataParallel"):
            shell(sharded, loss)
    """
    launch(body, tmp_path, 2)
    import kfaccore_torch as kt

    with pytest.raises(ValueError, match="init_process_group"):
        kt.Distributed()


def test_greedy_placement():
    work = {"a": 8.0, "b": 7.0, "c": 6.0, "d": 5.0, "e": 4.0}
    assert placement.assign(work, 2, 0) == {"a": (0,), "b": (1,), "c": (1,), "d": (0,), "e": (0,)}
    assert placement.assign(work, 2, 1) == {"a": (0, 1), "b": (1, 0), "c": (1, 0), "d": (0, 1), "e": (0, 1)}
    half = placement.assign(work, 4, 0.5)
    assert {frozenset(ranks) for ranks in half.values()} == {frozenset({0, 1}), frozenset({2, 3})}
    assert placement.assign(dict(reversed(work.items())), 4, 0.5) == half
    loads = [0.0] * 4
    for name, places in half.items():
        loads[places[0]] += work[name]
    assert max(loads) <= 4 / 3 * 8.0
    with pytest.raises(ValueError, match="groups divide the ranks"):
        placement.group_size(4, 0.75)
    with pytest.raises(ValueError, match="need a share in"):
        placement.group_size(4, 1.5)
    assert placement.costs({"x": kf.Block(2, 3), "e": kf.Block(2, 9, diagonal_in=True)}) == {"x": 35.0, "e": 8.0}


def test_symmetric_leaves_travel_as_triangles():
    """Only one triangle is sent, and both come back."""
    sizes = []

    class Loop:
        rank, world, fraction = 0, 2, 1.0

        def all_reduce(self, leaves):
            sizes.extend(x.size for x in leaves)
            return [2 * x for x in leaves]

    rng = np.random.default_rng(0)
    record = kf.Record(rng.normal(size=(9, 6)), rng.normal(size=(9, 4)), 9)
    method = kf.KFAC()
    stats = method.measure(method.init(kf.Block(4, 6), record.g), record, kf.Hyper(0, 0.9, 0.1))
    found = placement.reduced(Loop(), stats)
    assert sizes[0] == 21
    assert sizes[2] == 10
    for a, b in zip(kf.flatten(found).values(), kf.flatten(stats).values(), strict=True):
        np.testing.assert_array_equal(a, 2 * b)


def test_only_what_refresh_writes_travels():
    like = np.zeros(1)
    for method, kept in ((kf.KFAC(), {"A", "G", "weight"}), (kf.EKFAC(), {"A", "G", "weight"})):
        state = method.init(kf.Block(2, 2), like)
        sent, basis = placement.refreshed_leaves(method, like)
        assert basis == isinstance(method, kf.EKFAC)
        paths = kf.flatten(state)
        assert {path for path, moves in zip(paths, sent, strict=True) if not moves} == kept


def test_methods_that_keep_rows_are_refused():
    class Rows(kf.KFAC):
        rows_at_solve = True

    class Two(kf.Serial):
        pass

    with pytest.raises(ValueError, match="keeps rows of one process"):
        kf.Preconditioner(Rows(), comm=Two(world=2)).init({"fc": kf.Block(2, 3)}, np.zeros(1))


def test_a_call_that_some_ranks_made_is_named():
    from kfaccore_torch.rollcall import RollCall

    store = torch.distributed.HashStore()
    rolls = []
    for rank in range(3):
        roll = object.__new__(RollCall)
        for name, value in {"store": store, "rank": rank, "ranks": (0, 1, 2), "number": 0}.items():
            object.__setattr__(roll, name, value)
        rolls.append(roll)
    for roll in rolls:
        roll.enters(7)
    assert rolls[0]._alone() == []
    rolls[0].enters(8, "state_dict()")
    assert rolls[1]._alone() == ["ranks [0] alone called state_dict(), which every rank must call"]
    assert rolls[0]._turn(0) == 8
