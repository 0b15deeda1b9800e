"""Hooks of the user's graph: gradients that tensors retain are the loss's, and a hook can tell a draw from the loss."""

from __future__ import annotations

import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")
CE = nn.CrossEntropyLoss()


class Own(torch.autograd.Function):
    """A function written by hand, whose output torch does not show to a capture."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Net(nn.Module):
    """Keeps what it makes, and may ask for gradients of it inside its forward."""

    def __init__(self, inside=False):
        super().__init__()
        torch.manual_seed(1)
        self.inside = inside
        self.a, self.b, self.o = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        h = self.a(x)
        z = Own.apply(h.tanh())
        first, second = self.b(z).chunk(2, -1)
        f = self.o(first * second) * (1 + self.scale**2).log()
        self.kept = [h, z, first, f]
        if self.inside and f.requires_grad:
            self.retain()
        return f

    def retain(self):
        for x in self.kept:
            x.retain_grad()


def data():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(8) % 3


def plain(batches=1):
    """Gradients of the loss."""
    model, (x, y) = Net(), data()
    f = model(x)
    model.retain()
    CE(f, y).backward(retain_graph=True)
    return [batches * x.grad for x in model.kept]


def equal(model, wanted):
    for x, w in zip(model.kept, wanted, strict=True):
        torch.testing.assert_close(x.grad, w, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("fisher", [kf.type2, kf.monte_carlo])
@pytest.mark.parametrize(
    "rule", [None, kf.Fixed(0.1), kf.Fixed(0.1, rescale=kf.Noise())], ids=["default", "fixed", "own"]
)
def test_retained_gradients_are_those_of_the_loss(rule, fisher, inside):
    model, (x, y) = Net(inside), data()
    core = None if rule is None else kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), step=rule)
    pre = kt.Preconditioner(model, CE, core, fisher=fisher, uncovered=kf.Diagonal())
    for _ in range(2):
        model.zero_grad()
        with pre.capture():
            f = model(x)
        if not inside:
            model.retain()
        loss = pre.loss(f, y)
        assert all(x.grad is None for x in model.kept)
        loss.backward()
        equal(model, plain())
        pre.step()


def test_what_they_had_before_stays():
    """Two losses on one forward, the first differentiated before the second is formed elsewhere."""
    model, (x, y) = Net(), data()
    pre = kt.Preconditioner(model, CE)
    with pre.capture():
        f = model(x)
    model.retain()
    CE(f, y).backward(retain_graph=True)
    loss = pre.loss(f, y)
    equal(model, plain())
    loss.backward()
    equal(model, plain(2))


def test_the_whole_step_leaves_one_gradient():
    model, (x, y) = Net(inside=True), data()
    optimizer = kt.Optimizer(model, CE, kf.Preconditioner(kf.KFAC(), step=kf.Fixed(0.1)))
    optimizer.step(x, y)
    equal(model, plain())


def test_records_leave_none():
    model, (x, y) = Net(inside=True), data()
    kt.records(model, CE, x, y)
    assert all(x.grad is None for x in model.kept)


@pytest.mark.parametrize("fisher", [kf.type2, kf.monte_carlo])
def test_a_hook_can_tell_draws_from_the_loss(fisher):
    model, (x, y) = Net(), data()
    noted, passed = [], []

    def note(module, gin, gout):
        passed.append(gout[0])
        if not kt.drawing():
            noted.append(gout[0])

    model.b.register_full_backward_hook(note)
    pre = kt.Preconditioner(model, CE, fisher=fisher)
    with pre.capture():
        f = model(x)
    model.kept[3].register_hook(lambda g: None if kt.drawing() else noted.append(g))
    pre.loss(f, y).backward()
    assert not kt.drawing()
    assert (len(noted), len(passed) > 3) == (2, True)
    torch.testing.assert_close(noted[0], plain()[3], rtol=1e-12, atol=1e-15)
