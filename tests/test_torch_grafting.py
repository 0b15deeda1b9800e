"""`pre.graft`: the optimizer's own step where K-FAC's direction is the gradient's, whatever its options."""

from __future__ import annotations

import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("torch_double")


class Cross(nn.Module):
    """Its packed projection is two layers."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, bias=False)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        q, kv = x[:, :3], x[:, 3:]
        return self.out(self.attention(q, kv, kv, need_weights=False)[0].mean(1))


class Part(nn.Module):
    """Of its table only the first rows are used, and are a layer."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))
        self.out = nn.Linear(3, 3)

    def forward(self, x):
        return self.out(x.mean(1) @ self.w[:3].T)


def stepped(make, data, graft, optimizer, damping=1e8):
    torch.manual_seed(1)
    model = make()
    other = optimizer(model.parameters())
    x, y = data
    if not graft:
        CE(model(x), y).backward()
        other.step()
        return model, other
    step = kf.Fixed(rescale=kf.Graft())
    core = kf.Preconditioner(kf.KFAC(split=kf.per_factor), schedules=kf.Schedules(damping), step=step)
    pre = kt.Preconditioner(model, CE, core, fisher=kf.type2)
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()
    pre.graft(other)
    return model, other


def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(8, 8, 4, generator=g), torch.arange(8) % 3


@pytest.mark.parametrize("make", [Cross, Part])
@pytest.mark.parametrize(
    "how", [{}, {"maximize": True}, {"weight_decay": 0.3}, {"maximize": True, "weight_decay": 0.3}], ids=str
)
def test_along_the_gradient_it_is_sgd(make, how):
    got, want = (stepped(make, data(), graft, lambda p: torch.optim.SGD(p, 0.1, **how))[0] for graft in (True, False))
    for p, q in zip(got.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_decay_beside_the_step_stays_beside_it():
    """AdamW: weights shrink by rate times decay, and the rest is as long as Adam's step."""
    lr, decay = 0.1, 0.5
    old = dict(stepped(Cross, data(), False, lambda p: torch.optim.SGD(p, 0.0))[0].named_parameters())
    got, used = stepped(Cross, data(), True, lambda p: torch.optim.AdamW(p, lr, weight_decay=decay), damping=0.1)
    plain = dict(stepped(Cross, data(), True, lambda p: torch.optim.Adam(p, lr), damping=0.1)[0].named_parameters())
    for name, p in got.named_parameters():
        torch.testing.assert_close(p, plain[name] - lr * decay * old[name], rtol=1e-12, atol=1e-14)
    assert used.param_groups[0]["weight_decay"] == decay


def test_a_decay_of_unknown_kind_is_refused():
    class Own(torch.optim.SGD):
        pass

    with pytest.raises(ValueError, match="graft does not know whether the weight decay of Own is in the gradient"):
        stepped(Cross, data(), True, lambda p: Own(p, 0.1, weight_decay=0.1))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3)
        self.power = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.out(x) ** torch.exp(self.power)  # a power of a leaf has no layer


@pytest.mark.parametrize("kind", ["graft", "rest"])
def test_a_batch_that_is_not_finite_leaves_the_other_optimizer_what_it_was(kind):
    model, y = Scaled(), torch.tensor([0, 1, 2, 0])
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.full((4, 4), torch.nan)
    if kind == "rest":
        adam = kt.Optimizer(model, CE, kf.Preconditioner(kf.KFAC()), rest=torch.optim.AdamW)
        adam.step(x, y)
        other = adam.rest
    else:
        other = torch.optim.AdamW(model.parameters(), lr=0.1)
        pre = kt.Preconditioner(model, CE, kf.Preconditioner(kf.KFAC(), step=kf.Fixed(rescale=kf.Graft())))
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        pre.graft(other)
    assert not other.state
    for old, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, p)
