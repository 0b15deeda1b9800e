"""Errors of steps where nothing can be seen say so, and say what to do."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")
CE = nn.CrossEntropyLoss()


class Once(torch.autograd.Function):
    """Lets go of what it kept the first time that a backward pass comes through."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        x = ctx.x
        del ctx.x
        return g * (1 - x.tanh() ** 2)


def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.randn(8, 3), torch.arange(8) % 3


def functional(shell):
    model, x, y = made()
    pre = kt.Preconditioner(model, CE)
    optimizer = kt.Optimizer(model, CE)

    def loss(parameters):
        if shell == "optimizer":
            return optimizer.step(x, y)
        with pre.capture():
            f = torch.func.functional_call(model, parameters, (x,))
        return pre.loss(f, y)

    return torch.func.grad(loss)(dict(model.named_parameters()))


@pytest.mark.parametrize("shell", ["optimizer", "preconditioner"])
def test_inside_a_transform(shell):
    with pytest.raises(ValueError, match=r"inside a transform of torch\.func .*loss\.backward\(\) outside"):
        functional(shell)


def test_functional_calls_with_the_models_own_parameters_are_seen():
    model, x, y = made()
    pre = kt.Preconditioner(model, CE)
    with pre.capture():
        f = torch.func.functional_call(model, dict(model.named_parameters()), (x,))
    pre.loss(f, y).backward()
    pre.step()
    assert pre.report().share == 1.0


def test_inside_inference_mode():
    model, x, y = made()
    calls = (
        lambda: kt.Optimizer(model, CE).step(x, y),
        lambda: kt.records(model, CE, x, y),
        lambda: kt.plan(model, x),
        lambda: next(iter(kt.Stream(model, CE, [(x, y)]))),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"torch\.inference_mode"), torch.inference_mode():
            call()
    pre = kt.Preconditioner(model, CE)
    with torch.inference_mode(), pre.capture():
        f = model(x)
    with torch.inference_mode():
        assert float(pre.loss(f, y)) == float(CE(model(x), y))  # a look at the loss alone


def test_another_forward_after_the_backward():
    model, x, y = made()
    pre = kt.Preconditioner(model, CE)
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()
    with pytest.raises(ValueError, match=r"captured last was differentiated.*inside `with pre\.capture\(\):` too"):
        pre.loss(model(x[:3]), y[:3])
    with torch.no_grad():
        assert float(pre.loss(model(x[:3]), y[:3])) == float(CE(model(x[:3]), y[:3]))
    pre.step()


def test_a_function_that_is_good_for_one_pass():
    model, x, y = made()
    pre = kt.Preconditioner(model, CE)
    with pre.capture():
        f = model[2](Once.apply(model[0](x)))
    with pytest.raises(RuntimeError, match=r"second backward pass .*has no attribute 'x'.*save_for_backward"):
        pre.loss(f, y)
