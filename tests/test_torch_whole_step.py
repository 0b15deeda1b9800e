"""A function that torch.compile is given whole, K-FAC's steps in it: those run as they were written."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")
CE = nn.CrossEntropyLoss()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return 2.0 * self.net(x)


def data():
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def loop():
    model = Net()
    pre = kt.Preconditioner(model, CE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(x, y):
        optimizer.zero_grad()
        with pre.capture():
            f = model(x)
        loss = pre.loss(f, y)
        loss.backward()
        pre.step()
        optimizer.step()
        return loss.detach()

    return step


def whole():
    return kt.Optimizer(Net(), CE).step


@pytest.mark.filterwarnings("ignore")  # of the compiler, which looks at all that it meets
@pytest.mark.parametrize("made", [loop, whole])
def test_a_compiled_step_is_the_step(made):
    plain, compiled = made(), torch.compile(made(), backend="eager")
    for _ in range(3):
        torch.testing.assert_close(float(compiled(*data())), float(plain(*data())), rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_backward_leaves_the_hooks_alone():
    """Else the compiler makes what they do anew for each pass, until it gives up and says so."""
    model, (x, y) = Net(), data()
    pre = kt.Preconditioner(model, CE)
    backward = torch.compile(lambda loss: loss.backward(), backend="eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=3):
        for _ in range(5):
            model.zero_grad()
            with pre.capture():
                f = model(x)
            backward(pre.loss(f, y))
            pre.step()


def test_capture_is_a_context_that_can_be_entered_again_and_decorates():
    pre = kt.Preconditioner(Net(), CE)
    x, y = data()
    entered = pre.capture()
    for _ in range(2):
        with entered:
            f = pre.engine.model(x)
        pre.loss(f, y).backward()
    forward = pre.capture()(pre.engine.model)
    pre.loss(forward(x), y).backward()
    pre.step()
    with pytest.raises(RuntimeError, match="inside"), pre.capture():
        raise RuntimeError("inside")
