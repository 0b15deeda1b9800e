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


# Averages that a step moves in place (donate) are whole after one that failed.

FIXED = kf.Fixed(0.1, 0.9)
NETS = [kf.KFAC(), kf.EKFAC(), kf.SINGD(), kf.Diagonal()]


class Fails:
    """Raises in the nth call of a function of the core."""

    def __init__(self, monkeypatch, owner, name, at):
        given = getattr(owner, name)
        self.count = 0

        def failing(*args, **how):
            self.count += 1
            if self.count == at:
                raise KeyboardInterrupt
            return given(*args, **how)

        monkeypatch.setattr(owner, name, failing)


def averages(shell):
    found = {}
    for name, state in shell.engine.state.layers.items():
        for field in ("A", "G", "D"):
            if hasattr(state, field):
                weight = torch.as_tensor(state.weight).reshape(-1, 1, 1)
                found[name + field] = torch.as_tensor(getattr(state, field)) / weight
    return found


def preconditioned(method, namespace, donate=True, steps=(1.0, 2.0, 3.0), counted=True):
    """Averages and directions after steps on scaled batches; one that fails is taken again, or left."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    core = kf.Preconditioner(method, kf.Clocks(1, 1), kf.Schedules(1e-2, 0.5), donate=donate)
    pre = kt.Preconditioner(model, CE, core, fisher=kf.type2, namespace=namespace)
    x, y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    for scale in steps:
        model.zero_grad()
        with pre.capture():
            f = model(scale * x)
        pre.loss(f, y).backward()
        try:
            pre.step()
        except KeyboardInterrupt as error:
            assert "its batch was taken" in error.__notes__[-1]  # noqa: PT017
            if counted:
                pre.step()
    return averages(pre), [p.grad.clone() for p in model.parameters()]


def fail_refresh(monkeypatch, at):
    road = pytest.importorskip("kfaccore.precondition.road")
    Fails(monkeypatch, road.Road, "_refreshed", at)


@pytest.mark.parametrize("namespace", ["torch", "numpy"])
@pytest.mark.parametrize("method", NETS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_step_that_failed_is_taken_again(monkeypatch, method, namespace, at):
    wanted = preconditioned(method, namespace)
    fail_refresh(monkeypatch, at)
    torch.testing.assert_close(preconditioned(method, namespace), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("namespace", ["torch", "numpy"])
@pytest.mark.parametrize("at", [1, 2])
def test_the_batch_of_a_step_that_failed_counts_in_the_averages(monkeypatch, namespace, at):
    wanted = preconditioned(kf.KFAC(), namespace)
    fail_refresh(monkeypatch, at)
    found = preconditioned(kf.KFAC(), namespace, counted=False)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("donate", [True, False])
def test_a_step_of_a_rule_that_does_not_judge_is_taken_again(monkeypatch, donate):
    wanted = run(FIXED, donate=donate)
    fail_refresh(monkeypatch, 3)
    found = run(FIXED, error=KeyboardInterrupt, donate=donate)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("namespace", ["torch", "numpy"])
def test_layers_whose_averages_were_being_moved_begin_anew(monkeypatch, namespace):
    """The second of two layers: its A has moved, and its G has not."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(1e-2, 0.5), donate=True)
    pre = kt.Preconditioner(model, CE, core, fisher=kf.type2, namespace=namespace)
    x, y = torch.randn(8, 3), torch.arange(8) % 3

    def same(found, wanted):
        torch.testing.assert_close({name: found[name] for name in wanted}, wanted, rtol=1e-12, atol=1e-14)

    def step():
        model.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        pre.step()

    step()
    wanted = {name: x.clone() for name, x in averages(pre).items() if name[0] == "0"}
    factors = pytest.importorskip("kfaccore.factors")
    Fails(monkeypatch, factors.kernels, "average", 4)
    with pytest.raises(KeyboardInterrupt) as told:
        step()
    assert "layers ['2']" in told.value.__notes__[-1]
    layers = pre.engine.state.layers
    assert float(layers["2"].weight.sum()) == 0
    same(averages(pre), wanted)  # the same batch again
    step()
    same(averages(pre), wanted)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
