"""A GradScaler around the loop: the step is the one without it, unscaled before or after, whatever the rule."""

from __future__ import annotations

import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")
CE = nn.CrossEntropyLoss()
RULES = {
    "plain": kf.Fixed(0.1),
    "momentum": kf.Fixed(0.1, 0.9),
    "clipped": kf.Fixed(1.0, rescale=kf.KLClip(1e-3)),
    "bounded": kf.Fixed(1.0, rescale=kf.NormConstraint(0.1)),
    "noise": kf.Fixed(1.0, rescale=kf.Noise()),
}


class Net(nn.Module):
    """Of two tables in one parameter only the used one is a layer's; the shift is nobody's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.both, self.shift = nn.Linear(3, 5), nn.Parameter(torch.randn(2, 3, 5)), nn.Parameter(torch.ones(5))

    def forward(self, x):
        return nn.functional.linear(self.a(x).tanh() * self.shift.exp(), self.both[1])


def data():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def trained(rule, unscale=None, step=None):
    """Five steps of two micro-batches; `unscale` None for no scaler, else how many of two optimizers are unscaled."""
    model = Net()
    x, y = data()
    pre = kt.Preconditioner(model, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(2, 2), step=rule))
    parts = [model.a.parameters(), [model.both, model.shift]]
    optimizers = [torch.optim.SGD(part, 1.0) for part in parts]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2, enabled=unscale is not None)
    for _ in range(5):
        model.zero_grad()
        for part in (slice(4), slice(4, 8)):
            with pre.capture():
                f = model(x[part])
            scaler.scale(pre.loss(f, y[part]) / 2).backward()
        for optimizer in optimizers[: unscale or 0]:
            scaler.unscale_(optimizer)
        pre.step() if step is None else step(pre, scaler, optimizers)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    return [p.detach() for p in model.parameters()], pre.info.step


@pytest.mark.parametrize("unscale", [0, 1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_the_step_is_that_without_a_scaler(rule, unscale):
    wanted, told = trained(RULES[rule])
    found, said = trained(RULES[rule], unscale)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert {k: float(v) for k, v in said.items()} == pytest.approx({k: float(v) for k, v in told.items()}, rel=1e-9)


def test_a_step_that_raises_leaves_the_gradients_scaled():
    found = []

    def step(pre, scaler, optimizers):
        before = [p.grad.clone() for p in pre.engine.plan.trained]
        pre.engine.core.__dict__["do"] = None
        with pytest.raises(TypeError):
            pre.step()
        found.extend(zip(before, [p.grad for p in pre.engine.plan.trained], strict=True))
        del pre.engine.core.__dict__["do"]
        raise StopIteration

    with pytest.raises(StopIteration):
        trained(RULES["plain"], 0, step)
    for before, after in found:
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_graft_asks_for_gradients_that_are_unscaled():
    def step(pre, scaler, optimizers):
        pre.graft(optimizers[0])

    with pytest.raises(ValueError, match=r"call scaler\.unscale_\(optimizer\) before graft"):
        trained(kf.Fixed(rescale=kf.Graft()), 0, step)
