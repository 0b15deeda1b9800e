"""Statistics as gradients arrive: what a draw leaves is that of its records, and its gradients are let go of."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import kfaccore_torch as kt  # noqa: E402
from kfaccore_torch.draw import Batch  # noqa: E402
from kfaccore_torch.masks import Told  # noqa: E402


class Residual(nn.Module):
    """Convolutions and batch norms of equal sizes, a layer called twice, one that some losses do not reach, a norm."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.bodies = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3)
        )
        self.twice = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.idle = nn.Linear(4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.first(x)
        for body in self.bodies:
            x = x + body(x)
        x = x.mean((2, 3))
        x = self.norm(torch.tanh(self.twice(torch.tanh(self.twice(x)))))
        self.idle(x)
        return self.head(x)


def batch():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(6, 2, 5, 5, generator=rng, dtype=torch.float64)
    return x, torch.randint(0, 3, (6,), generator=rng)


def found(method, namespace, **settings):
    """(what waits for the step, what the records of the same draw give) by layer."""
    torch.manual_seed(0)
    model = Residual().double()
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), method, namespace=namespace, **settings)
    x, y = batch()
    engine = pre.engine
    ours = []
    for way in (engine.measured, engine.records, engine.measured):  # the first also asks whose row is whose
        with engine.captured() as seen:
            f = model(x)
        ours.append(way(seen, Batch(f, y, Told(None, {}, None)), 0, 6.0)[0])
    hyper = engine.core.schedules.hyper("head", 0)
    wanted = {n: method.measure(engine.state.layers[n], record, hyper) for n, record in ours[1].items()}
    return ours[2], wanted


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("namespace", ["numpy", "torch"])
@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC(), kf.KFAC(kf.reduce)], ids=["kfac", "ekfac", "reduce"])
def test_a_draw_leaves_the_statistics_of_its_records(method, namespace, draws):
    ours, wanted = found(method, namespace, draws=draws)
    assert ours.keys() == wanted.keys()
    assert "idle" not in ours
    for name, stats in wanted.items():
        pairs = zip(kf.flatten(ours[name]).values(), kf.flatten(stats).values(), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13, err_msg=name)


class Scaled(nn.Module):
    """A layer between a norm by hand and a gain, which a checkpoint may run again."""

    def __init__(self, again):
        super().__init__()
        self.again = again
        self.first, self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.gain, self.scale = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))

    def block(self, x):
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + self.gain)
        return x + torch.tanh(self.inner(0.5 * h)) / self.scale

    def forward(self, x):
        x = self.first(x)
        return self.head(checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x))


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC()], ids=["kfac", "ekfac"])
def test_a_checkpoint_changes_nothing(method):
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = Scaled(again).double()
        pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), kf.Preconditioner(method, kf.Clocks(1, 1)))
        for _ in range(2):
            model.zero_grad()
            with pre.capture():
                f = model(torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3))
            pre.loss(f, torch.tensor([0, 1, 2, 1, 0, 2])).backward()
            pre.step()
        assert pre.report().share == 1
        found.append([p.grad.clone() for p in model.parameters()])
    for plain, run_again in zip(*found, strict=True):
        torch.testing.assert_close(run_again, plain, rtol=1e-12, atol=1e-14)


class Alive(TorchDispatchMode):
    """Bytes of the storages that live at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage.nbytes())
        return found

    def gone(self, size):
        self.now -= size


def test_output_gradients_are_let_go_of():
    """Sixteen layers of 256 x 8 outputs: never more than a few of the gradients at once, none after the draw."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(16) for layer in (nn.Linear(8, 8), nn.Tanh())))
    pre = kt.Preconditioner(model, nn.MSELoss(), kf.KFAC(), namespace="torch")
    x = torch.randn(256, 8)
    for _ in range(3):  # whose rows are whose is asked in the first two
        model.zero_grad()
        with Alive() as memory:
            with pre.capture():
                f = model(x)
            before = memory.peak = memory.now
            loss = pre.loss(f, x)
            waits = memory.now - before
        loss.backward()
        pre.step()
    output = 256 * 8 * 4
    assert memory.peak - before < 9 * output
    assert waits < 5 * output  # sums of 9 x 9 and 8 x 8, the state and the input, first seen here


def test_inputs_are_let_go_of_once_a_loss_is_differentiated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    pre = kt.Preconditioner(model, nn.MSELoss(), kf.KFAC())
    with pre.capture():
        f = model(torch.ones(5, 3))
    target = torch.zeros(5, 2)
    first = pre.loss(f, target)
    second = pre.loss(f, target)
    seen = pre._opened.all[-1].seen
    assert seen.uses
    (first + second).backward(retain_graph=True)
    assert not seen.uses
    with pytest.raises(ValueError, match="form all its losses before backward"):
        pre.loss(f, target)
    pre.step()
