"""A captured forward for each step of an episode, all losses at its end: what is looked at grows with the steps."""

from __future__ import annotations

import pytest

import kfaccore as kf

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
    pre.step()
    torch.testing.assert_close(got, torch.cat([p.grad.flatten() for p in net.parameters()]), rtol=1e-10, atol=1e-12)


def test_looks_grow_with_the_steps(monkeypatch):
    """Forwards that are looked at before another: all of them at each doubling, else the newest."""
    assert looks(monkeypatch, 128) <= min(4.5 * looks(monkeypatch, 32), 8 * 128)
