"""A step that fails is no step: its batch can be taken again."""

from __future__ import annotations

import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("torch_double")


class Net(nn.Module):
    """Raises in the forwards of these numbers; with a gain that no layer has."""

    def __init__(self, fails, error):
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.Linear(3, 5)
        self.c = nn.Linear(5, 3)
        self.gain = nn.Parameter(torch.full((5,), 0.1))
        self.fails = {*fails}
        self.error = error
        self.count = 0

    def forward(self, x):
        self.count += 1
        if self.count in self.fails:
            raise self.error
        return self.c(self.a(x).tanh() * nn.functional.softplus(self.gain))


class Failing(torch.optim.Adam):
    """Runs out of memory in its second step."""

    steps = 0

    def step(self, closure=None):
        type(self).steps += 1
        if type(self).steps == 2:
            raise RuntimeError("out of memory")
        return super().step(closure)


def run(rule, fails=(), error=RuntimeError, rest=None, donate=True):
    model = Net(fails, error)
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 2), step=rule, donate=donate)
    optimizer = kt.Optimizer(model, CE, core, rest=rest)
    x, y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    found = []
    while len(found) < 5:
        old = [p.detach().clone() for p in model.parameters()]
        info = optimizer.info
        try:
            found.append(optimizer.step(x, y))
        except error:
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True))
            assert optimizer.info is info
    return found, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("rule", [kf.SelfTuning(), kf.LineSearch()], ids=["self-tuning", "line search"])
def test_a_look_back_that_fails_leaves_the_step_to_be_taken_again(rule, error):
    wanted = run(rule)
    for at in range(1, 9):
        found = run(rule, [at], error)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_the_other_optimizer_fails():
    wanted = run(kf.SelfTuning(), rest=torch.optim.Adam)
    Failing.steps = 0
    torch.testing.assert_close(run(kf.SelfTuning(), rest=Failing), wanted, rtol=1e-12, atol=0)


def test_an_optimizer_that_needs_the_loss_again_is_refused_at_once():
    model = Net((), RuntimeError)
    old = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TypeError, match="LBFGS needs a closure"):
        kt.Optimizer(model, CE, rest=torch.optim.LBFGS)
    pre = kt.Preconditioner(model, CE, kf.Preconditioner(kf.KFAC(), step=kf.Fixed(rescale=kf.Graft())))
    x, y = torch.randn(4, 3), torch.arange(4) % 3
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()
    with pytest.raises(TypeError, match="LBFGS needs a closure"):
        pre.graft(torch.optim.LBFGS(model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True))
