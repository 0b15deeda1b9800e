"""A captured forward for each step of an episode, all losses at its end: what is looked at grows with the steps. And
policies, whose gradient is not that of the loss whose curvature they have."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
import torch_oracle as oracle

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402
from kfaccore_torch import opened  # noqa: E402

pytestmark = [pytest.mark.usefixtures("torch_double"), pytest.mark.filterwarnings("error")]


def policy():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1))
    return net, kt.Preconditioner(net, nn.CrossEntropyLoss(), core, fisher=kf.type2)


def episode(steps, reverse=False):
    """Directions of an episode, a state at a time."""
    net, pre = policy()
    x, y = torch.randn(steps, 1, 4), torch.randint(3, (steps, 1))
    predictions = []
    for state in x:
        with pre.capture():
            predictions.append(net(state) * 2)
        with torch.no_grad(), pre.capture():
            net(state)
    pairs = list(zip(predictions, y, strict=True))
    sum(pre.loss(f, action) for f, action in (reversed(pairs) if reverse else pairs)).backward()
    pre.step()
    return torch.cat([p.grad.flatten() for p in net.parameters()]), (x[:, 0], y[:, 0])


def looks(monkeypatch, steps):
    """How many forwards were looked at."""
    plain, counted = opened._held, []
    monkeypatch.setattr(opened, "_held", lambda seen: counted.append(seen) or plain(seen))
    episode(steps, reverse=True)
    monkeypatch.undo()
    return len(counted)


@pytest.mark.parametrize("reverse", [False, True])
def test_an_episode_is_a_batch(reverse):
    got, (x, y) = episode(20, reverse)
    net, pre = policy()
    with pre.capture():
        f = net(x) * 2
    (20 * pre.loss(f, y)).backward()
    with pytest.warns(UserWarning, match="multiplied by 20"):  # the sum over the episode, of which F is the mean
        pre.step()
    torch.testing.assert_close(got, torch.cat([p.grad.flatten() for p in net.parameters()]), rtol=1e-10, atol=1e-12)


def test_looks_grow_with_the_steps(monkeypatch):
    """Forwards that are looked at before another: all of them at each doubling, else the newest."""
    assert looks(monkeypatch, 128) <= min(4.5 * looks(monkeypatch, 32), 8 * 128)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_policy_gradient_goes_with_the_fisher_of_the_policy(parts):
    """The clipped surrogate and the squares of a value head, over F of both, by brute force."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"trunk": nn.Linear(3, 4), "pi": nn.Linear(4, 3), "v": nn.Linear(4, 1)})
    core = kf.Preconditioner(kf.Exact(), kf.Clocks(1, 1), kf.Schedules(0.1, 0.0))
    pre = kt.Preconditioner(net, kf.Joint({"pi": nn.CrossEntropyLoss(), "v": kf.Gaussian()}), core, fisher=kf.type2)
    x, advantage, returns = torch.randn(6, 3), torch.randn(6), torch.randn(6, 1)
    actions = torch.tensor([0, 2, 1, 1, 0, 2])
    before = torch.randn(6, 3).log_softmax(1).gather(1, actions[:, None])[:, 0]

    def forward(x):
        h = torch.tanh(net["trunk"](x))
        return {"pi": net["pi"](h), "v": net["v"](h)}

    def surrogate(f, part):
        ratio = (f["pi"].log_softmax(1).gather(1, actions[part, None])[:, 0] - before[part]).exp()
        gain = torch.min(ratio * advantage[part], ratio.clamp(0.8, 1.2) * advantage[part])
        return 0.5 * (f["v"] - returns[part]).square().mean() - gain.mean()

    for part in torch.arange(6).chunk(parts):
        with pre.capture():
            f = forward(x[part])
        loss = 0 * pre.loss(f, {"pi": actions[part], "v": returns[part]}) + pre.extra(surrogate(f, part))
        (loss / parts).backward()
    grads = torch.autograd.grad(surrogate(forward(x), slice(None)), list(net.parameters()))
    named = dict(zip((name for name, _ in net.named_parameters()), grads, strict=True))
    pre.step()
    for layer in kt.plan(net).layers.values():
        policy = oracle.ggn(lambda x: forward(x)["pi"], lambda g: nn.functional.cross_entropy(g, actions), x, layer)
        value = oracle.ggn(lambda x: forward(x)["v"], lambda g: 0.5 * (g - returns).square().sum(1).mean(), x, layer)
        V = layer.matrix({role: named[path].numpy() for role, path in layer.paths.items()})
        F = (policy + value)[0]
        V = np.linalg.solve(F + 0.1 * np.eye(len(F)), V.reshape(-1)).reshape(V.shape)
        for role, direction in layer.arrays(V).items():
            found = net.get_parameter(layer.paths[role]).grad
            torch.testing.assert_close(found, torch.as_tensor(direction), rtol=1e-9, atol=1e-12)
