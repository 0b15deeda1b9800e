"""Hooks of parameters under the whole step: obeyed as in a loop of one's own, whatever the size of the batch."""

from __future__ import annotations

import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")
CE = nn.CrossEntropyLoss()


def halve(p):
    p.grad.mul_(0.5)


def bind(p):
    p.grad = 2 * p.grad + 0.1


HOOKS = {
    "masked": lambda p: p.register_hook(lambda g: g * (torch.arange(g.shape[-1]) % 2)),
    "zeroed": lambda p: p.register_hook(torch.zeros_like),
    "accumulated": lambda p: p.register_post_accumulate_grad_hook(halve),
    "bound anew": lambda p: p.register_post_accumulate_grad_hook(bind),
    "both": lambda p: (HOOKS["masked"](p), HOOKS["accumulated"](p), HOOKS["bound anew"](p)),
}


def model(hook):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(12, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    HOOKS[hook](net[0].weight)
    HOOKS[hook](net[2].bias)
    return net


def data(times):
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    return x.repeat(times, 1), (torch.arange(8) % 3).repeat(times)


@pytest.mark.parametrize("rule", [kf.Fixed(0.1), kf.Fixed(1.0, rescale=kf.KLClip(1e-3))], ids=["fixed", "clipped"])
@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("hook", HOOKS)
def test_the_whole_step_is_the_loop(hook, times, rule):
    x, y = data(times)
    ours, theirs = model(hook), model(hook)
    optimizer = kt.Optimizer(ours, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), step=rule), fisher=kf.type2)
    pre = kt.Preconditioner(theirs, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), step=rule), fisher=kf.type2)
    sgd = torch.optim.SGD(theirs.parameters(), 1.0)
    for _ in range(2):
        optimizer.step(x, y)
        sgd.zero_grad()
        with pre.capture():
            f = theirs(x)
        (pre.loss(f, y) + pre.extra(torch.zeros(()))).backward()  # what hooks do is no term of the loss
        pre.step()
        sgd.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert a.grad is None


def test_rows_that_a_method_weighs_are_refused():
    net = model("masked")
    fngd = kf.Preconditioner(kf.FNGD(steps=1), step=kf.Fixed(0.1))  # the second step rests
    optimizer = kt.Optimizer(net, CE, fngd, fisher=kf.empirical, rest=torch.optim.SGD)
    x, y = data(1)
    optimizer.step(x, y, ids=torch.arange(8))
    with pytest.raises(ValueError, match=r"\['0', '2'\] have hooks.*FNGD"):
        optimizer.step(x, y, ids=torch.arange(8))
