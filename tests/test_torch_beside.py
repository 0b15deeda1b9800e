"""What a backward pass moves beside its gradients is moved by the loss alone, not by draws."""

from __future__ import annotations

import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

from torch.utils.checkpoint import checkpoint  # noqa: E402

import kfaccore_torch as kt  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")
CE = nn.CrossEntropyLoss()
WAYS = {
    "monte_carlo": lambda model: kt.Preconditioner(model, CE),
    "type2": lambda model: kt.Preconditioner(model, CE, fisher=kf.type2),
    "draws": lambda model: kt.Preconditioner(model, CE, draws=3),
    "own": lambda model: kt.Preconditioner(model, CE, kf.Preconditioner(kf.KFAC(), step=kf.Fixed(rescale=kf.Noise()))),
}


class Moving(nn.Module):
    """Between its layers are averages, a counter, a list and a tensor bound anew, all moved by its forward."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("state", torch.zeros(()))
        self.calls = 0
        self.sizes = []

    def forward(self, x):
        self.calls += 1
        self.sizes.append(len(x))
        self.state = self.state + 1
        return nn.functional.dropout(self.norm(x), 0.0).tanh()


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.moving = nn.Linear(3, 5), nn.Linear(5, 3), Moving()
        self.w, self.gain = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.ones(5))  # seen in what autograd keeps

    def middle(self, x):
        return self.moving(self.a(x)) @ self.w * self.gain

    def forward(self, x):
        return self.b(checkpoint(self.middle, x, use_reentrant=False))


class Fused(torch.autograd.Function):
    """A product whose backward adds the weight's gradient itself, and draws a random number."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        w.main_grad += g.t() @ x
        w.count = w.count + 1
        w.grad = g.t() @ x if w.grad is None else w.grad.add_(g.t() @ x)
        w.number = float(torch.rand(()))
        return g @ w, None


class Given(Fused):
    """A product whose backward sets the weight's gradient itself."""

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        w.grad = g.t() @ x
        return g @ w, None


class Accumulating(nn.Module):
    def __init__(self, product=Fused):
        super().__init__()
        self.product = product
        torch.manual_seed(1)
        self.a, self.w, self.c = nn.Linear(3, 5), nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 3)
        self.w.main_grad = torch.zeros(5, 5)
        self.w.count = 0

    def forward(self, x):
        return self.c(self.product.apply(self.a(x).tanh(), self.w).tanh())


class Listening(nn.Module):
    """Notes the size of a gradient on its way, by a hook of a tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 3)
        self.register_buffer("size", torch.zeros(()))
        self.count = 0

    def forward(self, x):
        h = self.a(x)
        h.register_hook(self.note)
        return self.b(h.tanh())

    def note(self, g):
        self.size = 0.9 * self.size + g.norm()
        self.count += 1


def data():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    return x + 1, torch.arange(8) % 3


def trained(model, way=None):
    """Five steps whose directions are not followed, two micro-batches each, by a plain loop or one of the `WAYS`."""
    x, y = data()
    pre = None if way is None else WAYS[way](model)
    torch.manual_seed(2)
    for _ in range(5):
        for p in model.parameters():
            p.grad = None
        for part in (slice(4), slice(4, 8)):
            if pre is None:
                CE(model(x[part]), y[part]).backward()
            else:
                with pre.capture():
                    f = model(x[part])
                pre.loss(f, y[part]).backward()
        if pre is not None:
            pre.step()
    return model


@pytest.mark.parametrize("way", WAYS)
def test_a_recomputed_forward_counts_once(way):
    wanted, found = trained(Checkpointed()).moving, trained(Checkpointed(), way).moving
    assert (found.calls, found.sizes) == (wanted.calls, wanted.sizes) == (20, [4] * 20)
    for (name, a), (_, b) in zip(found.named_buffers(), wanted.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_the_whole_step_recomputes_once():
    x, y = data()
    model, plain = Checkpointed(), Checkpointed()
    optimizer = kt.Optimizer(model, CE, kf.Preconditioner(kf.KFAC(), step=kf.Fixed(0.0)), fisher=kf.type2)
    for _ in range(3):
        optimizer.step(x, y)
        CE(plain(x), y).backward()
    assert model.moving.calls == plain.moving.calls == 6
    torch.testing.assert_close(model.moving.norm.running_mean, plain.moving.norm.running_mean, rtol=1e-14, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_a_backward_that_adds_by_itself_adds_the_loss_alone(way):
    wanted, found = trained(Accumulating()).w, trained(Accumulating(), way).w
    torch.testing.assert_close(found.main_grad, wanted.main_grad, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-14, atol=0)
    assert (found.count, found.number) == (wanted.count, wanted.number)


def test_gradients_that_there_were_none_of_are_none_after_draws():
    x, y = data()
    model = Accumulating(Given)
    pre = kt.Preconditioner(model, CE)
    for _ in range(5):
        model.zero_grad()
        with pre.capture():
            f = model(x)
        loss = pre.loss(f, y)
        assert model.w.grad is None
        loss.backward()
        pre.step()


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_notes_the_loss_alone(way):
    wanted, found = trained(Listening()), trained(Listening(), way)
    torch.testing.assert_close(found.size, wanted.size, rtol=1e-13, atol=0)
    assert found.count == wanted.count == 10


def test_other_graphs_are_not_watched():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    pre = WAYS["type2"](model)
    x, y = data()
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()
    pre.step()
    assert not pre.engine.beside.turns
