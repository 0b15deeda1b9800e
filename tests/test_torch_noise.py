"""The loss's own gradients by example in torch, and the plain loop's two lengths: by noise and by another optimizer."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.record.jacobian import adjoint

torch = pytest.importorskip("torch")
kt = pytest.importorskip("kfaccore_torch")
nn = torch.nn


class Tied(nn.Module):
    """An embedding, an attention layer, a norm, and one linear layer used twice."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(7, 8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.token(ids)
        x = self.norm(x + self.mix(x, x, x, need_weights=False)[0])
        return self.head(self.twice(torch.tanh(self.twice(x))).mean(1))


def images(norm):
    inner = (nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten())
    return nn.Sequential(*inner, nn.Linear(36, 3))


CASES = {
    "tied": lambda rng: (Tied(), torch.randint(7, (6, 5), generator=rng)),
    "images": lambda rng: (images(nn.GroupNorm(2, 4)), torch.randn(6, 1, 5, 5, generator=rng)),
    "mixed by BatchNorm": lambda rng: (images(nn.BatchNorm2d(4)), torch.randn(6, 1, 5, 5, generator=rng)),
}


class Keeping(kf.SelfTuning):
    """Remembers what the last step was given."""

    def __call__(self, motion, directions, grads, records, l2, known):
        SEEN.update(grads=grads, known=known, records=records)
        return super().__call__(motion, directions, grads, records, l2, known)


SEEN: dict = {}


@pytest.mark.parametrize("target", ["hard", "soft"])
@pytest.mark.parametrize("name", CASES)
def test_own_gradients_add_up_to_the_gradient(name, target):
    """Of every layer kind, whatever the labels are; layers whose rows mix examples have none."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net, x = CASES[name](rng)
    net, x = net.double(), x if x.dtype == torch.int64 else x.double()
    y = (
        torch.randint(3, (6,), generator=rng)
        if target == "hard"
        else torch.rand(6, 3, generator=rng).softmax(1).double()
    )
    optimizer = kt.Optimizer(
        net, nn.CrossEntropyLoss(label_smoothing=0.1), kf.Preconditioner(kf.KFAC(), step=Keeping())
    )
    optimizer.step(x, y)
    own, grads = SEEN["known"].own, SEEN["grads"]
    for layer, record in own.records.items():
        grad = grads[layer].dense() if isinstance(grads[layer], kf.Factored) else grads[layer]
        found = adjoint(record, np.ones((1, record.batch))) / record.n
        np.testing.assert_allclose(found, grad.reshape(found.shape), rtol=1e-9, atol=1e-12)
    mixed = name == "mixed by BatchNorm"
    assert (len(own.records) < len(grads)) == mixed
    assert optimizer.info.step["with_own"] == len(grads) - len(own.layers(SEEN["records"]))
    assert (optimizer.info.step["with_own"] > 0) == mixed


@pytest.mark.parametrize("name", ["tied", "images"])
def test_own_gradients_are_those_of_one_example(name):
    """Of every example alone, from the loss itself; and a step asks autograd twice, for the draw and for the loss."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net, x = CASES[name](rng)
    net, x = net.double(), x if x.dtype == torch.int64 else x.double()
    y = torch.randint(3, (6,), generator=rng)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=weight)
    optimizer = kt.Optimizer(net, loss, kf.Preconditioner(kf.KFAC(), step=Keeping()))
    alone = [nn.functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1], weight, reduction="sum") for i in range(6)]
    layers = optimizer.engine.plan.layers
    parameters = [p for layer in layers.values() for p in layer.parameters.values()]
    each = [torch.autograd.grad(value, parameters) for value in alone]
    optimizer.step(x, y)
    own = SEEN["known"].own
    for layer, record in own.records.items():
        roles = layers[layer].parameters
        for i, grads in enumerate(each):
            at = {id(p): g for p, g in zip(parameters, grads, strict=True)}
            wanted = optimizer.engine.matrix(layers[layer], {role: at[id(p)] for role, p in roles.items()})
            found = adjoint(record, np.eye(6)[i][None]) / record.n
            np.testing.assert_allclose(found.reshape(wanted.shape), wanted / float(weight[y].sum()), atol=1e-12)


def test_a_step_asks_autograd_once_a_draw_and_once_for_the_loss(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = kt.Optimizer(net, nn.CrossEntropyLoss())
    x, y = torch.randn(24, 5), torch.arange(24) % 3
    for _ in range(2):
        optimizer.step(x, y)  # whose rows are whose is asked here
    asked = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **how: asked.append(1) or grad(*given, **how))
    optimizer.step(x, y)
    assert len(asked) == 2


class KeepingFixed(kf.Fixed):
    """As `Keeping`, for loops that differentiate the loss themselves."""

    def __call__(self, motion, directions, grads, records, l2, known):
        SEEN.update(grads=grads, known=known, records=records)
        return super().__call__(motion, directions, grads, records, l2, known)


def test_own_gradients_of_two_losses_on_one_forward():
    """They add up, and so do the losses."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    pre = kt.Preconditioner(net, loss, kf.Preconditioner(kf.KFAC(), step=KeepingFixed(rescale=kf.Noise())))
    x = torch.randn(6, 5).double()
    with pre.capture():
        f = net(x)
    total = pre.loss(f, torch.tensor([0, 1, 2, 0, 1, 2])) + pre.loss(f, torch.tensor([1, 1, 1, 0, 1, 2]))
    total.backward()
    pre.step()
    assert SEEN["known"].loss == pytest.approx(float(total.detach()), rel=1e-12)
    for layer, record in SEEN["known"].own.records.items():
        found = adjoint(record, np.ones((1, record.batch))) / record.n
        grad = SEEN["grads"][layer]
        np.testing.assert_allclose(found.reshape(grad.shape), grad, rtol=1e-9, atol=1e-12)


def test_the_loss_of_micro_batches_of_a_sum_is_their_sum():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3)).double()
    core = kf.Preconditioner(kf.KFAC(), step=KeepingFixed(rescale=kf.Noise()))
    pre = kt.Preconditioner(net, nn.CrossEntropyLoss(reduction="sum"), core)
    x = torch.randn(6, 5).double()
    y = torch.arange(6) % 3
    total = 0.0
    for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
        with pre.capture():
            f = net(a)
        value = pre.loss(f, b)
        value.backward()
        total += float(value.detach())
    pre.step()
    assert SEEN["known"].loss == pytest.approx(total, rel=1e-12)


def plain(core, optimizer, graft=False, parts=1):
    """Six steps of the plain loop on a small classifier: (losses, preconditioner, model)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(24, 5, generator=rng).double()
    y = x[:, :3].argmax(1)
    pre = kt.Preconditioner(net, nn.CrossEntropyLoss(), core, fisher=kf.type2)
    other = optimizer(net.parameters())
    losses = []
    for _ in range(6):
        other.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with pre.capture():
                f = net(a)
            (pre.loss(f, b) / parts).backward()
        losses.append(float(nn.functional.cross_entropy(net(x), y).detach()))
        if graft:
            pre.graft(other)
        else:
            pre.step()
            other.step()
    return losses, pre, net


def noisy():
    return kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.01), step=kf.Fixed(rescale=kf.Noise()))


def test_the_plain_loop_with_lengths_by_noise():
    """Micro-batches are one batch, and the loss falls at rate 1 without one being chosen."""
    losses, pre, net = plain(noisy(), lambda p: torch.optim.SGD(p, 1.0))
    assert losses[-1] < 0.8 * losses[0]
    assert pre.info.step["with_own"] == 0
    _, _, other = plain(noisy(), lambda p: torch.optim.SGD(p, 1.0), parts=2)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_grafting_goes_where_kfac_points_and_as_far_as_the_optimizer():
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1), step=kf.Fixed(rescale=kf.Graft()))
    losses, pre, net = plain(core, lambda p: torch.optim.Adam(p, 0.01), graft=True)
    assert losses[-1] < losses[0]
    before = [p.detach().clone() for p in net.parameters()]
    adam = torch.optim.Adam(net.parameters(), 0.01)
    x = torch.randn(8, 5).double()
    with pre.capture():
        f = net(x)
    net.zero_grad()
    pre.loss(f, torch.zeros(8, dtype=torch.int64)).backward()
    pre.graft(adam)
    moved = [q - p.detach() for p, q in zip(net.parameters(), before, strict=True)]
    sizes = [float(sum(m.square().sum() for m in pair)) ** 0.5 for pair in (moved[:2], moved[2:])]
    counts = [sum(m.numel() for m in pair) for pair in (moved[:2], moved[2:])]
    np.testing.assert_allclose(sizes, 0.01 * np.sqrt(counts), rtol=1e-4)  # Adam's first step: the rate in every entry
    with pytest.raises(ValueError, match="Graft got no lengths for layers"):
        plain(core, lambda p: torch.optim.SGD(p, 1.0))
